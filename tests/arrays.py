"""Arrays of the tests: four dtypes, and views of every layout on storage of their own.

No framework is imported here. An operand is 1-D storage with sizes, strides and an offset, which
torch turns into a view (`torch.as_strided`) and TensorFlow takes as a contiguous copy. bfloat16 is
held as its bits in uint16: `torch.from_numpy(base).view(torch.bfloat16)` and
`tf.bitcast(array, tf.bfloat16)` read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twinfuse import _core

Array = npt.NDArray[np.generic]

DTYPES = ("float32", "float64", "bfloat16", "float16")
STORAGE = {
    name: np.dtype(kind)
    for name, kind in zip(DTYPES, ("float32", "float64", "uint16", "float16"), strict=True)
}
# Unit roundoff (half the spacing at one) and smallest positive number.
ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "bfloat16": 2.0**-133, "float16": 2.0**-24}
LARGEST = {"float32": 3.4e38, "float64": 1.7e308, "bfloat16": 3.38e38, "float16": 65504.0}


def flushed(dtype: str) -> float:
    """Below this, the bfloat16 dot instruction takes numbers for zero."""
    return 2.0**-126 if dtype == "bfloat16" and _core.isa() in ("avx512_bf16", "amx_bf16") else 0.0


def encode(values: npt.ArrayLike, dtype: str) -> Array:
    """Round to `dtype`, to nearest even; bfloat16 comes back as uint16 bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return np.asarray(values).astype(STORAGE[dtype])
        bits = np.asarray(values).astype(np.float32)
    words = bits.view(np.uint32)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    return np.where(np.isnan(bits), 0x7FC0, rounded).astype(np.uint16)


def decode(array: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Values as float64; uint16 is taken as the bits of bfloat16."""
    array = np.asarray(array)
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


@dataclass(frozen=True)
class Operand:
    """A strided view of 1-D storage; strides and offset count elements. Gaps hold NaN."""

    base: Array
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def view(self) -> Array:
        width = self.base.itemsize
        return np.lib.stride_tricks.as_strided(
            self.base[self.offset :], self.sizes, [s * width for s in self.strides]
        )

    @property
    def contiguous(self) -> Array:
        return np.ascontiguousarray(self.view).reshape(self.sizes)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        return decode(self.contiguous)


def _order(name: str, ndim: int) -> list[int]:
    """Dimensions from the slowest to the fastest."""
    dims = list(range(ndim))
    return {
        "transposed": [*dims[-1:], *dims[:-1]],
        "permuted": [*reversed(dims[:-1]), *dims[-1:]],
        "channels_last": [*dims[:1], *dims[2:], *dims[1:2]],  # NHWC, OHWI
        "hwio": [*dims[2:], *reversed(dims[:2])],  # a Keras kernel, or images with the batch last
    }.get(name, dims)


def lay_out(values: npt.NDArray[np.float64], layout: str, dtype: str) -> Operand:
    """Store `values` in `layout`: an order of dimensions, a way of storing them, or both in a row.

    "channels_last padded" is an order and a way; one word alone takes the usual other one.
    A broadcast layout repeats the first row, column or element; an overlapping one stores each
    slice in the second half of the one before.
    """
    sizes = values.shape
    order = _order(layout.split()[0], values.ndim)
    way = layout.split()[-1]
    step = 2 if way == "strided" else 1
    gap = 9 if way == "padded" else 0
    offset = 1 if way == "misaligned" else 0

    strides = [0] * values.ndim
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(sizes[dim], 1) + (gap if dim == order[-1] else 0)
        if way == "overlapping":
            step = (step + 1) // 2
    repeated = {
        "broadcast_rows": order[:-1],
        "broadcast_columns": order[-1:],
        "broadcast_batch": order[:1],
        "scalar": order,
    }
    for dim in repeated.get(way, ()):
        strides[dim] = 0
        values = np.broadcast_to(values.take([0], axis=dim), sizes) if sizes[dim] else values

    reach = sum(max(size - 1, 0) * stride for size, stride in zip(sizes, strides, strict=True))
    base = encode(np.full(offset + max(step, reach + 1), np.nan), dtype)
    operand = Operand(base, sizes, tuple(strides), offset)
    operand.view[...] = encode(values, dtype)
    return operand


def part(
    operand: Operand, stops: tuple[int, ...], starts: tuple[int, ...] | None = None
) -> Operand:
    """The elements from `starts` (or the first) to `stops` of each dimension."""
    starts = starts or (0,) * len(stops)
    offset = operand.offset + sum(a * s for a, s in zip(starts, operand.strides, strict=True))
    sizes = tuple(b - a for a, b in zip(starts, stops, strict=True))
    return Operand(operand.base, sizes, operand.strides, offset)
