"""Launches the kernels of Conv+ReLU that read images by boxes, in Triton's interpreter.

Boxes are chosen here as a host may: any shape of as many pixels as a tile has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as pairs
from math import prod
from typing import Any

from torch import Tensor, full, nan

from tests.gpu import launcher
from tests.gpu.launcher import NAMES, Boxed, divide, find
from tests.gpu.windows import Windows, combine_taps


@dataclass(frozen=True)
class Box:
    """Of pixels: a tile of an output, or a step of a sum over it."""

    images: int
    rows: int
    columns: int

    def tiles(self, n: int, p: int, q: int) -> tuple[int, int, int]:
        return divide(n, self.images), divide(p, self.rows), divide(q, self.columns)


def choose(pixels: int, output: Sequence[int], steps: Sequence[int], *, whole: bool) -> Box:
    """The box that wastes least of [images, rows, columns]. The encoder takes 256 elements of a
    dimension at most, those between two steps among them. `whole`: none beyond rows or columns."""
    powers = [1 << i for i in range(pixels.bit_length())]
    found = [
        Box(pixels // (h * w), h, w)
        for h, w in pairs(powers, powers)
        if pixels % (h * w) == 0 and h * steps[0] <= 256 and w * steps[1] <= 256
    ]
    if whole:
        found = [b for b in found if output[1] % b.rows == 0 == output[2] % b.columns]
    return min(found, key=lambda b: (prod(b.tiles(*output)), b.images))


def last(t: Tensor) -> Tensor:
    """[N, H, W, C] for descriptors, which want strides of whole 16 bytes also where nothing is
    stepped over."""
    t = t.permute(0, 2, 3, 1)
    strides = [s if n > 1 else 16 for n, s in zip(t.shape[:3], t.stride())]
    return t.as_strided(t.shape, (*strides, t.stride(3)))


def boxed(t: Tensor, box: Box, channels: int, steps: Sequence[int] = (1, 1)) -> Boxed:
    sizes = (box.images, box.rows, box.columns, channels)
    return Boxed(last(t), sizes, (1, *steps, 1))


def image(
    side: str, x: Tensor, rows: Windows, columns: Windows, box: Box, channels: int
) -> dict[str, Any]:
    """Arguments of a gather of windows by boxes, over [N, C, H, W]."""
    _, tiles_y, tiles_x = box.tiles(len(x), rows.count, columns.count)
    names = {
        "data": boxed(x, box, channels, (rows.step, columns.step)),
        "channels": x.shape[1],
        "taps": columns.taps,
        "tiles_y": tiles_y,
        "tiles_x": tiles_x,
        "images": box.images,
        "advance_y": box.rows * rows.step,
        "advance_x": box.columns * columns.step,
        "origin_y": rows.origin,
        "origin_x": columns.origin,
        "dilation_y": rows.dilation,
        "dilation_x": columns.dilation,
    }
    return {f"{side}_{name}": value for name, value in names.items()}


def pixels(side: str, x: Tensor, box: Box, channels: int) -> dict[str, Any]:
    """Arguments of a store to boxes of [N, C, P, Q], or of a sum over them."""
    _, tiles_y, tiles_x = box.tiles(len(x), *x.shape[2:])
    names = {"data": boxed(x, box, channels), "tiles_y": tiles_y, "tiles_x": tiles_x}
    names |= {"images": box.images, "rows": box.rows, "columns": box.columns}
    return {f"{side}_{name}": value for name, value in names.items()}


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    rows: Windows,
    columns: Windows,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    forward: bool = False,
    multiplies: bool = False,
    largest: bool = False,
    box: Box | None = None,
) -> None:
    """out[n, k, p, q] = sum over channels and taps; `weight` is [K, C, R, S], its taps those of the
    windows. `box` instead of the one that wastes least."""
    output = (len(x), rows.count, columns.count)
    if 0 in output:
        return
    depth = weight.stride(1) == 1
    variant = find(
        a="tensor_windows" if mask is None else "tensor_windows_masked",
        b="tensor_weight_depth" if depth else "tensor_weight_lines",
        epilogue="bias_relu" if forward else "identity",
        store="tensor_windows",
        dtype=NAMES[x.dtype],
        largest=largest,
    )
    tile = variant.tile
    box = box or choose(tile.m, output, (rows.step, columns.step), whole=False)
    values = image("a", x, rows, columns, box, tile.k) | pixels("out", out, box, tile.n)
    if mask is not None:
        values |= {"a_mask": boxed(mask, box, tile.k), "a_nan_passes": int(not multiplies)}
    taps = last(weight if depth else weight.transpose(0, 1)).permute(1, 2, 0, 3)
    values |= {"b_data": taps, "b_channels": x.shape[1], "b_taps": columns.taps}
    values |= {"b_first_y": rows.first_tap, "b_first_x": columns.first_tap}
    values |= {"b_tap_y": rows.tap_step, "b_tap_x": columns.tap_step}
    values |= launcher.bias_values(variant.epilogue, bias, x.dtype)
    tiles, count = prod(box.tiles(*output)), rows.taps * columns.taps
    values |= {"rows": tiles * tile.m, "cols": out.shape[1], "depth": count * x.shape[1]}
    values |= {"steps": count * divide(x.shape[1], tile.k), "splits": 1}
    programs = min(2, tiles)
    launcher.launch(variant, programs, values | {"programs": programs})


def grad_weight(
    x: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    out: Tensor,
    rows: Windows,
    columns: Windows,
    *,
    multiplies: bool,
    splits: int,
    largest: bool = False,
) -> None:
    """`out` is [K, C, R, S], of any strides."""
    variant = find(
        a="tensor_pixels" if mask is None else "tensor_pixels_masked",
        b="tensor_taps",
        store="split",
        dtype=NAMES[x.dtype],
        largest=largest,
    )
    tile = variant.tile
    n, k, p, q = grad.shape
    box = choose(tile.k, (n, p, q), (rows.step, columns.step), whole=True)
    values = image("b", x, rows, columns, box, tile.n) | pixels("a", grad, box, tile.m)
    if mask is not None:
        values |= {"a_mask": boxed(mask, box, tile.m), "a_nan_passes": int(not multiplies)}
    cols = rows.taps * columns.taps * divide(x.shape[1], tile.n) * tile.n
    parts = full((splits, k, cols), nan)
    values |= {"out_data": parts, "rows": k, "cols": cols, "depth": n * p * q, "splits": splits}
    values["steps"] = prod(box.tiles(n, p, q))
    tiles = divide(k, tile.m) * (cols // tile.n) * splits
    launcher.launch(variant, tiles, values | {"programs": tiles})
    combine_taps(parts, out, columns, tile.n)
