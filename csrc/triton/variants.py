"""Which kernels are built: every combination of operands, data type and tile, per architecture.

A variant names the functions that `gemm.multiply` is put together from and the size of its tiles.
What it needs of its arguments follows from those: their order, and which must be divisible by 16 so
that loads are vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from . import gemm, rearrange
from .operands import (
    ANY,
    EPILOGUES,
    FLOAT,
    INT,
    MATRIX,
    READERS,
    TENSOR,
    WRITERS,
    Field,
    Reader,
    Writer,
    fields_of,
)

DIVISOR = 16


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
    block: tuple[int, ...] | None = None  # of a descriptor


def _arguments(
    index: int,
    prefix: str,
    fields: tuple[Field, ...],
    vectors: bool = False,
    block: tuple[int, ...] = (),
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

        def block(access: Reader | Writer, lines: int, side: int) -> tuple[int, ...]:
            return (1,) * (access.rank - 2) + (lines, side)

        def read(reader: Reader, size: int) -> tuple[int, ...]:
            return block(reader, *((size, t.k) if reader.extent == "depth" else (t.k, size)))

        found = [
            *_arguments(0, "a", a.fields, self.vectors, read(a, t.m)),
            *_arguments(1, "b", b.fields, self.vectors, read(b, t.n)),
            *_arguments(2, "out", out.fields, self.vectors, block(out, t.m, t.n)),
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
            "ROUND": self.precision == "tf32" and a.fields[0].kind != TENSOR,
        }


def _sum_type(dtype: str) -> Any:
    """Of a gradient over its rows: errors of many rows must not show in a result of this type."""
    return tl.float64 if dtype == "fp32" else tl.float32


@dataclass(frozen=True)
class Combine:
    """A variant of `gemm.combine`: for products in splits, and for sums of a gradient."""

    epilogue: str
    store: str
    dtype: str
    rows: int = 16
    cols: int = 128
    parts: int = 4  # that are read at a time

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
            "PARTS": self.parts,
            "SUM": _sum_type(self.dtype if self.rows == 1 else "bf16"),
        }


# How `rearrange` reads: its function and arguments.
ACCESS = {
    "vectors": (rearrange.matrix_load, fields_of(MATRIX)),
    "elements": (rearrange.images_load, fields_of(f"{ANY} image:i64")),
    "planes": (rearrange.planes_load, fields_of("data:data column:i64 image:i64")),
    "plane_vectors": (rearrange.planes_load, fields_of("data:data* column:i64* image:i64*")),
}


@dataclass(frozen=True)
class Rearrange:
    """A variant of `rearrange.rearrange`."""

    mask: bool
    write: bool
    sum: bool
    dtype: str
    access: str
    rows: int
    cols: int
    warps: int

    @property
    def name(self) -> str:
        flags = (("mask", self.mask), ("write", self.write), ("sum", self.sum))
        does = "-".join(word for word, on in flags if on)
        return f"rearrange-{does}-{self.dtype}-{self.access}-{self.rows}x{self.cols}"

    @property
    def function(self) -> Any:
        return rearrange.rearrange

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}

    def arguments(self) -> list[Argument]:
        rows_last = self.access == "plane_vectors"
        vectors = self.access == "vectors" or rows_last
        operand = ACCESS[self.access][1]
        found = _arguments(0, "x", operand, vectors)
        if self.mask:
            found += _arguments(1, "output", operand, vectors)
        if self.write:  # into memory of our own, which is aligned unless columns are few
            found += _arguments(2, "out", fields_of(MATRIX), self.cols >= DIVISOR)
        if self.sum:
            found.append(Argument((3,), "partial", FLOAT, True))
        sizes = ("rows", "cols", "nan_passes", "height", "pixels")
        for i, name in enumerate(sizes):
            if (name, self.mask) == ("nan_passes", False):
                continue
            if (name, self.access) == ("pixels", "vectors"):
                continue
            aligned = name == "cols" or (rows_last and name in ("rows", "height", "pixels"))
            found.append(Argument((4 + i,), name, INT, vectors and aligned))
        return found

    def constants(self) -> dict[str, Any]:
        return {
            "LOAD": ACCESS[self.access][0],
            "MASK": self.mask,
            "WRITE": self.write,
            "SUM": _sum_type(self.dtype) if self.sum else None,
            "BLOCK_M": self.rows,
            "BLOCK_N": self.cols,
        }


Variant = Product | Combine | Rearrange


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
