"""`twinfuse.keras.fuse` where `keras.ops.relu` or `keras.activations.relu` ends a chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched
from tests.keras_on_tensorflow import data, keras, layers, tfk

OTHERS = {
    "slope": lambda x: keras.activations.relu(x, negative_slope=0.1),
    "bound": lambda x: keras.activations.relu(x, max_value=0.5),
    "threshold": lambda x: keras.activations.relu(x, threshold=0.1),
}


def made(relu: Any) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    inputs = keras.Input((7,))
    return keras.Model(inputs, layers.Dense(3)(relu(layers.Dense(6)(inputs))))


@pytest.mark.parametrize("name", OTHERS)
def test_bounds_and_slopes_stay_native(name: str, launched: Launched) -> None:
    model = made(OTHERS[name])
    expected = model.predict(data(4, 7), verbose=0)
    row = tfk.explain(tfk.fuse(model))[0]
    assert row.reason.endswith("has a max_value, a negative_slope or a threshold")
    with launched("", times=0):
        np.testing.assert_array_equal(model.predict(data(4, 7), verbose=0), expected)


def test_saved_and_loaded(tmp_path: Path, launched: Launched) -> None:
    model = tfk.fuse(made(keras.ops.relu))
    expected = model.predict(data(4, 7), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = tfk.fuse(keras.saving.load_model(tmp_path / "model.keras"))
    with launched("linear_relu_forward_", times=1):
        np.testing.assert_array_equal(loaded.predict(data(4, 7), verbose=0), expected)


def test_a_norm_in_between(launched: Launched) -> None:
    def relu(x: Any) -> Any:
        return keras.ops.relu(layers.BatchNormalization(moving_mean_initializer="ones")(x))

    model = made(relu)
    expected = model(data(4, 7))
    tfk.fuse(model, fold_batch_norm=True)
    with launched("linear_relu_forward_", times=1):
        np.testing.assert_allclose(model(data(4, 7)), expected, atol=1e-5)
    with launched("linear_relu_forward_", times=0):
        np.testing.assert_allclose(
            model(data(4, 7), training=True), tfk.unfuse(model)(data(4, 7), training=True)
        )


@pytest.mark.parametrize("relu", [keras.ops.relu, keras.activations.relu, layers.ReLU()])
def test_masks_go_as_far_as_before(relu: Any, launched: Launched) -> None:
    """An operation passes no mask on, as a layer does: what comes behind reads all steps."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    inputs = keras.Input((5, 3))
    hidden = relu(layers.Dense(6)(layers.Masking()(inputs)))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(hidden))
    x = data(2, 5, 3)
    x[0, 2:] = 0
    expected = model(x)
    with launched("linear_relu_forward_", times=1):
        np.testing.assert_allclose(tfk.fuse(model)(x), expected, atol=1e-6)


def test_a_class_that_somebody_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(keras.ops.relu)
    kind = type(model.operations[2])
    monkeypatch.setattr(kind, "call", lambda self, x: x)
    assert "has been replaced" in tfk.explain(tfk.fuse(model))[0].reason
