"""The formulas of the table of convolutions, against the definition written out in loops."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from tests.arrays import decode
from tests.conv_case import ConvCase
from tests.conv_cases import CASES
from tests.problem import Problem, build, reference64

BY_ID = {case.id: case for case in CASES}
SMALL = [
    case
    for case in CASES
    if np.prod(case.output_sizes) * case.terms[0] < 100_000 and case.values != "nonfinite"
]


def in_loops(problem: Problem, output: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pre-activation and gradients, one multiplication after another."""
    case: ConvCase = problem.case
    x, w = problem.input.values, problem.weight.values
    g = np.where(decode(output) > 0, problem.grad_output.values, 0.0)
    z, grad_x, grad_w = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    if problem.bias is not None:
        z += problem.bias.values.reshape(-1, *(1 for _ in case.size))
    channels, filters = case.weight_sizes[1], case.filters // case.groups
    for n, k, *pixel in np.ndindex(z.shape):
        for c, *tap in np.ndindex(w.shape[1:]):
            place = [
                p * stride + t * dilation - low
                for p, t, stride, dilation, (low, _) in zip(
                    pixel, tap, case.stride, case.dilation, case.padding, strict=True
                )
            ]
            if not all(0 <= i < size for i, size in zip(place, case.size, strict=True)):
                continue
            here = (n, k, *pixel)
            source = (n, k // filters * channels + c, *place)
            weight = (k, c, *tap)
            z[here] += x[source] * w[weight]
            grad_x[source] += g[here] * w[weight]
            grad_w[weight] += g[here] * x[source]
    return z, grad_x, grad_w, g.sum(axis=(0, *range(2, g.ndim)))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_reference_is_the_definition(case: ConvCase) -> None:
    problem = build(case, "float64")
    output = np.where(np.arange(np.prod(case.output_sizes)) % 3 > 0, 1.0, 0.0)
    output = output.reshape(case.output_sizes)
    z, *grads = in_loops(problem, output)
    reference = reference64(problem, "select", output)
    close = {"rtol": 1e-12, "atol": 1e-12 if case.values != "denormal" else 1e-321}
    np.testing.assert_allclose(reference.output.astype(float), np.maximum(z, 0), **close)
    ours = (reference.grad_input, reference.grad_weight, reference.grad_bias)
    for got, expected in zip(ours, grads, strict=True):
        np.testing.assert_allclose(got.astype(float), expected, **close)


def test_loops_see_most_of_the_table() -> None:
    """Every parameter that the formulas have is off its default in some case above."""
    small = [dataclasses.asdict(case) for case in SMALL]
    assert len(small) > len(CASES) / 2
    for field in ("stride", "dilation", "padding", "groups", "kernel"):
        assert len({case[field] for case in small}) > 3, field


def test_words_of_tensorflow_for_padding() -> None:
    words = {name: BY_ID[name].tf_padding for name in BY_ID}
    assert words["same_stride"] == words["three_by_three"] == words["1d"] == "SAME"
    assert words["same_even_kernel"] == words["five_by_five"] == "SAME"
    assert words["digits"] == words["pointwise_stride"] == "VALID"
    assert words["1d_causal"] == words["uneven_padding"] == words["stem"] == "EXPLICIT"
    # "SAME" gives as many outputs as strides begin in the image.
    for case in CASES:
        if case.tf_padding == "SAME":
            pairs = zip(case.size, case.stride, strict=True)
            assert case.output_size == tuple(-(-n // step) for n, step in pairs), case.id


def test_padding_of_torch() -> None:
    assert BY_ID["stem"].symmetric and BY_ID["digits"].symmetric
    assert not BY_ID["same_stride"].symmetric and not BY_ID["1d_causal"].symmetric


def test_nonfinite_numbers_meet_no_padding() -> None:
    """Whether infinity times a zero of the padding is NaN is for no one to say."""
    for case in CASES:
        if case.values != "nonfinite":
            continue
        problem = build(case, "float32")
        finite_weight = np.isfinite(problem.weight.values).all()
        assert finite_weight or set(case.kernel) == set(case.stride) == {1}
        assert finite_weight or not any(map(any, case.padding))
        inside = np.pad(np.ones(case.input_sizes), ((0, 0), (0, 0), *case.padding))
        starts = [range(0, n * s, s) for n, s in zip(case.output_size, case.stride, strict=True)]
        for pixel, start in zip(np.ndindex(case.output_size), itertools.product(*starts)):
            window = tuple(slice(a, a + n) for a, n in zip(start, case.span, strict=True))
            if not np.isfinite(problem.grad_output.values[(..., *pixel)]).all():
                assert inside[(..., *window)].all(), f"{case.id} at {pixel}"
