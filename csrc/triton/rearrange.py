"""Passes over a matrix or over images: behind ReLU, with channels side by side, and summed.

matrix: (data, stride of the rows); columns lie side by side
images: (data, stride of the rows, of the columns, of the images), each of `pixels` rows
planes: (data, stride of the columns, of the images); the rows of an image lie side by side
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import masked


@triton.jit
def matrix_load(args, m, n, rows, cols, pixels):
    inside = (m[:, None] < rows) & (n[None, :] < cols)
    at = m[:, None].to(tl.int64) * args[1] + n[None, :]
    return tl.load(args[0] + at, mask=inside, other=0.0)


@triton.jit
def images_load(args, m, n, rows, cols, pixels):
    inside = (m[:, None] < rows) & (n[None, :] < cols)
    row = (m % pixels).to(tl.int64) * args[1] + (m // pixels).to(tl.int64) * args[3]
    at = row[:, None] + n[None, :].to(tl.int64) * args[2]
    return tl.load(args[0] + at, mask=inside, other=0.0)


@triton.jit
def planes_load(args, m, n, rows, cols, pixels):
    inside = (n[:, None] < cols) & (m[None, :] < rows)
    row = m % pixels + (m // pixels).to(tl.int64) * args[2]
    at = row[None, :] + n[:, None].to(tl.int64) * args[1]
    return tl.load(args[0] + at, mask=inside, other=0.0).T


@triton.jit
def rearrange(
    x,
    output,
    out,
    partial,
    rows,
    cols,
    nan_passes,
    height,
    pixels,
    LOAD: tl.constexpr,
    MASK: tl.constexpr,
    WRITE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`x`, where MASK as a gradient behind ReLU's `output`, written to `out`, a matrix, and summed
    over the rows in the type SUM (None: not). Each program takes `height` rows, a multiple of
    BLOCK_M; `partial` is float32 [programs per column tile, cols], for `combine`."""
    col_tiles = tl.cdiv(cols, BLOCK_N)
    part = tl.program_id(0) // col_tiles
    n = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUM is not None:
        sums = tl.zeros((BLOCK_N,), SUM)
    for i in range(part * height, min((part + 1) * height, rows), BLOCK_M):
        m = i + tl.arange(0, BLOCK_M)
        values = LOAD(x, m, n, rows, cols, pixels)
        if MASK:
            values = masked(values, LOAD(output, m, n, rows, cols, pixels), nan_passes)
        if WRITE:
            inside = (m[:, None] < rows) & (n[None, :] < cols)
            at = m[:, None].to(tl.int64) * out[1] + n[None, :]
            tl.store(out[0] + at, values, mask=inside)
        if SUM is not None:
            sums += tl.sum(values.to(SUM), axis=0)
    if SUM is not None:
        at = partial + part.to(tl.int64) * cols + n
        tl.store(at, sums.to(tl.float32), mask=n < cols)
