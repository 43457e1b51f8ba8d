"""Fused Linear + ReLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from twinfuse import _backend, _core
from twinfuse.torch import _linear_relu_ops as _ops

__all__ = ["linear_relu"]

# Aliases, because a call on a tiny input costs as much as its guards.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_TRACED = frozenset((FakeTensor, FunctionalTensor))
_forward = _ops.forward
_apply = _ops.apply
_public = _ops.public
_missing = _ops.missing
_transforms_active = torch._C._are_functorch_transforms_active
_autocast_enabled = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling

_DTYPES = {getattr(torch, name): name for name in _core.DTYPES}


def _kernels(role: str) -> dict[str, dict[torch.dtype, tuple[str, str]]]:
    """Per device type and dtype: the kernel's name, or "" and the reason."""
    return {
        device: {dtype: _core.find_kernel(role, name, device) for dtype, name in _DTYPES.items()}
        for device in _core.DEVICES
    }


_FORWARD = _kernels("linear_relu_forward")
_BACKWARD = _kernels("linear_relu_backward")


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`relu(input @ weight.T + bias)` in one kernel, differentiable to any order.

    The same values, gradients, dtypes and errors as
    `torch.nn.functional.relu(torch.nn.functional.linear(input, weight, bias))`; a NaN passes
    through. A call that no kernel serves runs on torch's own operators, with a warning once per
    reason (see `twinfuse.explain` and `twinfuse.strict`).

    Args:
        input: `[..., K]`, any strides; float32, float64, bfloat16 or float16 for the fused kernels.
        weight: `[N, K]`, any strides.
        bias: `[N]`, or None.

    Returns:
        `[..., N]`, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together; the text names the argument,
            what was expected and what was got.
    """
    if (
        _missing
        or _compiling()
        or _backend.requested is not None
        or _transforms_active()
        or forward_ad._current_level >= 0
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
    ):
        return _unusual(input, weight, bias)
    if _autocast_enabled() or _dispatch_modes() or _function_modes():
        return _dispatched(input, weight, bias)
    try:
        if _tracing() is not None:  # torch.jit.trace cannot record an autograd.Function
            return _public(input, weight, bias)
        if _grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _apply(input, weight, bias)
        return _forward(input, weight, bias)
    except RuntimeError as error:
        return _refused(error, input, weight, bias)


def _unusual(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if any(isinstance(t, torch.fx.Proxy) for t in tensors):
        return torch.overrides.handle_torch_function(linear_relu, tensors, input, weight, bias)
    return _dispatched(input, weight, bias)


def _dispatched(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    reason = _why_reference(input, weight, bias)
    if not reason:
        return _public(input, weight, bias)
    output = _ops.reference(input, weight, bias)  # first: what native refuses is no fall-back
    if _backend.requested != "reference":
        _fall_back(reason)
    return output


def _refused(error: RuntimeError, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The native layer decides whether a call that the fused path refused is an error."""
    text = str(error).removeprefix("linear_relu: ")
    reason = _why_reference(input, weight, bias) or (text if text != str(error) else "")
    if not reason:
        raise error  # not ours: a hook on saved tensors raised it, or a profiler
    try:
        output = _ops.reference(input, weight, bias)
    except Exception as native:
        native.__context__ = None  # the two errors say the same
        raise type(native)(f"linear_relu: {text if text != str(error) else reason}") from native
    _fall_back(reason)
    return output


def _fall_back(reason: str) -> None:
    _backend.fall_back("linear_relu", reason)


def _inside_transform() -> bool:
    return _transforms_active()


# Dynamo calls these while it traces and keeps the result. This is all that
# torch.compiler.assume_constant_result does, besides importing the whole compiler.
_fall_back._dynamo_marked_constant = True  # type: ignore[attr-defined]
_inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why no kernel serves this call; empty when one does."""
    if _backend.requested == "reference":
        return "use_backend('reference') is in force"
    if _missing:
        return _missing
    if _inside_transform():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    named = [("input", input), ("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in named:
        if type(tensor) not in _PLAIN and type(tensor) not in _TRACED:
            return f"{name}: expected a plain tensor, got a {type(tensor).__name__}"
    device = input.device.type
    dtype = _dtype_of_call(input, device)
    for name, tensor in named:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = (
                "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
            )
            return f"{name}: expected a dense tensor, got a {kind} one of layout {tensor.layout}"
        if tensor.device != input.device:
            return f"{name}: expected device {input.device} like input, got {tensor.device}"
        if _dtype_of_call(tensor, device) != dtype:
            return f"{name}: expected {dtype} like input, got {tensor.dtype}"

    requested = _backend.requested
    if requested is not None and requested != device:
        return f"backend '{requested}' was asked for, and the tensors are on device '{device}'"
    if device not in _FORWARD:
        return f"no kernel runs on device type '{device}'"
    if dtype not in _DTYPES:
        return f"input: expected {', '.join(_core.DTYPES)} for a fused kernel, got {dtype}"
    reason = _FORWARD[device][dtype][1]
    if not reason and any(tensor.requires_grad for _, tensor in named):
        reason = _BACKWARD[device][dtype][1]
    if reason:
        return reason

    if input.dim() < 1:
        return f"input: expected [..., K], got shape {list(input.shape)}"
    k = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k:
        return f"weight: expected [N, {k}], got shape {list(weight.shape)}"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return f"bias: expected [{weight.shape[0]}], got shape {list(bias.shape)}"
    return ""


def _dtype_of_call(tensor: Tensor, device: str) -> torch.dtype:
    if (
        torch.is_autocast_enabled(device)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _explain(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _backend.Report:
    reason = _why_reference(input, weight, bias)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    trained = _grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    roles = {"linear_relu": _FORWARD} | ({"linear_relu_backward": _BACKWARD} if trained else {})
    if reason:
        return _backend.Report(
            _backend.Choice(op=op, backend="reference", reason=reason) for op in roles
        )
    device = input.device.type
    dtype = _dtype_of_call(input, device)
    return _backend.Report(
        _backend.Choice(op=op, backend=device, kernel=kernels[device][dtype][0])
        for op, kernels in roles.items()
    )


linear_relu.__twinfuse_explain__ = _explain  # type: ignore[attr-defined]
