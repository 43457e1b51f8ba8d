"""What all ops share about a call: whether the kernels may take it, and where it goes if not.

A call goes, in this order: to torch's own operators under `torch.func` transforms, in forward mode
and for tensor subclasses; to the public operator where something traces or changes operators
(compilers, autocast, modes); through an `autograd.Function` where a gradient is needed; else to the
private operator. On a GPU an op may leave calls to torch's operators after all, as the faster ones.
What an op's kernels refuse goes to torch's operators too, which decide whether it is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from twinfuse import _backend, _core
from twinfuse.torch import _operators
from twinfuse.torch._deferred_tensor import Deferred

Named = list[tuple[str, Tensor]]

# Aliases, because a call on a tiny input costs as much as its guards.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}
# Subclasses whose operators are ours as well.
_SERVED = frozenset((FakeTensor, FunctionalTensor, Deferred))
_missing = _operators.missing
_incomplete = bool(_missing)
_transforms_active = torch._C._are_functorch_transforms_active
_autocast_enabled = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]

_DTYPES = {getattr(torch, name): name for name in _core.DTYPES}

# Per device type and dtype: the kernel's name, or "" and the reason.
_Kernels = dict[str, dict[torch.dtype, tuple[str, str]]]


def _kernels(role: str) -> _Kernels:
    return {
        device: {dtype: _core.find_kernel(role, name, device) for dtype, name in _DTYPES.items()}
        for device in _core.DEVICES
    }


def is_unusual(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call must not go straight to the private operators."""
    return (
        _incomplete
        or _compiling()
        or _backend.requested is not None
        or _transforms_active()
        or forward_ad._current_level >= 0
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or _autocast_enabled()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracing() is not None  # torch.jit.trace cannot record an autograd.Function
    )


def are_unusual(tensors: Iterable[Tensor | None]) -> bool:
    """As `is_unusual`, for an op with other arguments."""
    return (
        _incomplete
        or _compiling()
        or _backend.requested is not None
        or _transforms_active()
        or forward_ad._current_level >= 0
        or not _PLAIN_OR_NONE.issuperset(map(type, tensors))
        or _autocast_enabled()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracing() is not None
    )


def _named(input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Named:
    return [("input", input), ("weight", weight)] + ([] if bias is None else [("bias", bias)])


class Op:
    """One op as users call it: `function(input, weight, bias, *options)`.

    Or with other arguments, which then `named` finds the tensors of one dtype and device in.

    Args:
        name: the op in errors and reports.
        stem: of its kernels' names.
        public: calls the public operator, with the function's arguments.
        reference: the same by torch's own operators.
        misfit: why the arguments do not fit together, or "". Called after all else was checked.
        named: the tensors by name, of which the first is the input.
        renamed: whether the kernels' errors call arguments by other names than the function's.
        on_gpu: what takes a call on a GPU, of several: `on_gpu(backward, dtype, *args)`.
        left_to_torch: why torch's operators are chosen on a GPU, though a kernel serves the call:
            `left_to_torch(trained, backward, dtype, *args)`; "" where they are not.
    """

    function: Callable[..., Any]

    def __init__(
        self,
        name: str,
        stem: str,
        public: Callable[..., Any],
        reference: Callable[..., Any],
        misfit: Callable[..., str],
        named: Callable[..., Named] = _named,
        renamed: bool = False,
        on_gpu: Callable[..., str] = lambda *_: "",
        left_to_torch: Callable[..., str] = lambda *_: "",
    ) -> None:
        self.name = name
        self._named, self._renamed = named, renamed
        self._forward = _kernels(f"{stem}_forward")
        self._backward = _kernels(f"{stem}_backward")
        self._public, self._reference, self._misfit = public, reference, misfit
        self._on_gpu, self._left_to_torch = on_gpu, left_to_torch

    def has_kernels(self, device: str) -> bool:
        return any(name for name, _ in self._forward[device].values())

    def serve(
        self, function: Callable[..., Any], arguments: Callable[..., Any] | None = None
    ) -> None:
        """Name the public function, and let `twinfuse.explain` explain it.

        `arguments` makes those of the other methods out of the function's, where they differ.
        """
        self.function = function
        signature = inspect.signature(function)

        def explain(*args: Any, **kwargs: Any) -> _backend.Report:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            return self._explain(
                *(arguments(*call.args, **call.kwargs) if arguments else call.args)
            )

        function.__twinfuse_explain__ = explain  # type: ignore[attr-defined]

    def unusual(self, *args: Any) -> Any:
        """The call on a way that `is_unusual` asked for."""
        proxies = [argument for argument in args if isinstance(argument, torch.fx.Proxy)]
        if proxies:
            return torch.overrides.handle_torch_function(self.function, proxies, *args)
        reason = self._why_reference(*args)
        if not reason:
            try:
                return self._public(*args)
            except RuntimeError as error:
                self._raise_if_strict(error)
                raise
        # First the result: what native refuses is no fall-back.
        output = self._reference(*args)
        if _backend.requested != "reference":
            _fall_back(self.name, reason)
        return output

    def refused(self, error: Exception, *args: Any) -> Any:
        """The native layer decides whether a call that the fused path refused is an error."""
        self._raise_if_strict(error)
        text = str(error).removeprefix(f"{self.name}: ")
        ours = text != str(error)
        reason = self._why_reference(*args) or (text if ours else "")
        if not reason:
            raise error  # not ours: a hook on saved tensors raised it, or a profiler
        try:
            output = self._reference(*args)
        except Exception as native:
            native.__context__ = None  # the two errors say the same
            text = text if ours and not self._renamed else reason
            raise type(native)(f"{self.name}: {text}") from native
        _fall_back(self.name, reason)
        return output

    def _raise_if_strict(self, error: Exception) -> None:
        """The binding has only RuntimeError."""
        if str(error).startswith(f"{self.name} runs on "):
            raise _backend.FallbackError(str(error)) from None

    def serves(self, *args: Any) -> bool:
        """Whether a kernel serves this call."""
        return not self._why_reference(*args)

    def _why_reference(self, *args: Any) -> str:
        """Why no kernel serves this call; empty when one does."""
        requested = _backend.requested
        if requested == "reference":
            return "use_backend('reference') is in force"
        if _missing:
            return _missing
        if inside_transform():
            return "a torch.func transform is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
        named = self._named(*args)
        input = named[0][1]
        for name, tensor in named:
            if type(tensor) not in _PLAIN and type(tensor) not in _SERVED:
                return f"{name}: expected a plain tensor, got a {type(tensor).__name__}"
        device = input.device.type
        dtype = _dtype_of_call(input, device)
        for name, tensor in named:
            if reason := _unlike(name, tensor, input, dtype):
                return reason
        if requested is not None and not _serves(requested, device, _index(input)):
            return f"backend '{requested}' was asked for, and the tensors are on device '{device}'"
        if device not in self._forward:
            return f"no kernel runs on device type '{device}'"
        if dtype not in _DTYPES:
            return f"input: expected {', '.join(_core.DTYPES)} for a fused kernel, got {dtype}"
        reason = self._forward[device][dtype][1]
        if not reason and any(tensor.requires_grad for _, tensor in named):
            reason = self._backward[device][dtype][1]
        # A tracer would warn of the comparisons; the operator makes them again.
        if reason or _is_tracing():
            return reason
        return self._misfit(*args)

    def _explain(self, *args: Any) -> _backend.Report:
        reason = self._why_reference(*args)
        named = self._named(*args)
        input = named[0][1]
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in named)
        kernels = {self.name: self._forward}
        if trained:
            kernels[f"{self.name}_backward"] = self._backward
        if reason:
            return _backend.Report(
                _backend.Choice(op=op, backend="reference", reason=reason) for op in kernels
            )
        device = input.device.type
        dtype = _dtype_of_call(input, device)
        report = _backend.Report()
        for op, names in kernels.items():
            backward = op != self.name
            backend, kernel, reason = _core.reported(*names[device][dtype], device, _index(input))
            if kernel and device == "cuda":
                left = self._left_to_torch(trained, backward, dtype, *args)
                if left:
                    backend, kernel, reason = "reference", "", left
            if backend == "cuda" and (own := self._on_gpu(backward, _DTYPES[dtype], *args)):
                kernel = f"{kernel} ({own})"
            report.append(_backend.Choice(op, backend, kernel, reason))
        return report


def _unlike(name: str, tensor: Tensor, input: Tensor, dtype: torch.dtype) -> str:
    """Why a tensor cannot go into one call with `input`, whose dtype in the call is `dtype`."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        return f"{name}: expected a dense tensor, got a {kind} one of layout {tensor.layout}"
    if tensor.device != input.device:
        return f"{name}: expected device {input.device} like input, got {tensor.device}"
    if _dtype_of_call(tensor, input.device.type) != dtype:
        return f"{name}: expected {dtype} like input, got {tensor.dtype}"
    return ""


def _dtype_of_call(tensor: Tensor, device: str) -> torch.dtype:
    if (
        device != "meta"  # of which autocast has never heard
        and torch.is_autocast_enabled(device)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _index(tensor: Tensor) -> int:
    """Of its GPU."""
    return tensor.device.index or 0


def _serves(backend: str, device: str, index: int) -> bool:
    return _core.serves(backend, device, index)


def _fall_back(name: str, reason: str) -> None:
    _backend.fall_back(name, reason)


def inside_transform() -> bool:
    return _transforms_active()


# Dynamo calls these while it traces and keeps the result. This is all that
# torch.compiler.assume_constant_result does, besides importing the whole compiler.
_fall_back._dynamo_marked_constant = True  # type: ignore[attr-defined]
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]
