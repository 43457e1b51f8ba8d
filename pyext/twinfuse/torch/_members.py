"""Whether the methods of a class are those in its source, or somebody has set others since."""

from __future__ import annotations

import ast
import os
import sys
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from twinfuse.torch._held import parts

# Methods that somebody may have replaced in one module, or in a class of torch.
COMPUTES = {"forward", "_conv_forward"}
# The members of classes that were found to be as written.
_checked: weakref.WeakKeyDictionary[type, list[Any]] = weakref.WeakKeyDictionary()


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether somebody has replaced what a class of torch computes, for all modules of it."""
    found = ((kind, name) for name in COMPUTES if hasattr(kind, name))
    for owner, name in (*found, (nn.Module, "__call__"), (nn.Module, "_call_impl")):
        scope = getattr(getattr(owner, name), "__globals__", None)
        if scope is not vars(sys.modules[owner.__module__]):
            return True
    return False


def replaced_in(module: nn.Module) -> str:
    """A method of its class that one module has another function for; empty if there is none."""
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, type) and hasattr(type(module), name):
            return name
    return ""


def are_of(kind: type, tree: ast.Module) -> bool:
    """Whether each method of `kind` is one of `tree`, the source of the class."""
    members = list(vars(kind).values())
    before = _checked.get(kind, [])
    if len(before) == len(members) and all(map(_is_same, before, members)):
        return True
    written = _lines(tree)
    if not all(_is_written(kind, name, written) for name in vars(kind)):
        return False
    _checked[kind] = members
    return True


def _is_same(one: Any, other: Any) -> bool:
    return one is other


def _lines(tree: ast.Module) -> dict[int, tuple[str, bool]]:
    """The names of functions by their first lines, and whether something decorates them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            found[node.lineno] = "<lambda>", False
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[first] = node.name, bool(node.decorator_list)
    return found


def _is_written(kind: type, name: str, written: dict[int, tuple[str, bool]]) -> bool:
    member = vars(kind)[name]
    # Decorators of classes add some of these, and only a call may call layers.
    if (name.startswith("__") and name != "__call__") or isinstance(member, staticmethod):
        return True
    if not isinstance(member, (FunctionType, classmethod)) and not hasattr(member, "__get__"):
        return True
    plain = (name, False) in written.values()
    found = [member] if plain else _functions(member, set())
    return any(_is_at(function, kind, written) for function in found)


def _is_at(function: Any, kind: type, written: dict[int, tuple[str, bool]]) -> bool:
    code = getattr(function, "__code__", None)
    module = sys.modules.get(kind.__module__)
    if code is None or module is None or function.__globals__ is not vars(module):
        return False
    file = getattr(module, "__file__", None)
    name, _ = written.get(code.co_firstlineno, ("", False))
    same = file is None or os.path.basename(code.co_filename) == os.path.basename(file)
    return same and name == code.co_name


def _functions(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    """The functions that a decorated one, a property or the like is made of."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        yield value
    names = ("__func__", "__wrapped__", "fget", "fset", "fdel", "func")
    inner = (getattr(value, name, None) for name in names)
    for part in (*inner, *parts(value)):
        if part is not None and not isinstance(part, type):
            yield from _functions(part, seen)
