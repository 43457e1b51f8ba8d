"""How modules use their children: what `fuse` may rely on.

Replacing a child is safe only if every place that calls it is known. Both questions are answered
conservatively: an answer that cannot be proved is a reason not to fuse.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from typing import Generic

from torch import nn
from torch.nn.utils import parametrize

from twinfuse.torch import _members, _rewrite

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# What reaches a child without naming it.
_REFLECTION = {"getattr", "vars", "attrgetter", "methodcaller", "__dict__", "__getattr__"}
_REFLECTION |= {"_modules", "modules", "children", "named_modules", "named_children"}
_REFLECTION |= {"get_submodule", "apply", "__getattribute__", "getmembers", "getattr_static"}

# What a list or dictionary of modules gives elements by.
_ELEMENTS = {"items", "values", "get", "pop", "__getitem__", "__iter__"}
# Where classes are from that call a module as a whole, if at all: of transformers the bases of its
# models, not the models.
_LIBRARIES = (
    "torch.",
    "transformers.modeling_utils",
    "transformers.utils.",
    "transformers.integrations.",
    "transformers.distributed.",
)
_KNOWN = {nn.Sequential, *_CONTAINERS, nn.Module, object, Generic}
# Methods of containers that call no element. `__dict__` and `__weakref__` are in all classes.
_HARMLESS = {"__init__", "extra_repr", "forward", "__dict__", "__weakref__"}


def has_elements(module: nn.Module) -> bool:
    """Whether children of `module` can be had by an index or a loop, without their names."""
    return isinstance(module, (nn.Sequential, *_CONTAINERS))


def is_plain_sequential(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
        and not own_methods(module)
        and not _members.is_patched(nn.Sequential)
    )


def calls_nothing(module: nn.Module) -> bool:
    """Whether the module only holds others, which somebody above it calls."""
    return (
        isinstance(module, _CONTAINERS)
        and type(module).forward is nn.Module.forward
        and "forward" not in vars(module)
        and not own_methods(module)
    )


def own_methods(module: nn.Module) -> str:
    """Why a container may use its elements, which have no names; empty if it does not."""
    if not has_elements(module):
        return ""
    for kind in _rewrite.native(type(module)).__mro__:
        if kind in _KNOWN or _is_parametrized(kind):
            continue
        for name, member in vars(kind).items():
            is_method = callable(member) or hasattr(member, "__get__")
            if is_method and name not in _HARMLESS and not name.startswith(("init", "reset")):
                return f"{kind.__name__} has a method of its own: {name}"
    return ""


def _is_library(kind: type) -> bool:
    """Whether a class only loads, saves and sets up modules, by whatever way it reaches them."""
    return kind.__module__.startswith(_LIBRARIES)


def _is_parametrized(kind: type) -> bool:
    return kind.__module__ == parametrize.__name__


@functools.cache
def _parsed(kind: type) -> ast.Module | None:
    """The source of a class, with every node's parent set."""
    try:
        lines, first = inspect.getsourcelines(kind)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, first - 1)
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def _is_known(kind: type) -> bool:
    """Whether the source of a class is there and has all of its methods."""
    tree = _parsed(kind)
    return tree is not None and (_is_library(kind) or _members.are_of(kind, tree))


def _nodes(kind: type) -> Iterable[ast.AST]:
    tree = _parsed(kind)
    return ast.walk(tree) if tree else ()


def _kinds(module: nn.Module) -> list[type]:
    """Every class that the module inherits methods from, up to `nn.Module`."""
    kinds = _rewrite.native(type(module)).__mro__
    return [kind for kind in kinds if kind not in (nn.Module, object)]


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


@functools.cache
def _reads(kind: type) -> dict[str, list[ast.Attribute]] | None:
    """Where methods of a class read which attributes; None if its source is missing.

    `__init__` has run before, and the parameters of a layer stay what they are.
    """
    if _parsed(kind) is None:
        return None
    reads = defaultdict(list)
    for node in _nodes(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            outer = _parent(node)
            while isinstance(outer, ast.Subscript):
                outer = _parent(outer)
            parameter = isinstance(outer, ast.Attribute) and outer.attr in ("weight", "bias")
            if not parameter and _method_name(node) != "__init__":
                reads[node.attr].append(node)
    return dict(reads)


def _loads(module: nn.Module, attribute: str) -> list[ast.Attribute] | None:
    """Where methods of `module` read an attribute of that name; None if its source is missing."""
    kinds = _kinds(module)
    if not all(map(_is_known, kinds)):
        return None
    reads = [_reads(kind) for kind in kinds]
    return [load for read in reads for load in (read or {}).get(attribute, ())]


def _by_reflection(module: nn.Module) -> str:
    """Why a method of `module` may reach its children without naming them; empty if none does."""
    for kind in _kinds(module):
        if not _is_library(kind) and (name := _reflection(kind)):
            return f"{kind.__name__} reaches its children by `{name}`"
    return ""


@functools.cache
def _reflection(kind: type) -> str:
    """By what methods of a class may reach children that they do not name; empty if by nothing.

    Methods that set parameters up walk over all modules, but call none of them.
    """
    for node in _nodes(kind):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
        found = name in _REFLECTION or (isinstance(node, ast.Name) and name in ("eval", "exec"))
        if found and not _sets_up(node):
            return name
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
    uses = (n for n in ast.walk(_around(loop)) if isinstance(n, ast.Name) and n.id == name)
    return all(_is_called(use) for use in uses if isinstance(use.ctx, ast.Load))


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
    loads = [load for load in loads if not _is_torch(load)]
    if any(_method_name(load) != "forward" for load in loads):
        return f"{type(module).__name__} uses '{attribute}' outside of its forward method"
    # What a variable or a list holds may be another child in another call. Comparing is no use.
    uses = [load for load in loads if not isinstance(_parent(load), ast.Compare)]
    if not all(_is_own(load) and _is_called(load) for load in uses):
        return f"{type(module).__name__} uses '{attribute}' without calling it"
    return own_methods(module) or _by_reflection(module)


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


def hands_on(module: nn.Module, attribute: str = "") -> str:
    """Why a function elsewhere may get `module`, or its child of that name; empty if none does."""
    if reason := own_methods(module):
        return reason
    name = type(module).__name__
    if method := _members.replaced_in(module):
        return f"the method {method} of {name} was replaced"
    if is_plain_sequential(module) or calls_nothing(module):
        return ""
    loads = _loads(module, attribute) if attribute else []
    if loads is None or not all(map(_is_known, _kinds(module))):
        return f"the source of {name} is not available"
    if attribute and not loads and has_elements(module):
        return f"{name} nowhere calls '{attribute}' by its name"
    if not all(_is_torch(load) or _stays(load) for load in loads):
        return f"{name} hands '{attribute}' on"
    for kind in _kinds(module):
        if not _is_library(kind) and (method := _hands_itself_on(kind)):
            return f"{kind.__name__} hands itself on in {method}"
    return ""


@functools.cache
def _hands_itself_on(kind: type) -> str:
    """The method of a class that gives its own module to others; empty if none does."""
    for node in _nodes(kind):
        is_own = isinstance(node, ast.Name) and _is_self(node) and not _sets_up(node)
        if is_own and not _stays(node) and not isinstance(_parent(node), ast.Return):
            return _method_name(node)
    return ""


def _sets_up(node: ast.AST) -> bool:
    return _method_name(node).strip("_").startswith(("init", "post_init", "reset"))


def _is_self(name: ast.Name) -> bool:
    method = _method(name)
    if method is None or method.name == "__new__" or not isinstance(name.ctx, ast.Load):
        return False
    decorators = {getattr(decorator, "id", "") for decorator in method.decorator_list}
    arguments = (*method.args.posonlyargs, *method.args.args)[:1]
    bound = decorators.isdisjoint({"staticmethod", "classmethod"})
    return bound and any(argument.arg == name.id for argument in arguments)


def _stays(load: ast.AST) -> bool:
    """Whether a module, or one of a list, is only called or asked for attributes."""
    parent = _parent(load)
    if isinstance(parent, ast.Subscript) and parent.value is load:
        return not isinstance(parent.slice, ast.Slice) and _stays(parent)
    if isinstance(parent, ast.Call) and parent.func is not load:
        known = getattr(parent.func, "id", "")
        if known in ("enumerate", "reversed") and isinstance(outer := _parent(parent), ast.For):
            return _elements_stay(outer)
        return known in ("len", "super", "type", "isinstance")
    if isinstance(parent, ast.For):
        return _elements_stay(parent)
    if isinstance(parent, ast.Attribute) and parent.attr in _ELEMENTS:
        call, loop = _parent(parent), _parent(_parent(parent))
        return isinstance(loop, ast.For) and loop.iter is call and _elements_stay(loop)
    return isinstance(parent, (ast.Attribute, ast.Call, ast.Compare))


def _elements_stay(loop: ast.For) -> bool:
    # `for index, layer in enumerate(...)` and `for name, layer in layers.items()`
    target = loop.target.elts[-1] if isinstance(loop.target, ast.Tuple) else loop.target
    names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
    uses = (n for n in ast.walk(_around(loop)) if isinstance(n, ast.Name) and n.id in names)
    return all(_stays(use) for use in uses if isinstance(use.ctx, ast.Load))


def _around(loop: ast.For) -> ast.AST:
    """Where the variable of a loop is known, which is after it, too."""
    return _method(loop) or loop
