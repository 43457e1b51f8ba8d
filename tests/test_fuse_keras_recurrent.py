"""`twinfuse.keras.fuse` on LSTM layers and cells inside of wrappers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched
from tests.keras_on_tensorflow import data, keras, layers, tfk

# What is put on inputs [batch, 2, 5, 3], and how many launches of a layer and of a cell a call has.
WRAPPERS: dict[str, tuple[Callable[[], list[Any]], int, int]] = {
    "time distributed": (lambda: [layers.TimeDistributed(layers.LSTM(4))], 2, 0),
    "both directions of each": (
        lambda: [layers.TimeDistributed(layers.Bidirectional(layers.LSTM(4)))],
        4,
        0,
    ),
    "both directions": (
        lambda: [
            layers.Reshape((10, 3)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True), merge_mode="sum"),
            layers.Bidirectional(layers.LSTM(3), backward_layer=layers.LSTM(3, go_backwards=True)),
        ],
        4,
        0,
    ),
    "stacked cells": (
        lambda: [
            layers.Reshape((10, 3)),
            layers.RNN([layers.LSTMCell(4), layers.LSTMCell(3)], unroll=True),
        ],
        0,
        20,
    ),
    "a cell of each": (
        lambda: [layers.TimeDistributed(layers.RNN(layers.LSTMCell(4), unroll=True))],
        0,
        10,
    ),
}


def made(name: str) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    parts = WRAPPERS[name][0]()
    model = keras.Sequential(
        [keras.Input((2, 5, 3)), *parts, layers.Flatten(), layers.Dense(2)], name="model"
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def fit(model: Any, epochs: int) -> list[float]:
    x, y = data(16, 2, 5, 3), data(16, 2)
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, shuffle=False).history["loss"]


def state(model: Any) -> list[Any]:
    """What `fuse` must leave alone."""
    return [
        [(id(v), v.path, v.numpy().tolist()) for v in model.variables],
        [v.numpy().tolist() for v in model.optimizer.variables],
        [(id(each), each.name) for each in model._flatten_layers()],
    ]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped(name: str, tmp_path: Path, launched: Launched) -> None:
    _, of_layers, of_cells = WRAPPERS[name]
    expected = fit(made(name), epochs=4)
    model = made(name)
    losses = fit(model, epochs=1)
    before = state(model)
    types = [type(each) for each in model._flatten_layers()]
    tfk.fuse(model)
    assert state(model) == before
    losses += fit(model, epochs=2)
    x = data(3, 2, 5, 3)
    with (
        launched("lstm_forward_", times=of_layers),
        launched("lstm_cell_forward_", times=of_cells),
    ):
        fused = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with (
        launched("lstm_forward_", times=of_layers),
        launched("lstm_cell_forward_", times=of_cells),
    ):
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), fused)
    assert all(map(np.array_equal, loaded.optimizer.variables, model.optimizer.variables))

    for each in (model, loaded):
        tfk.unfuse(each)
        assert [type(layer) for layer in each._flatten_layers()] == types
        with launched("lstm_", times=0):
            np.testing.assert_allclose(each.predict(x, verbose=0), fused, atol=1e-5)
    losses += fit(model, epochs=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
