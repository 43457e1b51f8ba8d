"""Linear+ReLU of the core, through its C API: what holds for a matrix product alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.arrays import encode, lay_out, part
from tests.cases import CASES, LinearCase
from tests.core_api import Lender, backward, forward
from tests.core_cases import PATHS, every_dtype
from tests.problem import Problem, build
from tests.rule import assert_same_bits

BY_ID = {case.id: case for case in CASES}
every_path = pytest.mark.parametrize(
    "case",
    [case for case in CASES if f"linear_relu {case.id}" in PATHS],
    ids=lambda case: case.id,
)


@every_dtype
def test_minus_zero_becomes_zero(dtype: str) -> None:
    """A product that underflows from below, and a bias of -0: the sum is -0, which is not > 0."""
    tiny, minus_zero = (np.full((9, 1), 1e-300 if dtype == "float64" else 1e-7), np.full(40, -0.0))
    tiny = tiny * (1.0 if dtype in ("float64", "float16") else 1e-22)
    weight = np.full((40, 1), -tiny[0, 0])
    problem = Problem(
        LinearCase("minus_zero", (9,), 1, 40),
        dtype,
        lay_out(tiny, "contiguous", dtype),
        lay_out(weight, "contiguous", dtype),
        lay_out(minus_zero, "contiguous", dtype),
        lay_out(np.ones((9, 40)), "contiguous", dtype),
    )
    assert_same_bits(forward(problem), encode(np.zeros((9, 40)), dtype), "output")


@every_dtype
def test_empty_reduction_gives_relu_of_bias(dtype: str) -> None:
    problem = build(BY_ID["empty_reduction"], dtype)
    assert problem.bias is not None
    bias = problem.bias.values
    expected = encode(np.broadcast_to(np.where(bias <= 0, 0, bias), (7, 16)), dtype)
    assert_same_bits(forward(problem), expected, "output")
    no_bias = forward(build(BY_ID["empty_reduction_no_bias"], dtype))
    assert_same_bits(no_bias, encode(np.zeros((2, 15)), dtype), "output without bias")


@every_dtype
def test_gradients_of_an_empty_batch_are_zero(dtype: str) -> None:
    problem = build(BY_ID["empty_batch"], dtype)
    grads = backward(problem, forward(problem))
    assert_same_bits(grads["grad_weight"], encode(np.zeros((16, 17)), dtype), "grad_weight")
    assert_same_bits(grads["grad_bias"], encode(np.zeros(16), dtype), "grad_bias")


@every_dtype
def test_large_problems_are_split(dtype: str) -> None:
    lender = Lender("forward", 2)
    problem = build(BY_ID["batch_of_digits_network"], dtype)
    output = forward(problem, lender)
    assert lender.tasks >= 2, "the forward pass of 6 MFMA ran in one task"
    lender.tasks = 0
    backward(problem, output, lender=lender)
    assert lender.tasks >= 2, "the backward pass ran in one task"


@every_dtype
@every_path
def test_bits_of_a_row_do_not_depend_on_its_batch(case: LinearCase, dtype: str) -> None:
    """The path for few rows and the packed one agree, in the input's gradient too."""
    problem = build(case, dtype)
    output = forward(problem)
    grad_input = backward(problem, output, wanted=("grad_input",))["grad_input"]
    rows = case.rows
    spans = {(0, 1), (rows - 1, rows), (rows // 2, min(rows // 2 + 5, rows))}
    spans |= {(0, count) for count in (2, 3, 4, 6, 9, 12, 16, 17) if count < rows}
    for first, last in sorted(spans):
        some = dataclasses.replace(
            problem,
            case=dataclasses.replace(case, leading=(last - first,)),
            input=part(problem.input, (last, case.k), (first, 0)),
            grad_output=part(problem.grad_output, (last, case.n), (first, 0)),
        )
        what = f"rows {first} to {last} of {rows}"
        assert_same_bits(forward(some), output[first:last], f"output, {what}")
        got = backward(some, output[first:last], wanted=("grad_input",))["grad_input"]
        assert_same_bits(got, grad_input[first:last], f"grad_input, {what}")


@every_dtype
@every_path
def test_bits_of_a_column_do_not_depend_on_its_neighbours(case: LinearCase, dtype: str) -> None:
    problem = build(case, dtype)
    output = forward(problem)
    grads = backward(problem, output)
    n = case.n // 2
    fewer = dataclasses.replace(
        problem,
        case=dataclasses.replace(case, n=n),
        weight=part(problem.weight, (n, case.k)),
        bias=part(problem.bias, (n,)) if problem.bias else None,
        grad_output=part(problem.grad_output, (case.rows, n)),
    )
    assert_same_bits(forward(fewer), output[:, :n], "output")
    got = backward(fewer, output[:, :n], wanted=("grad_weight", "grad_bias"))
    assert_same_bits(got["grad_weight"], grads["grad_weight"][:n], "grad_weight")
    assert_same_bits(got["grad_bias"], grads["grad_bias"][:n], "grad_bias")
