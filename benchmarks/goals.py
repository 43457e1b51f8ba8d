"""Goals: a figure, the least it should be, and whether a run reached it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import geometric_mean
from benchmarks.operands import Shape
from benchmarks.results import MemoryUse, RunResult, SectionResult

ALL_PEERS = "*"

# RSS is counted in pages by thread, and lags by some pages of each: what differs less is equal.
MEMORY_RESOLUTION = 256 << 10


@dataclass(frozen=True)
class Goal:
    """`sentence` is what is promised of section `section`; `measure` says how the figure is made.

    geomean, each: how many times as fast as `peer` candidate `own` is, over the shapes or on the
        worst of them (`ALL_PEERS`: as the best peer of each shape; several: as the best of
        these).
    fma: share of the measured peak of fused multiply-adds, on the worst shape.
    memory: peak bytes over the peer's, on the worst shape; `limit` is an upper one.
    seconds: duration; `limit` is an upper one.
    """

    section: str
    measure: Literal["geomean", "each", "fma", "memory", "seconds"]
    limit: float
    own: str = ""
    peer: str | tuple[str, ...] = ""
    sentence: str = ""
    shapes: tuple[Shape, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """`reached` is None when the run did not measure all that the goal speaks of."""

    goal: Goal
    measured: float | None
    reached: bool | None
    where: str = ""


def judge(goal: Goal, run: RunResult, shapes: Sequence[Shape]) -> Verdict:
    """Compare what `run` measured with `goal`; `shapes` are all those of the goal's section.

    A run of fewer shapes shows its figure but reaches nothing.
    """
    section = run.section(goal.section)
    if section is None:
        return Verdict(goal, None, None, "not run")
    if goal.measure == "seconds":
        if section.seconds is None:
            return Verdict(goal, None, None, "not measured")
        return Verdict(goal, section.seconds, section.seconds <= goal.limit)
    wanted = goal.shapes or tuple(shapes)
    figures = {s: v for s, v in _figures(goal, section, run).items() if s in wanted}
    if not figures:
        return Verdict(goal, None, None, "not measured")
    upper = goal.measure == "memory"
    if goal.measure == "geomean":
        measured, where = geometric_mean(list(figures.values())), ""
    else:
        worst = (max if upper else min)(figures, key=lambda shape: figures[shape])
        measured, where = figures[worst], f"worst: {worst}"
    if len(figures) < len(wanted):
        return Verdict(goal, measured, None, f"only {len(figures)} of {len(wanted)} shapes")
    reached = measured <= goal.limit if upper else measured >= goal.limit
    return Verdict(goal, measured, reached, where)


def _figures(goal: Goal, section: SectionResult, run: RunResult) -> dict[Shape, float]:
    peers = (goal.peer,) if isinstance(goal.peer, str) else goal.peer
    if goal.measure == "memory":
        return {
            shape: max(memory_ratio(uses[goal.own], uses[peer]) for peer in peers)
            for shape, uses in section.memory.items()
            if goal.own in uses and all(peer in uses for peer in peers)
        }
    if goal.measure == "fma":
        peak = run.limits.peak_flops(section.section.dtype)
        return {
            c.shape: c.flops / c.seconds(goal.own) / peak
            for c in section.cases
            if peak and goal.own in c.timings
        }
    ratios = [section.ratios(goal.own, None if p == ALL_PEERS else p) for p in peers]
    everywhere = [shape for shape in ratios[0] if all(shape in of_peer for of_peer in ratios)]
    return {shape: min(of_peer[shape] for of_peer in ratios) for shape in everywhere}


def memory_ratio(own: MemoryUse, peer: MemoryUse) -> float:
    """Larger of the resident and the allocator's ratio; 1 where they differ by less than noise."""
    views = ((own.resident, peer.resident, MEMORY_RESOLUTION), (own.allocator, peer.allocator, 0))
    ratios = [
        1.0 if abs(mine - theirs) <= resolution else mine / max(theirs, 1)
        for mine, theirs, resolution in views
        if mine is not None and theirs is not None
    ]
    return max(ratios, default=math.nan)
