"""Fused Keras layers, and `fuse`, which puts them into a model that exists.

The layers run on the Keras backends "tensorflow" and "torch"; on others they are the native
layers, with a `twinfuse.FallbackWarning`. Loading a saved fused model needs this import first.
"""

from __future__ import annotations

from twinfuse.keras import layers
from twinfuse.keras.fuse import explain, fuse, unfuse

__all__ = ["explain", "fuse", "layers", "unfuse"]
