"""The LSTM on a GPU, against torch's own: `python -m benchmarks.gpu_lstm --json PATH`.

Layers are timed by events around several calls, one candidate after the other in every round: not
all that native takes for them can be captured in a graph. So what the host does counts where a call
is short. Cells are timed inside CUDA graphs. Random data, medians; float32 as torch has it by
default, which is TF32 in layers and not in cells.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import twinfuse
import twinfuse.torch as tft
from benchmarks.gpu import ROUNDS, Call, Row, environment, graph_seconds, normal

LEAST = 0.02  # seconds of a sample
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Shape:
    """A layer; `shortest` packs sequences of that many steps up to all of them."""

    batch: int
    steps: int
    inputs: int
    units: int
    layers: int = 1
    bidirectional: bool = False
    shortest: int = 0
    loop: bool = False  # also step by step

    def __str__(self) -> str:
        text = f"{self.batch}x{self.steps}x{self.inputs}x{self.units}"
        text += f" {self.layers} layers" * (self.layers > 1)
        text += " bidirectional" * self.bidirectional
        return text + f" packed from {self.shortest}" * bool(self.shortest)

    @property
    def lengths(self) -> list[int]:
        first, last = self.steps, self.shortest or self.steps
        return [first - (first - last) * i // max(self.batch - 1, 1) for i in range(self.batch)]

    @property
    def flops(self) -> float:
        """Of the products."""
        directions = 1 + self.bidirectional
        inputs = [self.inputs] + [directions * self.units] * (self.layers - 1)
        return sum(8.0 * sum(self.lengths) * directions * self.units * (n + self.units)
                   for n in inputs)  # fmt: skip


SHAPES = [
    Shape(16, 1024, 768, 768),
    Shape(16, 256, 512, 512, loop=True),
    Shape(16, 256, 256, 256),
    Shape(64, 256, 512, 512),
    Shape(64, 256, 1024, 1024, loop=True),
    Shape(64, 128, 2048, 2048, loop=True),
    Shape(1, 256, 512, 512),
    Shape(16, 256, 128, 128),
    Shape(64, 256, 128, 128),
    Shape(64, 256, 160, 160),
    Shape(16, 256, 500, 500),
    Shape(128, 256, 256, 256),
    Shape(16, 256, 512, 512, bidirectional=True),
    Shape(16, 256, 512, 512, layers=2),
    Shape(64, 256, 512, 512, shortest=32),
]
CELLS = [(batch, 512) for batch in (16, 64, 1)]


def event_seconds(calls: dict[str, Call], row: Row) -> None:
    """Median over rounds of each candidate's time, launches included."""

    def sample(call: Call, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    counts: dict[str, int] = {}
    for name, call in calls.items():
        try:
            sample(call, 2)  # what is chosen or loaded is so before
            counts[name] = max(1, round(LEAST / sample(call, 1)))
        except Exception as error:
            row.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(ROUNDS):
        for name, count in counts.items():
            samples[name].append(sample(calls[name], count))
    row.seconds |= {name: statistics.median(times) for name, times in samples.items()}


def by_steps(layer: nn.LSTM) -> Callable[[Tensor], Any]:
    """What `nn.LSTMCell` makes of a layer's weights."""
    cell = nn.LSTMCell(layer.input_size, layer.hidden_size, device="cuda")
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(layer, f"{name}_l0"))

    def run(x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for each in x.unbind(0):
            state = cell(each, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    return run


def measure_layer(shape: Shape, dtype: torch.dtype, training: bool) -> Row:
    name = str(dtype).removeprefix("torch.")
    section = "training" if training else "forward"
    row = Row(section, str(shape), name, shape.flops * (3 if training else 1), 0)
    options: dict[str, Any] = {"num_layers": shape.layers, "bidirectional": shape.bidirectional}
    options |= {"device": "cuda", "dtype": dtype}
    ours = tft.nn.LSTM(shape.inputs, shape.units, **options)
    native = nn.LSTM(shape.inputs, shape.units, **options)
    native.load_state_dict(ours.state_dict())
    x: Any = normal(shape.steps, shape.batch, shape.inputs, dtype=dtype)
    if shape.shortest:
        x = pack_padded_sequence(x, shape.lengths)
    data = x.data if shape.shortest else x
    data.requires_grad_(training)
    functions: dict[str, Callable[..., Any]] = {"twinfuse": ours, "native": native}
    if shape.loop:
        functions["loop of cells"] = by_steps(native)

    def call(function: Callable[..., Any]) -> Any:
        output = function(x)[0]
        return output.data if shape.shortest else output

    grad = torch.randn_like(call(native))

    def step(function: Callable[..., Any]) -> Any:
        if not training:
            with torch.no_grad():
                return call(function)
        module = ours if function is ours else native
        return torch.autograd.grad(call(function), [data, *module.parameters()], grad)

    event_seconds({n: partial(step, function) for n, function in functions.items()}, row)
    return row


def measure_cell(batch: int, units: int, dtype: torch.dtype, training: bool) -> Row:
    name = str(dtype).removeprefix("torch.")
    flops = 16.0 * batch * units * units * (3 if training else 1)
    row = Row("cell training" if training else "cell", f"{batch}x{units}", name, flops, 0)
    ours, native = (
        make(units, units, device="cuda", dtype=dtype) for make in (tft.nn.LSTMCell, nn.LSTMCell)
    )
    native.load_state_dict(ours.state_dict())
    x, h, c = (normal(batch, units, dtype=dtype).requires_grad_(training) for _ in range(3))
    grads = [torch.randn_like(t) for t in (h, c)]

    def step(module: nn.Module) -> Any:
        if not training:
            with torch.no_grad():
                return module(x, (h, c))
        return torch.autograd.grad(module(x, (h, c)), [x, h, c, *module.parameters()], grads)

    graph_seconds({n: [partial(step, m)] for n, m in (("twinfuse", ours), ("native", native))}, row)
    return row


def jobs(dtypes: list[str], pattern: str) -> list[Callable[[], Row]]:
    found: list[Callable[[], Row]] = []
    for dtype in (getattr(torch, name) for name in dtypes):
        for training in (False, True):
            found += [
                partial(measure_layer, shape, dtype, training)
                for shape in SHAPES
                if re.search(pattern, str(shape))
            ]
            found += [
                partial(measure_cell, *sizes, dtype, training)
                for sizes in CELLS
                if re.search(pattern, "cell {}x{}".format(*sizes))
            ]
    return found


def ratios(rows: list[Row], name: str = "native") -> list[float]:
    both = (row.seconds for row in rows if {name, "twinfuse"} <= row.seconds.keys())
    return [seconds[name] / seconds["twinfuse"] for seconds in both]


def mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def table(title: str, rows: list[Row]) -> Table:
    shown = Table("shape", "us", "us a step", "TFLOP/s", title=title, title_justify="left")
    names = list(dict.fromkeys(n for row in rows for n in row.seconds if n != "twinfuse"))
    for name in names:
        shown.add_column(f"x {name}")
    steps = {str(shape): shape.steps for shape in SHAPES}
    for row in rows:
        ours = row.seconds.get("twinfuse")
        if ours is None:
            shown.add_row(row.shape, row.failures.get("twinfuse", "failed"))
            continue
        cells = [f"{ours * 1e6:.1f}", f"{ours * 1e6 / steps.get(row.shape, 1):.2f}"]
        faster = [f"{row.seconds[n] / ours:.2f}" if n in row.seconds else "" for n in names]
        shown.add_row(row.shape, *cells, f"{row.rate('twinfuse'):.1f}", *faster)
    means = [f"{mean(ratios(rows, name)):.2f}" for name in names]
    shown.add_row("geometric mean", "", "", "", *means)
    return shown


def parse(
    parser: argparse.ArgumentParser, default: Sequence[str], known: Collection[str] = DTYPES
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, with --json and --dtype; and the dtypes, each of `known`."""
    parser.add_argument("--dtype", default=",".join(default), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the raw data")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    dtypes = chosen.dtype.split(",")
    if unknown := set(dtypes) - set(known):
        parser.error(f"--dtype: expected some of {','.join(known)}, got {','.join(unknown)}")
    return chosen, dtypes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_lstm", description=__doc__)
    parser.add_argument(
        "--shape",
        default="",
        metavar="REGEX",
        help="of the names in the tables; cells: cell 16x512",
    )
    chosen, dtypes = parse(parser, DTYPES)
    torch.manual_seed(0)
    console, work = Console(width=150), jobs(dtypes, chosen.shape)
    with twinfuse.strict():  # a row that is not ours says so
        rows = [job() for job in track(work, "benchmarks", console=Console(stderr=True))]
    means: dict[str, float] = {}
    for dtype in dtypes:
        for section in dict.fromkeys(row.section for row in rows):
            title = f"{section}, {dtype}"
            group = [row for row in rows if (row.section, row.dtype) == (section, dtype)]
            console.print(table(title, group))
            means[title] = mean(ratios(group))
    if chosen.json:
        data = {"environment": environment(), "means": means, "rows": [asdict(r) for r in rows]}
        chosen.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
