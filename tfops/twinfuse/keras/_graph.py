"""Layers that one kernel computes together, in the graphs of functional and Sequential models.

A chain is a Dense or convolution, maybe a BatchNormalization, and a ReLU layer or operation. It is
fused in the graph of one model, whose layers stay as they are: another model made of them, a saved
file or a direct call still has the values between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import keras
from keras.src.activations.activations import ReLU
from keras.src.models import Functional
from keras.src.ops.nn import Relu

from twinfuse.keras import _ops
from twinfuse.keras.layers import Conv1D, Conv2D, Dense

# Native class -> the one that computes a ReLU as well.
FUSED = {
    keras.layers.Dense: Dense,
    keras.layers.Conv1D: Conv1D,
    keras.layers.Conv2D: Conv2D,
}

# What these classes compute: a class may be patched, as a layer may be.
_CALLS = {
    kind: kind.call
    for kind in (
        *(*FUSED, *FUSED.values(), keras.layers.LSTM, keras.layers.LSTMCell),
        *(keras.layers.ReLU, keras.layers.Activation, keras.layers.BatchNormalization),
        *(Relu, ReLU),
    )
}
# With bounds and slopes: the layer, and what `keras.activations.relu` leaves in a graph.
_BOUNDED = (keras.layers.ReLU, ReLU)


@dataclass(frozen=True)
class Chain:
    """One call of each of some layers, of which only the next one reads the output.

    The last one may be an operation, `keras.ops.relu` or `keras.activations.relu`.
    """

    nodes: tuple[Any, ...]

    @property
    def layers(self) -> tuple[Any, ...]:
        return tuple(node.operation for node in self.nodes)

    @property
    def norm(self) -> keras.layers.BatchNormalization | None:
        return self.layers[1] if len(self.nodes) == 3 else None


@dataclass
class Survey:
    """Chains of a graph that can be fused, and by the id of a layer, why its other ones cannot."""

    chains: list[Chain] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)


@dataclass
class Role:
    """What one layer has to do with the chains of some graphs."""

    calls: int = 0
    fused: list[Chain] = field(default_factory=list)
    # Of chains that it begins and that are not fused.
    reason: str = ""


class _Graph(keras.Function):
    """What a functional model runs in place of its graph: the same with some chains fused."""

    def __init__(self, model: Functional, chains: list[Chain]) -> None:
        # Without that of Function, which would look for nodes behind the outputs: they are given.
        self.chains = chains
        self._unfused = type(model)._run_through_graph.__get__(model)
        self._inputs, self._outputs = model._inputs, model._outputs
        self._outputs_struct = model._outputs_struct
        last = {id(chain.nodes[-1]): _node(chain) for chain in self.chains}
        others = {id(node) for chain in self.chains for node in chain.nodes[:-1]}
        self._nodes_by_depth = {
            depth: [last.get(id(node), node) for node in nodes if id(node) not in others]
            for depth, nodes in model._nodes_by_depth.items()
        }

    def _run_through_graph(self, inputs: Any, *args: Any, **options: Any) -> Any:
        # Whoever clones the model or asks for shapes wants its layers.
        symbolic = any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten(inputs))
        run = self._unfused if symbolic else super()._run_through_graph
        return run(inputs, *args, **options)


class _Fused(keras.layers.Layer):
    """What stands in a graph for the layers of a chain: one kernel while that computes the same.

    That is no longer so in training with a BatchNormalization, or where a layer has been changed.
    """

    def __init__(self, chain: Chain) -> None:
        layer = chain.layers[0]
        # The layers inside cast what they get, each in its own way.
        super().__init__(name=layer.name, dtype="float32", autocast=False)
        self.supports_masking = True
        self._chain = chain
        self._run = _twin(chain).__call__

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        norm = self._chain.norm
        if not (norm and training and norm.trainable) and not unfusable(self._chain):
            outputs = self._run(inputs)
            if not isinstance(self._chain.layers[-1], keras.layers.Layer):
                outputs._keras_mask = None  # an operation passes none on
            return outputs
        outputs = inputs
        for layer in self._chain.layers:
            outputs = layer(outputs)
        return outputs

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """No mask but what the layers inside have set."""


def first_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer itself, or the first of the chain that it stands for in a graph."""
    return layer._chain.layers[0] if isinstance(layer, _Fused) else layer


def graphs(layers: Iterable[keras.layers.Layer]) -> list[Functional]:
    """The graphs that models among `layers` run when they are called."""
    found = []
    for layer in layers:
        call = type(layer).call
        if call is Functional.call:
            found.append(layer)
        elif call is keras.Sequential.call and layer._functional is not None:
            found.append(layer._functional)
    return found


def fused_chains(graph: Functional) -> list[Chain]:
    """The chains of `graph` that are fused."""
    running = vars(graph).get("_run_through_graph")
    return running.__self__.chains if running else []


def set_chains(graph: Functional, chains: list[Chain]) -> bool:
    """Fuse `chains` in `graph`, and no others; returns whether that changes anything."""
    if chains == fused_chains(graph):
        return False
    if chains:
        running = _Graph(graph, chains)._run_through_graph
        object.__setattr__(graph, "_run_through_graph", running)
    else:
        object.__delattr__(graph, "_run_through_graph")
    return True


def roles(graphs: Iterable[Functional]) -> dict[int, Role]:
    """The role of every layer of `graphs`, by its id."""
    found: dict[int, Role] = defaultdict(Role)
    for graph in graphs:
        fused, all_of_it = fused_chains(graph), survey(graph)
        for node in _nodes(graph):
            found[id(node.operation)].calls += 1
        for chain in fused:
            for layer in chain.layers:
                found[id(layer)].fused.append(chain)
        for chain in all_of_it.chains:
            if chain not in fused:
                option = ", fold_batch_norm=True" if chain.norm else ""
                reason = f"not fused: call twinfuse.keras.fuse(model{option})"
                found[id(chain.layers[0])].reason = reason
        for key, reason in all_of_it.reasons.items():
            found[key].reason = reason
    return found


def survey(graph: Functional) -> Survey:
    """Find every chain of `graph`."""
    found = Survey()
    nodes = _nodes(graph)
    users = defaultdict(list)
    for node in nodes:
        for tensor in node.input_tensors:
            users[id(tensor)].append(node)
    outputs = {id(tensor) for tensor in graph._outputs}
    for node in nodes:
        kind = type(node.operation)
        if not (kind in FUSED or kind in FUSED.values()) or not is_linear(node.operation):
            continue
        for chain in _chains_from(node, users):
            values = [id(n.outputs[0]) for n in chain.nodes[:-1]]
            if any(value in outputs for value in values):
                reason = "the value before the ReLU is an output of the model"
            elif any(len(users[value]) > 1 for value in values):
                reason = "the value before the ReLU is used as well"
            else:
                reason = unfusable(chain)
            if reason:
                found.reasons[id(node.operation)] = reason
            else:
                found.chains.append(chain)
    return found


def _nodes(graph: Functional) -> list[Any]:
    return [node for depth in graph._nodes_by_depth.values() for node in depth]


def _chains_from(node: Any, users: dict[int, list[Any]]) -> Iterator[Chain]:
    for user in users[id(node.outputs[0])]:
        if _ends_chain(user.operation):
            yield Chain((node, user))
        elif type(user.operation) is keras.layers.BatchNormalization:
            after = users[id(user.outputs[0])]
            yield from (Chain((node, user, n)) for n in after if _ends_chain(n.operation))


def _ends_chain(operation: Any) -> bool:
    """Whether `operation` is some kind of ReLU; those of other kinds are refused by name."""
    return type(operation) in _BOUNDED or is_relu(operation)


def unfusable(chain: Chain) -> str:
    """Why nothing may compute `chain` but its layers one by one; empty when something may."""
    layer, *_, relu = chain.layers
    if type(relu) in _BOUNDED and not is_relu(relu):
        return f"{relu.name} has a max_value, a negative_slope or a threshold"
    if not (is_linear(layer) and is_relu(relu)):
        return f"{layer.name} and {relu.name} have other activations"
    if reason := _ops.native_reason(layer):
        return reason
    for each in chain.layers:
        if has_other_call(each):
            return f"the call method of {each.name} has been replaced"
        if not isinstance(each, keras.layers.Layer):
            continue
        if _ops.has_hooks(each):
            return f"{each.name} has hooks"
        if not each.autocast:
            return f"{each.name} has autocast=False"
        if each.activity_regularizer is not None:
            return f"{each.name} has an activity_regularizer"
        if each.compute_dtype != layer.compute_dtype:
            return f"{each.name} computes in {each.compute_dtype}, it in {layer.compute_dtype}"
    for node, each in zip(chain.nodes, chain.layers):
        given = [*node.arguments.args, *node.arguments.kwargs.values()]
        if sum(value is not None for value in given) > 1:
            return f"{each.name} is called with arguments of its own"
    return _unfoldable(chain) if chain.norm else ""


def _unfoldable(chain: Chain) -> str:
    """Why the BatchNormalization of `chain` cannot become part of the weights before it."""
    layer, norm, _ = chain.layers
    if {layer.variable_dtype, norm.variable_dtype} != {layer.compute_dtype}:
        return f"{norm.name} is folded only where variables have the dtype of the layers"
    if layer.compute_dtype not in ("float32", "float64"):
        return f"{norm.name} is folded only in float32 and float64"
    rank = len(chain.nodes[0].outputs[0].shape)
    channels_first = getattr(layer, "data_format", "") == "channels_first"
    if norm.axis % rank != (1 if channels_first else rank - 1):
        return f"{norm.name} normalizes another axis than its channels"
    return ""


def has_other_call(layer: Any) -> bool:
    """Whether somebody has replaced the call method of `layer` or of its class."""
    kind = type(layer)
    return "call" in vars(layer) or kind.call is not _CALLS.get(kind, kind.call)


def is_relu(operation: Any) -> bool:
    """Whether `operation`, maybe a layer, computes max(x, 0) and nothing else."""
    if type(operation) is Relu:
        return True
    if type(operation) in _BOUNDED:
        unbounded = operation.max_value is None
        return unbounded and operation.negative_slope == operation.threshold == 0
    return type(operation) is keras.layers.Activation and _ops.is_relu(operation.activation)


def is_linear(layer: Any) -> bool:
    return layer.activation is None or layer.activation is keras.activations.linear


def _node(chain: Chain) -> SimpleNamespace:
    """What stands in a graph for the nodes of `chain`."""
    first, last = chain.nodes[0], chain.nodes[-1]
    return SimpleNamespace(
        operation=_Fused(chain),
        is_input=False,
        arguments=first.arguments,
        input_tensors=first.input_tensors,
        outputs=last.outputs,
    )


def _twin(chain: Chain) -> Any:
    """The first layer of `chain` itself, of its fused class, but with what follows inside of it."""
    layer = chain.layers[0]
    fused: Any = FUSED.get(type(layer), type(layer))
    attributes = {"activation": lambda: keras.activations.relu}
    if chain.norm:
        attributes |= _folded(layer, chain.norm)
    members = {name: _computed(get) for name, get in attributes.items()}
    twin = object.__new__(type(fused)(fused.__name__, (fused,), members))
    # One state for both: weights, LoRA, dtype and losses are the layer's at any time.
    object.__setattr__(twin, "__dict__", vars(layer))
    return twin


def _computed(get: Callable[[], Any]) -> property:
    return property(lambda _: get())


def _folded(layer: Any, norm: Any) -> dict[str, Callable[[], Any]]:
    """Weights of `layer` with `norm` at inference in them, from what the variables hold then."""

    def scale() -> Any:
        inverse = keras.ops.rsqrt(norm.moving_variance + norm.epsilon)
        return inverse * norm.gamma if norm.scale else inverse

    def bias() -> Any:
        mean = norm.moving_mean if layer.bias is None else norm.moving_mean - layer.bias
        return norm.beta - mean * scale() if norm.center else -mean * scale()

    return {"kernel": lambda: layer.kernel * scale(), "bias": bias, "use_bias": lambda: True}


def folding_kernels(chain: Chain) -> int:
    """How many small kernels compute what `_folded` gives."""
    layer, norm, _ = chain.layers
    return 7 + 2 * bool(norm.scale) + (layer.bias is not None)
