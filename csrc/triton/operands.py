"""What products read and write: gathers, stores and epilogues by their names, and the arguments of
each in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import conv_relu, conv_tensor, gemm, linear_relu

# Kinds of arguments: a pointer to elements of the variant's type or to float32, integers, and a
# descriptor of a tensor in memory.
DATA, FLOAT, INT, LONG, TENSOR = "data", "fp32", "i32", "i64", "tensor"


@dataclass(frozen=True)
class Field:
    """An argument; `vector`: divisible by 16 where operands are read and written as vectors."""

    name: str
    kind: str
    vector: bool = False


def fields_of(text: str) -> tuple[Field, ...]:
    """From `name:kind`, with a star behind what vectors need."""
    parts = (part.split(":") for part in text.split())
    return tuple(Field(name, kind.rstrip("*"), kind.endswith("*")) for name, kind in parts)


@dataclass(frozen=True)
class Reader:
    """A gather: its functions and arguments. `extent`: what lies side by side in memory, the
    reduced dimension ("depth"), the lines of the operand ("lines"), or nothing that is known."""

    init: Callable[..., Any]
    load: Callable[..., Any]
    fields: tuple[Field, ...]
    extent: str | None = None
    masked: bool = False
    rank: int = 2  # of descriptors: of their block, all but the last two are 1


@dataclass(frozen=True)
class Writer:
    store: Callable[..., Any]
    fields: tuple[Field, ...]
    extent: str | None = None
    rank: int = 2


MATRIX = "data:data* stride:i64*"
_MASK = " mask:data* mask_stride:i64* nan_passes:i32"
ANY = "data:data stride:i64 step:i64"
_IMAGE = (
    "data:data* channels:i32* height:i32 width:i32 rows:i32 columns:i32 taps:i32 step_y:i32"
    " step_x:i32 origin_y:i32 origin_x:i32 dilation_y:i32 dilation_x:i32 image:i64* row:i32*"
    " column:i32*"
)
_WEIGHT = "data:data* channels:i32* taps:i32 tap_y:i32* tap_x:i32* stride:i32*"
_PIXELS = "data:data* rows:i32 columns:i32 image:i64* row:i32* column:i32*"
_CHANNEL = " channel:i32"
_TENSOR_IMAGE = (
    "data:tensor channels:i32 taps:i32 tiles_y:i32 tiles_x:i32 images:i32 advance_y:i32"
    " advance_x:i32 origin_y:i32 origin_x:i32 dilation_y:i32 dilation_x:i32"
)
_TENSOR_WEIGHT = "data:tensor channels:i32 taps:i32 first_y:i32 first_x:i32 tap_y:i32 tap_x:i32"
_TENSOR_PIXELS = "data:tensor tiles_y:i32 tiles_x:i32 images:i32 rows:i32 columns:i32"
_BOX_PLANES = (
    "data:data tiles_y:i32 tiles_x:i32 images:i32 rows:i32 columns:i32 count_n:i32 count_y:i32"
    " count_x:i32 image:i64 row:i32 column:i32 channel:i32"
)
_TENSOR_MASK = " mask:tensor nan_passes:i32"

_l, _c, _t = linear_relu, conv_relu, conv_tensor
READERS: dict[str, Reader] = {
    "depth": Reader(_l.line_init, _l.depth_load, fields_of(MATRIX), "depth"),
    "lines": Reader(_l.line_init, _l.lines_load, fields_of(MATRIX), "lines"),
    "left_lines": Reader(_l.line_init, _l.left_lines_load, fields_of(MATRIX), "lines"),
    "strided": Reader(_l.line_init, _l.strided_load, fields_of(ANY)),
    "depth_masked": Reader(
        _l.line_init, _l.depth_masked, fields_of(MATRIX + _MASK), "depth", masked=True
    ),
    "lines_masked": Reader(
        _l.line_init, _l.lines_masked, fields_of(MATRIX + _MASK), "lines", masked=True
    ),
    "tensor_depth": Reader(_l.tensor_init, _l.tensor_depth_load, fields_of("data:tensor"), "depth"),
    "tensor_lines": Reader(_l.tensor_init, _l.tensor_lines_load, fields_of("data:tensor"), "lines"),
    "tensor_depth_masked": Reader(
        _l.tensor_init,
        _l.tensor_depth_masked,
        fields_of("data:tensor" + _TENSOR_MASK),
        "depth",
        masked=True,
    ),
    "tensor_lines_masked": Reader(
        _l.tensor_init,
        _l.tensor_lines_masked,
        fields_of("data:tensor" + _TENSOR_MASK),
        "lines",
        masked=True,
    ),
    "windows": Reader(_c.window_init, _c.window_load, fields_of(_IMAGE)),
    "planes": Reader(_c.window_init, _c.plane_load, fields_of(_IMAGE + _CHANNEL)),
    "flat": Reader(_c.window_init, _c.flat_load, fields_of(_IMAGE + _CHANNEL)),
    "weight_depth": Reader(_l.line_init, _c.weight_depth, fields_of(_WEIGHT)),
    "weight_lines": Reader(_l.line_init, _c.weight_lines, fields_of(_WEIGHT), "lines"),
    "weight_strided": Reader(_l.line_init, _c.weight_strided, fields_of(_WEIGHT + _CHANNEL)),
    "weight_flat": Reader(_l.line_init, _c.weight_flat, fields_of(_WEIGHT + _CHANNEL)),
    "taps": Reader(_c.tap_init, _c.tap_load, fields_of(_IMAGE)),
    "taps_strided": Reader(_c.tap_init, _c.tap_strided, fields_of(_IMAGE + _CHANNEL)),
    "tensor_windows": Reader(
        _t.window_init, _t.window_load, fields_of(_TENSOR_IMAGE), "depth", rank=4
    ),
    "tensor_weight_depth": Reader(
        _t.weight_init, _t.weight_depth, fields_of(_TENSOR_WEIGHT), "depth", rank=4
    ),
    "tensor_weight_lines": Reader(
        _t.weight_init, _t.weight_lines, fields_of(_TENSOR_WEIGHT), "lines", rank=4
    ),
    "tensor_taps": Reader(_t.tap_init, _t.tap_load, fields_of(_TENSOR_IMAGE), "lines", rank=4),
    "tensor_pixels": Reader(
        _t.pixel_init, _t.pixels_load, fields_of(_TENSOR_PIXELS), "lines", rank=4
    ),
}
WRITERS: dict[str, Writer] = {
    "lines": Writer(gemm.store_lines, fields_of(MATRIX), "lines"),
    "strided": Writer(gemm.store_strided, fields_of(ANY)),
    "tensor": Writer(gemm.store_tensor, fields_of("data:tensor"), "lines"),
    "split": Writer(gemm.store_split, fields_of("data:fp32"), "lines"),
    "windows": Writer(_c.store_windows, fields_of(_PIXELS), "lines"),
    "planes": Writer(_c.store_planes, fields_of(_PIXELS + _CHANNEL)),
    "tensor_windows": Writer(_t.store_windows, fields_of(_TENSOR_PIXELS), "lines", rank=4),
    "box_planes": Writer(_t.store_planes, fields_of(_BOX_PLANES)),
    "taps": Writer(
        _c.store_taps,
        fields_of("data:data channels:i32 taps:i32 tap_y:i32 tap_x:i32 stride:i32 channel:i32"),
    ),
}
EPILOGUES = {
    "bias_relu": (gemm.bias_relu, fields_of("data:data* present:i32")),
    "strided_bias_relu": (gemm.strided_bias_relu, fields_of("data:data present:i32 stride:i64")),
    "identity": (gemm.identity, ()),
}
