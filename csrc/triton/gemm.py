"""The main loop of the GPU kernels, and what every op may put in front of it and behind it.

    out[i, j] = epilogue(sum over r of a(i, r) * b(r, j))

An operand is read by two functions over the tuple of its arguments, so that tensors behind
descriptors and behind pointers, matrices and windows of images pass through the same loop:

    init(args, first, limit, BLOCK) -> state
        once per tile, for rows (or columns) `first` and following of `limit`
    load(args, state, step, limit, depth, BLOCK, BLOCK_K) -> [BLOCK, BLOCK_K]
        `step` is a scalar: what depends on it alone, such as the tap of a window, is computed once
        per step and not for every element

Numbers of rows, columns and steps are 32 bits wide, and so is each of them with a tile added.
Elements outside of the operand are zero. Sums run in float32, step after step; cut into splits,
each split is summed by itself and `combine` adds them up, in an order that is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    a,
    b,
    out,
    bias,
    rows,
    cols,
    depth,
    steps,
    programs,
    splits,
    A_INIT: tl.constexpr,
    A_LOAD: tl.constexpr,
    B_INIT: tl.constexpr,
    B_LOAD: tl.constexpr,
    EPILOGUE: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """`programs` programs share the tiles of the output; each tile takes `steps` of BLOCK_K."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    col_tiles = tl.cdiv(cols, BLOCK_N)
    tiles = row_tiles * col_tiles
    count = tiles
    if SPLIT:
        count = tiles * splits
        length = tl.cdiv(steps, splits)
    for index in tl.range(tl.program_id(0), count, programs, flatten=FLATTEN):
        split = 0
        begin = 0
        end = steps
        tile = index
        if SPLIT:
            split = index // tiles
            tile = index % tiles
            begin = split * length
            end = min(begin + length, steps)
        # Tiles that run at the same time lie in bands of GROUP rows: they share operands in L2.
        band = GROUP * col_tiles
        first = tile // band * GROUP
        height = min(row_tiles - first, GROUP)
        i = (first + tile % band % height) * BLOCK_M
        j = tile % band // height * BLOCK_N
        a_state = A_INIT(a, i, rows, BLOCK_M)
        b_state = B_INIT(b, j, cols, BLOCK_N)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(begin, end):
            left = A_LOAD(a, a_state, step, rows, depth, BLOCK_M, BLOCK_K)
            right = B_LOAD(b, b_state, step, cols, depth, BLOCK_N, BLOCK_K)
            if ROUND:
                left = rounded(left)
                right = rounded(right)
            sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
        STORE(
            out, split, i, j, rows, cols, EPILOGUE(bias, sums, j, cols, BLOCK_N), BLOCK_M, BLOCK_N
        )


@triton.jit
def rounded(x):
    """To TF32: tensor cores would cut off what they do not read. (Descriptors round by themselves.)
    NaN stays NaN."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def relu(x):
    """NaN passes through."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def bias_relu(bias, sums, first, limit, BLOCK: tl.constexpr):
    """bias: (data, present)."""
    j = first + tl.arange(0, BLOCK)
    shift = tl.load(bias[0] + j, mask=(j < limit) & (bias[1] != 0), other=0.0)
    return relu(sums + shift.to(tl.float32)[None, :])


@triton.jit
def strided_bias_relu(bias, sums, first, limit, BLOCK: tl.constexpr):
    """bias: (data, present, stride)."""
    j = first + tl.arange(0, BLOCK)
    at = bias[0] + j.to(tl.int64) * bias[2]
    shift = tl.load(at, mask=(j < limit) & (bias[1] != 0), other=0.0)
    return relu(sums + shift.to(tl.float32)[None, :])


@triton.jit
def identity(bias, sums, first, limit, BLOCK: tl.constexpr):
    return sums


@triton.jit
def masked(grad, output, nan_passes):
    """`grad` where ReLU has let `output` through, by either rule of TwinfuseReluGrad."""
    keep = (output > 0) | ((nan_passes != 0) & (output != output))
    # Under the rule that multiplies, infinity times zero is NaN.
    dropped = tl.where(nan_passes != 0, 0.0, grad * 0.0 + 0.0)
    return tl.where(keep, grad, dropped).to(grad.dtype)


@triton.jit
def store_lines(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out: (data, stride of the rows); columns lie side by side."""
    m = i + tl.arange(0, BLOCK_M)
    n = j + tl.arange(0, BLOCK_N)
    at = out[0] + m[:, None].to(tl.int64) * out[1] + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < cols)
    tl.store(at, x.to(out[0].dtype.element_ty), mask=inside)


@triton.jit
def store_strided(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out: (data, stride of the rows, stride of the columns)."""
    m = i + tl.arange(0, BLOCK_M)
    n = j + tl.arange(0, BLOCK_N)
    at = out[0] + m[:, None].to(tl.int64) * out[1] + n[None, :].to(tl.int64) * out[2]
    inside = (m[:, None] < rows) & (n[None, :] < cols)
    tl.store(at, x.to(out[0].dtype.element_ty), mask=inside)


@triton.jit
def store_tensor(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out: (descriptor,)."""
    out[0].store([i, j], x.to(out[0].dtype))


@triton.jit
def store_split(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out: (float32 scratch [splits, rows, cols],)."""
    m = i + tl.arange(0, BLOCK_M)
    n = j + tl.arange(0, BLOCK_N)
    line = (split.to(tl.int64) * rows + m) * cols
    inside = (m[:, None] < rows) & (n[None, :] < cols)
    tl.store(out[0] + line[:, None] + n[None, :], x, mask=inside)


@triton.jit
def combine(
    partial,
    out,
    bias,
    rows,
    cols,
    splits,
    EPILOGUE: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Adds up what `store_split` has left, PARTS splits at a time, in the type SUM."""
    col_tiles = tl.cdiv(cols, BLOCK_N)
    i = tl.program_id(0) // col_tiles * BLOCK_M
    j = tl.program_id(0) % col_tiles * BLOCK_N
    m = (i + tl.arange(0, BLOCK_M))[None, :, None]
    n = (j + tl.arange(0, BLOCK_N))[None, None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for first in range(0, splits, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None, None]
        at = partial + (part.to(tl.int64) * rows + m) * cols + n
        inside = (part < splits) & (m < rows) & (n < cols)
        sums += tl.sum(tl.load(at, mask=inside, other=0.0).to(SUM), axis=0)
    sums = sums.to(tl.float32)
    STORE(out, 0, i, j, rows, cols, EPILOGUE(bias, sums, j, cols, BLOCK_N), BLOCK_M, BLOCK_N)
