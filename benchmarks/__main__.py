"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.goals import judge
from benchmarks.harness import Settings
from benchmarks.operands import ITEM_SIZE, Section, Shape, installed, set_threads
from benchmarks.runner import Runner

OPS = ("linear_relu",)
QUICK = Settings(rounds=5, least_rounds=5, block=0.005, warm=0.001, settle=0.005, limit=2.0)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`64x784x128,1x16x16` as tuples. Raises ArgumentTypeError naming the part that is wrong."""
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if len(sizes) != 3 or not all(s.isdigit() and int(s) > 0 for s in sizes):
            raise argparse.ArgumentTypeError(f"expected MxKxN with positive sizes, got {part!r}")
        shapes.append(tuple(map(int, sizes)))
    return tuple(shapes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("op", nargs="?", default="linear_relu", choices=OPS)
    add("--section", help="comma-separated names; see --list")
    add("--shapes", type=parse_shapes, help="MxKxN,... instead of each section's own")
    add("--dtype", choices=sorted(ITEM_SIZE), help="instead of each section's own")
    add("--framework", default="torch,tensorflow", help="comma-separated; default: both")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--quick", action="store_true", help="few shapes and rounds: does it run?")
    add("--json", type=Path, metavar="PATH", help="write the raw data")
    add("--html", type=Path, metavar="PATH", help="write a page with charts")
    add("--list", action="store_true", help="print the sections and their shapes, and stop")
    return parser.parse_args(arguments)


def choose(sections: Sequence[Section], chosen: argparse.Namespace) -> list[Section]:
    """The sections to run, with the shapes and the dtype asked for. Exits on an unknown name."""
    names = [s.name for s in sections]
    wanted = chosen.section.split(",") if chosen.section else None
    if unknown := [w for w in wanted or [] if w not in names]:
        sys.exit(f"--section: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    result = []
    for section in sections:
        if section.name not in wanted if wanted is not None else not section.default:
            continue
        shapes = section.shapes
        if chosen.quick and section.kind != "install":
            shapes = section.quick or (shapes[:1] if wanted else ())
            if not shapes:
                continue
        if section.kind != "install":
            shapes = chosen.shapes or shapes
        result.append(replace(section, shapes=shapes, dtype=chosen.dtype or section.dtype))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 150)
    op = importlib.import_module(f"benchmarks.{chosen.op}")
    sections = choose(op.SECTIONS, chosen)
    if chosen.list:
        report.print_sections(console, sections if chosen.section else op.SECTIONS)
        return 0
    frameworks = installed(chosen.framework.split(","))
    if not frameworks:
        sys.exit("nothing to measure: neither torch nor tensorflow is installed")
    columns = (TextColumn("{task.description:28}"), BarColumn(), TaskProgressColumn())
    # Redrawn by the runner between rounds: a thread that draws would take time from a candidate.
    with Progress(
        *columns, TimeElapsedColumn(), console=console, auto_refresh=False, transient=True
    ) as progress:
        set_threads(chosen.threads, frameworks)
        settings = QUICK if chosen.quick else Settings()
        result = Runner(op, frameworks, chosen.threads, settings, progress).run(sections)
    # A changed dtype or other shapes are not what the goals speak of.
    comparable = chosen.dtype is None and chosen.shapes is None
    shapes = {section.name: section.shapes for section in op.SECTIONS}
    goals = op.GOALS if comparable else ()
    verdicts = [judge(goal, result, shapes[goal.section]) for goal in goals]
    report.print_run(console, result, verdicts)
    if chosen.json:
        report.write_json(chosen.json, result, verdicts)
    if chosen.html:
        from benchmarks import page

        page.write_html(chosen.html, result, verdicts)
    for problem in result.problems():
        console.print(f"[red]{problem}[/red]", highlight=False)
    return 1 if result.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
