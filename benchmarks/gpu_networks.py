"""Whole networks on a GPU before and after `fuse`: `python -m benchmarks.gpu_networks --json PATH`.

Passes and steps of training are called from Python one behind the other, as users call them, and
timed by events around several, one candidate after the other in every round: where a network is
small, the time is the host's. Random data, medians; float32 as torch has it by default, which is
TF32 in convolutions and LSTMs and not in products.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.candidates import NATIVE, TORCH
from benchmarks.gpu import Row, environment
from benchmarks.gpu_lstm import event_seconds, mean, parse, ratios
from benchmarks.networks_candidates import in_torch
from benchmarks.networks_shapes import INPUTS, VGG16, NetworkShape, elements_moved, flops
from benchmarks.operands import ITEM_SIZE, Kind

DTYPES = ("float32", "bfloat16")
BATCH = 64
# Of these the layout of images decides.
IMAGES = ("cnn2_mnist_keras", "small_cnn_mnist", "lenet_cifar", VGG16)


@dataclass
class NetworkRow(Row):
    """`peak`: bytes above what was allocated before. `difference`: relative, of the results."""

    peak: dict[str, int] = field(default_factory=dict)
    difference: float = 0.0


def measure(shape: NetworkShape, kind: Kind, dtype: str, last: bool) -> NetworkRow:
    name = f"{shape} channels last" if last else str(shape)
    size = ITEM_SIZE[dtype]
    row = NetworkRow(kind, name, dtype, flops(shape, kind), size * elements_moved(shape, kind))
    side = in_torch(shape, kind, dtype, "cuda", last)
    (makers,) = side.makers.values()
    calls = {"twinfuse": makers[TORCH](), "native": makers[NATIVE]()}
    if kind == "forward":
        calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    results = {}
    for name, call in calls.items():
        call()  # what is chosen, loaded or kept between calls is so before
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results[name] = side.arrays(call())
        row.peak[name] = torch.cuda.max_memory_allocated() - before
    row.difference = max(
        float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
        for ours, theirs in zip(results["twinfuse"], results["native"])
    )
    event_seconds(calls, row)
    return row


def jobs(dtypes: list[str], pattern: str, batch: int) -> list[Callable[[], NetworkRow]]:
    kinds: tuple[Kind, ...] = ("forward", "training")
    return [
        partial(measure, NetworkShape(name, batch), kind, dtype, last)
        for dtype in dtypes
        for kind in kinds
        for name in INPUTS
        for last in ((False, True) if name in IMAGES else (False,))
        if re.search(pattern, name)
    ]


def table(title: str, rows: list[Any]) -> Table:
    columns = ("network", "us", "native", "x native", "peak memory, x native", "difference")
    shown = Table(*columns, title=title, title_justify="left")
    for row in rows:
        if row.failures:
            shown.add_row(row.shape, str(row.failures))
            continue
        ours, native = row.seconds["twinfuse"], row.seconds["native"]
        times = (f"{ours * 1e6:.1f}", f"{native * 1e6:.1f}", f"{native / ours:.2f}")
        memory = row.peak["twinfuse"] / max(row.peak["native"], 1)
        shown.add_row(row.shape, *times, f"{memory:.2f}", f"{row.difference:.1e}")
    shown.add_row("geometric mean", "", "", f"{mean(ratios(rows)):.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_networks", description=__doc__)
    parser.add_argument("--shape", default="", metavar="REGEX", help="of names of networks")
    parser.add_argument("--batch", type=int, default=BATCH, help="default: %(default)s")
    chosen, dtypes = parse(parser, DTYPES, ITEM_SIZE)
    console, work = Console(width=150), jobs(dtypes, chosen.shape, chosen.batch)
    rows = [job() for job in track(work, "benchmarks", console=Console(stderr=True))]
    for dtype in dtypes:
        for section in dict.fromkeys(row.section for row in rows):
            group = [row for row in rows if (row.section, row.dtype) == (section, dtype)]
            console.print(table(f"{section}, {dtype}", group))
    if chosen.json:
        data = {"environment": environment(), "rows": [asdict(row) for row in rows]}
        chosen.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
