"""Keras on TensorFlow, for tests that need both: whoever imports this is skipped without them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import require

tf = require("tensorflow")
keras = require("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("needs KERAS_BACKEND=tensorflow", allow_module_level=True)

import twinfuse.keras as tfk  # noqa: E402, F401

layers = keras.layers


def data(*shape: int, seed: int = 0) -> np.ndarray:
    """Normally distributed numbers, float32; the same ones in every call."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)
