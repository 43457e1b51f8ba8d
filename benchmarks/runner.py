"""Runs sections: build each case, check its candidates, time them, and keep what was seen."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from benchmarks import memory
from benchmarks.goals import Goal
from benchmarks.harness import Candidate, Settings, interleave
from benchmarks.limits import Limits, cpu_flags, cpu_model
from benchmarks.operands import TOLERANCE, Case, Kind, Section, Shape, error
from benchmarks.results import CaseResult, RunResult, SectionResult

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("twinfuse", "torch", "tensorflow", "tensorflow-cpu", "keras", "numpy")


class Op(Protocol):
    """What the module of an op (benchmarks/<op>.py) provides."""

    OP: str
    SHAPE_FORM: str
    SECTIONS: Sequence[Section]
    GOALS: Sequence[Goal]
    # By framework: whose peak memory is measured, and beside whose. Eager ones where there is a
    # choice: tracing and compilation take more memory than the pass itself.
    MEMORY_PAIRS: Mapping[str, tuple[str, str]]

    def parse_shape(self, text: str) -> Shape: ...
    def frameworks_of(self, shape: Shape) -> Sequence[str]: ...
    def case(
        self,
        kind: Kind,
        shape: Shape,
        dtype: str,
        frameworks: Sequence[str],
        only: Sequence[str] = (),
    ) -> Case: ...


@dataclass
class Runner:
    """Runs the sections of one op with the same threads, settings and progress display."""

    op: Op
    frameworks: Sequence[str]
    threads: int
    settings: Settings
    progress: Progress
    result: RunResult = field(init=False)

    def __post_init__(self) -> None:
        limits = Limits(self.threads)
        self.result = RunResult(self.op.OP, environment(self.threads, self.settings), limits)

    def run(self, sections: Sequence[Section]) -> RunResult:
        task = self.progress.add_task("", total=sum(max(1, len(s.shapes)) for s in sections))
        for section in sections:
            self.progress.update(task, description=section.name, refresh=True)
            self.result.limits.probe(repeats=1)
            self.result.sections.append(self._section(section, task))
        self.result.limits.probe(repeats=1)
        self.progress.remove_task(task)
        return self.result

    def _section(self, section: Section, task: Any) -> SectionResult:
        done = SectionResult(section)
        if section.kind == "install":
            try:
                done.seconds = install_seconds()
            except RuntimeError as failure:
                done.skipped["pip install"] = str(failure)
            self.progress.advance(task)
            return done
        for shape in section.shapes:
            if not self._frameworks(shape):
                self.progress.advance(task)
                continue
            self.progress.update(task, description=f"{section.name} {shape}", refresh=True)
            if section.kind == "memory":
                self._memory(done, shape)
                self.progress.advance(task)
            else:
                done.cases.append(self._case(section, section.kind, shape, task))
        return done

    def _case(self, section: Section, kind: Kind, shape: Shape, task: Any) -> CaseResult:
        case = self.op.case(kind, shape, section.dtype, self._frameworks(shape))
        started = self.progress.tasks[self.progress.task_ids.index(task)].completed

        def show(done: int, rounds: int) -> None:
            self.progress.update(task, completed=started + done / rounds, refresh=True)

        with case.context():
            sound, kernels = check(case, section.dtype, self.op.OP)
            timings = interleave(sound, self.settings, on_round=show)
        self.progress.update(task, completed=started + 1)
        by_name = {c.name: replace(c, run=_nothing) for c in sound}  # lets go of the operands
        gc.collect()
        return CaseResult(
            shape,
            case.flops,
            case.traffic,
            by_name,
            timings,
            kernels,
            dict(case.skipped),
            dict(case.notes),
            case.steps,
            case.ops != (),
        )

    def _frameworks(self, shape: Shape) -> list[str]:
        served = self.op.frameworks_of(shape)
        return [f for f in self.frameworks if f in served]

    def _memory(self, done: SectionResult, shape: Shape) -> None:
        uses = done.memory.setdefault(shape, {})
        done.memory_pairs = tuple(self.op.MEMORY_PAIRS.values())
        for framework in self._frameworks(shape):
            for name in self.op.MEMORY_PAIRS[framework]:
                try:
                    uses[name] = memory.measure(
                        self.op.OP, name, framework, shape, done.section.dtype, self.threads
                    )
                except RuntimeError as failure:
                    done.skipped[name] = str(failure)


def _nothing() -> None:
    return None


def check(case: Case, dtype: str, op: str) -> tuple[list[Candidate], dict[str, dict[str, int]]]:
    """Run each candidate once: those that compute the right thing, and the kernels ours launched.

    The others go to `case.skipped` with what is wrong with them.
    """
    ops = (op,) if case.ops is None else case.ops
    sound: list[Candidate] = []
    kernels: dict[str, dict[str, int]] = {}
    for candidate in case.candidates:
        candidate_kernels: dict[str, int] = {}
        try:
            with launched(ops, candidate_kernels):
                outputs = case.outputs(candidate, candidate.run())
        except Exception as failure:
            case.skipped[candidate.name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            continue
        distance = error(outputs, case.references.get(candidate.framework, case.reference))
        if distance > TOLERANCE[dtype]:
            case.skipped[candidate.name] = f"wrong result: relative error {distance:.1e}"
            continue
        sound.append(candidate)
        if candidate.own:
            kernels[candidate.name] = candidate_kernels
    return sound, kernels


@contextlib.contextmanager
def launched(ops: Sequence[str], into: dict[str, int]) -> Iterator[None]:
    """Put into `into` how often each kernel of `ops` is launched inside the block."""
    import twinfuse

    before = twinfuse.launches()
    yield
    for name, count in twinfuse.launches().items():
        if any(op in name for op in ops) and count > before.get(name, 0):
            into[name] = count - before.get(name, 0)


def install_seconds() -> float:
    """Seconds of `pip install .` in a fresh virtual environment, the second time it is done.

    The first time fills pip's caches. Works on a copy of the tree, so that nothing built before
    helps. Raises RuntimeError with pip's last line.
    """
    seconds = 0.0
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info")
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            tree, venv = Path(folder) / "tree", Path(folder) / "venv"
            shutil.copytree(ROOT, tree, ignore=ignored)
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
            command = [str(venv / "bin" / "python"), "-m", "pip", "install", str(tree)]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - start
            if done.returncode:
                raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return seconds


def environment(threads: int, settings: Settings) -> dict[str, Any]:
    """What a reader must know to repeat the run."""
    import twinfuse
    from twinfuse import _core

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    # The sources decide over what an older installation of them says.
    versions["twinfuse"] = twinfuse.__version__
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_flags": cpu_flags(),
        "isa": _core.isa() or None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "settings": asdict(settings),
        "load_average": list(os.getloadavg()),
    }


def commit() -> str | None:
    """Commit of the sources, with "+" when files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
