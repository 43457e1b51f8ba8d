"""Which variants are built for an architecture.

Tiles are the largest that the machine code has no spills for and that fit into the shared memory of
every device that runs the code (csrc/aot.py checks both); which one serves a call is decided where
it is launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .operands import READERS
from .variants import Combine, Product, Rearrange, Tile, Variant

# Operands of Linear+ReLU's products: with [N, K] weights as torch has them, then [K, N] as Keras.
FORWARD = (("depth", "depth"), ("depth", "lines"))
GRAD_INPUT = (("depth_masked", "lines"), ("depth_masked", "depth"))
GRAD_WEIGHT = (("lines_masked", "lines"), ("left_lines", "lines_masked"))
# Of a gradient that `rearrange` has masked.
PLAIN = (("depth", "lines"), ("depth", "depth"), ("left_lines", "lines"))
# Any strides and alignment; a gradient was masked before.
ELEMENTS = (("strided", "strided", "strided_bias_relu"), ("strided", "strided", "identity"))
# Operands, epilogue and output of Conv+ReLU's products, where channels lie side by side: weights
# with the summed channels last, then with the others last. Gradients have been masked by
# `rearrange`, which leaves them so.
WINDOWS = (
    ("windows", "weight_depth", "bias_relu", "windows"),
    ("windows", "weight_lines", "bias_relu", "windows"),
    ("windows", "weight_depth", "identity", "windows"),
    ("windows", "weight_lines", "identity", "windows"),
)
TAPS = (
    ("left_lines", "taps", "identity", "taps"),
    ("left_lines", "taps", "identity", "split"),
)
# The same through descriptors; the last of the windows where the channels of the output do not lie
# side by side.
BOXES = (
    ("tensor_windows", "tensor_weight_depth", "bias_relu", "tensor_windows"),
    ("tensor_windows", "tensor_weight_lines", "bias_relu", "tensor_windows"),
    ("tensor_windows", "tensor_weight_depth", "identity", "tensor_windows"),
    ("tensor_windows", "tensor_weight_lines", "identity", "tensor_windows"),
    ("tensor_windows", "tensor_weight_depth", "strided_bias_relu", "box_planes"),
    ("tensor_windows", "tensor_weight_depth", "identity", "box_planes"),
    ("tensor_pixels", "tensor_taps", "identity", "split"),
)
# Any strides and alignment; the last for images with few channels.
WINDOW_ELEMENTS = (
    ("planes", "weight_strided", "strided_bias_relu", "planes"),
    ("planes", "weight_strided", "identity", "planes"),
    ("strided", "taps_strided", "identity", "taps"),
    ("strided", "taps_strided", "identity", "split"),
    ("flat", "weight_flat", "strided_bias_relu", "planes"),
)
TYPES = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3"))
# Of kernels that read single elements: those take more time than three terms do.
ELEMENT_TYPES = tuple(kind for kind in TYPES if kind[1] != "tf32")
# Multiplied one by one: the errors of three terms show where few products are summed.
SHALLOW = ("fp32", "ieee")
_SHALLOW_TILE = Tile(32, 64, 16, 4, 2)


@dataclass(frozen=True)
class Boxes:
    """Tiles of windows behind descriptors: `split` for sums over pixels."""

    plain: tuple[Tile, ...]
    split: tuple[Tile, ...]

    def of(self, store: str) -> tuple[Tile, ...]:
        if store == "split":
            return self.split
        if store == "box_planes":
            return self.plain[-1:]
        return self.plain


# Of a masked gradient over its rows: one row, from many parts.
SUMS = {
    dtype: Combine("identity", "strided", dtype, rows=1, cols=32, parts=128)
    for dtype in ("bf16", "fp16", "fp32")
}


@dataclass(frozen=True)
class Tiles:
    """Of one precision on one architecture.

    `small` and `narrow` are read through pointers, `narrow` for few rows. `large`, and `wide` where
    nothing is masked, through descriptors where the architecture has them, and `slim` and `boxes`
    only there. `turned` in place of all of these, and `turned_small` of the small one, where an
    operand is not read along the reduced dimension, which the instruction of large tiles takes in
    16 bits alone.
    """

    large: Tile
    small: Tile
    narrow: Tile
    wide: Tile | None = None
    slim: Tile | None = None
    turned: Tile | None = None
    turned_small: Tile | None = None
    large_masked: Tile | None = None
    small_masked: Tile | None = None
    boxes: Boxes | None = None

    def large_and_small(self, masked: bool) -> tuple[Tile, Tile]:
        if not masked:
            return self.large, self.small
        return self.large_masked or self.large, self.small_masked or self.small


@dataclass(frozen=True)
class Architecture:
    """`shared`: bytes of shared memory that a block may have on the smallest device that runs the
    code."""

    tensors: bool
    shared: int
    halves: Tiles
    tf32: Tiles
    tf32x3: Tiles

    def tiles(self, precision: str) -> Tiles:
        return {"ieee": self.halves, "tf32": self.tf32, "tf32x3": self.tf32x3}[precision]


# Width of the tiles whose splits hold channels of one tap each.
SPLIT_COLUMNS = 64
_NARROW = Tile(16, 32, 128, 4, 4)
_NARROW_FLOAT = Tile(16, 32, 64, 4, 4)

_BOX = Tile(128, 128, 64, 8, 4)
_SLIM_BOX = Tile(128, 64, 64, 4, 4)  # for few filters; two of them share a multiprocessor
_SPLIT_BOXES = (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4))
_FLOAT_BOX = Tile(128, 128, 32, 8, 3)
_FLOAT_BOXES = Boxes((_FLOAT_BOX,), (Tile(32, 64, 32, 4, 4),))

_AMPERE = Architecture(
    tensors=False,
    shared=99 << 10,
    halves=Tiles(Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), _NARROW),
    tf32=Tiles(
        Tile(128, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 4),
        _NARROW_FLOAT,
        small_masked=Tile(64, 64, 16, 4, 3),
    ),
    tf32x3=Tiles(Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3), _NARROW_FLOAT),
)
_HOPPER_FLOATS = Tiles(
    Tile(128, 128, 32, 8, 3),
    Tile(64, 64, 32, 4, 3),
    _NARROW_FLOAT,
    turned=Tile(32, 128, 32, 4, 3),
    turned_small=Tile(32, 64, 32, 4, 4),
    boxes=_FLOAT_BOXES,
)
_HOPPER = Architecture(
    tensors=True,
    shared=227 << 10,
    halves=Tiles(
        Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        _NARROW,
        wide=Tile(128, 256, 64, 8, 3),
        slim=_SLIM_BOX,
        boxes=Boxes((_BOX, Tile(256, 128, 64, 8, 3), _SLIM_BOX), _SPLIT_BOXES),
    ),
    tf32=_HOPPER_FLOATS,
    tf32x3=_HOPPER_FLOATS,
)
_BLACKWELL = replace(
    _HOPPER,
    halves=replace(_HOPPER.halves, boxes=Boxes((_BOX, _SLIM_BOX), _SPLIT_BOXES)),
    tf32=replace(_HOPPER.tf32, small=Tile(64, 64, 32, 4, 2), turned_small=Tile(32, 64, 16, 4, 4)),
    tf32x3=replace(
        _HOPPER.tf32x3, small=Tile(64, 64, 32, 4, 2), large_masked=Tile(128, 64, 32, 8, 3)
    ),
)
_CONSUMER = Architecture(
    tensors=True,
    shared=99 << 10,
    halves=Tiles(
        Tile(128, 128, 32, 8, 3),
        Tile(64, 64, 32, 4, 4),
        _NARROW,
        slim=Tile(128, 64, 32, 4, 4),
        boxes=Boxes(
            (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 4)), (Tile(128, 64, 32, 4, 4),)
        ),
    ),
    tf32=Tiles(
        Tile(128, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 4),
        _NARROW_FLOAT,
        large_masked=Tile(128, 128, 16, 8, 2),
        boxes=Boxes((Tile(128, 128, 16, 8, 3),), (Tile(128, 64, 16, 8, 3),)),
    ),
    tf32x3=Tiles(
        Tile(128, 64, 16, 8, 3),
        Tile(64, 64, 16, 4, 3),
        _NARROW_FLOAT,
        boxes=Boxes((Tile(128, 64, 16, 8, 3),), (Tile(128, 64, 16, 8, 3),)),
    ),
)
ARCHITECTURES = {
    80: _AMPERE,
    90: _HOPPER,
    100: _BLACKWELL,
    120: _CONSUMER,
}
# Whose code also runs on these later ones. csrc/gpu/device.cc knows the same.
FAMILIES = {100: (103,), 120: (121,)}


def code_for(arch: int) -> int:
    """The architecture whose code a device of `arch` runs, if any is built for it."""
    if arch // 10 == 8:
        return 80
    return next((first for first, later in FAMILIES.items() if arch in later), arch)


_ELEMENTS = (Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 4, 2))  # of halves, of floats


def _with_descriptors(variant: Product) -> Product:
    a = f"tensor_{variant.a.removeprefix('left_')}"
    return replace(variant, a=a, b=f"tensor_{variant.b}", store="tensor", persistent=True)


# Rows and columns of a step, and warps: addresses of single elements take registers.
_REARRANGED = {"vectors": (128, 64, 8), "elements": (32, 128, 4), "planes": (64, 64, 8)}
_REARRANGED["plane_vectors"] = _REARRANGED["planes"]
_FEW_COLUMNS = (512, 4, 4)


def _turns(a: str, b: str) -> bool:
    return "lines" in (READERS[a].extent, READERS[b].extent)


def _element_tile(dtype: str, precision: str) -> Tile:
    return _SHALLOW_TILE if (dtype, precision) == SHALLOW else _ELEMENTS[dtype == "fp32"]


def rearrange(mask: bool, write: bool, summed: bool, dtype: str, access: str) -> Rearrange:
    """`access`: as in `Rearrange`, with "few " in front for few columns."""
    few = access.startswith("few ")
    access = access.removeprefix("few ")
    size = _FEW_COLUMNS if few else _REARRANGED[access]
    return Rearrange(mask, write, summed, dtype, access, *size)


def linear(arch: int) -> Iterator[Variant]:
    """The variants of Linear+ReLU for an architecture."""
    architecture = ARCHITECTURES[arch]
    for dtype, precision in TYPES:
        tiles = architecture.tiles(precision)

        def product(a: str, b: str, epilogue: str, tile: Tile, store: str = "lines") -> Product:
            return Product(a, b, epilogue, store, dtype, precision, tile)  # noqa: B023

        forward = [(a, b, "bias_relu") for a, b in FORWARD]
        others = [(a, b, "identity") for a, b in GRAD_INPUT + GRAD_WEIGHT + PLAIN]
        for a, b, epilogue in forward + others:
            masked = READERS[a].masked or READERS[b].masked
            large, small = tiles.large_and_small(masked)
            chosen = {large, *(() if masked else (tiles.wide, tiles.slim))} - {None}
            if tiles.turned and tiles.turned_small and _turns(a, b):
                chosen, small = {tiles.turned}, tiles.turned_small
            for tile in sorted(chosen, key=lambda t: (t.m, t.n)):
                variant = product(a, b, epilogue, tile)
                yield _with_descriptors(variant) if architecture.tensors else variant
            yield product(a, b, epilogue, small)
        for a, b, epilogue in forward:
            yield product(a, b, epilogue, tiles.narrow)
        # Deep sums of small outputs.
        for a, b in FORWARD + GRAD_WEIGHT:
            tile = tiles.turned_small if _turns(a, b) else None
            yield product(a, b, "identity", tile or tiles.small, "split")
        for tile in tiles.boxes.split if tiles.boxes else ():
            variant = _with_descriptors(product(*PLAIN[2], "identity", tile))
            yield replace(variant, store="split")
    for dtype, precision in (*ELEMENT_TYPES, SHALLOW):
        tile = _element_tile(dtype, precision)
        for a, b, epilogue in ELEMENTS:
            yield Product(a, b, epilogue, "strided", dtype, precision, tile, vectors=False)
    for dtype in ("bf16", "fp16", "fp32"):
        for epilogue in ("strided_bias_relu", "identity"):
            yield Combine(epilogue, "strided", dtype)
        yield SUMS[dtype]
        for write, summed in ((True, True), (True, False), (False, True)):
            yield rearrange(True, write, summed, dtype, "vectors")
        # Of any other gradient everything is made, whether it is wanted or not.
        for access in ("elements", "planes", "plane_vectors"):
            yield rearrange(True, True, True, dtype, access)


def convolution(arch: int) -> Iterator[Variant]:
    """The variants of Conv+ReLU that Linear+ReLU does not have."""
    architecture = ARCHITECTURES[arch]
    for dtype, precision in TYPES:
        tiles = architecture.tiles(precision)
        small = tiles.turned_small or tiles.small
        assert small.n == _ELEMENTS[dtype == "fp32"].n == SPLIT_COLUMNS
        for a, b, epilogue, store in TAPS:
            yield Product(a, b, epilogue, store, dtype, precision, small)
        if not tiles.boxes:
            for a, b, epilogue, store in WINDOWS:
                for tile in (tiles.large, tiles.small):
                    yield Product(a, b, epilogue, store, dtype, precision, tile)
            continue
        assert all(tile.n == SPLIT_COLUMNS for tile in tiles.boxes.split)
        for a, b, epilogue, store in BOXES:
            # Weights that would have to be turned are put in the other order before.
            if b == "tensor_weight_lines" and tiles.turned:
                continue
            for tile in tiles.boxes.of(store):
                yield Product(a, b, epilogue, store, dtype, precision, tile, persistent=True)
    for dtype, precision in (*ELEMENT_TYPES, SHALLOW):
        tile = _element_tile(dtype, precision)
        for a, b, epilogue, store in WINDOW_ELEMENTS:
            yield Product(a, b, epilogue, store, dtype, precision, tile, vectors=False)
    for dtype in ("bf16", "fp16", "fp32"):
        for access in ("elements", "planes", "plane_vectors", "few elements", "few planes"):
            yield rearrange(False, True, False, dtype, access)
        yield Combine("identity", "taps", dtype, cols=SPLIT_COLUMNS)


def variants(arch: int) -> list[Variant]:
    """Everything that is built for `arch`. Raises KeyError where nothing is."""
    return [*linear(arch), *convolution(arch)]
