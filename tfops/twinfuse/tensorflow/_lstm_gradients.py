"""The LSTM ops as they are called, their gradients, and gradients of those.

Gradients need what forward has computed on its way: gates, and states before each step. In a graph
the op always has them as outputs and computes them where something reads them, which is where a
gradient is taken, inside the function or around it. In eager code somebody has to say so: there the
op is called with them while a tape (or a forward accumulator) records, and what the tape gets is a
record of the op without them, as it would make a zero gradient for each.

The gradient of a gradient is that of `_lstm_reference`, differentiated twice. It holds for x,
weights and states: what forward has saved follows from those and counts as constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import backprop, record

from twinfuse import _backend
from twinfuse.tensorflow import _binding, _lstm_reference
from twinfuse.tensorflow._gradients import _skipped
from twinfuse.tensorflow._lstm_reference import NUMBERS, Operands, Settings

_DIFFERENTIABLE = (
    *("x", "kernel", "recurrent_kernel", "bias", "projection", "peephole", "norm"),
    *("h", "c"),
)


@dataclass(frozen=True)
class Kind:
    """A layer or a cell."""

    name: str  # what users call it
    type: str  # of its compiled op
    operands: tuple[str, ...]  # inputs of the op, in order
    required: tuple[str, ...]  # those that are no lists
    settings: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: int
    reference: Callable[[Operands, Settings], list[tf.Tensor]]

    @property
    def sources(self) -> tuple[str, ...]:
        """Operands that have gradients."""
        return tuple(name for name in self.operands if name in _DIFFERENTIABLE)

    def op(self, suffix: str = "") -> Callable[..., Any]:
        return getattr(_binding.ops, f"twinfuse_{self.name}{suffix}")

    def arguments(self, operands: Operands) -> dict[str, Any]:
        return {
            name: value if name in self.required else [] if value is None else [value]
            for name, value in ((name, getattr(operands, name)) for name in self.operands)
        }

    def attributes(self, settings: Settings) -> dict[str, Any]:
        named = {name: getattr(settings, name) for name in self.settings}
        return {name: NUMBERS.get(value, value) for name, value in named.items()}


LAYER = Kind(
    "lstm",
    "TwinfuseLstm",
    Operands._fields,
    ("x", "kernel", "recurrent_kernel"),
    Settings._fields,
    ("outputs", "h_n", "c_n"),
    3,
    _lstm_reference.layer,
)
CELL = Kind(
    "lstm_cell",
    "TwinfuseLstmCell",
    tuple(name for name in Operands._fields if name not in ("projection", "mask")),
    ("x", "kernel", "recurrent_kernel", "h", "c"),
    ("activation", "recurrent_activation", "norm_epsilon"),
    ("h_n", "c_n"),
    1,
    _lstm_reference.cell,
)


_NOT_ON_GPUS = ("projection", "peephole", "norm", "dropout_input", "dropout_hidden")


def find_kernel(kind: Kind, role: str, operands: Operands) -> tuple[str, str]:
    """`(kernel name, "")`, or `("", why the reference path serves these operands)`."""
    device = _binding.device_type(operands.x)
    for name in _NOT_ON_GPUS if device == "cuda" else ():
        if getattr(operands, name) is not None:
            return "", f"{name}: no GPU kernel takes it"
    return _binding.find_kernel(f"{kind.name}_{role}", operands.x.dtype, device)


def forward(
    kind: Kind, operands: Operands, settings: Settings, sequence: bool = True
) -> list[tf.Tensor | None]:
    """The outputs of the op; None instead of a layer's sequence where that is not wanted."""
    attributes = kind.attributes(settings)
    if kind is LAYER:
        attributes["num_outputs"] = int(sequence)
    missing: list[tf.Tensor | None] = [] if sequence or kind is CELL else [None]
    if not tf.executing_eagerly():
        return missing + _call(kind, operands, attributes, 1)[: -kind.saved]
    if not record.could_possibly_record():
        return missing + _call(kind, operands, attributes, 0)
    with record.stop_recording():
        outputs = _call(kind, operands, attributes, 1)
    arguments = kind.arguments(operands)
    inputs = tf.nest.flatten(list(arguments.values()))
    for name, value in arguments.items():
        if name not in kind.required:
            attributes[f"num_{name}"] = len(value)
    flat = tuple(item for pair in attributes.items() for item in pair)
    saved = tuple(outputs[-kind.saved :])
    outputs = outputs[: -kind.saved]
    backprop.record_gradient(kind.type, inputs, (*flat, "saved", saved), outputs)
    return missing + outputs


def _call(
    kind: Kind, operands: Operands, attributes: dict[str, Any], saved: int
) -> list[tf.Tensor]:
    outputs = kind.op()(**kind.arguments(operands), **attributes, num_saved=saved)
    return tf.nest.flatten(list(outputs))


def backward(
    kind: Kind,
    operands: Operands,
    settings: Settings,
    grads: Sequence[tf.Tensor | None],
    saved: Sequence[tf.Tensor],
    wanted: Sequence[str],
) -> dict[str, tf.Tensor | None]:
    """Gradients of the operands that are wanted, for those of the outputs."""
    if not wanted or all(grad is None for grad in grads):
        return {}
    name, reason = find_kernel(kind, "backward", operands)
    if not name:
        _backend.fall_back(f"the gradient of {kind.name}", reason)
        return _composed(kind, operands, settings, grads, wanted)
    attributes = kind.attributes(settings)
    if not saved:
        more = {"num_outputs": 0} if kind is LAYER else {}
        saved = _call(kind, operands, attributes | more, 1)[-kind.saved :]
    given = {
        f"grad_{name}": [] if grad is None else [grad] for name, grad in zip(kind.outputs, grads)
    }
    names = ("gates", "cells", "hidden")[: kind.saved]
    found = kind.op("_grad")(
        **given,
        **dict(zip(names, saved)),
        **kind.arguments(operands),
        **attributes,
        **{f"num_grad_{name}": int(name in wanted) for name in kind.sources},
    )
    return {name: grad[0] for name, grad in zip(kind.sources, found) if grad}


def _composed(
    kind: Kind,
    operands: Operands,
    settings: Settings,
    grads: Sequence[tf.Tensor | None],
    wanted: Sequence[str],
) -> dict[str, tf.Tensor | None]:
    sources = [getattr(operands, name) for name in wanted]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs = kind.reference(operands, settings)
    pairs = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
    found = tape.gradient([o for o, _ in pairs], sources, [g for _, g in pairs])
    return dict(zip(wanted, found))


def _attributes(node: Any) -> Callable[[str], Any]:
    """Those of a node by name; the nodes of eager code are slow to look one up."""
    flat = getattr(node, "attrs", None)
    return node.get_attr if flat is None else dict(zip(flat[::2], flat[1::2])).get


def _read(
    kind: Kind, node: Any, attribute: Callable[[str], Any], first: int
) -> tuple[Operands, dict[str, int], Settings]:
    """Operands of a node whose inputs they are from `first` on, where each is, and its settings."""
    places, place = {}, first
    for name in kind.operands:
        if name in kind.required or attribute(f"num_{name}"):
            places[name] = place
            place += 1
    values = {name: node.inputs[place] for name, place in places.items()}
    names = list(NUMBERS)
    settings = {name: attribute(name) for name in kind.settings}
    settings["norm_epsilon"] = tf.compat.as_str(settings["norm_epsilon"])
    for name in ("activation", "recurrent_activation"):
        settings[name] = names[settings[name]]
    return Operands(**values), places, Settings(**settings)


def _saved(kind: Kind, node: Any, attribute: Callable[[str], Any]) -> Sequence[tf.Tensor]:
    if hasattr(node, "attrs") and (saved := attribute("saved")):
        return saved
    return node.outputs[-kind.saved :] if attribute("num_saved") else ()


def _first(kind: Kind, node: Any, grads: Sequence[Any]) -> list[tf.Tensor | None]:
    attribute = _attributes(node)
    operands, places, settings = _read(kind, node, attribute, 0)
    skipped = _skipped(node)
    wanted = [name for name in kind.sources if name in places and places[name] not in skipped]
    if kind is LAYER and not attribute("num_outputs"):
        grads = [None, *grads]
    # A gather behind us hands down IndexedSlices.
    grads = [
        None if grad is None else tf.convert_to_tensor(grad) for grad in grads[: len(kind.outputs)]
    ]
    found = backward(kind, operands, settings, grads, _saved(kind, node, attribute), wanted)
    result: list[tf.Tensor | None] = [None] * len(node.inputs)
    for name, grad in found.items():
        result[places[name]] = grad
    return result


def _second(kind: Kind, node: Any, cotangents: Sequence[Any]) -> list[tf.Tensor | None]:
    attribute = _attributes(node)
    present = [bool(attribute(f"num_grad_{name}")) for name in kind.outputs]
    behind = kind.saved + sum(present)
    inputs = iter(node.inputs[kind.saved : behind])
    grads = [next(inputs) if there else None for there in present]
    operands, places, settings = _read(kind, node, attribute, behind)
    wanted = [name for name in kind.sources if attribute(f"num_grad_{name}")]
    pairs = [(name, c) for name, c in zip(wanted, cotangents) if c is not None]
    skipped = _skipped(node)
    sourced = [place for name, place in places.items() if name in kind.sources]
    watched = [p for p in (*range(kind.saved, behind), *sourced) if p not in skipped]
    result: list[tf.Tensor | None] = [None] * len(node.inputs)
    if not pairs or not watched:
        return result
    sources = [node.inputs[place] for place in watched]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        found = _composed(kind, operands, settings, grads, [name for name, _ in pairs])
    # Without any steps the weights are not connected.
    connected = [(found[name], c) for name, c in pairs if found[name] is not None]
    targets, given = [target for target, _ in connected], [c for _, c in connected]
    for place, grad in zip(watched, tape.gradient(targets, sources, given)):
        result[place] = grad
    return result


@tf.RegisterGradient("TwinfuseLstm")
def _lstm_grad(node: Any, *grads: Any) -> list[tf.Tensor | None]:
    return _first(LAYER, node, grads)


@tf.RegisterGradient("TwinfuseLstmGrad")
def _lstm_grad_grad(node: Any, *cotangents: Any) -> list[tf.Tensor | None]:
    return _second(LAYER, node, cotangents)


@tf.RegisterGradient("TwinfuseLstmCell")
def _lstm_cell_grad(node: Any, *grads: Any) -> list[tf.Tensor | None]:
    return _first(CELL, node, grads)


@tf.RegisterGradient("TwinfuseLstmCellGrad")
def _lstm_cell_grad_grad(node: Any, *cotangents: Any) -> list[tf.Tensor | None]:
    return _second(CELL, node, cotangents)
