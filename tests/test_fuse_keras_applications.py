"""`twinfuse.keras.fuse` on networks of `keras.applications`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched
from tests.keras_on_tensorflow import keras, tf, tfk
from tests.rule import assert_within_twice

pytestmark = pytest.mark.slow

# How many layers compute their ReLU, and how many more once BatchNormalization is folded.
NETWORKS = {
    "VGG16": (15, 0),
    "ResNet50": (0, 33),
    "MobileNet": (0, 0),
    "DenseNet121": (0, 59),
    "EfficientNetB0": (0, 0),
}
WITH_GRADIENTS = ("VGG16", "ResNet50", "DenseNet121")
# Images for which no value before a ReLU is so near zero that its sign depends on rounding.
X = np.random.default_rng(6).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)


def network(name: str, dtype: str = "float32") -> Any:
    """One whose activations neither vanish nor explode, and whose statistics are not 0 and 1."""
    keras.utils.clear_session()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = getattr(keras.applications, name)(
            weights=None, input_shape=X.shape[1:], classes=10, classifier_activation=None
        )
    finally:
        keras.config.set_dtype_policy(before)
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance", "variance"):
            values = rng.uniform(0.7, 1.3, variable.shape)
        elif "kernel" in variable.name:
            channels_in = (
                variable.shape[:2] if "depthwise" in variable.path else variable.shape[:-1]
            )
            values = rng.standard_normal(variable.shape, "float32")
            values *= (2 / np.prod(channels_in)) ** 0.5
        else:
            values = 0.1 * rng.standard_normal(variable.shape)
        variable.assign(values)
    return model


def results(model: Any, name: str) -> dict[str, np.ndarray]:
    """Outputs at inference, and gradients of all but huge weights where they are looked at."""
    with tf.GradientTape() as tape:
        outputs = model(tf.constant(X, model.compute_dtype), training=False)
        loss = tf.reduce_sum(outputs * np.linspace(-1, 1, 20).reshape(2, 10))
    found = {"outputs": outputs.numpy()}
    if name in WITH_GRADIENTS:
        variables = [v for v in model.trainable_variables if np.prod(v.shape) < 2**22]
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        found |= {v.path: g.numpy() for v, g in zip(variables, gradients, strict=True)}
    return found


def relative_errors(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> list[float]:
    return [np.abs(found[key] - r).max() / np.abs(r).max() for key, r in reference.items()]


def count(model: Any) -> tuple[int, int]:
    """What `NETWORKS` holds, from the saved description of `model`."""
    parts = {part["name"]: part for part in json.loads(model.to_json())["config"]["layers"]}
    after: dict[str, list[str]] = {name: [] for name in parts}
    for name, part in parts.items():
        for source in re.findall(r'"keras_history": \["(.+?)"', json.dumps(part["inbound_nodes"])):
            after[source].append(name)

    def only(name: str) -> str:
        return after[name][0] if len(after[name]) == 1 else ""

    def kind(name: str) -> str:
        part = parts.get(name, {"class_name": "", "config": {}})
        activation = part["config"].get("activation")
        return f"{part['class_name']}:{activation}" if activation else part["class_name"]

    alone = [n for n in parts if kind(n) in ("Dense:relu", "Conv2D:relu")]
    relus = ("Activation:relu", "ReLU")
    folded = [
        n
        for n in parts
        if kind(n) in ("Dense:linear", "Conv2D:linear")
        and kind(only(n)) == "BatchNormalization"
        and kind(only(only(n))) in relus
        and parts[only(only(n))]["config"].get("max_value") is None
    ]
    return len(alone), len(folded)


def described(model: Any) -> list[Any]:
    return [[(id(v), v.path) for v in model.variables], [layer.name for layer in model.layers]]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_others(name: str, launched: Launched) -> None:
    reference = results(network(name, "float64"), name)
    model = network(name)
    native = results(model, name)
    errors = relative_errors(native, reference)
    # Of hundreds of gradients behind hundreds of operations some are nearly exact by chance.
    usual = np.quantile(errors, 0.9)
    predicted = model.predict(X, verbose=0)
    traced, before = model.predict_function, described(model)
    alone, folded = count(model)
    assert (alone, folded) == NETWORKS[name]

    for fold, calls in ((False, alone), (True, alone + folded)):
        start = time.perf_counter()
        assert tfk.fuse(model, fold_batch_norm=fold) is model
        assert time.perf_counter() - start < 2
        assert described(model) == before
        assert sum(row.backend == "cpu" for row in tfk.explain(model)) == calls
        if not calls:
            # Nothing to gain, and nothing that costs.
            assert model.predict_function is traced
            continue
        with launched("", times=calls * (2 if name in WITH_GRADIENTS else 1)):
            ours = results(model, name)
        assert ours.keys() == reference.keys()
        for key, expected in reference.items():
            noise = usual * np.abs(expected).max()
            assert_within_twice(ours[key], native[key], expected, key, dtype="float32", noise=noise)
        assert np.median(relative_errors(ours, reference)) <= 1.2 * np.median(errors)

    tfk.unfuse(model)
    assert described(model) == before
    with launched("", times=0):
        np.testing.assert_array_equal(model.predict(X, verbose=0), predicted)


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_loaded(name: str, tmp_path: Path, launched: Launched) -> None:
    model = tfk.fuse(network(name), fold_batch_norm=True)
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.weights] == [v.path for v in model.weights]
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tfk.fuse(loaded, fold_batch_norm=True)
    with launched("", times=sum(NETWORKS[name])):
        np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, atol=1e-6)
