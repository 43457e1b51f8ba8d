"""`twinfuse.keras.layers.LSTM` and `LSTMCell` against Keras' own, on the TensorFlow backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
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
B, T, N, H = 4, 6, 5, 7  # batch, steps, inputs, units


@pytest.fixture(autouse=True)
def _fresh_names() -> Iterator[None]:
    keras.utils.clear_session()
    yield


def data(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


MASKS = {
    "right": np.arange(T) < np.array([[6], [3], [1], [0]]),
    "left": np.arange(T) >= np.array([[0], [3], [5], [6]]),
    "interior": np.random.default_rng(5).random((B, T)) < 0.5,
}


def pair(shape: tuple[int | None, ...] = (B, T, N), **config: Any) -> tuple[Any, Any]:
    """The fused and the native layer with the same weights."""
    # The default for recurrent kernels computes in no 16 bits.
    config = {
        "bias_initializer": "random_normal",
        "recurrent_initializer": "glorot_uniform",
        **config,
    }
    layers = [cls(H, **config) for cls in (tfk.layers.LSTM, keras.layers.LSTM)]
    for layer in layers:
        layer.build(shape)
    layers[0].set_weights(layers[1].get_weights())
    return layers[0], layers[1]


def gradients(layer: Any, x: Any, **arguments: Any) -> tuple[Any, Any]:
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = layer(x, **arguments)
        parts = [tf.reduce_sum(tf.cast(t, tf.float64) ** 2) for t in tf.nest.flatten(found)]
        loss = tf.add_n(parts)
    return found, tape.gradient(loss, [x, *layer.trainable_variables])


EPSILON = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 2**-19, "float64": 2**-46}


def assert_close(ours: Any, theirs: Any, dtype: str = "float32") -> None:
    """To a few roundings of the largest element: native and fused sum in other orders."""
    for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(tf.cast(t, tf.float64)) for t in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * EPSILON[dtype] * np.abs(b).max(initial=1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_values_and_gradients(policy: str, use_bias: bool, graph: bool, launched: Launched) -> None:
    ours, theirs = pair(dtype=policy, use_bias=use_bias, return_sequences=True, return_state=True)
    compute = keras.DTypePolicy(policy).compute_dtype
    run = tf.function(gradients) if graph else gradients
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        got = run(ours, data(B, T, N), mask=MASKS["interior"])
    assert got[0][0].dtype == compute
    assert_close(got, gradients(theirs, data(B, T, N), mask=MASKS["interior"]), compute)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.allow_fallback
def test_masks_and_directions(
    mask: str | None,
    sequences: bool,
    backwards: bool,
    zeros: bool,
    unroll: bool,
    launched: Launched,
) -> None:
    ours, theirs = pair(
        return_sequences=sequences,
        return_state=True,
        go_backwards=backwards,
        zero_output_for_mask=zeros,
        unroll=unroll,
    )
    arguments: dict[str, Any] = {"mask": None if mask is None else MASKS[mask]}
    # See test_what_is_native.
    fused = 0 if unroll and backwards and zeros and mask else 1
    for state in (None, [data(B, H), data(B, H, seed=1)]):
        with launched("lstm_forward_", times=fused), launched("lstm_backward_", times=fused):
            got = gradients(ours, data(B, T, N), initial_state=state, **arguments)
        expected = gradients(theirs, data(B, T, N), initial_state=state, **arguments)
        assert_close(got, expected)


@pytest.mark.parametrize("kind", ["cast", "column"])
def test_masks_of_other_kinds(kind: str) -> None:
    ours, theirs = pair()
    mask = MASKS["interior"]
    mask = mask.astype(np.float32) if kind == "cast" else mask[..., None]
    x = tf.constant(data(B, T, N))
    state = [tf.zeros((B, H))] * 2
    results = [layer.inner_loop(x, state, tf.constant(mask), False) for layer in (ours, theirs)]
    assert_close(*results)
    assert results[0][1].shape == (B, 1, H)


@pytest.mark.parametrize("layer", ["embedding", "masking"])
def test_masks_of_layers_before(layer: str, launched: Launched) -> None:
    tokens = np.array([[3, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    if layer == "embedding":
        before, x = keras.layers.Embedding(10, N, mask_zero=True), tokens
    else:
        before, x = keras.layers.Masking(), data(3, T, N) * (tokens != 0)[..., None]
    results = []
    cells, head = pair(return_sequences=True), keras.layers.Dense(2)
    for lstm in cells:
        model = keras.Sequential([before, lstm, head])
        with launched("lstm_forward_", times=2 * int(lstm is cells[0])):
            results.append([model(x), tf.constant(model.predict(x, verbose=0))])
    assert_close(*results)
    tag = keras.src.backend.get_keras_mask
    embedded = before(x)
    for lstm in cells:
        np.testing.assert_array_equal(tag(lstm(embedded)), tokens != 0)


@pytest.mark.parametrize("shape", [(None, T, N), (B, None, N), (None, None, N)])
@pytest.mark.parametrize("sequences", [False, True])
def test_functional_model_with_unknown_dimensions(
    shape: tuple[int | None, ...], sequences: bool, launched: Launched
) -> None:
    models = []
    for layer in pair(return_sequences=sequences):
        inputs = keras.Input(batch_shape=shape)
        outputs = layer(inputs)
        assert outputs.shape == ((*shape[:2], H) if sequences else (shape[0], H))
        models.append(keras.Model(inputs, outputs))
    with launched("lstm_forward_", times=1):
        got = models[0].predict(data(B, T, N), verbose=0)
    np.testing.assert_allclose(got, models[1].predict(data(B, T, N), verbose=0), atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_stateful(policy: str, launched: Launched) -> None:
    ours, theirs = pair(stateful=True, return_sequences=True, dtype=policy)
    compute = keras.DTypePolicy(policy).compute_dtype
    for seed in range(3):
        with launched("lstm_forward_", times=1):
            got = ours(data(B, T, N, seed=seed))
        assert_close(got, theirs(data(B, T, N, seed=seed)), compute)
        assert_close([s.value for s in ours.states], [s.value for s in theirs.states], compute)
    for layer in (ours, theirs):
        layer.reset_state()
    assert_close(ours(data(B, T, N)), theirs(data(B, T, N)), compute)
    with pytest.raises(ValueError, match="batch size"):
        ours(data(B + 1, T, N))


ACTIVATIONS = ("tanh", "sigmoid", "relu", "hard_sigmoid")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recurrent_activation", ACTIVATIONS)
def test_activations(activation: str, recurrent_activation: str, launched: Launched) -> None:
    ours, theirs = pair(
        activation=activation, recurrent_activation=recurrent_activation, dtype="float64"
    )
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        got = gradients(ours, data(B, T, N))
    assert_close(got, gradients(theirs, data(B, T, N)), "float64")


@pytest.mark.parametrize(
    "activation", [keras.ops.tanh, keras.activations.tanh, tf.tanh, tf.nn.tanh]
)
def test_spellings_of_an_activation(activation: Callable[..., Any], launched: Launched) -> None:
    ours, _ = pair(activation=activation)
    with launched("lstm_forward_", times=1):
        ours(data(B, T, N))


NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "activation": ("its activation is linear", {"activation": None}),
    "gates": ("its recurrent_activation is gelu", {"recurrent_activation": "gelu"}),
    "callable": ("its activation is <lambda>", {"activation": lambda x: x / 2}),
    "unrolled": (
        "an unrolled loop",
        {"unroll": True, "go_backwards": True, "zero_output_for_mask": True},
    ),
}


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", NATIVE)
def test_what_is_native(name: str, launched: Launched) -> None:
    reason, config = NATIVE[name]
    ours, theirs = pair(return_sequences=True, **config)
    arguments = {"training": True, "mask": MASKS["right"]}
    with launched("lstm_", times=0), pytest.warns(twinfuse.FallbackWarning, match=reason):
        got = gradients(ours, data(B, T, N), **arguments)
    expected = gradients(theirs, data(B, T, N), **arguments)
    for a, b in zip(tf.nest.flatten(got), tf.nest.flatten(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours.supports_jit == (name in ("activation", "gates", "callable"))


def test_mixed_dtypes_and_integers(launched: Launched) -> None:
    ours, theirs = pair()
    integers = np.arange(B * T * N).reshape(B, T, N) % 3
    with launched("lstm_forward_", times=1):
        got = ours(integers)
    assert_close(got, theirs(integers))
    wide, wider = pair(autocast=False)
    x = tf.constant(data(B, T, N), tf.float64)
    with pytest.raises(twinfuse.FallbackError, match="its input is float64"):
        wide(x)
    with twinfuse.strict(False), pytest.warns(twinfuse.FallbackWarning, match="float64"):
        assert_close(wide(x), wider(x))


def test_errors_are_the_native_ones() -> None:
    for layer in pair():
        with pytest.raises(ValueError, match="incompatible with the layer"):
            layer(data(B, N))
        with pytest.raises(tf.errors.InvalidArgumentError):
            layer(data(B, T, N + 1))
        with pytest.raises(Exception, match=r"[Ss]lice|index|TensorArray"):
            layer(data(B, 0, N))
    with pytest.raises(ValueError, match="units"):
        tfk.layers.LSTM(0)
    ours, _ = pair(use_cudnn=True)
    warned = pytest.warns(twinfuse.FallbackWarning, match="use_cudnn")
    with twinfuse.strict(False), warned, pytest.raises(ValueError, match="cuDNN is not supp"):
        ours(data(B, T, N))


def test_config_is_the_native_one() -> None:
    ours, theirs = pair(kernel_regularizer="l2", name="same", dtype="mixed_float16", dropout=0.1)
    assert ours.get_config() == theirs.get_config()
    again = tfk.layers.LSTM.from_config(ours.get_config())
    assert type(again) is tfk.layers.LSTM and again.get_config() == ours.get_config()


@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_jit_compile(jit_compile: Any, launched: Launched) -> None:
    model = keras.Sequential([keras.Input((T, N)), tfk.layers.LSTM(H), keras.layers.Dense(1)])
    with pytest.MonkeyPatch.context() as patch:
        # As on a machine with a GPU, where "auto" means XLA if every layer supports it.
        devices = [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
        patch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.compile("sgd", "mse", jit_compile=jit_compile)
    assert any("jit_compile" in str(w.message) for w in caught) == (jit_compile is True)
    assert model.jit_compile is False
    with launched("lstm_forward_", times=1), launched("lstm_backward_", times=1):
        model.fit(data(B, T, N), data(B, 1), verbose=0)


@pytest.mark.allow_fallback
def test_xla_takes_the_native_loop(launched: Launched) -> None:
    ours, theirs = pair()
    function = tf.function(gradients, jit_compile=True)
    with launched("lstm_", times=0), pytest.warns(twinfuse.FallbackWarning, match="XLA"):
        got = function(ours, tf.constant(data(B, T, N)))
    assert_close(got, gradients(theirs, data(B, T, N)))


def test_explain() -> None:
    ours, _ = pair()
    (row,) = twinfuse.explain(ours)
    assert row.backend == "cpu" and row.kernel.startswith("lstm_forward_f32_")
    with twinfuse.use_backend("reference"):
        assert twinfuse.explain(ours)[0].backend == "reference"
    (row,) = tfk.explain(tfk.layers.LSTM(3, activation="gelu", dtype="float64"))
    assert row.backend == "native" and row.reason == "its activation is gelu"
    rnn = keras.layers.RNN(tfk.layers.LSTMCell(3, dtype="bfloat16"))
    (row,) = tfk.explain(rnn)
    assert row.op == "LSTMCell" and row.kernel.startswith("lstm_cell_forward_bf16_")
