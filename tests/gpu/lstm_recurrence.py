"""The part of a case of the LSTM that its GPU kernels compute: all but the products of inputs.

    problem = build(case, dtype)          # operands, and `inputs` [rows, 4H], in storage dtype
    exact = computed(problem)             # float64: results by name, not rounded
    other = rival(problem, "tf32")        # a loop in the dtype, with such products
    assert_close(problem, ours, "tf32")

Besides the results of a case there are `grad_gates` and what is saved, by row. Rows of steps that
are skipped are zeros in `grad_gates` and NaN in `gates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests import lstm_problem
from tests.arrays import ROUNDOFF, SMALLEST, Array, Operand, decode, encode
from tests.lstm_case import ROWS, LstmCase
from tests.lstm_reference import Bools, Lstm, Numbers
from tests.rule import assert_within_twice


@dataclass(frozen=True)
class Recurrence:
    case: LstmCase
    dtype: str
    operands: dict[str, Operand]
    mask: Bools | None
    inputs: Array

    @property
    def batch_sizes(self) -> npt.NDArray[np.int64] | None:
        return self.case.live_steps.sum(axis=1) if self.case.lengths else None

    @property
    def live(self) -> Bools:
        return self.case.live_steps if self.mask is None else self.mask


def build(case: LstmCase, dtype: str) -> Recurrence:
    problem = lstm_problem.build(case, dtype)
    x, w = (problem.operands[name].values for name in ("input", "weight_ih"))
    inputs = to_rows(case, np.matmul(case.unrow(x), w.T))
    return Recurrence(case, dtype, problem.operands, problem.mask, encode(inputs, dtype))


def to_rows(case: LstmCase, values: Numbers) -> Numbers:
    """[T, B, n] as saved rows."""
    if case.lengths:
        return values[case.live_steps]
    values = values.swapaxes(0, 1) if case.batch_first else values
    return np.ascontiguousarray(values).reshape(case.steps * case.batch, -1)


def from_rows(case: LstmCase, rows: Numbers) -> Numbers:
    if case.lengths:
        return case.unrow(rows)
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    values = rows.reshape(*shape, -1)
    return values.swapaxes(0, 1) if case.batch_first else values


def saved(problem: Recurrence) -> dict[str, Array]:
    """What a forward pass without any error saves."""
    exact = computed(problem)
    return {name: encode(exact[name], problem.dtype) for name in ("gates", "cells")}


def to_tf32(values: Numbers) -> Numbers:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def computed(
    problem: Recurrence,
    kind: type[np.floating] = np.float64,
    rounded: Callable[[Numbers], Numbers] = lambda x: x,
    product: Callable[[Numbers, Numbers], Numbers] = np.matmul,
) -> dict[str, Numbers]:
    """The equations in `kind`, with `rounded` after every operation."""
    case, arrays = problem.case, {}
    for name, operand in problem.operands.items():
        values = operand.values.astype(kind)
        arrays[name] = case.unrow(values) if name in ROWS else values
    # The products are the input, so that its gradient is that of the gates.
    arrays["input"] = from_rows(case, decode(problem.inputs)).astype(kind)
    arrays["weight_ih"] = np.ones((1, 1), kind)
    gates = 4 * case.units

    def multiply(a: Numbers, b: Numbers) -> Numbers:
        if b.shape == (1, 1):
            return a
        # The gradient of what is one here would be large, and nobody looks at it.
        if (len(a), b.shape[1], len(b)) == (gates, gates, problem.live.size):
            return np.zeros((1, 1), kind)
        return product(a, b)

    lstm = Lstm(
        arrays,
        problem.live,
        case.activation,
        case.recurrent_activation,
        case.reverse,
        case.zero_masked_output,
        rounded=rounded,
        product=multiply,
    )
    with np.errstate(all="ignore"):
        results = lstm.forward() | lstm.backward()
    by_row = {name: np.stack(lstm.steps[name]) for name in ("gates", "cells", "hidden")}
    by_row["gates"] = np.where(problem.live[..., None], by_row["gates"], np.nan)
    by_row["grad_gates"] = results["grad_input"]
    results["grad_bias"] = results["grad_input"].sum(axis=0)
    results["output"] = case.row(results["output"])
    return results | {name: to_rows(case, values) for name, values in by_row.items()}


def three_products(a: Numbers, b: Numbers) -> Numbers:
    """Of what TF32 has of a number, and of what it has of the rest."""
    (a, a_rest), (b, b_rest) = (
        (large, to_tf32(x - large)) for x in (a, b) for large in [to_tf32(x)]
    )
    return a @ b + (a_rest @ b + a @ b_rest)


PRODUCTS = {"tf32": lambda a, b: to_tf32(a) @ to_tf32(b), "tf32x3": three_products}


def rival(problem: Recurrence, format: str) -> dict[str, Numbers]:
    """A composed loop in the dtype, with products in the format."""
    if format in PRODUCTS:
        return computed(problem, np.float32, product=PRODUCTS[format])

    def rounded(values: Numbers) -> Numbers:
        return decode(encode(values, problem.dtype)).astype(np.float32)

    return computed(problem, np.float32, rounded)


def noise(problem: Recurrence, format: str, exact: Mapping[str, Numbers]) -> dict[str, float]:
    """As that of `tests.lstm_problem`."""
    random, dtype = np.random.default_rng(0), problem.dtype

    def moved(values: Numbers, by: Numbers) -> Numbers:
        return values + random.uniform(-1, 1, values.shape) * by

    def rounded(values: Numbers) -> Numbers:
        return moved(values, ROUNDOFF[dtype] * np.abs(values) + SMALLEST[dtype] / 2)

    def product(a: Numbers, b: Numbers) -> Numbers:
        by = {"tf32": 2.0**-11, "tf32x3": 2.0**-22}.get(format, ROUNDOFF["float32"])
        return moved(a @ b, by * (np.abs(a) @ np.abs(b)))

    largest: dict[str, float] = {}
    with np.errstate(invalid="ignore"):
        for _ in range(3):
            for name, array in computed(problem, np.float64, rounded, product).items():
                error = np.abs(array - exact[name])
                error = error[np.isfinite(error)].max(initial=0)
                largest[name] = max(float(error), largest.get(name, 0.0))
    return largest


def assert_close(problem: Recurrence, ours: Mapping[str, npt.ArrayLike], format: str) -> None:
    """The rule of `tests.rule` for every result in `ours`."""
    values = problem.case.values
    exact, native = computed(problem), rival(problem, format)
    usual: dict[str, float] = {}
    # TF32 has few bits, if any, for numbers below the normal ones.
    few = 16 * 2.0**-126 if values == "tiny" and problem.dtype == "float32" else 0.0
    for name, array in ours.items():
        results = [array, native[name], exact[name]]
        if values == "nonfinite" and format == "tf32x3" and name.startswith("grad"):
            # The parts of an infinity are that and NaN.
            results = [np.where(np.isinf(a), np.nan, a) for a in results]
        what, dtype = f"{problem.case.id} {name}", problem.dtype
        if name == "grad_bias":
            dtype = "float32"
        try:
            assert_within_twice(*results, what, dtype=dtype, flushed_below=few)
        except AssertionError:
            # It takes long, and is seldom needed.
            usual = usual or noise(problem, format, exact)
            assert_within_twice(*results, what, dtype=dtype, flushed_below=few, noise=usual[name])
