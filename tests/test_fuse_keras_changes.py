"""Changes of a model after `twinfuse.keras.fuse` has joined layers with the ReLU behind them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched
from tests.keras_on_tensorflow import data, keras, layers, tfk


def made() -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    return keras.Sequential([keras.Input((7,)), layers.Dense(6), layers.ReLU(), layers.Dense(3)])


def fused_rows(model: Any) -> list[str]:
    return [row.where for row in tfk.explain(model) if row.backend in ("cpu", "fused")]


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantize_after_fuse(mode: str, launched: Launched) -> None:
    results = []
    for change in (tfk.fuse, lambda model: model):
        model = change(made())
        model.quantize(mode)
        with launched("linear_relu_", times=0):
            results.append(model.predict(data(4, 7), verbose=0))
        assert fused_rows(model) == []
    np.testing.assert_array_equal(*results)


def test_lora_after_fuse(launched: Launched) -> None:
    model = tfk.fuse(made())
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(data(2, 6))
    with launched("linear_relu_forward_", times=1):
        ours = model.predict(data(4, 7), verbose=0)
    native = tfk.unfuse(model).predict(data(4, 7), verbose=0)
    np.testing.assert_allclose(ours, native, atol=1e-5)


def _bound(model: Any) -> None:
    model.layers[1].max_value = 0.5


def _activate(model: Any) -> None:
    model.layers[0].activation = keras.activations.tanh


def _patch(model: Any) -> None:
    model.layers[0].call = lambda inputs, **options: -inputs[:, :6]


def _regularize(model: Any) -> None:
    model.layers[0].activity_regularizer = keras.regularizers.L2(1.0)


@pytest.mark.parametrize("change", [_bound, _activate, _patch, _regularize])
def test_a_layer_that_changes_afterwards_runs_as_it_is(change: Any, launched: Launched) -> None:
    results = []
    for fuse in (tfk.fuse, lambda model: model):
        model = fuse(made())
        before = model(data(4, 7))
        change(model)
        with launched("linear_relu_", times=0):
            results.append((model(data(4, 7)).numpy(), np.sum(model.losses)))
        assert fused_rows(model) == []
        assert change is _regularize or not np.allclose(results[-1][0], before)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(0, 2)])
def test_layers_that_keep_the_dtype_of_their_input(
    which: slice, before: bool, launched: Launched
) -> None:
    results = []
    for fuse in (tfk.fuse, lambda model: model):
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        inputs = keras.Input((7,), dtype="float64")
        parts = [layers.Dense(6), layers.ReLU()]
        for layer in parts[which]:
            layer.autocast = not before
        model = fuse(keras.Model(inputs, parts[1](parts[0](inputs))))
        for layer in parts[which]:
            layer.autocast = False
        with launched("linear_relu_", times=0):
            results.append(model(data(4, 7).astype(np.float64)).numpy())
        assert fused_rows(model) == []
    assert results[0].dtype == results[1].dtype
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("kind", "activation", "before"),
    [
        *itertools.product(("ReLU", "BatchNormalization", "Dense"), (None,), (True, False)),
        ("Dense", "relu", True),
    ],
)
def test_a_class_with_another_call(
    kind: str,
    activation: str | None,
    before: bool,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls = getattr(layers, kind)
    native = cls.call

    def patched(self: Any, *args: Any, **options: Any) -> Any:
        return 2 * native(self, *args, **options) + 1

    results = []
    for fuse in (lambda model: tfk.fuse(model, fold_batch_norm=True), lambda model: model):
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        others = [] if activation else [layers.BatchNormalization(), layers.ReLU()]
        model = keras.Sequential([keras.Input((7,)), layers.Dense(6, activation), *others])
        with monkeypatch.context() as patch:
            if before:
                patch.setattr(cls, "call", patched)
            fuse(model)
            patch.setattr(cls, "call", patched)
            with launched("linear_relu_", times=0):
                results.append(model(data(4, 7)).numpy())
            assert "has been replaced" in tfk.explain(model)[0].reason
    np.testing.assert_array_equal(*results)


class _Own(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = layers.Dense(6), layers.ReLU()

    def call(self, inputs: Any) -> Any:
        return self.relu(self.first(inputs))


class _Doubled(keras.Model):  # type: ignore[misc]
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask)


def test_explain_says_where_no_graph_is() -> None:
    keras.utils.clear_session()
    inputs = keras.Input((7,))
    doubled = _Doubled(inputs, layers.ReLU()(layers.Dense(6)(inputs)))
    for model in (_Own(), doubled):
        model(data(4, 7))
        first, relu = tfk.explain(tfk.fuse(model))
        kind = type(model).__name__
        assert first.reason.endswith(f", and {kind} calls it in code of its own, not in a graph")
        assert relu.reason == "no layer before it computes it as well"
    model = keras.Sequential([layers.Dense(6), layers.ReLU()], name="later")
    reason = tfk.explain(tfk.fuse(model))[0].reason
    assert reason == "its activation is linear, and later has not been built: call it once"
    model(data(4, 7))
    assert "call twinfuse.keras.fuse" in tfk.explain(model)[0].reason
