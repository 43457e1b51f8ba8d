"""Gathers of windows: the operands of Conv+ReLU, never written out.

A step of the reduced dimension is BLOCK_K channels of one tap, so that the tap, and with it the
offset of the image and of the weight, is a scalar. Windows are described as on the CPU
(csrc/cpu/slab.h): window (p, q) and tap (r, s) meet row origin_y + p * step_y + r * dilation_y and
column origin_x + q * step_x + s * dilation_x of the image. The gradient of the input reads the
masked gradient through such windows, once for each remainder of the stride, with the taps of the
weight in reverse order; no zeros are multiplied.

    image:  (data, channels, height, width, rows, columns, taps, step_y, step_x, origin_y, origin_x,
             dilation_y, dilation_x, image stride, row stride, column stride)
            where `rows` x `columns` are the windows of one image and `taps` those of one row
    weight: (data, channels, taps, tap stride along rows, along columns, stride of the lines)
            where `data` points to the first tap that is read

Offsets inside of one image, and of a weight, are 32 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_init(args, first, limit, BLOCK: tl.constexpr):
    """Of each window: where its first tap lies in memory, and in which row and column."""
    index = first + tl.arange(0, BLOCK)
    q = index % args[5]
    p = index // args[5] % args[4]
    n = index // args[5] // args[4]
    y = p * args[7] + args[9]
    x = q * args[8] + args[10]
    return n.to(tl.int64) * args[13] + (y * args[14] + x * args[15]), y, x, index < limit


@triton.jit
def window_at(args, state, step, BLOCK_K: tl.constexpr):
    """Offsets of a tap in all windows, which of them are inside, and the channels of the step."""
    chunks = tl.cdiv(args[1], BLOCK_K)
    tap = step // chunks
    c = step % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
    down = tap // args[6] * args[11]
    right = tap % args[6] * args[12]
    y = state[1] + down
    x = state[2] + right
    inside = state[3] & (y >= 0) & (y < args[2]) & (x >= 0) & (x < args[3])
    return state[0] + (down * args[14] + right * args[15]), inside, c


@triton.jit
def window_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels lie side by side."""
    at, inside, c = window_at(args, state, step, BLOCK_K)
    mask = inside[:, None] & (c[None, :] < args[1])
    return tl.load(args[0] + at[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def plane_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns lie side by side: neighbouring windows do, if the step is 1. args: image, then the
    stride of the channels."""
    at, inside, c = window_at(args, state, step, BLOCK_K)
    mask = inside[None, :] & (c[:, None] < args[1])
    return tl.load(args[0] + at[None, :] + c[:, None] * args[16], mask=mask, other=0.0).T


@triton.jit
def flat_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of images with few channels: a step takes BLOCK_K pairs of tap and channel, one after
    another. args: image, then the stride of the channels."""
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = k // args[1]
    down = tap // args[6] * args[11]
    right = tap % args[6] * args[12]
    y = state[1][:, None] + down[None, :]
    x = state[2][:, None] + right[None, :]
    inside = state[3][:, None] & (k[None, :] < depth)
    inside = inside & (y >= 0) & (y < args[2]) & (x >= 0) & (x < args[3])
    at = state[0][:, None] + (down * args[14] + right * args[15] + k % args[1] * args[16])[None, :]
    return tl.load(args[0] + at, mask=inside, other=0.0)


@triton.jit
def weight_flat(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: weight, then the stride of the channels that are summed."""
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = k // args[1]
    at = tap // args[2] * args[3] + tap % args[2] * args[4] + k % args[1] * args[6]
    r = state[0]
    mask = (r[:, None] < limit) & (k[None, :] < depth)
    return tl.load(args[0] + r[:, None] * args[5] + at[None, :], mask=mask, other=0.0)


@triton.jit
def weight_at(args, step, BLOCK_K: tl.constexpr):
    chunks = tl.cdiv(args[1], BLOCK_K)
    tap = step // chunks
    c = step % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
    return tap // args[2] * args[3] + tap % args[2] * args[4], c


@triton.jit
def weight_depth(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The channels that are summed lie side by side."""
    at, c = weight_at(args, step, BLOCK_K)
    r = state[0]
    mask = (r[:, None] < limit) & (c[None, :] < args[1])
    return tl.load(args[0] + (at + r[:, None] * args[5] + c[None, :]), mask=mask, other=0.0)


@triton.jit
def weight_lines(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The channels that are not summed do; `stride of the lines` is that of those summed."""
    at, c = weight_at(args, step, BLOCK_K)
    r = state[0]
    mask = (c[:, None] < args[1]) & (r[None, :] < limit)
    return tl.load(args[0] + (at + c[:, None] * args[5] + r[None, :]), mask=mask, other=0.0).T


@triton.jit
def weight_strided(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Neither do. args: weight, then the stride of the channels that are summed."""
    at, c = weight_at(args, step, BLOCK_K)
    r = state[0]
    mask = (r[:, None] < limit) & (c[None, :] < args[1])
    at = at + r[:, None] * args[5] + c[None, :] * args[6]
    return tl.load(args[0] + at, mask=mask, other=0.0)


@triton.jit
def tap_init(args, first, limit, BLOCK: tl.constexpr):
    """For sums over windows: lines are BLOCK channels of one tap. Where the tap of the first window
    lies, and which channels."""
    chunks = tl.cdiv(args[1], BLOCK)
    tap = first // BLOCK // chunks
    c = first // BLOCK % chunks * BLOCK + tl.arange(0, BLOCK)
    return args[9] + tap // args[6] * args[11], args[10] + tap % args[6] * args[12], c


@triton.jit
def tap_at(args, state, step, depth, BLOCK_K: tl.constexpr):
    index = step * BLOCK_K + tl.arange(0, BLOCK_K)
    q = index % args[5]
    p = index // args[5] % args[4]
    n = index // args[5] // args[4]
    y = p * args[7] + state[0]
    x = q * args[8] + state[1]
    inside = (index < depth) & (y >= 0) & (y < args[2]) & (x >= 0) & (x < args[3])
    return n.to(tl.int64) * args[13] + (y * args[14] + x * args[15]), inside


@triton.jit
def tap_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels lie side by side."""
    at, inside = tap_at(args, state, step, depth, BLOCK_K)
    c = state[2]
    mask = inside[:, None] & (c[None, :] < args[1])
    return tl.load(args[0] + at[:, None] + c[None, :], mask=mask, other=0.0).T


@triton.jit
def tap_strided(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: image, then the stride of the channels."""
    at, inside = tap_at(args, state, step, depth, BLOCK_K)
    c = state[2]
    mask = inside[None, :] & (c[:, None] < args[1])
    return tl.load(args[0] + at[None, :] + c[:, None] * args[16], mask=mask, other=0.0)


@triton.jit
def pixel_at(out, index):
    """out: (data, rows and columns of an image, image, row and column stride)."""
    n = index // out[2] // out[1]
    inside = index // out[2] % out[1] * out[4] + index % out[2] * out[5]
    return n.to(tl.int64) * out[3] + inside


@triton.jit
def store_windows(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows are windows, columns channels side by side; `data` points to the first element that is
    written."""
    index = i + tl.arange(0, BLOCK_M)
    c = j + tl.arange(0, BLOCK_N)
    inside = (index[:, None] < rows) & (c[None, :] < cols)
    at = pixel_at(out, index)[:, None] + c[None, :]
    tl.store(out[0] + at, x.to(out[0].dtype.element_ty), mask=inside)


@triton.jit
def store_planes(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for any strides. out: as above, then the stride of the channels."""
    index = i + tl.arange(0, BLOCK_M)
    c = j + tl.arange(0, BLOCK_N)
    inside = (c[:, None] < cols) & (index[None, :] < rows)
    at = pixel_at(out, index)[None, :] + c[:, None] * out[6]
    tl.store(out[0] + at, x.to(out[0].dtype.element_ty).T, mask=inside)


@triton.jit
def store_taps(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns are BLOCK_N channels of one tap. out: (data, channels, taps of a row, tap stride
    along rows, along columns, stride of the rows, stride of the channels)."""
    chunks = tl.cdiv(out[1], BLOCK_N)
    tap = j // BLOCK_N // chunks
    c = j // BLOCK_N % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    m = i + tl.arange(0, BLOCK_M)
    at = tap // out[2] * out[3] + tap % out[2] * out[4]
    at = at + m[:, None] * out[5] + c[None, :] * out[6]
    inside = (m[:, None] < rows) & (c[None, :] < out[1])
    tl.store(out[0] + at, x.to(out[0].dtype.element_ty), mask=inside)
