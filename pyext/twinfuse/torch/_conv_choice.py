"""Which convolutions on a GPU are left to torch's own operators, since they are faster.

The rules are those of a table of measured layers (`python -m benchmarks.gpu`), no model of the
time: they name what the layers have in common that were slower by more than a few per cent. Where a
layer is small the host's time is what counts, and a fused one has fewer launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from twinfuse import _backend
from twinfuse.torch import _operators
from twinfuse.torch._conv_shapes import is_channels_last

_LARGE = 2**31  # additions and multiplications, where an output counts as `_OUTPUT` more
_OUTPUT = 256
_FASTER = "torch's own operators are faster on a GPU"


def why_native(trained: bool, input: Tensor, weight: Tensor, conv: Sequence[int]) -> str:
    """Why torch takes the whole call, though a kernel serves it; or ""."""
    if not _is_large(input, weight, conv):
        return ""
    filters, channels, *window = weight.shape
    taps = prod(window)
    if input.dtype == torch.float32:
        if not _operators.allows_tf32(torch.backends.cudnn):
            return ""
        if trained:
            return f"{_FASTER} in TF32, in training"
        if channels < 8 or (taps > 1 and filters <= 64):
            return f"{_FASTER} in TF32, with so few channels"
    elif channels <= 4 and taps > 9:
        return f"{_FASTER} with so few channels and so large a window"
    if taps == 1 and filters <= channels and not is_channels_last(input, weight):
        return f"{_FASTER} for windows of one pixel where images have their channels first"
    return ""


def why_native_gradients(input: Tensor, weight: Tensor, conv: Sequence[int]) -> str:
    """As `why_native`, of the backward pass alone."""
    if not _is_large(input, weight, conv):
        return ""
    if input.dtype == torch.float32:
        in_tf32 = _operators.allows_tf32(torch.backends.cudnn)
        return f"{_FASTER} in TF32, in training" if in_tf32 else ""
    if max(conv[: len(conv) // 4]) > 1 and not is_channels_last(input, weight):
        return f"{_FASTER} with a stride where images have their channels first"
    return ""


def of_large_calls(weight: Tensor, conv: Sequence[int]) -> str:
    """What the two say of a layer whose images are many, in inference and in training."""
    if not weight.is_cuda:
        return ""
    sizes = (weight.shape[1] * conv[-1], *(64 for _ in weight.shape[2:]))
    images = weight.new_empty(1).expand(_LARGE // 64, *sizes)
    reasons = [why_native(trained, images, weight, conv) for trained in (False, True)]
    reasons.append(why_native_gradients(images, weight, conv))
    reason = next(filter(None, reasons), "")
    return f"large calls: {reason}" if reason else ""


def _is_large(input: Tensor, weight: Tensor, conv: Sequence[int]) -> bool:
    """Whether kernels take longer than their launches, unless a backend was asked for."""
    if _backend.requested is not None:
        return False
    filters, *sums = weight.shape
    pixels = input.numel() // max(input.shape[1] * prod(conv[: len(conv) // 4]), 1)
    return pixels * filters * (prod(sums) + _OUTPUT) >= _LARGE
