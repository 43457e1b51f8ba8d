"""Parameters and sizes of convolutions that the core must refuse, or take without harm."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.core_api import (
    INVALID_ARGUMENT,
    OK,
    OUT_OF_MEMORY,
    UNSUPPORTED,
    CConv,
    Lender,
    last_error,
    load,
    settings,
    tensor,
)
from tests.test_core_errors import CONV1D, CONV2D, Op, call, dense, ids, refused

every_conv = pytest.mark.parametrize("op", [*CONV1D, *CONV2D], ids=ids)
HUGE = 2**63 - 1


def changed(op: Op, field: str, value: int, dimension: int | None = None) -> list[CConv]:
    (conv,) = settings(op.case)
    if dimension is None:
        setattr(conv, field, value)
    else:
        getattr(conv, field)[dimension] = value
    return [conv]


@every_conv
def test_missing_parameters(op: Op) -> None:
    refused(op, {}, "conv: expected .*, got (NULL|none|nothing|0)", settings=[None])


@pytest.mark.parametrize(
    ("field", "name", "wrong"),
    [
        ("stride", "stride", (0, -1, -HUGE - 1)),
        ("dilation", "dilation", (0, -1, -HUGE - 1)),
        ("padding_low", "padding", (-1, -HUGE - 1)),
        ("padding_high", "padding", (-1, -HUGE - 1)),
    ],
)
@every_conv
def test_wrong_parameters(op: Op, field: str, name: str, wrong: tuple[int, ...]) -> None:
    for dimension in range(len(op.case.size)):
        for value in wrong:
            given = changed(op, field, value, dimension)
            refused(op, {}, rf"{name}: expected [01] or more, got {value}$", settings=given)


@pytest.mark.parametrize("groups", [0, -1, -2, -HUGE - 1])
@every_conv
def test_wrong_groups(op: Op, groups: int) -> None:
    given = changed(op, "groups", groups)
    refused(op, {}, rf"groups: expected 1 or more, got {groups}$", settings=given)


@pytest.mark.parametrize("groups", [1, 3, 4, 6, 12, 1 << 62, HUGE])
@every_conv
def test_groups_that_do_not_fit_the_channels(op: Op, groups: int) -> None:
    """4 input channels and 6 filters, 2 input channels to a filter: only 2 groups fit."""
    refused(op, {}, r"\w+: expected .*, got ", settings=changed(op, "groups", groups))


@pytest.mark.parametrize(
    ("field", "value"), [("stride", 2), ("dilation", 2), ("padding_low", 3), ("padding_high", 0)]
)
@every_conv
def test_parameters_of_another_output(op: Op, field: str, value: int) -> None:
    given = changed(op, field, value, 0)
    refused(op, {}, r"(grad_)?output: expected \[.*\], got \[.*\]", settings=given)


@every_conv
def test_a_kernel_larger_than_the_padded_image(op: Op) -> None:
    given = changed(op, "dilation", 100, 0)
    refused(op, {}, r"(grad_)?weight: expected .*padded input.*, got ", settings=given)


@pytest.mark.parametrize(
    ("op", "name", "sizes", "expected"),
    [
        (CONV2D[0], "input", (1, 2, 4, 7, 9), r"\[N, C, H, W\]"),
        (CONV2D[0], "weight", (6, 2, 3), r"\[K, C / groups, R, S\]"),
        (CONV1D[0], "input", (2, 4), r"\[N, C, (H, )?W\]"),
        (CONV1D[0], "weight", (6, 2, 3, 1), r"\[K, C / groups, S\]"),
        (CONV2D[1], "grad_output", (1, 2, 6, 7, 8), r"\[N, K, P, Q\]"),
        (CONV2D[1], "input", (2, 4, 7), r"\[N, C, H, W\]"),
    ],
)
def test_text_of_a_wrong_rank_shows_the_shape(
    op: Op, name: str, sizes: tuple[int, ...], expected: str
) -> None:
    assert call(op, {name: dense(sizes)}) == INVALID_ARGUMENT
    shape = re.escape(str(list(sizes)))
    assert re.search(rf"_relu: {name}: expected {expected}, got {shape}$", last_error()), (
        last_error()
    )


@pytest.mark.parametrize("op", [*CONV1D, *CONV2D], ids=ids)
def test_a_kernel_of_no_taps(op: Op) -> None:
    sizes = (*op.case.weight_sizes[:-1], 0)
    refused(
        op,
        {name: dense(sizes) for name in op.names if name.endswith("weight")},
        r"(grad_)?weight: expected .*, got 0",
    )


SOME = np.ones(1 << 12, np.float64)


def convolve(
    sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None,
    backward: bool = False,
    **fields: Any,
) -> int:
    """A call with huge views of little memory; sizes and strides of output, input and weight."""
    strides = strides or tuple((0,) * len(s) for s in sizes)
    output, input, weight = (
        tensor(SOME.ctypes.data, "float32", *pair) for pair in zip(sizes, strides, strict=True)
    )
    conv = CConv((1, 1), (1, 1), (0, 0), (0, 0), 1)
    for field, value in fields.items():
        setattr(conv, field, value)
    context = Lender("forward", 2).context()
    if not backward:
        return load().twinfuse_conv_relu_forward(output, input, weight, None, conv, context)
    function = load().twinfuse_conv_relu_backward
    return function(input, weight, None, output, output, input, weight, conv, 0, context)


both_ways = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
BIG, HALF = 1 << 40, 1 << 62


@both_ways
@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        # Channels of all groups, and products of sizes, pass 63 bits.
        (((1, HALF, 1, 1), (1, 4, 1, 1), (HALF, 4, 1, 1)), {"groups": HALF}),
        (((1, 4, 1, 1), (1, 4, 1, 1), (4, HALF, 1, 1)), {"groups": 4}),
        (((BIG, BIG, 1, 1), (BIG, 1, 1, 1), (BIG, 1, 1, 1)), {}),
        (((1, 1, BIG, BIG), (1, 1, BIG, BIG), (1, 1, 1, 1)), {}),
        (((1, 1, 1, 1), (1, BIG, BIG, 1), (1, BIG, BIG, 1)), {}),
        (((BIG, BIG, 1), (BIG, 1, 1), (BIG, 1, 1)), {}),
    ],
    ids=["groups", "channels", "batch_filters", "pixels", "window", "1d"],
)
def test_products_beyond_63_bits(
    sizes: tuple[tuple[int, ...], ...], fields: dict[str, Any], backward: bool
) -> None:
    assert convolve(sizes, backward=backward, **fields) in (INVALID_ARGUMENT, UNSUPPORTED)
    assert re.search(r"^conv\dd_relu: .+", last_error()), last_error()


@both_ways
@pytest.mark.parametrize(
    ("sizes", "strides", "fields"),
    [
        # Padding that no image has: output 3, 2 or 1 pixels apart by more than all memory.
        (((1, 1, 1, 3), (1, 1, 1, 2), (1, 1, 1, 1)), ((0, 0, 0, 1), (0, 0, 0, 1), (0,) * 4),
         {"stride": (1, HUGE), "padding_low": (0, HUGE), "padding_high": (0, HUGE)}),
        (((1, 1, 1, 3), (1, 1, 1, 2), (1, 1, 1, 1)), ((0, 0, 0, 1), (0, 0, 0, HALF), (0,) * 4),
         {"stride": (1, HUGE), "padding_low": (0, HUGE), "padding_high": (0, HUGE)}),
        (((1, 1, 1, 3), (1, 1, 1, 2), (1, 1, 1, 1)), ((0, 0, 0, 1), (0, 0, 0, -HUGE - 1), (0,) * 4),
         {"stride": (1, HUGE), "padding_low": (0, HUGE), "padding_high": (0, HUGE)}),
        (((1, 1, 3, 1), (1, 1, 2, 1), (1, 1, 1, 1)), ((0, 0, 1, 0), (0, 0, HALF, 0), (0,) * 4),
         {"stride": (HUGE, 1), "padding_low": (HUGE, 0), "padding_high": (HUGE, 0)}),
        (((1, 1, 1), (1, 1, 3), (1, 1, 3)), ((0, 0, 1), (0, 0, HALF), (0, 0, HALF)),
         {"dilation": (HUGE, 1), "padding_low": (HUGE, 0), "padding_high": (HUGE - 2, 0)}),
        (((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 3, 3)), ((0,) * 4, (0,) * 4, (0, 0, 3, 1)),
         {"dilation": (HUGE // 2, HUGE // 2), "padding_low": (HUGE // 2,) * 2,
          "padding_high": (HUGE // 2,) * 2}),
    ],
    ids=["padding", "far", "far_back", "rows", "1d_dilation", "dilation"],
)  # fmt: skip
def test_steps_beyond_all_memory_are_not_taken(
    sizes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    fields: dict[str, Any],
    backward: bool,
) -> None:
    """The sizes fit together, so the call is right; no kernel need serve it."""
    assert convolve(sizes, strides, backward, **fields) == UNSUPPORTED, last_error()
    assert re.search(r"^conv\dd_relu: .*large", last_error()), last_error()


@pytest.mark.parametrize(
    "sizes",
    [
        ((1 << 33, 0, 1, 1), (1 << 33, 3, 1, 1), (0, 3, 1, 1)),
        ((0, 5, 1 << 20, 1 << 20), (0, 3, 1 << 20, 1 << 20), (5, 3, 1, 1)),
        ((0, 5, 1, 1), (0, 1 << 33, 1, 1), (5, 1 << 33, 1, 1)),
        ((0, 1 << 33, 1, 1), (0, 3, 1, 1), (1 << 33, 3, 1, 1)),
        ((0, 5, HUGE), (0, 3, HUGE), (5, 3, 1)),
        ((1 << 30, 0, 1 << 20, 1 << 11), (1 << 30, 2, 1 << 20, 1 << 11), (0, 2, 1, 1)),
    ],
    ids=["batch", "pixels", "channels", "filters", "1d", "all"],
)
def test_huge_sizes_of_an_empty_output(sizes: tuple[tuple[int, ...], ...]) -> None:
    """Of nothing, there is nothing to do: at once, and without memory."""
    assert convolve(sizes) in (OK, UNSUPPORTED, OUT_OF_MEMORY), last_error()


@pytest.mark.parametrize("size", [1 << 31, (1 << 31) + 1, 1 << 33])
def test_an_image_of_more_than_31_bits(size: int) -> None:
    """All pixels are one in memory, and the stride leaves few of them: numbers, not counters."""
    case = ((1, 1, 3), (1, 1, size), (1, 1, 2))
    out = np.full(3, np.nan, np.float32)
    image, weight = np.full(1, 2, np.float32), np.array([3, 4], np.float32)
    step = (size - 2) // 2
    arguments = (
        tensor(array.ctypes.data, "float32", sizes, strides)
        for array, sizes, strides in zip(
            (out, image, weight), case, ((0, 0, 1), (0, 0, 0), (0, 0, 1)), strict=True
        )
    )
    conv = CConv((step, 1), (1, 1), (0, 0), (0, 0), 1)
    context = Lender("forward", 2).context()
    status = load().twinfuse_conv_relu_forward(*arguments, None, conv, context)
    assert status == OK, last_error()
    np.testing.assert_array_equal(out, 14)
