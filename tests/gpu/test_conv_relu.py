"""The Triton kernels of Conv+ReLU over the case table, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.arrays import lay_out
from tests.conv_cases import CASES, ConvCase
from tests.gpu import launcher, windows
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
) -> Results:
    case, geometry = problem.case, Geometry(problem.case)
    x, w, b, g = operands(problem, images)
    last = access == "vectors"
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
        windows.product(
            group(x, c, i),
            filters,
            out,
            rows,
            columns,
            bias=bias,
            access=access,
            flat=flat,
            largest=largest,
        )
    g = laid_out(g, output)
    for i in range(groups):
        filters, grad, out = w[i * k : (i + 1) * k], group(g, k, i), group(output, k, i)
        to = group(grad_input, c, i)
        phases = windows.grad_input_phases(tuple(x.shape[2:]), tuple(w.shape[2:]), geometry)
        for (y0, x0), r, s in phases:
            part = to[:, :, y0 :: geometry.stride[0], x0 :: geometry.stride[1]]
            turned = filters.transpose(0, 1)
            options = {"access": access, "largest": largest, "multiplies": multiplies}
            windows.product(grad, turned, part, r, s, mask=out, **options)
        windows.grad_weight(
            group(x, c, i),
            grad,
            out,
            grad_weight[i * k : (i + 1) * k],
            rows,
            columns,
            access=access,
            multiplies=multiplies,
            splits=splits,
            largest=largest,
        )
    grad, mask = (t.flatten(2).transpose(1, 2) for t in (g, output))
    launcher.mask_gradient(grad, mask, write=False, sums=grad_bias, multiplies=multiplies)

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


@pytest.mark.parametrize("name", ["stem_valid", "uneven_padding", "1d_causal_dilation"])
def test_few_channels(name: str) -> None:
    """A step of the reduced dimension takes several taps."""
    check(build(BY_ID[name], "float32"), "elements", flat=True)


@pytest.mark.parametrize("name", ["three_by_three_stride_nhwc", "uneven_padding"])
def test_large_tiles(name: str) -> None:
    launcher.launched.clear()
    check(relaid(build(BY_ID[name], "float32"), "channels_last"), "vectors", largest=True)
    assert all("128x" in name for name in launcher.launched if name.startswith("windows"))


@pytest.mark.parametrize("access", ["elements", "vectors"])
def test_rule_of_tensorflow(access: str) -> None:
    """The mask multiplies: infinite gradients of dropped elements become NaN."""
    problem = relaid(build(BY_ID["nonfinite_nhwc"], "float32"), "channels_last")
    ours = compute(problem, access, multiplies=True)
    expected = reference64(problem, "multiply", output=ours.output)
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        got, wanted = getattr(ours, name), getattr(expected, name)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
