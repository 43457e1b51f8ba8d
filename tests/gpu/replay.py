"""Runs what the core has launched on the fake driver: in Triton's interpreter, on ordinary memory.

The kernel of a launch is known by its machine code alone. Its arguments are the bytes that the
launch handed over, split by the machine code's own table, which must be that of `kernels.json`; so
neither the core's table of kernels nor its order of arguments is taken on trust.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.arrays import Array
from tests.conftest import skip
from tests.core_api import CANARY, GUARD, OPAQUE, CContext, Lender
from tests.gpu import fake_driver, launcher
from tests.gpu.fake_driver import Launch
from twinfuse import _jit

aot = sys.modules["aot"]
# Those that setup.py builds the core with.
FOLDER = Path(os.environ.get("TWINFUSE_KERNELS") or launcher.ROOT / "build" / "kernels")
CUDA = 1
IEEE, TF32 = range(2)  # TwinfusePrecision
# Of kernels that take float32; plain products serve where few are summed.
PRECISIONS = {IEEE: ("tf32x3", "ieee"), TF32: ("tf32",)}
ALIGNMENT = 256  # that of scratch on a GPU, in both frameworks
SIZES = {"data": 8, "fp32": 8, "i32": 4, "i64": 8}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# CUtensorMapDataType
DESCRIBED = {"fp32": 7, "fp16": 6, "bf16": 9}
ROUNDED = 11  # float32 that is a factor in TF32
HIDDEN = 2  # pointers behind the parameters: scratch that no kernel needs
ENCODING = struct.Struct("<2Q5Q4Q5H5B6B")
MAGIC = 0x50414D454B4146


@functools.cache
def kernels() -> dict[str, list[dict[str, Any]]]:
    """Descriptions of the compiled kernels, by their machine code. Some share it: those that copy
    halves do not care of what kind."""
    if not aot.embed.up_to_date(FOLDER):
        skip("kernels", f"{FOLDER} is not what csrc/triton makes: run `make kernels`")
    table = json.loads((FOLDER / "kernels.json").read_text())
    found: dict[str, list[dict[str, Any]]] = {}
    for kernel in table:
        image = (FOLDER / kernel["file"]).read_bytes()
        found.setdefault(_key(image, sizes(kernel)), []).append(kernel)
    return found


@functools.cache
def architectures() -> set[int]:
    return {kernel["arch"] for same in kernels().values() for kernel in same}


def _key(image: bytes, parameters: list[int]) -> str:
    return f"{hashlib.sha256(image).hexdigest()} {parameters}"


def sizes(kernel: dict[str, Any]) -> list[int]:
    """Of the compiled kernel's parameters: sizes and strides of a tensor follow its descriptor."""
    found = []
    for parameter in kernel["parameters"]:
        rank = len(parameter["box"] or [])
        if parameter["kind"] == "tensor":
            found += [128] + [4] * rank + [8] * rank
        else:
            found.append(SIZES[parameter["kind"]])
    return found + [8] * HIDDEN


def kernel_of(launch: Launch, dtype: str) -> dict[str, Any]:
    """The one for the call's type, where several share their code."""
    key = _key(launch.image, [len(argument) for argument in launch.arguments])
    made = [kernel.description for kernel in _jit.compiled.values() if _made(kernel) == key]
    same = made or kernels().get(key)
    assert same, (
        f"{launch.entry}: no kernel of {FOLDER} has this code and these parameters; was the core "
        "built before `make kernels`?"
    )
    return next((k for k in same if k["variant"]["dtype"] == NAMES[dtype]), same[0])


def _made(kernel: _jit.Compiled) -> str:
    return _key(kernel.image, sizes(kernel.description))


@functools.cache
def variants_of(arch: int) -> dict[str, Any]:
    return {variant.name: variant for variant in launcher.catalogue.variants(arch)}


def variant_of(kernel: dict[str, Any]) -> Any:
    variant = variants_of(kernel.get("listed", kernel["arch"]))[kernel["name"]]
    assert json.loads(json.dumps(asdict(variant))) == kernel["variant"], kernel["name"]
    return variant


@dataclass(frozen=True)
class Pointer:
    address: int
    dtype: torch.dtype

    def interpreted(self) -> Tensor:
        """The interpreter looks at the address and the type alone. It refuses null, in place of
        which is a NaN that shows if it is read."""
        if not self.address:
            return torch.full((1,), torch.nan, dtype=self.dtype)
        memory = (ctypes.c_char * self.dtype.itemsize).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype)


@dataclass(frozen=True)
class Described:
    """What a kernel reads or writes through a descriptor; strides in elements."""

    base: Pointer
    sizes: list[int]
    strides: list[int]
    block: tuple[int, ...]  # as the kernel knows it
    box: tuple[int, ...]  # of as many elements, in the tensor
    steps: tuple[int, ...]

    def interpreted(self) -> TensorDescriptor:
        base, block = self.base.interpreted(), launcher.Block(self.block)
        block.boxed = launcher.Boxed(base, self.box, self.steps)
        return TensorDescriptor(base, self.sizes, self.strides, block)


@dataclass(frozen=True)
class Tensors:
    """A descriptor as it was encoded; outermost dimension first, strides in bytes."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    traversal: tuple[int, ...]
    type: int
    interleave: int
    swizzle: int
    fill: int

    @classmethod
    def decode(cls, raw: bytes) -> Tensors:
        magic, address, *rest = ENCODING.unpack_from(raw)
        assert magic == MAGIC
        size, stride, box, traversal = (
            rest[start:stop] for start, stop in itertools.pairwise((0, 5, 9, 14, 19))
        )
        rank, kind, interleave, swizzle, _, fill = rest[19:]

        def turned(values: list[int], count: int) -> tuple[int, ...]:
            return tuple(reversed(values[:count]))

        return cls(
            address,
            turned(size, rank),
            turned(stride, rank - 1),
            turned(box, rank),
            turned(traversal, rank),
            kind,
            interleave,
            swizzle,
            fill,
        )


def _described(
    parameter: dict[str, Any], block: tuple[int, ...], raw: Iterator[bytes], variant: Any
) -> Described:
    dtype = variant.dtype
    tensors = Tensors.decode(next(raw))
    name, compiled, width = parameter["name"], parameter["box"], DTYPES[dtype].itemsize
    rank = len(compiled)
    assert len(tensors.sizes) == rank, name
    rounded = variant.precision == "tf32" and name in ("a_data", "b_data")
    assert tensors.type == (ROUNDED if rounded else DESCRIBED[dtype]), name
    assert tensors.swizzle == parameter["swizzle"], name
    assert (tensors.interleave, tensors.fill) == (0, 0), name
    follow = [int.from_bytes(next(raw), "little", signed=True) for _ in range(2 * rank)]
    assert follow[:rank] == list(tensors.sizes), f"{name}: {follow} behind {tensors}"
    assert all(stride % width == 0 for stride in tensors.strides), name
    strides = [*(stride // width for stride in tensors.strides), 1]
    assert follow[rank:] == strides, f"{name}: {follow} behind {tensors}"
    # What the encoder calls a box counts the elements between those that are taken, too.
    steps = tensors.traversal
    box = tuple(-(-n // step) for n, step in zip(tensors.box, steps, strict=True))
    if rank == 2:
        assert (box, steps) == (tuple(compiled), (1, 1)), f"{name}: {tensors}"
    # Pixels lie in a box of any shape. Several boxes of channels side by side may fill a block.
    assert box[-1] == compiled[-1] and block[-1] % box[-1] == 0, f"{name}: {tensors}"
    box = (*box[:-1], block[-1])
    assert np.prod(box) == np.prod(block), f"{name}: {tensors} for blocks of {block}"
    base = Pointer(tensors.address, DTYPES[dtype])
    return Described(base, list(tensors.sizes), strides, block, box, steps)


def arguments(launch: Launch, kernel: dict[str, Any], variant: Any) -> dict[str, Any]:
    """The values of a launch, after checking every promise."""
    raw = iter(launch.arguments)
    values: dict[str, Any] = {}
    for parameter, argument in zip(kernel["parameters"], variant.arguments(), strict=True):
        name, kind = parameter["name"], parameter["kind"]
        assert (argument.name, argument.kind) == (name, kind)
        if kind == "tensor":
            values[name] = _described(parameter, argument.block, raw, variant)
            continue
        number = int.from_bytes(next(raw), "little", signed=kind in ("i32", "i64"))
        if parameter["divisible"]:
            assert number % 16 == 0, f"{kernel['name']}: {name} is {number}"
        if kind in ("data", "fp32"):
            dtype = DTYPES[variant.dtype if kind == "data" else "fp32"]
            assert number % dtype.itemsize == 0, f"{kernel['name']}: {name} is {number:#x}"
            values[name] = Pointer(number, dtype)
        else:
            values[name] = number
    assert list(raw) == [bytes(8)] * HIDDEN
    return values


@dataclass(frozen=True)
class Ran:
    """A launch that was understood."""

    launch: Launch
    kernel: dict[str, Any]
    variant: Any
    values: dict[str, Any]

    @classmethod
    def decode(cls, launch: Launch, dtype: str) -> Ran:
        kernel = kernel_of(launch, dtype)
        variant = variant_of(kernel)
        assert launch.entry == kernel["entry"]
        assert launch.block == (32 * kernel["warps"], 1, 1)
        assert launch.shared == kernel["shared"]
        assert launch.attributes == 0
        assert launch.grid[1:] == (1, 1)
        return cls(launch, kernel, variant, arguments(launch, kernel, variant))

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def is_product(self) -> bool:
        return isinstance(self.variant, launcher.variants.Product)

    def interpret(self) -> None:
        assert self.variant.dtype != "bf16", "the interpreter computes wrongly in it"
        nothing = dict.fromkeys(self.variant.function.arg_names)

        def value(argument: Any) -> Any:
            found = self.values[argument.name]
            return found if isinstance(found, int) else found.interpreted()

        given = launcher.variants.bind(self.variant, value)
        call = nothing | self.variant.constants() | given
        self.variant.function[self.launch.grid](**call)


@dataclass
class GpuLender(Lender):
    """A framework's side of one call on a GPU. `check`, which comes before results are read,
    decodes the launches and, unless told not to, runs them."""

    device: int = CUDA
    dtype: str = "float32"  # of the call
    index: int = fake_driver.PLAIN
    stream: int | None = None
    precision: int = IEEE
    interpret: bool = True
    ran: list[Ran] = field(default_factory=list)
    first: int = 0

    def context(self) -> CContext:
        self.first = fake_driver.load().launch_count
        context = super().context()
        context.device_index, context.stream = self.index, self.stream
        context.precision = self.precision
        return context

    def _allocate(self, opaque: int, size: int) -> int | None:
        """Aligned as frameworks do it, or nearly; full of NaN in every dtype."""
        if opaque != OPAQUE:
            self.errors.append(f"allocate: opaque is {opaque:#x}")
        if len(self.scratch) == self.fail_allocation:
            return None
        buffer: Array = np.full(size + 2 * GUARD + ALIGNMENT, 0xFF, np.uint8)
        start = GUARD + -(buffer.ctypes.data + GUARD) % ALIGNMENT
        buffer[:start] = CANARY
        buffer[start + size :] = CANARY
        self.scratch.append((buffer, start, size))
        return buffer.ctypes.data + start

    def check(self) -> None:
        launches = fake_driver.load().launches(self.first)
        for launch in launches:
            assert launch.stream == self.stream
            ran = Ran.decode(launch, self.dtype)
            assert ran.variant.dtype == NAMES[self.dtype], ran.name
            if ran.is_product and ran.variant.dtype == "fp32":
                assert ran.variant.precision in PRECISIONS[self.precision]
            self.ran.append(ran)
        if self.interpret:
            for ran in self.ran[-len(launches) :] if launches else []:
                ran.interpret()
        super().check()

    @property
    def names(self) -> list[str]:
        return [ran.name for ran in self.ran]
