"""Benchmarks on a GPU, in torch alone: `python -m benchmarks.gpu --json PATH`.

Kernels of a shape are timed inside CUDA graphs (so that launches cost nothing), one candidate after
the other in every round, over inputs that rotate through more memory than the L2 cache has; the
time of a whole call from Python is timed apart, on shapes so small that nothing else counts. Random
data, medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

import twinfuse
import twinfuse.torch as tft
from benchmarks.runner import commit
from twinfuse._core import device_backend

Call = Callable[[], Any]
ROTATION = 256 << 20  # bytes: several times any L2 cache
ROUNDS = 5


@dataclass
class Row:
    """One shape: seconds of each candidate, ours and the peers'."""

    section: str
    shape: str
    dtype: str
    flops: float
    bytes: float
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        return self.flops / self.seconds[name] / 1e12


def graph_seconds(calls: dict[str, list[Call]], row: Row, least: float = 0.004) -> None:
    """Median over rounds of each candidate's time, whose calls differ in their inputs alone."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, variants in calls.items():
        try:
            for call in variants:  # what is compiled or loaded is so before the capture
                call()
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for call in variants:
                call()
            end.record()
            torch.cuda.synchronize()
            each = max(start.elapsed_time(end) / 1e3 / len(variants), 1e-6)
            repeats = max(1, round(least / (each * len(variants))))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    for call in variants:
                        call()
            graphs[name] = graph, repeats * len(variants)
        except Exception as error:  # a peer that this torch or device lacks
            row.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS + 1):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) / 1e3 / count)
    row.seconds |= {name: statistics.median(times[1:]) for name, times in samples.items()}


def call_seconds(calls: dict[str, Call], row: Row) -> None:
    """Time of a call from Python, with nothing waited for between calls."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, timer in timers.items():
            samples[name].append(timer.blocked_autorange(min_run_time=0.05).median)
    row.seconds |= {name: statistics.median(times) for name, times in samples.items()}


def rotating(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    return [first, *(make() for _ in range(min(ROTATION // size, 24)))]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def forward_calls(
    functions: dict[str, Callable[..., Any]], inputs: list[tuple[Tensor, ...]]
) -> dict[str, list[Call]]:
    def bind(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Call:
        def call() -> Any:
            with torch.no_grad():
                return function(*tensors)

        return call

    return {n: [bind(f, tensors) for tensors in inputs] for n, f in functions.items()}


def training_calls(
    functions: dict[str, Callable[..., Any]], inputs: list[tuple[Tensor, ...]]
) -> dict[str, list[Call]]:
    for tensors in inputs:
        for t in tensors:
            t.requires_grad_()

    def bind(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Call:
        with torch.no_grad():
            grad = torch.randn_like(function(*tensors))

        def call() -> Any:
            return torch.autograd.grad(function(*tensors), tensors, grad)

        return call

    return {n: [bind(f, tensors) for tensors in inputs] for n, f in functions.items()}


def forced(calls: list[Call]) -> list[Call]:
    """By kernels even where torch's own operators would be chosen as the faster ones."""
    backend, _ = device_backend(torch.cuda.current_device())

    def bind(call: Call) -> Call:
        def forced_call() -> Any:
            with twinfuse.use_backend(backend):
                return call()

        return forced_call

    return [bind(call) for call in calls]


def compiled(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    torch.compiler.reset()  # or one function had too many shapes
    modes = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}
    return {name: torch.compile(function, mode=mode, dynamic=False) for name, mode in modes.items()}


def linear_functions(compile_modes: bool) -> dict[str, Callable[..., Any]]:
    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.linear(x, w, b))

    functions: dict[str, Callable[..., Any]] = {
        "twinfuse": tft.linear_relu,
        "eager": eager,
        "addmm_activation": lambda x, w, b: torch._addmm_activation(b, x, w.t()),
        "mm only": lambda x, w, b: torch.mm(x, w.t()),
    }
    return functions | (compiled(eager) if compile_modes else {})


def conv_functions(stride: int, padding: int, compile_modes: bool) -> dict[str, Callable[..., Any]]:
    def pair(n: int) -> tuple[int, int]:
        return n, n

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, w, b, stride, padding))

    functions: dict[str, Callable[..., Any]] = {
        "twinfuse": lambda x, w, b: tft.conv2d_relu(x, w, b, stride, padding),
        "eager": eager,
        "cudnn_relu": lambda x, w, b: torch.cudnn_convolution_relu(
            x, w, b, pair(stride), pair(padding), (1, 1), 1
        ),
        "conv only": lambda x, w, b: F.conv2d(x, w, None, stride, padding),
    }
    return functions | (compiled(eager) if compile_modes else {})


LINEAR = [(8192, 8192, k) for k in (512, 1024, 2048, 4096)]
LINEAR += [(4096, 4096, 4096), (2048, 1024, 512), (1024, 1024, 1024), (512, 4096, 1024)]
LINEAR += [(16, 1024, 1024), (16, 4096, 4096), (1, 4096, 4096)]
TRAINING = [(8192, 8192, k) for k in (512, 2048, 4096)] + [(4096, 1024, 1024), (65536, 256, 256)]
TINY = [(1, 16, 16), (16, 64, 64), (64, 128, 128)]
# N, C, size, K, kernel, stride: ResNet-50's, at batch 64; then those of smaller networks.
CONV = [
    (64, 64, 56, 64, 3, 1),
    (64, 128, 28, 128, 3, 1),
    (64, 256, 14, 256, 3, 1),
    (64, 512, 7, 512, 3, 1),
    (64, 256, 56, 64, 1, 1),
    (64, 64, 56, 256, 1, 1),
    (64, 512, 28, 128, 1, 1),
    (64, 1024, 14, 256, 1, 1),
    (64, 128, 56, 128, 3, 2),
    (64, 3, 224, 64, 7, 2),
    (64, 3, 64, 64, 3, 1),
    (64, 64, 64, 64, 3, 1),
    (64, 128, 32, 128, 3, 1),
    (64, 256, 16, 256, 3, 1),
    (64, 512, 8, 512, 3, 1),
    (64, 512, 4, 512, 3, 1),
    (64, 1, 28, 32, 3, 1),
    (64, 32, 26, 64, 3, 1),
    (64, 3, 32, 6, 5, 1),
    (64, 6, 14, 16, 5, 1),
]


def sections(
    chosen: set[str], dtype: torch.dtype, pattern: str, compile_modes: bool
) -> Iterator[Callable[[], Row]]:
    name = str(dtype).removeprefix("torch.")
    size = dtype.itemsize

    def linear_inputs(m: int, n: int, k: int) -> list[tuple[Tensor, ...]]:
        return rotating(
            lambda: (
                normal(m, k, dtype=dtype),
                normal(n, k, dtype=dtype, scale=k**-0.5),
                normal(n, dtype=dtype),
            )
        )

    def linear(m: int, n: int, k: int, section: str) -> Row:
        traffic = size * (m * k + n * k + m * n)
        row = Row(section, f"{m}x{n}x{k}", name, 2.0 * m * n * k, traffic)
        functions = linear_functions(compile_modes and section == "linear")
        inputs = linear_inputs(m, n, k)
        if section == "linear":
            graph_seconds(forward_calls(functions, inputs), row)
        elif section == "linear training":
            row.flops *= 3
            functions = {n: functions[n] for n in ("twinfuse", "eager")}
            graph_seconds(training_calls(functions, inputs[:3]), row)
        else:
            functions = {n: functions[n] for n in ("twinfuse", "eager", "addmm_activation")}
            calls = forward_calls(functions, inputs[:1])
            call_seconds({n: c[0] for n, c in calls.items()}, row)
        return row

    def conv(n: int, c: int, s: int, k: int, r: int, stride: int, section: str) -> Row:
        pad = r // 2
        last = torch.contiguous_format if "NCHW" in section else torch.channels_last
        out = (s + 2 * pad - r) // stride + 1
        flops = 2.0 * n * out * out * k * c * r * r
        traffic = size * (n * s * s * c + k * c * r * r + n * out * out * k)
        row = Row(section, f"N{n} C{c} {s}x{s} K{k} {r}x{r}/{stride}", name, flops, traffic)
        functions = conv_functions(stride, pad, compile_modes and section == "conv")
        inputs = rotating(
            lambda: (
                normal(n, c, s, s, dtype=dtype).contiguous(memory_format=last),
                normal(k, c, r, r, dtype=dtype, scale=(c * r * r) ** -0.5).contiguous(
                    memory_format=last
                ),
                normal(k, dtype=dtype),
            )
        )
        if "training" not in section:
            calls = forward_calls(functions, inputs)
        else:
            row.flops *= 3
            functions = {n: functions[n] for n in ("twinfuse", "eager")}
            calls = training_calls(functions, inputs[:3])
        calls["kernels"] = forced(calls["twinfuse"])
        graph_seconds(calls, row)
        return row

    tables: dict[str, tuple[Any, list[Any]]] = {
        "linear": (linear, LINEAR),
        "linear training": (linear, TRAINING),
        "tiny": (linear, TINY),
        "conv": (conv, CONV),
        "conv training": (conv, CONV),
        "conv NCHW": (conv, CONV),
        "conv NCHW training": (conv, CONV),
    }
    for section, (function, shapes) in tables.items():
        for shape in shapes if section in chosen else ():
            if re.search(pattern, "x".join(map(str, shape))):
                yield partial(function, *shape, section=section)


def environment() -> dict[str, str]:
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        device = subprocess.check_output(query, text=True).splitlines()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        device = f"unknown: {error}"
    return {
        "commit": str(commit()),
        asked: device,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def ceilings() -> dict[str, float]:
    """What this device reaches at best: TFLOP/s of a large product, TB/s of a large copy."""
    a, b = (normal(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    other = torch.empty_like(large)
    row = Row("ceiling", "", "", 0, 0)
    calls: dict[str, list[Call]] = {
        "product": [lambda: torch.mm(a, b)],
        "copy": [lambda: other.copy_(large)],
    }
    graph_seconds(calls, row, least=0.02)
    return {
        "product_tflops": 2 * 8192**3 / row.seconds["product"] / 1e12,
        "copy_tbs": 2 * large.nbytes / row.seconds["copy"] / 1e12,
    }


def table(section: str, rows: list[Row], limits: dict[str, float]) -> Table:
    shown = Table("shape", "us", "TFLOP/s", "% of limit", title=section, title_justify="left")
    names = list(dict.fromkeys(n for r in rows for n in r.seconds if n != "twinfuse"))
    for name in names:
        shown.add_column(f"x {name}")
    for row in rows:
        ours = row.seconds.get("twinfuse")
        if ours is None:
            shown.add_row(row.shape, row.failures.get("twinfuse", "failed"))
            continue
        floor = max(
            row.flops / limits["product_tflops"] / 1e12, row.bytes / limits["copy_tbs"] / 1e12
        )
        ratios = [f"{row.seconds[n] / ours:.2f}" if n in row.seconds else "" for n in names]
        rate = f"{row.rate('twinfuse'):.1f}"
        shown.add_row(row.shape, f"{ours * 1e6:.1f}", rate, f"{100 * floor / ours:.0f}", *ratios)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    every = "linear,linear training,tiny,conv,conv training,conv NCHW,conv NCHW training"
    parser.add_argument("--section", default=every, help="comma-separated; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", default="", metavar="REGEX", help="of sizes joined by x")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, in two modes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the raw data")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    torch.manual_seed(0)
    names = set(chosen.section.split(","))
    if unknown := names - set(every.split(",")):
        parser.error(f"--section: expected some of {every}, got {', '.join(unknown)}")
    limits = ceilings()
    work = list(sections(names, getattr(torch, chosen.dtype), chosen.shape, chosen.compile))
    console = Console(width=150)
    rows = [job() for job in track(work, "benchmarks", console=Console(stderr=True))]
    for section in dict.fromkeys(row.section for row in rows):
        console.print(table(section, [r for r in rows if r.section == section], limits))
    console.print(f"ceilings: {limits}")
    if chosen.json:
        data = {
            "environment": environment(),
            "limits": limits,
            "rows": [asdict(row) for row in rows],
        }
        chosen.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
