"""Dropout in `twinfuse.keras.layers.LSTM` and `LSTMCell`: the masks are those of Keras' own."""

from __future__ import annotations

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
from tests.test_keras_lstm import MASKS, B, H, N, T, assert_close, data, gradients, pair  # noqa: E402
from tests.test_keras_lstm_models import cells, losses, same_weights, small_model  # noqa: E402

POLICIES = ("float32", "float64", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
DROPOUTS: dict[str, dict[str, Any]] = {
    "one mask": {"dropout": 0.5},
    "recurrent": {"recurrent_dropout": 0.5},
    "both": {"dropout": 0.25, "recurrent_dropout": 0.5},
    # Keras' own layer cannot broadcast four masks for the kernel that it then asks for.
    "four masks": {"dropout": 0.5, "implementation": 1, "use_cudnn": False},
    "four masks of inputs alone": {"dropout": 0.5, "recurrent_dropout": 1.0},
}

every_dropout = pytest.mark.parametrize("name", DROPOUTS)
both_modes = pytest.mark.parametrize("graph", [False, True])


@pytest.fixture(autouse=True)
def _fresh_names() -> Iterator[None]:
    keras.utils.clear_session()
    yield


def of_cell(name: str) -> dict[str, Any]:
    return {key: value for key, value in DROPOUTS[name].items() if key != "use_cudnn"}


@every_dropout
@both_modes
@pytest.mark.parametrize("training", [False, True])
def test_layer(name: str, graph: bool, training: bool, launched: Launched) -> None:
    ours, theirs = pair(seed=3, **DROPOUTS[name])
    results = []
    for layer in (ours, theirs):
        run = tf.function(gradients) if graph else gradients
        times = 2 if layer is ours else 0
        with launched("lstm_forward_", times=times), launched("lstm_backward_", times=times):
            # Two calls: each draws its own masks.
            results.append([run(layer, data(B, T, N), training=training) for _ in range(2)])
    assert_close(*results)
    assert np.array_equal(results[0][0][0], results[0][1][0]) != training


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["recurrent", "both"])
def test_policies(policy: str, name: str, launched: Launched) -> None:
    ours, theirs = pair(dtype=policy, seed=3, return_sequences=True, **DROPOUTS[name])
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        got = gradients(ours, data(B, T, N), training=True)
    expected = gradients(theirs, data(B, T, N), training=True)
    assert_close(got, expected, keras.DTypePolicy(policy).compute_dtype)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_masks_and_directions(
    mask: str | None, backwards: bool, zeros: bool, launched: Launched
) -> None:
    ours, theirs = pair(
        return_sequences=True,
        return_state=True,
        go_backwards=backwards,
        zero_output_for_mask=zeros,
        seed=3,
        **DROPOUTS["both"],
    )
    arguments = {"mask": None if mask is None else MASKS[mask], "training": True}
    arguments["initial_state"] = [data(B, H), data(B, H, seed=1)]
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        got = gradients(ours, data(B, T, N), **arguments)
    assert_close(got, gradients(theirs, data(B, T, N), **arguments))


@both_modes
def test_stateful(graph: bool, launched: Launched) -> None:
    ours, theirs = pair(stateful=True, seed=3, **DROPOUTS["both"])
    runs = [tf.function(gradients) if graph else gradients for _ in range(2)]
    for seed in range(3):
        x = data(B, T, N, seed=seed)
        with launched("lstm_forward_", times=1):
            got = runs[0](ours, x, training=True)
        assert_close(got, runs[1](theirs, x, training=True))
        assert_close([s.value for s in ours.states], [s.value for s in theirs.states])


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_none_and_all_are_those_of_the_native_cell(rate: float) -> None:
    for config in ({"dropout": rate, "use_cudnn": False}, {"recurrent_dropout": rate}):
        ours, theirs = pair(seed=3, **config)
        got = ours(data(B, T, N), training=True)
        assert_close(got, theirs(data(B, T, N), training=True))


@pytest.mark.parametrize("name", ["one mask", "both"])
def test_inputs_of_a_narrower_dtype(name: str, launched: Launched) -> None:
    layer, _ = pair(autocast=False, return_sequences=True, seed=3, **DROPOUTS[name])
    cell, x = layer.cell, tf.cast(data(B, T, N), "bfloat16")
    of_x = tf.cast(cell.get_dropout_mask(x[:, 0]), tf.float32)
    of_h = cell.get_recurrent_dropout_mask(tf.zeros((B, H)))
    with launched("lstm_forward_", times=1):
        got = layer(x, training=True)
    x = tf.cast(x, tf.float32)
    options = {"dropout_input": of_x, "dropout_hidden": of_h}
    if name == "one mask":
        x, options = x * of_x[:, None], {}
    expected, _, _ = tftf.lstm(x, cell.kernel, cell.recurrent_kernel, cell.bias, **options)
    np.testing.assert_array_equal(got, expected)


@both_modes
def test_unknown_dimensions(graph: bool, launched: Launched) -> None:
    results = []
    for layer in pair((None, None, N), seed=3, return_sequences=True, **DROPOUTS["both"]):
        run: Any = lambda x, layer=layer: gradients(layer, x, training=True)  # noqa: E731
        if graph:
            run = tf.function(run, input_signature=[tf.TensorSpec([None, None, N])])
        with launched("lstm_forward_", times=0 if results else 1):
            results.append(run(data(B, T, N)))
    assert_close(*results)


@every_dropout
@both_modes
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("unroll", [False, True])
def test_cell_inside_rnn(
    name: str, graph: bool, policy: str, unroll: bool, launched: Launched
) -> None:
    config = {"return_sequences": True, "return_state": True, "dtype": policy, "unroll": unroll}
    made = cells(dtype=policy, seed=1, **of_cell(name))
    ours, theirs = (keras.layers.RNN(cell, **config) for cell in made)
    arguments = {"training": True, "mask": MASKS["interior"]}
    run = tf.function(gradients) if graph else gradients
    # Keras' loop calls the cell once more, to see what it returns; a graph drops that.
    times = T if graph or unroll else T + 1
    for _ in range(2):
        with launched("lstm_cell_forward_", times=times), launched("lstm_cell_backward_", times=T):
            got = run(ours, data(B, T, N), **arguments)
        expected = gradients(theirs, data(B, T, N), **arguments)
        assert_close(got, expected, keras.DTypePolicy(policy).compute_dtype)


@every_dropout
def test_cells_keep_their_masks_until_they_are_reset(name: str, launched: Launched) -> None:
    ours, theirs = cells(seed=1, **of_cell(name))
    x, state = data(B, N), [data(B, H), data(B, H, seed=1)]
    calls = []
    for _ in range(2):
        for _ in range(2):
            with launched("lstm_cell_forward_", times=1):
                calls.append(gradients(ours, x, states=state, training=True))
            assert_close(calls[-1], gradients(theirs, x, states=state, training=True))
        for cell in (ours, theirs):
            cell.reset_dropout_mask()
            cell.reset_recurrent_dropout_mask()
    first, again, second, _ = (call[0][0] for call in calls)
    assert np.array_equal(first, again) and not np.array_equal(first, second)


def test_stacked_cells(launched: Launched) -> None:
    results = []
    for cls in (tfk.layers.LSTMCell, keras.layers.LSTMCell):
        keras.utils.set_random_seed(2)
        options = {"recurrent_dropout": 0.5, "dropout": 0.25}
        layer = keras.layers.RNN([cls(H, seed=1, **options), cls(3, seed=2, **options)])
        with launched("lstm_cell_forward_", times=2 * T if cls is tfk.layers.LSTMCell else 0):
            results.append(tf.function(gradients)(layer, data(B, T, N), training=True))
    assert_close(*results)


def test_bidirectional() -> None:
    layers = [
        keras.layers.Bidirectional(cls(H, return_sequences=True, seed=1, **DROPOUTS["both"]))
        for cls in (tfk.layers.LSTM, keras.layers.LSTM)
    ]
    for layer in layers:
        layer.build((B, T, N))
    same_weights(*layers)
    arguments = {"mask": MASKS["right"], "training": True}
    assert_close(*(tf.function(gradients)(layer, data(B, T, N), **arguments) for layer in layers))


@pytest.mark.parametrize("steps", [3, None])
def test_time_distributed(steps: int | None, launched: Launched) -> None:
    results = []
    for cls in (tfk.layers.LSTM, keras.layers.LSTM):
        keras.utils.set_random_seed(2)
        layer = keras.layers.TimeDistributed(cls(H, seed=1, **DROPOUTS["both"]))
        layer.build((3, steps, T, N))
        function = tf.function(
            lambda x, layer=layer: layer(x, training=True),
            input_signature=[tf.TensorSpec([3, steps, T, N])],
        )
        with launched("lstm_forward_", times=0 if results else 3):
            results.append(function(data(3, 3, T, N)))
    assert_close(*results)


def test_higher_gradients() -> None:
    results = []
    for layer in pair(dtype="float64", seed=3, **DROPOUTS["both"]):
        x = tf.cast(data(B, T, N), tf.float64)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(layer(x, mask=MASKS["interior"], training=True) ** 2)
            penalty = tf.reduce_sum(tape.gradient(y, x) ** 2)
        results.append(outer.gradient(penalty, [x, *layer.trainable_variables]))
    assert_close(*results, "float64")


@pytest.mark.parametrize("eager", [False, True])
def test_fit_follows_the_native_losses(eager: bool, launched: Launched) -> None:
    config = {"seed": 5, **DROPOUTS["both"]}
    with launched("lstm_forward_", times=64), launched("lstm_backward_", times=64):
        ours = losses(small_model(tfk.layers.LSTM, **config), run_eagerly=eager)
    theirs = losses(small_model(keras.layers.LSTM, **config))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_files(tmp_path: Path, launched: Launched) -> None:
    config = {"seed": 5, **DROPOUTS["both"]}
    models = [small_model(cls, **config) for cls in (tfk.layers.LSTM, keras.layers.LSTM)]
    again, other = [], []
    for name, model in zip(("ours", "theirs"), models):
        losses(model)
        model.save(tmp_path / f"{name}.keras")
        again.append(keras.saving.load_model(tmp_path / f"{name}.keras"))
        other.append(losses(again[-1]))
    # The states of their generators are in the file, too.
    assert type(again[0].layers[1]) is tfk.layers.LSTM
    np.testing.assert_allclose(*other, rtol=1e-3)
    models[0].export(tmp_path / "fused", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "fused"))
    with launched("lstm_forward_", times=4):
        got = loaded.serve(data(B, T, N))
    assert_close(got, models[0](data(B, T, N)))


def test_a_saved_function_trains(tmp_path: Path, launched: Launched) -> None:
    class Module(tf.Module):
        def __init__(self) -> None:
            self.layer = tfk.layers.LSTM(H, seed=1, **DROPOUTS["both"])
            self.layer.build((None, T, N))
            self.weights = [w.value for w in self.layer.weights]
            self.seed = self.layer.cell.seed_generator.state.value

        @tf.function(input_signature=[tf.TensorSpec([None, None, N])])
        def __call__(self, x: Any) -> Any:
            return self.layer(x, training=True)

    module = Module()
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))

    def grads(model: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.constant(data(B, T, N))) ** 2)
        return loss, tape.gradient(loss, model.weights)

    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        got = grads(loaded)
    assert_close(got, grads(module))


@every_dropout
def test_explain_and_fuse(name: str, launched: Launched) -> None:
    model = keras.Sequential([keras.Input((T, N)), keras.layers.LSTM(H, **DROPOUTS[name])])
    (row,) = tfk.explain(tfk.fuse(model))
    assert row.kernel.startswith("lstm_forward_f32_") and not row.reason
    with launched("lstm_forward_", times=1):
        model(data(B, T, N), training=True)
    (row,) = twinfuse.explain(tfk.layers.LSTMCell(H, **of_cell(name)))
    assert row.kernel.startswith("lstm_cell_forward_f32_") and not row.reason
