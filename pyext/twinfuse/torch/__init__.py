"""The ops and modules for PyTorch: `import twinfuse.torch as tft`."""

from __future__ import annotations

from twinfuse.torch import nn
from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.fuse import explain, fuse, unfuse
from twinfuse.torch.linear_relu import linear_relu

__all__ = ["conv1d_relu", "conv2d_relu", "explain", "fuse", "linear_relu", "nn", "unfuse"]
