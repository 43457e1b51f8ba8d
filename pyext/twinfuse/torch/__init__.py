"""The ops and modules for PyTorch: `import twinfuse.torch as tft`."""

from __future__ import annotations

from twinfuse.torch import nn
from twinfuse.torch.fuse import explain, fuse, unfuse
from twinfuse.torch.linear_relu import linear_relu

__all__ = ["explain", "fuse", "linear_relu", "nn", "unfuse"]
