"""Launches the GPU kernels of Conv+ReLU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from tests.gpu import launcher
from tests.gpu.launcher import NAMES, divide, find


@dataclass(frozen=True)
class Windows:
    """One dimension of the windows that a product sees, as in csrc/cpu/slab.h."""

    count: int
    step: int
    origin: int
    taps: int
    dilation: int
    first_tap: int = 0
    tap_step: int = 1


def forward_windows(count: int, taps: int, stride: int, low: int, dilation: int) -> Windows:
    return Windows(count, stride, -low, taps, dilation)


def transposed_windows(
    size: int, taps: int, stride: int, low: int, dilation: int, phase: int
) -> Windows:
    """For elements phase, phase + stride, ... of the input's gradient."""
    tap_step = stride // gcd(stride, dilation)
    count, at = divide(size - phase, stride), phase + low
    first = next((t for t in range(min(taps, tap_step)) if (at - t * dilation) % stride == 0), None)
    if first is None:
        return Windows(count, 1, 0, 0, tap_step * dilation // stride, 0, -tap_step)
    found = (taps - 1 - first) // tap_step + 1
    last = first + (found - 1) * tap_step
    origin = (at - last * dilation) // stride
    return Windows(count, 1, origin, found, tap_step * dilation // stride, last, -tap_step)


def image(side: str, x: Tensor, rows: Windows, columns: Windows) -> dict[str, Any]:
    """Arguments of a gather of windows over [N, C, H, W]."""
    names = {
        "data": x,
        "channels": x.shape[1],
        "height": x.shape[2],
        "width": x.shape[3],
        "rows": rows.count,
        "columns": columns.count,
        "taps": columns.taps,
        "step_y": rows.step,
        "step_x": columns.step,
        "origin_y": rows.origin,
        "origin_x": columns.origin,
        "dilation_y": rows.dilation,
        "dilation_x": columns.dilation,
        "image": x.stride(0),
        "row": x.stride(2),
        "column": x.stride(3),
    }
    return {f"{side}_{name}": value for name, value in names.items()}


def pixels(side: str, x: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """Arguments of a store to pixels of [N, C, H, W], or of a sum over them."""
    names = {"data": x, "rows": rows, "columns": columns}
    names |= {"image": x.stride(0), "row": x.stride(2), "column": x.stride(3)}
    return {f"{side}_{name}": value for name, value in names.items()}


def pointers(largest: bool) -> dict[str, Any]:
    """Large tiles are read through pointers where there are no descriptors."""
    return {"arch": 80, "largest": True} if largest else {"arch": 90}


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    rows: Windows,
    columns: Windows,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    access: str,
    multiplies: bool = False,
    flat: bool = False,
    largest: bool = False,
) -> None:
    """out[n, k, p, q] = sum over channels and taps; `weight` is [K, C, R, S], its taps those of the
    windows."""
    forward = mask is None
    channels_last = x.stride(1) == 1 and out.stride(1) == 1
    names = None
    if access == "vectors" and channels_last and 1 in (weight.stride(0), weight.stride(1)):
        names = ("windows", "weight_depth" if weight.stride(1) == 1 else "weight_lines")
    store = "windows" if names else "planes"
    epilogue = "bias_relu" if names else "strided_bias_relu"
    a, b = names or (("flat", "weight_flat") if flat else ("planes", "weight_strided"))
    variant = find(
        a=a if forward else f"{a}_masked",
        b=b,
        epilogue=epilogue if forward else "identity",
        store=store,
        dtype=NAMES[x.dtype],
        **pointers(largest),
    )
    values = image("a", x, rows, columns) | pixels("out", out, rows.count, columns.count)
    if not names:
        values |= {"a_channel": x.stride(1), "out_channel": out.stride(1)}
        values |= {"b_channel": weight.stride(1)}
    if mask is not None:
        assert mask.stride() == x.stride()
        values |= {"a_mask": mask, "a_nan_passes": int(not multiplies)}
    lines = weight.stride(0) if b != "weight_lines" else weight.stride(1)
    values |= {"b_data": weight, "b_channels": weight.shape[1], "b_taps": columns.taps}
    values |= {"b_tap_y": rows.tap_step * weight.stride(2), "b_stride": lines}
    values |= {"b_tap_x": columns.tap_step * weight.stride(3)}
    offset = rows.first_tap * weight.stride(2) + columns.first_tap * weight.stride(3)
    values["b_data"] = weight.as_strided((1,), (1,), weight.storage_offset() + offset)
    values |= launcher.bias_values(variant.epilogue, bias, x.dtype)
    taps = rows.taps * columns.taps
    count = x.shape[0] * rows.count * columns.count
    depth = taps * x.shape[1]
    steps = divide(depth, variant.tile.k) if flat else taps * divide(x.shape[1], variant.tile.k)
    values |= {"rows": count, "cols": out.shape[1], "depth": depth, "steps": steps, "splits": 1}
    tiles = divide(count, variant.tile.m) * divide(out.shape[1], variant.tile.n)
    if tiles:
        launcher.launch(variant, tiles, values | {"programs": tiles})


def grad_input_phases(
    size: tuple[int, int], taps: tuple[int, int], case: Any
) -> Iterator[tuple[tuple[int, int], Windows, Windows]]:
    """Phase by phase: where it starts, and its windows of the gradient."""
    for y in range(min(case.stride[0], size[0])):
        for x in range(min(case.stride[1], size[1])):
            rows, columns = (
                transposed_windows(n, t, stride, low, dilation, phase)
                for n, t, stride, (low, _), dilation, phase in zip(
                    size, taps, case.stride, case.padding, case.dilation, (y, x), strict=True
                )
            )
            yield (y, x), rows, columns


def grad_weight(
    x: Tensor,
    grad: Tensor,
    mask: Tensor,
    out: Tensor,
    rows: Windows,
    columns: Windows,
    *,
    access: str,
    multiplies: bool,
    splits: int,
    largest: bool = False,
) -> None:
    """`out` is [K, C, R, S], of any strides."""
    assert grad.stride() == mask.stride()
    n, k, p, q = grad.shape
    # Pixels of all images follow each other.
    dense = grad.stride(1) == 1 and grad.stride(2) == q * grad.stride(3)
    dense = dense and (n == 1 or grad.stride(0) == p * grad.stride(2))
    vectors = access == "vectors" and dense and x.stride(1) == 1
    variant = find(
        a="lines_masked" if vectors else "pixels_masked",
        b="taps" if vectors else "taps_strided",
        epilogue="identity",
        store="split" if splits > 1 else "taps",
        dtype=NAMES[x.dtype],
        **pointers(largest),
    )
    values: dict[str, Any] = image("b", x, rows, columns)
    if vectors:
        stride = grad.stride(3)
        values |= {"a_data": grad, "a_stride": stride, "a_mask": mask, "a_mask_stride": stride}
    else:
        values |= pixels("a", grad, p, q) | {"a_channel": grad.stride(1), "a_mask": mask}
        values["b_channel"] = x.stride(1)
    values["a_nan_passes"] = int(not multiplies)
    width = variant.tile.n
    cols = rows.taps * columns.taps * divide(x.shape[1], width) * width
    parts = torch.full((splits, k, cols), torch.nan)
    values |= {"out_data": parts} if splits > 1 else weight_taps("out", out, columns)
    depth = n * p * q
    values |= {"rows": k, "cols": cols, "depth": depth, "splits": splits}
    values["steps"] = divide(depth, variant.tile.k)
    tiles = divide(k, variant.tile.m) * divide(cols, width) * splits
    if tiles:
        launcher.launch(variant, tiles, values | {"programs": tiles})
    if splits > 1 and tiles:
        combine_taps(parts, out, columns, width)


def weight_taps(side: str, weight: Tensor, columns: Windows) -> dict[str, Any]:
    """Arguments of a store to the taps of [K, C, R, S]."""
    names = {
        "data": weight,
        "channels": weight.shape[1],
        "taps": columns.taps,
        "tap_y": weight.stride(2),
        "tap_x": weight.stride(3),
        "stride": weight.stride(0),
        "channel": weight.stride(1),
    }
    return {f"{side}_{name}": value for name, value in names.items()}


def combine_taps(parts: Tensor, out: Tensor, columns: Windows, width: int) -> None:
    """Adds up splits of [K, taps and channels], in tiles of `width`."""
    splits, k, cols = parts.shape
    wanted = launcher.variants.Combine("identity", "taps", NAMES[out.dtype], cols=width)
    assert wanted in launcher.catalogue.variants(90)
    sums = {"partial": parts, "rows": k, "cols": cols, "splits": splits}
    programs = divide(k, wanted.rows) * divide(cols, width)
    launcher.launch(wanted, programs, weight_taps("out", out, columns) | sums)
