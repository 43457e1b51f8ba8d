"""`twinfuse.explain` of Keras models: what fused layers are said to save, against what runs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

import twinfuse
from tests.keras_on_tensorflow import data, keras, layers, tf, tfk

# Ops that compute nothing.
OTHERS = {"Placeholder", "Const", "ReadVariableOp", "Identity", "NoOp", "Shape", "StridedSlice"}
OTHERS |= {"Reshape", "Squeeze", "Cast"}


def kernels(model: Any, x: np.ndarray) -> int:
    """How many ops an eager call runs: those of its graph, before TensorFlow optimizes it."""
    function = tf.function(lambda value: model(value, training=False))
    operations = function.get_concrete_function(tf.constant(x)).graph.get_operations()
    return sum(Counter(o.type for o in operations if o.type not in OTHERS).values())


def sequential(*parts: Any) -> Any:
    keras.utils.clear_session()
    return keras.Sequential([keras.Input((8, 8, 3)), *parts])


def activations() -> Any:
    head = (layers.Flatten(), layers.Dense(5, "relu"), layers.Dense(2))
    return sequential(layers.Conv2D(4, 3, activation="relu", use_bias=False), *head)


def pairs() -> Any:
    head = (layers.Flatten(), layers.Dense(5), layers.Activation("relu"))
    return sequential(layers.Conv2D(4, 3, 2), layers.ReLU(), *head)


MODELS = {activations: 4 * 6 * 6 + 2 * 5, pairs: 2 * (4 * 3 * 3 + 5)}


@pytest.mark.parametrize("build", MODELS)
def test_savings_are_what_native_layers_run(build: Any) -> None:
    model, x = build(), data(3, 8, 8, 3)
    expected = kernels(model, x)
    tfk.fuse(model)
    savings = [row.saving for row in twinfuse.explain(model, x) if row.saving]
    assert len(savings) == 2 and all(saving.calls == 1 for saving in savings)
    assert sum(saving.kernels for saving in savings) == expected - kernels(model, x)
    # A sum with the bias and a ReLU each read and write all of it: `MODELS` says of how many.
    assert sum(saving.bytes for saving in savings) == 2 * 4 * 3 * MODELS[build]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_folding_counts_against_a_norm(scale: bool, use_bias: bool) -> None:
    parts = (layers.Conv2D(4, 3, use_bias=use_bias), layers.BatchNormalization(scale=scale))
    model, x = sequential(*parts, layers.ReLU()), data(3, 8, 8, 3)
    rows = tfk.explain(tfk.fuse(model, fold_batch_norm=True))
    (unknown,) = (row.saving for row in rows if row.saving)
    assert unknown.bytes is None and f"- 864 B, {unknown.kernels} kernels a call" in str(unknown)
    (saving,) = (row.saving for row in tfk.explain(model, x) if row.saving)
    # Natively the variables are cast and shaped first, which counts as no kernel.
    weights = 4 * 3 * 3 * 3 * 4
    assert saving.bytes == (2 + use_bias) * 2 * 4 * 3 * 4 * 6 * 6 - 2 * weights
    ours = kernels(model, x)
    assert 3 + use_bias - ours == saving.kernels < 0


def test_layers_that_are_called_twice_or_in_other_layers() -> None:
    keras.utils.clear_session()
    inputs = keras.Input((4, 7))
    shared = layers.Dense(7, "relu")
    steps = layers.TimeDistributed(layers.Dense(7, "relu"))(shared(shared(inputs)))
    model = tfk.fuse(keras.Model(inputs, steps))
    first, second = (row.saving for row in tfk.explain(model, data(2, 4, 7)) if row.saving)
    assert (first.calls, first.elements) == (2, 2 * 2 * 4 * 7)
    assert second.bytes is None  # the wrapper computes all steps at once


def test_records_and_what_is_left_as_it_was() -> None:
    model = tfk.fuse(activations())
    call = keras.layers.Layer.__call__
    records = json.loads(json.dumps(tfk.explain(model, data(2, 8, 8, 3)).records()))
    assert [record["op"] for record in records] == ["Conv2D", "Flatten", "Dense", "Dense"]
    assert records[0]["saving"]["bytes"] == 2 * 2 * 4 * 4 * 6 * 6 and not records[1]["saving"]
    with pytest.raises(ValueError):
        tfk.explain(model, data(2, 5))
    assert keras.layers.Layer.__call__ is call
