"""Every product of matrices in the interpreter, the tiles that no case of the tables takes among
them; what the core launches for the tables is replayed by test_launches.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu import launcher


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
    coarse = dtype == torch.float16 or variant.precision == "tf32"
    tolerance = 2e-3 if coarse else 1e-6
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * depth**0.5)
