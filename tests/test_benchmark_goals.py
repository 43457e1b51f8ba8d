"""Goals of the benchmark: what a synthetic run reaches, misses, or does not speak of."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rich")

from benchmarks import conv_relu, linear_relu, lstm, networks
from benchmarks.goals import ALL_PEERS, MEMORY_RESOLUTION, Goal, judge, memory_ratio
from benchmarks.harness import Candidate, Timing
from benchmarks.limits import Limits
from benchmarks.linear_relu import LinearShape
from benchmarks.operands import Section, Shape
from benchmarks.results import CaseResult, MemoryUse, RunResult, SectionResult

OWN, EAGER, FUSED = "twinfuse torch", "torch eager", "oneDNN fused"


def machine_limits() -> Limits:
    return Limits(
        2,
        flops={"float32": 1e11, "float64": 5e10, "bfloat16": 0.0},
        bytes={"L2": {"read": 2e11}, "L3": {"read": 1e11, "copy": 1.2e11}, "DRAM": {"read": 2e10}},
        caches={"L2": 1 << 20, "L3": 32 << 20},
    )


def synthetic_run(
    seconds: dict[Shape, dict[str, float]],
    limits: Limits | None = None,
    kernels: bool = True,
    name: str = "forward",
) -> RunResult:
    """A run whose candidates took the given seconds in each of three rounds."""
    section = SectionResult(Section(name, "Forward", "forward", shapes=tuple(seconds)))
    for shape, times in seconds.items():
        section.cases.append(
            CaseResult(
                shape,
                flops=2e9,
                traffic=1 << 16,
                candidates={n: Candidate(n, "PyTorch", list, n == OWN) for n in times},
                timings={n: Timing((t, t, t), 1) for n, t in times.items()},
                kernels={OWN: {"linear_relu_forward": 1}} if kernels else {},
            )
        )
    return RunResult("linear_relu", {}, limits or machine_limits(), [section])


A, B = LinearShape(8, 8, 8), LinearShape(16, 16, 16)
# Against eager 2x and 4x; against the best peer 0.5x and 2x.
TIMES = {A: {OWN: 1.0, EAGER: 2.0, FUSED: 0.5}, B: {OWN: 1.0, EAGER: 4.0, FUSED: 2.0}}


@pytest.mark.parametrize(
    ("measure", "peer", "shapes", "expected"),
    [
        ("geomean", EAGER, (), 8**0.5),
        ("each", EAGER, (), 2.0),
        ("geomean", ALL_PEERS, (), 1.0),
        ("geomean", (EAGER, FUSED), (), 1.0),
        ("each", (EAGER,), (), 2.0),
        ("each", ALL_PEERS, (), 0.5),
        ("each", ALL_PEERS, (B,), 2.0),
        ("fma", "", (), 2e9 / 1e11),
    ],
)
def test_goals_are_judged_in_both_directions(
    measure: Any, peer: Any, shapes: tuple[Shape, ...], expected: float
) -> None:
    run = synthetic_run(TIMES)
    for limit, reached in ((expected * 0.99, True), (expected * 1.01, False)):
        goal = Goal("forward", measure, limit, OWN, peer, shapes=shapes)
        verdict = judge(goal, run, (A, B))
        assert verdict.measured == pytest.approx(expected)
        assert verdict.reached is reached


def test_worst_shape_is_named() -> None:
    goal = Goal("forward", "each", 1.0, OWN, ALL_PEERS)
    assert judge(goal, synthetic_run(TIMES), (A, B)).where == "worst: 8x8x8"


def test_part_of_the_shapes_reaches_nothing() -> None:
    goal = Goal("forward", "each", 1.0, OWN, EAGER)
    verdict = judge(goal, synthetic_run({A: TIMES[A]}), (A, B))
    assert (verdict.measured, verdict.reached) == (2.0, None)
    assert judge(goal, synthetic_run(TIMES, name="training"), (A, B)).reached is None
    without = judge(goal, synthetic_run({A: {OWN: 1.0}}), (A, B))
    assert (without.measured, without.reached) == (None, None)
    # The best of several is known where all of them were measured.
    times = {A: TIMES[A], B: {OWN: 1.0, EAGER: 4.0}}
    several = Goal("forward", "geomean", 0.1, OWN, (EAGER, FUSED))
    verdict = judge(several, synthetic_run(times), (A, B))
    assert (verdict.measured, verdict.reached) == (pytest.approx(0.5), None)


def test_memory_and_duration_goals_are_upper_limits() -> None:
    run = RunResult("linear_relu", {}, machine_limits())
    section = SectionResult(Section("memory", "Memory", "memory", shapes=(A,)))
    run.sections.append(section)
    goal = Goal("memory", "memory", 1.0, OWN, EAGER)
    for own, reached in ((50 << 20, True), (90 << 20, False)):
        section.memory = {A: {OWN: MemoryUse(own), EAGER: MemoryUse(80 << 20)}}
        assert judge(goal, run, (A,)).reached is reached
    run.sections.append(SectionResult(Section("install", "Install", "install"), seconds=200.0))
    assert judge(Goal("install", "seconds", 180.0), run, ()).reached is False
    assert judge(Goal("install", "seconds", 220.0), run, ()).reached is True


def test_memory_ratio_takes_the_worse_view_and_ignores_noise() -> None:
    assert memory_ratio(MemoryUse(80 << 20), MemoryUse((80 << 20) - MEMORY_RESOLUTION)) == 1.0
    assert memory_ratio(MemoryUse(10 << 20, 300), MemoryUse(20 << 20, 200)) == 1.5


@pytest.mark.parametrize("op", [linear_relu, conv_relu, lstm, networks], ids=lambda op: op.OP)
def test_the_goals_name_sections_and_shapes_that_exist(op: Any) -> None:
    sections = {s.name: s for s in op.SECTIONS}
    for goal in op.GOALS:
        shapes = sections[goal.section].shapes
        if goal.measure == "memory":
            assert (goal.own, goal.peer) in op.MEMORY_PAIRS.values()
        assert set(goal.shapes) <= set(shapes), goal.sentence
        # A shape where its candidate is not measured would keep a goal from ever being reached.
        in_tensorflow = any(word in goal.own for word in ("TF", "tf", "Keras"))
        framework = "tensorflow" if in_tensorflow else "torch"
        served = [framework in op.frameworks_of(shape) for shape in goal.shapes or shapes]
        assert all(served), goal.sentence
    assert len({s.name for s in op.SECTIONS}) == len(op.SECTIONS)
