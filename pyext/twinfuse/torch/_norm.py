"""Convolution, BatchNorm and ReLU as one convolution, in eval mode.

Three modules stay three: in eval mode the convolution computes all, and the BatchNorm passes it on.
In training mode the convolution is native, and the BatchNorm applies the ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.nn.conv_relu import padded

NORM = "_twinfuse_norm"
# Elements; measured on blocks of a ResNet-50.
MIN_INPUTS = 2**16
MIN_INPUTS_A_WEIGHT = 4


class _ConvNormReLU(nn.Module):
    """What both kinds of convolutions share; `_twinfuse_norm` holds the BatchNorm behind one."""

    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[..., Tensor]

    @property
    def norm(self) -> Any:
        return getattr(self, NORM)[0]  # in a tuple, so that it is no submodule

    def why_native(self, weight: Tensor) -> str:
        """Why convolution and BatchNorm are computed one after the other; empty if they are not."""
        if _takes_batches(self.norm):
            return f"its {type(self.norm).__name__} is in training mode, which is not folded"
        dtype = weight.dtype
        if dtype != self.norm.running_var.dtype or dtype not in (torch.float32, torch.float64):
            return f"folding would round weights of {dtype} twice"
        return ""

    def _forward(self, op: Callable[..., Tensor], input: Tensor) -> Tensor:
        norm, weight, bias = self.norm, self.weight, self.bias
        if _takes_batches(norm):
            return self._conv_forward(input, weight, bias)
        mean, var = norm.running_mean, norm.running_var
        # Parameters may change in ways that nothing reports, so they are folded in every call,
        # where that costs less than another pass over the output.
        count = input.numel()
        if (
            count < MIN_INPUTS
            or count < MIN_INPUTS_A_WEIGHT * weight.numel()
            or self.why_native(weight)
        ):
            output = self._conv_forward(input, weight, bias)
            return F.relu(F.batch_norm(output, mean, var, norm.weight, norm.bias, eps=norm.eps))
        scale = torch.rsqrt(var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -mean if bias is None else bias - mean
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        weight = weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        return padded(op, self, input, weight, shift)


class ConvNormReLU1d(_ConvNormReLU, nn.Conv1d):
    """A Conv1d that knows the BatchNorm1d behind it."""

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(conv1d_relu, input)


class ConvNormReLU2d(_ConvNormReLU, nn.Conv2d):
    """A Conv2d that knows the BatchNorm2d behind it."""

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(conv2d_relu, input)


class FoldedNorm1d(nn.BatchNorm1d):
    """A BatchNorm1d with the ReLU behind it, which the convolution before it computes in eval."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input)) if _takes_batches(self) else input


class FoldedNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d with the ReLU behind it, which the convolution before it computes in eval."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input)) if _takes_batches(self) else input


def _takes_batches(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    """Whether the statistics are those of a batch, which come after the convolution."""
    return norm.training or norm.running_mean is None


# What a convolution and a BatchNorm become.
CONVS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvNormReLU1d,
    nn.Conv2d: ConvNormReLU2d,
}
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FoldedNorm1d,
    nn.BatchNorm2d: FoldedNorm2d,
}
# Which BatchNorm can be folded into which convolution.
BEHIND: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
}
