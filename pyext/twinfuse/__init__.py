"""Fused neural-network kernels, written once and used from PyTorch and TensorFlow.

`import twinfuse` imports no framework: `twinfuse.torch`, `twinfuse.tensorflow` and
`twinfuse.keras` are imported by name.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from twinfuse._backend import (
    Choice,
    FallbackError,
    FallbackWarning,
    Report,
    Saving,
    strict,
    use_backend,
)
from twinfuse._core import launches
from twinfuse._tuning import Tuned, TuneReport
from twinfuse._version import __version__
from twinfuse.doctor import doctor

if TYPE_CHECKING:
    from twinfuse import convert

__all__ = [
    "Choice",
    "FallbackError",
    "FallbackWarning",
    "Report",
    "Saving",
    "TuneReport",
    "Tuned",
    "__version__",
    "convert",
    "doctor",
    "explain",
    "launches",
    "strict",
    "tune",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "convert":  # it needs NumPy
        return importlib.import_module("twinfuse.convert")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def explain(target: Any, *args: Any, **kwargs: Any) -> Report:
    """Say which backend and kernel each op of `target` takes, and why.

    `target` is a torch module, or a Keras model or layer, maybe followed by example inputs: with
    these it is run once, and the estimate of what fused layers save is that of the run. Or it is
    one of this package's functions followed by the arguments of a call (which is not made). The
    report prints as a table, and its `records()` are dictionaries.
    """
    describe = getattr(target, "__twinfuse_explain__", None)
    if describe is not None:
        return describe(*args, **kwargs)
    # Keras before torch: on Keras' torch backend every layer is a torch module too.
    if "keras" in sys.modules and isinstance(target, sys.modules["keras"].layers.Layer):
        import twinfuse.keras

        return twinfuse.keras.explain(target, *args, **kwargs)
    if "torch" in sys.modules and isinstance(target, sys.modules["torch"].nn.Module):
        import twinfuse.torch

        return twinfuse.torch.explain(target, *args, **kwargs)
    raise TypeError(
        "target: expected a torch module, a Keras model or layer, or a twinfuse function, got "
        f"{type(target).__name__}"
    )


def tune(target: Any, *args: Any, **kwargs: Any) -> TuneReport:
    """Measure which GPU kernels are the fastest for what `target(*args, **kwargs)` computes.

    `target` is a torch module or any function that computes with torch on a GPU: a model, a step of
    training, one of this package's functions. It is called once, and its results are
    differentiated if they can be; then the kernels of each fused call are measured, on
    random numbers and memory of their own. The gradients of parameters stay as they are; what the
    call itself changes (statistics of a batch normalization, the state of random numbers) is
    changed.

    The fastest kernels serve this process from now on, for problems of about the same sizes too. A
    file of the user's cache keeps them for others, of both frameworks: delete it to forget them.
    Results may differ in their last bits from those of other kernels.

    Returns:
        A row for each problem that more than one kernel can compute; prints as a table.

    Raises:
        RuntimeError: torch or a GPU is missing, or no fused kernel runs there in the call.
    """
    try:
        from twinfuse.torch._tune import tune as measure
    except ImportError as error:
        raise RuntimeError(f"twinfuse.tune measures with torch: {error}") from error
    return measure(target, *args, **kwargs)
