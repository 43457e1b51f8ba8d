"""`twinfuse.keras.layers.Dense` against `keras.layers.Dense`, on the TensorFlow backend."""

from __future__ import annotations

import warnings
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

POLICIES = ("float32", "float64", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


@pytest.fixture(autouse=True)
def _fresh_names() -> Iterator[None]:
    keras.utils.clear_session()
    yield


def data(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def pair(units: int = 5, features: int = 7, **config: Any) -> tuple[Any, Any]:
    """The fused and the native layer with the same weights."""
    config = {"activation": "relu", "bias_initializer": "random_normal", **config}
    layers = [cls(units, **config) for cls in (tfk.layers.Dense, keras.layers.Dense)]
    for layer in layers:
        layer.build((None, features))
    layers[0].set_weights(layers[1].get_weights())
    return layers[0], layers[1]


def gradients(layer: Any, x: Any) -> tuple[Any, Any]:
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 2)
    return y, tape.gradient(loss, [x, *layer.trainable_variables])


def assert_close(ours: Any, theirs: Any, dtype: str) -> None:
    """To a few roundings of the largest element: native and fused sum in other orders."""
    epsilon = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-20, "float64": 2**-48}[dtype]
    for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(tf.cast(t, tf.float64)) for t in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * epsilon * np.abs(b).max(initial=1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_values_and_gradients(policy: str, use_bias: bool, graph: bool, launched: Launched) -> None:
    ours, theirs = pair(dtype=policy, use_bias=use_bias)
    compute = keras.DTypePolicy(policy).compute_dtype
    for shape in ((4, 7), (2, 3, 7), (0, 7)):
        run = tf.function(gradients) if graph else gradients
        with launched("linear_relu_forward_", times=1), launched("linear_relu_backward_", times=1):
            got = run(ours, data(*shape))
        assert got[0].dtype == compute
        assert_close(got, gradients(theirs, data(*shape)), compute)


@pytest.mark.parametrize("shape", [(None, 7), (None, None, 7)])
def test_functional_model_with_unknown_dimensions(
    shape: tuple[int | None, ...], launched: Launched
) -> None:
    ours, theirs = pair()
    models = []
    for layer in (ours, theirs):
        inputs = keras.Input(shape[1:])
        outputs = layer(inputs)
        assert outputs.shape == (*shape[:-1], 5)
        models.append(keras.Model(inputs, outputs))
    x = data(*(size or 3 for size in shape))
    with launched("linear_relu_forward_", times=1):
        got = models[0].predict(x, verbose=0)
    np.testing.assert_allclose(got, models[1].predict(x, verbose=0), atol=1e-5)


def small_model(dense: type, **config: Any) -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((7,)),
            dense(16, activation="relu", **config),
            keras.layers.LayerNormalization(),
            dense(8, activation="relu", use_bias=False),
            dense(3),
        ]
    )


def losses(model: Any, **compile_options: Any) -> list[float]:
    model.compile(keras.optimizers.Adam(0.01), "mse", **compile_options)
    x, y = data(64, 7), data(64, 3)
    return model.fit(x, y, batch_size=16, epochs=4, verbose=0, shuffle=False).history["loss"]


CONFIGS: dict[str, dict[str, Any]] = {
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


@pytest.mark.parametrize("name", CONFIGS)
def test_fit_follows_the_native_losses(name: str, launched: Launched) -> None:
    # 4 epochs of 4 batches through two fused layers.
    with launched("linear_relu_forward_", times=32), launched("linear_relu_backward_", times=32):
        ours = losses(small_model(tfk.layers.Dense, **CONFIGS[name]))
    theirs = losses(small_model(keras.layers.Dense, **CONFIGS[name]))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2 if name == "mixed" else 1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("jit_compile", ["auto", True, False])
def test_jit_compile(jit_compile: Any, launched: Launched) -> None:
    model = small_model(tfk.layers.Dense)
    with pytest.MonkeyPatch.context() as patch:
        # As on a machine with a GPU, where "auto" means XLA if every layer supports it.
        devices = [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
        patch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.compile("sgd", "mse", jit_compile=jit_compile)
    assert any("jit_compile" in str(w.message) for w in caught) == (jit_compile is True)
    assert model.jit_compile is False
    with launched("linear_relu_forward_", times=2):
        model.fit(data(8, 7), data(8, 3), verbose=0)


def test_layers_that_are_native_support_jit() -> None:
    assert tfk.layers.Dense(3).supports_jit and tfk.layers.Dense(3, "tanh").supports_jit
    assert not tfk.layers.Dense(3, "relu").supports_jit


@pytest.mark.parametrize("activation", [None, "tanh", "relu6", "gelu"])
def test_other_activations_are_native(activation: str | None, launched: Launched) -> None:
    ours, theirs = pair(activation=activation)
    with launched("linear_relu_", times=0):
        got = ours(data(4, 7))
    np.testing.assert_array_equal(got, theirs(data(4, 7)))


@pytest.mark.parametrize(
    "activation",
    ["relu", keras.activations.relu, keras.ops.relu, tf.nn.relu],
    ids=["name", "keras.activations", "keras.ops", "tf.nn"],
)
def test_spellings_of_relu(activation: Any, launched: Launched) -> None:
    ours, theirs = pair(activation=activation)
    with launched("linear_relu_forward_", times=1):
        got = ours(data(4, 7))
    np.testing.assert_allclose(got, theirs(data(4, 7)), atol=1e-5)


def test_config_is_the_native_one() -> None:
    ours, theirs = pair(kernel_regularizer="l2", lora_rank=2, name="same", dtype="mixed_float16")
    assert ours.get_config() == theirs.get_config()
    again = tfk.layers.Dense.from_config(ours.get_config())
    assert type(again) is tfk.layers.Dense and again.get_config() == ours.get_config()


def test_lora(launched: Launched) -> None:
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.enable_lora(2)
        layer.lora_kernel_a.assign(data(7, 2))
        layer.lora_kernel_b.assign(data(2, 5))
    with launched("linear_relu_forward_", times=1), launched("linear_relu_backward_", times=1):
        got = gradients(ours, data(4, 7))
    assert len(got[1]) == 4  # x, bias and the two factors: the kernel is frozen
    assert_close(got, gradients(theirs, data(4, 7)), "float32")


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantize(mode: str, launched: Launched) -> None:
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.quantize(mode)
    assert ours.quantization_mode == mode
    with launched("linear_relu_", times=0):
        got = ours(data(4, 7))
    np.testing.assert_array_equal(got, theirs(data(4, 7)))

    class Custom(tfk.layers.Dense):
        pass

    custom = Custom(3)
    custom.build((None, 7))
    with pytest.raises(NotImplementedError):
        custom.quantize(mode)


@pytest.mark.allow_fallback
def test_sparse_integer_and_wide_inputs(launched: Launched) -> None:
    ours, theirs = pair()
    sparse = tf.sparse.from_dense(np.maximum(data(4, 7), 0))
    with pytest.warns(twinfuse.FallbackWarning, match="SparseTensor"):
        np.testing.assert_array_equal(ours(sparse), theirs(sparse))
    integers = np.arange(28).reshape(4, 7)
    with launched("linear_relu_forward_", times=1):
        got = ours(integers)
    np.testing.assert_allclose(got, theirs(integers), rtol=1e-5)
    ours, theirs = pair(autocast=False)
    wide = tf.constant(data(4, 7), tf.float64)
    with pytest.warns(twinfuse.FallbackWarning, match="input is float64 and its kernel float32"):
        got = ours(wide)
    np.testing.assert_array_equal(got, theirs(wide))
    assert got.dtype == theirs(wide).dtype


def test_jacobian_and_forward_mode() -> None:
    ours, theirs = pair(dtype="float64")
    x = tf.constant(data(3, 7), tf.float64)
    results = []
    for layer in (ours, theirs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            tangent = accumulator.jvp(layer(x))
        results.append([tape.jacobian(y, [x, *layer.trainable_variables]), tangent])
    assert_close(*results, "float64")


def test_masks_pass_through() -> None:
    ours, theirs = pair(features=4)
    embedding = keras.layers.Embedding(10, 4, mask_zero=True)
    tokens = np.array([[1, 2, 0], [3, 0, 0]])
    for layer in (ours, theirs):
        mask = keras.src.backend.get_keras_mask(layer(embedding(tokens)))
        np.testing.assert_array_equal(mask, tokens != 0)


def test_errors_are_the_native_ones() -> None:
    ours, theirs = pair()
    for layer in (ours, theirs):
        for wrong in (data(4, 6), data(7)):
            with pytest.raises(ValueError, match="incompatible with the layer"):
                layer(wrong)
    with pytest.raises(ValueError, match="units"):
        tfk.layers.Dense(0, activation="relu")


def test_explain() -> None:
    ours, theirs = pair()
    (row,) = twinfuse.explain(ours)
    assert row.backend == "cpu" and row.kernel.startswith("linear_relu_forward_f32_")
    with twinfuse.use_backend("reference"):
        assert twinfuse.explain(ours)[0].backend == "reference"
    (row,) = tfk.explain(theirs)
    assert row.backend == "native" and "fuse" in row.reason
