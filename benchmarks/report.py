"""What a run prints, and the JSON it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.goals import Verdict, memory_ratio
from benchmarks.operands import Section
from benchmarks.results import CaseResult, RunResult, SectionResult, rate

SCHEMA = 1


def microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def per_step(case: CaseResult, name: str) -> str:
    return microseconds(case.seconds(name) / case.steps) if case.steps else "-"


def coloured(value: float | None, text: str = "") -> str:
    """`value` as "1.23x": green from 1, red below. "-" for a missing one."""
    if value is None or math.isnan(value):
        return "-"
    colour = "green" if value >= 1 else "red"
    return f"[{colour}]{value:.2f}x[/{colour}]{text}"


def figure(verdict: Verdict, value: float | None) -> str:
    """A goal's limit or measured value in its own unit."""
    if value is None:
        return "-"
    match verdict.goal.measure:
        case "fma":
            return f"{value:.0%}"
        case "seconds":
            return f"{value:.0f} s"
        case _:
            return f"{value:.2f}x"


def outcome(verdict: Verdict) -> str:
    return {True: "yes", False: "no", None: "not measured"}[verdict.reached]


def print_sections(console: Console, op: str, form: str, sections: Sequence[Section]) -> None:
    """What there is to run; `form` says how a shape of `op` is written."""
    table = Table("section", "what", "dtype", escape(f"shapes ({form})"), title=f"Sections of {op}")
    for section in sections:
        shapes = ", ".join(map(str, section.shapes))
        table.add_row(section.name, section.title, section.dtype, shapes)
    console.print(table)


def print_run(console: Console, run: RunResult, verdicts: Sequence[Verdict]) -> None:
    """Limits, one table for each section and framework, and the goals at the end."""
    console.print(run.op, style="bold")
    console.print(environment_text(run), highlight=False)
    console.print(limits_text(run), highlight=False)
    if busy := busy_text(run):
        console.print(busy, style="yellow", highlight=False)
    for section in run.sections:
        for framework in section.frameworks():
            console.print(_timing_table(run, section, framework))
        if section.memory:
            console.print(_memory_table(section))
        if section.seconds is not None:
            console.print(f"{section.section.title}: {section.seconds:.0f} s")
        for text in skipped(section):
            console.print(f"[yellow]left out: {text}[/yellow]", highlight=False)
        for text in notes(section):
            console.print(f"note: {text}", highlight=False)
    if verdicts:
        console.print(_goal_table(verdicts))


def environment_text(run: RunResult) -> str:
    e = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    return (
        f"{e['cpu']}, {e['threads']} threads of {e['cores']}, kernels for {e['isa']}\n"
        f"{versions}; commit {e['commit']}, {e['date']}"
    )


def busy_text(run: RunResult) -> str:
    """A warning when other programs were at work as the run began; empty otherwise."""
    e = run.environment
    load = e["load_average"][0]
    # The average of the last minute: what has just ended still counts for something.
    if load <= e["cores"] / 2:
        return ""
    return f"busy machine (load {load:.1f} on {e['cores']} cores): do not trust these figures"


def limits_text(run: RunResult) -> str:
    """The measured limits in one line, or why there are none."""
    limits = run.limits
    if not limits.flops:
        return f"limits not measured: {limits.error or 'no section ran'}"
    flops = [f"{name} {rate / 1e9:.0f}" for name, rate in limits.flops.items() if rate]
    memory = [f"{name} {max(rates.values()) / 1e9:.0f}" for name, rates in limits.bytes.items()]
    return f"limits: {', '.join(flops)} GFLOP/s; {', '.join(memory)} GB/s"


def skipped(section: SectionResult) -> list[str]:
    """Candidates that were not measured, each with its reason, once."""
    reasons = [f"{name}: {why}" for c in section.cases for name, why in c.skipped.items()]
    reasons += [f"{name}: {why}" for name, why in section.skipped.items()]
    return list(dict.fromkeys(reasons))


def notes(section: SectionResult) -> list[str]:
    """What the times of candidates leave out, by shape."""
    return [f"{c.shape}: {name}: {text}" for c in section.cases for name, text in c.notes.items()]


def _timing_table(run: RunResult, section: SectionResult, framework: str) -> Table:
    peers = section.peers(framework)
    stepped = any(case.steps for case in section.cases)
    table = Table(title=f"{section.section.title}, {section.section.dtype}, {framework}")
    table.add_column("shape", no_wrap=True)
    names = ["us", "quartiles", *(["us/step"] if stepped else []), "rate", "of limit"]
    for name in (*names, *(f"x {peer}" for peer in peers)):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("x best of all peers", overflow="fold")
    for own in section.own(framework):
        table.add_row(own, style="bold")
        for case in section.cases:
            if own in case.timings:
                table.add_row(*_timing_row(run, section, case, own, peers, stepped))
        means = [coloured(section.geomean(own, peer)) for peer in [*peers, None]]
        table.add_row(
            "geometric mean", *("" for _ in names), *means, style="bold", end_section=True
        )
    return table


def _timing_row(
    run: RunResult,
    section: SectionResult,
    case: CaseResult,
    own: str,
    peers: Sequence[str],
    stepped: bool,
) -> list[str]:
    spread = case.timings[own].spread
    value, unit, bound, share = rate(case, own, run.limits, section.section.dtype)
    best = case.best_peer(own)
    return [
        str(case.shape),
        microseconds(spread.median),
        f"{microseconds(spread.low)}-{microseconds(spread.high)}",
        *([per_step(case, own)] if stepped else []),
        f"{value:.1f} {unit}",
        "-" if math.isnan(share) else f"{share:.0%} {bound}",
        *(coloured(case.ratio(own, p).median if p in case.timings else None) for p in peers),
        coloured(best[1].median, f" {best[0]}") if best else "-",
    ]


def _memory_table(section: SectionResult) -> Table:
    table = Table(title=section.section.title)
    for name in ("shape", "candidate", "process MB", "allocator MB", "x native"):
        table.add_column(name, justify="left" if name in ("shape", "candidate") else "right")
    for row in memory_rows(section):
        against = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        colour = "green" if row["ratio"] is None or row["ratio"] <= 1 else "red"
        table.add_row(
            row["shape"],
            row["name"],
            row["resident"],
            row["allocator"],
            f"[{colour}]{against}[/{colour}]",
        )
    return table


def memory_rows(section: SectionResult) -> list[dict[str, Any]]:
    """One row for each shape and candidate; ours with the ratio to the peer, 1 or less is good."""
    return [
        {
            "shape": str(shape),
            "name": name,
            "resident": _megabytes(use.resident),
            "allocator": _megabytes(use.allocator),
            "ratio": next(
                (
                    memory_ratio(use, uses[peer])
                    for own, peer in section.memory_pairs
                    if own == name and peer in uses
                ),
                None,
            ),
        }
        for shape, uses in section.memory.items()
        for name, use in uses.items()
    ]


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f}"


def _goal_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table("section", "goal", "limit", "measured", "reached", "", title="Goals")
    for verdict in verdicts:
        colour = {True: "green", False: "red", None: "yellow"}[verdict.reached]
        table.add_row(
            verdict.goal.section,
            verdict.goal.sentence + (f"\n[dim]{verdict.goal.note}" if verdict.goal.note else ""),
            figure(verdict, verdict.goal.limit),
            figure(verdict, verdict.measured),
            f"[{colour}]{outcome(verdict)}",
            verdict.where,
        )
    return table


def to_json(run: RunResult, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Everything measured: seconds of every round, limits, kernels launched, and the verdicts."""
    return {
        "schema": SCHEMA,
        "op": run.op,
        "environment": run.environment,
        "limits": {
            "flops": run.limits.flops,
            "bytes": run.limits.bytes,
            "caches": run.limits.caches,
            "error": run.limits.error,
        },
        "sections": [_section_json(run, section) for section in run.sections],
        "goals": [
            asdict(v.goal) | {"measured": v.measured, "reached": v.reached, "where": v.where}
            for v in verdicts
        ],
        "problems": run.problems(),
    }


def _section_json(run: RunResult, section: SectionResult) -> dict[str, Any]:
    names = [own for framework in section.frameworks() for own in section.own(framework)]
    peers = list(dict.fromkeys(p for c in section.cases for p in c.peers()))
    return {
        "name": section.section.name,
        "title": section.section.title,
        "kind": section.section.kind,
        "dtype": section.section.dtype,
        "cases": [_case_json(run, section, case) for case in section.cases],
        "geometric_means": {
            own: {"best of all peers": section.geomean(own, None)}
            | {peer: section.geomean(own, peer) for peer in peers}
            for own in names
        },
        "memory": [
            {
                "shape": list(shape),
                "name": str(shape),
                "candidates": {n: asdict(u) for n, u in uses.items()},
            }
            for shape, uses in section.memory.items()
        ],
        "seconds": section.seconds,
        "skipped": section.skipped,
    }


def _case_json(run: RunResult, section: SectionResult, case: CaseResult) -> dict[str, Any]:
    candidates = {}
    for name, timing in case.timings.items():
        value, unit, bound, share = rate(case, name, run.limits, section.section.dtype)
        candidates[name] = {
            "framework": case.candidates[name].framework,
            "own": case.candidates[name].own,
            "calls_per_round": timing.number,
            "seconds": list(timing.rounds),
            **asdict(timing.spread),
            "rate": value,
            "unit": unit,
            "bound": bound or None,
            "share_of_limit": None if math.isnan(share) else share,
            "kernels": case.kernels.get(name, {}),
            "ratios": {p: asdict(case.ratio(name, p)) for p in case.peers()}
            if case.candidates[name].own
            else {},
        }
    return {
        "shape": list(case.shape),
        "name": str(case.shape),
        "flops": case.flops,
        "traffic": case.traffic,
        "steps": case.steps,
        "candidates": candidates,
        "skipped": case.skipped,
        "notes": case.notes,
    }


def write_json(path: Path, run: RunResult, verdicts: Sequence[Verdict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(run, verdicts), indent=1, allow_nan=False) + "\n")
