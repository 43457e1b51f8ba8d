"""Subclasses of the Keras layers of the same names, with the same constructors and configs."""

from __future__ import annotations

from twinfuse.keras.layers.conv import Conv1D, Conv2D
from twinfuse.keras.layers.dense import Dense

__all__ = ["Conv1D", "Conv2D", "Dense"]
