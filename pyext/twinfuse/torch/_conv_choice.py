"""Which convolutions on a GPU are left to torch's own operators, since they are faster.

The rules are those of a table of measured layers (`python -m benchmarks.gpu`, on an H200), no model
of the time: they name what most of the large layers have in common that were slower by more than a
few per cent. Where a layer is small the host's time is what counts, and a fused one launches less.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from twinfuse import _backend
from twinfuse.torch import _operators
from twinfuse.torch._conv_shapes import is_channels_last, spread

_LARGE = 2**31  # additions and multiplications, where an output counts as `_OUTPUT` more
_OUTPUT = 256
_SERVED = (torch.float32, torch.bfloat16, torch.float16)  # by kernels, in so many groups at most
_MOST_GROUPS = 4
_FASTER = "torch's own operators are faster on a GPU"


def left_to_torch(
    trained: bool,
    input: Tensor,
    weight: Tensor,
    conv: Sequence[int],
    dtype: torch.dtype | None = None,
) -> str:
    """Why torch takes the whole call, though a kernel serves it; or "".

    `dtype` is that of the call, where autocast makes it another than the input's.
    """
    dtype = dtype or input.dtype
    if not _is_large(input, weight, conv, dtype):
        return ""
    filters, channels, *window = weight.shape
    taps = prod(window)
    if dtype == torch.float32:
        if not _in_tf32():
            return ""
        if trained and not _trains_fast(input, weight):
            return f"{_FASTER} in TF32, in training"
        if channels < 8 or (taps > 1 and filters <= 64):
            return f"{_FASTER} in TF32, with so few channels or filters"
    elif channels <= 4 and taps > 9:
        return f"{_FASTER} with so few channels and so large a window"
    if taps == 1 and filters <= channels and not is_channels_last(input, weight):
        return f"{_FASTER} for windows of one pixel where images have their channels first"
    return ""


def gradients_left_to_torch(
    input: Tensor, weight: Tensor, conv: Sequence[int], dtype: torch.dtype | None = None
) -> str:
    """As `left_to_torch`, of the backward pass alone."""
    dtype = dtype or input.dtype
    if not _is_large(input, weight, conv, dtype):
        return ""
    if dtype == torch.float32:
        slow = _in_tf32() and not _trains_fast(input, weight)
        return f"{_FASTER} in TF32, in training" if slow else ""
    if max(conv[: len(conv) // 4]) > 1 and not is_channels_last(input, weight):
        return f"{_FASTER} with a stride where images have their channels first"
    return ""


def layer_left_to_torch(layer: Any, weight: Tensor, input: Tensor, trained: bool = False) -> str:
    """Of a call of a layer."""
    conv = spread(weight.dim() - 2, layer.stride, 0, layer.dilation, layer.groups)
    images = input if input.dim() == weight.dim() else input.unsqueeze(0)
    reason = left_to_torch(trained, images, weight, conv)
    return reason or (gradients_left_to_torch(images, weight, conv) if trained else "")


def large_calls_left_to_torch(layer: Any, weight: Tensor, trained: bool) -> str:
    """Of a layer whose images are many, in inference and, unless it never is `trained`, there."""
    sizes = (weight.shape[1] * layer.groups, *(64 for _ in weight.shape[2:]))
    images = weight.new_empty(1).expand(_LARGE // 64, *sizes)
    reason = layer_left_to_torch(layer, weight, images)
    if trained and not reason:
        reason = layer_left_to_torch(layer, weight, images, trained)
    return f"large calls: {reason}" if reason else ""


def _in_tf32() -> bool:
    return _operators.allows_tf32(torch.backends.cudnn)


def _trains_fast(input: Tensor, weight: Tensor) -> bool:
    """In TF32: windows of one pixel with few sums for each output."""
    filters, channels, *window = weight.shape
    few = filters > channels or (channels <= 512 and is_channels_last(input, weight))
    return prod(window) == 1 and few


def _is_large(input: Tensor, weight: Tensor, conv: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether kernels serve the call and what they do counts, unless a backend was asked for."""
    if _backend.requested is not None or dtype not in _SERVED or conv[-1] > _MOST_GROUPS:
        return False
    filters, *sums = weight.shape
    pixels = input.numel() // max(input.shape[1] * prod(conv[: len(conv) // 4]), 1)
    work = pixels * filters * (prod(sums) + _OUTPUT)
    if isinstance(work, torch.SymInt):
        # To compare a size that is not known yet would make it known.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return bool(statically_known_true(work >= _LARGE))
    return work >= _LARGE
