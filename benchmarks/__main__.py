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
from benchmarks.harness import Settings, keep_memory
from benchmarks.operands import ITEM_SIZE, Section, installed, set_threads
from benchmarks.runner import Op, Runner

OPS = ("linear_relu", "conv_relu", "lstm", "networks")
QUICK = Settings(rounds=5, least_rounds=5, block=0.005, warm=0.001, settle=0.005, limit=2.0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("op", nargs="?", choices=OPS, help="default: all, one after the other")
    add("--section", help="comma-separated names; see --list")
    add("--shapes", help="comma-separated, instead of each section's own; needs the op; see --list")
    add("--dtype", choices=sorted(ITEM_SIZE), help="instead of each section's own")
    add("--framework", default="torch,tensorflow", help="comma-separated; default: both")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    keep = "page faults of large results are not timed, which glibc's defaults cause at random"
    add("--keep-memory", action="store_true", help=keep)
    add("--quick", action="store_true", help="few shapes and rounds: does it run?")
    add("--json", type=Path, metavar="PATH", help="write the raw data; all ops: PATH-<op>")
    add("--html", type=Path, metavar="PATH", help="write a page with charts; all ops: PATH-<op>")
    add("--list", action="store_true", help="print the sections and their shapes, and stop")
    chosen = parser.parse_args(arguments)
    names = (chosen.op,) if chosen.op else OPS
    chosen.ops = [importlib.import_module(f"benchmarks.{name}") for name in names]
    known = {section.name: None for op in chosen.ops for section in op.SECTIONS}
    chosen.section = chosen.section.split(",") if chosen.section else None
    if unknown := [name for name in chosen.section or [] if name not in known]:
        parser.error(f"--section: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if chosen.shapes:
        if not chosen.op:
            parser.error("--shapes: expected an op before it, since each has shapes of its own")
        try:
            texts = chosen.shapes.split(",")
            chosen.shapes = tuple(chosen.ops[0].parse_shape(text.strip()) for text in texts)
        except ValueError as error:
            parser.error(f"--shapes: {error}")
    return chosen


def choose(sections: Sequence[Section], chosen: argparse.Namespace) -> list[Section]:
    """The sections to run, with the shapes and the dtype asked for."""
    result = []
    for section in sections:
        if section.name not in chosen.section if chosen.section else not section.default:
            continue
        shapes = section.shapes
        if chosen.quick and section.kind != "install":
            shapes = section.quick or (shapes[:1] if chosen.section else ())
            if not shapes:
                continue
        if section.kind != "install" and chosen.shapes:
            shapes = tuple(shape for shape in chosen.shapes if section.accepts(shape))
            if not shapes:
                continue
        result.append(replace(section, shapes=shapes, dtype=chosen.dtype or section.dtype))
    return result


def run(op: Op, chosen: argparse.Namespace, frameworks: Sequence[str], console: Console) -> bool:
    """Measure one op, print and write what was found; whether nothing was wrong with it."""
    sections = choose(op.SECTIONS, chosen)
    if not sections:
        return True
    columns = (TextColumn("{task.description:40}"), BarColumn(), TaskProgressColumn())
    # Redrawn by the runner between rounds: a thread that draws would take time from a candidate.
    with Progress(
        *columns, TimeElapsedColumn(), console=console, auto_refresh=False, transient=True
    ) as progress:
        settings = replace(QUICK if chosen.quick else Settings(), keep_memory=chosen.keep_memory)
        result = Runner(op, frameworks, chosen.threads, settings, progress).run(sections)
    # A changed dtype or other shapes are not what the goals speak of.
    comparable = chosen.dtype is None and chosen.shapes is None
    shapes = {section.name: section.shapes for section in op.SECTIONS}
    goals = op.GOALS if comparable else ()
    verdicts = [judge(goal, result, shapes[goal.section]) for goal in goals]
    report.print_run(console, result, verdicts)
    if chosen.json:
        report.write_json(_path(chosen.json, op, chosen), result, verdicts)
    if chosen.html:
        from benchmarks import page

        page.write_html(_path(chosen.html, op, chosen), result, verdicts)
    for problem in result.problems():
        console.print(f"[red]{problem}[/red]", highlight=False)
    return not result.problems()


def _path(path: Path, op: Op, chosen: argparse.Namespace) -> Path:
    """`path`, or one beside it for each of several ops."""
    return path if chosen.op else path.with_stem(f"{path.stem}-{op.OP}")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if chosen.list:
        for op in chosen.ops:
            sections = choose(op.SECTIONS, chosen) if chosen.section else op.SECTIONS
            report.print_sections(console, op.OP, op.SHAPE_FORM, sections)
        return 0
    frameworks = installed(chosen.framework.split(","))
    if not frameworks:
        sys.exit("nothing to measure: neither torch nor tensorflow is installed")
    set_threads(chosen.threads, frameworks)
    if chosen.keep_memory and not keep_memory():
        sys.exit("--keep-memory: this C library has no mallopt")
    sound = [run(op, chosen, frameworks, console) for op in chosen.ops]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
