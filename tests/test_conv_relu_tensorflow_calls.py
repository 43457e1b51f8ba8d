"""`twinfuse.tensorflow.conv1d_relu` and `conv2d_relu`: arguments, errors, fall-backs, files."""

from __future__ import annotations

import functools
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched, require

tf = require("tensorflow")

import twinfuse  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402
from tests.test_conv_relu_tensorflow import both, every_setting  # noqa: E402
from tests.test_linear_relu_tensorflow_calls import in_fresh_process  # noqa: E402
from twinfuse.tensorflow import _binding  # noqa: E402

InvalidArgument = tf.errors.InvalidArgumentError
MODULE = "twinfuse.tensorflow.conv_relu"


def operands_2d(dtype: str = "float64") -> list[Any]:
    return tf_cases.conv_operands((2, 7, 6, 4), (3, 2, 4, 5), dtype)


def operands_1d() -> list[Any]:
    return tf_cases.conv_operands((2, 9, 4), (3, 4, 5))


# Arguments

FORMS_2D: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"strides": 2}, {"strides": (2, 2)}),
    ({"strides": [2]}, {"strides": (2, 2)}),
    ({"strides": (2, 1)}, {"strides": (2, 1)}),
    ({"strides": [1, 2, 1, 1]}, {"strides": (2, 1)}),
    ({"strides": np.array([2, 1])}, {"strides": (2, 1)}),
    ({"strides": np.int64(2)}, {"strides": (2, 2)}),
    ({"dilations": [1, 1, 2, 1]}, {"dilations": (1, 2)}),
    ({"dilations": None}, {}),
    ({"padding": "same", "strides": 2}, {"padding": "SAME", "strides": (2, 2)}),
    ({"padding": "Valid", "data_format": None}, {}),
    (
        {"padding": [[0, 0], [1, 2], [0, 3], [0, 0]], "data_format": "NHWC"},
        {"padding": [(0, 0), (1, 2), (0, 3), (0, 0)]},
    ),
]
FORMS_1D: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"strides": 2, "data_format": "NWC"}, {"strides": (2,)}),
    ({"strides": [1, 2, 1], "data_format": "NHWC"}, {"strides": (2,)}),
    ({"dilations": [2], "padding": "causal"}, {"dilations": (2,), "padding": "CAUSAL"}),
    ({"padding": ((0, 0), (4, 1), (0, 0))}, {"padding": [(0, 0), (4, 1), (0, 0)]}),
]


def first(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with channels first: lists of all dimensions are in another order then."""

    def moved(value: Any) -> Any:
        full = isinstance(value, (list, tuple)) and len(value) > 2
        return [value[0], value[-1], *value[1:-1]] if full else value

    return {**{n: moved(v) for n, v in arguments.items()}, "data_format": "channels_first"}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("channels", ["channels_last", "channels_first", "TensorFlow"])
@pytest.mark.parametrize(
    ("spatial", "given", "meant"), [(1, *f) for f in FORMS_1D] + [(2, *f) for f in FORMS_2D]
)
def test_forms_of_arguments(
    spatial: int, given: Any, meant: Any, channels: str, graph: bool, launched: Launched
) -> None:
    x, kernel, bias = operands_1d() if spatial == 1 else operands_2d()
    function = tftf.conv1d_relu if spatial == 1 else tftf.conv2d_relu
    ones = (1,) * spatial
    expected = tf_cases.native_conv(
        x, kernel, bias, **{"strides": ones, "dilations": ones, **meant}
    )
    if channels != "channels_last":
        order = [0, spatial + 1, *range(1, spatial + 1)]
        x, expected = tf.transpose(x, order), tf.transpose(expected, order)
        given = first(given)
    if channels == "TensorFlow":
        given["data_format"] = "NCW" if spatial == 1 else "NCHW"
    run = functools.partial(function, **given)
    with launched("conv_relu_forward_", times=1):
        got = (
            tf.function(lambda *operands: run(*operands))(x, kernel, bias)
            if graph
            else run(x, kernel, bias)
        )
    tf_cases.assert_close(got, expected)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("spatial", [1, 2])
def test_more_leading_dimensions(spatial: int, data_format: str, launched: Launched) -> None:
    shape = (2, 3, 4, 4, 4)[: spatial + 3]
    x, kernel, bias = tf_cases.conv_operands(shape, (*(2, 3)[:spatial], 4, 5))
    function = tftf.conv1d_relu if spatial == 1 else tftf.conv2d_relu
    run = functools.partial(function, data_format=data_format)
    with launched("conv_relu_forward_", times=3), launched("conv_relu_backward_", times=1):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            got = run(x, kernel, bias)
        grad = tape.gradient(got, kernel)
        each = tf.stack([run(part, kernel, bias) for part in x])
    tf_cases.assert_close(got, each)
    assert grad.shape == kernel.shape and twinfuse.explain(run.func, x, kernel)[0].kernel


def test_what_converts_to_a_tensor(launched: Launched) -> None:
    x = [[[1.0], [-2.0], [3.0]]]
    kernel, bias = np.ones((2, 1, 1)), np.array([0.5])  # float64, read as the float32 of x
    with launched("conv_relu_forward_", times=1):
        y = tftf.conv1d_relu(x, kernel, bias)
    assert y.dtype == tf.float32
    np.testing.assert_array_equal(y, [[[0.0], [1.5]]])


def test_variables_and_their_gradients(launched: Launched) -> None:
    x, kernel, bias = operands_2d()
    kernel, bias = tf.Variable(kernel), tf.Variable(bias)

    def grads(function: Any) -> Any:
        with tf.GradientTape() as tape:
            y = function(x, kernel, bias)
        return tape.gradient(y, [kernel, bias])

    with launched("conv_relu_backward_", times=2):
        ours = grads(tftf.conv2d_relu), tf.function(grads)(tftf.conv2d_relu)
    theirs = grads(tf_cases.native_conv)
    tf_cases.assert_close(ours, (theirs, theirs))


def test_function_retraces_and_keeps_the_backend_it_was_traced_with(launched: Launched) -> None:
    traces = []

    @tf.function
    def function(x: Any, kernel: Any) -> Any:
        traces.append(x.shape)
        return tftf.conv2d_relu(x, kernel)

    x, kernel, _ = operands_2d()
    with launched("conv_relu_forward_", times=3):
        function(x, kernel), function(x, kernel), function(x[:1], kernel)
    assert len(traces) == 2
    with twinfuse.use_backend("reference"):
        with launched("conv_relu_forward_", times=1):
            function(x, kernel)
        with launched("conv_relu_forward_", times=0):
            tf.function(tftf.conv2d_relu)(x, kernel)
            tftf.conv2d_relu(x, kernel)


# The reference path


@every_setting
@pytest.mark.parametrize("graph", [False, True])
def test_reference_has_every_setting_and_its_gradients(
    setting: str, graph: bool, launched: Launched
) -> None:
    operands, function, native = both(setting)
    run = tf.function(tf_cases.derivatives) if graph else tf_cases.derivatives
    with twinfuse.use_backend("reference"), launched("conv_relu_", times=0):
        tf_cases.assert_close(function(*operands), native(*operands))
        got = run(function, operands)
    tf_cases.assert_close(got, tf_cases.derivatives(native, operands), 1e-11)


@every_setting
def test_gradients_by_the_reference(setting: str, launched: Launched) -> None:
    """Of a fused forward pass, by TensorFlow's own ops."""
    operands, function, native = both(setting)
    grads = []
    for run in (function, native):
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = run(*operands)
        with twinfuse.use_backend("reference"), launched("conv_relu_backward_", times=0):
            grads.append(tape.gradient(y, operands))
    tf_cases.assert_close(*grads)


@every_setting
def test_reference_with_unknown_sizes(setting: str) -> None:
    operands, function, native = both(setting)
    channels = 1 if function.keywords.get("data_format") == "channels_first" else -1
    for known in ("channels", "rank", "nothing"):
        shape = [None] * len(operands[0].shape)
        if known == "channels":
            shape[channels] = operands[0].shape[channels]
        specs = [tf.TensorSpec(None if known == "nothing" else shape, tf.float64)]
        specs += [tf.TensorSpec(t.shape, t.dtype) for t in operands[1:]]
        with twinfuse.use_backend("reference"):
            run = tf.function(lambda *o, f=function: f(*o), input_signature=specs)
            tf_cases.assert_close(run(*operands), native(*operands))


@pytest.mark.allow_fallback
@pytest.mark.parametrize("graph", [False, True])
def test_native_serves_what_no_kernel_does(graph: bool, launched: Launched) -> None:
    x, kernel, bias = (tf.cast(4 * t, tf.int32) for t in operands_2d())
    for arguments in ({}, {"strides": 2, "padding": "SAME"}, {"dilations": 2}):
        native = {"strides": 1, "padding": "VALID", **arguments}
        expected = tf.nn.relu(tf.nn.conv2d(x, kernel, **native) + bias)
        run = functools.partial(tftf.conv2d_relu, **arguments)
        function = tf.function(lambda *o, run=run: run(*o)) if graph else run
        none = launched("conv_relu_", times=0)
        warned = pytest.warns(twinfuse.FallbackWarning, match="conv2d_relu .* dtype int32")
        with warned, none:
            got = function(x, kernel, bias)
        np.testing.assert_array_equal(got, expected)
        (row,) = twinfuse.explain(tftf.conv2d_relu, x, kernel, bias, **arguments)
        assert (row.op, row.backend) == ("conv2d_relu", "reference") and "int32" in row.reason
        twinfuse._backend._warned.clear()


@pytest.mark.allow_fallback
@every_setting
def test_xla_takes_the_reference(setting: str, launched: Launched) -> None:
    operands, function, native = both(setting)

    def grads(run: Callable[..., Any], *operands: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = run(*operands)
        return y, tape.gradient(y, operands)

    compiled = tf.function(functools.partial(grads, function), jit_compile=True)
    with launched("conv_relu_", times=0), pytest.warns(twinfuse.FallbackWarning, match="XLA"):
        got = compiled(*operands)
    tf_cases.assert_close(got, grads(native, *operands))
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="XLA"):
        tf.function(lambda *o: function(*o), jit_compile=True)(*operands)


@pytest.mark.allow_fallback
def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[MODULE], "_fused", None)
    monkeypatch.setattr(_binding, "ops", None)
    monkeypatch.setattr(_binding, "missing", "nothing was built")
    operands = operands_2d()
    with pytest.warns(twinfuse.FallbackWarning, match="conv2d_relu .* nothing was built"):
        tf_cases.assert_close(tftf.conv2d_relu(*operands), tf_cases.native_conv(*operands))
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="nothing was built"):
        tftf.conv2d_relu(*operands)


@pytest.mark.allow_fallback
def test_a_gpu_without_kernels_and_a_backend_that_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = operands_2d()
    (row,) = twinfuse.explain(tftf.conv2d_relu, *operands, padding="same")
    assert row.backend == "cpu" and row.kernel.startswith("conv_relu_forward_f64_")
    with twinfuse.use_backend("cuda"), pytest.warns(twinfuse.FallbackWarning, match="'cuda' was"):
        tf_cases.assert_close(tftf.conv2d_relu(*operands), tf_cases.native_conv(*operands))
    # Tracing cannot know where an op will be placed.
    monkeypatch.setattr(_binding, "device_type", lambda tensor=None: "cuda")
    with pytest.warns(twinfuse.FallbackWarning, match="GPU|CUDA"):
        got = tf.function(tftf.conv2d_relu)(*operands)
    tf_cases.assert_close(got, tf_cases.native_conv(*operands))


@pytest.mark.slow
def test_without_onednn_channels_come_first_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import numpy as np, tensorflow as tf, twinfuse, twinfuse.tensorflow as tftf
        twinfuse.strict()
        make = lambda *s: tf.constant(np.random.default_rng(0).standard_normal(s), tf.float32)
        x, bias = make(2, 6, 9, 8), make(4)
        try:
            tf.nn.conv2d(x, make(3, 3, 6, 4), 1, "SAME", data_format="NCHW")
        except tf.errors.UnimplementedError:
            pass
        else:
            raise AssertionError("TensorFlow has learnt it")
        for kernel in (make(3, 3, 6, 4), make(3, 3, 3, 4)):
            for dilations in (1, 2):
                def run(x, kernel, bias, data_format):
                    with tf.GradientTape() as tape:
                        tape.watch([x, kernel, bias])
                        with tf.GradientTape() as inner:
                            inner.watch(x)
                            y = tftf.conv2d_relu(
                                x, kernel, bias, 1, "same", data_format, dilations
                            )
                        grad = inner.gradient(y, x)
                        loss = tf.reduce_sum(grad ** 2)
                    return y, grad, tape.gradient(loss, kernel)
                last = run(tf.transpose(x, [0, 2, 3, 1]), kernel, bias, "channels_last")
                for function in (run, tf.function(run)):
                    for backend in (None, "reference"):
                        with twinfuse.use_backend(backend):
                            y, dx, dk = function(x, kernel, bias, "channels_first")
                        y, dx = (tf.transpose(t, [0, 2, 3, 1]) for t in (y, dx))
                        for ours, theirs in zip((y, dx, dk), last):
                            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
        assert sum(twinfuse.launches().values()) >= 16
        """
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    in_fresh_process(code)


# Files and speed


@pytest.mark.slow
def test_saved_model_in_a_fresh_process(tmp_path: Path) -> None:
    x, kernel, bias = operands_2d()
    arguments: dict[str, Any] = {"strides": (2, 1), "padding": "SAME"}

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 4], tf.float64)])
        def run(self, x: Any) -> Any:
            return tftf.conv2d_relu(x, kernel, bias, **arguments)

    tf.saved_model.save(Module(), str(tmp_path / "fused"))
    with tftf.use_backend("reference"):
        tf.saved_model.save(Module(), str(tmp_path / "portable"))
    y = tf_cases.native_conv(x, kernel, bias, **arguments)
    np.savez(tmp_path / "case.npz", x=x, y=y)
    load = """
        import numpy as np, sys, tensorflow as tf
        {first}
        case = np.load({folder!r} + "/case.npz")
        module = tf.saved_model.load({folder!r} + "/{name}")
        x = tf.constant(case["x"])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = module.run(x)
        np.testing.assert_allclose(y, case["y"], rtol=1e-12, atol=1e-12)
        assert float(tf.norm(tape.gradient(y, x))) > 0
        assert ("twinfuse" in sys.modules) == bool({first!r})
        {last}
    """
    folder = str(tmp_path)
    in_fresh_process(load.format(first="", folder=folder, name="portable", last=""))
    in_fresh_process(
        load.format(
            first="import twinfuse.tensorflow",
            folder=folder,
            name="fused",
            last="assert sum(sys.modules['twinfuse'].launches().values()) == 2",
        )
    )


def test_eager_call_costs_less_than_the_composed_one() -> None:
    x, kernel, bias = tf_cases.conv_operands((1, 4, 4, 4), (3, 3, 4, 4), "float32")

    def composed(x: Any, kernel: Any, bias: Any) -> Any:
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "VALID"), bias))

    pairs = []
    for _ in range(7):
        pairs.append(
            [
                timeit.timeit(lambda f=f: f(x, kernel, bias), number=200)
                for f in (tftf.conv2d_relu, composed)
            ]
        )
    ours, theirs = np.min(pairs, axis=0)
    assert ours < theirs, f"ours {ours * 5e3:.1f} us, composed {theirs * 5e3:.1f} us"


def test_many_groups_on_a_gpu_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a graph is traced, which could not fall back when it runs."""
    x, kernel, bias = tf_cases.conv_operands((2, 7, 6, 10), (3, 3, 2, 10), "float32")
    monkeypatch.setattr(_binding, "device_type", lambda tensor=None: "cuda")
    (row,) = twinfuse.explain(tftf.conv2d_relu, x, kernel, bias)
    assert (row.backend, row.reason) == ("reference", "more than 4 groups on a GPU")
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="4 groups"):
        tf.function(tftf.conv2d_relu)(x, kernel, bias)
