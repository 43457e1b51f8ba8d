"""Layers with `clamp(min=0)` behind them.

Its output is that of ReLU. Its gradient is not: it is passed on where the input is 0, where layers
that start with zeros learn from it. So these layers are fused where no gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.linear_relu import linear_relu
from twinfuse.torch.nn.conv_relu import padded


def is_relu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `clamp` or `clamp_min` of these arguments is `clamp(min=0)`."""
    limits = dict(zip(("input", "min", "max"), args)) | dict(kwargs)
    low, high = limits.get("min"), limits.get("max")
    return high is None and "out" not in limits and type(low) in (int, float) and not low


def _is_differentiated(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class LinearClamp(nn.Linear):
    """A Linear with a clamp behind it."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_differentiated(input, self.weight, self.bias):
            return super().forward(input).clamp(min=0)
        return linear_relu(input, self.weight, self.bias)


class _ConvClamp(nn.Module):
    _op: Callable[..., Tensor]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _is_differentiated(input, weight, bias):
            native: Any = super()
            output: Tensor = native._conv_forward(input, weight, bias)
            return output.clamp(min=0)
        return padded(self._op, self, input, weight, bias)


class ConvClamp1d(_ConvClamp, nn.Conv1d):
    """A Conv1d with a clamp behind it."""

    _op = staticmethod(conv1d_relu)


class ConvClamp2d(_ConvClamp, nn.Conv2d):
    """A Conv2d with a clamp behind it."""

    _op = staticmethod(conv2d_relu)


CLAMPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearClamp,
    nn.Conv1d: ConvClamp1d,
    nn.Conv2d: ConvClamp2d,
}
