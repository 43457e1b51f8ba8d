"""A page with charts, in one file that needs nothing else."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.goals import Verdict
from benchmarks.operands import Shape
from benchmarks.results import RunResult, SectionResult, rate

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours always comes in black.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
SHAPES_OF_A_CHART = 8
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(figure: Figure) -> Markup:
    """The figure as an <svg> element, its text kept as text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def tick(shape: Shape) -> str:
    """A shape on several lines: long ones would run into each other."""
    text = str(shape)
    if " " in text:
        return textwrap.fill(text, 8)
    head, _, last = text.rpartition("x")
    return f"{head}\nx{last}"


def parts(section: SectionResult) -> Iterator[SectionResult]:
    """The section in pieces of so many shapes as one chart holds."""
    shapes = [c.shape for c in section.cases] or list(section.memory)
    for i in range(0, len(shapes), SHAPES_OF_A_CHART):
        shown = shapes[i : i + SHAPES_OF_A_CHART]
        memory = {s: uses for s, uses in section.memory.items() if s in shown}
        yield replace(section, cases=[c for c in section.cases if c.shape in shown], memory=memory)


def ratio_chart(section: SectionResult, framework: str) -> Figure:
    """Bars: how many times as fast as each peer ours is, by shape, with the quartiles."""
    own, peers = section.own(framework)[0], section.peers(framework)
    cases = [c for c in section.cases if own in c.timings]
    figure = Figure(figsize=(10, 3))
    axes = figure.subplots()
    width = 0.8 / max(1, len(peers))
    for i, peer in enumerate(peers):
        shown = [(x, c.ratio(own, peer)) for x, c in enumerate(cases) if peer in c.timings]
        places = [x + (i - (len(peers) - 1) / 2) * width for x, _ in shown]
        heights = [s.median for _, s in shown]
        around = [[s.median - s.low for _, s in shown], [s.high - s.median for _, s in shown]]
        colour = PALETTE[i % len(PALETTE)]
        axes.bar(places, heights, width, yerr=around, label=peer, color=colour, ecolor="#777")
        for place, height in zip(places, heights, strict=True):
            axes.annotate(
                f"{height:.2f}",
                (place, height),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(cases)), [tick(c.shape) for c in cases])
    axes.set_ylabel(f"times as fast\n({own})")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.legend(frameon=False, ncols=len(peers) or 1, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def limit_chart(run: RunResult, section: SectionResult) -> Figure | None:
    """Dots: which share of the machine's limit each candidate reaches, by shape."""
    names = list(dict.fromkeys(n for c in section.cases for n in c.timings))
    shares = {
        name: [
            (x, rate(c, name, run.limits, section.section.dtype)[3])
            for x, c in enumerate(section.cases)
            if name in c.timings
        ]
        for name in names
    }
    if any(math.isnan(share) for points in shares.values() for _, share in points):
        return None
    own = [n for n in names if any(n in c.own() for c in section.cases)]
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    peers = [n for n in names if n not in own]
    for i, name in enumerate([*own, *peers]):
        mine = name in own
        colour = "black" if mine else PALETTE[(i - len(own)) % len(PALETTE)]
        marker = "Ds^vP*X"[i % 7] if mine else "o"
        xs = [x + (i / max(1, len(names) - 1) - 0.5) * 0.6 for x, _ in shares[name]]
        ys = [share * 100 for _, share in shares[name]]
        axes.plot(xs, ys, marker, label=name, color=colour, markersize=5, linestyle="none")
    axes.axhline(100, color="black", linewidth=1)
    axes.set_xticks(range(len(section.cases)), [tick(c.shape) for c in section.cases])
    axes.set_ylabel("% of the limit")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def memory_chart(section: SectionResult) -> Figure:
    """Bars: peak bytes of each candidate in its allocator's count, by shape."""
    names = list(dict.fromkeys(n for uses in section.memory.values() for n in uses))
    figure = Figure(figsize=(10, 3))
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        shown = [(x, u[name]) for x, u in enumerate(section.memory.values()) if name in u]
        places = [x + (i - (len(names) - 1) / 2) * width for x, _ in shown]
        heights = [(use.allocator or use.resident or 0) / 1e6 for _, use in shown]
        colour = "black" if name.startswith("twinfuse") else PALETTE[i % len(PALETTE)]
        axes.bar(places, heights, width * 0.9, label=name, color=colour)
    axes.set_xticks(range(len(section.memory)), [tick(s) for s in section.memory])
    axes.set_ylabel("peak, MB")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def charts(run: RunResult, section: SectionResult) -> list[dict[str, Any]]:
    """Titles and drawings of one section."""
    pieces = list(parts(section))
    drawn: list[tuple[str, Figure | None]] = [
        (f"{framework}: times as fast as each peer", ratio_chart(piece, framework))
        for framework in section.frameworks()
        for piece in pieces
        if piece.own(framework) and piece.peers(framework)
    ]
    if section.cases:
        drawn += [("Share of the machine's limit", limit_chart(run, piece)) for piece in pieces]
    if section.memory:
        drawn += [("Peak memory", memory_chart(piece)) for piece in pieces]
    return [{"title": title, "svg": svg(figure)} for title, figure in drawn if figure]


def rows(run: RunResult, section: SectionResult) -> list[dict[str, Any]]:
    """Every candidate at every shape, ours with the ratio to the best of all peers."""
    found = []
    for case in section.cases:
        for name, timing in case.timings.items():
            value, unit, bound, share = rate(case, name, run.limits, section.section.dtype)
            best = case.best_peer(name) if case.candidates[name].own else None
            found.append(
                {
                    "shape": str(case.shape),
                    "name": name,
                    "own": case.candidates[name].own,
                    "time": report.microseconds(timing.spread.median),
                    "low": report.microseconds(timing.spread.low),
                    "high": report.microseconds(timing.spread.high),
                    "per_step": report.per_step(case, name),
                    "rate": f"{value:.1f} {unit}",
                    "share": "-" if math.isnan(share) else f"{share:.0%} {bound}",
                    "best": best[1].median if best else None,
                    "best_name": best[0] if best else "",
                    "kernels": ", ".join(case.kernels.get(name, {})),
                }
            )
    return found


def write_html(path: Path, run: RunResult, verdicts: Sequence[Verdict]) -> None:
    """Write the page of `run` to `path`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")
    with matplotlib.rc_context(STYLE):
        sections = [
            {
                "title": section.section.title,
                "dtype": section.section.dtype,
                "charts": charts(run, section),
                "rows": rows(run, section),
                "stepped": any(case.steps for case in section.cases),
                "memory": report.memory_rows(section),
                "skipped": report.skipped(section),
                "notes": report.notes(section),
                "seconds": section.seconds,
            }
            for section in run.sections
        ]
    goals = [
        {
            "section": v.goal.section,
            "sentence": v.goal.sentence,
            "note": v.goal.note,
            "limit": report.figure(v, v.goal.limit),
            "measured": report.figure(v, v.measured),
            "outcome": report.outcome(v),
            "where": v.where,
        }
        for v in verdicts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        template.render(
            op=run.op,
            environment=report.environment_text(run),
            limits=report.limits_text(run),
            busy=report.busy_text(run),
            sections=sections,
            goals=goals,
            problems=run.problems(),
        )
    )
