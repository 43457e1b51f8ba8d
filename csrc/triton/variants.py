"""Which kernels are built: every combination of operands, data type and tile, per architecture.

A variant names the functions that `gemm.multiply` is put together from and the size of its tiles.
What it needs of its arguments follows from those: their order, and which must be divisible by 16 so
that loads are vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import conv_relu, gemm, linear_relu

# Kinds of arguments: a pointer to elements of the variant's type or to float32, integers, and a
# descriptor of a tensor in memory.
DATA, FLOAT, INT, LONG, TENSOR = "data", "fp32", "i32", "i64", "tensor"
DIVISOR = 16


@dataclass(frozen=True)
class Field:
    """An argument; `vector`: divisible by 16 where operands are read and written as vectors."""

    name: str
    kind: str
    vector: bool = False


def _fields(text: str) -> tuple[Field, ...]:
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


@dataclass(frozen=True)
class Writer:
    store: Callable[..., Any]
    fields: tuple[Field, ...]
    extent: str | None = None


_MATRIX = "data:data* stride:i64*"
_MASK = " mask:data* mask_stride:i64* nan_passes:i32"
_ANY = "data:data stride:i64 step:i64"
_IMAGE = (
    "data:data* channels:i32* height:i32 width:i32 rows:i32 columns:i32 taps:i32 step_y:i32"
    " step_x:i32 origin_y:i32 origin_x:i32 dilation_y:i32 dilation_x:i32 image:i64* row:i32*"
    " column:i32*"
)
_WEIGHT = "data:data* channels:i32* taps:i32 tap_y:i32* tap_x:i32* stride:i32*"
_PIXELS = "data:data* rows:i32 columns:i32 image:i64* row:i32* column:i32*"

_CHANNEL = " channel:i32"

_l, _c = linear_relu, conv_relu
READERS: dict[str, Reader] = {
    "depth": Reader(_l.line_init, _l.depth_load, _fields(_MATRIX), "depth"),
    "lines": Reader(_l.line_init, _l.lines_load, _fields(_MATRIX), "lines"),
    "left_lines": Reader(_l.line_init, _l.left_lines_load, _fields(_MATRIX), "lines"),
    "strided": Reader(_l.line_init, _l.strided_load, _fields(_ANY)),
    "depth_masked": Reader(
        _l.line_init, _l.depth_masked, _fields(_MATRIX + _MASK), "depth", masked=True
    ),
    "lines_masked": Reader(
        _l.line_init, _l.lines_masked, _fields(_MATRIX + _MASK), "lines", masked=True
    ),
    "strided_masked": Reader(
        _l.line_init,
        _l.strided_masked,
        _fields(_ANY + " mask:data mask_stride:i64 mask_step:i64 nan_passes:i32"),
        masked=True,
    ),
    "tensor_depth": Reader(_l.tensor_init, _l.tensor_depth_load, _fields("data:tensor"), "depth"),
    "tensor_lines": Reader(_l.tensor_init, _l.tensor_lines_load, _fields("data:tensor"), "lines"),
    "tensor_depth_masked": Reader(
        _l.tensor_init,
        _l.tensor_depth_masked,
        _fields("data:tensor mask:tensor nan_passes:i32"),
        "depth",
        masked=True,
    ),
    "tensor_lines_masked": Reader(
        _l.tensor_init,
        _l.tensor_lines_masked,
        _fields("data:tensor mask:tensor nan_passes:i32"),
        "lines",
        masked=True,
    ),
    "windows": Reader(_c.window_init, _c.window_load, _fields(_IMAGE)),
    "windows_masked": Reader(
        _c.window_init,
        _c.window_masked,
        _fields(_IMAGE + " mask:data* nan_passes:i32"),
        masked=True,
    ),
    "planes": Reader(_c.window_init, _c.plane_load, _fields(_IMAGE + _CHANNEL)),
    "planes_masked": Reader(
        _c.window_init,
        _c.plane_masked,
        _fields(_IMAGE + _CHANNEL + " mask:data* nan_passes:i32"),
        masked=True,
    ),
    "flat": Reader(_c.window_init, _c.flat_load, _fields(_IMAGE + _CHANNEL)),
    "weight_depth": Reader(_l.line_init, _c.weight_depth, _fields(_WEIGHT)),
    "weight_lines": Reader(_l.line_init, _c.weight_lines, _fields(_WEIGHT), "lines"),
    "weight_strided": Reader(_l.line_init, _c.weight_strided, _fields(_WEIGHT + _CHANNEL)),
    "weight_flat": Reader(_l.line_init, _c.weight_flat, _fields(_WEIGHT + _CHANNEL)),
    "taps": Reader(_c.tap_init, _c.tap_load, _fields(_IMAGE)),
    "taps_strided": Reader(_c.tap_init, _c.tap_strided, _fields(_IMAGE + _CHANNEL)),
    "pixels_masked": Reader(
        _l.line_init,
        _c.pixels_masked,
        _fields(_PIXELS + _CHANNEL + " mask:data* nan_passes:i32"),
        masked=True,
    ),
}
WRITERS: dict[str, Writer] = {
    "lines": Writer(gemm.store_lines, _fields(_MATRIX), "lines"),
    "strided": Writer(gemm.store_strided, _fields(_ANY)),
    "tensor": Writer(gemm.store_tensor, _fields("data:tensor"), "lines"),
    "split": Writer(gemm.store_split, _fields("data:fp32"), "lines"),
    "windows": Writer(_c.store_windows, _fields(_PIXELS), "lines"),
    "planes": Writer(_c.store_planes, _fields(_PIXELS + _CHANNEL)),
    "taps": Writer(
        _c.store_taps,
        _fields("data:data channels:i32 taps:i32 tap_y:i32 tap_x:i32 stride:i32 channel:i32"),
    ),
}
EPILOGUES = {
    "bias_relu": (gemm.bias_relu, _fields("data:data* present:i32")),
    "strided_bias_relu": (gemm.strided_bias_relu, _fields("data:data present:i32 stride:i64")),
    "identity": (gemm.identity, ()),
}


@dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N of the output, BLOCK_K of the reduced dimension at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel: where it stands in the signature, and what it is called."""

    path: tuple[int, ...]
    name: str
    kind: str
    divisible: bool
    block: tuple[int, int] | None = None  # of a descriptor


def _arguments(
    index: int,
    prefix: str,
    fields: tuple[Field, ...],
    vectors: bool = False,
    block: tuple[int, int] = (0, 0),
) -> list[Argument]:
    return [
        Argument(
            (index, i),
            f"{prefix}_{field.name}",
            field.kind,
            vectors and field.vector,
            block if field.kind == TENSOR else None,
        )
        for i, field in enumerate(fields)
    ]


_SIZES = ("rows", "cols", "depth", "steps", "programs", "splits")
_PARTS = ("rows", "cols", "splits")


@dataclass(frozen=True)
class Product:
    """A variant of `gemm.multiply`."""

    a: str
    b: str
    epilogue: str
    store: str
    dtype: str  # "bf16", "fp16" or "fp32"
    precision: str  # of float32: "tf32" or "tf32x3"
    tile: Tile
    vectors: bool = True  # else any alignment
    persistent: bool = False
    group: int = 8

    @property
    def name(self) -> str:
        t = self.tile
        kind = self.dtype if self.dtype != "fp32" else self.precision
        access = "vectors" if self.vectors else "elements"
        parts = (self.a, self.b, self.epilogue, self.store, kind, access)
        return f"{'-'.join(parts)}-{t.m}x{t.n}x{t.k}w{t.warps}s{t.stages}"

    @property
    def function(self) -> Any:
        return gemm.multiply

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "maxnreg": 255}

    def arguments(self) -> list[Argument]:
        """In the order of the compiled kernel's parameters."""
        t, a, b, out = self.tile, READERS[self.a], READERS[self.b], WRITERS[self.store]

        def block(reader: Reader, size: int) -> tuple[int, int]:
            return (size, t.k) if reader.extent == "depth" else (t.k, size)

        found = [
            *_arguments(0, "a", a.fields, self.vectors, block(a, t.m)),
            *_arguments(1, "b", b.fields, self.vectors, block(b, t.n)),
            *_arguments(2, "out", out.fields, self.vectors, (t.m, t.n)),
            *_arguments(3, "bias", EPILOGUES[self.epilogue][1], self.vectors),
        ]
        # Masks at the ends are vectors only where what lies side by side has such a length;
        # descriptors need none.
        extents = {
            "rows": self._bounded(a) == "lines",
            "cols": self._bounded(b) == "lines" or self._bounded(out) == "lines",
            "depth": "depth" in (self._bounded(a), self._bounded(b)),
        }
        for i, name in enumerate(_SIZES):
            found.append(Argument((4 + i,), name, INT, self.vectors and extents.get(name, False)))
        return found

    @staticmethod
    def _bounded(access: Reader | Writer) -> str | None:
        return None if access.fields[0].kind == TENSOR else access.extent

    def constants(self) -> dict[str, Any]:
        """Arguments that are fixed when the kernel is compiled, functions among them."""
        t, a, b = self.tile, READERS[self.a], READERS[self.b]
        return {
            "A_INIT": a.init,
            "A_LOAD": a.load,
            "B_INIT": b.init,
            "B_LOAD": b.load,
            "EPILOGUE": EPILOGUES[self.epilogue][0],
            "STORE": WRITERS[self.store].store,
            "BLOCK_M": t.m,
            "BLOCK_N": t.n,
            "BLOCK_K": t.k,
            "GROUP": self.group,
            "PRECISION": self.precision if self.dtype == "fp32" else "ieee",
            "SPLIT": self.store == "split",
            "FLATTEN": self.persistent,
        }


@dataclass(frozen=True)
class Combine:
    """A variant of `gemm.combine`: for products in splits, and for sums of a gradient."""

    epilogue: str
    store: str
    dtype: str
    rows: int = 16
    cols: int = 128

    @property
    def name(self) -> str:
        return f"combine-{self.epilogue}-{self.store}-{self.dtype}-{self.rows}x{self.cols}"

    @property
    def function(self) -> Any:
        return gemm.combine

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": 4}

    def arguments(self) -> list[Argument]:
        return [
            Argument((0,), "partial", FLOAT, True),
            *_arguments(1, "out", WRITERS[self.store].fields),
            *_arguments(2, "bias", EPILOGUES[self.epilogue][1]),
            *(Argument((3 + i,), name, INT, False) for i, name in enumerate(_PARTS)),
        ]

    def constants(self) -> dict[str, Any]:
        return {
            "EPILOGUE": EPILOGUES[self.epilogue][0],
            "STORE": WRITERS[self.store].store,
            "BLOCK_M": self.rows,
            "BLOCK_N": self.cols,
        }


@dataclass(frozen=True)
class MaskGradient:
    """A variant of `gemm.mask_gradient`."""

    write: bool
    sum: bool
    dtype: str
    vectors: bool = True
    rows: int = 32
    cols: int = 128

    @property
    def name(self) -> str:
        does = "-".join(word for word, on in (("write", self.write), ("sum", self.sum)) if on)
        access = "vectors" if self.vectors else "elements"
        return f"mask_gradient-{does}-{self.dtype}-{access}-{self.rows}x{self.cols}"

    @property
    def function(self) -> Any:
        return gemm.mask_gradient

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": 4}

    def arguments(self) -> list[Argument]:
        operand = _fields(_MATRIX if self.vectors else f"{_ANY} image:i64")
        found = _arguments(0, "grad", operand, self.vectors)
        found += _arguments(1, "output", operand, self.vectors)
        if self.write:
            found += _arguments(2, "out", _fields(_MATRIX), self.vectors)
        if self.sum:
            found.append(Argument((3,), "partial", FLOAT, True))
        sizes = ("rows", "cols", "nan_passes", "height", "pixels")[: 4 if self.vectors else 5]
        for i, name in enumerate(sizes):
            found.append(Argument((4 + i,), name, INT, self.vectors and name == "cols"))
        return found

    def constants(self) -> dict[str, Any]:
        return {
            "AT": gemm.matrix_at if self.vectors else gemm.images_at,
            "WRITE": self.write,
            "SUM": self.sum,
            "BLOCK_M": self.rows,
            "BLOCK_N": self.cols,
        }


Variant = Product | Combine | MaskGradient


def bind(variant: Variant, value: Callable[[Argument], Any]) -> dict[str, Any]:
    """`value` of each argument under the name of its parameter; those of one tuple as a tuple."""
    names = variant.function.arg_names
    groups: dict[str, list[Argument]] = {}
    for argument in variant.arguments():
        groups.setdefault(names[argument.path[0]], []).append(argument)
    return {
        name: tuple(map(value, group)) if len(group[0].path) > 1 else value(group[0])
        for name, group in groups.items()
    }
