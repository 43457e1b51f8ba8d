"""The LSTM layers inside models and other layers, on the TensorFlow backend."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched, require

tf = require("tensorflow")
keras = require("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("needs KERAS_BACKEND=tensorflow", allow_module_level=True)

import twinfuse  # noqa: E402
import twinfuse.keras as tfk  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests.test_keras_lstm import MASKS, assert_close, data, gradients  # noqa: E402

B, T, N, H = 4, 6, 5, 7  # batch, steps, inputs, units
POLICIES = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


@pytest.fixture(autouse=True)
def _fresh_names() -> Iterator[None]:
    keras.utils.clear_session()
    yield


def same_weights(*layers: Any) -> None:
    for layer in layers[1:]:
        layer.set_weights(layers[0].get_weights())


def cells(**config: Any) -> tuple[Any, Any]:
    """The fused and the native cell with the same weights."""
    made = [
        cls(H, bias_initializer="random_normal", recurrent_initializer="glorot_uniform", **config)
        for cls in (tfk.layers.LSTMCell, keras.layers.LSTMCell)
    ]
    for cell in made:
        cell.build((B, N))
    same_weights(*made)
    return made[0], made[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_cell(policy: str, use_bias: bool, launched: Launched) -> None:
    ours, theirs = cells(dtype=policy, use_bias=use_bias, unit_forget_bias=False)
    compute = keras.DTypePolicy(policy).compute_dtype
    states = [tf.cast(data(B, H, seed=i), compute) for i in (1, 2)]
    with launched("lstm_cell_forward_", times=1), launched("lstm_cell_backward_", times=1):
        got = gradients(ours, data(B, N), states=states)
    assert got[0][0].dtype == compute and len(got[0][1]) == 2
    assert_close(got, gradients(theirs, data(B, N), states=states), compute)
    assert ours.get_config() == theirs.get_config() | {"name": ours.name}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_cell_inside_rnn(policy: str, graph: bool, masked: bool, launched: Launched) -> None:
    config = {"return_sequences": True, "return_state": True, "dtype": policy}
    ours, theirs = (keras.layers.RNN(cell, **config) for cell in cells(dtype=policy))
    compute = keras.DTypePolicy(policy).compute_dtype
    arguments = {"mask": MASKS["interior"] if masked else None}
    run = tf.function(gradients) if graph else gradients
    # Keras calls the cell once more, to see what it returns; a graph drops that.
    with (
        launched("lstm_cell_forward_", times=T if graph else T + 1),
        launched("lstm_cell_backward_", times=T),
    ):
        got = run(ours, data(B, T, N), **arguments)
    assert_close(got, gradients(theirs, data(B, T, N), **arguments), compute)


def test_stacked_cells(launched: Launched) -> None:
    results = []
    for cls in (tfk.layers.LSTMCell, keras.layers.LSTMCell):
        keras.utils.set_random_seed(2)
        layer = keras.layers.RNN([cls(H), cls(3, recurrent_activation="hard_sigmoid")])
        with launched("lstm_cell_forward_", times=12 if cls is tfk.layers.LSTMCell else 0):
            results.append(tf.function(gradients)(layer, data(B, T, N)))
    assert_close(*results)


@pytest.mark.allow_fallback
def test_native_cells(launched: Launched) -> None:
    config = {"activation": "gelu", "dropout": 0.25, "recurrent_dropout": 0.5, "seed": 1}
    ours, theirs = (keras.layers.RNN(cell) for cell in cells(**config))
    warned = pytest.warns(twinfuse.FallbackWarning, match="its activation is gelu")
    with launched("lstm_", times=0), warned:
        got = ours(data(B, T, N), training=True)
    np.testing.assert_array_equal(got, theirs(data(B, T, N), training=True))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("merge", ["concat", "sum", None])
@pytest.mark.parametrize("mask", [None, "right", "interior"])
def test_bidirectional(sequences: bool, merge: str | None, mask: str | None) -> None:
    layers = [
        keras.layers.Bidirectional(
            cls(H, return_sequences=sequences, return_state=True), merge_mode=merge
        )
        for cls in (tfk.layers.LSTM, keras.layers.LSTM)
    ]
    for layer in layers:
        layer.build((B, T, N))
    same_weights(*layers)
    assert type(layers[0].forward_layer) is type(layers[0].backward_layer) is tfk.layers.LSTM
    state = [data(B, H, seed=i) for i in range(4)]
    arguments = {"mask": None if mask is None else MASKS[mask], "initial_state": state}
    before = twinfuse.launches()
    got = tf.function(gradients)(layers[0], data(B, T, N), **arguments)
    ran = {n: c - before[n] for n, c in twinfuse.launches().items() if c > before[n]}
    assert sorted(ran.values()) == [2, 2], ran
    assert_close(got, gradients(layers[1], data(B, T, N), **arguments))


@pytest.mark.parametrize("steps", [3, None])
@pytest.mark.parametrize("graph", [False, True])
def test_time_distributed(steps: int | None, graph: bool, launched: Launched) -> None:
    layers = [keras.layers.TimeDistributed(cls(H)) for cls in (tfk.layers.LSTM, keras.layers.LSTM)]
    for layer in layers:
        layer.build((3, steps, T, N))
    same_weights(*layers)
    # As many steps as sequences: Keras takes one number for the other where it is unknown.
    x = tf.constant(data(3, 3, T, N))
    run: Any = functools.partial(gradients, layers[0])
    if graph:
        spec = [tf.TensorSpec([3, steps, T, N])]
        run = tf.function(lambda x: gradients(layers[0], x), input_signature=spec)
    # Unknown steps are vectorized: one call with all of them.
    times = 1 if graph and steps is None else 3
    with launched("lstm_forward_", times=times), launched("lstm_backward_", times=times):
        got = run(x)
    assert_close(got, gradients(layers[1], x))


def small_model(lstm: type, **config: Any) -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((T, N)),
            keras.layers.Masking(),
            lstm(H, return_sequences=True, **config),
            keras.layers.Bidirectional(lstm(4, return_sequences=True)),
            lstm(5, go_backwards=True, **config),
            keras.layers.Dense(3),
        ]
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "regularized": {
        "kernel_regularizer": "l2",
        "recurrent_regularizer": "l1",
        "activity_regularizer": "l2",
        "kernel_constraint": "max_norm",
        "bias_constraint": "non_neg",
    },
    "mixed": {"dtype": "mixed_bfloat16"},
}


def losses(model: Any, **compile_options: Any) -> list[float]:
    model.compile(keras.optimizers.Adam(0.01), "mse", **compile_options)
    x, y = data(64, T, N), data(64, 3)
    x[1, 2:4] = x[5] = 0  # masked
    return model.fit(x, y, batch_size=16, epochs=4, verbose=0, shuffle=False).history["loss"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("eager", [False, True])
def test_fit_follows_the_native_losses(name: str, eager: bool, launched: Launched) -> None:
    # 4 epochs of 4 batches through four fused layers; nothing is computed twice.
    with launched("lstm_forward_", times=64), launched("lstm_backward_", times=64):
        ours = losses(small_model(tfk.layers.LSTM, **CONFIGS[name]), run_eagerly=eager)
    theirs = losses(small_model(keras.layers.LSTM, **CONFIGS[name]))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2 if name == "mixed" else 1e-4)
    assert ours[-1] < ours[0]


def test_files(tmp_path: Path, launched: Launched) -> None:
    model, x = small_model(tfk.layers.LSTM), data(B, T, N)
    native = small_model(keras.layers.LSTM)
    expected = native.predict(x, verbose=0)
    model.set_weights(native.get_weights())

    def check(predict: Any, times: int) -> None:
        with launched("lstm_forward_", times=times):
            np.testing.assert_allclose(predict(x), expected, atol=1e-5)

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[1]) is tfk.layers.LSTM and not again.layers[1].supports_jit
    check(lambda x: again.predict(x, verbose=0), 4)
    model.save_weights(tmp_path / "model.weights.h5")
    native.load_weights(tmp_path / "model.weights.h5")
    model.export(tmp_path / "fused", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "fused"))
    check(loaded.serve, 4)
    with tftf.use_backend("reference"):
        model.export(tmp_path / "portable", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "portable"))
    check(loaded.serve, 0)


def test_saved_model_trains(tmp_path: Path, launched: Launched) -> None:
    class Module(tf.Module):
        def __init__(self) -> None:
            self.layer = tfk.layers.LSTM(H)
            self.layer.build((None, T, N))
            self.weights = [w.value for w in self.layer.weights]

        @tf.function(input_signature=[tf.TensorSpec([None, None, N])])
        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    module = Module()
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))

    def grads(model: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.constant(data(B, T, N))) ** 2)
        return tape.gradient(loss, model.weights)

    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        got = grads(loaded)
    assert_close(got, grads(module))


def test_higher_gradients_of_layers() -> None:
    results = []
    for cls in (tfk.layers.LSTM, keras.layers.LSTM):
        keras.utils.set_random_seed(4)
        layer = cls(3, dtype="float64", recurrent_activation="hard_sigmoid")
        x = tf.cast(data(B, T, N), tf.float64)
        layer.build(x.shape)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(layer(x, mask=MASKS["interior"]) ** 2)
            penalty = tf.reduce_sum(tape.gradient(y, x) ** 2)
        results.append(outer.gradient(penalty, [x, *layer.trainable_variables]))
    assert_close(*results, "float64")


def test_jacobian_and_forward_mode() -> None:
    results = []
    for cls in (tfk.layers.LSTM, keras.layers.LSTM):
        keras.utils.set_random_seed(4)
        layer = cls(3, dtype="float64")
        x = tf.cast(data(2, 3, N), tf.float64)
        layer.build(x.shape)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        jacobian = tape.jacobian(y, [x, *layer.trainable_variables])
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            tangent = accumulator.jvp(layer(x))
        results.append([jacobian, tangent])
    assert_close(*results, "float64")
