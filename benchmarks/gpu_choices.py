"""Measures the kernels for the benchmarks' shapes, and writes the choices that a build takes in.

    python -m benchmarks.gpu_choices csrc/gpu/choices/sm_90.json

`twinfuse.tune` does the work; here are only the shapes, forward and backward. Choices that the file
holds for other problems stay.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import twinfuse
import twinfuse.torch as tft
from benchmarks import gpu
from twinfuse import _tuning

Step = Callable[[], Any]


def steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """One forward and backward pass of each shape, to be watched."""

    def leaf(*shape: int) -> Tensor:
        return gpu.normal(*shape, dtype=dtype).requires_grad_()

    def linear(m: int, n: int, k: int) -> Step:
        tensors = leaf(m, k), leaf(n, k), leaf(n)
        return lambda: tft.linear_relu(*tensors)

    def conv(n: int, c: int, s: int, k: int, r: int, stride: int) -> Step:
        x, w = (
            t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            for t in (leaf(n, c, s, s), leaf(k, c, r, r))
        )
        b = leaf(k)
        return lambda: tft.conv2d_relu(x, w, b, stride, r // 2)

    for shape in dict.fromkeys(gpu.LINEAR + gpu.TRAINING):
        yield f"linear_relu {shape}", linear(*shape)
    for image in gpu.CONV:
        yield f"conv_relu {image}", conv(*image)


def entry(choice: dict[str, Any]) -> dict[str, Any]:
    """What a build reads of it, and how much it gained, for the reader."""
    kept = {name: choice[name] for name in ("problem", "kernel", "splits")}
    return kept | {"gain": round(choice["before"] / choice["after"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_choices", description=__doc__)
    parser.add_argument("file", type=Path, help="the choices of one architecture")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:  # away from the user's own choices
        os.environ["TWINFUSE_CACHE"] = folder
        work = [(dtype, *step) for dtype in chosen.dtype for step in steps(getattr(torch, dtype))]
        console = Console(stderr=True)
        rows = []
        for dtype, name, step in track(work, "tuning", console=console):
            report = twinfuse.tune(step)
            rows += [vars(row) for row in report]
            for row in report:
                if row.after < row.before:
                    gain = f"{row.before / row.after:.2f} {row.kernel} {row.splits}"
                    console.print(f"{dtype} {name} {row.op}: {gain}")
    choices = {choice["problem"]: choice for choice in _tuning.read(chosen.file)}
    choices |= {row["problem"]: entry(row) for row in rows if row["after"] < row["before"]}
    lines = ",\n".join(json.dumps(choice) for choice in choices.values())
    chosen.file.write_text(f'{{"format": {_tuning.FORMAT}, "choices": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
