"""Conv+ReLU of the core, through its C API: what a convolution has in common with others."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from tests.arrays import Array, Operand, decode, encode, lay_out, part
from tests.cases import LinearCase
from tests.conv_case import ConvCase
from tests.conv_cases import CASES
from tests.core_api import backward, forward, load
from tests.core_cases import every_dtype, output_layouts
from tests.problem import Problem, build, relaid
from tests.rule import assert_same_bits

BY_ID = {case.id: case for case in CASES}
every_layout = pytest.mark.parametrize("layout", output_layouts(CASES[0]))
finite = [case for case in CASES if case.values != "nonfinite" and 0 not in case.output_sizes]


def in_tiles(case: ConvCase) -> bool:
    """Whether gradients of inputs may be made in tiles of two by two, in float32."""
    whole = case.stride == case.dilation and case.groups == 1
    return case.kernel == (3, 3) and whole and min(case.channels, case.filters) >= 16


def compared(problem: Problem, layout: str, output: Array | None = None) -> dict[str, Array]:
    output = forward(problem, output_layout=layout) if output is None else output
    return {"output": output, **backward(problem, output, output_layout=layout)}


@every_dtype
@every_layout
@pytest.mark.parametrize("case", finite, ids=lambda case: case.id)
def test_padding_is_zeros_in_the_input(case: ConvCase, layout: str, dtype: str) -> None:
    """The same bits as without padding, of an image that has the zeros in it.

    But those of the input's gradient where they hang on where in the image tiles begin.
    """
    problem = build(case, dtype)
    around = ((0, 0), (0, 0), *case.padding)
    image = np.pad(problem.input.values, around)
    within = dataclasses.replace(
        case, size=image.shape[2:], padding=tuple((0, 0) for _ in case.size)
    )
    other = dataclasses.replace(problem, case=within, input=lay_out(image, "contiguous", dtype))
    ours, theirs = compared(problem, layout), compared(other, layout)
    inside = tuple(
        slice(low, low + size) for (low, _), size in zip(around, case.input_sizes, strict=True)
    )
    theirs["grad_input"] = theirs["grad_input"][inside]
    if dtype == "float32" and in_tiles(case):
        ours.pop("grad_input")
    for name, got in ours.items():
        assert_same_bits(got, theirs[name], name)


@every_dtype
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_of_infinities_leaves_the_others_alone(
    layout: str, value: float, dtype: str
) -> None:
    """The bits of the other images are those of a batch without it."""
    problem = build(dataclasses.replace(BY_ID["tiles"], batch=3), dtype)
    values = problem.input.values.copy()
    expected = forward(problem, output_layout=layout)
    values[1, 3, 2, 4] = value
    values[1, 4, 2, 4] = -value
    other = dataclasses.replace(problem, input=lay_out(values, layout, dtype))
    got = forward(other, output_layout=layout)
    for image in (0, 2):
        assert_same_bits(got[image], expected[image], f"image {image}")
    away = (slice(None), slice(0, 1))  # no window of the first row meets the infinities
    assert np.isfinite(decode(got[1])[away]).all()


@every_dtype
@every_layout
@pytest.mark.parametrize("case", [c for c in CASES if len(c.size) == 1], ids=lambda c: c.id)
def test_one_dimension_is_two_with_a_height_of_one(case: ConvCase, layout: str, dtype: str) -> None:
    def with_height(operand: Operand) -> Operand:
        sizes, strides = list(operand.sizes), list(operand.strides)
        sizes.insert(2, 1)
        strides.insert(2, 1 << 40)
        return Operand(operand.base, tuple(sizes), tuple(strides), operand.offset)

    problem = build(case, dtype)
    flat = dataclasses.replace(
        problem,
        case=dataclasses.replace(
            case,
            size=(1, *case.size),
            kernel=(1, *case.kernel),
            stride=(3, *case.stride),
            padding=((0, 0), *case.padding),
            dilation=(5, *case.dilation),
        ),
        input=with_height(problem.input),
        weight=with_height(problem.weight),
        grad_output=with_height(problem.grad_output),
    )
    ours, theirs = compared(problem, layout), compared(flat, layout)
    for name, got in ours.items():
        assert_same_bits(got, theirs[name].reshape(got.shape), name)


POINTWISE = [
    case
    for case in finite
    if {*case.kernel, *case.stride, case.groups} == {1} and not any(map(any, case.padding))
]


@every_dtype
@every_layout
@pytest.mark.parametrize("case", POINTWISE, ids=lambda case: case.id)
def test_a_kernel_of_one_pixel_is_linear_relu(case: ConvCase, layout: str, dtype: str) -> None:
    def rows(array: Array) -> Array:
        return np.moveaxis(array, 1, -1)

    problem = build(case, dtype)
    leading = (case.batch, *case.size)
    linear = Problem(
        LinearCase(case.id, leading, case.channels, case.filters, case.bias),
        dtype,
        lay_out(rows(problem.input.values), "contiguous", dtype),
        lay_out(problem.weight.values.reshape(case.filters, -1), "contiguous", dtype),
        problem.bias,
        lay_out(rows(problem.grad_output.values), "contiguous", dtype),
    )
    ours, output = compared(problem, layout), forward(linear)
    assert_same_bits(rows(ours["output"]), output, "output")
    theirs = backward(linear, output)
    assert_same_bits(rows(ours["grad_input"]), theirs["grad_input"], "grad_input")


PARTS = [
    BY_ID[name]
    for name in (
        "pointwise_stride",
        "stem",
        "three_by_three",
        "border",
        "border_of_small_image",
        "three_columns_nhwc",
        "several_blocks_of_pixels",
        "stride_beyond_kernel",
        "dilation_and_stride",
        "uneven_padding",
        "groups",
        "depthwise_twice",
        "1d_causal_dilation",
        "input_transposed",
    )
]


@every_dtype
@every_layout
@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.id)
def test_bits_of_an_image_do_not_depend_on_its_batch(
    case: ConvCase, layout: str, dtype: str
) -> None:
    problem = build(case, dtype)
    together = compared(problem, layout)
    for image in range(case.batch):
        first = (image, *(0 for _ in range(len(case.size) + 1)))
        alone = dataclasses.replace(
            problem,
            case=dataclasses.replace(case, batch=1),
            input=part(problem.input, (image + 1, *case.input_sizes[1:]), first),
            grad_output=part(problem.grad_output, (image + 1, *case.output_sizes[1:]), first),
        )
        got = compared(alone, layout)
        for name in ("output", "grad_input"):
            assert_same_bits(got[name][0], together[name][image], f"{name} of image {image}")


@every_dtype
@every_layout
@pytest.mark.parametrize(
    "name", ["groups", "groups_nhwc", "pointwise_groups", "depthwise_twice", "1d_groups"]
)
def test_groups_are_convolutions_side_by_side(name: str, layout: str, dtype: str) -> None:
    case = BY_ID[name]
    problem = build(case, dtype)
    assert problem.bias is not None
    together = compared(problem, layout)
    channels, filters = case.channels // case.groups, case.filters // case.groups
    for group in range(case.groups):

        def of(operand: Operand, dim: int, count: int, group: int = group) -> Operand:
            starts, stops = [0] * len(operand.sizes), list(operand.sizes)
            starts[dim], stops[dim] = group * count, (group + 1) * count
            return part(operand, tuple(stops), tuple(starts))

        alone = Problem(
            dataclasses.replace(case, channels=channels, filters=filters, groups=1),
            dtype,
            of(problem.input, 1, channels),
            of(problem.weight, 0, filters),
            of(problem.bias, 0, filters),
            of(problem.grad_output, 1, filters),
        )
        got = compared(alone, layout)
        seen = slice(group * channels, (group + 1) * channels)
        made = slice(group * filters, (group + 1) * filters)
        assert_same_bits(got["output"], together["output"][:, made], "output")
        assert_same_bits(got["grad_input"], together["grad_input"][:, seen], "grad_input")
        assert_same_bits(got["grad_bias"], together["grad_bias"][made], "grad_bias")


@every_dtype
def test_minus_zero_becomes_zero(dtype: str) -> None:
    """Products that underflow from below, and a bias of -0: the sum is -0, which is not > 0."""
    tiny = {"float64": 1e-300, "float16": 1e-7}.get(dtype, 1e-29)
    case = dataclasses.replace(BY_ID["three_by_three"], channels=1)
    problem = Problem(
        case,
        dtype,
        lay_out(np.full(case.input_sizes, tiny), "contiguous", dtype),
        lay_out(np.full(case.weight_sizes, -tiny), "contiguous", dtype),
        lay_out(np.full(case.filters, -0.0), "contiguous", dtype),
        lay_out(np.ones(case.output_sizes), "contiguous", dtype),
    )
    assert_same_bits(forward(problem), encode(np.zeros(case.output_sizes), dtype), "output")


@every_dtype
@every_layout
def test_no_channels_give_relu_of_bias(layout: str, dtype: str) -> None:
    problem = build(BY_ID["empty_channels"], dtype)
    assert problem.bias is not None
    bias = problem.bias.values[:, None, None]
    sizes = problem.case.output_sizes
    expected = encode(np.broadcast_to(np.where(bias <= 0, 0, bias), sizes), dtype)
    assert_same_bits(forward(problem, output_layout=layout), expected, "output")
    problem = build(BY_ID["empty_channels_no_bias"], dtype)
    expected = encode(np.zeros(problem.case.output_sizes), dtype)
    assert_same_bits(forward(problem, output_layout=layout), expected, "output without bias")


@every_dtype
@pytest.mark.parametrize("name", ["empty_batch", "empty_1d_batch"])
def test_gradients_of_an_empty_batch_are_zero(name: str, dtype: str) -> None:
    case = BY_ID[name]
    problem = build(case, dtype)
    grads = backward(problem, forward(problem))
    zeros = {"grad_weight": case.weight_sizes, "grad_bias": (case.filters,)}
    for gradient, sizes in zeros.items():
        assert_same_bits(grads[gradient], encode(np.zeros(sizes), dtype), gradient)


@every_dtype
def test_gradients_of_no_filters_are_zero(dtype: str) -> None:
    case = BY_ID["empty_filters"]
    problem = build(case, dtype)
    grad_input = backward(problem, forward(problem))["grad_input"]
    assert_same_bits(grad_input, encode(np.zeros(case.input_sizes), dtype), "grad_input")


@every_dtype
@every_layout
@pytest.mark.parametrize(
    "name",
    ["stride_beyond_kernel", "stride_beyond_image", "stride_remainder", "pointwise_stride_nhwc"],
)
def test_pixels_that_no_window_touches_get_no_gradient(name: str, layout: str, dtype: str) -> None:
    """Plus zero, in memory that was NaN; the others get one."""
    case = BY_ID[name]
    problem = relaid(build(case, dtype), layout)
    seen = case.gradients(
        np.ones(case.output_sizes), np.ones(case.input_sizes), np.ones(case.weight_sizes)
    )[0]
    assert (seen == 0).any() and (seen > 0).any()
    output = forward(problem, output_layout=layout)
    got = decode(backward(problem, output, output_layout=layout)["grad_input"])
    assert (got[seen == 0] == 0).all() and not np.signbit(got[seen == 0]).any()
    assert (got[seen > 0] != 0).mean() > 0.5


def test_output_size() -> None:
    size_of = load().twinfuse_conv_output_size
    some = (range(6), range(1, 5), (1, 2, 3, 7), (1, 2, 5), (0, 3), (0, 1))
    for arguments in itertools.product(*some):
        size, kernel, stride, dilation, low, high = arguments
        firsts = range(-low, size + high - dilation * (kernel - 1), stride)
        assert max(size_of(*arguments), 0) == len(firsts), arguments


HUGE = 2**63 - 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((HUGE, 1, 1, 1, 0, 0), HUGE),
        ((HUGE, HUGE, 1, 1, 0, 0), 1),
        ((HUGE, 1, HUGE, 1, HUGE, HUGE), 3),
        ((HUGE, 3, 1, HUGE, HUGE, 0), 0),
        ((HUGE, 3, 1, HUGE, HUGE, HUGE), HUGE),
        ((1, HUGE, 1, HUGE, 0, 0), 0),
        ((HUGE, 2, 2, 1, HUGE, HUGE), 0),  # more than 63 bits count: as if nothing fitted
        ((-HUGE, 1, 1, 1, 0, 0), 0),
        ((5, 3, 0, 1, 0, 0), 0),
    ],
)
def test_output_size_of_huge_numbers(arguments: tuple[int, ...], expected: int) -> None:
    assert max(load().twinfuse_conv_output_size(*arguments), 0) == expected
