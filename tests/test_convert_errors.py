"""`twinfuse.convert` refuses what it cannot exchange without loss, and leaves it as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.conftest import require

torch = require("torch")
keras = require("keras")

from torch import nn  # noqa: E402

import twinfuse.torch as tft  # noqa: E402
from twinfuse.convert import keras_to_torch, torch_to_keras  # noqa: E402

layers = keras.layers
pytestmark = pytest.mark.allow_fallback


def built(layer: Any, *shape: int | None) -> Any:
    layer.build((None, *shape))
    return layer


def dense(**config: Any) -> Any:
    return built(layers.Dense(4, **config), 3)


def lstm(**config: Any) -> Any:
    return built(layers.LSTM(7, **config), None, 5)


def bidirectional(backward_layer: Any = None, **config: Any) -> Any:
    layer = layers.Bidirectional(layers.LSTM(7, **config), backward_layer=backward_layer)
    return built(layer, None, 5)


def with_lora() -> Any:
    layer = dense()
    layer.enable_lora(2)
    return layer


def quantized() -> Any:
    layer = dense()
    layer.quantize("int8")
    return layer


class OwnWeight(layers.Dense):
    def build(self, shape: Any) -> None:
        super().build(shape)
        self.scale = self.add_weight(name="scale", shape=())


class Lora(nn.Linear):
    """As loralib has it."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.lora_A = nn.Parameter(torch.zeros(2, 3))


def subclass() -> Any:
    class Quantized(torch.Tensor):
        pass

    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantized))
    return module


Make = Callable[[], Any]
CASES: dict[str, tuple[Make, Make, type[Exception], str]] = {
    "no module": (object, dense, TypeError, "module: expected a torch module, got builtins.object"),
    "no layer": (
        lambda: nn.Linear(3, 4),
        object,
        TypeError,
        "layer: expected a Keras layer, got b",
    ),
    "no layers": (lambda: nn.LSTM(5, 7), lambda: [lstm(), 3], TypeError, "got builtins.int"),
    "other module": (
        lambda: nn.GRU(5, 7),
        lstm,
        TypeError,
        "module: expected a Linear, Conv1d, Conv2d, LSTMCell or LSTM .* got torch.*GRU",
    ),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2), dense, TypeError, "got .*ConvTranspose2d"),
    "quantized module": (
        lambda: torch.ao.nn.quantized.Linear(3, 4),
        dense,
        TypeError,
        "got torch.ao.nn.quantized.*Linear",
    ),
    "other layer": (
        lambda: nn.Linear(3, 4),
        lambda: built(layers.EinsumDense("ab,bc->ac", 4), 3),
        TypeError,
        "layer: expected a keras.layers.Dense for a Linear, got .*EinsumDense",
    ),
    "other rank": (
        lambda: nn.Conv1d(3, 4, 2),
        lambda: built(layers.Conv2D(4, 2), 8, 8, 3),
        TypeError,
        "expected a keras.layers.Conv1D for a Conv1d, got .*Conv2D",
    ),
    "depthwise layer": (
        lambda: nn.Conv2d(3, 3, 2, groups=3),
        lambda: built(layers.DepthwiseConv2D(2), 8, 8, 3),
        TypeError,
        "expected a keras.layers.Conv2D for a Conv2d, got .*DepthwiseConv2D",
    ),
    "list": (lambda: nn.Linear(3, 4), lambda: [dense()], TypeError, "got builtins.list"),
    "other recurrence": (
        lambda: nn.LSTM(5, 7),
        lambda: built(layers.GRU(7), None, 5),
        TypeError,
        "layer: expected an LSTM, LSTMCell, .* got .*GRU",
    ),
    "shape": (
        lambda: nn.Linear(4, 3),
        dense,
        ValueError,
        r"layer.kernel: expected shape \[4, 3\] for module.weight of \[3, 4\], got \[3, 4\]",
    ),
    "window": (
        lambda: nn.Conv2d(3, 4, (2, 3)),
        lambda: built(layers.Conv2D(4, (3, 2)), 8, 8, 3),
        ValueError,
        r"expected shape \[2, 3, 3, 4\] for module.weight of \[4, 3, 2, 3\], got \[3, 2, 3, 4\]",
    ),
    "dtype": (
        lambda: nn.Linear(3, 4, dtype=torch.bfloat16),
        dense,
        ValueError,
        "layer.kernel: expected dtype bfloat16 as of module.weight, got float32",
    ),
    "bias": (
        lambda: nn.Linear(3, 4, bias=False),
        dense,
        ValueError,
        "a bias: expected the same in both, got False in module and True in layer",
    ),
    "groups": (
        lambda: nn.Conv1d(4, 4, 2, groups=2),
        lambda: built(layers.Conv1D(4, 2), 8, 2),
        ValueError,
        "groups: expected the same in both, got 2 in module and 1 in layer",
    ),
    "stride": (
        lambda: nn.Conv2d(3, 4, 2, stride=(1, 2)),
        lambda: built(layers.Conv2D(4, 2), 8, 8, 3),
        ValueError,
        r"stride: expected the same in both, got \(1, 2\) in module and \(1, 1\) in layer",
    ),
    "dilation": (
        lambda: nn.Conv1d(3, 4, 2),
        lambda: built(layers.Conv1D(4, 2, dilation_rate=2), 8, 3),
        ValueError,
        "dilation: expected the same",
    ),
    "not built": (
        lambda: nn.Linear(3, 4),
        lambda: layers.Dense(4),
        ValueError,
        "layer: expected a built layer .* got Dense without weights",
    ),
    "lstm not built": (
        lambda: nn.LSTM(5, 7),
        lambda: layers.LSTM(7),
        ValueError,
        "layer: expected a built layer .* got LSTM without weights",
    ),
    "lazy": (lambda: nn.LazyLinear(4), dense, ValueError, "module.weight: expected numbers"),
    "meta": (
        lambda: nn.Linear(3, 4, device="meta"),
        dense,
        ValueError,
        "module.weight: expected numbers, got none",
    ),
    "LoRA layer": (
        lambda: nn.Linear(3, 4),
        with_lora,
        ValueError,
        "layer: expected a layer without LoRA, got one of rank 2",
    ),
    "quantized layer": (
        lambda: nn.Linear(3, 4),
        quantized,
        ValueError,
        "layer: expected a layer that is not quantized, got int8",
    ),
    "own weight": (
        lambda: nn.Linear(3, 4),
        lambda: built(OwnWeight(4), 3),
        ValueError,
        "expected the variables kernel, bias and no others, got kernel, bias, scale",
    ),
    "LoRA module": (
        Lora,
        dense,
        ValueError,
        "expected the parameters weight, bias and no others, got weight, bias, lora_A",
    ),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        dense,
        ValueError,
        "got bias, parametrizations.weight.original0",
    ),
    "tensor subclass": (subclass, dense, ValueError, "module.weight: expected a plain tensor"),
    "projection": (
        lambda: nn.LSTM(5, 7, proj_size=3),
        lstm,
        ValueError,
        "expected proj_size=0, since Keras' LSTM has no projection, got 3",
    ),
    "peephole": (
        lambda: tft.nn.LSTM(5, 7, peephole=True),
        lstm,
        ValueError,
        "bias_hh_l0 and no others, got .*peephole_l0",
    ),
    "zoneout": (
        lambda: tft.nn.LSTMCell(5, 7, zoneout_cell=0.5),
        lambda: built(layers.LSTMCell(7), 5),
        ValueError,
        "expected zoneout_cell=0, since Keras' LSTM has none, got 0.5",
    ),
    "activation": (
        lambda: tft.nn.LSTM(5, 7, activation="relu"),
        lstm,
        ValueError,
        " activation: expected the same in both, got relu in module and tanh in layer.cell",
    ),
    "recurrent activation": (
        lambda: nn.LSTM(5, 7),
        lambda: lstm(recurrent_activation="hard_sigmoid"),
        ValueError,
        "recurrent_activation: expected the same .*, got sigmoid .* hard_sigmoid in layer.cell",
    ),
    "lstm bias": (
        lambda: nn.LSTM(5, 7),
        lambda: lstm(use_bias=False),
        ValueError,
        "a bias: expected the same in both, got True in module and False in layer",
    ),
    "lstm shape": (
        lambda: nn.LSTM(7, 5),
        lstm,
        ValueError,
        r"layer.cell.kernel: expected shape \[7, 20\] for module.weight_ih_l0 of \[20, 7\], got",
    ),
    "one layer for two": (
        lambda: nn.LSTM(5, 7, 2),
        lstm,
        ValueError,
        r"layer: expected 2 Keras layers \(a list when more than one\), .* got 1",
    ),
    "directions": (
        lambda: nn.LSTM(5, 7, bidirectional=True),
        lstm,
        ValueError,
        "directions: expected the same in both, got 2 in module and 1 in layer",
    ),
    "one direction": (lambda: nn.LSTM(5, 7), bidirectional, ValueError, "got 1 in module and 2"),
    "backwards first": (
        lambda: nn.LSTM(5, 7, bidirectional=True),
        lambda: bidirectional(layers.LSTM(7), go_backwards=True),
        ValueError,
        "expected a Bidirectional whose forward_layer reads forwards",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_both_ways(name: str) -> None:
    make_module, make_layer, kind, text = CASES[name]
    for convert in (torch_to_keras, keras_to_torch):
        module, layer = make_module(), make_layer()
        given = (module, layer) if convert is torch_to_keras else (layer, module)
        with pytest.raises(kind, match=f"{convert.__name__}:.*{text}"):
            convert(*given)


def test_an_error_leaves_everything_as_it_was() -> None:
    """Also what lies before the misfit."""
    module = nn.LSTM(5, 7, 2)
    found = [lstm(return_sequences=True), built(layers.LSTM(7), None, 6)]
    weights = [np.array(w) for layer in found for w in layer.get_weights()]
    with pytest.raises(ValueError, match=r"layer\[1\].cell.kernel: expected shape \[7, 28\]"):
        torch_to_keras(module, found)
    for before, after in zip(weights, (w for layer in found for w in layer.get_weights())):
        np.testing.assert_array_equal(before, after)
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"layer\[1\].cell.kernel"):
        keras_to_torch(found, module)
    assert all(torch.equal(state[name], p) for name, p in module.state_dict().items())
