"""The Triton kernels of Conv+ReLU over the case table, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.arrays import lay_out
from tests.conv_cases import CASES, NHWC, ConvCase
from tests.conv_cases import _case as make
from tests.gpu import boxes, launcher, windows
from tests.gpu.operands import operands, result
from tests.problem import Problem, Results, build, reference64, relaid
from tests.torch_cases import compare, conv_calls

# The interpreter takes minutes over many pixels or groups. Torch has no result without channels or
# filters.
MOST_PIXELS, MOST_GROUPS = 600, 6
INTERPRETED = [
    case
    for case in CASES
    if case.channels
    and case.filters
    and case.batch * np.prod(case.output_size) <= MOST_PIXELS
    and case.groups <= MOST_GROUPS
]
BY_ID = {case.id: case for case in INTERPRETED}
LAYOUTS = [
    "pointwise_stride",
    "stem_valid",
    "three_by_three_stride_nhwc",
    "stride_beyond_kernel_nhwc",
    "dilation_and_stride",
    "uneven_padding",
    "groups",
    "1d_causal_dilation",
    "weight_hwio",
]
every_case = pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
some_cases = pytest.mark.parametrize(
    "case", [BY_ID[name] for name in LAYOUTS], ids=lambda case: case.id
)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16"])


class Geometry:
    """A case in two spatial dimensions."""

    def __init__(self, case: ConvCase) -> None:
        flat = len(case.size) == 1
        self.stride, self.dilation = ((1, *t) if flat else t for t in (case.stride, case.dilation))
        self.padding = ((0, 0), *case.padding) if flat else case.padding


def images(t: Tensor) -> Tensor:
    return t.unsqueeze(2) if t.dim() == 3 else t


def poisoned(sizes: Any, dtype: torch.dtype, channels_last: bool) -> Tensor:
    t = torch.full(tuple(sizes), torch.nan, dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """The same values with the strides of another tensor."""
    return torch.empty_like(like).copy_(t) if t.stride() != like.stride() else t


def compute(
    problem: Problem,
    access: str,
    *,
    splits: int = 1,
    flat: bool = False,
    largest: bool = False,
    multiplies: bool = False,
    plain: bool = False,
    box: boxes.Box | None = None,
) -> Results:
    """All results by the kernels. `access`: "elements", "vectors" or "tensors". `plain`: the
    gradient is masked once, before the products, as only descriptors are read."""
    case, geometry = problem.case, Geometry(problem.case)
    x, w, b, g = operands(problem, images)
    last = access != "elements"
    kernels: Any = boxes if access == "tensors" else windows
    options: dict[str, Any] = {"largest": largest, "multiplies": multiplies}
    of_products: dict[str, Any] = {"box": box}
    forward: dict[str, Any] = {"forward": True}
    if kernels is windows:
        options["access"] = access
        of_products, forward = {}, {"flat": flat}
    groups = case.groups
    k, c = w.shape[0] // groups, w.shape[1]
    rows, columns = (
        windows.forward_windows(*numbers)
        for numbers in zip(
            g.shape[2:],
            w.shape[2:],
            geometry.stride,
            (low for low, _ in geometry.padding),
            geometry.dilation,
            strict=True,
        )
    )
    output = poisoned(g.shape, x.dtype, last)
    grad_input = poisoned(x.shape, x.dtype, last)
    grad_weight = torch.full(w.shape, torch.nan, dtype=x.dtype)
    grad_bias = torch.full((w.shape[0],), torch.nan, dtype=x.dtype)

    def group(t: Tensor, size: int, index: int) -> Tensor:
        return t[:, index * size : (index + 1) * size]

    for i in range(groups):
        filters = w[i * k : (i + 1) * k]
        bias = None if b is None else b[i * k : (i + 1) * k]
        out = group(output, k, i)
        chosen = options | of_products | forward
        kernels.product(group(x, c, i), filters, out, rows, columns, bias=bias, **chosen)
    g = laid_out(g, output)
    grad, mask = (t.flatten(2).transpose(1, 2) for t in (g, output))
    masked = launcher.mask_gradient(grad, mask, write=plain, sums=grad_bias, multiplies=multiplies)
    if masked is not None:
        g = masked.view(len(g), *g.shape[2:], -1).permute(0, 3, 1, 2)
    for i in range(groups):
        filters, grad, out = w[i * k : (i + 1) * k], group(g, k, i), group(output, k, i)
        out = None if plain else out
        to = group(grad_input, c, i)
        phases = windows.grad_input_phases(tuple(x.shape[2:]), tuple(w.shape[2:]), geometry)
        for (y0, x0), r, s in phases:
            part = to[:, :, y0 :: geometry.stride[0], x0 :: geometry.stride[1]]
            turned = filters.transpose(0, 1)
            kernels.product(grad, turned, part, r, s, mask=out, **options | of_products)
        kernels.grad_weight(
            group(x, c, i),
            grad,
            out,
            grad_weight[i * k : (i + 1) * k],
            rows,
            columns,
            splits=splits,
            **options,
        )

    return Results(
        result(problem, output, case.output_sizes),
        result(problem, grad_input, case.input_sizes),
        result(problem, grad_weight, case.weight_sizes),
        result(problem, grad_bias, (case.filters,)),
    )


def check(problem: Problem, access: str, **options: Any) -> None:
    compare(problem, compute(problem, access, **options), conv_calls(problem.case)[1])


@every_dtype
@every_case
def test_case(case: ConvCase, dtype: str) -> None:
    check(build(case, dtype), "elements")


@some_cases
def test_bfloat16(case: ConvCase) -> None:
    check(build(case, "bfloat16"), "elements")


@every_dtype
@pytest.mark.parametrize("weight_layout", ["channels_last", "hwio"])
@some_cases
def test_channels_last(case: ConvCase, weight_layout: str, dtype: str) -> None:
    layout = "channels_last"
    problem = relaid(build(case, dtype), layout)
    if weight_layout != layout:
        problem = replace(problem, weight=lay_out(problem.weight.values, weight_layout, dtype))
    launcher.launched.clear()
    check(problem, "vectors", splits=2)
    operands = {tuple(name.split("-")[:2]) for name in launcher.launched}
    weights = ("weight_depth", "weight_lines")
    forward = weights[weight_layout == "hwio"] if case.channels > case.groups else weights[0]
    assert ("windows", forward) in operands
    assert ("lines_masked", "taps") in operands


# Descriptors need channels of whole 16 bytes.
BOXED = (
    BY_ID["three_by_three_stride_nhwc"],
    BY_ID["groups_of_vectors"],
    make("boxes", (3, 24, 9, 8), 40, 3, padding=1, **NHWC),
    make("boxes_no_bias", (5, 136, 7, 7), 72, 1, bias=False, **NHWC),
    make("boxes_valid", (2, 72, 6, 11), 16, (2, 3), **NHWC),
    make("boxes_rectangles", (2, 8, 9, 13), 24, (1, 5), (3, 1), (0, 3), (2, 2), **NHWC),
    make("boxes_dilation_and_stride", (2, 8, 13, 12), 16, 3, 2, padding=3, dilation=3, **NHWC),
    make("boxes_stride_beyond_kernel", (2, 8, 11, 13), 16, 2, stride=3, **NHWC),
    make("boxes_of_one_row", (2, 64, 33), 40, 3, padding=((2, 0),), **NHWC),
    make("boxes_integers", (2, 8, 6, 6), 16, 3, 2, padding=1, values="integers", **NHWC),
    make("boxes_nonfinite", (2, 8, 8, 9), 16, 3, padding=1, values="nonfinite", **NHWC),
)


@every_dtype
@pytest.mark.parametrize("plain", [False, True], ids=["masked", "plain"])
@pytest.mark.parametrize("weight_layout", ["channels_last", "hwio"])
@pytest.mark.parametrize("case", BOXED, ids=lambda case: case.id)
def test_descriptors(case: ConvCase, weight_layout: str, plain: bool, dtype: str) -> None:
    problem = relaid(build(case, dtype), "channels_last")
    if weight_layout == "hwio":
        problem = replace(problem, weight=lay_out(problem.weight.values, weight_layout, dtype))
    launcher.launched.clear()
    check(problem, "tensors", splits=2, plain=plain)
    products = [name for name in launcher.launched if name[:4] not in ("comb", "mask")]
    assert all(name.startswith("tensor_") for name in products)
    weights = {name.split("-")[1] for name in products} - {"tensor_taps"}
    assert weights == {"tensor_weight_depth", "tensor_weight_lines"}


@pytest.mark.parametrize(
    "box", [(128, 1, 1), (1, 128, 1), (1, 1, 128), (2, 8, 8), (16, 4, 2)], ids=str
)
def test_boxes(box: tuple[int, int, int]) -> None:
    """Of any shape, and beyond every end of the output."""
    check(relaid(build(BOXED[0], "float32"), "channels_last"), "tensors", box=boxes.Box(*box))


def test_large_tiles_of_boxes() -> None:
    launcher.launched.clear()
    problem = relaid(build(BOXED[0], "float16"), "channels_last")
    check(problem, "tensors", largest=True, plain=True)
    names = [name for name in launcher.launched if name.startswith("tensor_windows")]
    assert names and all("256x128" in name for name in names)


@pytest.mark.parametrize("name", ["stem_valid", "uneven_padding", "1d_causal_dilation"])
def test_few_channels(name: str) -> None:
    """A step of the reduced dimension takes several taps."""
    check(build(BY_ID[name], "float32"), "elements", flat=True)


@pytest.mark.parametrize("name", ["three_by_three_stride_nhwc", "uneven_padding"])
def test_large_tiles(name: str) -> None:
    launcher.launched.clear()
    check(relaid(build(BY_ID[name], "float32"), "channels_last"), "vectors", largest=True)
    assert all("128x" in name for name in launcher.launched if name.startswith("windows"))


@pytest.mark.parametrize("plain", [False, True], ids=["masked", "plain"])
def test_rule_of_tensorflow_by_descriptors(plain: bool) -> None:
    problem = relaid(build(BOXED[-1], "float32"), "channels_last")
    check_multiplied(problem, compute(problem, "tensors", multiplies=True, plain=plain))


@pytest.mark.parametrize("access", ["elements", "vectors"])
def test_rule_of_tensorflow(access: str) -> None:
    """The mask multiplies: infinite gradients of dropped elements become NaN."""
    problem = relaid(build(BY_ID["nonfinite_nhwc"], "float32"), "channels_last")
    check_multiplied(problem, compute(problem, access, multiplies=True))


def check_multiplied(problem: Problem, ours: Results) -> None:
    expected = reference64(problem, "multiply", output=ours.output)
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        got, wanted = getattr(ours, name), getattr(expected, name)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
