"""Modules: the fused counterparts of those in `torch.nn`."""

from __future__ import annotations

from twinfuse.torch.nn.conv_relu import ConvReLU1d, ConvReLU2d
from twinfuse.torch.nn.linear_relu import LinearReLU

__all__ = ["ConvReLU1d", "ConvReLU2d", "LinearReLU"]
