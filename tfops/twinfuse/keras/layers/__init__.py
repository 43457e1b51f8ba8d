"""Subclasses of the Keras layers of the same names, with the same constructors and configs."""

from __future__ import annotations

from twinfuse.keras.layers.conv import Conv1D, Conv2D
from twinfuse.keras.layers.dense import Dense
from twinfuse.keras.layers.lstm import LSTM, LSTMCell

__all__ = ["LSTM", "Conv1D", "Conv2D", "Dense", "LSTMCell"]
