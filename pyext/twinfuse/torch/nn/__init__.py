"""Modules: the fused counterparts of those in `torch.nn`."""

from __future__ import annotations

from twinfuse.torch.nn.conv_relu import ConvReLU1d, ConvReLU2d
from twinfuse.torch.nn.linear_relu import LinearReLU
from twinfuse.torch.nn.lstm import LSTM, LSTMCell

__all__ = ["LSTM", "ConvReLU1d", "ConvReLU2d", "LSTMCell", "LinearReLU"]
