"""The graph of a forward method, where it is the same in every call."""

from __future__ import annotations

import dis
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from twinfuse.torch import _options, _rewrite

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
# What decides how all that follows is computed, or whether it has gradients.
_MODES = {"_set_grad_enabled", "set_autocast_enabled", "set_autocast_dtype"}
_TORCH = str(Path(torch.__file__).parent)


class _NotProvable(Exception):
    pass


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _changes_or_branches(code: CodeType) -> bool:
    jumps = {*dis.hasjrel, *dis.hasjabs}
    stores = {"STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR"}
    stores |= {"DELETE_ATTR", "DELETE_GLOBAL", "DELETE_SUBSCR"}
    if not {"__setattr__", "__delattr__", "register_buffer"}.isdisjoint(code.co_names):
        return True
    return any(
        i.opcode in jumps
        or i.opname in stores
        or (i.opname in ("STORE_DEREF", "DELETE_DEREF") and i.argval in code.co_freevars)
        for i in dis.get_instructions(code)
    )


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file


def _is_torch_or_standard(file: str) -> bool:
    return _is_standard(file) or file.startswith((_TORCH, __file__, "<frozen ", "<eval_with_key>"))


def _is_of_torch(builtin: Any) -> bool:
    owner = getattr(builtin, "__module__", None) or type(builtin.__self__).__module__
    return owner.partition(".")[0] == "torch"


class Traced(NamedTuple):
    graph: fx.Graph
    calls: dict[fx.Node, int]  # the calls of the forward method that made these nodes, by index
    choices: _options.Choices  # of branches; with others it would be another graph


def trace(module: nn.Module) -> tuple[Traced | None, str]:
    """The graph of `module`, its children as leaves, if no call can ever take another one.

    That is so when `forward` has no loop and no branch, but on which children there are, calls only
    its children and torch, and changes nothing outside. Otherwise `(None, reason)`.
    """
    kind = _rewrite.native(type(module))
    name = kind.__name__
    original = getattr(kind.forward, "__code__", None)
    if original is None or "forward" in vars(module):
        return None, f"the forward method of {name} was replaced"
    choices: _options.Choices = ()
    if _changes_or_branches(original):
        choices = _options.choices(module)
        if _changes_or_branches(_options.code_of(kind.forward, choices)):
            reason = "has branches, loops or assignments to attributes"
            return None, f"the forward method of {name} {reason}"
        if reason := _rewrite.why_not(kind):  # nobody would see that they change
            return None, reason
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
        object.__setattr__(root, "__dict__", dict(vars(module)))
    place = _place(original)

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        own = _place(frame.f_code) == place  # fx copies the code of methods with keyword arguments
        if event == "call" and not own:
            file = frame.f_code.co_filename
            if file == "<string>" and frame.f_back is not None:  # a named tuple's constructor
                file = frame.f_back.f_code.co_filename
            # What the standard library gets may stay there, as in `queue.put(x)`.
            by_own = frame.f_back is not None and _place(frame.f_back.f_code) == place
            if not _is_torch_or_standard(file) or (by_own and _is_standard(file)):
                raise _NotProvable(f"the forward method of {name} calls other Python functions")
        elif event == "c_call" and argument.__name__ in _MODES:
            raise _NotProvable(f"the forward method of {name} switches gradients or autocast")
        elif event == "c_call" and own and not _is_of_torch(argument):
            raise _NotProvable(f"the forward method of {name} calls {argument.__name__}()")

    previous = sys.getprofile()
    try:
        sys.setprofile(watch)
        return Traced(_Tracer().trace(root), calls, choices), ""
    except _NotProvable as error:
        return None, str(error)
    except Exception as error:
        return None, f"the forward method of {name} cannot be traced ({type(error).__name__})"
    finally:
        if previous is None or callable(previous):
            sys.setprofile(previous)
        else:  # cProfile, before Python 3.12
            previous.enable()
