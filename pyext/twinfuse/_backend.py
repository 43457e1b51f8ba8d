"""Which backend an op takes, and what happens when it is not a fused one."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from types import TracebackType

BACKENDS = ("cuda", "cpu", "triton", "reference")


class FallbackWarning(UserWarning):
    """An op ran on the framework's own layers; the text says which op and why."""


class FallbackError(RuntimeError):
    """As `FallbackWarning`, in strict mode."""


@dataclass(frozen=True)
class Choice:
    """What one op call takes: a row of `twinfuse.explain`."""

    op: str
    backend: str
    kernel: str = ""
    reason: str = ""
    where: str = ""  # name of the layer inside a model


class Report(list[Choice]):
    """The rows of `twinfuse.explain`; prints as a table."""

    def __str__(self) -> str:
        header = Choice(where="layer", op="op", backend="backend", kernel="kernel", reason="reason")
        rows = [(c.where, c.op, c.backend, c.kernel, c.reason) for c in (header, *self)]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


# Process-wide, like the frameworks' own backend flags; torch.compile guards on both and retraces.
requested: str | None = None
strict_mode: bool = os.environ.get("TWINFUSE_STRICT", "") not in ("", "0")

_warned: set[tuple[str, str]] = set()


class _Setting:
    """A value set at once, and put back on leaving if used as a context manager."""

    def __init__(self, name: str, value: object) -> None:
        self._name, self._previous = name, globals()[name]
        globals()[name] = value

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        globals()[self._name] = self._previous


def use_backend(name: str | None) -> _Setting:
    """Take backend `name` for every op from now on, or inside a `with` block.

    Only `"reference"` (the framework's own layers) and `None` (choose by device and dtype) change
    anything today; naming a fused backend makes a call that cannot take it fall back with that
    reason. A `tf.function` keeps the backend it was traced with.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return _Setting("requested", name)


def strict(enabled: bool = True) -> _Setting:
    """Raise `FallbackError` instead of falling back to `reference`, from now on or in a `with` block.

    A backend chosen by `use_backend("reference")` is no fallback and never raises.
    """
    return _Setting("strict_mode", bool(enabled))


def fall_back(op: str, reason: str) -> None:
    """Record that `op` takes `reference` because of `reason`: warn once per reason, or raise."""
    if requested == "reference":
        return
    text = f"{op} runs on the framework's own layers: {reason}"
    if strict_mode:
        raise FallbackError(text)
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(text, FallbackWarning, stacklevel=3)
