"""Modules whose forward method leaves out some of its ReLUs, because layers now compute them.

A rewritten module is of a subclass of its own class, of the same name, whose `forward` is the
original source without some calls: `F.relu(self.fc(x))` becomes `self.fc(x)`. Nothing else of it is
fixed: attributes, globals and closures are read when it runs, as before. It runs only in the module
that was fused, while its layers are: other instances, as `type(model)()`, run the original.
"""

from __future__ import annotations
import __future__

import ast
import copyreg
import functools
import linecache
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

_FUTURE = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag,
    __future__.all_feature_names,
    0,
)
_MARK = "_twinfuse_mark"
_NAMES = {"relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_"}
# Set on a module whose class `fuse` changed, so that `unfuse` leaves other fused layers alone.
FUSED = "_twinfuse_fused"
# Set on a module of a rewritten class: the keys of the children that compute its ReLUs.
LAYERS = "_twinfuse_layers"
# The same: attributes that branches ask for, and whether there was something in them.
CHOICES = "_twinfuse_choices"


class Call(NamedTuple):
    """A call in the source of a forward method that applies a ReLU."""

    number: int
    is_method: bool  # `x.relu()`, not `torch.relu(x)`
    text: str


class Rewritten(type):
    """The type of classes that `rewritten` makes; pickles contain what they are made from."""

    native: type[nn.Module]
    calls: tuple[Call, ...]


def _reduce(kind: Any) -> tuple[Any, ...]:
    return rewritten, (kind.native, kind.calls)


copyreg.pickle(Rewritten, _reduce)


def rewritten_of(kind: type) -> Rewritten | None:
    """The rewritten class that `kind` is, or that a class which torch has made derives from."""
    # A subclass that somebody else wrote has methods of its own, and is no such class. What torch
    # makes, for parametrized and for sharded modules, has the module's own class as its last base.
    if "native" not in vars(kind) and kind.__module__.startswith("torch."):
        kind = kind.__bases__[-1]
    return kind if isinstance(kind, Rewritten) and "native" in vars(kind) else None


def native(kind: type) -> Any:
    """The class as its author wrote it."""
    found = rewritten_of(kind)
    return found.native if found else kind


def rewritten(kind: Any, calls: tuple[Call, ...]) -> Any:
    """The subclass of `kind` whose forward method leaves `calls` out.

    Raises:
        RuntimeError: the source of the forward method is not what it was when `calls` were found.
    """
    return _rewritten(kind, kind.forward, calls)


@functools.cache
def _rewritten(kind: Any, forward: FunctionType, calls: tuple[Call, ...]) -> Any:
    found = Source(forward).calls if is_running(forward) else []
    if any(
        call.number >= len(found) or ast.unparse(found[call.number]) != call.text for call in calls
    ):
        raise RuntimeError(
            f"fuse: the forward method of {kind.__name__} is not what it was when the model was "
            "fused: expected one that contains " + ", ".join(call.text for call in calls)
        )
    source = Source(forward)
    code = source.code({id(source.calls[call.number]): _inner(call) for call in calls})
    without = _with_code(source.original, code, source.original.__globals__)
    members = {
        "forward": _chosen(without, forward),
        LAYERS: (),
        CHOICES: (),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "native": kind,
        "calls": calls,
    }
    return Rewritten(kind.__name__, (kind,), members)


def is_fused(layer: object) -> bool:
    """Whether a layer computes the ReLU behind it because `fuse` changed its class."""
    return getattr(layer, FUSED, False)


def _chosen(without: FunctionType, original: FunctionType) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, was_there in getattr(self, CHOICES):
            if (getattr(self, name, None) is not None) is not was_there:
                expected, got = ("a module", "None") if was_there else ("None", "another value")
                raise RuntimeError(
                    f"fuse: {type(self).__name__}.{name}: expected {expected}, as when the model "
                    f"was fused, got {got}: unfuse the model before you change it"
                )
        layers = getattr(self, LAYERS)
        # Where only some are fused, ReLU is applied twice, which changes nothing.
        if layers and all(is_fused(getattr(self, key, None)) for key in layers):
            return without(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward


def why_not(kind: Any) -> str:
    """Why no class can be made of `kind`; empty if one can."""
    if (metaclass := type(kind)) is not type:
        return f"{kind.__name__} has the metaclass {metaclass.__name__}"
    if any("__init_subclass__" in vars(base) for base in kind.__mro__ if base is not object):
        return f"{kind.__name__} registers its subclasses"
    if not is_running(kind.forward):
        return f"the source of the forward method of {kind.__name__} is not available"
    return ""


def marked(kind: Any, mark: Callable[[int, Any], Any]) -> FunctionType:
    """The forward method of `kind` with `mark(index, call)` in the place of every call."""
    original = kind.forward
    return _with_code(original, _marked(original), {**original.__globals__, _MARK: mark})


@functools.cache
def _marked(forward: FunctionType) -> CodeType:
    source = Source(forward)

    def wrap(index: int) -> Callable[[ast.Call], ast.expr]:
        return lambda call: ast.Call(ast.Name(_MARK, ast.Load()), [ast.Constant(index), call], [])

    return source.code({id(call): wrap(index) for index, call in enumerate(source.calls)})


def call_at(kind: Any, index: int, is_method: bool, literal: bool, child: str = "") -> Call | None:
    """The call of that index, if it is clear that it is a ReLU and what it is applied to.

    With `literal` only if all other arguments are literals, too: an attribute might change. With
    `child` it is a call of the child of that name.
    """
    node = Source(kind.forward).calls[index]
    call = Call(index, is_method, ast.unparse(node))
    path = _dotted(node.func)
    if child:
        if path != [next(iter(kind.forward.__code__.co_varnames), ""), child]:
            return None
    elif _is_function_of_torch(kind.forward, path) == is_method:
        return None  # a variable might be another function in another call
    tensor = _inner(call)(node)
    arguments = (*node.args, *(keyword.value for keyword in node.keywords))
    others = (argument for argument in arguments if argument is not tensor)
    if tensor is None or (literal and not all(isinstance(o, ast.Constant) for o in others)):
        return None
    return call


def _dotted(node: ast.AST) -> list[str]:
    """The names of `a.b.c`; empty for other expressions."""
    if isinstance(node, ast.Name):
        return [node.id]
    names = _dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*names, node.attr] if names and isinstance(node, ast.Attribute) else []


def _is_function_of_torch(forward: FunctionType, path: list[str]) -> bool:
    """Whether that is the name that torch gives a ReLU, in a module of torch or imported."""
    code = forward.__code__
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    if not path or path[0] in local or path[-1] not in _NAMES:
        return False
    value = forward.__globals__.get(path[0])
    if len(path) == 1:
        return callable(value)
    is_module = isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch"
    return is_module


def _inner(call: Call) -> Callable[[ast.Call], ast.expr | None]:
    """What takes the tensor out of a call of a ReLU."""

    def inner(node: ast.Call) -> ast.expr | None:
        if call.is_method:
            return node.func.value if isinstance(node.func, ast.Attribute) else None
        named = (keyword.value for keyword in node.keywords if keyword.arg == "input")
        expression = node.args[0] if node.args else next(named, None)
        return None if isinstance(expression, ast.Starred) else expression

    return inner


Replacements = Mapping[int, Callable[[ast.Call], ast.expr | None]]


class _Replace(ast.NodeTransformer):
    def __init__(self, replacements: Replacements) -> None:
        self.replacements = replacements

    def visit_Call(self, node: ast.Call) -> ast.AST:
        replace = self.replacements.get(id(node))
        self.generic_visit(node)
        return (replace(node) or node) if replace else node


class Source:
    """A forward method in the file that it is written in.

    What is compiled is the file without other classes and functions, which take long where there
    are many; names that it imports compile to other code than others.
    """

    def __init__(self, original: FunctionType) -> None:
        self.original = original
        file = original.__code__.co_filename
        lines = linecache.getlines(file, original.__globals__)
        self.tree = ast.parse("".join(lines), file)
        self.function: Any = next(node for node in ast.walk(self.tree) if self._is_function(node))
        self.tree.body = [part for part in self.tree.body if self._is_needed(part)]
        self.calls = [node for node in ast.walk(self.function) if isinstance(node, ast.Call)]

    def _is_function(self, node: ast.AST) -> bool:
        code = self.original.__code__
        place = (code.co_name, code.co_firstlineno)
        return isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == place

    def _is_needed(self, part: ast.stmt) -> bool:
        last = part.end_lineno or part.lineno
        contains = part.lineno <= self.function.lineno <= last
        return contains or not isinstance(part, (ast.ClassDef, ast.FunctionDef))

    def code(self, replacements: Replacements) -> CodeType:
        """Of the method, with some of its calls, by `id`, replaced."""
        _Replace(replacements).visit(self.function)
        old = self.original.__code__
        flags = old.co_flags & _FUTURE
        tree = ast.fix_missing_locations(self.tree)
        whole = compile(tree, old.co_filename, "exec", flags=flags, dont_inherit=True)
        place = (old.co_name, old.co_firstlineno)
        return next(c for c in _codes(whole) if (c.co_name, c.co_firstlineno) == place)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


@functools.cache
def is_running(forward: FunctionType) -> bool:
    """Whether the source of a forward method, compiled, is the code that it has."""
    try:
        source = Source(forward)
        old, new = source.original.__code__, source.code({})
    except (AttributeError, OSError, StopIteration, SyntaxError):
        return False
    parts = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    return all(getattr(old, part) == getattr(new, part) for part in parts)


def _with_code(function: FunctionType, code: CodeType, scope: dict[str, Any]) -> FunctionType:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    closure = tuple(cells[name] for name in code.co_freevars)
    new = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__annotations__ = function.__annotations__
    new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
    return new
