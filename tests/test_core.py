"""Linear+ReLU of the core, through its C API: numbers, and what their bits may depend on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.cases import (
    CASES,
    DTYPES,
    Array,
    LinearCase,
    Operand,
    Problem,
    Results,
    build,
    decode,
    encode,
    lay_out,
    reference64,
)
from tests.core_api import GRADIENTS, Lender, backward, forward, kernel
from tests.mxcsr import FLUSH, ROUND_UP, mxcsr
from tests.rule import assert_same_bits, assert_within_twice
from twinfuse import _core

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_rule = pytest.mark.parametrize("relu_grad", ["select", "multiply"])

BY_ID = {case.id: case for case in CASES}
# One case for each path: packed and not, several reduction blocks, tails, both weight layouts.
PATHS = [
    BY_ID[name]
    for name in (
        "row_of_digits_network",
        "row_keras_weight",
        "seven_rows",
        "several_blocks",
        "odd_everywhere",
        "many_rows",
        "weight_keras",
        "all_transposed",
        "denormal",
    )
]
every_path = pytest.mark.parametrize("case", PATHS, ids=lambda case: case.id)


def numpy_results(problem: Problem, relu_grad: str, output: Array | None = None) -> Results:
    """The rival for the 2x rule: NumPy in float32 (float64), rounded to the dtype at the end."""
    kind = np.float64 if problem.dtype == "float64" else np.float32
    x, w, g = (a.values.astype(kind) for a in (problem.input, problem.weight, problem.grad_output))
    with np.errstate(all="ignore"):
        z = x @ w.T
        if problem.bias is not None:
            z = z + problem.bias.values.astype(kind)
        y = decode(
            encode(np.where(z <= 0, kind(0), z), problem.dtype) if output is None else output
        )
        masked = np.where(y <= 0, kind(0), g) if relu_grad == "select" else g * (y > 0).astype(kind)
        rows = masked.reshape(problem.case.rows, problem.case.n)
        results = (
            y,
            masked @ w,
            rows.T @ x.reshape(problem.case.rows, problem.case.k),
            rows.sum(axis=0),
        )
    return Results(*(decode(encode(a, problem.dtype)) for a in results))


@every_dtype
@every_case
def test_results_within_twice_the_error_of_numpy(case: LinearCase, dtype: str) -> None:
    problem = build(case, dtype)
    output = forward(problem)
    # The two rules differ in special values only.
    rules = ("select",) if case.values == "normal" else ("select", "multiply")
    for relu_grad in rules:
        native, reference = (numpy_results(problem, relu_grad), reference64(problem, relu_grad))
        assert_within_twice(output, native.output, reference.output, "output", dtype=dtype)
        for name, ours in backward(problem, output, relu_grad).items():
            expected, what = getattr(reference, name), f"{name} ({relu_grad})"
            assert_within_twice(ours, getattr(native, name), expected, what, dtype=dtype)


@every_dtype
@every_case
def test_both_relu_rules_agree_on_finite_numbers(case: LinearCase, dtype: str) -> None:
    problem = build(case, dtype)
    output = forward(problem)
    if case.values == "nonfinite":
        return
    select, multiply = (backward(problem, output, rule) for rule in ("select", "multiply"))
    for name in GRADIENTS:
        # A masked gradient is +0 under one rule and may be -0 under the other.
        assert_same_bits(bits_of_zero(multiply[name]), bits_of_zero(select[name]), name)


def bits_of_zero(array: Array) -> Array:
    return np.where(decode(array) == 0, 0, array).astype(array.dtype)


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
@every_case
def test_output_has_no_negative_zero_and_nothing_below(case: LinearCase, dtype: str) -> None:
    output = decode(forward(build(case, dtype)))
    assert not np.signbit(output[~np.isnan(output)]).any()


@every_dtype
def test_gradient_follows_the_output_it_is_given(dtype: str) -> None:
    """The mask is that of `output`, not one computed again."""
    problem = build(BY_ID["above_tile"], dtype)
    opposite = np.where(decode(forward(problem)) > 0, 0.0, 1.0)
    native = numpy_results(problem, "select", opposite)
    reference = reference64(problem, "select", output=opposite)
    for name, ours in backward(problem, encode(opposite, dtype)).items():
        expected = getattr(reference, name)
        assert_within_twice(ours, getattr(native, name), expected, name, dtype=dtype)


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


def relaid(problem: Problem, layout: str) -> Problem:
    """The same values in another layout."""

    def move(operand: Operand) -> Operand:
        return lay_out(operand.values, layout, problem.dtype)

    return dataclasses.replace(
        problem,
        input=move(problem.input),
        weight=move(problem.weight),
        bias=move(problem.bias) if problem.bias else None,
        grad_output=move(problem.grad_output),
    )


@every_dtype
@every_case
def test_bits_do_not_depend_on_layout(case: LinearCase, dtype: str) -> None:
    """Every case against its contiguous copy; outputs in other layouts, too."""
    problem = build(case, dtype)
    plain = relaid(problem, "contiguous")
    output = forward(plain)
    grads = backward(plain, output)
    for layout in ("contiguous", "transposed", "strided", "misaligned", "padded"):
        variants = [relaid(problem, layout)] + ([problem] if layout == "contiguous" else [])
        for variant in variants:
            assert_same_bits(forward(variant, output_layout=layout), output, f"output, {layout}")
            got = backward(variant, output, output_layout=layout)
            for name in GRADIENTS:
                assert_same_bits(got[name], grads[name], f"{name}, {layout}")


@every_dtype
@every_path
def test_bits_do_not_depend_on_order_or_threads(case: LinearCase, dtype: str) -> None:
    problem = build(case, dtype)
    output = forward(problem)
    grads = backward(problem, output)
    lenders = [Lender(order, 4) for order in ("forward", "reversed", "random")]
    lenders += [Lender("threads", count) for count in (1, 2, 3, 7, 16)]
    for lender in lenders:
        what = f"{lender.order}, {lender.num_threads} threads"
        assert_same_bits(forward(problem, lender), output, f"output, {what}")
        for name, got in backward(problem, output, lender=lender).items():
            assert_same_bits(got, grads[name], f"{name}, {what}")


@every_dtype
def test_large_problems_are_split(dtype: str) -> None:
    lender = Lender("forward", 2)
    problem = build(BY_ID["batch_of_digits_network"], dtype)
    output = forward(problem, lender)
    assert lender.tasks >= 2, "the forward pass of 6 MFMA ran in one task"
    lender.tasks = 0
    backward(problem, output, lender=lender)
    assert lender.tasks >= 2, "the backward pass ran in one task"


def part(
    operand: Operand, stops: tuple[int, ...], starts: tuple[int, ...] | None = None
) -> Operand:
    starts = starts or (0,) * len(stops)
    offset = operand.offset + sum(a * s for a, s in zip(starts, operand.strides, strict=True))
    sizes = tuple(b - a for a, b in zip(starts, stops, strict=True))
    return Operand(operand.base, sizes, operand.strides, offset)


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


@every_rule
@every_dtype
@pytest.mark.parametrize("name", ["several_blocks", "seven_rows", "nonfinite", "empty_reduction"])
def test_each_gradient_alone_has_the_bits_of_all_together(
    name: str, dtype: str, relu_grad: str
) -> None:
    problem = build(BY_ID[name], dtype)
    output = forward(problem)
    together = backward(problem, output, relu_grad)
    choices = [(a,) for a in GRADIENTS] + [tuple(set(GRADIENTS) - {a}) for a in GRADIENTS]
    for wanted in choices:
        for gradient, got in backward(problem, output, relu_grad, wanted=wanted).items():
            assert_same_bits(got, together[gradient], f"{gradient} of {wanted}")
    assert backward(problem, output, relu_grad, wanted=()) == {}


@every_dtype
@pytest.mark.parametrize("mode", [FLUSH, ROUND_UP], ids=["flush_denormals", "round_up"])
@pytest.mark.parametrize("name", ["denormal", "denormal_row", "several_blocks"])
def test_bits_do_not_depend_on_the_floating_point_mode(name: str, mode: int, dtype: str) -> None:
    """Neither the caller's nor the workers', and every thread finds its own mode back."""
    problem = build(BY_ID[name], dtype)
    output = forward(problem)
    grads = backward(problem, output)
    if name != "several_blocks":
        assert (decode(output) > 0).any(), "the output was flushed"
    for order in ("serial", "threads"):
        lenders = [Lender(order, 2, mxcsr=mode) for _ in range(2)]
        with mxcsr(mode) as left:
            got_output: Array = forward(problem, lenders[0])
            got = backward(problem, output, lender=lenders[1])
        assert left() == mode, f"{order}: the caller's MXCSR was {mode:#x}, is {left():#x}"
        assert_same_bits(got_output, output, f"output, {order}")
        for gradient in GRADIENTS:
            assert_same_bits(got[gradient], grads[gradient], f"{gradient}, {order}")


@every_dtype
@every_case
def test_each_call_counts_once_for_the_kernel_that_find_kernel_names(
    case: LinearCase, dtype: str
) -> None:
    problem = build(case, dtype)
    before = _core.launches()
    output = forward(problem)
    between = _core.launches()
    backward(problem, output)
    after = _core.launches()
    for role, old, new in (("forward", before, between), ("backward", between, after)):
        ran = {name: new[name] - old[name] for name in new if new[name] != old[name]}
        assert ran == {kernel(f"linear_relu_{role}", dtype): 1}
