"""The ops and modules for PyTorch: `import twinfuse.torch as tft`."""

from __future__ import annotations

from twinfuse.torch import nn
from twinfuse.torch.compile import compile_pass
from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.fuse import explain, fuse, unfuse
from twinfuse.torch.linear_relu import linear_relu
from twinfuse.torch.lstm import lstm
from twinfuse.torch.lstm_cell import lstm_cell

__all__ = [
    "compile_pass",
    "conv1d_relu",
    "conv2d_relu",
    "explain",
    "fuse",
    "linear_relu",
    "lstm",
    "lstm_cell",
    "nn",
    "unfuse",
]
