"""`twinfuse.tensorflow.lstm` and `lstm_cell`: unusual arguments, errors, fall-backs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched, require

tf = require("tensorflow")

import twinfuse  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402
from tests.test_lstm_tensorflow import FUNCTIONS, NORM, factors, operands  # noqa: E402
from tests.test_lstm_tensorflow_calls import gradients  # noqa: E402
from twinfuse.tensorflow import _binding  # noqa: E402

# Arguments


def test_what_converts_to_a_tensor(launched: Launched) -> None:
    x = np.ones((1, 2, 1), np.float32)
    kernel, recurrent = [[0.5, 0.1, 0.2, 0.3]], tf.Variable([[0.1, 0.2, 0.3, 0.4]])
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        with tf.GradientTape() as tape:
            y, h, c = tftf.lstm(x, kernel, recurrent, mask=[[1, 0]])
        grad = tape.gradient([y, c], recurrent)
    assert y.dtype == tf.float32 and y.shape == (1, 2, 1) and grad.shape == (1, 4)
    np.testing.assert_array_equal(y[:, 1], h)
    with twinfuse.use_backend("reference"):
        np.testing.assert_allclose(tftf.lstm(x, kernel, recurrent, mask=[[1, 0]])[2], c, rtol=1e-6)


@pytest.mark.parametrize("spelling", [tf.tanh, tf.nn.tanh, "tanh"])
def test_spellings_of_activations(spelling: Any, launched: Launched) -> None:
    with launched("lstm_forward_", times=1):
        o = operands()
        tftf.lstm(o["x"], o["kernel"], o["recurrent_kernel"], activation=spelling)


def test_zoneouts_that_broadcast() -> None:
    o = operands()
    arguments = (o["x"], o["kernel"], o["recurrent_kernel"], o["bias"])
    share = tf.random.stateless_uniform((1, 4, 6), [3, 4], dtype=tf.float64)
    full = tftf.lstm(*arguments, zoneout_hidden=tf.broadcast_to(share, (3, 4, 6)))
    for same in (share, share[0]):
        for a, b in zip(tftf.lstm(*arguments, zoneout_hidden=same), full, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(tf.errors.InvalidArgumentError, match="zoneout_hidden: expected what broad"):
        tftf.lstm(*arguments, zoneout_hidden=tf.ones((5, 1, 1), tf.float64))


@pytest.mark.parametrize("name", ["dropout_input", "dropout_hidden"])
def test_dropouts_that_broadcast(name: str) -> None:
    o = operands()
    weights = (o["kernel"], o["recurrent_kernel"], o["bias"])
    of_layer, of_cell = (o["x"], *weights), (o["x"][:, 0], (o["h"], o["c"]), *weights)
    size = 5 if name == "dropout_input" else 6
    full = factors(4, 3, size)
    for same in (full[:1], full[0], full[:, :1], tf.constant(0.5, tf.float64)):
        every = tf.broadcast_to(same, full.shape)
        for function, arguments in ((tftf.lstm, of_layer), (tftf.lstm_cell, of_cell)):
            found = function(*arguments, **{name: same})
            for a, b in zip(found, function(*arguments, **{name: every}), strict=True):
                np.testing.assert_array_equal(a, b)
    expected = rf"{name}: expected what broadcasts to \[4,3,{size}\], got \[3,3,{size}\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=expected):
        tftf.lstm(*of_layer, **{name: full[:3]})
    with pytest.raises(tf.errors.InvalidArgumentError, match=expected):
        tftf.lstm_cell(*of_cell, **{name: full[:3]})


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x": ("x: expected", {"x": tf.ones((3, 4, 6), tf.float64)}),
    "rank": ("x: expected", {"x": tf.ones((3, 5), tf.float64)}),
    "kernel": ("kernel: expected", {"kernel": tf.ones((5, 22), tf.float64)}),
    "recurrent": ("recurrent_kernel: expected", {"recurrent_kernel": tf.ones((6, 20), tf.float64)}),
    "bias": ("bias: expected", {"bias": tf.ones(6, tf.float64)}),
    "peephole": ("peephole: expected", {"peephole": tf.ones((4, 6), tf.float64)}),
    "norm": ("norm: expected", {"norm": tf.ones((2, 20), tf.float64)}),
    "norms": ("norm: expected", {"norm": tf.ones((1, 24), tf.float64)}),
    "state": ("h: expected", {"initial_state": [tf.ones((2, 6), tf.float64)] * 2}),
    "mask": ("mask: expected", {"mask": tf.ones((4, 3), tf.bool)}),
    "projection": ("projection: expected", {"projection": tf.ones((5, 6), tf.float64)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    message, wrong = WRONG[name]
    o = operands()
    right = {n: o[n] for n in ("x", "kernel", "recurrent_kernel", "bias")}
    given = right | wrong
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        tftf.lstm(**given)
    with pytest.raises(ValueError, match=message):
        tf.function(tftf.lstm)(**given)
    # Shapes that are known only when the function runs.
    tensors = {n: t for n, t in given.items() if tf.is_tensor(t)}
    specs = {n: tf.TensorSpec(None, t.dtype) for n, t in tensors.items()}
    lists = {n: v for n, v in given.items() if n not in tensors}

    @tf.function(input_signature=[specs])
    def function(tensors: Any) -> Any:
        return tftf.lstm(**tensors, **lists)

    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        function(tensors)


def test_errors_of_types_and_names() -> None:
    o = operands()
    x, kernel, recurrent = o["x"], o["kernel"], o["recurrent_kernel"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="kernel: expected dtype float64"):
        tftf.lstm(x, tf.cast(kernel, tf.float32), recurrent)
    with pytest.raises(TypeError, match="kernel: expected dtype float64"):
        tf.function(tftf.lstm)(x, tf.cast(kernel, tf.float32), recurrent)
    with pytest.raises(ValueError, match='activation: expected "tanh", "sigmoid"'):
        tftf.lstm(x, kernel, recurrent, activation="gelu")
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="norm_epsilon: expected a number that"
    ):
        tftf.lstm(x, kernel, recurrent, norm=NORM["norm"], norm_epsilon=-1e-3)
    with pytest.raises(ValueError, match="norm_epsilon: expected a number that"):
        tf.function(tftf.lstm)(x, kernel, recurrent, norm_epsilon=float("nan"))
    with pytest.raises(tf.errors.InvalidArgumentError, match="pair"):
        tftf.lstm(x, kernel, recurrent, initial_state=[o["h"]])
    with pytest.raises(tf.errors.InvalidArgumentError, match="lstm_cell: c: expected"):
        tftf.lstm_cell(x[:, 0], (o["h"], o["c"][:, 1:]), kernel, recurrent)


# Fall-backs


@pytest.mark.allow_fallback
@pytest.mark.parametrize("activation", [None, "linear", tf.nn.elu])
def test_other_activations(activation: Any, launched: Launched) -> None:
    o = operands()
    arguments = (o["x"], o["kernel"], o["recurrent_kernel"], o["bias"])
    name = "elu" if activation is tf.nn.elu else "linear"
    warned = pytest.warns(twinfuse.FallbackWarning, match=f"the activation {name}")
    with launched("lstm_", times=0), warned:
        y, _, _ = tftf.lstm(*arguments, recurrent_activation=activation)
    assert np.isfinite(y).all()
    report = twinfuse.explain(tftf.lstm, *arguments, activation=activation)
    assert report[0].backend == "reference" and name in report[0].reason


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", ["mask", "norm", "dropout", "cell"])
def test_xla_takes_the_reference(name: str, launched: Launched) -> None:
    values = list(operands().values())
    function = tf.function(lambda *v: gradients(FUNCTIONS[name], list(v)), jit_compile=True)
    with launched("lstm_", times=0), pytest.warns(twinfuse.FallbackWarning, match="XLA"):
        ours = function(*values)
    tf_cases.assert_close(ours, gradients(FUNCTIONS[name], values))


@pytest.mark.allow_fallback
def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(operands().values())
    expected = gradients(FUNCTIONS["mask"], values)
    monkeypatch.setattr(_binding, "ops", None)
    monkeypatch.setattr(_binding, "missing", "nothing was built")
    with pytest.warns(twinfuse.FallbackWarning, match="nothing was built"):
        tf_cases.assert_close(gradients(FUNCTIONS["mask"], values), expected)
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="nothing was built"):
        FUNCTIONS["mask"](*values)
