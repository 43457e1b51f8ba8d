"""The Triton kernels of Linear+ReLU over the case table, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cases import CASES, LinearCase
from tests.gpu import launcher
from tests.gpu.operands import operands, result
from tests.problem import Problem, ReluGrad, Results, build, reference64
from tests.torch_cases import compare, native

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
every_access = pytest.mark.parametrize("access", ["elements", "vectors"])


def matrix(t: Tensor) -> Tensor:
    """[rows, columns] of whatever has leading dimensions; other tensors are copied."""
    return t.reshape(-1, t.shape[-1]) if t.dim() != 2 else t


def poisoned(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


def compute(problem: Problem, access: str, *, rule: ReluGrad, plain: bool, splits: int) -> Results:
    """All results by the kernels. `plain`: the gradient is masked once, before the products."""
    x, w, b, g = operands(problem, matrix)
    options = {"access": access, "splits": splits}
    output = poisoned(len(x), len(w), like=x)
    launcher.multiply(x, w, output, bias=b, forward=True, **options)
    grad_bias = poisoned(len(w), like=x)
    multiplies = rule == "multiply"
    written = launcher.mask_gradient(
        g[None], output[None], write=plain, sums=grad_bias, multiplies=multiplies
    )
    mask = None if written is not None else output
    if written is not None:
        g = written
    options["multiplies"] = multiplies
    grad_input = poisoned(*x.shape, like=x)
    launcher.multiply(g, w.T, grad_input, mask_a=mask, **options | {"splits": 1})
    keras = w.stride(0) == 1 and w.stride(1) != 1
    grad_weight = poisoned(*(w.T if keras else w).shape, like=x)
    turned = None if mask is None else mask.T
    if keras:
        launcher.multiply(x.T, g.T, grad_weight, mask_b=turned, **options)
    else:
        launcher.multiply(g.T, x.T, grad_weight, mask_a=turned, **options)

    case = problem.case
    return Results(
        result(problem, output, case.output_sizes),
        result(problem, grad_input, case.input_sizes),
        result(problem, grad_weight.T if keras else grad_weight, case.weight_sizes),
        result(problem, grad_bias, (case.n,)),
    )


def check(
    case: LinearCase, dtype: str, access: str, *, plain: bool = False, splits: int = 1
) -> None:
    problem = build(case, dtype)
    compare(problem, compute(problem, access, rule="select", plain=plain, splits=splits), native)


@every_dtype
@every_access
@every_case
def test_case(case: LinearCase, access: str, dtype: str) -> None:
    check(case, dtype, access)


BY_ID = {case.id: case for case in CASES}
SOME = [BY_ID[name] for name in ("above_tile", "several_blocks", "weight_keras")]
some_cases = pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)


@every_dtype
@some_cases
def test_products_of_a_gradient_masked_before(case: LinearCase, dtype: str) -> None:
    check(case, dtype, "vectors", plain=True)


@every_dtype
@some_cases
def test_sums_in_splits(case: LinearCase, dtype: str) -> None:
    check(case, dtype, "vectors", splits=3)


# Descriptors need rows of whole 16 bytes.
TENSORS = (
    LinearCase("tensors", (200,), 96, 136),
    LinearCase("tensors_keras", (130,), 264, 128, weight_layout="transposed"),
    LinearCase("tensors_no_bias", (8,), 64, 264, bias=False),
    LinearCase("tensors_integers", (64,), 24, 40, values="integers"),
    LinearCase("tensors_nonfinite", (64,), 24, 40, values="nonfinite"),
)


@every_dtype
@pytest.mark.parametrize("plain", [False, True], ids=["masked", "plain"])
@pytest.mark.parametrize("case", TENSORS, ids=lambda case: case.id)
def test_descriptors(case: LinearCase, plain: bool, dtype: str) -> None:
    launcher.launched.clear()
    check(case, dtype, "tensors", plain=plain)
    products = [
        name for name in launcher.launched if name.split("-")[0][:4] not in ("comb", "mask")
    ]
    assert len(products) == 3 and all(name.startswith("tensor_") for name in products)


@pytest.mark.parametrize("access", ["elements", "vectors", "tensors"])
@pytest.mark.parametrize("plain", [False, True], ids=["masked", "plain"])
def test_rule_of_tensorflow(plain: bool, access: str) -> None:
    """The mask multiplies: infinite gradients of dropped elements become NaN, and NaN outputs drop
    theirs."""
    problem = build(TENSORS[-1], "float32")
    ours = compute(problem, access, rule="multiply", plain=plain, splits=1)
    expected = reference64(problem, "multiply", output=ours.output)
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        got, wanted = getattr(ours, name), getattr(expected, name)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def distinct() -> list[object]:
    """Every product of matrices that any architecture has, but for bfloat16."""
    found = {
        v.name: v
        for arch in launcher.catalogue.ARCHITECTURES
        for v in launcher.catalogue.linear(arch)
        if isinstance(v, launcher.variants.Product) and v.dtype != "bf16"
    }
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize("variant", distinct(), ids=lambda v: v.name)
def test_every_variant(variant: launcher.variants.Product) -> None:
    """With tiles at the ends that are not whole, and fewer programs than tiles."""
    rows, cols, depth, splits = (
        2 * variant.tile.m - 8,
        variant.tile.n + 8,
        3 * variant.tile.k - 8,
        1,
    )
    dtype = torch.float16 if variant.dtype == "fp16" else torch.float32
    generator = torch.Generator().manual_seed(7)

    def operand(lines: int, name: str) -> Tensor:
        values = torch.randn(lines, depth, generator=generator).to(dtype)
        return values.T.contiguous().T if "lines" in name else values

    a, b = operand(rows, variant.a), operand(cols, variant.b)
    masks = [
        operand(len(m), n) if "masked" in n else None for m, n in ((a, variant.a), (b, variant.b))
    ]
    bias = torch.randn(cols, generator=generator).to(dtype)
    shape: tuple[int, ...] = (rows, cols)
    if variant.store == "split":
        splits, shape = 2, (2, rows, cols)
    kind = torch.float32 if splits > 1 else dtype
    out = torch.full(shape, torch.nan, dtype=kind)
    launcher.run(variant, a, b, out, *masks, bias=bias, splits=splits, programs=2)
    left, right = (
        m.double() if mask is None else torch.where(mask <= 0, 0, m.double())
        for m, mask in ((a, masks[0]), (b, masks[1]))
    )
    expected = left @ right.T
    if "bias_relu" in variant.epilogue:
        expected = torch.relu(expected + bias.double())
    got = out.double().sum(0) if splits > 1 else out.double()
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * depth**0.5)
