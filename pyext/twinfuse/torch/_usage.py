"""How modules use their children: what `fuse` may rely on.

Replacing a child is safe only if every place that calls it is known. Both questions are answered
conservatively: an answer that cannot be proved is a reason not to fuse.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import sys
import sysconfig
import textwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from twinfuse.torch import _rewrite

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_TORCH = str(Path(torch.__file__).parent)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# What reaches a child without naming it.
_REFLECTION = {"getattr", "vars", "attrgetter", "methodcaller", "__dict__", "__getattr__"}
_REFLECTION |= {"_modules", "modules", "children", "named_modules", "named_children"}
_REFLECTION |= {"get_submodule", "apply"}


def is_plain_sequential(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def calls_nothing(module: nn.Module) -> bool:
    """Whether the module only holds others, which somebody above it calls."""
    return isinstance(module, _CONTAINERS) and "forward" not in vars(type(module))


@functools.cache
def _parsed(kind: type) -> ast.AST | None:
    """The source of a class, with every node's parent set."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def _sources(module: nn.Module) -> list[ast.AST | None]:
    """Of every class that the module inherits methods from, up to `nn.Module`."""
    kinds = _rewrite.native(type(module)).__mro__
    return [_parsed(kind) for kind in kinds if kind not in (nn.Module, object)]


def _parent(node: ast.AST) -> ast.AST:
    return node.parent  # type: ignore[attr-defined]


def _is_called(node: ast.AST) -> bool:
    parent = _parent(node)
    return isinstance(parent, ast.Call) and parent.func is node


def _method(node: ast.AST) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The method that contains `node`."""
    method = None
    while not isinstance(node, ast.Module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            method = node
        node = _parent(node)
    return method


def _method_name(node: ast.AST) -> str:
    method = _method(node)
    return method.name if method else ""


def _loads(module: nn.Module, attribute: str) -> list[ast.Attribute] | None:
    """Where methods of `module` read an attribute of that name; None if its source is missing.

    `__init__` has run before, and the parameters of a layer stay what they are.
    """
    loads = []
    for tree in _sources(module):
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == attribute:
                outer = _parent(node)
                while isinstance(outer, ast.Subscript):
                    outer = _parent(outer)
                parameter = isinstance(outer, ast.Attribute) and outer.attr in ("weight", "bias")
                if (
                    isinstance(node.ctx, ast.Load)
                    and _method_name(node) != "__init__"
                    and not parameter
                ):
                    loads.append(node)
    return loads


def _by_reflection(module: nn.Module) -> str:
    """Why a method of `module` may reach its children without naming them; empty if none does.

    Methods that set parameters up walk over all modules, but call none of them.
    """
    for kind in _rewrite.native(type(module)).__mro__:
        tree = None if kind.__module__.startswith("torch.") or kind is object else _parsed(kind)
        for node in ast.walk(tree) if tree else ():
            name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
            method = _method_name(node)
            sets_up = method.strip("_").startswith(("init", "reset"))
            if name in _REFLECTION and not sets_up:
                return f"{kind.__name__} reaches its children by `{name}`"
    return ""


def _is_own(load: ast.Attribute) -> bool:
    """Whether this is `self.<attribute>`."""
    method = _method(load)
    arguments = (*method.args.posonlyargs, *method.args.args)[:1] if method else ()
    return isinstance(load.value, ast.Name) and any(a.arg == load.value.id for a in arguments)


def _is_torch(load: ast.Attribute) -> bool:
    """Whether this is a function of torch, such as `nn.functional.relu`."""
    value: ast.AST = load.value
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id in ("torch", "nn", "F", "functional")


def _iterated_elements_are_called(loop: ast.AST) -> bool:
    """`for layer in self.layers: ... layer(x)`: the loop variable is only ever called."""
    if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Name):
        return False
    name = loop.target.id
    uses = (n for n in ast.walk(loop) if isinstance(n, ast.Name) and n.id == name)
    return all(_is_called(use) for use in uses if use is not loop.target)


def _is_called_as_a_whole(load: ast.Attribute, in_list: bool) -> bool:
    parent = _parent(load)
    if not in_list:
        return _is_called(load)
    if isinstance(parent, ast.Subscript):
        return not isinstance(parent.slice, ast.Slice) and _is_called(parent)
    if isinstance(parent, ast.Call):
        return getattr(parent.func, "id", "") == "len"
    return _iterated_elements_are_called(parent)


def parts_used(module: nn.Module, attribute: str, in_list: bool) -> str:
    """Why `module` may use more of its child `attribute` than calling it; empty if it does not.

    With `in_list` the child is a ModuleList or ModuleDict, and its elements are what is called.
    """
    name = type(module).__name__
    loads = _loads(module, attribute)
    if loads is None:
        return f"the source of {name} is not available"
    if not loads:
        return f"{name} nowhere calls '{attribute}' by its name"
    if not all(_is_torch(load) or _is_called_as_a_whole(load, in_list) for load in loads):
        return f"{name} may use parts of '{attribute}' by themselves"
    return _by_reflection(module)


def used_outside_forward(module: nn.Module, attribute: str) -> str:
    """Why a method besides `forward` may call child `attribute`; empty if none does."""
    loads = _loads(module, attribute)
    if loads is None:
        return f"the source of {type(module).__name__} is not available"
    if any(_method_name(load) != "forward" and not _is_torch(load) for load in loads):
        return f"{type(module).__name__} uses '{attribute}' outside of its forward method"
    return _by_reflection(module)


def used_from_above(ancestor: nn.Module, attribute: str) -> str:
    """Why `ancestor` may reach a descendant's child of that name; empty if it does not."""
    if is_plain_sequential(ancestor) or calls_nothing(ancestor):
        return ""
    loads = _loads(ancestor, attribute)
    if loads is None:
        return f"the source of {type(ancestor).__name__} is not available"
    if any(not _is_own(load) and not _is_torch(load) for load in loads):
        return f"{type(ancestor).__name__} may reach '{attribute}' by itself"
    return _by_reflection(ancestor)


class _NotProvable(Exception):
    pass


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _changes_or_branches(code: CodeType) -> bool:
    jumps = {*dis.hasjrel, *dis.hasjabs}
    stores = {"STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR"}
    return any(i.opcode in jumps or i.opname in stores for i in dis.get_instructions(code))


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


def _is_torch_or_standard(file: str) -> bool:
    standard = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return standard or file.startswith((_TORCH, __file__, "<frozen ", "<eval_with_key>"))


def _is_of_torch(builtin: Any) -> bool:
    owner = getattr(builtin, "__module__", None) or type(builtin.__self__).__module__
    return owner.partition(".")[0] == "torch"


class Traced(NamedTuple):
    graph: fx.Graph
    calls: dict[fx.Node, int]  # the calls of the forward method that made these nodes, by index


def trace(module: nn.Module) -> tuple[Traced | None, str]:
    """The graph of `module`, its children as leaves, if no call can ever take another one.

    That is so when `forward` has no branch and no loop, calls only its children and torch, and
    changes nothing outside. Otherwise `(None, reason)`.
    """
    kind = _rewrite.native(type(module))
    name = kind.__name__
    original = getattr(kind.forward, "__code__", None)
    if original is None or "forward" in vars(module):
        return None, f"the forward method of {name} was replaced"
    if _changes_or_branches(original):
        return (
            None,
            f"the forward method of {name} has branches, loops or assignments to attributes",
        )
    calls: dict[fx.Node, int] = {}

    def mark(index: int, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            calls.setdefault(value.node, index)
        return value

    forward, root = kind.forward, module
    if not _rewrite.why_not(kind):
        forward = _rewrite.marked(kind, mark)
        # An object with the same attributes, so that the module itself keeps its class.
        root = object.__new__(type(name, (kind,), {"forward": forward}))
        object.__setattr__(root, "__dict__", vars(module))
    place = _place(original)

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        own = _place(frame.f_code) == place  # fx copies the code of methods with keyword arguments
        if event == "call" and not own:
            file = frame.f_code.co_filename
            if file == "<string>" and frame.f_back is not None:  # a named tuple's constructor
                file = frame.f_back.f_code.co_filename
            if not _is_torch_or_standard(file):
                raise _NotProvable(f"the forward method of {name} calls other Python functions")
        elif event == "c_call" and own and not _is_of_torch(argument):
            raise _NotProvable(f"the forward method of {name} calls {argument.__name__}()")

    previous = sys.getprofile()
    try:
        sys.setprofile(watch)
        return Traced(_Tracer().trace(root), calls), ""
    except _NotProvable as error:
        return None, str(error)
    except Exception as error:
        return None, f"the forward method of {name} cannot be traced ({type(error).__name__})"
    finally:
        sys.setprofile(previous)
