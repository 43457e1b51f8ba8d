from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu


def padded(
    op: Callable[..., Tensor],
    layer: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`op` with the options of `layer`, whose padding may be of any mode."""
    padding: str | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        pads = layer._reversed_padding_repeated_twice
        input, padding = F.pad(input, pads, mode=layer.padding_mode), "valid"
    return op(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


class ConvReLU1d(nn.Conv1d):
    """`nn.ReLU()(nn.Conv1d(...)(input))` in one kernel, with the parameters of `nn.Conv1d`.

    Constructor, parameter names, initial values and `state_dict` are those of `torch.nn.Conv1d`, so
    the two exchange weights both ways. Input `[N, C, W]` or `[C, W]`, output `[N, K, Q]` or
    `[K, Q]`. A `padding_mode` other than "zeros" pads in front of the kernel.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return padded(conv1d_relu, self, input, weight, bias)


class ConvReLU2d(nn.Conv2d):
    """`nn.ReLU()(nn.Conv2d(...)(input))` in one kernel, with the parameters of `nn.Conv2d`.

    As `ConvReLU1d`, with input `[N, C, H, W]` or `[C, H, W]` and output `[N, K, P, Q]` or
    `[K, P, Q]`; `channels_last` passes through.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return padded(conv2d_relu, self, input, weight, bias)
