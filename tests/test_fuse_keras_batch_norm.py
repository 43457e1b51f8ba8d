"""`twinfuse.keras.fuse(model, fold_batch_norm=True)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched
from tests.keras_on_tensorflow import data, keras, layers, tf, tfk
from tests.rule import assert_within_twice


def randomized(model: Any) -> Any:
    """`model` with statistics and weights that are nowhere 0 or 1 by chance."""
    for seed, variable in enumerate(model.variables):
        values = data(*variable.shape, seed=seed)
        positive = variable.name in ("gamma", "moving_variance")
        variable.assign(0.5 + np.abs(values) if positive else values / 2)
    return model


CASES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "dense": ((7,), lambda **o: layers.Dense(6, **o), {}),
    "dense of steps": ((4, 7), lambda **o: layers.Dense(6, **o), {}),
    "no bias": ((7,), lambda **o: layers.Dense(6, use_bias=False, **o), {}),
    "no scale": ((7,), lambda **o: layers.Dense(6, **o), {"scale": False}),
    "no center": ((7,), lambda **o: layers.Dense(6, **o), {"center": False, "epsilon": 0.1}),
    "neither": (
        (7,),
        lambda **o: layers.Dense(6, use_bias=False, **o),
        {"scale": False, "center": False},
    ),
    "conv1d": ((9, 3), lambda **o: layers.Conv1D(6, 3, padding="causal", **o), {}),
    "conv2d": ((6, 7, 3), lambda **o: layers.Conv2D(5, 3, 2, padding="same", **o), {}),
    "groups": ((6, 7, 4), lambda **o: layers.Conv2D(6, 3, groups=2, use_bias=False, **o), {}),
}


def small(name: str, dtype: str = "float32") -> Any:
    keras.utils.clear_session()
    shape, layer, options = CASES[name]
    parts = (layer(dtype=dtype), layers.BatchNormalization(dtype=dtype, **options))
    return randomized(
        keras.Sequential([keras.Input(shape, dtype=dtype), *parts, layers.ReLU(dtype=dtype)])
    )


def results(model: Any, x: np.ndarray, training: bool = False) -> dict[str, np.ndarray]:
    """Outputs, and gradients of a loss that weighs them differently."""
    x = tf.constant(x, model.layers[0].compute_dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = model(x, training=training)
        loss = tf.reduce_sum(outputs * data(*outputs.shape, seed=1))
    variables = model.trainable_variables
    names = ["outputs", "input", *(variable.name for variable in variables)]
    gradients = tape.gradient(loss, [x, *(variable.value for variable in variables)])
    return dict(zip(names, (value.numpy() for value in (outputs, *gradients)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, launched: Launched) -> None:
    x = data(16, *CASES[name][0])
    reference = results(small(name, "float64"), x)
    assert 0 < np.mean(reference["outputs"] > 0) < 1
    model = small(name)
    native = results(model, x)
    op = "linear_relu" if isinstance(model.layers[0], layers.Dense) else "conv_relu"
    tfk.fuse(model, fold_batch_norm=True)
    with launched(f"{op}_forward_", times=1), launched(f"{op}_backward_", times=1):
        ours = results(model, x)
    for key, expected in reference.items():
        assert_within_twice(ours[key], native[key], expected, key, dtype="float32")
    exact = results(tfk.fuse(small(name, "float64"), fold_batch_norm=True), x)
    for key, expected in reference.items():
        np.testing.assert_allclose(exact[key], expected, rtol=1e-10, atol=1e-11)


def test_channels_first(launched: Launched) -> None:
    keras.utils.clear_session()
    first, last = (
        randomized(
            keras.Sequential(
                [
                    keras.Input(shape),
                    layers.Conv2D(6, 3, data_format=f"channels_{name}"),
                    layers.BatchNormalization(axis=axis),
                    layers.ReLU(),
                ]
            )
        )
        for name, shape, axis in (("first", (4, 6, 7), 1), ("last", (6, 7, 4), -1))
    )
    x = data(2, 6, 7, 4)
    tfk.fuse(first, fold_batch_norm=True)
    with launched("conv_relu_forward_", times=1):
        ours = first(x.transpose(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(ours.transpose(0, 2, 3, 1), last(x), rtol=1e-4, atol=1e-5)


def network() -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for filters in (4, 6):
        x = layers.Conv2D(filters, 3)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x))
    x = layers.Dense(5)(layers.Flatten()(x))
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def fit(model: Any) -> list[float]:
    x, y = data(32, 8, 8, 3), data(32, 2)
    return model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"]


def test_training_is_that_of_the_layers_and_prediction_follows_it(launched: Launched) -> None:
    native, model = network(), tfk.fuse(network(), fold_batch_norm=True)
    x = data(4, 8, 8, 3)
    for _ in range(2):
        with launched("conv_relu_", times=0), launched("linear_relu_", times=0):
            assert fit(model) == fit(native)
        for ours, expected in zip(model.get_weights(), native.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, expected)
        expected = native.predict(x, verbose=0)
        with launched("conv_relu_forward_", times=2), launched("linear_relu_forward_", times=1):
            np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    weights = randomized(native).get_weights()
    model.set_weights(weights)
    expected = native.predict(x, verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4)
    assert tfk.unfuse(model) is model
    with launched("conv_relu_", times=0), launched("linear_relu_", times=0):
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_training_may_be_said_anywhere_above(launched: Launched) -> None:
    class Outer(layers.Layer):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return self.inner.call(inputs)

    model = tfk.fuse(network(), fold_batch_norm=True)
    native = network()
    x = data(4, 8, 8, 3)
    ways = [
        lambda model: model(x, training=True),
        lambda model: model.call(x, training=True),
        lambda model: Outer(model)(x, training=True),
    ]
    for way in ways:
        with launched("conv_relu_", times=0):
            ours = way(model)
        np.testing.assert_allclose(ours, way(native), atol=1e-6)
        np.testing.assert_allclose(
            model.layers[2].moving_mean, native.layers[2].moving_mean, atol=1e-6
        )


def test_frozen_normalization_is_folded_in_training(launched: Launched) -> None:
    model, x = small("conv2d"), data(16, *CASES["conv2d"][0])
    model.layers[1].trainable = False
    native = results(model, x, training=True)
    assert set(native) == {"outputs", "input", "kernel", "bias"}
    tfk.fuse(model, fold_batch_norm=True)
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        ours = results(model, x, training=True)
    for key, expected in native.items():
        np.testing.assert_allclose(ours[key], expected, rtol=1e-4, atol=1e-4)
    model.layers[1].trainable = True
    with launched("conv_relu_", times=0):
        results(model, x, training=True)


def test_only_where_asked(launched: Launched) -> None:
    model = network()
    x = data(4, 8, 8, 3)
    tfk.fuse(tfk.fuse(model, fold_batch_norm=True))
    with launched("conv_relu_", times=0), launched("linear_relu_", times=0):
        model.predict(x, verbose=0)
    rows = tfk.explain(model)
    assert not any(row.backend in ("cpu", "fused") for row in rows)
    reason = "not fused: call twinfuse.keras.fuse(model, fold_batch_norm=True)"
    assert [row.reason for row in rows].count(reason) == 3
    rows = tfk.explain(tfk.fuse(model, fold_batch_norm=True))
    assert [row.backend for row in rows].count("cpu") == 3
    conv, norm, relu = rows[:3]
    names = [layer.name for layer in model.layers[1:4]]
    assert conv.reason == f"together with {names[1]}, {names[2]} at inference"
    assert norm.backend == relu.backend == "fused"
    assert norm.reason == relu.reason == f"together with {names[0]} at inference"


def test_what_is_left_alone(launched: Launched) -> None:
    def reason(layer: Any, *others: Any) -> str:
        keras.utils.clear_session()
        inputs = keras.Input((6, 6, 3))
        x = layer(inputs)
        for other in others:
            x = other(x)
        model = tfk.fuse(keras.Model(inputs, x), fold_batch_norm=True)
        with launched("conv_relu_", times=0):
            model.predict(data(2, 6, 6, 3), verbose=0)
        return tfk.explain(model)[0].reason

    conv, norm, relu = layers.Conv2D, layers.BatchNormalization, layers.ReLU
    assert "another axis" in reason(conv(4, 1), norm(axis=1, name="norm"), relu())
    frozen = norm(name="norm")
    text = reason(conv(4, 1), lambda x: frozen(x, training=False), relu())
    assert text == "norm is called with arguments of its own"
    for policy in ("mixed_bfloat16", "bfloat16"):
        parts = conv(4, 1, dtype=policy), norm(dtype=policy, name="norm"), relu(dtype=policy)
        assert "norm is folded only" in reason(*parts)
    text = reason(conv(4, 1), norm(dtype="float64", name="norm"), relu())
    assert text == "norm computes in float64, it in float32"
    assert reason(conv(4, 1), norm()) == "its activation is linear"
    assert "re_lu has a max_value" in reason(conv(4, 1), norm(), relu(6.0))
    assert reason(conv(4, 1), layers.LayerNormalization(), relu()) == "its activation is linear"


def test_quantized_and_adapted_layers(launched: Launched) -> None:
    x = data(16, 7)
    model = small("dense")
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(data(2, 6))
    expected = model(x)
    tfk.fuse(model, fold_batch_norm=True)
    with launched("linear_relu_forward_", times=1):
        np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)

    model = small("dense")
    native = small("dense")
    tfk.fuse(model, fold_batch_norm=True)
    for each in (model, native):
        each.layers[0].quantize("int8")
    with launched("linear_relu_", times=0):
        np.testing.assert_array_equal(model(x), native(x))


def test_saved_models(tmp_path: Any, launched: Launched) -> None:
    model = randomized(network())
    x = data(4, 8, 8, 3).astype(np.float32)
    expected = model.predict(x, verbose=0)
    tfk.fuse(model, fold_batch_norm=True)
    fused = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with launched("conv_relu_", times=0):
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    with launched("conv_relu_forward_", times=2), launched("linear_relu_forward_", times=1):
        np.testing.assert_array_equal(exported.serve(tf.constant(x)), fused)
