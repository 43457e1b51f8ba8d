"""What modules hold besides their children, parameters and buffers."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))


def held(module: nn.Module) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors in attributes of `module`, also in containers and functions in them."""
    seen: set[int] = set()
    for name, value in vars(module).items():
        if name not in _OWN and not name.startswith("_twinfuse"):
            yield from _inside(value, seen)


def _inside(value: Any, seen: set[int]) -> Iterator[nn.Module | Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (nn.Module, Tensor)):
        yield value
    for part in _parts(value):
        yield from _inside(part, seen)


def _parts(value: Any) -> tuple[Any, ...]:
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
    if isinstance(value, types.SimpleNamespace) or is_dataclass(value):
        return tuple(getattr(value, "__dict__", {}).values())
    if isinstance(value, types.FunctionType):
        return *(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__
    if isinstance(value, types.CellType):
        try:
            return (value.cell_contents,)
        except ValueError:  # it is empty
            return ()
    return ()
