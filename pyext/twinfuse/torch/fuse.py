"""Fuses the layers of an existing model in place, and undoes it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from twinfuse import explain as explain_call
from twinfuse._backend import Choice, Report
from twinfuse.torch import _usage
from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.linear_relu import linear_relu
from twinfuse.torch.lstm import lstm
from twinfuse.torch.lstm_cell import lstm_cell
from twinfuse.torch.nn import LSTM, ConvReLU1d, ConvReLU2d, LinearReLU, LSTMCell

__all__ = ["explain", "fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# What a layer becomes when the ReLU behind it is fused into it, and what reports call it.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearReLU,
    nn.Conv1d: ConvReLU1d,
    nn.Conv2d: ConvReLU2d,
}
_NAMES = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}
# Layers that are fused by themselves.
_ALONE: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_ALONE_NAMES = {nn.LSTM: "lstm", nn.LSTMCell: "lstm_cell"}
# Set on a module whose class `fuse` changed, so that `unfuse` leaves other fused layers alone.
_MARK = "_twinfuse_fused"


class FusedReLU(nn.Module):
    """Stands where a ReLU was that the layer before it now computes; passes its input on."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.train(relu.training)
        self._original = (relu,)  # in a tuple, so that it is no submodule

    @property
    def original(self) -> nn.Module:
        return self._original[0].train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return "in the layer before"


def fuse(model: Model, deferred: bool = False) -> Model:
    """Replace each Linear, Conv1d and Conv2d followed by a ReLU with one fused layer, in place.

    Pairs are found in `nn.Sequential` (its subclasses too, unless they have a forward method of
    their own), and in modules whose forward method does nothing but pass tensors from one child to
    the next (`self.relu(self.fc(x))`). A pair is fused only where it is certain that nobody sees
    the value between the two; `explain(model)` says for each layer what became of it, and why.
    LSTM and LSTMCell are fused by themselves, wherever they are.

    Parameters, buffers, names, `state_dict` keys and indices stay as they are, so optimizers and
    checkpoints remain valid. Parametrized and pruned layers are fused as well. Change the
    architecture of the model, or add hooks to a pair, before fusing or after `unfuse`.

    Args:
        model: any module; its own class is never changed, except that of such a layer.
        deferred: also fuse what only a running model shows (ReLU called as a function, forward
            methods with branches). Not available yet: True raises NotImplementedError.
    """
    if deferred:
        raise NotImplementedError(
            "fuse(deferred=True) is not available in this version: write the layer as "
            "twinfuse.torch.nn.LinearReLU (ConvReLU1d, ConvReLU2d), or as an nn.Linear and an "
            "nn.ReLU in an nn.Sequential"
        )
    for group in _survey(model).groups:
        for layer in group.layers:
            kind = _kind(layer)
            assert kind is not None
            _swap_class(layer, kind, _FUSED[kind])
            setattr(layer, _MARK, True)
        group.parent._modules[group.key] = FusedReLU(group.relu)
    for module in list(model.modules()):
        if native := _alone(module):
            _swap_class(module, native, _ALONE[native])
            setattr(module, _MARK, True)
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place: every layer is of its former class again; returns `model`."""
    for module in list(model.modules()):
        if vars(module).pop(_MARK, False):
            for native, fused in (_FUSED | _ALONE).items():
                if isinstance(module, fused):
                    _swap_class(module, fused, native)
        for key, child in module._modules.items():
            if isinstance(child, FusedReLU):
                module._modules[key] = child.original
    return model


def explain(model: nn.Module) -> Report:
    """One row for each layer of `model` that `fuse` knows: fused, or native and why."""
    survey = _survey(model)
    fusible = {id(m) for group in survey.groups for m in (*group.layers, group.relu)}
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, (*_FUSED.values(), *_ALONE.values())):
            report.append(_explain_fused(name, module))
        elif isinstance(module, tuple(_ALONE)):
            op = next(op for kind, op in _ALONE_NAMES.items() if isinstance(module, kind))
            reason = "a subclass may compute something else"
            if isinstance(module, nn.Module) and _alone(module):
                reason = "can be fused: call fuse(model)"
            report.append(Choice(where=name, op=op, backend="native", reason=reason))
        elif isinstance(module, FusedReLU):
            reason = "in the layer before"
            report.append(Choice(where=name, op="relu", backend="fused", reason=reason))
        elif isinstance(module, (*_NAMES, nn.ReLU)):
            op = next((op for kind, op in _NAMES.items() if isinstance(module, kind)), "relu")
            reason = survey.reasons.get(id(module), _why_native(module))
            if id(module) in fusible:
                reason = "can be fused: call fuse(model)"
            report.append(Choice(where=name, op=op, backend="native", reason=reason))
    return report


def _why_native(module: object) -> str:
    """Why a module is in no pattern, where the survey has not said so."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it has no weight yet: call the model once, then fuse it"
    if type(module) not in (*_NAMES, nn.ReLU):
        return "a subclass may compute something else"
    if isinstance(module, nn.ReLU):
        return "no Linear, Conv1d or Conv2d before it"
    return "no ReLU follows"


def _explain_fused(name: str, layer: Any) -> Choice:
    with torch.no_grad():
        if isinstance(layer, (LSTM, LSTMCell)):
            choice = _explain_recurrent(layer)
            return Choice(choice.op, choice.backend, choice.kernel, choice.reason, where=name)
        weight, bias = layer.weight, layer.bias
        if isinstance(layer, LinearReLU):
            example = weight.new_empty((1, layer.in_features))
            (choice,) = explain_call(linear_relu, example, weight, bias)
        else:
            op = conv1d_relu if isinstance(layer, ConvReLU1d) else conv2d_relu
            window = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size))
            example = weight.new_empty((1, layer.in_channels, *window))
            options = (layer.stride, "valid", layer.dilation, layer.groups)
            (choice,) = explain_call(op, example, weight, bias, *options)
    return Choice(choice.op, choice.backend, choice.kernel, choice.reason, where=name)


def _explain_recurrent(layer: Any) -> Choice:
    size = layer.hidden_size
    parameters = list(layer.parameters())
    options = {"activation": layer.activation, "recurrent_activation": layer.recurrent_activation}
    example = parameters[0].new_empty((1, layer.input_size))
    if isinstance(layer, LSTMCell):
        hx = (example.new_empty((1, size)), example.new_empty((1, size)))
        weights = [
            getattr(layer, n, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        return explain_call(lstm_cell, example, hx, *weights, **options)[0]
    example = example.unsqueeze(0)
    shape = (layer.num_layers * (1 + layer.bidirectional), 1)
    hx = (example.new_empty((*shape, layer.proj_size or size)), example.new_empty((*shape, size)))
    call = (example, hx, layer._flat_weights, layer.bias, layer.num_layers)
    options["bidirectional"] = layer.bidirectional
    return explain_call(lstm, *call, **options)[0]


def _swap_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    if type(module) is old:
        module.__class__ = new
        return
    # A parametrized module has a class of its own, a direct subclass of the original's: removing
    # the parametrizations restores that class's base, which therefore has to be the new one.
    members = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(f"Parametrized{new.__name__}", (new,), members)


def _kind(module: nn.Module | None) -> type[nn.Module] | None:
    """Which of the classes that can be fused a module is of, if it is of no subclass."""
    return next((kind for kind in _FUSED if _is_exactly(module, kind)), None)


def _is_exactly(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    if module is None or "forward" in vars(module):
        return False
    parametrized = parametrize.is_parametrized(module) and type(module).__bases__ == (kind,)
    return type(module) is kind or parametrized


def _alone(module: nn.Module) -> type[nn.Module] | None:
    """Which of the classes that are fused by themselves a module is of."""
    return next((kind for kind in _ALONE if _is_exactly(module, kind)), None)


@dataclass
class _Group:
    """Layers that one ReLU follows, and where in the model that ReLU is."""

    layers: list[nn.Module]
    relu: nn.Module
    parent: nn.Module
    key: str


@dataclass
class _Survey:
    """What can be fused in a model, and by module id, why the rest cannot."""

    groups: list[_Group] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def refuse(self, modules: Iterable[nn.Module], reason: str) -> None:
        for module in modules:
            self.reasons.setdefault(id(module), reason)


Path = tuple[tuple[nn.Module, str], ...]  # (ancestor, key of its child), outermost first


def _survey(model: nn.Module) -> _Survey:
    survey = _Survey()
    uses = Counter(
        id(child) for parent in model.modules() for child in parent._modules.values() if child
    )
    paths: dict[int, list[Path]] = defaultdict(list)
    for path, module in _walk(model, ()):
        paths[id(module)].append(path)

    for parent in model.modules():
        if _usage.is_plain_sequential(parent):
            groups = _groups_in_sequence(parent, survey)
            reach = _reach_into_sequential
        elif _usage.calls_nothing(parent):
            continue
        else:
            groups = _groups_in_forward(parent, survey)
            reach = _reach_into_module
        for group in groups:
            reasons = (
                *(_why_not(layer, group.relu, uses) for layer in group.layers),
                *(reach(path, group) for path in paths[id(parent)]),
            )
            reason = next(filter(None, reasons), "")
            if reason:
                survey.refuse((*group.layers, group.relu), reason)
            else:
                survey.groups.append(group)
    return survey


def _walk(module: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    """Every module by every path that leads to it."""
    yield path, module
    for key, child in module._modules.items():
        if child is not None and all(child is not ancestor for ancestor, _ in path):
            yield from _walk(child, (*path, (module, key)))


def _why_not(layer: nn.Module, relu: nn.Module, uses: Counter[int]) -> str:
    kind = _kind(layer)
    assert kind is not None
    if uses[id(layer)] > 1:
        return f"the {kind.__name__} is used in more than one place"
    if any(getattr(layer, hooks) for hooks in _HOOKS if hooks != "_forward_pre_hooks"):
        return f"hooks of the {kind.__name__} would see the value after the ReLU"
    if any(getattr(relu, hooks) for hooks in _HOOKS):
        return "the ReLU has hooks"
    return ""


def _reach_into_sequential(path: Path, group: _Group) -> str:
    """Why a module above may call parts of the Sequential at the end of `path` by themselves."""
    for depth in reversed(range(len(path))):
        owner, key = path[depth]
        if _usage.is_plain_sequential(owner) or _usage.calls_nothing(owner):
            continue
        lists = [_usage.calls_nothing(module) for module, _ in path[depth + 1 :]]
        if any(lists[1:]):
            return f"{type(owner).__name__} calls it through nested lists of modules"
        reasons = [_usage.parts_used(owner, key, in_list=lists[:1] == [True])]
        reasons += [_usage.used_from_above(above, key) for above, _ in path[:depth]]
        return next(filter(None, reasons), "")
    return ""


def _reach_into_module(path: Path, group: _Group) -> str:
    """Why a method but `forward`, or a module above, may call one of the pair by itself."""
    names = {id(child): key for key, child in group.parent._modules.items() if child is not None}
    for key in (group.key, *(names[id(layer)] for layer in group.layers)):
        reasons = [_usage.used_outside_forward(group.parent, key)]
        reasons += [_usage.used_from_above(above, key) for above, _ in path]
        if any(reasons):
            return next(filter(None, reasons))
    return ""


def _groups_in_sequence(parent: nn.Module, survey: _Survey) -> Iterator[_Group]:
    children = list(parent._modules.items())
    for (_, layer), (key, relu) in pairwise(children):
        if layer and relu and _kind(layer) and _is_exactly(relu, nn.ReLU):
            yield _Group([layer], relu, parent, key)
    for (_, layer), (_, norm), (_, relu) in zip(children, children[1:], children[2:]):
        if layer and isinstance(norm, _BatchNorm) and isinstance(relu, nn.ReLU):
            survey.refuse((layer, relu), _between(norm))


def _between(norm: nn.Module) -> str:
    return f"a {type(norm).__name__} stands before the ReLU"


def _groups_in_forward(parent: nn.Module, survey: _Survey) -> Iterator[_Group]:
    """Direct children of which every call of one is followed by the other, and none else."""
    children = parent._modules
    layers = {k: m for k, m in children.items() if m and _kind(m)}
    relus = {k: m for k, m in children.items() if m and _is_exactly(m, nn.ReLU)}
    if not layers:
        return
    graph, reason = _usage.trace(parent)
    if graph is None:
        survey.refuse((*layers.values(), *relus.values()), reason)
        return

    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    for key, layer in layers.items():
        users = [user for call in calls[key] for user in call.users]
        if any(map(_is_functional_relu, users)):
            survey.refuse([layer], "its ReLU is a function call, not an nn.ReLU")
        for user in users:
            norm = children.get(str(user.target))
            after = [relus[key] for last in user.users if (key := str(last.target)) in relus]
            if isinstance(norm, _BatchNorm) and after:
                survey.refuse((layer, *after), _between(norm))
    for relu_key, relu in relus.items():
        before = {node for call in calls[relu_key] for node in call.all_input_nodes}
        keys = sorted({str(node.target) for node in before if node.op == "call_module"} & {*layers})
        group = [layers[key] for key in keys]
        values = {node for key in keys for node in calls[key]}
        if sum(child is relu for child in children.values()) > 1:
            survey.refuse((*group, relu), f"its ReLU '{relu_key}' has a second name")
        elif before != values:
            survey.refuse((*group, relu), f"its ReLU '{relu_key}' is also called on other values")
        elif any(len(node.users) > 1 for node in values):
            survey.refuse((*group, relu), "the value before the ReLU is used as well")
        elif group:
            yield _Group(group, relu, parent, relu_key)


def _is_functional_relu(node: fx.Node) -> bool:
    functions = (torch.relu, torch.relu_, F.relu, "relu", "relu_")
    return node.op != "call_module" and node.target in functions
