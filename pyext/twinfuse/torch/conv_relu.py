"""Fused convolution + ReLU, in one and two dimensions."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twinfuse.torch import _calls, _conv_choice
from twinfuse.torch import _conv_relu_ops as _ops
from twinfuse.torch._conv_shapes import FILTERS, Numbers, check

__all__ = ["conv1d_relu", "conv2d_relu"]

Padding = int | Sequence[int] | str
_Options = tuple[Sequence[int], Sequence[int], Sequence[int], int]

_IMAGES = {1: "[N, C, W] or [C, W]", 2: "[N, C, H, W] or [C, H, W]"}

# Aliases, because a call on a tiny input costs as much as its guards.
_forward = _ops.forward
_apply = _ops.apply
_is_unusual = _calls.is_unusual
_is_left_to_torch = _conv_choice.left_to_torch
_grad_enabled = torch.is_grad_enabled


def _each(rank: int, name: str, value: Any) -> Sequence[int]:
    """One number per spatial dimension."""
    if type(value) is int:
        return (value,) * rank
    if type(value) is tuple and len(value) == rank:
        return value  # the operator looks at what is in it
    return _checked(rank, name, value, rank)


def _checked(rank: int, name: str, value: Any, count: int) -> Sequence[int]:
    """`count` numbers, of all that native takes and of nothing else."""
    numbers = value if isinstance(value, (tuple, list)) else (value,)
    # A bool is an int for Python, but not for torch.
    if len(numbers) in (1, count) and bool not in map(type, numbers):
        with contextlib.suppress(TypeError):
            numbers = tuple(map(_number, numbers))
            return numbers if len(numbers) == count else numbers * count
    wanted = "an int" if count == 1 else f"an int or {count} of them"
    raise RuntimeError(f"conv{rank}d_relu: {name}: expected {wanted}, got {value!r}")


def _number(value: Any) -> Any:
    number = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise TypeError
    return number


def normalized(
    rank: int, weight: Tensor, stride: Numbers, padding: Padding, dilation: Numbers, groups: int
) -> _Options:
    """The options as the public operator takes them."""
    op = f"conv{rank}d_relu"
    steps = _each(rank, "stride", stride)
    gaps = _each(rank, "dilation", dilation)
    if type(groups) is not int:
        (groups,) = _checked(rank, "groups", groups, 1)
    if not isinstance(padding, str):
        return steps, _each(rank, "padding", padding), gaps, groups
    if padding == "valid":
        return steps, (0,) * rank, gaps, groups
    if padding != "same":
        raise RuntimeError(f"{op}: padding: expected 'same' or 'valid', got {padding!r}")
    if any(step != 1 for step in steps):
        raise RuntimeError(f"{op}: padding: expected numbers for stride {stride}, got 'same'")
    if weight.dim() != rank + 2:
        raise RuntimeError(
            f"{op}: weight: expected {FILTERS[rank]}, got shape {list(weight.shape)}"
        )
    totals = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:])]
    low = [total // 2 for total in totals]
    high = [total - total // 2 for total in totals]
    return steps, low if low == high else low + high, gaps, groups


def _misfit(rank: int) -> Callable[..., str]:
    def misfit(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> str:
        try:
            for name, value in zip(("stride", "padding", "dilation", "groups"), options):
                if not isinstance(value, str):
                    _checked(rank, name, value, 1 if name == "groups" else rank)
            *_, groups = normalized(rank, weight, *options)
        except RuntimeError as error:
            return str(error).removeprefix(f"conv{rank}d_relu: ")
        if input.dim() not in (rank + 1, rank + 2):
            return f"input: expected {_IMAGES[rank]}, got shape {list(input.shape)}"
        if weight.dim() != rank + 2:
            return f"weight: expected {FILTERS[rank]}, got shape {list(weight.shape)}"
        channels = weight.shape[1] * groups
        if input.shape[-rank - 1] != channels:
            return f"input: expected {channels} channels, got shape {list(input.shape)}"
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            return f"bias: expected [{weight.shape[0]}], got shape {list(bias.shape)}"
        return ""

    return misfit


def _public(rank: int) -> Callable[..., Tensor]:
    def public(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        batched = input.unsqueeze(0) if input.dim() == rank + 1 else input
        output = _ops.public[rank](batched, weight, bias, *normalized(rank, weight, *options))
        return output if batched is input else output.squeeze(0)

    return public


def _reference(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reference(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        return F.relu(native(input, weight, bias, *options))

    return reference


def _as_numbers(
    rank: int, input: Tensor, weight: Tensor, options: Sequence[Any]
) -> tuple[Tensor, tuple[int, ...]]:
    """The images with a batch, and the options as the private operators take them."""
    steps, pads, gaps, groups = normalized(rank, weight, *options)
    batched = input.unsqueeze(0) if input.dim() == rank + 1 else input
    return batched, (*steps, *gaps, *pads[:rank], *pads[-rank:], groups)


def _left_to_torch(rank: int) -> Callable[..., str]:
    def left_to_torch(
        trained: bool,
        backward: bool,
        dtype: torch.dtype,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> str:
        batched, conv = _as_numbers(rank, input, weight, options)
        reason = _conv_choice.left_to_torch(trained, batched, weight, conv, dtype)
        if backward and not reason:
            reason = _conv_choice.gradients_left_to_torch(batched, weight, conv, dtype)
        return reason

    return left_to_torch


_NATIVE = {1: F.conv1d, 2: F.conv2d}
_OPS = {
    rank: _calls.Op(
        f"conv{rank}d_relu",
        "conv_relu",
        _public(rank),
        _reference(native),
        _misfit(rank),
        left_to_torch=_left_to_torch(rank),
    )
    for rank, native in _NATIVE.items()
}


def _call(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Padding,
    dilation: Numbers,
    groups: int,
) -> Tensor:
    options: tuple[Any, ...] = stride, padding, dilation, groups
    if _is_unusual(input, weight, bias):
        return _OPS[rank].unusual(input, weight, bias, *options)
    try:
        batched, conv = _as_numbers(rank, input, weight, options)
        trained = _grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        if input.is_cuda and _is_left_to_torch(trained, batched, weight, conv):
            check(batched, weight, bias, conv)
            # In place: our caller still holds the input, which native layers would have let go.
            return _NATIVE[rank](input, weight, bias, *options).relu_()
        output = (_apply if trained else _forward)(batched, weight, bias, conv)
        return output if batched is input else output.squeeze(0)
    except Exception as error:
        return _OPS[rank].refused(error, input, weight, bias, *options)


def conv1d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """`relu(conv1d(input, weight, bias, ...))` in one kernel, differentiable to any order.

    The same values, gradients, dtypes and errors as
    `torch.nn.functional.relu(torch.nn.functional.conv1d(...))`; all that is said of `conv2d_relu`
    is true of it, with one spatial dimension.

    Args:
        input: `[N, C, W]` or `[C, W]`.
        weight: `[K, C / groups, S]`.
        bias: `[K]`, or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv1d`.

    Returns:
        `[N, K, Q]` or `[K, Q]`; as native, contiguous unless the weight lies in memory with its
        channels last.

    Raises:
        RuntimeError: shapes, dtypes, devices or options do not fit together; the text names the
            argument, what was expected and what was got.
        TypeError: an option is no integer.
    """
    return _call(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """`relu(conv2d(input, weight, bias, ...))` in one kernel, differentiable to any order.

    The same values, gradients, dtypes and errors as
    `torch.nn.functional.relu(torch.nn.functional.conv2d(...))`; a NaN passes through. A call that
    no kernel serves runs on torch's own operators, with a warning once per reason (see
    `twinfuse.explain` and `twinfuse.strict`).

    Args:
        input: `[N, C, H, W]` or `[C, H, W]`, any strides; float32, float64, bfloat16 or float16 for
            the fused kernels.
        weight: `[K, C / groups, R, S]`, any strides.
        bias: `[K]`, or None.
        stride: an int, or one per spatial dimension; so is `dilation`.
        padding: an int, one per spatial dimension, "valid" (none) or "same" (the output is as large
            as the input; the stride must be 1).
        groups: divides C and K.

    Returns:
        `[N, K, P, Q]` or `[K, P, Q]`, in the memory format that native gives it: channels_last if
        `input` or `weight` is, else contiguous. The gradient of `input` has the
        same format, that of `weight` the layout of `weight`.

    Raises:
        RuntimeError: shapes, dtypes, devices or options do not fit together; the text names the
            argument, what was expected and what was got.
        TypeError: an option is no integer.
    """
    return _call(2, input, weight, bias, stride, padding, dilation, groups)


_OPS[1].serve(conv1d_relu)
_OPS[2].serve(conv2d_relu)
