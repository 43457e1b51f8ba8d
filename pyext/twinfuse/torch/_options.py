"""Branches that depend on nothing but which optional children a module has.

As in residual networks: `if self.shortcut is not None: x = self.shortcut(x)`. In one model they
go the same way as long as nobody sets such an attribute, which fused modules look at in each call.
"""

from __future__ import annotations

import ast
import dis
import functools
import re
from collections import Counter
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from twinfuse.torch import _rewrite

Choices = tuple[tuple[str, bool], ...]  # attributes, and whether there is something in them


def choices(module: nn.Module) -> Choices:
    """What decides such branches in the forward method of `module`, as it is now."""
    forward = _rewrite.native(type(module)).forward
    values = ((name, getattr(module, name, module)) for name in _optional(forward))
    return tuple((n, v is not None) for n, v in values if v is None or n in module._modules)


@functools.cache
def _optional(forward: FunctionType) -> tuple[str, ...]:
    """Attributes with which a forward method does nothing but call them and ask for None."""
    asks = (i.opname == "IS_OP" or "NONE" in i.opname for i in dis.get_instructions(forward))
    if not any(asks) or not _rewrite.is_running(forward):
        return ()
    source = _rewrite.Source(forward)
    known, reads = Counter[str](), Counter[str]()
    for node in ast.walk(source.function):
        if isinstance(node, (ast.If, ast.IfExp)):
            known[_asked_for(node.test, forward)] += 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            known[node.func.attr] += _is_own(node.func, forward)
        elif isinstance(node, ast.Attribute):
            reads[node.attr] += _is_own(node, forward)
    return tuple(name for name in reads if reads[name] == known[name])


@functools.cache
def code_of(forward: FunctionType, choices: Choices) -> CodeType:
    """The code of a forward method, of such branches only the ones that are taken."""
    if not choices:
        return forward.__code__
    source = _rewrite.Source(forward)
    _Decide(forward, dict(choices)).visit(source.function)
    return source.code({})


class _Decide(ast.NodeTransformer):
    def __init__(self, forward: FunctionType, choices: dict[str, bool]) -> None:
        self._forward, self._choices = forward, choices

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        taken = self._taken(node)
        return node if taken is None else taken or ast.Pass()

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return self._taken(node) or node

    def _taken(self, node: ast.If | ast.IfExp) -> Any:
        name = _asked_for(node.test, self._forward)
        if name not in self._choices:
            return None
        wanted = isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.IsNot)
        return node.body if self._choices[name] == wanted else node.orelse


def _asked_for(test: ast.expr, forward: FunctionType) -> str:
    """The attribute of the module that a condition compares with None; empty for another one."""
    found = re.fullmatch(rf"{_self(forward)}\.(\w+) is (?:not )?None", ast.unparse(test))
    return found[1] if found else ""


def _is_own(node: ast.Attribute, forward: FunctionType) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == _self(forward)


def _self(forward: FunctionType) -> str:
    return "".join(forward.__code__.co_varnames[:1])
