"""Measured choices of GPU kernels: what the core is told, what is kept in a file, how one is made.

Needs no framework. `twinfuse.torch._tune` finds the calls and measures; the file that it leaves is
read when a GPU is first used in a process, whichever framework uses it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twinfuse import _backend, _build
from twinfuse._version import __version__

FORMAT = 1
# A candidate must be faster by this than the one that is taken already: less is noise.
MARGIN = 0.02

Run = Callable[[], Any]
Measure = Callable[[Sequence[Run]], list[float]]

_SIGNATURES: dict[str, tuple[type | None, list[Any]]] = {
    "twinfuse_tune_record": (ctypes.c_char_p, []),
    "twinfuse_tune_end": (None, []),
    "twinfuse_tune_force": (None, [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32]),
    "twinfuse_tune_select": (ctypes.c_int32, [ctypes.c_char_p]),
}
_OnDevice = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclass(frozen=True)
class Candidate:
    """A kernel, and into how many parts its sums are cut; 0: a way of computing, not a kernel."""

    kernel: str
    splits: int


@dataclass
class Problem:
    """A product as the core names it (csrc/gpu/tuning.h), and what can compute it."""

    name: str
    candidates: list[Candidate] = field(default_factory=list)
    taken: int = 0

    @property
    def is_way(self) -> bool:
        """Whether it decides which other problems are met."""
        return self.candidates[0].splits == 0


@dataclass(frozen=True)
class Tuned:
    """What was decided for a problem: a row of `twinfuse.tune`.

    `before` and `after` are seconds of the op's whole call, with the kernel (or way of computing)
    that it had taken before and with the chosen one; what was decided earlier is the same in both.
    """

    op: str
    problem: str
    kernel: str
    splits: int
    before: float
    after: float


class TuneReport(list[Tuned]):
    """The rows of `twinfuse.tune`; prints as a table. `path` is the file that keeps them."""

    path: Path | None = None

    def __str__(self) -> str:
        rows = [("op", "extents", "kernel", "splits", "before", "after")]
        rows += [
            (
                row.op,
                row.problem.rpartition(" ")[2],
                row.kernel,
                str(row.splits or ""),
                f"{row.before * 1e6:.1f} us",
                f"{row.after * 1e6:.1f} us",
            )
            for row in self
        ]
        kept = f"kept in {self.path}" if self.path else "kept in this process only"
        return f"{_backend.as_table(rows)}\n{kept}"


class Session:
    """Records the calling thread's calls, and makes them take what it is told to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.twinfuse_tune_end()

    def record(self, run: Run) -> list[Problem]:
        """The problems that `run` meets, in order."""
        self.library.twinfuse_tune_record()
        run()
        problems: dict[str, Problem] = {}
        for line in self.library.twinfuse_tune_record().decode().splitlines():
            name, kernel, splits, taken = line.split("\t")
            problem = problems.setdefault(name, Problem(name))
            if taken == "1":
                problem.taken = len(problem.candidates)
            problem.candidates.append(Candidate(kernel, int(splits)))
        return list(problems.values())

    def force(self, problem: str, candidate: Candidate) -> None:
        kernel = candidate.kernel.encode()
        self.library.twinfuse_tune_force(problem.encode(), kernel, candidate.splits)


def decide(session: Session, op: str, run: Run, measure: Measure) -> list[Tuned]:
    """The fastest candidate of every problem that `run` meets; they stay forced.

    `measure` returns the seconds of each of several calls. A call's products run one after the
    other, so that the best of one does not depend on the others; ways of computing meet problems of
    their own, and are compared when these are decided.
    """
    rows: dict[str, Tuned] = {}

    def products(problems: list[Problem]) -> None:
        for problem in problems:
            if len(problem.candidates) > 1 and not problem.is_way and problem.name not in rows:
                rows[problem.name] = _decide(session, op, problem, run, measure)

    problems = session.record(run)
    products(problems)
    for way in problems:
        if way.is_way:
            for candidate in way.candidates:
                session.force(way.name, candidate)
                products(session.record(run))
            rows[way.name] = _decide(session, op, way, run, measure)
    return list(rows.values())


def _decide(session: Session, op: str, problem: Problem, run: Run, measure: Measure) -> Tuned:
    def forced(candidate: Candidate) -> Run:
        def call() -> None:
            session.force(problem.name, candidate)
            run()

        return call

    seconds = measure([forced(candidate) for candidate in problem.candidates])
    best, taken = min(range(len(seconds)), key=seconds.__getitem__), problem.taken
    if not seconds[best] < seconds[taken] * (1 - MARGIN):
        best = taken
    chosen = problem.candidates[best]
    session.force(problem.name, chosen)
    return Tuned(op, problem.name, chosen.kernel, chosen.splits, seconds[taken], seconds[best])


def library() -> ctypes.CDLL:
    """The core; raises RuntimeError where it is missing."""
    from twinfuse import _core

    core, reason = _core.load()
    if core is None:
        raise RuntimeError(f"twinfuse.tune: {reason}")
    return core


def select(core: ctypes.CDLL, choices: Iterable[dict[str, Any]]) -> int:
    """Tell the core; how many entries it understood."""
    lines = (f"{c['problem']}\t{c['kernel']}\t{c['splits']}\n" for c in choices)
    return int(core.twinfuse_tune_select("".join(lines).encode()))


def path_of(gpu: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "_", gpu).strip("_")
    return _build.cache_folder() / f"choices-{name}-{__version__}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Choices of a file; none, with a warning, where it is not what `keep` writes."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']!r}, expected {FORMAT}")
        choices: list[dict[str, Any]] = content["choices"]
        for choice in choices:
            texts = choice["problem"], choice["kernel"]
            if not all(type(text) is str for text in texts) or type(choice["splits"]) is not int:
                raise TypeError(f"it has a choice without a meaning: {choice!r}")
        return choices
    except FileNotFoundError:
        return []
    except Exception as error:
        # What a file of the cache holds must never stop a call.
        warnings.warn(
            f"{path}: not the choices of twinfuse.tune ({error}); they are ignored. "
            "Delete the file or tune again",
            stacklevel=2,
        )
        return []


def keep(gpu: str, rows: Iterable[Tuned]) -> Path:
    """Add choices to the file of a GPU, in place of those for the same problems."""
    path = path_of(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be read is written anew
        choices = {choice["problem"]: choice for choice in read(path)}
    choices |= {row.problem: asdict(row) for row in rows}
    head = json.dumps({"format": FORMAT, "gpu": gpu, "twinfuse": __version__})[:-1]
    lines = ",\n".join(json.dumps(choice) for choice in choices.values())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f'{head}, "choices": [\n{lines}\n]}}\n')
        os.replace(new, path)  # other processes read the old one or the new one
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    return path


_read: set[Path] = set()  # by this process


@_OnDevice
def _on_device(name: bytes) -> None:
    """A GPU is used for the first time: the core takes what was measured on it."""
    with contextlib.suppress(Exception):  # a warning that is an error, too
        load(name.decode(errors="replace"))


def load(gpu: str) -> None:
    path = path_of(gpu)
    if path in _read:
        return
    _read.add(path)
    if choices := read(path):
        select(library(), choices)


def attach(core: ctypes.CDLL) -> None:
    """Declare the core's functions of this module, and listen for devices."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments
    core.twinfuse_tune_on_device(_on_device)
    atexit.register(core.twinfuse_tune_on_device, None)  # threads may outlive the interpreter
