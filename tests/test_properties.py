"""Shapes, layouts and threads that nobody thought of, through the C API."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import (
    DTYPES,
    ROUNDOFF,
    SMALLEST,
    LinearCase,
    Problem,
    build,
    decode,
    lay_out,
    reference64,
)
from tests.core_api import GRADIENTS, Lender, backward, forward
from tests.rule import assert_same_bits

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)

# Small numbers, and neighbours of the widths, tiles and blocks that kernels are made of.
lengths = st.one_of(
    st.integers(0, 40), st.sampled_from([48, 49, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257])
)
leading_sizes = st.one_of(
    st.tuples(),
    st.tuples(lengths),
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4)),
)
read_layouts = st.sampled_from(
    [
        "contiguous",
        "transposed",
        "strided",
        "padded",
        "misaligned",
        "permuted",
        "broadcast_rows",
        "broadcast_columns",
    ]
)
written_layouts = st.sampled_from(
    ["contiguous", "transposed", "strided", "padded", "misaligned", "permuted"]
)


@st.composite
def cases(draw: st.DrawFn) -> LinearCase:
    return LinearCase(
        f"property_{draw(st.integers(0, 3))}",
        draw(leading_sizes),
        draw(lengths),
        draw(lengths),
        draw(st.booleans()),
        draw(read_layouts),
        draw(read_layouts),
        draw(read_layouts),
        draw(st.sampled_from(["contiguous", "strided", "broadcast_columns"])),
    )


def assert_within_bound(
    got: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, terms: int, dtype: str, what: str
) -> None:
    """The bound of any order of summation: one rounding per term, and one to the dtype."""
    sums = "float64" if dtype == "float64" else "float32"
    bound = (terms + 2) * (ROUNDOFF[sums] * magnitude + SMALLEST[sums])
    bound += ROUNDOFF[dtype] * np.abs(exact) * 1.01 + SMALLEST[dtype]
    error = np.abs(decode(got) - exact)
    assert (error <= bound).all(), (
        f"{what} ({dtype}): error {error.max():.3e} beyond the bound of {terms} terms"
    )


@EXAMPLES
@given(
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    relu_grad=st.sampled_from(["select", "multiply"]),
    output_layout=written_layouts,
    order=st.sampled_from(["serial", "reversed", "random", "threads"]),
    threads=st.integers(1, 9),
)
def test_any_shape_and_layout(
    case: LinearCase, dtype: str, relu_grad: str, output_layout: str, order: str, threads: int
) -> None:
    problem = build(case, dtype)
    output = forward(problem, Lender(order, threads), output_layout)
    grads = backward(problem, output, relu_grad, Lender(order, threads), output_layout)
    _check_numbers(problem, relu_grad, output, grads)

    plain = dataclasses.replace(
        problem,
        **{
            name: lay_out(getattr(problem, name).values, "contiguous", dtype)
            for name in ("input", "weight", "bias", "grad_output")
            if getattr(problem, name) is not None
        },
    )
    assert_same_bits(forward(plain), output, "output of contiguous copies")
    for name, got in backward(plain, output, relu_grad).items():
        assert_same_bits(got, grads[name], f"{name} of contiguous copies")


def _check_numbers(
    problem: Problem, relu_grad: str, output: np.ndarray, grads: dict[str, np.ndarray]
) -> None:
    case, dtype = problem.case, problem.dtype
    exact = reference64(problem, relu_grad, output=output)
    x, w, g = (np.abs(a.values) for a in (problem.input, problem.weight, problem.grad_output))
    g = np.where(decode(output) > 0, g, 0)
    rows, columns = g.reshape(case.rows, case.n), x.reshape(case.rows, case.k)
    bias = 0 if problem.bias is None else np.abs(problem.bias.values)
    assert_within_bound(output, exact.output, x @ w.T + bias, case.k + 1, dtype, "output")
    magnitudes = (g @ w, rows.T @ columns, rows.sum(axis=0))
    for name, magnitude, terms in zip(
        GRADIENTS, magnitudes, (case.n, case.rows, case.rows), strict=True
    ):
        expected = getattr(exact, name)
        assert_within_bound(grads[name], expected, magnitude, terms, dtype, name)
