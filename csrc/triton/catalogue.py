"""Which variants are built for an architecture.

Tiles are the largest that the machine code has no spills for and that fit into the shared memory of
every device of the architecture (csrc/aot.py checks both); which one serves a call is decided where
it is launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .operands import READERS
from .variants import Combine, MaskGradient, Product, Tile, Variant

# Operands of Linear+ReLU's products: with [N, K] weights as torch has them, then [K, N] as Keras.
FORWARD = (("depth", "depth"), ("depth", "lines"))
GRAD_INPUT = (("depth_masked", "lines"), ("depth_masked", "depth"))
GRAD_WEIGHT = (("lines_masked", "lines"), ("left_lines", "lines_masked"))
# Of a gradient that `mask_gradient` has written.
PLAIN = (("depth", "lines"), ("depth", "depth"), ("left_lines", "lines"))
# Any strides and alignment.
ELEMENTS = (
    ("strided", "strided", "strided_bias_relu"),
    ("strided_masked", "strided", "identity"),
    ("strided", "strided_masked", "identity"),
    ("strided", "strided", "identity"),
)
# Operands, epilogue and output of Conv+ReLU's products, where channels lie side by side: weights
# with the summed channels last, then with the others last.
WINDOWS = (
    ("windows", "weight_depth", "bias_relu", "windows"),
    ("windows", "weight_lines", "bias_relu", "windows"),
    ("windows_masked", "weight_depth", "identity", "windows"),
    ("windows_masked", "weight_lines", "identity", "windows"),
    ("lines_masked", "taps", "identity", "taps"),
    # Of gradients that `mask_gradient` has written.
    ("windows", "weight_depth", "identity", "windows"),
    ("windows", "weight_lines", "identity", "windows"),
    ("left_lines", "taps", "identity", "taps"),
)
# The same through descriptors; of gradients that `mask_gradient` has written, too.
BOXES = (
    ("tensor_windows", "tensor_weight_depth", "bias_relu", "tensor_windows"),
    ("tensor_windows", "tensor_weight_lines", "bias_relu", "tensor_windows"),
    ("tensor_windows", "tensor_weight_depth", "identity", "tensor_windows"),
    ("tensor_windows", "tensor_weight_lines", "identity", "tensor_windows"),
    ("tensor_windows_masked", "tensor_weight_depth", "identity", "tensor_windows"),
    ("tensor_windows_masked", "tensor_weight_lines", "identity", "tensor_windows"),
    ("tensor_pixels", "tensor_taps", "identity", "split"),
    ("tensor_pixels_masked", "tensor_taps", "identity", "split"),
)
# Any strides and alignment, but a masked gradient has those of the output; the last for images with
# few channels.
WINDOW_ELEMENTS = (
    ("planes", "weight_strided", "strided_bias_relu", "planes"),
    ("planes_masked", "weight_strided", "identity", "planes"),
    ("pixels_masked", "taps_strided", "identity", "taps"),
    ("pixels_masked", "taps_strided", "identity", "split"),
    ("planes", "weight_strided", "identity", "planes"),
    ("strided", "taps_strided", "identity", "taps"),
    ("strided", "taps_strided", "identity", "split"),
    ("flat", "weight_flat", "strided_bias_relu", "planes"),
)
TYPES = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3"))


@dataclass(frozen=True)
class Boxes:
    """Tiles of windows behind descriptors: `masked` and `split` for the products of that kind."""

    plain: tuple[Tile, ...]
    masked: Tile
    split: Tile

    def of(self, a: str, store: str) -> tuple[Tile, ...]:
        if store == "split":
            return (self.split,)
        return (self.masked,) if READERS[a].masked else self.plain


# Of a masked gradient over its rows: one row, from many parts.
SUMS = {
    dtype: Combine("identity", "strided", dtype, rows=1, parts=32)
    for dtype in ("bf16", "fp16", "fp32")
}


@dataclass(frozen=True)
class Tiles:
    """Of one precision on one architecture.

    `small` and `narrow` are read through pointers, `narrow` for few rows. `large`, and `wide` where
    nothing is masked, through descriptors where the architecture has them, and `boxes` only there.
    """

    large: Tile
    small: Tile
    narrow: Tile
    wide: Tile | None = None
    large_masked: Tile | None = None
    small_masked: Tile | None = None
    boxes: Boxes | None = None

    def large_and_small(self, masked: bool) -> tuple[Tile, Tile]:
        if not masked:
            return self.large, self.small
        return self.large_masked or self.large, self.small_masked or self.small


@dataclass(frozen=True)
class Architecture:
    """`shared`: bytes of shared memory that a block may have on its smallest device."""

    tensors: bool
    shared: int
    halves: Tiles
    tf32: Tiles
    tf32x3: Tiles

    def tiles(self, precision: str) -> Tiles:
        return {"ieee": self.halves, "tf32": self.tf32, "tf32x3": self.tf32x3}[precision]


# Width of the tiles whose splits hold channels of one tap each.
SPLIT_COLUMNS = 64
_NARROW = Tile(16, 64, 128, 4, 3)
_NARROW_FLOAT = Tile(16, 64, 64, 4, 3)

_BOX = Tile(128, 128, 64, 8, 4)
_SLIM_BOX = Tile(128, 64, 64, 4, 4)  # for few filters; two of them share a multiprocessor
_MASKED_BOX = Tile(128, 128, 64, 8, 3)
_SPLIT_BOX = Tile(128, 64, 64, 8, 4)
_FLOAT_BOX = Tile(128, 128, 32, 8, 3)
_SMALL_FLOAT_BOX = Tile(128, 64, 16, 8, 3)
_FLOAT_BOXES = Boxes((_FLOAT_BOX,), _FLOAT_BOX, Tile(128, 64, 32, 8, 3))

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
_HOPPER = Architecture(
    tensors=True,
    shared=227 << 10,
    halves=Tiles(
        Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        _NARROW,
        wide=Tile(128, 256, 64, 8, 3),
        boxes=Boxes((_BOX, Tile(256, 128, 64, 8, 3), _SLIM_BOX), _MASKED_BOX, _SPLIT_BOX),
    ),
    tf32=Tiles(Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), _NARROW_FLOAT, boxes=_FLOAT_BOXES),
    tf32x3=Tiles(
        Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), _NARROW_FLOAT, boxes=_FLOAT_BOXES
    ),
)
_BLACKWELL = replace(
    _HOPPER,
    halves=replace(_HOPPER.halves, boxes=Boxes((_BOX, _SLIM_BOX), _MASKED_BOX, _SPLIT_BOX)),
    tf32=replace(_HOPPER.tf32, small=Tile(64, 64, 32, 4, 2)),
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
        boxes=Boxes(
            (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 4)),
            Tile(128, 128, 32, 8, 3),
            Tile(128, 64, 32, 4, 4),
        ),
    ),
    tf32=Tiles(
        Tile(128, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 4),
        _NARROW_FLOAT,
        large_masked=Tile(128, 128, 16, 8, 2),
        boxes=Boxes((Tile(128, 128, 16, 8, 3),), Tile(128, 128, 16, 8, 2), _SMALL_FLOAT_BOX),
    ),
    tf32x3=Tiles(
        Tile(128, 64, 16, 8, 3),
        Tile(64, 64, 16, 4, 3),
        _NARROW_FLOAT,
        boxes=Boxes((_SMALL_FLOAT_BOX,), _SMALL_FLOAT_BOX, _SMALL_FLOAT_BOX),
    ),
)
ARCHITECTURES = {
    80: _AMPERE,
    90: _HOPPER,
    100: _BLACKWELL,
    103: _BLACKWELL,
    120: _CONSUMER,
    121: _CONSUMER,
}


_ELEMENTS = (Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 4, 2))  # of halves, of floats


def _with_descriptors(variant: Product) -> Product:
    a = f"tensor_{variant.a.removeprefix('left_')}"
    return replace(variant, a=a, b=f"tensor_{variant.b}", store="tensor", persistent=True)


def mask_gradient(write: bool, summed: bool, dtype: str, vectors: bool) -> MaskGradient:
    """Addresses of single elements take the registers of half the rows."""
    return MaskGradient(write, summed, dtype, vectors, rows=64 if vectors else 32)


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
            for tile in (large, None if masked else tiles.wide):
                if tile:
                    variant = product(a, b, epilogue, tile)
                    yield _with_descriptors(variant) if architecture.tensors else variant
            yield product(a, b, epilogue, small)
        for a, b, epilogue in forward:
            yield product(a, b, epilogue, tiles.narrow)
        # Deep sums of small outputs.
        for a, b in FORWARD + GRAD_WEIGHT:
            yield product(a, b, "identity", tiles.small, "split")
        for a, b, epilogue in ELEMENTS:
            variant = product(a, b, epilogue, _ELEMENTS[dtype == "fp32"], "strided")
            yield replace(variant, vectors=False)
    for dtype in ("bf16", "fp16", "fp32"):
        for epilogue in ("strided_bias_relu", "identity"):
            yield Combine(epilogue, "strided", dtype)
        yield SUMS[dtype]
        for write, summed in ((True, True), (True, False), (False, True)):
            for vectors in (True, False):
                yield mask_gradient(write, summed, dtype, vectors)


def convolution(arch: int) -> Iterator[Variant]:
    """The variants of Conv+ReLU that Linear+ReLU does not have."""
    architecture = ARCHITECTURES[arch]
    for dtype, precision in TYPES:
        tiles = architecture.tiles(precision)
        for a, b, epilogue, store in WINDOWS:
            large, small = tiles.large_and_small(READERS[a].masked)
            for tile in (small,) if tiles.boxes else (large, small):
                yield Product(a, b, epilogue, store, dtype, precision, tile)
        assert tiles.small.n == _ELEMENTS[dtype == "fp32"].n == SPLIT_COLUMNS
        if tiles.boxes:
            assert tiles.boxes.split.n == SPLIT_COLUMNS
            for a, b, epilogue, store in BOXES:
                for tile in tiles.boxes.of(a, store):
                    yield Product(a, b, epilogue, store, dtype, precision, tile, persistent=True)
        for a in ("lines_masked", "left_lines"):
            yield Product(a, "taps", "identity", "split", dtype, precision, tiles.small)
        for a, b, epilogue, store in WINDOW_ELEMENTS:
            tile = _ELEMENTS[dtype == "fp32"]
            yield Product(a, b, epilogue, store, dtype, precision, tile, vectors=False)
    for dtype in ("bf16", "fp16", "fp32"):
        yield Combine("identity", "taps", dtype, cols=SPLIT_COLUMNS)


def variants(arch: int) -> list[Variant]:
    """Everything that is built for `arch`. Raises KeyError where nothing is."""
    return [*linear(arch), *convolution(arch)]
