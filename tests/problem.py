"""A case of an op as arrays, and what the op must make of them.

A gradient is ambiguous where a pre-activation is so close to zero that rounding decides its sign:
two right implementations may then disagree by a whole `grad_output` element. `build` therefore
zeroes `grad_output` at those elements, so that gradients never depend on the side of the kink and
the rule for outputs holds for gradients too. Cases with small integer values are exact: they keep
their gradient at the kink itself.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tests.arrays import (
    LARGEST,
    ROUNDOFF,
    SMALLEST,
    Operand,
    decode,
    encode,
    flushed,
    lay_out,
)

Numbers = npt.NDArray[np.floating]
Kind = type[np.floating]
ReluGrad = Literal["select", "multiply"]

OPERANDS = ("input", "weight", "bias", "grad_output")


class Case(Protocol):
    """One line of an op's table: shapes, layouts and kind of values, and the op's formulas."""

    id: str
    op: str
    bias: bool
    input_layout: str
    weight_layout: str
    bias_layout: str
    grad_output_layout: str
    values: str

    @property
    def input_sizes(self) -> tuple[int, ...]: ...
    @property
    def weight_sizes(self) -> tuple[int, ...]: ...
    @property
    def output_sizes(self) -> tuple[int, ...]: ...
    @property
    def terms(self) -> tuple[int, int, int]:
        """How many products a sum has in the output, grad_input and grad_weight, at most."""
        ...

    def pre_activation(self, x: Numbers, w: Numbers, b: Numbers | None) -> Numbers:
        """In the dtype of its operands."""
        ...

    def gradients(self, g: Numbers, x: Numbers, w: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Of input, weight and bias, from the masked gradient."""
        ...

    def scatter_nonfinite(self, x: Numbers, w: Numbers, b: Numbers, g: Numbers) -> None:
        """NaN and infinities where all implementations must agree about them."""
        ...


@dataclass(frozen=True)
class Problem:
    """The arrays of one case in one dtype."""

    case: Any  # a Case
    dtype: str
    input: Operand
    weight: Operand
    bias: Operand | None
    grad_output: Operand


def build(case: Case, dtype: str) -> Problem:
    """Fresh arrays, with the same values in every process."""
    return _laid_out(case, dtype, _values(case, dtype))


def relaid(problem: Problem, layout: str) -> Problem:
    """The same values in another layout."""
    named = {name: getattr(problem, name) for name in OPERANDS}
    return replace(
        problem,
        **{name: lay_out(a.values, layout, problem.dtype) for name, a in named.items() if a},
    )


def _laid_out(case: Case, dtype: str, values: tuple[Numbers, ...]) -> Problem:
    x, w, b, g = values
    return Problem(
        case,
        dtype,
        lay_out(x, case.input_layout, dtype),
        lay_out(w, case.weight_layout, dtype),
        lay_out(b, case.bias_layout, dtype) if case.bias else None,
        lay_out(g, case.grad_output_layout, dtype),
    )


@functools.lru_cache(maxsize=1024)
def _values(case: Case, dtype: str) -> tuple[Numbers, ...]:
    random = np.random.default_rng(zlib.crc32(case.id.encode()))
    # Uneven operands make a swapped pair or a lost bias visible.
    x = random.standard_normal(case.input_sizes)
    w = random.standard_normal(case.weight_sizes) * 0.5
    b = random.standard_normal(case.weight_sizes[0]) + 0.25
    g = random.standard_normal(case.output_sizes)
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
        scale = np.sqrt(LARGEST[dtype] / (8 * np.sqrt(max(case.terms))))
        x, w, b, g = x * scale, w * scale, b * scale, g * scale
    elif case.values == "nonfinite":
        case.scatter_nonfinite(x, w, b, g)
    ambiguous = _ambiguous(_laid_out(case, dtype, (x, w, b, g)))
    return x, w, b, np.where(ambiguous & np.isfinite(g), 0.0, g)


def _pre_activation(problem: Problem, kind: Kind, magnitudes: bool = False) -> Numbers:
    def read(operand: Operand) -> Numbers:
        values = operand.values.astype(kind)
        return np.abs(values) if magnitudes else values

    bias = None if problem.bias is None else read(problem.bias)
    with np.errstate(all="ignore"):
        return problem.case.pre_activation(read(problem.input), read(problem.weight), bias)


def _ambiguous(problem: Problem) -> npt.NDArray[np.bool_]:
    """Where the sign of the rounded pre-activation depends on the order of summation."""
    dtype = problem.dtype
    magnitude = _pre_activation(problem, np.float64, magnitudes=True)
    z = np.abs(_pre_activation(problem, np.float64))
    sums = "float64" if dtype == "float64" else "float32"
    terms = problem.case.terms[0] + 2
    with np.errstate(all="ignore"):
        bound = terms * (ROUNDOFF[sums] * magnitude + SMALLEST[sums]) + SMALLEST[dtype]
    bound += terms * flushed(dtype)
    return np.isfinite(z) & np.isfinite(bound) & (z <= bound)


@dataclass(frozen=True)
class Results:
    """What the op computes; in a reference, in float64 (extended for float64) and not rounded."""

    output: Numbers
    grad_input: Numbers
    grad_weight: Numbers
    grad_bias: Numbers


def reference64(
    problem: Problem, relu_grad: ReluGrad, output: npt.ArrayLike | None = None
) -> Results:
    """The op and its gradients on the rounded inputs of `problem`.

    The mask comes from `output` (an implementation's own) where it is given, else from the exact
    output rounded to the dtype; `build` makes both agree wherever `grad_output` is not zero.
    """
    kind = np.longdouble if problem.dtype == "float64" else np.float64
    return _compute(problem, kind, relu_grad, output)


def numpy_results(
    problem: Problem, relu_grad: ReluGrad, output: npt.ArrayLike | None = None
) -> Results:
    """The core's rival for the 2x rule: NumPy in float32 (float64), rounded to the dtype."""
    kind = np.float64 if problem.dtype == "float64" else np.float32
    results = vars(_compute(problem, kind, relu_grad, output))
    return Results(**{name: decode(encode(a, problem.dtype)) for name, a in results.items()})


def _compute(
    problem: Problem, kind: Kind, relu_grad: ReluGrad, output: npt.ArrayLike | None
) -> Results:
    x, w, g = (a.values.astype(kind) for a in (problem.input, problem.weight, problem.grad_output))
    z = _pre_activation(problem, kind)
    exact = np.where(z <= 0, kind(0), z)
    y = decode(encode(exact, problem.dtype) if output is None else output)
    with np.errstate(all="ignore"):
        masked = np.where(y <= 0, kind(0), g) if relu_grad == "select" else g * (y > 0).astype(kind)
        return Results(exact, *problem.case.gradients(masked, x, w))
