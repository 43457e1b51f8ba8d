"""Convolution layers across processes: files, other Keras backends, replicas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import require

tf = require("tensorflow")
keras = require("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("needs KERAS_BACKEND=tensorflow", allow_module_level=True)

import twinfuse.keras as tfk  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests.test_keras_processes import CASE, run  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, built native and fused later, in every file format."""
    folder = tmp_path_factory.mktemp("saved")
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, 2, "same", activation="relu", kernel_regularizer="l2"),
            layers.Reshape((16, 4)),
            layers.Conv1D(3, 2, padding="causal", dilation_rate=2, activation="relu"),
            layers.GlobalAveragePooling1D(),
        ]
    )
    model.compile("adam", "mse")
    x = np.random.default_rng(0).standard_normal((8, 8, 8, 2)).astype(np.float32)
    model.fit(x, x[:, 0, 0:3, 0], verbose=0)
    np.savez(folder / "case.npz", x=x, y=model.predict(x, verbose=0))
    model.save(folder / "native.keras")
    tfk.fuse(model)
    model.save(folder / "fused.keras")
    model.save_weights(folder / "fused.weights.h5")
    model.export(folder / "fused", verbose=False)
    with tftf.use_backend("reference"):
        model.export(folder / "portable", verbose=False)
    return folder


def test_keras_file(saved: Path) -> None:
    run(
        CASE.format(folder=str(saved))
        + """
    import keras, twinfuse, twinfuse.keras as tfk
    model = keras.saving.load_model({folder!r} + "/fused.keras")
    assert type(model.layers[0]) is tfk.layers.Conv2D and model.layers[0].kernel_regularizer
    assert type(model.layers[2]) is tfk.layers.Conv1D and model.layers[2].padding == "causal"
    assert not model.layers[0].supports_jit and model.optimizer.iterations == 1
    check(model.predict(case["x"], verbose=0))
    model.fit(case["x"], case["y"], verbose=0)
    assert sum(twinfuse.launches().values()) == 6, twinfuse.launches()
    model = tfk.fuse(keras.saving.load_model({folder!r} + "/native.keras"))
    check(model.predict(case["x"], verbose=0))
    tfk.unfuse(model).load_weights({folder!r} + "/fused.weights.h5")
    check(model.predict(case["x"], verbose=0))
    assert sum(twinfuse.launches().values()) == 8
    """.format(folder=str(saved))
    )


@pytest.mark.parametrize(
    ("name", "first", "launches"),
    [("fused", "import twinfuse.tensorflow", 2), ("portable", "", 0)],
)
def test_saved_model(saved: Path, name: str, first: str, launches: int) -> None:
    run(
        CASE.format(folder=str(saved))
        + f"""
    import tensorflow as tf
    {first}
    model = tf.saved_model.load({str(saved / name)!r})
    check(model.serve(tf.constant(case["x"])))
    if {launches}:
        assert sum(sys.modules["twinfuse"].launches().values()) == {launches}
    else:
        assert "twinfuse" not in sys.modules
    """
    )


def test_replicas_on_two_logical_devices() -> None:
    run(
        """
    import numpy as np, tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import keras, twinfuse, twinfuse.keras as tfk
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 6, 6, 2)).astype("f"), rng.standard_normal((32, 3)).astype("f")
    def losses(conv):
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([
                keras.Input((6, 6, 2)), conv(4, 3, activation="relu"),
                keras.layers.Flatten(), keras.layers.Dense(3),
            ])
            model.compile("sgd", "mse")
        return model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"]
    ours = losses(tfk.layers.Conv2D)
    # 8 steps, 2 replicas, forward and backward.
    assert sum(twinfuse.launches().values()) == 32, twinfuse.launches()
    np.testing.assert_allclose(ours, losses(keras.layers.Conv2D), rtol=1e-5)
    """
    )


def test_torch_backend() -> None:
    require("torch")
    run(
        """
    import sys, numpy as np, torch, keras, twinfuse, twinfuse.keras as tfk
    assert "tensorflow" not in sys.modules
    rng = np.random.default_rng(0)
    configs = [
        {}, {"use_bias": False}, {"padding": "same"}, {"padding": "same", "strides": 2},
        {"padding": "same", "kernel_size": 4}, {"padding": "same", "dilation_rate": 2},
        {"strides": 3}, {"groups": 2}, {"groups": 4, "padding": "same", "strides": 2},
        {"dtype": "mixed_bfloat16"}, {"dtype": "float64", "padding": "same", "kernel_size": 2},
    ]
    cases = [(rank, config) for rank in (1, 2) for config in configs]
    cases += [(1, {"padding": "causal"}), (1, {"padding": "causal", "dilation_rate": 3})]
    for rank, config in cases:
        for data_format in ("channels_last", "channels_first"):
            sizes, last = (9, 8)[:rank], data_format == "channels_last"
            x = rng.standard_normal((2, *sizes, 4) if last else (2, 4, *sizes))
            settings = {"kernel_size": 3, "activation": "relu", "bias_initializer": "random_normal"}
            settings |= {"data_format": data_format, **config}
            ours, theirs = (
                getattr(package.layers, f"Conv{rank}D")(8, **settings) for package in (tfk, keras)
            )
            results = []
            for layer in (ours, theirs):
                layer.build(x.shape)
                layer.set_weights(ours.get_weights())
                given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
                before = sum(twinfuse.launches().values())
                y = layer(given)
                sources = [given, *(v.value for v in layer.trainable_variables)]
                grads = torch.autograd.grad((y.double() ** 2).sum(), sources)
                assert sum(twinfuse.launches().values()) - before == (2 if layer is ours else 0)
                results.append([y, *grads])
            tolerance = 0.05 if "mixed" in config.get("dtype", "") else 1e-5
            for a, b in zip(*results):
                assert a.dtype == b.dtype and a.shape == b.shape
                a, b = a.detach().double(), b.detach().double()
                assert (a - b).abs().max() <= tolerance * b.abs().max(), (rank, settings)
    model = keras.Sequential([
        keras.Input((6, 6, 2)), keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.Flatten(), keras.layers.Dense(3),
    ])
    model.compile("sgd", "mse")
    x, y = rng.standard_normal((32, 6, 6, 2)).astype("f"), rng.standard_normal((32, 3)).astype("f")
    expected = model(x).detach().numpy()
    tfk.fuse(model)
    rows = twinfuse.explain(model)
    assert rows[0].backend == "cpu" and rows[0].kernel.startswith("conv_relu_forward_f32_"), rows
    assert model.layers[0].supports_jit
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-5)
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    model.layers[0].enable_lora(2)
    np.testing.assert_allclose(tfk.explain(model)[0].backend == "cpu", True)
    assert "tensorflow" not in sys.modules
    """,
        KERAS_BACKEND="torch",
    )


def test_other_backends_are_native_and_say_so() -> None:
    require("jax")  # which Keras imports on its NumPy backend too
    run(
        """
    import sys, warnings, numpy as np, keras, twinfuse, twinfuse.keras as tfk
    x = np.random.default_rng(0).standard_normal((2, 6, 7, 3)).astype("f")
    layers = [p.layers.Conv2D(4, 3, activation="relu") for p in (tfk, keras)]
    for layer in layers:
        layer.build(x.shape)
        layer.set_weights(layers[0].get_weights())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layers[0](x)
    assert any("backend 'numpy'" in str(w.message) for w in caught), caught
    np.testing.assert_array_equal(y, layers[1](x))
    (row,) = tfk.explain(layers[0])
    assert row.backend == "reference" and "numpy" in row.reason
    assert layers[0].supports_jit and not {"tensorflow", "torch"} & set(sys.modules)
    """,
        KERAS_BACKEND="numpy",
        TWINFUSE_STRICT="0",
    )
