"""What modules hold besides their children, parameters and buffers."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))
_OPAQUE = {"torch", "numpy", "builtins"}


def held(module: nn.Module) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors in attributes of `module`, also in containers and functions in them."""
    seen: set[int] = set()
    for name, value in vars(module).items():
        if name not in _OWN and not name.startswith("_twinfuse"):
            yield from _inside(value, seen)


def _inside(value: Any, seen: set[int]) -> Iterator[nn.Module | Tensor]:
    waiting = [value]  # no recursion, as objects may be linked in long chains
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            waiting += [child for child in value._modules.values() if child is not None]
        if isinstance(value, (nn.Module, Tensor)):
            yield value
        else:
            waiting += parts(value)


def parts(value: Any) -> tuple[Any, ...]:
    """What a container, a function or a reference has inside."""
    if isinstance(value, Mapping):
        return *value.keys(), *value.values()
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return tuple(value)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, types.FunctionType):
        return *(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__
    if isinstance(value, types.CellType):
        try:
            return (value.cell_contents,)
        except ValueError:  # it is empty
            return ()
    return () if _is_opaque(type(value)) else _attributes(value)


def _is_opaque(kind: type) -> bool:
    """Whether objects of a class have no attributes that users of a model have set."""
    package = str(kind.__module__).partition(".")[0]
    if kind is types.SimpleNamespace:
        return False
    return issubclass(kind, type) or package in _OPAQUE or package in sys.stdlib_module_names


def _attributes(value: Any) -> tuple[Any, ...]:
    found = list(getattr(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        slots = (m for m in vars(kind).values() if isinstance(m, types.MemberDescriptorType))
        for slot in slots:
            with contextlib.suppress(AttributeError):  # it is empty
                found.append(slot.__get__(value))
    return tuple(found)
