"""The one table of Linear+ReLU cases that the core, torch and TensorFlow are all tested with.

No framework is imported here. `build` makes the arrays of a case as 1-D storage with sizes,
strides and an offset, which torch turns into a view (`torch.as_strided`) and TensorFlow takes as
contiguous copies. bfloat16 is held as its bits in uint16: `torch.from_numpy(base).view(
torch.bfloat16)` and `tf.bitcast(array, tf.bfloat16)` read it.

A gradient is ambiguous where a pre-activation is so close to zero that rounding decides its sign:
two right implementations may then disagree by a whole `grad_output` element. `build` therefore
zeroes `grad_output` at those elements, so that gradients never depend on the side of the kink and
the rule for outputs holds for gradients too. Cases with small integer values are exact: they keep
their gradient at the kink itself.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from twinfuse import _core

Array = npt.NDArray[np.generic]
ReluGrad = Literal["select", "multiply"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
STORAGE = {
    name: np.dtype(kind)
    for name, kind in zip(DTYPES, ("float32", "float64", "uint16", "float16"), strict=True)
}
# Unit roundoff (half the spacing at one) and smallest positive number.
ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "bfloat16": 2.0**-133, "float16": 2.0**-24}
LARGEST = {"float32": 3.4e38, "float64": 1.7e308, "bfloat16": 3.38e38, "float16": 65504.0}


@dataclass(frozen=True)
class LinearCase:
    """`output[*leading, n] = relu(input[*leading, k] @ weight[n, k]^T + bias[n])`."""

    id: str
    leading: tuple[int, ...]
    k: int
    n: int
    bias: bool = True
    input_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_output_layout: str = "contiguous"
    bias_layout: str = "contiguous"
    values: str = "normal"

    @property
    def rows(self) -> int:
        return int(np.prod(self.leading, dtype=np.int64))


CASES = (
    # Smallest and empty shapes; an input without leading dimensions.
    LinearCase("one_element", (1,), 1, 1),
    LinearCase("vector_input", (), 17, 31),
    LinearCase("vector_input_no_bias", (), 64, 16, bias=False),
    LinearCase("empty_batch", (0,), 17, 16),
    LinearCase("empty_middle", (2, 0, 3), 3, 15),
    LinearCase("empty_reduction", (7,), 0, 16),
    LinearCase("empty_reduction_no_bias", (2,), 0, 15, bias=False),
    LinearCase("empty_output", (7,), 17, 0),
    # Few rows: weights are streamed instead of packed.
    LinearCase("row_of_digits_network", (1,), 784, 128),
    LinearCase("row_no_bias", (1,), 257, 513, bias=False),
    LinearCase("row_keras_weight", (1,), 257, 127, weight_layout="transposed"),
    LinearCase("two_rows_wide", (2,), 64, 1030),
    LinearCase("two_rows_odd", (2,), 127, 130),
    LinearCase("seven_rows", (7,), 130, 31),
    # On and beside the multiples of vector widths, register tiles and reduction blocks.
    LinearCase("below_tile", (33,), 15, 15),
    LinearCase("at_tile", (64,), 16, 16),
    LinearCase("above_tile", (33,), 17, 17),
    LinearCase("one_column", (33,), 64, 1),
    LinearCase("outer_product", (33,), 1, 64),
    LinearCase("below_block", (7,), 255, 17),
    LinearCase("at_block", (33,), 256, 64),
    LinearCase("above_block", (7,), 257, 16),
    LinearCase("several_blocks", (33,), 1030, 31),
    LinearCase("odd_everywhere", (130,), 130, 127, bias=False),
    LinearCase("many_rows", (1030,), 17, 31),
    LinearCase("batch_of_digits_network", (64,), 784, 128),
    LinearCase("two_leading", (2, 3), 16, 31),
    LinearCase("three_leading_ones", (1, 1, 5), 31, 16),
    # Views.
    LinearCase("input_transposed", (33,), 64, 31, input_layout="transposed"),
    LinearCase("input_strided", (33,), 31, 64, input_layout="strided"),
    LinearCase("input_padded", (64,), 31, 17, input_layout="padded"),
    LinearCase("input_same_rows", (7,), 64, 17, input_layout="broadcast_rows"),
    LinearCase("input_same_columns", (33,), 17, 31, input_layout="broadcast_columns"),
    LinearCase("input_misaligned", (33,), 64, 64, input_layout="misaligned"),
    LinearCase("input_permuted", (5, 2, 3), 17, 16, input_layout="permuted"),
    LinearCase("weight_keras", (33,), 64, 127, weight_layout="transposed"),
    LinearCase("weight_strided", (33,), 31, 17, weight_layout="strided"),
    LinearCase("weight_padded", (7,), 64, 31, weight_layout="padded"),
    LinearCase("weight_same_rows", (33,), 31, 17, weight_layout="broadcast_rows"),
    LinearCase("weight_misaligned", (64,), 64, 33, weight_layout="misaligned"),
    LinearCase("bias_strided", (33,), 17, 31, bias_layout="strided"),
    LinearCase("bias_same", (7,), 17, 31, bias_layout="broadcast_columns"),
    # `output.sum()` hands down one gradient for all elements, `output.sum(0)` one per column.
    LinearCase("grad_of_sum", (33,), 17, 31, grad_output_layout="scalar", values="integers"),
    LinearCase("grad_of_row", (7,), 31, 64, grad_output_layout="broadcast_rows", values="integers"),
    LinearCase("grad_transposed", (33,), 31, 64, grad_output_layout="transposed"),
    LinearCase("grad_strided", (33,), 17, 31, grad_output_layout="strided"),
    LinearCase("grad_misaligned", (64,), 31, 17, grad_output_layout="misaligned"),
    LinearCase("all_transposed", (17,), 33, 31, True, "transposed", "transposed", "transposed"),
    # Values.
    LinearCase("zeros_at_the_kink", (33,), 15, 31, values="integers"),
    LinearCase("dead", (33,), 17, 31, values="dead"),
    LinearCase("denormal", (33,), 31, 17, values="denormal"),
    LinearCase("denormal_row", (1,), 31, 64, values="denormal"),
    LinearCase("large", (33,), 31, 17, values="large"),
    LinearCase("nonfinite", (33,), 17, 31, values="nonfinite"),
    LinearCase("nonfinite_few_rows", (7,), 64, 16, values="nonfinite"),
)  # fmt: skip


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


def lay_out(values: npt.NDArray[np.float64], layout: str, dtype: str) -> Operand:
    """Store `values` in `layout`; a broadcast layout repeats the first row, column or element."""
    sizes = values.shape
    last = values.ndim - 1
    order = list(range(values.ndim))  # dimensions from the slowest to the fastest
    if layout == "transposed":
        order = [last, *range(last)]
    elif layout == "permuted":
        order = [*reversed(range(last)), last]
    step = 2 if layout == "strided" else 1
    gap = 9 if layout == "padded" else 0
    offset = 1 if layout == "misaligned" else 0

    strides = [0] * values.ndim
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(sizes[dim], 1) + (gap if dim == order[-1] else 0)
    repeated = {"broadcast_rows": order[:-1], "broadcast_columns": order[-1:], "scalar": order}
    for dim in repeated.get(layout, ()):
        strides[dim] = 0
        values = np.broadcast_to(values.take([0], axis=dim), sizes) if sizes[dim] else values

    base = encode(np.full(offset + max(step, 1), np.nan), dtype)
    operand = Operand(base, sizes, tuple(strides), offset)
    operand.view[...] = encode(values, dtype)
    return operand


@dataclass(frozen=True)
class Problem:
    """The arrays of one case in one dtype."""

    case: LinearCase
    dtype: str
    input: Operand
    weight: Operand
    bias: Operand | None
    grad_output: Operand


def build(case: LinearCase, dtype: str) -> Problem:
    """Fresh arrays, with the same values in every process."""
    x, w, b, g = _values(case, dtype)
    return Problem(
        case,
        dtype,
        lay_out(x, case.input_layout, dtype),
        lay_out(w, case.weight_layout, dtype),
        lay_out(b, case.bias_layout, dtype) if case.bias else None,
        lay_out(g, case.grad_output_layout, dtype),
    )


@functools.lru_cache(maxsize=512)
def _values(case: LinearCase, dtype: str) -> tuple[npt.NDArray[np.float64], ...]:
    random = np.random.default_rng(zlib.crc32(case.id.encode()))
    # Uneven operands make a swapped pair or a lost bias visible.
    x = random.standard_normal((*case.leading, case.k))
    w = random.standard_normal((case.n, case.k)) * 0.5
    b = random.standard_normal(case.n) + 0.25
    g = random.standard_normal((*case.leading, case.n))
    if case.values == "integers":
        x, w, b, g = (random.integers(-2, 3, size=a.shape).astype(float) for a in (x, w, b, g))
        return x, w, b, g + 3  # a gradient that is never zero shows a wrong mask
    if case.values == "dead":
        x, w, b = np.abs(x), -np.abs(w), -np.abs(b) - 0.25
    elif case.values == "denormal":
        # Operands are normal; their products lie below the smallest normal number, which is the
        # smallest number over twice the roundoff.
        scale = np.sqrt(SMALLEST[dtype] / ROUNDOFF[dtype] / 64)
        x, w, b, g = x * scale, w * scale, b * scale**2, g * scale
    elif case.values == "large":
        # Close to overflow, which no partial sum reaches in any order of summation.
        scale = np.sqrt(LARGEST[dtype] / (8 * np.sqrt(max(case.k, case.n, case.rows))))
        x, w, b, g = x * scale, w * scale, b * scale, g * scale
    elif case.values == "nonfinite":
        _scatter_nonfinite(x, w, b, g)
    operands = (lay_out(x, case.input_layout, dtype), lay_out(w, case.weight_layout, dtype))
    bias = lay_out(b, case.bias_layout, dtype) if case.bias else None
    return (x, w, b, np.where(_ambiguous(*operands, bias, dtype) & np.isfinite(g), 0.0, g))


def _scatter_nonfinite(x: Array, w: Array, b: Array, g: Array) -> None:
    x[0, 0], x[1, -1], x[2, 1] = np.nan, np.inf, -np.inf
    b[0], b[1] = np.inf, -np.inf
    w[2, 2] = np.nan
    # Column 1 is masked (its outputs are zero): the two ReLU rules differ on these gradients.
    g[3, 1], g[4, 1], g[-1, -1] = np.nan, np.inf, -np.inf


def _pre_activation(
    x: Operand, w: Operand, b: Operand | None, kind: type[np.floating]
) -> npt.NDArray[np.floating]:
    with np.errstate(all="ignore"):
        z = x.values.astype(kind) @ w.values.astype(kind).T
        return z if b is None else z + b.values.astype(kind)


def flushed(dtype: str) -> float:
    """Below this, the bfloat16 dot instruction takes numbers for zero."""
    return 2.0**-126 if dtype == "bfloat16" and _core.isa() == "avx512_bf16" else 0.0


def _ambiguous(x: Operand, w: Operand, b: Operand | None, dtype: str) -> npt.NDArray[np.bool_]:
    """Where the sign of the rounded pre-activation depends on the order of summation."""
    with np.errstate(all="ignore"):
        magnitude = np.abs(x.values) @ np.abs(w.values).T
        magnitude += 0 if b is None else np.abs(b.values)
        z = np.abs(_pre_activation(x, w, b, np.float64))
    sums = "float64" if dtype == "float64" else "float32"
    terms = w.sizes[1] + 2
    bound = terms * (ROUNDOFF[sums] * magnitude + SMALLEST[sums]) + SMALLEST[dtype]
    bound += terms * flushed(dtype)
    return np.isfinite(z) & np.isfinite(bound) & (z <= bound)


@dataclass(frozen=True)
class Results:
    """What the op computes; in a reference, in float64 (extended for float64) and not rounded."""

    output: npt.NDArray[np.floating]
    grad_input: npt.NDArray[np.floating]
    grad_weight: npt.NDArray[np.floating]
    grad_bias: npt.NDArray[np.floating]


def reference64(
    problem: Problem, relu_grad: ReluGrad, output: npt.ArrayLike | None = None
) -> Results:
    """The op and its gradients on the rounded inputs of `problem`.

    The mask comes from `output` (an implementation's own) where it is given, else from the exact
    output rounded to the dtype; `build` makes both agree wherever `grad_output` is not zero.
    """
    kind = np.longdouble if problem.dtype == "float64" else np.float64
    x, w, g = (a.values.astype(kind) for a in (problem.input, problem.weight, problem.grad_output))
    z = _pre_activation(problem.input, problem.weight, problem.bias, kind)
    exact = np.where(z <= 0, kind(0), z)
    y = decode(encode(exact, problem.dtype) if output is None else output)
    with np.errstate(all="ignore"):
        masked = np.where(y <= 0, 0, g) if relu_grad == "select" else g * (y > 0)
        rows = masked.reshape(problem.case.rows, problem.case.n)
        return Results(
            output=exact,
            grad_input=masked @ w,
            grad_weight=rows.T @ x.reshape(problem.case.rows, problem.case.k),
            grad_bias=rows.sum(axis=0),
        )
