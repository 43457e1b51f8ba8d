"""Tensors that wait for whoever uses them first: a ReLU fuses with them, all else gets plain ones.

Torch functions come here by `__torch_function__`. A first use but by a ReLU makes the object itself
a plain tensor. What takes tensors without asking Python, as `autograd.Function.apply` and pybind
functions do, gets at values by `__torch_dispatch__`, and at gradients by the node that a waiting
tensor has in the graph. Where that has happened, or a ReLU has fused, a tensor cannot become plain
for all who know it: it is kept, and stands for a plain one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Call", "Deferred", "settled"]

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]

_without_overrides = torch._C.DisableTorchFunctionSubclass

_CLAMPS = {torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min}
_CLAMPS_IN_PLACE = {torch.clamp_, Tensor.clamp_, torch.clamp_min_, Tensor.clamp_min_}
_IN_PLACE = {torch.relu_, Tensor.relu_} | _CLAMPS_IN_PLACE
_RELUS = {F.relu, torch.relu, Tensor.relu} | _CLAMPS | _IN_PLACE


def _getters(names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names.split()}


# What is known without values.
_METADATA = _getters(
    "shape ndim dtype layout device itemsize nbytes requires_grad is_leaf is_cpu is_cuda is_meta "
    "is_mps is_nested is_quantized is_sparse is_sparse_csr is_xpu"
) | {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, torch.numel),
    *(Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous, Tensor.element_size),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    *(Tensor.is_signed, Tensor.is_conj, Tensor.is_neg, Tensor.is_inference, Tensor.get_device),
    Tensor.__len__,
}
# What is about the object; the second is set by whoever changes a tensor in place.
_OWN = {Tensor.__hash__, vars(torch._C.TensorBase)["_backward_hooks"].__set__}
# What asks for the place of a tensor in the graph.
_OBSERVERS = _getters("grad grad_fn output_nr retains_grad _backward_hooks") | {
    *(Tensor.retain_grad, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
}
# These ask it of what they are given as `inputs`.
_DIFFERENTIATE = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}

_TRACED = (
    "deferred Linear: output: expected it to be used before torch.jit.trace, or the whole model to "
    "be traced, got a trace that takes it: unfuse the layer"
)
_CHANGED = (
    "deferred Linear: output: expected one that is not changed in place while an autograd.Function "
    "or C++ code uses it, got one that is: unfuse the layer"
)


class Call:
    """What a tensor waits for, and what has become of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_fused = False  # a ReLU has taken it
        self.kept: Tensor | None = None  # what the tensor stands for
        self.raw: Tensor | None = None  # the values that others got first, without a graph
        self.node: weakref.ref[Any] | None = None  # of the tensor, in the graph
        self._version = 0

    def tensor(self) -> Deferred:
        """A new tensor that waits for this call."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """The result, as if the call had been made at once.

        Raises:
            RuntimeError: what it is computed from is not what it was.
        """
        raise NotImplementedError

    def relu(self, limits: Arguments | None) -> Tensor | None:
        """As `plain`, with a ReLU behind it, or with a clamp of these arguments.

        None where the two cannot be one call.
        """
        raise NotImplementedError

    def keep(self, plain: Tensor) -> Tensor:
        if self.raw is not None:
            plain.data = self.raw
        self.kept, self._version = plain, plain._version
        return plain

    def check_kept(self) -> None:
        """Refuse to go on where a change of `kept` would have to be seen, but is not."""
        if self.kept is not None and self.kept._version != self._version:
            raise RuntimeError(_CHANGED)


class Deferred(Tensor):
    """The result of a call that is made when it is used."""

    _call: Call

    @staticmethod
    def waiting(call: Call, shape: tuple[int, ...], like: Tensor) -> Deferred:
        """A contiguous one of that shape, without a node in the graph."""
        make: Any = Tensor._make_wrapper_subclass
        made: Deferred = make(Deferred, shape, dtype=like.dtype, device=like.device)
        # C++ that asks for its memory would get a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(made)
        made._call = call
        return made

    @staticmethod
    def hide_from_dynamo() -> None:
        """Let compiled code call what follows, which it cannot trace; imports the compiler."""
        function: Any = vars(Deferred)["__torch_function__"].__func__
        if not hasattr(function, "_torchdynamo_disable"):
            reason = "the output of a deferred Linear is no input of a whole graph"
            hidden = torch.compiler.disable(function, reason=reason)
            Deferred.__torch_function__ = classmethod(hidden)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if call := _call(first):
            if func in _OWN or (func in _METADATA and call.kept is None):
                with _without_overrides():
                    return func(*args, **kwargs)
            if func in _RELUS and (output := _relu(first, call, func, args, kwargs)) is not None:
                return output
        for lazy in _observed(func, args, kwargs):
            if settled(lazy) is not lazy:
                name = resolve_name(func) or func.__name__
                raise RuntimeError(
                    f"{name}: expected the output of a deferred Linear before it is used, got one "
                    "that a fused ReLU, an autograd.Function or C++ code has used: unfuse the layer"
                )
        return func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        parameters = func._schema.arguments
        values = {**dict(zip((parameter.name for parameter in parameters), args)), **kwargs}
        written = [values.get(p.name) for p in parameters if p.alias_info and p.alias_info.is_write]
        if any(type(leaf) is Deferred for leaf in tree_leaves(written)):
            raise RuntimeError(
                f"{func}: expected that only Python changes the output of a deferred Linear in "
                "place, got a call by C++ code: unfuse the layer"
            )
        args, kwargs = tree_map_only(Deferred, _raw, (args, dict(kwargs)))
        return func(*args, **kwargs)


def settled(lazy: Tensor) -> Tensor:
    """The plain tensor for a deferred one: the object itself, if it can become one.

    Raises:
        RuntimeError: what it is computed from is not what it was.
    """
    call = _call(lazy)
    if call is None:
        return lazy
    with call.lock:
        if _call(lazy) is None:  # another thread had the lock
            return lazy
        _check(lazy, call)
        if call.kept is not None:
            return call.kept
        plain = call.plain()
        if call.is_fused or call.raw is not None or not _exchange(lazy, plain):
            return call.keep(plain)
        del plain  # what `lazy` was, and with it the node, unless that is in use elsewhere
        if call.node is None or call.node() is None:
            return lazy
        plain = call.tensor()
        _exchange(plain, lazy)
        return call.keep(plain)


def _call(value: Any) -> Call | None:
    """What a tensor waits for, if it does."""
    return vars(value).get("_call") if type(value) is Deferred else None


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list, dict)):
        return tree_map_only(Deferred, settled, value)
    return settled(value)


def _raw(lazy: Deferred) -> Tensor:
    """The values for C++, below the graph."""
    call = lazy._call
    with call.lock:
        _check(lazy, call)
        if call.kept is not None:
            return call.kept.detach()
        if call.raw is None:
            call.raw = call.plain()
        return call.raw


def _observed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Deferred]:
    """The deferred tensors that `func` asks for their place in the graph."""
    if func in _OBSERVERS:
        values: Any = args[:1]
    elif func in _DIFFERENTIATE:
        values = kwargs["inputs"] if "inputs" in kwargs else args[1:2]
    else:
        return []
    return [leaf for leaf in tree_leaves(values) if type(leaf) is Deferred]


def _relu(
    lazy: Any, call: Call, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The result of a ReLU in one with the call; None where the two must not be."""
    limits = (args, kwargs) if func in _CLAMPS or func in _CLAMPS_IN_PLACE else None
    in_place = func in _IN_PLACE or kwargs.get("inplace", False)
    # Natively these change values and leave the graph as it is.
    outside = torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
    if in_place and outside and (lazy.requires_grad or torch.is_inference_mode_enabled()):
        return None
    with call.lock:
        if _call(lazy) is None or call.kept is not None or call.raw is not None:
            return None
        _check(lazy, call)
        output = call.relu(limits)
        if output is not None and in_place:
            return lazy if _exchange(lazy, output) else None
        call.is_fused |= output is not None
        return output


def _check(lazy: Tensor, call: Call) -> None:
    """Refuse values that others have changed, or have and would have to know as changed."""
    with _without_overrides():
        node = lazy.grad_fn
    if node is not (call.node and call.node()):
        raise RuntimeError(_CHANGED)
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(_TRACED)  # else what stands for an input would be a constant
    if _is_shared(lazy):
        call.check_kept()


def _is_shared(lazy: Tensor) -> bool:
    """Whether C++ has it, too: a running `autograd.Function`, or one that has saved it."""
    return bool(lazy._use_count() > 1)  # type: ignore[attr-defined]


def _exchange(lazy: Tensor, plain: Tensor) -> bool:
    """Let two objects change what they are; not if C++ has the first."""
    if _is_shared(lazy):
        return False
    try:
        torch._C._swap_tensor_impl(lazy, plain)
    except RuntimeError:  # C++ has a weak reference
        return False
    # In this order other threads never see the class of plain tensors on what waits.
    waiting: Any = plain
    waiting.__class__, waiting._call = Deferred, _call(lazy)
    done: Any = lazy
    done.__class__ = Tensor
    del done._call
    return True
