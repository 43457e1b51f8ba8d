"""Fused neural-network kernels, written once and used from PyTorch and TensorFlow.

`import twinfuse` imports no framework: `twinfuse.torch`, `twinfuse.tensorflow` and
`twinfuse.keras` are imported by name.
"""

from __future__ import annotations

import sys
from typing import Any

from twinfuse._backend import (
    Choice,
    FallbackError,
    FallbackWarning,
    Report,
    strict,
    use_backend,
)
from twinfuse._core import launches
from twinfuse._version import __version__
from twinfuse.doctor import doctor

__all__ = [
    "Choice",
    "FallbackError",
    "FallbackWarning",
    "Report",
    "__version__",
    "doctor",
    "explain",
    "launches",
    "strict",
    "use_backend",
]


def explain(target: Any, *args: Any, **kwargs: Any) -> Report:
    """Say which backend and kernel each op of `target` takes, and why.

    `target` is a torch module, a Keras model or layer, or one of this package's functions followed
    by the arguments of a call (which is not made). The report prints as a table.
    """
    describe = getattr(target, "__twinfuse_explain__", None)
    if describe is not None:
        return describe(*args, **kwargs)
    # Keras before torch: on Keras' torch backend every layer is a torch module too.
    if "keras" in sys.modules and isinstance(target, sys.modules["keras"].layers.Layer):
        import twinfuse.keras

        return twinfuse.keras.explain(target)
    if "torch" in sys.modules and isinstance(target, sys.modules["torch"].nn.Module):
        import twinfuse.torch

        return twinfuse.torch.explain(target)
    raise TypeError(
        "target: expected a torch module, a Keras model or layer, or a twinfuse function, got "
        f"{type(target).__name__}"
    )
