"""Which backend an op takes, and what happens when it is not a fused one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

BACKENDS = ("cuda", "cpu", "triton", "reference")


class FallbackWarning(UserWarning):
    """An op ran on the framework's own layers; the text says which op and why."""


class FallbackError(RuntimeError):
    """As `FallbackWarning`, in strict mode."""

    # TensorFlow's AutoGraph turns exceptions it does not know into its own, unless they say this.
    ag_pass_through = True


@dataclass(frozen=True)
class Choice:
    """What one op call takes: a row of `twinfuse.explain`.

    `backend` is one of `BACKENDS`; in the report of a model also "native" for a layer that is not
    one of ours, "fused" for one whose work the layer before it does, and "deferred" for one that
    finds out while it runs what follows.
    """

    op: str
    backend: str
    kernel: str = ""
    reason: str = ""
    where: str = ""  # name of the layer inside a model


class Report(list[Choice]):
    """The rows of `twinfuse.explain`; prints as a table."""

    def __str__(self) -> str:
        header = Choice(where="layer", op="op", backend="backend", kernel="kernel", reason="reason")
        return as_table((c.where, c.op, c.backend, c.kernel, c.reason) for c in (header, *self))


def as_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of texts, of which the first is the header, in columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# Process-wide, like the frameworks' own backend flags; torch.compile guards on both and retraces.
requested: str | None = None
strict_mode: bool = os.environ.get("TWINFUSE_STRICT", "") not in ("", "0")

_warned: set[tuple[str, str]] = set()


# A `global` statement is what torch.compile traces; writing to `globals()` it does not.
def _set_requested(value: str | None) -> None:
    global requested
    requested = value


def _set_strict(value: bool) -> None:
    global strict_mode
    strict_mode = value


class _Setting:
    """A value set at once, and put back on leaving if used as a context manager."""

    def __init__(self, assign: Callable[[Any], None], previous: Any, value: Any) -> None:
        self._assign, self._previous = assign, previous
        assign(value)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._assign(self._previous)


def use_backend(name: str | None) -> _Setting:
    """Take backend `name` for every op from now on, or inside a `with` block.

    Only `"reference"` (the framework's own layers) and `None` (choose by device and dtype) change
    anything today; naming a fused backend makes a call that cannot take it fall back with that
    reason. A `tf.function` keeps the backend it was traced with.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return _Setting(_set_requested, requested, name)


def strict(enabled: bool = True) -> _Setting:
    """Raise `FallbackError` instead of taking `reference`, from now on or in a `with` block.

    A backend chosen by `use_backend("reference")` is no fallback and never raises.
    """
    return _Setting(_set_strict, strict_mode, bool(enabled))


def fall_back(op: str, reason: str) -> None:
    """Record that `op` takes `reference` because of `reason`: warn once per reason, or raise."""
    if requested == "reference":
        return
    text = f"{op} runs on the framework's own layers: {reason}"
    if strict_mode:
        raise FallbackError(text)
    if (op, reason) not in _warned:
        warnings.warn(text, FallbackWarning, stacklevel=_level_of_caller())
        _warned.add((op, reason))


def _level_of_caller() -> int:
    """The `stacklevel` that shows the user's line instead of one in this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "twinfuse":
        level, frame = level + 1, frame.f_back
    return level
