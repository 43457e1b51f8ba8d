"""Which backend an op takes, and what happens when it is not a fused one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
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
class Saving:
    """An estimate of what a fused layer does without, going forward, that native ones do.

    A ReLU of its own reads and writes each element of what the layer before it has written, and so
    do a BatchNorm and, in Keras, the sum with the bias. Folding a BatchNorm into the weights takes
    a pass over these, and small kernels, which count against it. This is memory traffic and
    launches, not time: what stays in a cache is moved fast, and `tf.function` and compilers join
    some of these kernels by themselves.
    """

    per_element: int  # bytes for each element of the output
    per_call: int = 0  # more bytes for each call
    kernels: int = 1  # launches for each call
    calls: int | None = None  # that were seen, and the elements of their outputs
    elements: int = 0

    @property
    def bytes(self) -> int | None:
        """Of all calls that were seen; None where none were looked at."""
        if self.calls is None:
            return None
        return self.per_element * self.elements + self.per_call * self.calls

    def __str__(self) -> str:
        if self.bytes is not None and self.calls is not None:
            return f"{_in_units(self.bytes)}, {_counted(self.kernels * self.calls)}"
        once = f" {'-' if self.per_call < 0 else '+'} {_in_units(abs(self.per_call))}"
        return (
            f"{self.per_element} B an element{once if self.per_call else ''}, "
            f"{_counted(self.kernels)} a call"
        )


@dataclass(frozen=True)
class Choice:
    """What one op call takes: a row of `twinfuse.explain`.

    `backend` is one of `BACKENDS`; in the report of a model also "native" for a layer that is not
    one of ours, "fused" for one whose work the layer before it does, "deferred" for one that finds
    out while it runs what follows, and "unknown" for one of ours whose weights are out of reach.
    """

    op: str
    backend: str
    kernel: str = ""
    reason: str = ""
    where: str = ""  # name of the layer inside a model
    saving: Saving | None = None  # of a fused layer in a model; of LSTMs nothing is estimated


class Report(list[Choice]):
    """The rows of `twinfuse.explain`; prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "op", "backend", "kernel", "saves", "reason")]
        rows += [(c.where, c.op, c.backend, c.kernel, str(c.saving or ""), c.reason) for c in self]
        return as_table(rows)

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each row, of what JSON knows; a `saving` has `bytes` as well."""
        rows = [asdict(choice) for choice in self]
        for row, choice in zip(rows, self):
            if choice.saving:
                row["saving"]["bytes"] = choice.saving.bytes
        return rows


def _in_units(count: int) -> str:
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit, size = next((u for u in units.items() if abs(count) >= u[1]), ("B", 1))
    return f"{count / size:.3g} {unit}" if size > 1 else f"{count} B"


def _counted(kernels: int) -> str:
    return f"{kernels} kernel{'' if abs(kernels) == 1 else 's'}"


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

    `"reference"` is the framework's own layers, `None` chooses by device and dtype. Naming a fused
    backend makes a call that cannot take it fall back with that reason, and others take it even
    where the framework's operators are chosen as the faster ones. A `tf.function` keeps the backend
    it was traced with.
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
