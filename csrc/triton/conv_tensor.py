"""Windows of images behind descriptors: boxes of pixels, read and written by bulk copies.

A tile of the output is a box of images x rows x columns of pixels, side by side in its memory, and
so is, for each tap, what it reads: the same box over the image, moved by the tap and spread by the
step of the windows. Descriptors have four dimensions, the channels last. Their blocks are declared
as [1, 1, pixels, channels]; the host encodes a box of as many pixels of its own choice in place of
it, which fills the same memory in the same order, so that one kernel serves boxes of all shapes.
What lies outside of an image is zero, and is not written.

Tiles of the output count column by column, then row by row, then image by image; `tiles_y` x
`tiles_x` of them cover one image. `rows` of the product is their number times BLOCK_M.

    image:  (descriptor [images, height, width, channels], channels, taps, tiles_y, tiles_x, images,
             advance_y, advance_x, origin_y, origin_x, dilation_y, dilation_x)
            where `images` are those of a tile, `taps` those of a row, and a tile begins `advance_y`
            rows of the image below its neighbour; the other numbers are those of conv_relu.py
    weight: (descriptor [rows of taps, columns of taps, lines or depth, depth or lines], channels,
             taps, first_y, first_x, tap_y, tap_x)
            where tap (r, s) of the windows is (first_y + r * tap_y, first_x + s * tap_x)
    output: (descriptor [images, rows, columns, channels], tiles_y, tiles_x, images, rows, columns)
            where the last three are those of a tile

In a sum over windows a step is a box of BLOCK_K pixels, counted in the same way. Boxes must not
reach beyond the rows and columns of the output there: the gradient would be zero and the image
not, and zero times infinity is NaN. They may reach beyond the last image.

    gradient: as the output
    taps:     (descriptor of the image, channels, taps, tiles_y, tiles_x, images, advance_y,
               advance_x, origin_y, origin_x, dilation_y, dilation_x), as the image

Steps are decoded by multiplications, exact while `steps` times either divisor is below 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal(divisor):
    """For `quotient`."""
    d = tl.maximum(divisor, 1).to(tl.uint32)
    return (d + 0x7FFFFFFF) // d


@triton.jit
def quotient(n, inverse):
    """A division costs an order more, and a step would have several."""
    wide = tl.cast(tl.cast(n, tl.uint32), tl.uint64) * inverse.to(tl.uint64)
    return (wide >> 31).to(tl.int32)


@triton.jit
def tile_at(tile, tiles_y, tiles_x):
    """Which tile of images, of rows and of columns."""
    line = tile // tiles_x
    return line // tiles_y, line % tiles_y, tile % tiles_x


@triton.jit
def window_init(args, first, limit, BLOCK: tl.constexpr):
    """Where the first tap of the first window lies; then what steps are divided by."""
    n, p, q = tile_at(first // BLOCK, args[3], args[4])
    y = p * args[6] + args[8]
    x = q * args[7] + args[9]
    return n * args[5], y, x, reciprocal(args[2])


@triton.jit
def window_at(args, state, step, BLOCK_K: tl.constexpr):
    """The box that a tap of all windows meets, and the first channel of the step."""
    chunks = tl.cdiv(args[1], BLOCK_K)
    tap = quotient(step, reciprocal(chunks))
    down = quotient(tap, state[3])
    y = state[1] + down * args[10]
    x = state[2] + (tap - down * args[2]) * args[11]
    return [state[0], y, x, (step - tap * chunks) * BLOCK_K]


@triton.jit
def window_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    return args[0].load(window_at(args, state, step, BLOCK_K)).reshape(BLOCK, BLOCK_K)


@triton.jit
def weight_init(args, first, limit, BLOCK: tl.constexpr):
    return first, reciprocal(args[2])


@triton.jit
def weight_at(args, state, step, BLOCK_K: tl.constexpr):
    """Row and column of the tap, and the first channel of the step."""
    chunks = tl.cdiv(args[1], BLOCK_K)
    tap = quotient(step, reciprocal(chunks))
    down = quotient(tap, state[1])
    r = args[3] + down * args[5]
    s = args[4] + (tap - down * args[2]) * args[6]
    return r, s, (step - tap * chunks) * BLOCK_K


@triton.jit
def weight_depth(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The channels that are summed lie side by side: [rows, columns, lines, depth]."""
    r, s, c = weight_at(args, state, step, BLOCK_K)
    return args[0].load([r, s, state[0], c]).reshape(BLOCK, BLOCK_K)


@triton.jit
def weight_lines(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The others do: [rows, columns, depth, lines]."""
    r, s, c = weight_at(args, state, step, BLOCK_K)
    return args[0].load([r, s, c, state[0]]).reshape(BLOCK_K, BLOCK).T


@triton.jit
def box_at(step, tiles_y, tiles_x, inverse_y, inverse_x):
    """`tile_at` for steps."""
    line = quotient(step, inverse_x)
    n = quotient(line, inverse_y)
    return n, line - n * tiles_y, step - line * tiles_x


@triton.jit
def tap_init(args, first, limit, BLOCK: tl.constexpr):
    """For sums over windows: lines are BLOCK channels of one tap. Where the tap of the first window
    lies, and the first channel."""
    chunks = tl.cdiv(args[1], BLOCK)
    tap = first // BLOCK // chunks
    y = args[8] + tap // args[2] * args[10]
    x = args[9] + tap % args[2] * args[11]
    return y, x, first // BLOCK % chunks * BLOCK, reciprocal(args[3]), reciprocal(args[4])


@triton.jit
def tap_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    n, p, q = box_at(step, args[3], args[4], state[3], state[4])
    y = state[0] + p * args[6]
    x = state[1] + q * args[7]
    return args[0].load([n * args[5], y, x, state[2]]).reshape(BLOCK_K, BLOCK).T


@triton.jit
def pixel_init(args, first, limit, BLOCK: tl.constexpr):
    return first, reciprocal(args[1]), reciprocal(args[2])


@triton.jit
def pixels_load(args, state, step, limit, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """args: output."""
    n, p, q = box_at(step, args[1], args[2], state[1], state[2])
    at = [n * args[3], p * args[4], q * args[5], state[0]]
    return args[0].load(at).reshape(BLOCK_K, BLOCK).T


@triton.jit
def store_windows(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns are channels."""
    n, p, q = tile_at(i // BLOCK_M, out[1], out[2])
    at = [n * out[3], p * out[4], q * out[5], j]
    out[0].store(at, x.to(out[0].dtype).reshape(1, 1, BLOCK_M, BLOCK_N))


@triton.jit
def store_planes(out, split, i, j, rows, cols, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Any strides. out: (data, tiles_y, tiles_x, images, rows, columns, as above, then images, rows
    and columns of the output, and its strides of images, rows, columns and channels)."""
    n, p, q = tile_at(i // BLOCK_M, out[1], out[2])
    pixel = tl.arange(0, BLOCK_M)
    n = n * out[3] + pixel // (out[4] * out[5])
    p = p * out[4] + pixel // out[5] % out[4]
    q = q * out[5] + pixel % out[5]
    at = n.to(tl.int64) * out[9] + (p * out[10] + q * out[11])
    c = (j + tl.arange(0, BLOCK_N))[:, None]
    inside = ((n < out[6]) & (p < out[7]) & (q < out[8]))[None, :] & (c < cols)
    values = x.to(out[0].dtype.element_ty).T
    tl.store(out[0] + at[None, :] + c * out[12], values, mask=inside)
