"""Fused ops for TensorFlow.

Loading a SavedModel that holds fused ops needs `import twinfuse.tensorflow` first; one exported
under `use_backend("reference")` loads anywhere.
"""

from __future__ import annotations

from twinfuse._backend import use_backend
from twinfuse.tensorflow.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.tensorflow.linear_relu import linear_relu
from twinfuse.tensorflow.lstm import lstm, lstm_cell

__all__ = ["conv1d_relu", "conv2d_relu", "linear_relu", "lstm", "lstm_cell", "use_backend"]
