"""The fused ops of torch in the layouts of Keras: everything is passed on as views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import twinfuse.torch


def linear_relu(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Kernel `[K, N]`."""
    return twinfuse.torch.linear_relu(x, kernel.T, bias)


def conv_relu(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    padding: str,
    data_format: str,
    dilations: Sequence[int],
) -> Tensor:
    """Kernel `[S, C / groups, K]` or `[R, S, C / groups, K]`."""
    spatial = len(strides)
    if data_format == "channels_last":
        x = x.movedim(-1, 1)
    weight = kernel.permute(spatial + 1, spatial, *range(spatial))
    pads = _pads(x.shape[2:], weight.shape[2:], strides, padding, dilations)
    if any(low != high for low, high in pads):
        # torch's padding is the same at both ends; this one is listed from the last dimension.
        x = torch.nn.functional.pad(x, [zeros for pair in reversed(pads) for zeros in pair])
        pads = [(0, 0)] * spatial
    fused: Any = (twinfuse.torch.conv1d_relu, twinfuse.torch.conv2d_relu)[spatial - 1]
    groups = x.shape[1] // weight.shape[1]
    y = fused(x, weight, bias, tuple(strides), tuple(p for p, _ in pads), tuple(dilations), groups)
    return y.movedim(1, -1) if data_format == "channels_last" else y


def _pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """Zeros before and after, per spatial dimension."""
    pads = []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations):
        span = (taps - 1) * dilation + 1
        if padding == "same":
            zeros = max((-(-size // stride) - 1) * stride + span - size, 0)
            pads.append((zeros // 2, zeros - zeros // 2))
        else:
            pads.append((span - 1 if padding == "causal" else 0, 0))
    return pads
