"""Keras layers across processes: files, other Keras backends, imports, replicas."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
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

pytestmark = pytest.mark.slow


def run(code: str, **environment: str) -> str:
    """In a fresh process, with warnings as errors for what falls back."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "TWINFUSE_STRICT": "1", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, built native and fused later, in every file format."""
    folder = tmp_path_factory.mktemp("saved")
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((7,)),
            keras.layers.Dense(6, "relu", kernel_regularizer="l2"),
            keras.layers.Dense(3),
        ]
    )
    model.compile("adam", "mse")
    x = np.random.default_rng(0).standard_normal((8, 7)).astype(np.float32)
    model.fit(x, x[:, :3], verbose=0)
    np.savez(folder / "case.npz", x=x, y=model.predict(x, verbose=0))
    model.save(folder / "native.keras")
    tfk.fuse(model)
    model.save(folder / "fused.keras")
    model.save_weights(folder / "fused.weights.h5")
    model.export(folder / "fused", verbose=False)
    with tftf.use_backend("reference"):
        model.export(folder / "portable", verbose=False)
    return folder


CASE = """
    import sys, numpy as np
    case = np.load({folder!r} + "/case.npz")
    def check(y): np.testing.assert_allclose(np.asarray(y), case["y"], atol=1e-5)
"""


def test_keras_file(saved: Path) -> None:
    run(
        CASE.format(folder=str(saved))
        + """
    import keras, twinfuse, twinfuse.keras as tfk
    model = keras.saving.load_model({folder!r} + "/fused.keras")
    assert type(model.layers[0]) is tfk.layers.Dense and model.layers[0].kernel_regularizer
    assert not model.layers[0].supports_jit and model.optimizer.iterations == 1
    check(model.predict(case["x"], verbose=0))
    model.fit(case["x"], case["y"], verbose=0)
    assert sum(twinfuse.launches().values()) == 3, twinfuse.launches()
    model = tfk.fuse(keras.saving.load_model({folder!r} + "/native.keras"))
    check(model.predict(case["x"], verbose=0))
    tfk.unfuse(model).load_weights({folder!r} + "/fused.weights.h5")
    check(model.predict(case["x"], verbose=0))
    assert sum(twinfuse.launches().values()) == 4
    """.format(folder=str(saved))
    )


def test_keras_file_without_us_names_what_is_missing(saved: Path) -> None:
    path = str(saved / "fused.keras")
    run(
        f"""
    import keras
    try:
        keras.saving.load_model({path!r})
    except TypeError as error:
        assert "twinfuse" in str(error), error
    else:
        raise AssertionError("loaded")
    """
    )


@pytest.mark.parametrize(
    ("name", "first", "launches"),
    [("fused", "import twinfuse.tensorflow", 1), ("portable", "", 0)],
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
    x, y = (rng.standard_normal((32, n)).astype("f") for n in (7, 3))
    def losses(dense):
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((7,)), dense(6, "relu"), dense(3)])
            model.compile("sgd", "mse")
        return model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"]
    ours = losses(tfk.layers.Dense)
    # 8 steps, 2 replicas, forward and backward.
    assert sum(twinfuse.launches().values()) == 32, twinfuse.launches()
    np.testing.assert_allclose(ours, losses(keras.layers.Dense), rtol=1e-5)
    """
    )


def test_replicas_of_a_fused_model() -> None:
    run(
        """
    import numpy as np, tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import keras, twinfuse, twinfuse.keras as tfk
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 6, 6, 3)).astype("f"), rng.standard_normal((32, 2)).astype("f")
    def losses(change):
        keras.utils.set_random_seed(0)
        layers = keras.layers
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            parts = [
                *(layers.Conv2D(5, 3), layers.BatchNormalization(), layers.ReLU()),
                *(layers.Flatten(), layers.Dense(4), layers.Activation("relu"), layers.Dense(2)),
            ]
            model = keras.Sequential([keras.Input((6, 6, 3)), *parts])
            model.compile("sgd", "mse")
        change(model)
        fit = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        return [*fit.history["loss"], model.evaluate(x, y, batch_size=8, verbose=0)]
    native = losses(lambda model: model)
    ours = losses(lambda model: tfk.fuse(model, fold_batch_norm=True))
    # Of 2 replicas: 8 steps forward and backward of the Dense, 4 evaluations of both.
    assert sum(twinfuse.launches().values()) == 2 * (8 * 2 + 4 * 2), twinfuse.launches()
    np.testing.assert_allclose(ours, native, rtol=1e-5)
    """
    )


TORCH = """
    import sys, numpy as np, keras, twinfuse, twinfuse.keras as tfk
    assert "tensorflow" not in sys.modules
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((32, n)).astype("f") for n in (7, 3))
    def model(dense, **config):
        keras.utils.set_random_seed(0)
        m = keras.Sequential([keras.Input((7,)), dense(6, "relu", **config), dense(3)])
        m.compile("sgd", "mse")
        return m
    def losses(m):
        return m.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"]
"""


def test_torch_backend() -> None:
    require("torch")
    run(
        TORCH
        + """
    import torch
    for config in ({}, {"use_bias": False}, {"dtype": "mixed_bfloat16"}):
        before = sum(twinfuse.launches().values())
        ours = losses(model(tfk.layers.Dense, **config))
        assert sum(twinfuse.launches().values()) - before == 16, twinfuse.launches()
        rtol = 2e-2 if "dtype" in config else 1e-5
        np.testing.assert_allclose(ours, losses(model(keras.layers.Dense, **config)), rtol=rtol)
    native = model(keras.layers.Dense)
    expected = native(x).detach().numpy()
    tfk.fuse(native)
    rows = twinfuse.explain(native)
    assert rows[0].backend == "cpu" and rows[0].kernel.startswith("linear_relu_forward_f32_"), rows
    assert native.layers[0].supports_jit
    np.testing.assert_allclose(native(x).detach().numpy(), expected, atol=1e-5)
    """,
        KERAS_BACKEND="torch",
    )


def test_torch_backend_runs_layers_together() -> None:
    require("torch")
    run(
        """
    import numpy as np, keras, twinfuse, twinfuse.keras as tfk
    layers = keras.layers
    keras.utils.set_random_seed(0)
    parts = [
        *(layers.Conv2D(5, 3), layers.BatchNormalization(), layers.ReLU()),
        *(layers.Flatten(), layers.Dense(4), layers.Activation("relu"), layers.Dense(2)),
    ]
    model = keras.Sequential([keras.Input((6, 6, 3)), *parts])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 6, 6, 3)).astype("f"), rng.standard_normal((8, 2)).astype("f")
    model.fit(x, y, verbose=0)
    expected = model.predict(x, verbose=0)
    names = list(model.state_dict())
    tfk.fuse(model, fold_batch_norm=True)
    assert list(model.state_dict()) == names
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    counts = {name: n for name, n in twinfuse.launches().items() if n}
    assert sorted(counts.values()) == [1, 1], counts
    model.fit(x, y, verbose=0)
    assert sum(twinfuse.launches().values()) == 4, twinfuse.launches()
    assert not np.array_equal(model.predict(x, verbose=0), expected)
    """,
        KERAS_BACKEND="torch",
    )


def test_torch_backend_calls_hooks_of_layers() -> None:
    require("torch")
    run(
        """
    import itertools, numpy as np, torch, keras, twinfuse, twinfuse.keras as tfk
    layers = keras.layers
    def fuse(model):
        return tfk.fuse(model, fold_batch_norm=True)
    def seen(changes, hook, which):
        keras.utils.set_random_seed(0)
        parts = [layers.Dense(6), layers.BatchNormalization(), layers.ReLU(), layers.Dense(2)]
        model = changes[0](keras.Sequential([keras.Input((7,)), *parts]))
        values = []
        getattr(parts[which], f"register_{hook}_hook")(
            lambda module, *args: values.extend(args[-1] if type(args[-1]) is tuple else args[-1:])
        )
        changes[1](model)
        x = torch.tensor(np.random.default_rng(0).standard_normal((4, 7)).astype("f"))
        model(x.requires_grad_()).sum().backward()
        return [value.detach() for value in values]
    hooks = ("forward_pre", "forward", "full_backward_pre", "full_backward")
    for hook, which in itertools.product(hooks, range(3)):
        same = lambda model: model
        expected = seen((same, same), hook, which)
        assert expected
        for changes in ((fuse, same), (same, fuse)):
            for one, other in zip(seen(changes, hook, which), expected, strict=True):
                torch.testing.assert_close(one, other)
    assert not sum(twinfuse.launches().values())
    """,
        KERAS_BACKEND="torch",
    )


def test_torch_backend_imports_no_tensorflow() -> None:
    require("torch")
    run(
        """
    import sys, numpy as np, twinfuse, twinfuse.keras as tfk
    tfk.layers.Dense(5, "relu")(np.ones((2, 7), "f"))
    assert sum(twinfuse.launches().values()) == 1
    assert "torch" in sys.modules and "tensorflow" not in sys.modules
    """,
        KERAS_BACKEND="torch",
    )


def test_tensorflow_backend_imports_no_torch() -> None:
    run(
        """
    import sys, numpy as np, twinfuse, twinfuse.keras as tfk
    tfk.layers.Dense(5, "relu")(np.ones((2, 7), "f"))
    assert sum(twinfuse.launches().values()) == 1
    assert "tensorflow" in sys.modules and "torch" not in sys.modules
    """
    )


def test_other_backends_are_native_and_say_so() -> None:
    require("jax")  # which Keras imports on its NumPy backend too
    run(
        """
    import sys, warnings, numpy as np, keras, twinfuse, twinfuse.keras as tfk
    x = np.ones((2, 7), "f")
    layer = tfk.layers.Dense(5, "relu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layer(x)
    assert any("backend 'numpy'" in str(w.message) for w in caught), caught
    z = x @ layer.kernel.numpy() + layer.bias.numpy()
    np.testing.assert_allclose(y, np.maximum(z, 0), rtol=1e-6)
    (row,) = tfk.explain(layer)
    assert row.backend == "reference" and "numpy" in row.reason
    assert layer.supports_jit and not {"tensorflow", "torch"} & set(sys.modules)
    """,
        KERAS_BACKEND="numpy",
        TWINFUSE_STRICT="0",
    )


@pytest.mark.parametrize("order", ["torch tensorflow", "tensorflow torch"])
def test_import_orders(order: str) -> None:
    require("torch")
    first, second = order.split()
    run(
        f"""
    import sys, numpy as np, twinfuse
    assert not {{"torch", "tensorflow", "keras"}} & set(sys.modules)
    import twinfuse.{first}
    assert "{second}" not in sys.modules
    import twinfuse.{second}, twinfuse.keras as tfk
    import torch, tensorflow as tf
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype("f") for s in ((9, 300), (300, 17), (17,)))
    ours = twinfuse.tensorflow.linear_relu(x, w, b).numpy()
    theirs = twinfuse.torch.linear_relu(*map(torch.tensor, (x, w.T.copy(), b))).numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert sum(twinfuse.launches().values()) == 2
    maps = open("/proc/self/maps").read().splitlines()
    assert len({{line.split()[-1] for line in maps if "libtwinfuse" in line}}) == 1
    """
    )
