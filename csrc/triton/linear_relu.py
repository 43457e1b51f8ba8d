"""Gathers of matrices: the operands of Linear+ReLU.

`depth`: the reduced dimension lies side by side. `lines`: the rows (or columns) of the product do.
`strided`: neither need to. Masked ones read a gradient and, beside it, ReLU's output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import masked


@triton.jit
def line_init(args, first, limit, BLOCK: tl.constexpr):
    return (first + tl.arange(0, BLOCK),)


@triton.jit
def depth_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (data, stride)."""
    r = state[0]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (r[:, None] < limit) & (k[None, :] < depth)
    return tl.load(args[0] + r[:, None].to(tl.int64) * args[1] + k[None, :], mask=inside, other=0.0)


@triton.jit
def depth_masked(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (data, stride, mask, stride of the mask, nan_passes)."""
    r = state[0]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (r[:, None] < limit) & (k[None, :] < depth)
    line = r[:, None].to(tl.int64)
    grad = tl.load(args[0] + line * args[1] + k[None, :], mask=inside, other=0.0)
    output = tl.load(args[2] + line * args[3] + k[None, :], mask=inside, other=0.0)
    return masked(grad, output, args[4])


@triton.jit
def lines_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (data, stride)."""
    r = state[0]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (k[:, None] < depth) & (r[None, :] < limit)
    x = tl.load(args[0] + k[:, None].to(tl.int64) * args[1] + r[None, :], mask=inside, other=0.0)
    return x.T


@triton.jit
def left_lines_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """As the left operand: a tile that is turned after it was read would not be read ahead.
    args: (data, stride)."""
    r = state[0]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (r[:, None] < limit) & (k[None, :] < depth)
    at = r[:, None] + k[None, :].to(tl.int64) * args[1]
    return tl.load(args[0] + at, mask=inside, other=0.0)


@triton.jit
def lines_masked(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (data, stride, mask, stride of the mask, nan_passes)."""
    r = state[0]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (k[:, None] < depth) & (r[None, :] < limit)
    line = k[:, None].to(tl.int64)
    grad = tl.load(args[0] + line * args[1] + r[None, :], mask=inside, other=0.0)
    output = tl.load(args[2] + line * args[3] + r[None, :], mask=inside, other=0.0)
    return masked(grad, output, args[4]).T


@triton.jit
def strided_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (data, stride of the lines, stride along the depth)."""
    r = state[0]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (r[:, None] < limit) & (k[None, :] < depth)
    at = r[:, None].to(tl.int64) * args[1] + k[None, :].to(tl.int64) * args[2]
    return tl.load(args[0] + at, mask=inside, other=0.0)


@triton.jit
def tensor_init(args, first, limit, BLOCK: tl.constexpr):
    return (first,)


@triton.jit
def tensor_depth_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (descriptor,)."""
    return args[0].load([state[0], step * BLOCK_K])


@triton.jit
def tensor_lines_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: (descriptor,)."""
    return args[0].load([step * BLOCK_K, state[0]]).T


@triton.jit
def tensor_depth_masked(
    args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """args: (descriptor, descriptor of the mask, nan_passes)."""
    at = [state[0], step * BLOCK_K]
    return masked(args[0].load(at), args[1].load(at), args[2])


@triton.jit
def tensor_lines_masked(
    args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """args: (descriptor, descriptor of the mask, nan_passes)."""
    at = [step * BLOCK_K, state[0]]
    return masked(args[0].load(at), args[1].load(at), args[2]).T
