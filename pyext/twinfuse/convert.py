"""Exchange of weights between torch modules and Keras layers, without loss.

| torch.nn, twinfuse.torch.nn | keras.layers, twinfuse.keras.layers |
| --- | --- |
| Linear, LinearReLU | Dense |
| Conv1d, ConvReLU1d | Conv1D |
| Conv2d, ConvReLU2d | Conv2D |
| LSTMCell, LSTM | LSTMCell, LSTM, RNN(LSTMCell), Bidirectional of them |

For an LSTM of several layers `layer` is a list of Keras layers, one for each, the first one first.

Weights alone are exchanged, in the dtype that they have: what surrounds them (padding, a ReLU,
dropout, the order of the axes of an image) is the caller's. What changes the meaning of the weights
themselves, or what cannot be made up for outside, has to be the same in both.

Keras has one bias where torch's LSTM has two. Keras gets their sum. On the way back two biases that
sum to Keras' stay as they are, so that a round trip changes nothing; otherwise `bias_ih` becomes
the sum and `bias_hh` zero.

No framework is imported here. An object of one can only come from a process that has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import keras
    import torch
    from torch import Tensor

    Layers: TypeAlias = keras.layers.Layer | Sequence[keras.layers.Layer]

__all__ = ["keras_to_torch", "torch_to_keras"]

Module = TypeVar("Module", bound="torch.nn.Module")
Layer = TypeVar("Layer", bound="Layers")

_PLAIN = {"Linear": "Dense", "Conv1d": "Conv1D", "Conv2d": "Conv2D"}


def torch_to_keras(module: torch.nn.Module, layer: Layer) -> Layer:
    """Give the weights of `module` to `layer`, and return `layer`.

    Args:
        module: a Linear, Conv1d, Conv2d, LSTMCell or LSTM, native or fused; it is not changed.
        layer: its counterpart (see the module's documentation), built; a list for several layers
            of an LSTM. Its variables are assigned to, once all of them are known to fit.

    Raises:
        TypeError: `module` or `layer` is no such layer, or one is not the other's counterpart.
        ValueError: shapes, dtypes, biases, groups, strides, dilations, activations of an LSTM,
            numbers of layers or of directions differ; `layer` is not built; either has more
            weights than the other has place for (LoRA, quantization, parametrizations,
            projections, peepholes, norms), or changes them (zoneout).
    """
    pairs = _pairs("torch_to_keras", module, layer)
    # All of them first: an error leaves the layer as it was.
    arrays = [pair.from_torch() for pair in pairs]
    for pair, array in zip(pairs, arrays):
        pair.variable.assign(array)
    return layer


def keras_to_torch(layer: Layers, module: Module) -> Module:
    """Give the weights of `layer` to `module`, and return `module`.

    Arguments and errors are those of `torch_to_keras`, with `layer` as it is and the parameters of
    `module` written in place, so that optimizers keep them.
    """
    pairs = _pairs("keras_to_torch", module, layer)
    arrays = [pair.from_keras() for pair in pairs]
    for pair, array in zip(pairs, arrays):
        pair.write(array)
    return module


@dataclass(frozen=True)
class _Pair:
    """Parameters of torch, and the variable of Keras that holds their sum with its axes moved.

    torch's weights are [outputs, inputs, *window], Keras' [*window, inputs, outputs].
    """

    parameters: tuple[Tensor, ...]
    variable: Any

    def total(self) -> Tensor:
        """In the dtype of the parameters, whose rounding Keras' bias then has."""
        first, *rest = (parameter.detach() for parameter in self.parameters)
        return first + rest[0] if rest else first

    def from_torch(self) -> NDArray[Any]:
        total = self.total().cpu()
        if str(total.dtype) == "torch.bfloat16":
            total = total.float()  # NumPy has no bfloat16; every one is a float32
        axes = (*range(2, total.ndim), 1, 0) if total.ndim > 1 else (0,)
        # A copy, which some backends keep as it is.
        return np.array(total.numpy().transpose(axes), order="C")

    def from_keras(self) -> NDArray[Any]:
        array = np.asarray(sys.modules["keras"].ops.convert_to_numpy(self.variable))
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        last = array.ndim - 1
        axes = (last, last - 1, *range(last - 1)) if last else (0,)
        return np.array(array.transpose(axes), order="C")

    def write(self, array: NDArray[Any]) -> None:
        torch = sys.modules["torch"]
        first, *rest = self.parameters
        with torch.no_grad():
            value = torch.from_numpy(array).to(first.device, first.dtype)
            if rest and torch.equal(self.total(), value):
                return
            first.copy_(value)
            for other in rest:
                other.zero_()


def _pairs(op: str, module: Any, layer: Any) -> list[_Pair]:
    torch: Any = sys.modules.get("torch")
    keras: Any = sys.modules.get("keras")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise TypeError(f"{op}: module: expected a torch module, got {_class(module)}")
    layers = layer if isinstance(layer, (list, tuple)) else [layer]
    for each in layers:
        if keras is None or not isinstance(each, keras.layers.Layer):
            raise TypeError(f"{op}: layer: expected a Keras layer, got {_class(each)}")
    if _is_lstm(module):
        return list(_lstm_pairs(op, module, layer))
    for name, counterpart in _PLAIN.items():
        if not isinstance(module, getattr(torch.nn, name)):
            continue
        if not isinstance(layer, getattr(keras.layers, counterpart)):
            wanted = f"keras.layers.{counterpart} for a {type(module).__name__}"
            raise TypeError(f"{op}: layer: expected a {wanted}, got {_class(layer)}")
        return list(_plain_pairs(op, module, layer))
    known = ", ".join(_PLAIN)
    raise TypeError(
        f"{op}: module: expected a {known}, LSTMCell or LSTM of torch.nn or twinfuse.torch.nn, "
        f"got {_class(module)}"
    )


def _is_lstm(module: Any) -> bool:
    # twinfuse.torch.nn.LSTM is no nn.LSTM; they share this base.
    nn = sys.modules["torch"].nn
    recurrent = isinstance(module, nn.RNNBase) and module.mode == "LSTM"
    return recurrent or isinstance(module, nn.LSTMCell)


def _plain_pairs(op: str, module: Any, layer: Any) -> Iterator[_Pair]:
    """Of a dense layer or a convolution."""
    _check_same(op, "a bias", module.bias is not None, layer.use_bias)
    for ours, theirs in (
        ("groups", "groups"),
        ("stride", "strides"),
        ("dilation", "dilation_rate"),
    ):
        if hasattr(module, ours):
            _check_same(op, ours, getattr(module, ours), getattr(layer, theirs))
    names = ["weight", "bias"] if layer.use_bias else ["weight"]
    parameters = _parameters(op, module, names)
    variables = _variables(op, "layer", layer, ["kernel", "bias"][: len(names)])
    for name, parameter, variable in zip(names, parameters, variables):
        yield _fitting(op, "layer", _Pair((parameter,), variable), name)


def _lstm_pairs(op: str, module: Any, layer: Any) -> Iterator[_Pair]:
    if getattr(module, "proj_size", 0):
        raise ValueError(
            f"{op}: module: expected proj_size=0, since Keras' LSTM has no projection, got "
            f"{module.proj_size}"
        )
    for name in ("zoneout_hidden", "zoneout_cell"):
        if getattr(module, name, 0):
            raise ValueError(
                f"{op}: module: expected {name}=0, since Keras' LSTM has none, got "
                f"{getattr(module, name)}"
            )
    listed = isinstance(layer, (list, tuple))
    layers = list(layer) if listed else [layer]
    suffixes = [[""]]
    if hasattr(module, "num_layers"):
        directions = ["", "_reverse"][: 1 + module.bidirectional]
        suffixes = [[f"_l{k}{end}" for end in directions] for k in range(module.num_layers)]
    if len(layers) != len(suffixes):
        raise ValueError(
            f"{op}: layer: expected {len(suffixes)} Keras layers (a list when more than one), one "
            f"for each layer of module, got {len(layers)}"
        )
    weights, biases = ("weight_ih", "weight_hh"), ("bias_ih", "bias_hh")
    kinds = (*weights, *biases) if module.bias else weights
    flat = [kind + end for ends in suffixes for end in ends for kind in kinds]
    parameters = dict(zip(flat, _parameters(op, module, flat)))
    for index, (each, ends) in enumerate(zip(layers, suffixes)):
        cells = dict(_cells(op, f"layer[{index}]" if listed else "layer", each))
        _check_same(op, "directions", len(ends), len(cells))
        for end, (where, cell) in zip(ends, cells.items()):
            _check_cell(op, where, module, cell)
            names = ["kernel", "recurrent_kernel", "bias"][: len(kinds) // 2 + 1]
            sources = [("weight_ih",), ("weight_hh",), biases]
            for source, variable in zip(sources, _variables(op, where, cell, names)):
                found = tuple(parameters[kind + end] for kind in source)
                yield _fitting(op, where, _Pair(found, variable), source[0] + end)


def _check_cell(op: str, where: str, module: Any, cell: Any) -> None:
    _check_same(op, "a bias", bool(module.bias), cell.use_bias)
    # They lie inside of the recurrence, where nobody can make up for another one.
    for name, default in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        wanted, found = getattr(module, name, default), getattr(cell, name)
        if found is not sys.modules["keras"].activations.get(wanted):
            got = getattr(found, "__name__", type(found).__name__)
            raise ValueError(
                f"{op}: {name}: expected the same in both, got {wanted} in module and {got} in "
                f"{where}"
            )


def _cells(op: str, where: str, layer: Any) -> Iterator[tuple[str, Any]]:
    """The one or two cells of a Keras layer: the first reads forwards in a Bidirectional."""
    layers = sys.modules["keras"].layers
    if isinstance(layer, layers.Bidirectional):
        _check_built(op, where, layer)
        if getattr(layer.forward_layer, "go_backwards", False):
            raise ValueError(
                f"{op}: {where}: expected a Bidirectional whose forward_layer reads forwards, got "
                "one with go_backwards=True"
            )
        for name in ("forward_layer", "backward_layer"):
            yield from _cells(op, f"{where}.{name}", getattr(layer, name))
    elif isinstance(layer, layers.LSTMCell):
        yield where, layer
    elif isinstance(layer, layers.RNN) and isinstance(layer.cell, layers.LSTMCell):
        _check_built(op, where, layer)
        yield f"{where}.cell", layer.cell
    else:
        raise TypeError(
            f"{op}: {where}: expected an LSTM, LSTMCell, RNN(LSTMCell) or Bidirectional of them of "
            f"keras.layers, got {_class(layer)}"
        )


def _parameters(op: str, module: Any, names: Sequence[str]) -> list[Tensor]:
    """The parameters called `names`, which have to be all that `module` has."""
    torch = sys.modules["torch"]
    found = dict(module.named_parameters(remove_duplicate=False))
    if set(found) != set(names):
        raise ValueError(
            f"{op}: module: expected the parameters {', '.join(names)} and no others, got "
            f"{', '.join(found) or 'none'}; LoRA, peepholes, norms, parametrizations and pruning "
            "have no place in the other framework"
        )
    for name, parameter in found.items():
        if torch.nn.parameter.is_lazy(parameter) or parameter.is_meta:
            state = "is lazy or on the meta device"
            raise ValueError(f"{op}: module.{name}: expected numbers, got none: it {state}")
        if type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"{op}: module.{name}: expected a plain tensor, neither quantized nor distributed, "
                f"got {_class(parameter.data)}"
            )
    return [found[name] for name in names]


def _variables(op: str, where: str, layer: Any, names: Sequence[str]) -> list[Any]:
    """The variables called `names`, which have to be all that `layer` has."""
    _check_built(op, where, layer)
    if (mode := getattr(layer, "quantization_mode", None)) is not None:
        raise ValueError(f"{op}: {where}: expected a layer that is not quantized, got {mode}")
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"{op}: {where}: expected a layer without LoRA, got one of rank {layer.lora_rank}"
        )
    found = [getattr(layer, name) for name in names]
    if {id(variable) for variable in found} != {id(variable) for variable in layer.weights}:
        raise ValueError(
            f"{op}: {where}: expected the variables {', '.join(names)} and no others, got "
            f"{', '.join(variable.name for variable in layer.weights) or 'none'}"
        )
    return found


def _fitting(op: str, where: str, pair: _Pair, name: str) -> _Pair:
    """`pair`, whose sizes and dtypes agree."""
    variable = f"{where}.{pair.variable.name}"
    for parameter in pair.parameters:
        outputs, *rest = parameter.shape
        inputs, *window = rest or [0]
        wanted = [*window, inputs, outputs] if rest else [outputs]
        if (got := list(pair.variable.shape)) != wanted:
            raise ValueError(
                f"{op}: {variable}: expected shape {wanted} for module.{name} of "
                f"{list(parameter.shape)}, got {got}"
            )
        dtype = str(parameter.dtype).removeprefix("torch.")
        if (got := sys.modules["keras"].backend.standardize_dtype(pair.variable.dtype)) != dtype:
            raise ValueError(
                f"{op}: {variable}: expected dtype {dtype} as of module.{name}, got {got}"
            )
    return pair


def _check_built(op: str, where: str, layer: Any) -> None:
    if not layer.built:
        raise ValueError(
            f"{op}: {where}: expected a built layer (call it once, or its build method), got "
            f"{type(layer).__name__} without weights"
        )


def _check_same(op: str, what: str, module: Any, layer: Any) -> None:
    ours, theirs = (tuple(v) if isinstance(v, (list, tuple)) else v for v in (module, layer))
    if ours != theirs:
        raise ValueError(
            f"{op}: {what}: expected the same in both, got {ours} in module and {theirs} in layer"
        )


def _class(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
