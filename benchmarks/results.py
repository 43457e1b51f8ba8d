"""What a run has measured, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Candidate, Spread, Timing, geometric_mean, ratio
from benchmarks.limits import Limits
from benchmarks.operands import Section, Shape


@dataclass
class CaseResult:
    """One shape: timings by candidate name, and the least time the machine's limits allow."""

    shape: Shape
    flops: float
    traffic: int
    candidates: dict[str, Candidate]
    timings: dict[str, Timing]
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    fused: bool = True  # ours is to launch kernels

    def own(self) -> list[str]:
        return [n for n in self.timings if self.candidates[n].own]

    def peers(self, own: str | None = None) -> list[str]:
        """Names of all peers, or of those that share the framework of `own`."""
        return [
            n
            for n in self.timings
            if not self.candidates[n].own
            and (own is None or self.candidates[n].framework == self.candidates[own].framework)
        ]

    def ratio(self, own: str, peer: str) -> Spread:
        return ratio(self.timings[peer], self.timings[own])

    def best_peer(self, own: str) -> tuple[str, Spread] | None:
        """The peer, of any framework, that `own` does worst against."""
        ratios = {peer: self.ratio(own, peer) for peer in self.peers()}
        return min(ratios.items(), key=lambda item: item[1].median) if ratios else None

    def seconds(self, name: str) -> float:
        return self.timings[name].spread.median


@dataclass(frozen=True)
class MemoryUse:
    """Peak bytes of one pass above what was held before: of the process, and as the framework's
    allocator counts. TensorFlow's keeps what it has once taken, so the first is not known there.
    """

    resident: int | None = None
    allocator: int | None = None


@dataclass
class SectionResult:
    section: Section
    cases: list[CaseResult] = field(default_factory=list)
    memory: dict[Shape, dict[str, MemoryUse]] = field(default_factory=dict)
    memory_pairs: tuple[tuple[str, str], ...] = ()  # of ours, and whose memory it is compared with
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None  # of an installation

    def frameworks(self) -> list[str]:
        """Those with a candidate of ours, in the order they were measured."""
        names = (c.candidates[n].framework for c in self.cases for n in c.own())
        return list(dict.fromkeys(names))

    def own(self, framework: str) -> list[str]:
        names = (n for c in self.cases for n in c.own() if c.candidates[n].framework == framework)
        return list(dict.fromkeys(names))

    def peers(self, framework: str) -> list[str]:
        names = (n for c in self.cases for n in c.peers() if c.candidates[n].framework == framework)
        return list(dict.fromkeys(names))

    def geomean(self, own: str, peer: str | None) -> float | None:
        """Geometric mean over the shapes of the ratio to `peer`, or to the best of all for None."""
        ratios = self.ratios(own, peer)
        return geometric_mean(list(ratios.values())) if ratios else None

    def ratios(self, own: str, peer: str | None) -> dict[Shape, float]:
        found: dict[Shape, float] = {}
        for case in self.cases:
            if own not in case.timings:
                continue
            if peer is None:
                best = case.best_peer(own)
                if best:
                    found[case.shape] = best[1].median
            elif peer in case.timings:
                found[case.shape] = case.ratio(own, peer).median
        return found


@dataclass
class RunResult:
    op: str
    environment: dict[str, Any]
    limits: Limits
    sections: list[SectionResult] = field(default_factory=list)

    def section(self, name: str) -> SectionResult | None:
        return next((s for s in self.sections if s.section.name == name), None)

    def problems(self) -> list[str]:
        """Candidates of ours that could not be built, were wrong, or ran without a fused kernel."""
        found = []
        for section in self.sections:
            reasons = [(n, why) for c in section.cases for n, why in c.skipped.items()]
            reasons += section.skipped.items()
            reasons += [
                (name, f"no fused kernel ran at {case.shape}")
                for case in section.cases
                for name in case.own()
                if case.fused and not case.kernels.get(name)
            ]
            found += [
                f"{section.section.name}: {name}: {why}"
                for name, why in dict.fromkeys(reasons)
                if name.startswith("twinfuse")
            ]
        return found


def rate(case: CaseResult, name: str, limits: Limits, dtype: str) -> tuple[float, str, str, float]:
    """`(rate, unit, what limits it, share of that limit)`; the share is NaN without probes."""
    seconds = case.seconds(name)
    bound = limits.bound(case.flops, case.traffic, dtype)
    if bound is None:
        return case.flops / seconds / 1e9, "GFLOP/s", "", float("nan")
    level, least = bound
    if level == "FMA":
        return case.flops / seconds / 1e9, "GFLOP/s", level, least / seconds
    return case.traffic / seconds / 1e9, "GB/s", level, least / seconds
