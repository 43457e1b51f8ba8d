"""Fuse the layers of a Keras model in place, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import keras

from twinfuse._backend import Choice, Report
from twinfuse.keras import _graph, _lstm_ops, _ops, _savings
from twinfuse.keras.layers import LSTM, LSTMCell

Model = TypeVar("Model", bound=keras.layers.Layer)

# Native class -> fused class. A class is swapped only on an exact match: a subclass may compute
# something else.
_FUSED = _graph.FUSED | {
    keras.layers.LSTM: LSTM,
    keras.layers.LSTMCell: LSTMCell,
}
_NATIVE = {fused: native for native, fused in _FUSED.items()}
# They compute with a cell, which is a layer, too.
_RECURRENT = (keras.layers.LSTM, keras.layers.LSTMCell)


@dataclass
class _Original:
    """What `fuse` changed on a layer or a model besides its class."""

    attributes: dict[str, Any]
    compile_config: Any = None


def fuse(model: Model, fold_batch_norm: bool = False) -> Model:
    """Make every layer of `model` that can be fused a fused one, in place, and return `model`.

    A Dense or convolution without an activation is fused with the ReLU layer behind it in the
    graph of a functional or built Sequential model, where nothing else in it reads the value
    between the two. The layers stay what they are: a saved model has such pairs fused again after
    another `fuse`, and other models made of these layers keep the value between.

    Layers keep their weights, names and configs, so optimizer state, `get_weights` order and
    checkpoints stay valid. Functions that the model itself has traced (`fit`, `predict`) are
    traced anew; a `tf.function` of your own keeps what it has traced.

    Args:
        model: any layer or model; layers inside, nested and subclassed models are looked at, too.
        fold_batch_norm: also fuse such pairs with a BatchNormalization in between. At inference
            each call computes new weights from the variables, so later training and `set_weights`
            count; in training the layers run one by one.
    """
    layers = list(_flatten(model))
    # An LSTM computes what its cell would, with the cell's weights.
    cells = {id(layer.cell) for layer in layers if isinstance(layer, keras.layers.LSTM)}
    fused = [
        layer
        for layer in layers
        if type(layer) in _FUSED and id(layer) not in cells and not _native_reason(layer)
    ]
    changed = bool(fused)
    for layer in fused:
        if isinstance(layer, keras.layers.Dense):
            _change(layer, {"quantize": _without_type_check(layer.quantize)})
        object.__setattr__(layer, "__class__", _FUSED[type(layer)])
    for graph in _graph.graphs(layers):
        found = _graph.survey(graph).chains
        chains = [chain for chain in found if fold_batch_norm or not chain.norm]
        changed |= _graph.set_chains(graph, chains)
        fused += [chain.layers[0] for chain in chains]
    for layer in fused:
        _change(layer, {"supports_jit": False} if _ops.xla_refuses_ops else {})
    if changed:
        _retrace(layers)
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place; layers built as `twinfuse.keras.layers` become native ones too."""
    layers = list(_flatten(model))
    fused = [layer for layer in layers if type(layer) in _NATIVE]
    changed = bool(fused)
    for layer in fused:
        object.__setattr__(layer, "__class__", _NATIVE[type(layer)])
        if "_twinfuse_original" not in vars(layer):
            layer.supports_jit = True
    for graph in _graph.graphs(layers):
        changed |= _graph.set_chains(graph, [])
    for layer in layers:
        _restore(layer)
    if changed:
        _retrace(layers, fused=False)
    return model


def explain(model: keras.layers.Layer, example_inputs: Any = None) -> Report:
    """One row for each layer of `model` that has no layers inside: fused, or native and why.

    With `example_inputs`, what `model` is called with, it is called once: what a fused layer saves
    is then that of its calls in this run.
    """
    layers = list(_flatten(model))
    calls = {} if example_inputs is None else _savings.recorded(model, example_inputs)
    roles = _graph.roles(_graph.graphs(layers))
    rows = []
    for parent, layer in _leaves(model, set()):
        role = roles.get(id(layer)) or _graph.Role(reason=_unseen(layer, parent))
        choice = _choice(layer, role)
        saving = None
        if choice[0] not in ("native", "fused", "reference") and not isinstance(layer, _RECURRENT):
            chain = role.fused[0] if role.fused else None
            saving = _savings.saving(layer, chain, calls.get(id(layer), []))
        where = layer.path or layer.name
        rows.append(Choice(type(layer).__name__, *choice, where=where, saving=saving))
    return Report(rows)


def _choice(layer: keras.layers.Layer, role: _graph.Role) -> tuple[str, str, str]:
    """`(backend, kernel, reason)` of a row of `explain`."""
    if role.fused and not _graph.unfusable(role.fused[0]):
        first, *others = role.fused[0].layers
        others = others if layer is first else [first]
        backend, kernel, reason = _find_kernel(first) if layer is first else ("fused", "", "")
        part = f", in {len(role.fused)} of {role.calls} calls"
        reason = reason or (
            f"together with {', '.join(other.name for other in others)}"
            f"{' at inference' if role.fused[0].norm else ''}"
            f"{part if len(role.fused) < role.calls else ''}"
        )
        return backend, kernel, reason
    reason = role.reason or _native_reason(layer)
    if reason or type(layer) in _FUSED:
        return "native", "", reason or "not fused: call twinfuse.keras.fuse(model)"
    return _find_kernel(layer)


def _find_kernel(layer: keras.layers.Layer) -> tuple[str, str, str]:
    if isinstance(layer, _RECURRENT):
        return _lstm_ops.find_kernel(layer)
    stem = "linear_relu" if isinstance(layer, keras.layers.Dense) else "conv_relu"
    return _ops.find_kernel(f"{stem}_forward", layer)


def _flatten(model: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model: expected a Keras model or layer, got {type(model).__name__}")
    return model._flatten_layers()


def _leaves(
    layer: keras.layers.Layer, seen: set[int], parent: keras.layers.Layer | None = None
) -> Iterator[tuple[keras.layers.Layer | None, keras.layers.Layer]]:
    """Layers that compute something themselves, each with the layer that it was found in.

    A recurrent layer stands for its cell.
    """
    if id(layer) in seen or isinstance(layer, keras.layers.InputLayer):
        return
    seen.add(id(layer))
    children = list(layer._flatten_layers(recursive=False, include_self=False))
    if not children or isinstance(layer, _RECURRENT):
        yield parent, layer
        return
    for child in children:
        yield from _leaves(child, seen, layer)


def _unseen(layer: keras.layers.Layer, parent: keras.layers.Layer | None) -> str:
    """Why no graph tells which ReLU is behind `layer`; empty when it would need none."""
    if parent is None or type(layer) not in _graph.FUSED or _graph.has_other_call(layer):
        return ""
    if not _graph.is_linear(layer):
        return ""
    if type(parent).call is keras.Sequential.call:
        return f"its activation is linear, and {parent.name} has not been built: call it once"
    kind = type(parent).__name__
    return f"its activation is linear, and {kind} calls it in code of its own, not in a graph"


def _native_reason(layer: keras.layers.Layer) -> str:
    """Why `layer` computes natively, fused or not; empty when it can be fused or is."""
    native = next((native for native in _FUSED if isinstance(layer, native)), None)
    if native is None and _graph.is_relu(layer):
        return "no layer before it computes it as well"
    if native is None:
        return "no fused kernel computes it"
    if type(layer) not in _FUSED and not isinstance(layer, _FUSED[native]):
        return f"a subclass of {native.__name__} may compute something else"
    if _graph.has_other_call(layer):
        return "its call method has been replaced"
    if native in _RECURRENT:
        return _lstm_ops.native_reason(layer)
    if not _ops.is_relu(layer.activation):
        name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
        return f"its activation is {name}"
    return _ops.native_reason(layer)


def _without_type_check(quantize: Any) -> Any:
    @functools.wraps(quantize)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return quantize(*args, **{**kwargs, "type_check": False})

    return wrapper


def _change(layer: keras.layers.Layer, attributes: dict[str, Any]) -> None:
    # Past Layer.__setattr__, which would track what is set as part of the layer's state.
    original = vars(layer).get("_twinfuse_original")
    if original is None:
        original = _Original({}, getattr(layer, "_compile_config", None))
        object.__setattr__(layer, "_twinfuse_original", original)
    for name, value in attributes.items():
        original.attributes.setdefault(name, getattr(layer, name))
        object.__setattr__(layer, name, value)


def _restore(layer: keras.layers.Layer) -> None:
    original = vars(layer).get("_twinfuse_original")
    if original is None:
        return
    # A model compiled again since then has its own jit_compile.
    if getattr(layer, "_compile_config", None) is original.compile_config:
        for name, value in original.attributes.items():
            object.__setattr__(layer, name, value)
    object.__delattr__(layer, "_twinfuse_original")


def _retrace(layers: list[keras.layers.Layer], fused: bool = True) -> None:
    """Drop the functions that models have traced with the old layers."""
    for model in layers:
        if not isinstance(model, keras.Model):
            continue
        for name in ("train_function", "test_function", "predict_function"):
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        if fused and _ops.xla_refuses_ops and model.compiled and model.jit_compile:
            _change(model, {"_jit_compile": False})
