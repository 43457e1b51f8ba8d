"""`twinfuse.keras.fuse`, `unfuse` and `explain` on models that exist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import twinfuse
from tests.conftest import Launched
from tests.keras_on_tensorflow import data, keras, layers, tfk


def sequential() -> Any:
    return keras.Sequential(
        [keras.Input((7,)), layers.Dense(6, "relu"), layers.Dense(5, "relu"), layers.Dense(3)]
    )


def deferred_sequential() -> Any:
    model = keras.Sequential([layers.Dense(6, "relu"), layers.Dense(5, "relu"), layers.Dense(3)])
    model(data(1, 7))
    return model


def functional() -> Any:
    inputs = keras.Input((7,))
    shared = layers.Dense(7, "relu")
    hidden = shared(shared(inputs)) + inputs
    return keras.Model(inputs, layers.Dense(3)(hidden))


def nested() -> Any:
    inner = keras.Sequential([keras.Input((7,)), layers.Dense(7, "relu")])
    wrapped = layers.TimeDistributed(layers.Dense(7, "relu"))
    inputs = keras.Input((7,))
    steps = wrapped(layers.Reshape((1, 7))(inner(inputs)))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(steps)))


class Subclassed(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [layers.Dense(7, "relu") for _ in range(2)]
        self.head = layers.Dense(3)

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def subclassed() -> Any:
    model = Subclassed()
    model(data(1, 7))
    return model


def convolutional() -> Any:
    return keras.Sequential(
        [
            keras.Input((7,)),
            layers.Reshape((7, 1)),
            layers.Conv1D(4, 2, padding="causal", activation="relu"),
            layers.Reshape((7, 2, 2)),
            layers.Conv2D(3, 2, 2, padding="same", activation="relu"),
            layers.Conv2D(3, 1),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


MODELS = [sequential, deferred_sequential, functional, nested, subclassed, convolutional]
FUSED = {
    layers.Dense: tfk.layers.Dense,
    layers.Conv1D: tfk.layers.Conv1D,
    layers.Conv2D: tfk.layers.Conv2D,
}


def made(build: Any) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    model = build()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def fit(model: Any, epochs: int = 2) -> list[float]:
    x, y = data(32, 7), data(32, 3)
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, shuffle=False).history["loss"]


def state(model: Any) -> dict[str, Any]:
    """What `fuse` must leave alone."""
    return {
        "ids": [id(v) for v in model.variables],
        "paths": [v.path for v in model.variables],
        "names": [layer.name for layer in model._flatten_layers()],
        "configs": [layer.get_config() for layer in model._flatten_layers() if layer.built]
        if not isinstance(model, Subclassed)
        else [],
        "optimizer": [v.numpy().tolist() for v in model.optimizer.variables],
    }


@pytest.mark.parametrize("build", MODELS)
def test_fuse_in_the_middle_of_training(build: Any, launched: Launched) -> None:
    kernels = "conv_relu" if build is convolutional else "linear_relu"
    native = made(build)
    expected = fit(native, epochs=5)

    model = made(build)
    with launched("linear_relu_", times=0), launched("conv_relu_", times=0):
        losses = fit(model, epochs=2)
    weights = model.get_weights()
    before = state(model)
    found = [layer for layer in model._flatten_layers() if type(layer) in FUSED]
    natives = [type(layer) for layer in found]
    assert tfk.fuse(model) is model
    after = state(model)
    for layer, cls in zip(found, natives, strict=True):
        assert type(layer) is (FUSED[cls] if layer.activation is keras.activations.relu else cls)
    assert {k: v for k, v in after.items() if k != "configs"} == {
        k: v for k, v in before.items() if k != "configs"
    }
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with (
        launched(f"{kernels}_forward_", times=16),
        launched(f"{kernels}_backward_", times=16),
    ):
        losses += fit(model, epochs=2)
    with launched(f"{kernels}_forward_", times=2):
        fused = model.predict(data(4, 7), verbose=0)

    assert tfk.unfuse(model) is model
    assert [type(layer) for layer in found] == natives
    assert all(layer.supports_jit for layer in found)
    assert not any("_twinfuse_original" in vars(layer) for layer in model._flatten_layers())
    with launched("linear_relu_", times=0), launched("conv_relu_", times=0):
        np.testing.assert_allclose(model.predict(data(4, 7), verbose=0), fused, atol=1e-5)
        losses += fit(model, epochs=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_unfuse_gives_back_exactly_what_was() -> None:
    model = made(sequential)
    first = model.layers[0]
    first.supports_jit = False
    quantize = first.quantize
    before = state(model)
    tfk.unfuse(tfk.fuse(tfk.fuse(model)))
    assert state(model) == before
    assert first.quantize is quantize and first.supports_jit is False
    assert model.layers[1].supports_jit is True


def test_unfuse_of_convolutions_built_fused(launched: Launched) -> None:
    layer = tfk.layers.Conv2D(5, 3, activation="relu")
    x = data(2, 6, 7, 3)
    expected = layer(x)
    tfk.unfuse(layer)
    assert type(layer) is layers.Conv2D and layer.supports_jit
    with launched("conv_relu_", times=0):
        np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_unfuse_of_layers_built_fused(launched: Launched) -> None:
    layer = tfk.layers.Dense(5, "relu")
    x = data(4, 7)
    expected = layer(x)
    tfk.unfuse(layer)
    assert type(layer) is layers.Dense and layer.supports_jit
    with launched("linear_relu_", times=0):
        np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    layer.quantize("int8")


@pytest.mark.parametrize("jit_compile", [True, False])
def test_jit_compiled_models(jit_compile: bool, launched: Launched) -> None:
    model = made(sequential)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    fit(model, epochs=1)
    tfk.fuse(model)
    assert model.jit_compile is False
    with launched("linear_relu_forward_", times=8):
        fit(model, epochs=1)
    tfk.unfuse(model)
    assert model.jit_compile is jit_compile
    fit(model, epochs=1)


def test_unfuse_keeps_a_later_compile() -> None:
    model = made(sequential)
    model.compile("sgd", "mse", jit_compile=True)
    tfk.fuse(model)
    model.compile("sgd", "mse", jit_compile=False)
    tfk.unfuse(model)
    assert model.jit_compile is False


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantize_after_fuse(mode: str, launched: Launched) -> None:
    results = []
    for change in (tfk.fuse, lambda model: model):
        model = change(made(sequential))
        model.quantize(mode)
        with launched("linear_relu_", times=0):
            results.append(model.predict(data(4, 7), verbose=0))
    np.testing.assert_array_equal(*results)


def test_lora_after_fuse(launched: Launched) -> None:
    model = tfk.fuse(made(sequential))
    model.layers[0].enable_lora(2)
    with launched("linear_relu_forward_", times=2):
        model(data(4, 7))


def test_only_exact_layers_are_fused(launched: Launched) -> None:
    class Shifted(layers.Dense):  # type: ignore[misc]
        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return super().call(inputs, training=training) + 1

    class Doubled(layers.Conv2D):  # type: ignore[misc]
        def convolution_op(self, inputs: Any, kernel: Any) -> Any:
            return 2 * super().convolution_op(inputs, kernel)

    keras.utils.clear_session()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(2, 3, activation="relu", name="first"),
            Doubled(2, 1, activation="relu"),
            layers.Conv2D(2, 1, activation="tanh"),
            layers.DepthwiseConv2D(2, activation="relu"),
            layers.SeparableConv2D(2, 2, activation="relu"),
            layers.Conv2DTranspose(2, 2, activation="relu"),
            layers.Flatten(),
            Shifted(5, "relu"),
            layers.Dense(6, "tanh"),
            layers.Dense(6, "relu", name="last"),
            layers.Reshape((3, 2)),
            layers.GRU(4),
        ]
    )
    x = data(2, 8, 8, 1)
    expected = model.predict(x, verbose=0)
    before = {row.where: row for row in tfk.explain(model)}
    assert "not fused" in before["sequential/last"].reason
    assert "not fused" in before["sequential/first"].reason
    tfk.fuse(model)
    with launched("conv_relu_", times=1), launched("linear_relu_", times=1):
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)
    report = twinfuse.explain(model)
    rows = {row.op: row for row in report if row.backend == "native"}
    for name in ("DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose", "GRUCell"):
        assert rows[name].reason == "no fused kernel computes it"
    assert rows["Shifted"].reason == "a subclass of Dense may compute something else"
    assert rows["Doubled"].reason == "a subclass of Conv2D may compute something else"
    assert "tanh" in rows["Dense"].reason and "tanh" in rows["Conv2D"].reason
    fused = {row.where: row.kernel for row in report if row.backend == "cpu"}
    assert fused["sequential/last"].startswith("linear_relu_forward_f32_")
    assert fused["sequential/first"].startswith("conv_relu_forward_f32_")
    assert len(fused) == 2 and "sequential/last" in str(report)


@pytest.mark.parametrize("make", [lambda: layers.Dense(5, "relu"), lambda: layers.LSTM(5)])
def test_a_layer_with_another_call_is_left_alone(make: Any) -> None:
    layer = make()
    layer.build((2, 3, 7))
    layer.call = lambda inputs, **options: -inputs
    tfk.fuse(layer)
    np.testing.assert_array_equal(layer(data(2, 3, 7)), -data(2, 3, 7))
    (row,) = tfk.explain(layer)
    assert row.reason == "its call method has been replaced"


def test_fuse_takes_only_layers() -> None:
    with pytest.raises(TypeError, match="model: expected a Keras model or layer, got int"):
        tfk.fuse(3)  # type: ignore[type-var]


def test_recurrent_layers(launched: Launched) -> None:
    keras.utils.clear_session()
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both"),
            layers.RNN(layers.LSTMCell(6), return_sequences=True, name="cells"),
            layers.LSTM(4, activation="elu", return_sequences=True, name="native"),
            layers.LSTM(4, name="last"),
        ]
    )
    x = data(2, 5, 3)
    expected = model.predict(x, verbose=0)
    weights = model.get_weights()
    assert all("not fused" in r.reason or "elu" in r.reason for r in tfk.explain(model))
    assert tfk.fuse(model) is model
    assert type(model.get_layer("last").cell) is layers.LSTMCell
    with launched("lstm_forward", times=3), launched("lstm_cell_forward"):
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)
    report = twinfuse.explain(model)
    assert [row.backend for row in report] == ["cpu", "cpu", "cpu", "native", "cpu"]
    tfk.unfuse(model)
    with launched("lstm_", times=0):
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    assert all(map(np.array_equal, weights, model.get_weights()))
    assert type(model.get_layer("last")) is layers.LSTM
