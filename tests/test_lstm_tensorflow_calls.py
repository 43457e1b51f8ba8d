"""`twinfuse.tensorflow.lstm` and `lstm_cell`: what is computed, transformations."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched, require

tf = require("tensorflow")

import twinfuse  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402
from tests.test_lstm_tensorflow import FUNCTIONS, OPTIONS, operands  # noqa: E402
from twinfuse import _core  # noqa: E402
from twinfuse.tensorflow import _binding  # noqa: E402
from twinfuse.tensorflow._lstm_gradients import LAYER  # noqa: E402

NAMES = ("x", "kernel", "recurrent_kernel", "bias", "h", "c")


def by_reference(function: Any, *arguments: Any) -> Any:
    with twinfuse.use_backend("reference"):
        return function(*arguments)


def gradients(function: Any, values: list[Any]) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = tf.reduce_sum(tf.sin(function(*values)))
    return tape.gradient(y, values)


# What is computed


def computed(fetched: Any) -> dict[str, set[int]]:
    """The outputs of each LSTM op that it fills when a session computes `fetched`."""
    wanted = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
    seen = tf.compat.v1.RunMetadata()
    with tf.compat.v1.Session() as session:
        session.run(fetched, options=wanted, run_metadata=seen)
    return {
        node.node_name.split("/")[-1]: {output.slot for output in node.output}
        for device in seen.step_stats.dev_stats
        for node in device.node_stats
        if node.node_name.split("/")[-1] in ("TwinfuseLstm", "TwinfuseLstmGrad")
    }


def test_a_graph_computes_what_is_read() -> None:
    with tf.Graph().as_default():
        o = operands()
        # What follows from constants would be computed before.
        o["x"] = tf.random.normal(o["x"].shape, dtype=tf.float64)
        y, h, c = tftf.lstm(o["x"], o["kernel"], o["recurrent_kernel"], o["bias"])
        grads = tf.gradients(tf.reduce_sum(y), [o["x"], o["kernel"]])
        assert computed(y) == {"TwinfuseLstm": {0}}
        assert computed([h, c]) == {"TwinfuseLstm": {1, 2}}
        # Behind the outputs are gates, cells and hidden states; the gradients come in the order of
        # x, kernel, recurrent kernel, bias.
        assert computed(grads) == {"TwinfuseLstm": {3, 4, 5}, "TwinfuseLstmGrad": {0, 1}}
        assert computed(grads[1]) == {"TwinfuseLstm": {3, 4, 5}, "TwinfuseLstmGrad": {1}}


@pytest.mark.parametrize("name", ["plain", "cell"])
def test_eager_calls_save_where_a_tape_records(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, calls = "twinfuse_lstm_cell" if name == "cell" else "twinfuse_lstm", []
    fused = getattr(_binding.ops, op)

    def spy(**arguments: Any) -> Any:
        calls.append(arguments["num_saved"])
        return fused(**arguments)

    monkeypatch.setattr(_binding.ops, op, spy)
    values = list(operands().values())
    FUNCTIONS[name](*values)
    gradients(FUNCTIONS[name], values)
    with tf.GradientTape() as tape, tape.stop_recording():
        FUNCTIONS[name](*values)
    with tf.autodiff.ForwardAccumulator(values[0], tf.ones_like(values[0])):
        FUNCTIONS[name](*values)
    assert calls == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["plain", "cell"])
@pytest.mark.parametrize("target", range(6))
def test_only_the_gradient_asked_for(
    name: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, recorded = f"twinfuse_lstm{'_cell' * (name == 'cell')}_grad", []
    fused = getattr(_binding.ops, op)

    def spy(**arguments: Any) -> Any:
        recorded.append([n for n in NAMES if arguments[f"num_grad_{n}"]])
        return fused(**arguments)

    monkeypatch.setattr(_binding.ops, op, spy)
    values = list(operands().values())
    with tf.GradientTape() as tape:
        tape.watch(values[target])
        y = FUNCTIONS[name](*values)
    grad = tape.gradient(y, values[target])
    assert recorded == [[NAMES[target]]]
    with twinfuse.use_backend("reference"), tf.GradientTape() as tape:
        tape.watch(values[target])
        y = FUNCTIONS[name](*values)
    tf_cases.assert_close(grad, tape.gradient(y, values[target]))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("graph", [False, True])
def test_gradient_of_one_result(which: int, graph: bool) -> None:
    def run(*values: Any) -> Any:
        x, kernel, recurrent_kernel, bias, h, c = values
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = tftf.lstm(x, kernel, recurrent_kernel, bias, (h, c))[which]
            # A gather hands down IndexedSlices.
            loss = tf.reduce_sum(tf.sin(tf.gather(y, [0, 2, 2])))
        return tape.gradient(loss, values)

    values = list(operands().values())
    ours = (tf.function(run) if graph else run)(*values)
    tf_cases.assert_close(ours, by_reference(run, *values))


def test_gradient_outside_of_the_function(launched: Launched) -> None:
    values = list(operands().values())
    function = tf.function(FUNCTIONS["mask"])
    expected = by_reference(gradients, FUNCTIONS["mask"], values)
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        ours = gradients(function, values)
    tf_cases.assert_close(ours, expected)


def test_inside_a_loop(launched: Launched) -> None:
    x, kernel, recurrent_kernel, bias, h, c = operands().values()

    def run(kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            state = (h, c)
            for _ in tf.range(3):
                state = tftf.lstm_cell(x[:, 0], state, kernel, recurrent_kernel, bias)
            y = tf.reduce_sum(state[0])
        return y, tape.gradient(y, kernel)

    with launched("lstm_cell_forward_", times=3), launched("lstm_cell_backward_", times=3):
        ours = tf.function(run)(kernel)
    tf_cases.assert_close(ours, by_reference(run, kernel))


# Transformations


@pytest.mark.parametrize("name", ["plain", "mask", "norm", "dropout", "cell"])
def test_forward_accumulator(name: str) -> None:
    values = list(operands().values())
    ours = tf_cases.forward_mode(FUNCTIONS[name], values)
    assert float(tf.norm(ours[0])) > 0
    theirs = by_reference(tf_cases.forward_mode, FUNCTIONS[name], values)
    tf_cases.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["mask", "norm", "cell"])
@pytest.mark.parametrize("graph", [False, True])
def test_jacobian(name: str, graph: bool, launched: Launched) -> None:
    values = list(operands(steps=4, batch=3, inputs=2, units=6).values())

    def run(*values: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(values)
            y = FUNCTIONS[name](*values)
        return tape.jacobian(y, values)

    with launched("lstm_"):
        ours = (tf.function(run) if graph else run)(*values)
    tf_cases.assert_close(ours, by_reference(run, *values))


@pytest.mark.parametrize("name", ["plain", "mask", "norm", "cell", "extras", "dropout"])
@pytest.mark.parametrize("stacked", ["x", "x h c", "h", "kernel"])
def test_vectorized_map(name: str, stacked: str, launched: Launched) -> None:
    values = operands()
    more = {
        n: tf_cases.random(4, *values[n].shape, seed=9) / 2 for n in stacked.split() if n in values
    }

    def one(given: dict[str, Any]) -> Any:
        return FUNCTIONS[name](*{**values, **given}.values())

    # Iterations with kernels of their own, or with noise, take one call each.
    together = stacked != "kernel" and name not in ("extras", "dropout")
    with launched("lstm_", times=1 if together else 4):
        ours = tf.vectorized_map(one, more)
    with twinfuse.use_backend("reference"):
        theirs = tf.map_fn(one, more, fn_output_signature=tf.float64)
    tf_cases.assert_close(ours, theirs)


def test_vectorized_gradients() -> None:
    values = operands()

    def one(x: Any) -> Any:
        return gradients(FUNCTIONS["mask"], [x, *list(values.values())[1:]])

    more = tf_cases.random(4, *values["x"].shape, seed=9) / 2
    ours = tf.vectorized_map(one, more)
    with twinfuse.use_backend("reference"):
        theirs = tf.map_fn(one, more, fn_output_signature=[tf.float64] * 6)
    tf_cases.assert_close(ours, theirs)


def test_recomputed_gradients(launched: Launched) -> None:
    values = list(operands().values())
    with launched("lstm_forward_", times=2), launched("lstm_backward_", times=1):
        ours = gradients(tf.recompute_grad(FUNCTIONS["mask"]), values)
    tf_cases.assert_close(ours, by_reference(gradients, FUNCTIONS["mask"], values))


def test_gradients_of_a_graph_that_saves_nothing(launched: Launched) -> None:
    o = operands()

    @tf.function
    def function(x: Any, kernel: Any) -> Any:
        absent = {*LAYER.operands} - {*LAYER.required, "bias"}
        flags = ("go_backwards", "time_major", "zero_output_for_mask")
        outputs = _binding.ops.twinfuse_lstm(
            x=x,
            kernel=kernel,
            recurrent_kernel=o["recurrent_kernel"],
            bias=[o["bias"]],
            activation=0,
            recurrent_activation=1,
            norm_epsilon="0.001",
            num_outputs=1,
            num_saved=0,
            **{name: [] for name in absent},
            **dict.fromkeys(flags, False),
        )
        return outputs.outputs[0]

    with launched("lstm_forward_", times=2), launched("lstm_backward_", times=1):
        ours = gradients(function, [o["x"], o["kernel"]])

    def native(x: Any, kernel: Any) -> Any:
        return tftf.lstm(x, kernel, o["recurrent_kernel"], o["bias"])[0]

    tf_cases.assert_close(ours, gradients(native, [o["x"], o["kernel"]]))


def test_explain_names_what_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where kernels differ by size."""
    asked: list[Any] = []

    def kernel(*args: Any, **sizes: int) -> str:
        asked.append((*args, *sizes.values()))
        return "the_kernel"

    monkeypatch.setattr(_core, "lstm_gpu_kernel", kernel)
    monkeypatch.setattr(_core, "reported", lambda name, *_: ("cuda", name, ""))
    x, weights = tf.zeros([5, 3, 4]), (tf.zeros([4, 24]), tf.zeros([6, 24]))
    state = (tf.zeros([5, 6]), tf.zeros([5, 6]))
    (row,) = twinfuse.explain(tftf.lstm, x, *weights)
    assert row.kernel.endswith(" (the_kernel)")
    twinfuse.explain(tftf.lstm, x, *weights, time_major=True)
    twinfuse.explain(tftf.lstm_cell, x[:, 0], state, *weights)
    assert [sizes[-3:] for sizes in asked] == [(3, 5, 6), (5, 3, 6), (1, 5, 6)]


def test_explain() -> None:
    o = operands()
    arguments = (o["x"], o["kernel"], o["recurrent_kernel"])
    (row,) = twinfuse.explain(tftf.lstm, *arguments, **OPTIONS["mask"])
    assert row.op == "lstm" and row.backend == "cpu" and row.kernel.startswith("lstm_forward_f64_")
    (row,) = twinfuse.explain(tftf.lstm_cell, o["x"][:, 0], (o["h"], o["c"]), *arguments[1:])
    assert row.kernel.startswith("lstm_cell_forward_f64_")
    with twinfuse.use_backend("reference"):
        assert twinfuse.explain(tftf.lstm, *arguments)[0].backend == "reference"


@pytest.mark.parametrize("name", ["plain", "norm"])
def test_saved_model(name: str, tmp_path: Path, launched: Launched) -> None:
    o, options = operands(), OPTIONS[name]

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, 5], tf.float64)])
        def __call__(self, x: Any) -> Any:
            return tftf.lstm(x, o["kernel"], o["recurrent_kernel"], o["bias"], **options)

    module = Module()
    tf.saved_model.save(module, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tf.saved_model.load(str(tmp_path))
    with launched("lstm_forward_", times=1):
        got = loaded(o["x"])
    for a, b in zip(got, module(o["x"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_options_without_a_gpu_kernel_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a graph is traced, which could not fall back when it runs."""
    o = operands()
    call = (o["x"], o["kernel"], o["recurrent_kernel"], o["bias"])
    norm = tf.ones((2, o["kernel"].shape[1]), tf.float64)
    monkeypatch.setattr(_binding, "device_type", lambda tensor=None: "cuda")
    (row,) = twinfuse.explain(tftf.lstm, *call, norm=norm)
    assert (row.backend, row.reason) == ("reference", "norm: no GPU kernel takes it")
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="norm: no GPU kernel"):
        tf.function(tftf.lstm)(*call, norm=norm)
