"""The LSTM layers across processes: other Keras backends, replicas, a file without us."""

from __future__ import annotations

import pytest

from tests.conftest import require
from tests.test_keras_processes import run

require("keras")

pytestmark = pytest.mark.slow

TORCH = """
    import sys, numpy as np, keras, twinfuse, twinfuse.keras as tfk
    assert "tensorflow" not in sys.modules
    rng = np.random.default_rng(0)
    B, T, N, H = 4, 6, 5, 7
    def data(*shape): return rng.standard_normal(shape).astype("f")
    def pair(name="LSTM", shape=(B, T, N), **config):
        layers = []
        for module in (tfk.layers, keras.layers):
            keras.utils.set_random_seed(1)
            config = {"recurrent_initializer": "glorot_uniform", **config}
            layers.append(getattr(module, name)(H, bias_initializer="random_normal", **config))
            layers[-1].build(shape)
        return layers
    def launches(kind):
        found = twinfuse.launches()
        return sum(n for name, n in found.items() if name.startswith(kind))
    def gradients(layer, x, **arguments):
        import torch
        x = torch.tensor(x, requires_grad=True)
        found = keras.tree.flatten(layer(x, **arguments))
        sum((t.double() ** 2).sum() for t in found).backward()
        return [*found, x.grad, *(w.value.grad for w in layer.trainable_weights)]
    def check(ours, theirs, atol=1e-5):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert a.dtype == b.dtype
            a, b = (t.detach().double().numpy() for t in (a, b))
            np.testing.assert_allclose(a, b, rtol=atol, atol=atol * max(abs(b).max(), 1))
    mask = rng.random((B, T)) < 0.5
    mask[2] = False
"""


def test_torch_backend_layers() -> None:
    require("torch")
    run(
        TORCH
        + """
    import itertools
    options = ("return_sequences", "go_backwards", "zero_output_for_mask", "use_bias")
    for values in itertools.product((False, True), repeat=4):
        ours, theirs = pair(return_state=True, **dict(zip(options, values)))
        for arguments in ({}, {"mask": mask}, {"initial_state": [data(B, H), data(B, H)]}):
            x, before = data(B, T, N), launches("lstm_")
            got = gradients(ours, x, **arguments)
            assert launches("lstm_") == before + 2
            check(got, gradients(theirs, x, **arguments))
            for layer in (ours, theirs):
                for weight in layer.trainable_weights: weight.value.grad = None
    """,
        KERAS_BACKEND="torch",
    )


def test_torch_backend_cells_dtypes_and_models() -> None:
    require("torch")
    run(
        TORCH
        + """
    for dtype in ("float64", "bfloat16", "mixed_bfloat16", "mixed_float16"):
        ours, theirs = pair(dtype=dtype, return_sequences=True, activation="relu",
                            recurrent_activation="hard_sigmoid")
        x = data(B, T, N)
        # Keras multiplies float64 in float32 there.
        check([ours(x, mask=mask)], [theirs(x, mask=mask)], 1e-5 if dtype == "float64" else 0.05)
    ours, theirs = pair("LSTMCell", (B, N))
    x, states, before = data(B, N), [data(B, H), data(B, H)], launches("lstm_cell_")
    check(gradients(ours, x, states=states), gradients(theirs, x, states=states))
    assert launches("lstm_cell_") == before + 2
    ours, theirs = (keras.layers.RNN(cell) for cell in pair("LSTMCell", (B, N)))
    x = data(B, T, N)
    check(gradients(ours, x), gradients(theirs, x))
    ours, theirs = pair(dropout=0.5, seed=1, stateful=True)
    for _ in range(2):
        # Without a mask Keras loses the state that its own gradient needs.
        arguments = {"training": True, "mask": mask}
        check(gradients(ours, x, **arguments), gradients(theirs, x, **arguments))
        for layer in (ours, theirs):
            for weight in layer.trainable_weights: weight.value.grad = None
    (row,) = twinfuse.explain(ours)
    assert row.backend == "cpu" and row.kernel.startswith("lstm_forward_f32_"), row
    assert ours.supports_jit

    def losses(lstm):
        keras.utils.set_random_seed(0)
        x, y = np.random.default_rng(1).standard_normal((2, 32, 6, 5)).astype("f")
        model = keras.Sequential(
            [keras.Input((6, 5)), keras.layers.Bidirectional(lstm(4, return_sequences=True)),
             lstm(3), keras.layers.Dense(5)])
        model.compile("sgd", "mse")
        history = model.fit(x, y[:, 0], batch_size=8, epochs=2, verbose=0, shuffle=False)
        return history.history["loss"]
    before = launches("lstm_")
    ours = losses(tfk.layers.LSTM)
    assert launches("lstm_") == before + 8 * 6, launches("lstm_") - before
    np.testing.assert_allclose(ours, losses(keras.layers.LSTM), rtol=1e-5)
    """,
        KERAS_BACKEND="torch",
    )


def test_torch_backend_dropout() -> None:
    require("torch")
    run(
        TORCH
        + """
    def compare(ours, theirs, x, times, **arguments):
        before = launches("lstm_")
        got = gradients(ours, x, training=True, **arguments)
        assert launches("lstm_") == before + times, launches("lstm_") - before
        check(got, gradients(theirs, x, training=True, **arguments))
        for layer in (ours, theirs):
            for weight in layer.trainable_weights: weight.value.grad = None
        return got[0]
    for config in (
        {"recurrent_dropout": 0.5},
        {"dropout": 0.25, "recurrent_dropout": 0.5, "go_backwards": True},
        {"dropout": 0.5, "implementation": 1, "use_cudnn": False},
        {"recurrent_dropout": 0.5, "stateful": True, "return_sequences": True},
    ):
        ours, theirs = pair(seed=1, **config)
        x = data(B, T, N)
        first, second = (compare(ours, theirs, x, 2, mask=mask) for _ in range(2))
        assert not np.array_equal(first.detach(), second.detach())
    cells = pair("LSTMCell", (B, N), seed=1, dropout=0.25, recurrent_dropout=0.5)
    ours, theirs = (keras.layers.RNN(cell) for cell in cells)
    # Keras' loop calls the cell once more, to see what it returns.
    compare(ours, theirs, data(B, T, N), 2 * T + 1)

    def losses(lstm):
        keras.utils.set_random_seed(0)
        x, y = np.random.default_rng(1).standard_normal((2, 32, 6, 5)).astype("f")
        model = keras.Sequential(
            [keras.Input((6, 5)), lstm(5, seed=1, dropout=0.25, recurrent_dropout=0.5)])
        model.compile("sgd", "mse")
        history = model.fit(x, y[:, 0], batch_size=8, epochs=2, verbose=0, shuffle=False)
        return history.history["loss"]
    np.testing.assert_allclose(*map(losses, (tfk.layers.LSTM, keras.layers.LSTM)), rtol=1e-5)
    """,
        KERAS_BACKEND="torch",
    )


def test_other_backends_are_native_and_say_so() -> None:
    require("jax")  # which Keras imports on its NumPy backend too
    run(
        """
    import sys, warnings, numpy as np, keras, twinfuse, twinfuse.keras as tfk
    x = np.ones((2, 3, 7), "f")
    layers = [cls(5) for cls in (tfk.layers.LSTM, keras.layers.LSTM)]
    for layer in layers: layer.build(x.shape)
    layers[0].set_weights(layers[1].get_weights())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layers[0](x)
    assert any("backend 'numpy'" in str(w.message) for w in caught), caught
    np.testing.assert_allclose(y, layers[1](x), rtol=1e-6)
    (row,) = tfk.explain(layers[0])
    assert row.backend == "native" and "numpy" in row.reason, row
    assert layers[0].supports_jit and not {"tensorflow", "torch"} & set(sys.modules)
    """,
        KERAS_BACKEND="numpy",
        TWINFUSE_STRICT="0",
    )


def test_replicas_on_two_logical_devices() -> None:
    require("tensorflow")
    run(
        """
    import numpy as np, tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import keras, twinfuse, twinfuse.keras as tfk
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 6, 5)).astype("f"), rng.standard_normal((32, 3)).astype("f")
    def losses(lstm):
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((6, 5)), lstm(4), keras.layers.Dense(3)])
            model.compile("sgd", "mse")
        return model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"]
    ours = losses(tfk.layers.LSTM)
    # 8 steps, 2 replicas, forward and backward.
    assert sum(twinfuse.launches().values()) == 32, twinfuse.launches()
    np.testing.assert_allclose(ours, losses(keras.layers.LSTM), rtol=1e-5)
    """,
        KERAS_BACKEND="tensorflow",
    )
