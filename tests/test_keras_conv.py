"""`twinfuse.keras.layers.Conv1D` and `Conv2D` against Keras' own, on the TensorFlow backend."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.test_keras_dense import assert_close, data, gradients  # noqa: E402

POLICIES = ("float32", "float64", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
RANKS = {"Conv1D": 1, "Conv2D": 2}
both = pytest.mark.parametrize("name", RANKS)


@pytest.fixture(autouse=True)
def _fresh_names() -> Iterator[None]:
    keras.utils.clear_session()
    yield


def pair(name: str, channels: int = 4, filters: int = 6, **config: Any) -> tuple[Any, Any]:
    """The fused and the native layer with the same weights."""
    config = {
        "kernel_size": 3,
        "activation": "relu",
        "bias_initializer": "random_normal",
        **config,
    }
    layers = [getattr(module, name)(filters, **config) for module in (tfk.layers, keras.layers)]
    sizes = [9] * RANKS[name]
    first = config.get("data_format") == "channels_first"
    for layer in layers:
        layer.build((None, channels, *sizes) if first else (None, *sizes, channels))
    layers[0].set_weights(layers[1].get_weights())
    return layers[0], layers[1]


def images(name: str, batch: int = 2, channels: int = 4) -> np.ndarray:
    return data(batch, *(9, 8)[: RANKS[name]], channels)


@both
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_values_and_gradients(
    name: str, policy: str, use_bias: bool, graph: bool, launched: Launched
) -> None:
    ours, theirs = pair(name, dtype=policy, use_bias=use_bias)
    compute = keras.DTypePolicy(policy).compute_dtype
    x = images(name)
    run = tf.function(gradients) if graph else gradients
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        got = run(ours, x)
    assert got[0].dtype == compute
    assert_close(got, gradients(theirs, x), compute)


CONFIGS: list[dict[str, Any]] = [
    {"padding": "same"},
    {"padding": "same", "strides": 2},
    {"padding": "same", "strides": 3, "kernel_size": 2},
    {"padding": "same", "kernel_size": 4},
    {"strides": 2},
    {"dilation_rate": 2},
    {"dilation_rate": 3, "padding": "same"},
    {"kernel_size": 1},
    {"groups": 2},
    {"groups": 4, "filters": 8, "padding": "same", "strides": 2},
]
CAUSAL: list[dict[str, Any]] = [
    {"padding": "causal"},
    {"padding": "causal", "dilation_rate": 3},
    {"padding": "causal", "strides": 2, "groups": 2},
]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in RANKS for config in CONFIGS]
    + [("Conv1D", config) for config in CAUSAL],
)
def test_settings(name: str, config: dict[str, Any], data_format: str, launched: Launched) -> None:
    config = {"dtype": "float64", **config}
    ours, theirs = pair(name, data_format=data_format, **config)
    x = tf.constant(images(name), tf.float64)
    rank = len(x.shape)
    order = [0, rank - 1, *range(1, rank - 1)] if data_format == "channels_first" else range(rank)
    given = tf.transpose(x, order)
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        y, grads = gradients(ours, given)
    assert y.shape == theirs.compute_output_shape(given.shape)
    # On CPUs TensorFlow refuses channels first and, in float64, the gradients of dilations and
    # groups. XLA has those gradients.
    last = pair(name, data_format="channels_last", **config)[1]
    last.set_weights(theirs.get_weights())
    expected = tf.function(gradients, jit_compile=True)(last, x)
    back = np.argsort(order)
    y, grads = tf.transpose(y, back), [tf.transpose(grads[0], back), *grads[1:]]
    assert_close((y, grads), expected, "float64")


@both
def test_functional_model_with_unknown_dimensions(name: str, launched: Launched) -> None:
    layers = pair(name, padding="same", strides=2)
    models = []
    for layer in layers:
        inputs = keras.Input((*(None,) * RANKS[name], 4))
        outputs = layer(inputs)
        assert outputs.shape == (None, *(None,) * RANKS[name], 6)
        models.append(keras.Model(inputs, outputs))
    with launched("conv_relu_forward_", times=1):
        got = models[0].predict(images(name), verbose=0)
    np.testing.assert_allclose(got, models[1].predict(images(name), verbose=0), atol=1e-5)


def small_model(package: Any, **config: Any) -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            package.Conv2D(4, 3, padding="same", strides=2, activation="relu", **config),
            keras.layers.LayerNormalization(),
            keras.layers.Reshape((16, 4)),
            package.Conv1D(6, 3, padding="causal", activation="relu", use_bias=False),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def losses(model: Any, **compile_options: Any) -> list[float]:
    model.compile(keras.optimizers.Adam(0.01), "mse", **compile_options)
    x, y = data(32, 8, 8, 2), data(32, 3)
    return model.fit(x, y, batch_size=8, epochs=4, verbose=0, shuffle=False).history["loss"]


TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "regularized": {
        "kernel_regularizer": "l2",
        "bias_regularizer": "l1",
        "activity_regularizer": "l2",
        "kernel_constraint": "max_norm",
        "bias_constraint": "non_neg",
    },
    "mixed": {"dtype": "mixed_bfloat16"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_fit_follows_the_native_losses(name: str, launched: Launched) -> None:
    # 4 epochs of 4 batches through two fused layers.
    with launched("conv_relu_forward_", times=32), launched("conv_relu_backward_", times=32):
        ours = losses(small_model(tfk.layers, **TRAINED[name]))
    theirs = losses(small_model(keras.layers, **TRAINED[name]))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2 if name == "mixed" else 1e-5)
    assert ours[-1] < ours[0]


def test_models_are_kept_from_xla(launched: Launched) -> None:
    model = small_model(tfk.layers)
    with pytest.MonkeyPatch.context() as patch:
        # As on a machine with a GPU, where "auto" means XLA if every layer supports it.
        devices = [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
        patch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
        model.compile("sgd", "mse", jit_compile="auto")
    assert model.jit_compile is False
    with launched("conv_relu_forward_", times=2):
        model.fit(data(8, 8, 8, 2), data(8, 3), verbose=0)


@both
def test_layers_that_are_native_support_jit(name: str) -> None:
    layer = getattr(tfk.layers, name)
    assert layer(3, 3).supports_jit and layer(3, 3, activation="tanh").supports_jit
    assert not layer(3, 3, activation="relu").supports_jit


@both
@pytest.mark.parametrize("activation", [None, "tanh", "relu6"])
def test_other_activations_are_native(
    name: str, activation: str | None, launched: Launched
) -> None:
    ours, theirs = pair(name, activation=activation, padding="same")
    with launched("conv_relu_", times=0):
        got = ours(images(name))
    np.testing.assert_array_equal(got, theirs(images(name)))


@both
@pytest.mark.parametrize(
    "activation",
    ["relu", keras.activations.relu, keras.ops.relu, tf.nn.relu],
    ids=["name", "keras.activations", "keras.ops", "tf.nn"],
)
def test_spellings_of_relu(name: str, activation: Any, launched: Launched) -> None:
    ours, theirs = pair(name, activation=activation)
    with launched("conv_relu_forward_", times=1):
        got = ours(images(name))
    np.testing.assert_allclose(got, theirs(images(name)), atol=1e-5)


@both
def test_config_is_the_native_one(name: str) -> None:
    config = {"kernel_regularizer": "l2", "lora_rank": 2, "dtype": "mixed_float16"}
    ours, theirs = pair(name, groups=2, strides=2, padding="same", **config)
    assert ours.get_config() == {**theirs.get_config(), "name": ours.name}
    again = type(ours).from_config(ours.get_config())
    assert type(again) is type(ours) is getattr(tfk.layers, name)
    assert again.get_config() == ours.get_config()


@both
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_lora(name: str, policy: str, launched: Launched) -> None:
    ours, theirs = pair(name, dtype=policy)
    for layer in (ours, theirs):
        layer.enable_lora(2)
        layer.lora_kernel_a.assign(data(*layer.lora_kernel_a.shape))
        layer.lora_kernel_b.assign(data(*layer.lora_kernel_b.shape))
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        got = gradients(ours, images(name))
    assert len(got[1]) == 4  # x, bias and the two factors: the kernel is frozen
    compute = keras.DTypePolicy(policy).compute_dtype
    assert_close(got, gradients(theirs, images(name)), compute)


@both
def test_jacobian_and_forward_mode(name: str) -> None:
    ours, theirs = pair(name, dtype="float64", filters=2, strides=2)
    x = tf.constant(images(name), tf.float64)
    results = []
    for layer in (ours, theirs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            tangent = accumulator.jvp(layer(x))
        results.append([tape.jacobian(y, [x, *layer.trainable_variables]), tangent])
    assert_close(*results, "float64")


@both
def test_errors_are_the_native_ones(name: str) -> None:
    layers = pair(name, dtype="float64")
    for layer in layers:
        for wrong in (images(name, channels=3), images(name)[0]):
            with pytest.raises(ValueError, match="incompatible with the layer"):
                layer(wrong)
        # Smaller than a window: by one, and by more.
        small = images(name)[:, :2]
        with pytest.raises(ValueError, match="empty output"):
            layer(small)
    results = []
    for layer in layers:
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as caught:
            layer(images(name)[:, :1])
        results.append(caught.type)
    assert results[0] is results[1]
    with pytest.raises(ValueError, match="filters"):
        getattr(tfk.layers, name)(0, 3, activation="relu")


@pytest.mark.allow_fallback
@both
def test_inputs_that_only_the_native_layer_judges(name: str, launched: Launched) -> None:
    ours, theirs = pair(name, autocast=False)
    cases = {
        "its input is float64 and its kernel float32": tf.constant(images(name), tf.float64),
        f"its input has {RANKS[name] + 3} dimensions": images(name)[None],
    }
    for reason, x in cases.items():
        try:
            expected: Any = theirs(x)
        except Exception as error:
            expected = type(error)
        warned = pytest.warns(twinfuse.FallbackWarning, match=f"{name} .*{reason}")
        with warned, launched("conv_relu_", times=0):
            try:
                got: Any = ours(x)
            except Exception as error:
                got = type(error)
        if isinstance(expected, type):
            assert got is expected
        else:
            np.testing.assert_array_equal(got, expected)


@both
def test_subclass_with_its_own_convolution(name: str, launched: Launched) -> None:
    class Doubled(getattr(tfk.layers, name)):  # type: ignore[misc]
        def convolution_op(self, inputs: Any, kernel: Any) -> Any:
            return 2 * super().convolution_op(inputs, kernel)

    layer = Doubled(6, 3, activation="relu")
    with pytest.raises(twinfuse.FallbackError, match=r"Doubled .* convolution_op is"):
        layer(images(name))
    with twinfuse.strict(False), launched("conv_relu_", times=0):
        layer(images(name))
    assert tfk.explain(layer)[0].reason == "its convolution_op is overridden"


@both
def test_use_backend_reference(name: str, launched: Launched) -> None:
    ours, theirs = pair(name, padding="same")
    with twinfuse.use_backend("reference"), launched("conv_relu_", times=0):
        np.testing.assert_array_equal(ours(images(name)), theirs(images(name)))


@both
def test_explain(name: str) -> None:
    ours, theirs = pair(name)
    (row,) = twinfuse.explain(ours)
    assert row.backend == "cpu" and row.kernel.startswith("conv_relu_forward_f32_")
    with twinfuse.use_backend("reference"):
        assert twinfuse.explain(ours)[0].backend == "reference"
    (row,) = tfk.explain(theirs)
    assert row.backend == "native" and "fuse" in row.reason
