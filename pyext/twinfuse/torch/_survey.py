"""What can be fused in a model, and why the rest cannot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import module as hooked
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from twinfuse.torch import _members, _norm, _rewrite, _spread, _trace, _usage
from twinfuse.torch._clamp import is_relu
from twinfuse.torch._held import held
from twinfuse.torch.nn import LSTM, ConvReLU1d, ConvReLU2d, LinearReLU, LSTMCell

# What a layer becomes when the ReLU behind it is fused into it.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearReLU,
    nn.Conv1d: ConvReLU1d,
    nn.Conv2d: ConvReLU2d,
}
# Layers that are fused by themselves.
ALONE: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_IN_PLACE = (torch.relu_, "relu_", torch.clamp_, "clamp_", torch.clamp_min_, "clamp_min_")
_RELUS = (torch.relu, F.relu, "relu", torch.relu_, "relu_")
_CLAMPS = (torch.clamp, "clamp", torch.clamp_min, "clamp_min", *_IN_PLACE[2:])

_CALLS = ("call_function", "call_method")

Children = Mapping[str, nn.Module | None]
Path = tuple[tuple[nn.Module, str], ...]  # (ancestor, key of its child), outermost first


class Step(NamedTuple):
    """A child of a Sequential."""

    owner: nn.Module
    key: str
    module: nn.Module | None


class Layer(NamedTuple):
    module: nn.Module
    norm: nn.Module | None = None  # a BatchNorm between the layer and its ReLU
    clamped: bool = False  # the ReLU is a clamp


@dataclass
class Fusion:
    """Children of one module that are to be fused with the ReLUs behind them."""

    parent: nn.Module
    layers: list[Layer]
    relus: dict[str, nn.Module]  # children, by key, that are called for these layers only
    calls: tuple[_rewrite.Call, ...] = ()  # of ReLUs, in the forward method of `parent`
    choices: tuple[tuple[str, bool], ...] = ()  # of branches in it, as they have to stay


@dataclass
class Survey:
    model: nn.Module
    fusions: list[Fusion] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)  # by module id

    def __post_init__(self) -> None:
        modules = list(self.model.modules())
        for spread, kind in _spread.around(self.model).items():
            self.reasons[spread] = f"fuse looks at models before {kind} only"
        self._uses = Counter(id(child) for parent in modules for child in parent._modules.values())
        self._held = {id(value) for module in modules for value in held(module)}
        self._paths: dict[int, list[Path]] = defaultdict(list)
        for path, module in _walk(self.model, ()):
            self._paths[id(module)].append(path)
        self._inside: set[int] = set()  # Sequentials in others, looked at with them
        for parent in modules:
            if id(parent) in self.reasons or id(parent) in self._inside:
                continue
            if _usage.is_plain_sequential(parent):
                self._look_at_sequence(parent)
            elif not _usage.calls_nothing(parent):
                self._look_at_forward(parent)

    def _refuse(self, modules: Iterable[nn.Module], reason: str) -> None:
        for module in modules:
            self.reasons.setdefault(id(module), reason)

    def _look_at_sequence(self, parent: nn.Module) -> None:
        steps = list(self._steps(parent))
        for index, first in enumerate(steps):
            behind = steps[index + 1 : index + 3]
            norm = isinstance(behind[0].module, _BatchNorm) if len(behind) == 2 else False
            last = behind[norm] if behind else first
            layer, relu = first.module, last.module
            if not (layer and relu and kind_of(layer) and is_exactly(relu, nn.ReLU)):
                continue
            found = (first, *behind[: norm + 1])
            found_norm = behind[0].module if norm else None
            owners = {id(step.owner): step.owner for step in found}.values()
            reasons = (
                self._why_not(layer),
                self._why_not_norm(layer, found_norm),
                _why_not_relu(relu),
                *(_reach_into_sequential(path) for o in owners for path in self._paths[id(o)]),
                *(self._why_held(o, *(step.module for step in found)) for o in owners),
            )
            if reason := next(filter(None, reasons), ""):
                self._refuse((layer, relu), reason)
            else:
                self.fusions.append(
                    Fusion(last.owner, [Layer(layer, found_norm)], {last.key: relu})
                )

    def _steps(self, parent: nn.Module) -> Iterator[Step]:
        """What a Sequential calls, one after another, and what Sequentials inside of it call."""
        for key, child in parent._modules.items():
            if child is not None and self._is_part(child):
                self._inside.add(id(child))
                yield from self._steps(child)
            else:
                yield Step(parent, key, child)

    def _is_part(self, child: nn.Module) -> bool:
        """Whether a child of a Sequential is one, too, that nobody can tell from its parts."""
        if not _usage.is_plain_sequential(child) or self._uses[id(child)] > 1:
            return False
        return not any(getattr(child, hooks) for hooks in _HOOKS)

    def _look_at_forward(self, parent: nn.Module) -> None:
        """Find children of which every call is followed by a ReLU, and by nothing else."""
        children = parent._modules
        layers = {k: m for k, m in children.items() if m and kind_of(m)}
        relus = {k: m for k, m in children.items() if m and is_exactly(m, nn.ReLU)}
        if not layers:
            return
        traced, reason = None, _usage.own_methods(parent)
        if not reason:
            traced, reason = _trace.trace(parent)
        if traced is None:
            self._refuse((*layers.values(), *relus.values()), reason)
            return

        calls: dict[str, list[fx.Node]] = defaultdict(list)
        for node in traced.graph.nodes:
            calls[_child(node)].append(node)
        followed: dict[str, list[fx.Node]] = {}  # by key of a layer: the ReLUs behind its calls
        norms: dict[str, nn.Module | None] = {}
        for key, layer in layers.items():
            norm_key = _norm_behind(calls, key, children)
            norms[key] = norm = children.get(norm_key)
            found, reason = _relus_behind(calls[norm_key or key], children)
            reasons = (
                reason,
                self._why_not(layer),
                self._reached(parent, key),
                self._why_not_norm(layer, norm),
                self._reached(parent, norm_key) if norm else "",
                _why_not_clamps(found, norm),
                self._why_held(parent, layer, norm),
            )
            if reason := next(filter(None, reasons), ""):
                self._refuse([layer], reason)
            else:
                followed[key] = found
        cuts = {node: _cut(parent, traced, node) for found in followed.values() for node in found}

        while followed:
            heads = {node for found in followed.values() for node in found}
            whole = {
                key: relu
                for key, relu in relus.items()
                if heads.issuperset(calls[key]) and self._may_replace(parent, key, calls[key])
            }
            rest = [node for node in cuts if node in heads and _child(node) not in whole]
            stuck = {
                key: next(cut for node in found if isinstance(cut := cuts[node], str))
                for key, found in followed.items()
                if any(node in rest and isinstance(cuts[node], str) for node in found)
            }
            if not stuck:
                fused = [
                    Layer(layers[key], norms[key], _is_clamp(found[0]))
                    for key, found in followed.items()
                ]
                out = tuple(cut for node in rest if isinstance(cut := cuts[node], _rewrite.Call))
                self.fusions.append(Fusion(parent, fused, whole, out, traced.choices))
                break
            for key, reason in stuck.items():
                self._refuse([layers[key]], reason)
                del followed[key]
        for key, relu in relus.items():
            if any(node in cuts for node in calls[key]):
                self._refuse([relu], "it is called on other values as well")

    def _may_replace(self, parent: nn.Module, key: str, calls: list[fx.Node]) -> bool:
        """Whether a ReLU has no uses but these calls."""
        names = sum(child is parent._modules[key] for child in parent._modules.values())
        relu = parent._modules[key]
        reached = self._reached(parent, key) or self._why_held(parent, relu)
        return bool(calls) and names == 1 and not reached

    def _why_not(self, layer: nn.Module) -> str:
        kind = kind_of(layer)
        assert kind is not None
        if self._uses[id(layer)] > 1:
            return f"the {kind.__name__} is used in more than one place"
        if any(getattr(layer, hooks) for hooks in _HOOKS if hooks != "_forward_pre_hooks"):
            return f"hooks of the {kind.__name__} would see the value after the ReLU"
        if any(getattr(hooked, f"_global{hooks}") for hooks in _HOOKS):
            return "hooks of all modules would see the value after the ReLU"
        return ""

    def _why_not_norm(self, layer: nn.Module, norm: nn.Module | None) -> str:
        if norm is None:
            return ""
        known = next((b for a, b in _norm.BEHIND.items() if is_exactly(layer, a)), None)
        if known is None or not is_exactly(norm, known):
            return _between(norm)
        name = type(norm).__name__
        if self._uses[id(norm)] > 1:
            return f"the {name} behind it is used in more than one place"
        if any(getattr(norm, hooks) for hooks in _HOOKS):
            return f"the {name} behind it has hooks"
        return "" if norm.running_var is not None else f"the {name} behind it has no statistics"

    def _why_held(self, parent: nn.Module, *parts: nn.Module | None) -> str:
        """Why somebody may get at children of `parent` without their names."""
        for path in self._paths[id(parent)]:
            modules = (*parts, parent, *(above for above, _ in path))
            if held_one := next((m for m in modules if id(m) in self._held), None):
                return f"an attribute holds the {type(held_one).__name__}"
            reasons = [_usage.hands_on(above, key) for above, key in (*path, (parent, ""))]
            if reason := next(filter(None, reasons), ""):
                return reason
        return ""

    def _reached(self, parent: nn.Module, key: str) -> str:
        """Why a method but `forward`, or a module above, may call that child by itself."""
        reasons = [_usage.used_outside_forward(parent, key)]
        for path in self._paths[id(parent)]:
            reasons += [_usage.used_from_above(above, key) for above, _ in path]
            if _usage.has_elements(parent):
                reasons.append(_reach_into_sequential(path))
        return next(filter(None, reasons), "")


def kind_of(module: nn.Module | None) -> type[nn.Module] | None:
    """Which of the classes that can be fused a module is of, if it is of no subclass."""
    return next((kind for kind in FUSED if is_exactly(module, kind)), None)


def alone(module: nn.Module) -> type[nn.Module] | None:
    """Which of the classes that are fused by themselves a module is of."""
    return next((kind for kind in ALONE if is_exactly(module, kind)), None)


def is_exactly(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    if (
        module is None
        or not _members.COMPUTES.isdisjoint(vars(module))
        or _members.is_patched(kind)
    ):
        return False
    parametrized = parametrize.is_parametrized(module) and type(module).__bases__ == (kind,)
    return type(module) is kind or parametrized


def _walk(module: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    """Every module by every path that leads to it."""
    yield path, module
    for key, child in module._modules.items():
        if child is not None and all(child is not ancestor for ancestor, _ in path):
            yield from _walk(child, (*path, (module, key)))


def _reach_into_sequential(path: Path) -> str:
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


def _why_not_relu(relu: nn.Module) -> str:
    return "the ReLU has hooks" if any(getattr(relu, hooks) for hooks in _HOOKS) else ""


def _between(norm: nn.Module) -> str:
    return f"a {type(norm).__name__} stands before the ReLU"


def _child(node: fx.Node) -> str:
    """The key of the child that is called; empty if none is."""
    return str(node.target) if node.op == "call_module" else ""


def _norm_behind(calls: Mapping[str, list[fx.Node]], key: str, children: Children) -> str:
    """The key of the BatchNorm that all values of a child go to, and no other; empty without."""
    users = [user for call in calls[key] for user in call.users]
    keys = {_child(user) for user in users}
    norm = keys.pop() if len(keys) == 1 else ""
    alone = set(users) == set(calls[norm]) and all(len(call.users) == 1 for call in calls[key])
    return norm if alone and isinstance(children.get(norm), _BatchNorm) else ""


def _relus_behind(calls: list[fx.Node], children: Children) -> tuple[list[fx.Node], str]:
    """The ReLU behind each of a layer's calls, or why there is not one for each."""
    for call in calls:
        if reason := _why_not_followed(call, children):
            return [], reason
    return [next(iter(call.users)) for call in calls], "" if calls else "no ReLU follows"


def _why_not_followed(call: fx.Node, children: Children) -> str:
    """Why it is not certain that only one ReLU sees the value of that call."""
    relus = _relus(call, children)
    if not relus:
        return "no ReLU follows"
    first, *others = call.users
    # Whoever comes after a ReLU in place sees its result.
    in_place = first.op != "call_module" and first.target in _IN_PLACE
    if first is not relus[0] or (others and not in_place):
        return "the value before the ReLU is used as well"
    relu = children.get(_child(first))
    return _why_not_relu(relu) if relu else ""


def _relus(value: fx.Node, children: Children) -> list[fx.Node]:
    return [user for user in value.users if _is_relu(user, children)]


def _is_relu(node: fx.Node, children: Children) -> bool:
    if node.op == "call_module":
        return is_exactly(children.get(str(node.target)), nn.ReLU)
    return _is_clamp(node) or (node.op in _CALLS and node.target in _RELUS)


def _is_clamp(node: fx.Node) -> bool:
    """Whether a call is `clamp(min=0)`."""
    return node.op in _CALLS and node.target in _CLAMPS and is_relu(node.args, node.kwargs)


def _why_not_clamps(found: list[fx.Node], norm: nn.Module | None) -> str:
    clamps = [_is_clamp(node) for node in found]
    if any(clamps) and (norm or not all(clamps)):
        return f"a clamp stands behind its {type(norm).__name__ if norm else 'ReLU'}"
    return ""


def _cut(parent: nn.Module, traced: _trace.Traced, relu: fx.Node) -> _rewrite.Call | str:
    """Where the source of the forward method of `parent` calls that ReLU, or why it must stay."""
    kind = _rewrite.native(type(parent))
    if reason := _rewrite.why_not(kind):
        return reason
    if relu in traced.calls:
        place = traced.calls[relu], relu.op == "call_method"
        call = _rewrite.call_at(kind, *place, literal=_is_clamp(relu), child=_child(relu))
        if call:
            return call
    return f"it is not clear where the forward method of {kind.__name__} calls its ReLU"
