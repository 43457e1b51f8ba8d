"""`twinfuse.convert`: both sides compute the same, and nothing is lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES, ROUNDOFF
from tests.conftest import Launched, require
from tests.convert_cases import PAIRS, Arrays, Pair, numbers, run_keras, run_torch
from tests.rule import assert_same_bits, assert_within_twice

torch = require("torch")
tf = require("tensorflow")
keras = require("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("needs KERAS_BACKEND=tensorflow", allow_module_level=True)

from torch import nn  # noqa: E402

import twinfuse.keras as tfk  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse.convert import keras_to_torch, torch_to_keras  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
BY_ID = {pair.id: pair for pair in PAIRS}


@pytest.fixture(autouse=True)
def _seeds() -> None:
    keras.utils.set_random_seed(1)
    torch.manual_seed(1)


def reference(pair: Pair, module: Any) -> Arrays:
    """In float64, from the weights that `module` has."""
    wide = pair.module("float64", False)
    wide.load_state_dict(module.state_dict())
    return run_torch(pair, wide)


def assert_follows(ours: Arrays, native: Arrays, wanted: Arrays, dtype: str) -> None:
    assert ours.keys() == native.keys() == wanted.keys()
    for name, array in wanted.items():
        # The reference has this type.
        noise = 8 * ROUNDOFF[dtype] * np.abs(array).max() if dtype == "float64" else 0.0
        assert_within_twice(ours[name], native[name], array, name, dtype=dtype, noise=noise)


def bits(module: Any) -> dict[str, Any]:
    def bare(p: Any) -> Any:
        p = p.detach()
        return (p.view(torch.int16) if p.dtype == torch.bfloat16 else p).numpy().copy()

    return {name: bare(parameter) for name, parameter in module.named_parameters()}


def variables(layers: Any) -> list[Any]:
    layers = layers if isinstance(layers, list) else [layers]
    found = [np.array(v.value) for layer in layers for v in layer.weights]
    return [v.view(np.uint16) if v.dtype.name == "bfloat16" else v for v in found]


def assert_same_weights(got: Any, expected: Any) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b, "weight")


@every_dtype
@every_pair
def test_keras_computes_what_torch_does(pair: Pair, dtype: str, launched: Launched) -> None:
    module = pair.module(dtype, fused=False)
    layers = torch_to_keras(module, pair.layers(dtype, fused=True))
    forward, backward = f"{pair.op}_forward_", f"{pair.op}_backward_"
    with launched(forward, pair.kernels), launched(backward, pair.kernels):
        ours = run_keras(pair, layers)
    assert_follows(ours, run_torch(pair, module), reference(pair, module), dtype)


@every_dtype
@every_pair
def test_torch_computes_what_keras_does(pair: Pair, dtype: str, launched: Launched) -> None:
    layers = pair.layers(dtype, fused=False)
    module = keras_to_torch(layers, pair.module(dtype, fused=True))
    forward, backward = f"{pair.op}_forward_", f"{pair.op}_backward_"
    with launched(forward, pair.kernels), launched(backward, pair.kernels):
        ours = run_torch(pair, module)
    native = run_keras(pair, layers, jit=pair.op == "conv_relu")
    assert_follows(ours, native, reference(pair, module), dtype)


@every_dtype
@every_pair
def test_round_trips(pair: Pair, dtype: str) -> None:
    module, layers = pair.module(dtype, False), pair.layers(dtype, False)
    before = bits(module)
    assert torch_to_keras(module, layers) is layers
    assert_same_weights(list(bits(module).values()), list(before.values()))
    given = variables(layers)
    # The two biases of an LSTM sum to what came back, and stay.
    assert keras_to_torch(layers, module) is module
    assert_same_weights(list(bits(module).values()), list(before.values()))
    # A module that has other weights gets the sum.
    other = keras_to_torch(layers, pair.module(dtype, True))
    for name, parameter in bits(other).items():
        if name.startswith("bias_ih"):
            parts = [getattr(module, name.replace("ih", kind)) for kind in ("ih", "hh")]
            got = getattr(other, name)
            assert torch.equal(got, parts[0] + parts[1]) and got.abs().max() > 0
        elif name.startswith("bias_hh"):
            assert not parameter.any()
        else:
            assert_same_bits(parameter, before[name], name)
    back = torch_to_keras(other, pair.layers(dtype, True))
    assert_same_weights(variables(back), given)


@every_dtype
@pytest.mark.parametrize("name", ["linear", "lstm-deep"])
def test_both_frameworks_have_the_same_bits(name: str, dtype: str) -> None:
    pair = BY_ID[name]
    layers = pair.layers(dtype, True)
    module = keras_to_torch(layers, pair.module(dtype, True))
    theirs = run_keras(pair, layers)
    for result, array in run_torch(pair, module).items():
        assert_same_bits(theirs[result], array, result)


def test_what_holds_the_weights_stays() -> None:
    """Optimizers keep parameters and variables by identity; nothing else of a layer changes."""
    module, layer = nn.LSTM(5, 7), keras.layers.LSTM(7)
    layer.build((None, None, 5))
    layer.trainable = False
    module.weight_hh_l0.requires_grad_(False)
    parameters, held = list(module.parameters()), list(layer.weights)
    addresses = [p.data_ptr() for p in parameters]
    keras_to_torch(torch_to_keras(module, layer), nn.LSTM(5, 7))
    keras_to_torch(layer, module)
    assert [p.data_ptr() for p in module.parameters()] == addresses
    assert all(a is b for a, b in zip(layer.weights, held, strict=True))
    assert not layer.trainable and not module.weight_hh_l0.requires_grad
    assert module.weight_ih_l0.requires_grad and all(p.grad is None for p in parameters)


def test_weights_are_copies() -> None:
    module, layer = nn.Linear(3, 4), keras.layers.Dense(4)
    layer.build((None, 3))
    torch_to_keras(module, layer)
    given = variables(layer)
    with torch.no_grad():
        module.weight.zero_()
    assert_same_weights(variables(layer), given)


@pytest.mark.parametrize("kind", ["LSTMCell", "fused LSTMCell", "RNN", "LSTM"])
def test_cells(kind: str, launched: Launched) -> None:
    """A cell of torch is a cell of Keras, or a layer around one."""
    x, h, c = (numbers(3, n) for n in (5, 7, 7))
    layer: Any = {
        "LSTMCell": lambda: keras.layers.LSTMCell(7),
        "fused LSTMCell": lambda: tfk.layers.LSTMCell(7),
        "RNN": lambda: keras.layers.RNN(keras.layers.LSTMCell(7)),
        "LSTM": lambda: keras.layers.LSTM(7),
    }[kind]()
    alone = "LSTMCell" in kind
    layer.build((None, 5) if alone else (None, None, 5))
    module = tft.nn.LSTMCell(5, 7)
    torch_to_keras(module, layer)
    with launched("lstm_cell_forward_", times=1):
        expected = module(torch.from_numpy(x), (torch.from_numpy(h), torch.from_numpy(c)))[0]
    with launched("lstm_cell_forward_", times=int("fused" in kind)):
        got = layer(x, [h, c])[0] if alone else layer(x[:, None], initial_state=[h, c])
    np.testing.assert_allclose(np.asarray(got), expected.detach().numpy(), atol=1e-6)
    fresh = keras_to_torch(layer, nn.LSTMCell(5, 7))
    np.testing.assert_array_equal(fresh.weight_hh.detach(), module.weight_hh.detach())


def test_activations_of_lstms_are_compared() -> None:
    module = tft.nn.LSTM(5, 7, activation="relu", recurrent_activation="hard_sigmoid")
    layer = keras.layers.LSTM(7, activation="relu", recurrent_activation="hard_sigmoid")
    layer.build((None, None, 5))
    torch_to_keras(module, layer)
    found = layer(numbers(3, 6, 5))
    expected = module(torch.from_numpy(numbers(3, 6, 5)).transpose(0, 1))[0][-1]
    np.testing.assert_allclose(np.asarray(found), expected.detach().numpy(), atol=1e-6)


def test_models_trained_on_one_side_go_on_on_the_other() -> None:
    """Weights are those of fused, compiled and mixed-precision models as well."""
    model = keras.Sequential([keras.Input((4, 5)), keras.layers.LSTM(6, dtype="mixed_bfloat16")])
    tfk.fuse(model)
    model.compile("adam", "mse")
    model.fit(numbers(8, 4, 5), numbers(8, 6), verbose=0)
    module = tft.fuse(nn.Sequential(keras_to_torch(model.layers[0], nn.LSTM(5, 6))))
    np.testing.assert_array_equal(
        module[0].bias_ih_l0.detach(), model.layers[0].cell.bias.value.numpy()
    )
    assert module[0].weight_ih_l0.dtype == torch.float32


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TWINFUSE_STRICT": "1", **environment},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_no_framework_is_imported() -> None:
    run(
        """if True:
        import sys, twinfuse
        convert = twinfuse.convert
        frameworks = {"torch", "tensorflow", "keras", "ml_dtypes"}
        assert not frameworks & set(sys.modules)
        for arguments in ((1, 2), (1, [2])):
            try:
                convert.torch_to_keras(*arguments)
            except TypeError as error:
                assert "expected a torch module, got builtins.int" in str(error), error
            else:
                raise AssertionError("took what is no module")
        import torch
        try:
            convert.keras_to_torch(2, torch.nn.Linear(2, 3))
        except TypeError as error:
            assert "expected a Keras layer, got builtins.int" in str(error), error
        assert frameworks & set(sys.modules) == {"torch"}
        """
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"])
def test_other_backends_of_keras(backend: str) -> None:
    if backend != "torch":
        require("jax")  # which Keras imports on its NumPy backend too
    run(
        """if True:
        import sys, torch, keras, numpy as np
        from twinfuse.convert import keras_to_torch, torch_to_keras
        x = torch.randn(3, 6, 5)
        for dtype in ("float32", "bfloat16"):
            # No Bidirectional: Keras itself imports TensorFlow to make one.
            layer = keras.layers.LSTM(
                7, return_sequences=True, recurrent_initializer="glorot_uniform", dtype=dtype)
            layer.build((None, None, 5))
            module, other = (
                torch.nn.LSTM(5, 7, batch_first=True, dtype=getattr(torch, dtype))
                for _ in range(2))
            torch_to_keras(module, layer)
            if dtype == "float32":
                found = keras.ops.convert_to_numpy(layer(x.numpy()))
                np.testing.assert_allclose(found, module(x)[0].detach().numpy(), atol=1e-6)
            kept = [p.detach().clone() for p in module.parameters()]
            keras_to_torch(layer, module)
            assert all(map(torch.equal, kept, module.parameters()))
            keras_to_torch(layer, other)
            assert torch.equal(other.weight_hh_l0, module.weight_hh_l0)
            with torch.no_grad():
                module.weight_ih_l0.zero_()
            assert np.abs(keras.ops.convert_to_numpy(layer.weights[0]).astype("f4")).max() > 0
        dense = keras.layers.Dense(3)
        dense.build((None, 2))
        linear = torch.nn.Linear(2, 3)
        keras_to_torch(torch_to_keras(linear, dense), linear)
        try:
            torch_to_keras(dense, linear)
        except TypeError as error:
            assert "layer: expected a Keras layer" in str(error), error
        else:
            raise AssertionError("took them the wrong way round")
        assert "tensorflow" not in sys.modules
        """,
        KERAS_BACKEND=backend,
        TWINFUSE_STRICT="0",
    )
