"""Every op of the core, through its C API: numbers, and what their bits may depend on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.arrays import Array, decode, encode
from tests.core_api import GRADIENTS, Lender, Output, backward, forward, kernel
from tests.core_cases import BY_ID, every_case, every_dtype, every_path, parametrize
from tests.mxcsr import FLUSH, ROUND_UP, mxcsr
from tests.problem import Case, build, numpy_results, reference64, relaid
from tests.rule import assert_same_bits, assert_within_twice
from twinfuse import _core

every_rule = pytest.mark.parametrize("relu_grad", ["select", "multiply"])


@every_dtype
@every_case
def test_results_within_twice_the_error_of_numpy(case: Case, layout: str, dtype: str) -> None:
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    # The two rules differ in special values only.
    rules = ("select",) if case.values == "normal" else ("select", "multiply")
    for relu_grad in rules:
        native, reference = (numpy_results(problem, relu_grad), reference64(problem, relu_grad))
        assert_within_twice(output, native.output, reference.output, "output", dtype=dtype)
        for name, ours in backward(problem, output, relu_grad, output_layout=layout).items():
            expected, what = getattr(reference, name), f"{name} ({relu_grad})"
            assert_within_twice(ours, getattr(native, name), expected, what, dtype=dtype)


@every_dtype
@every_case
def test_both_relu_rules_agree_on_finite_numbers(case: Case, layout: str, dtype: str) -> None:
    if case.values == "nonfinite":
        return
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    select, multiply = (
        backward(problem, output, rule, output_layout=layout) for rule in ("select", "multiply")
    )
    for name in GRADIENTS:
        # A masked gradient is +0 under one rule and may be -0 under the other.
        assert_same_bits(bits_of_zero(multiply[name]), bits_of_zero(select[name]), name)


def bits_of_zero(array: Array) -> Array:
    return np.where(decode(array) == 0, 0, array).astype(array.dtype)


@every_dtype
@every_case
def test_output_has_no_negative_zero_and_nothing_below(case: Case, layout: str, dtype: str) -> None:
    output = decode(forward(build(case, dtype), output_layout=layout))
    assert not np.signbit(output[~np.isnan(output)]).any()


@every_dtype
@parametrize(["linear_relu above_tile", "conv_relu three_by_three_stride", "conv_relu 1d"])
def test_gradient_follows_the_output_it_is_given(case: Case, layout: str, dtype: str) -> None:
    """The mask is that of `output`, not one computed again."""
    problem = build(case, dtype)
    opposite = np.where(decode(forward(problem)) > 0, 0.0, 1.0)
    native = numpy_results(problem, "select", opposite)
    reference = reference64(problem, "select", output=opposite)
    got = backward(problem, encode(opposite, dtype), output_layout=layout)
    for name, ours in got.items():
        expected = getattr(reference, name)
        assert_within_twice(ours, getattr(native, name), expected, name, dtype=dtype)


LAYOUTS = (
    "contiguous",
    "channels_last",
    "transposed",
    "strided",
    "misaligned",
    "channels_last misaligned",
    "padded",
    "channels_last padded",
    "channels_last strided",
)


def summed_by_channel(case: Case, layout: str) -> bool:
    """Whether a convolution whose output has this layout sums over the channels first."""
    strides = Output.poisoned(case.output_sizes, "float32", layout).operand.strides
    return case.op == "conv_relu" and strides[1] == 1


@every_dtype
@pytest.mark.parametrize("case", BY_ID.values(), ids=[name.replace(" ", "-") for name in BY_ID])
def test_bits_do_not_depend_on_layout(case: Case, dtype: str) -> None:
    """Every case against its contiguous copy; outputs in other layouts, too."""
    problem = build(case, dtype)
    first: dict[bool, dict[str, Array]] = {}
    # Gradients have the layout that the output had before.
    for layout, grad_layout in zip(LAYOUTS, (*LAYOUTS[1:], LAYOUTS[0]), strict=True):
        for variant in (problem, relaid(problem, layout)):
            output = forward(variant, output_layout=layout)
            grads = backward(variant, output, output_layout=layout, grad_layout=grad_layout)
            results = {"output": output, **grads}
            expected = first.setdefault(summed_by_channel(case, layout), results)
            for name, got in results.items():
                assert_same_bits(got, expected[name], f"{name}, {layout}, {grad_layout}")


def grown(case: Case) -> Case:
    """With so many images that a few threads get some to do."""
    if case.op == "linear_relu":
        return case
    products = np.prod(case.output_sizes, dtype=float) * case.terms[0]
    return dataclasses.replace(case, batch=case.batch * int(min(np.ceil(4e6 / products), 64)))


@every_dtype
@every_path
def test_bits_do_not_depend_on_order_or_threads(case: Case, layout: str, dtype: str) -> None:
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    grads = backward(problem, output, output_layout=layout)
    lenders = [Lender(order, 4, thread_work=1) for order in ("forward", "reversed", "random")]
    lenders += [Lender("threads", count, thread_work=1) for count in (1, 2, 3, 7, 16)]
    for lender in lenders:
        what = f"{lender.order}, {lender.num_threads} threads"
        assert_same_bits(forward(problem, lender, layout), output, f"output, {what}")
        got = backward(problem, output, lender=lender, output_layout=layout)
        for name in GRADIENTS:
            assert_same_bits(got[name], grads[name], f"{name}, {what}")


@every_dtype
@parametrize(["linear_relu batch_of_digits_network", "conv_relu several_blocks", "conv_relu stem"])
def test_large_problems_are_split(case: Case, layout: str, dtype: str) -> None:
    lender = Lender("forward", 2)
    problem = build(grown(case), dtype)
    output = forward(problem, lender, layout)
    assert lender.tasks >= 2, "the forward pass ran in one task"
    lender.tasks = 0
    backward(problem, output, lender=lender, output_layout=layout)
    assert lender.tasks >= 2, "the backward pass ran in one task"
    lender = Lender("forward", 2, thread_work=1 << 40)
    forward(problem, lender, layout)
    backward(problem, output, lender=lender, output_layout=layout)
    assert not lender.tasks, "a thread was woken for less work than the framework asks for"


@every_rule
@every_dtype
@parametrize(
    [
        *(f"linear_relu {name}" for name in ("several_blocks", "seven_rows", "nonfinite")),
        "linear_relu empty_reduction",
        *(f"conv_relu {name}" for name in ("several_blocks", "pointwise", "nonfinite")),
        *(f"conv_relu {name}" for name in ("many_pixels", "groups", "depthwise_twice")),
        "conv_relu empty_channels",
    ]
)
def test_each_gradient_alone_has_the_bits_of_all_together(
    case: Case, layout: str, dtype: str, relu_grad: str
) -> None:
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    together = backward(problem, output, relu_grad, output_layout=layout)
    choices = [(a,) for a in GRADIENTS] + [tuple(set(GRADIENTS) - {a}) for a in GRADIENTS]
    for wanted in choices:
        some = backward(problem, output, relu_grad, output_layout=layout, wanted=wanted)
        for gradient, got in some.items():
            assert_same_bits(got, together[gradient], f"{gradient} of {wanted}")
    assert backward(problem, output, relu_grad, output_layout=layout, wanted=()) == {}


@every_dtype
@pytest.mark.parametrize("mode", [FLUSH, ROUND_UP], ids=["flush_denormals", "round_up"])
@parametrize(
    [
        *(f"linear_relu {name}" for name in ("denormal", "denormal_row", "several_blocks")),
        *(f"conv_relu {name}" for name in ("denormal", "denormal_nhwc", "several_blocks")),
        "conv_relu depthwise",
    ]
)
def test_bits_do_not_depend_on_the_floating_point_mode(
    case: Case, layout: str, mode: int, dtype: str
) -> None:
    """Neither the caller's nor the workers', and every thread finds its own mode back."""
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    grads = backward(problem, output, output_layout=layout)
    if case.values == "denormal":
        assert (decode(output) > 0).any(), "the output was flushed"
    for order in ("serial", "threads"):
        lenders = [Lender(order, 2, mxcsr=mode) for _ in range(2)]
        with mxcsr(mode) as left:
            got_output: Array = forward(problem, lenders[0], layout)
            got = backward(problem, output, lender=lenders[1], output_layout=layout)
        assert left() == mode, f"{order}: the caller's MXCSR was {mode:#x}, is {left():#x}"
        assert_same_bits(got_output, output, f"output, {order}")
        for gradient in GRADIENTS:
            assert_same_bits(got[gradient], grads[gradient], f"{gradient}, {order}")


@every_dtype
@every_case
def test_each_call_counts_once_for_the_kernel_that_find_kernel_names(
    case: Case, layout: str, dtype: str
) -> None:
    problem = build(case, dtype)
    before = _core.launches()
    output = forward(problem, output_layout=layout)
    between = _core.launches()
    backward(problem, output, output_layout=layout)
    after = _core.launches()
    for role, old, new in (("forward", before, between), ("backward", between, after)):
        ran = {name: new[name] - old[name] for name in new if new[name] != old[name]}
        assert ran == {kernel(f"{case.op}_{role}", dtype): 1}
