"""Shapes, layouts and threads that nobody thought of, through the C API."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.arrays import DTYPES, ROUNDOFF, SMALLEST, decode
from tests.cases import LinearCase
from tests.conv_case import ConvCase
from tests.core_api import GRADIENTS, Lender, backward, forward, guarded_problem
from tests.problem import Case, Problem, build, reference64, relaid
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
image_layouts = st.sampled_from(
    [
        "contiguous",
        "channels_last",
        "channels_last padded",
        "channels_last misaligned",
        "hwio",
        "transposed",
        "strided",
        "misaligned",
        "broadcast_batch",
        "broadcast_rows",
        "overlapping",
    ]
)
image_outputs = st.sampled_from(
    [
        "contiguous",
        "contiguous misaligned",
        "channels_last",
        "channels_last misaligned",
        "channels_last padded",
    ]
)
written_layouts = st.sampled_from(
    ["contiguous", "transposed", "strided", "padded", "misaligned", "permuted"]
)


@st.composite
def linear_cases(draw: st.DrawFn) -> LinearCase:
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


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    spatial = draw(st.integers(1, 2))

    def each(numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
        return draw(st.tuples(*[numbers] * spatial))

    kernel, dilation = each(st.integers(1, 5)), each(st.sampled_from([1, 1, 2, 3]))
    # Images without any padding are read in another way.
    zeros = draw(st.sampled_from([st.just(0), st.integers(0, 3), st.integers(0, 9)]))
    padding = tuple(draw(st.tuples(zeros, zeros)) for _ in range(spatial))
    sizes = []
    for k, d, (low, high) in zip(kernel, dilation, padding, strict=True):
        # From images that are just large enough to windows that leave a remainder.
        least = max(d * (k - 1) + 1 - low - high, 1)
        sizes.append(least + draw(st.one_of(st.integers(0, 3), st.integers(0, 18))))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    channels = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 31, 33, 64, 65])))
    filters = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 31, 33, 64, 65])))
    return ConvCase(
        f"property_{draw(st.integers(0, 3))}",
        draw(st.integers(0, 4)),
        channels if groups == 1 else groups * (1 + channels % 5),
        tuple(sizes),
        filters if groups == 1 else groups * (1 + filters % 5),
        kernel,
        each(st.sampled_from([1, 1, 2, 2, 3, 5])),
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(image_layouts),
        draw(image_layouts),
        draw(image_layouts),
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


threads = {
    "order": st.sampled_from(["serial", "reversed", "random", "threads"]),
    "threads": st.integers(1, 9),
}


@EXAMPLES
@given(
    case=linear_cases(),
    dtype=st.sampled_from(DTYPES),
    relu_grad=st.sampled_from(["select", "multiply"]),
    layout=written_layouts,
    **threads,
)
def test_any_shape_and_layout(
    case: LinearCase, dtype: str, relu_grad: str, layout: str, order: str, threads: int
) -> None:
    _check(case, dtype, relu_grad, layout, "contiguous", Lender(order, threads))


@settings(EXAMPLES, max_examples=400)
@given(
    case=conv_cases(),
    dtype=st.sampled_from(DTYPES),
    relu_grad=st.sampled_from(["select", "multiply"]),
    layout=image_outputs,
    **threads,
)
def test_any_convolution(
    case: ConvCase, dtype: str, relu_grad: str, layout: str, order: str, threads: int
) -> None:
    _check(case, dtype, relu_grad, layout, layout.split()[0], Lender(order, threads))


def _check(
    case: Case, dtype: str, relu_grad: str, layout: str, plain_layout: str, lender: Lender
) -> None:
    """Numbers within the bound, and the bits of `plain_layout` on one thread.

    An access beyond the end of what is read (or before its start) ends the process.
    """
    problem = guarded_problem(build(case, dtype), at_end=case.id != "property_0")
    output = forward(problem, lender, layout)
    grads = backward(problem, output, relu_grad, lender, layout)
    _check_numbers(problem, relu_grad, output, grads)
    plain = relaid(problem, "contiguous")
    again = forward(plain, output_layout=plain_layout)
    assert_same_bits(again, output, "output of contiguous copies")
    again_grads = backward(plain, output, relu_grad, output_layout=plain_layout)
    for name, got in again_grads.items():
        assert_same_bits(got, grads[name], f"{name} of contiguous copies")


def _check_numbers(
    problem: Problem, relu_grad: str, output: np.ndarray, grads: dict[str, np.ndarray]
) -> None:
    case, dtype = problem.case, problem.dtype
    exact = reference64(problem, relu_grad, output=output)
    x, w, g = (np.abs(a.values) for a in (problem.input, problem.weight, problem.grad_output))
    bias = None if problem.bias is None else np.abs(problem.bias.values)
    into_output, into_input, into_weight = case.terms
    magnitude = case.pre_activation(x, w, bias)
    assert_within_bound(output, exact.output, magnitude, into_output + 1, dtype, "output")
    magnitudes = case.gradients(np.where(decode(output) > 0, g, 0), x, w)
    for name, magnitude, terms in zip(
        GRADIENTS, magnitudes, (into_input, into_weight, into_weight), strict=True
    ):
        expected = getattr(exact, name)
        assert_within_bound(grads[name], expected, magnitude, terms, dtype, name)
