"""`twinfuse.keras.fuse` on layers with a ReLU layer of its own behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import twinfuse
from tests.conftest import Launched
from tests.keras_on_tensorflow import data, keras, layers, tf, tfk


def sequential() -> Any:
    return keras.Sequential(
        [
            keras.Input((7,)),
            layers.Dense(6),
            layers.ReLU(),
            layers.Dense(5, "relu"),
            layers.Dense(4),
            layers.Activation("relu"),
            layers.Dense(3),
        ]
    )


def built_by_a_call() -> Any:
    model = keras.Sequential([layers.Dense(6), layers.ReLU(), layers.Dense(3)])
    model(data(1, 7))
    return model


def convolutional() -> Any:
    inputs = keras.Input((7,))
    steps = layers.ReLU()(layers.Conv1D(4, 2, padding="causal")(layers.Reshape((7, 1))(inputs)))
    image = layers.Conv2D(3, 2, 2, padding="same", use_bias=False)(layers.Reshape((7, 2, 2))(steps))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.ReLU()(image))))


def operations() -> Any:
    """ReLUs that are no layers."""
    inputs = keras.Input((7,))
    hidden = keras.ops.relu(layers.Dense(7)(inputs))
    return keras.Model(inputs, layers.Dense(3)(keras.activations.relu(layers.Dense(7)(hidden))))


def residual() -> Any:
    """Two pairs, and a Dense whose value before the ReLU is added as well."""
    inputs = keras.Input((7,))
    relu = layers.ReLU()
    hidden = relu(layers.Dense(7)(relu(layers.Dense(7)(inputs))))
    value = layers.Dense(7)(hidden)
    return keras.Model(inputs, layers.Dense(3)(relu(value) + value))


def shared() -> Any:
    """Three calls of one Dense, two of them with a ReLU behind."""
    inputs = keras.Input((7,))
    dense = layers.Dense(7)
    hidden = layers.ReLU()(dense(layers.ReLU()(dense(inputs))))
    return keras.Model(inputs, layers.Dense(3)(layers.Activation("tanh")(dense(hidden))))


def nested() -> Any:
    inner = keras.Sequential([keras.Input((7,)), layers.Dense(7), layers.ReLU()])
    other = keras.Input((7,))
    outer = keras.Model(other, layers.ReLU()(layers.Dense(7)(other)))
    inputs = keras.Input((7,))
    return keras.Model(inputs, layers.Dense(3)(outer(inner(inputs))))


class Subclassed(keras.Model):  # type: ignore[misc]
    """A graph inside, and a pair that only this code puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.body = keras.Sequential([keras.Input((7,)), layers.Dense(7), layers.ReLU()])
        self.relu = layers.ReLU()
        self.hidden, self.head = layers.Dense(7), layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.head(self.relu(self.hidden(self.body(x))))


def subclassed() -> Any:
    model = Subclassed()
    model(data(1, 7))
    return model


# With how many fused calls each has.
MODELS = {
    sequential: 3,
    built_by_a_call: 1,
    convolutional: 2,
    operations: 2,
    residual: 2,
    shared: 2,
    nested: 2,
    subclassed: 1,
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
    graphs = [each for each in model._flatten_layers() if isinstance(each, keras.Function)]
    return {
        "ids": [id(v) for v in model.variables],
        "paths": [v.path for v in model.variables],
        "values": [v.numpy().tolist() for v in model.variables],
        "optimizer": [v.numpy().tolist() for v in model.optimizer.variables],
        "layers": [(id(each), each.name) for each in model._flatten_layers()],
        "configs": [graph.get_config() for graph in graphs],
        "compiled": model.get_compile_config(),
    }


def fused_rows(model: Any) -> list[str]:
    return [row.where for row in tfk.explain(model) if row.backend == "cpu"]


@pytest.mark.parametrize(("build", "calls"), MODELS.items())
def test_fuse_in_the_middle_of_training(build: Any, calls: int, launched: Launched) -> None:
    kernels = "conv_relu" if build is convolutional else "linear_relu"
    expected = fit(made(build), epochs=5)

    model = made(build)
    losses = fit(model, epochs=2)
    before = state(model)
    assert tfk.fuse(model) is model
    assert state(model) == before
    with (
        launched(f"{kernels}_forward_", times=8 * calls),
        launched(f"{kernels}_backward_", times=8 * calls),
    ):
        losses += fit(model, epochs=2)
    with launched(f"{kernels}_forward_", times=calls):
        fused = model.predict(data(4, 7), verbose=0)

    assert tfk.unfuse(model) is model
    assert all(each.supports_jit for each in model._flatten_layers())
    with launched("linear_relu_", times=0), launched("conv_relu_", times=0):
        np.testing.assert_allclose(model.predict(data(4, 7), verbose=0), fused, atol=1e-5)
        losses += fit(model, epochs=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_fusing_again_traces_nothing_again() -> None:
    model = tfk.fuse(made(sequential))
    fit(model)
    traced = model.train_function
    tfk.fuse(model)
    assert model.train_function is traced
    tfk.unfuse(model)
    assert model.train_function is None


def test_the_value_before_the_relu_stays_for_all_others(launched: Launched) -> None:
    model = made(sequential)
    first, relu = model.layers[:2]
    before = keras.Model(model.inputs, first.output)
    x = data(4, 7)
    expected = before.predict(x, verbose=0)
    assert expected.min() < 0
    tfk.fuse(model)
    after = keras.Model(model.inputs, [first.output, relu.output])
    with launched("linear_relu_", times=0):
        np.testing.assert_array_equal(before.predict(x, verbose=0), expected)
        np.testing.assert_array_equal(first(x), expected)
        value, positive = after.predict(x, verbose=0)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(positive, np.maximum(expected, 0))
    tfk.fuse(after)
    reason = tfk.explain(after)[0].reason
    assert reason == "the value before the ReLU is an output of the model"


def test_a_fused_model_inside_a_new_one(launched: Launched) -> None:
    model = tfk.fuse(made(sequential))
    inputs = keras.Input((5, 7))
    steps = keras.Model(inputs, layers.TimeDistributed(model)(inputs))
    assert steps.output_shape == (None, 5, 3)
    unknown = model(keras.KerasTensor((None, 7)))
    assert unknown.shape == (None, 3)
    x = data(2, 5, 7)
    with launched("linear_relu_forward_"):
        ours = steps.predict(x, verbose=0)
    np.testing.assert_allclose(ours.reshape(10, 3), model(x.reshape(10, 7)), atol=1e-6)


def test_explain_says_what_runs_together() -> None:
    model = made(sequential)
    rows = tfk.explain(model)
    assert [row.backend for row in rows] == ["native"] * 6
    assert "not fused: call twinfuse.keras.fuse(model)" in rows[0].reason
    rows = twinfuse.explain(tfk.fuse(model))
    dense, relu, _, last, activation, head = rows
    assert dense.backend == "cpu" and dense.kernel.startswith("linear_relu_forward_f32_")
    assert dense.reason == f"together with {model.layers[1].name}"
    assert (relu.backend, relu.reason) == ("fused", f"together with {model.layers[0].name}")
    assert last.backend == "cpu" and activation.backend == "fused"
    assert head.reason == "its activation is linear"
    rows = tfk.explain(tfk.fuse(made(shared)))
    assert rows[0].reason.endswith(", in 2 of 3 calls") and rows[0].backend == "cpu"


def test_explain_says_why_not() -> None:
    def reason(*others: Any, **options: Any) -> str:
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((7,)), layers.Dense(5, **options), *others])
        (row, *_) = tfk.explain(tfk.fuse(model))
        assert row.backend == "native"
        return row.reason

    relu = layers.ReLU
    for other in (relu(6.0), relu(negative_slope=0.1), relu(threshold=0.5)):
        text = f"{other.name} has a max_value, a negative_slope or a threshold"
        assert reason(other) == text
    assert reason(layers.ELU()) == "its activation is linear"
    assert reason(relu(dtype="float64")) == "re_lu computes in float64, it in float32"
    assert reason(relu(), activity_regularizer="l2") == "dense has an activity_regularizer"
    between = layers.BatchNormalization()
    assert "call twinfuse.keras.fuse(model, fold_batch_norm=True)" in reason(between, relu())
    assert reason(layers.Dropout(0.5), relu()) == "its activation is linear"
    patched = relu()
    patched.call = lambda inputs: -inputs
    assert reason(patched) == "the call method of re_lu has been replaced"
    residual_row = [row for row in tfk.explain(made(residual)) if "used as well" in row.reason]
    assert len(residual_row) == 1


def test_a_model_with_a_call_of_its_own_runs_no_graph(launched: Launched) -> None:
    class Negative(keras.Sequential):  # type: ignore[misc]
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return -self.layers[0](inputs)

    keras.utils.clear_session()
    model = Negative([keras.Input((7,)), layers.Dense(5), layers.ReLU()])
    x = data(4, 7)
    expected = model.predict(x, verbose=0)
    tfk.fuse(model)
    with launched("linear_relu_", times=0):
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    assert fused_rows(model) == []


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("mixed_bfloat16", 0.03), ("mixed_float16", 4e-3), ("float64", 1e-12)]
)
def test_dtype_policies(policy: str, tolerance: float, launched: Launched) -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    parts = [layers.Dense(6, dtype=policy), layers.ReLU(dtype=policy)]
    model = keras.Sequential([keras.Input((7,)), *parts])
    expected = model(data(4, 7))
    tfk.fuse(model)
    with launched("linear_relu_forward_", times=1):
        ours = model(data(4, 7))
    assert ours.dtype == expected.dtype == parts[0].compute_dtype
    np.testing.assert_allclose(np.float64(ours), np.float64(expected), atol=tolerance)


def test_masks_pass_through(launched: Launched) -> None:
    keras.utils.clear_session()
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Embedding(9, 4, mask_zero=True),
            layers.Dense(6),
            layers.ReLU(),
            layers.LSTM(3, use_cudnn=False),
        ]
    )
    tokens = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]])
    expected = model(tokens)
    tfk.fuse(model)
    with launched("linear_relu_forward_", times=1), launched("lstm_forward", times=1):
        np.testing.assert_allclose(model(tokens), expected, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_jit_compiled_models(jit_compile: bool, launched: Launched) -> None:
    model = made(built_by_a_call)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    tfk.fuse(model)
    with launched("linear_relu_forward_", times=8):
        fit(model)
    model.compile("sgd", "mse")
    assert model.jit_compile is False
    with launched("linear_relu_forward_", times=8):
        fit(model)
    tfk.unfuse(model)
    fit(model, epochs=1)


@pytest.mark.parametrize("build", [sequential, residual, nested])
def test_saved_models(build: Any, tmp_path: Path, launched: Launched) -> None:
    model = tfk.fuse(made(build))
    fit(model)
    x = data(4, 7)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.name for v in loaded.variables] == [v.name for v in model.variables]
    assert all(map(np.array_equal, loaded.optimizer.variables, model.optimizer.variables))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-6)
    with launched("linear_relu_forward_", times=MODELS[build]):
        again = tfk.fuse(loaded).predict(x, verbose=0)
    np.testing.assert_array_equal(again, expected)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    with launched("linear_relu_forward_", times=MODELS[build]):
        np.testing.assert_array_equal(exported.serve(tf.constant(x)), expected)
    copy = keras.models.clone_model(model)
    types = [[type(layer) for layer in each._flatten_layers()] for each in (copy, model)]
    assert types[0] == types[1]
    copy.set_weights(model.get_weights())
    np.testing.assert_allclose(copy.predict(x, verbose=0), expected, atol=1e-6)


def test_summary_and_config_stay() -> None:
    def shown(model: Any) -> tuple[list[str], str]:
        lines: list[str] = []
        model.summary(print_fn=lines.append)
        return lines, model.to_json()

    model = made(residual)
    before = shown(model)
    assert shown(tfk.fuse(model)) == before
