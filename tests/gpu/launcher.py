"""Runs variants of the GPU kernels in Triton's interpreter, on tensors in ordinary memory.

That arguments are divisible is a promise to the compiler; the interpreter computes without it, so
variants that read vectors run here on any sizes.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

ROOT = Path(__file__).resolve().parents[2]


def load_aot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aot", ROOT / "csrc/aot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    spec.loader.exec_module(module)
    return module


load_aot()
from twinfuse_kernels import catalogue, variants  # noqa: E402


@dataclass(frozen=True)
class Boxed:
    """A tensor behind a descriptor with a box of the host's choice, of as many elements as the
    block that the kernel knows; `steps` lie between those that it takes."""

    tensor: Tensor
    box: tuple[int, ...]
    steps: tuple[int, ...]


class Block(list[int]):
    """A block that still knows its box behind Triton's copies of a descriptor."""

    boxed: Boxed


class BoxHandle(interpreter.TensorDescHandle):
    """A descriptor as the hardware has it, where blocks are boxes."""

    boxed: Boxed

    def materialize_pointers(self, offsets: list[Any]) -> Any:
        box, steps = self.boxed.box, self.boxed.steps
        assert np.prod(box) == np.prod(self.block_shape)
        # An encoder counts the elements between, too, and takes 256.
        assert all(n * step <= 256 for n, step in zip(box, steps))
        at, inside = self.base.data, np.ones(box, bool)
        places = np.meshgrid(*map(np.arange, box), indexing="ij")
        for i, place in enumerate(places):
            index = int(offsets[i].data.item()) + place * steps[i]
            inside &= (index >= 0) & (index < self.shape[i].data)
            at = at + (index * self.strides[i].data * self.boxed.tensor.itemsize).astype(np.uint64)
        pointers = interpreter.TensorHandle(at.reshape(self.block_shape), self.base.dtype.scalar)
        return pointers, inside.reshape(self.block_shape)


def _converted(argument: Any, convert: Any = interpreter._implicit_cvt) -> Any:
    made = convert(argument)
    block = getattr(argument, "block_shape", None)
    if isinstance(block, Block):
        plain = made.handle
        made.handle = BoxHandle(
            plain.base, plain.shape, plain.strides, plain.block_shape, plain.padding
        )
        made.handle.boxed = block.boxed
    return made


interpreter._implicit_cvt = _converted


def descriptor(given: Tensor | Boxed, block: tuple[int, ...]) -> TensorDescriptor:
    if isinstance(given, Tensor):
        return TensorDescriptor(given, given.shape, given.stride(), list(block))
    sizes = Block(block)
    sizes.boxed = given
    return TensorDescriptor(given.tensor, given.tensor.shape, given.tensor.stride(), sizes)


def launch(variant: Any, programs: int, values: dict[str, Any]) -> None:
    """Every value must be an argument of the variant, and every argument have a value."""
    assert {a.name for a in variant.arguments()} == set(values)

    def value(argument: Any) -> Any:
        given = values[argument.name]
        return descriptor(given, argument.block) if argument.kind == "tensor" else given

    nothing = dict.fromkeys(variant.function.arg_names)
    call = nothing | variant.constants() | variants.bind(variant, value)
    variant.function[(programs,)](**call)


@cache
def find(arch: int = 90, **wanted: Any) -> Any:
    """The variant of smallest tiles with these attributes, or None."""
    found = [
        v
        for v in catalogue.variants(arch)
        if isinstance(v, variants.Product)
        and all(getattr(v, name) == value for name, value in wanted.items())
    ]
    return min(found, key=lambda v: v.tile.m * v.tile.n, default=None)


def divide(a: int, b: int) -> int:
    return -(-a // b)


def run(
    variant: Any,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    bias: Tensor | None = None,
    splits: int = 1,
    programs: int | None = None,
) -> None:
    """One product; `out` is [splits, rows, cols] where there are any."""
    values: dict[str, Any] = {
        "rows": a.shape[0],
        "cols": b.shape[0],
        "depth": a.shape[1],
        "steps": divide(a.shape[1], variant.tile.k),
        "splits": splits,
    }
    for side, matrix, mask in (("a", a, mask_a), ("b", b, mask_b)):
        values |= _operand(side, getattr(variant, side), matrix, mask)
    values |= _output(variant.store, out)
    values |= bias_values(variant.epilogue, bias, a.dtype)
    tiles = divide(len(a), variant.tile.m) * divide(len(b), variant.tile.n) * splits
    values["programs"] = min(programs or tiles, tiles)
    if tiles:
        launch(variant, values["programs"], values)


def _operand(side: str, reader: str, matrix: Tensor, mask: Tensor | None) -> dict[str, Any]:
    if reader.startswith("tensor_"):
        turn = "depth" not in reader
        values = {f"{side}_data": matrix.T if turn else matrix}
        if mask is not None:
            values[f"{side}_mask"] = mask.T if turn else mask
    elif reader.startswith("strided"):
        names = ("data", "stride", "step")
        values = dict(zip((f"{side}_{n}" for n in names), (matrix, *matrix.stride()), strict=True))
    else:
        along = 0 if "depth" in reader else 1
        values = {f"{side}_data": matrix, f"{side}_stride": matrix.stride(along)}
        if mask is not None:
            values |= {f"{side}_mask": mask, f"{side}_mask_stride": mask.stride(along)}
    if mask is not None:
        values[f"{side}_nan_passes"] = 1
    return values


def _output(store: str, out: Tensor) -> dict[str, Any]:
    values: dict[str, Any] = {"out_data": out}
    if store == "lines":
        values["out_stride"] = out.stride(0)
    elif store == "strided":
        values |= {"out_stride": out.stride(0), "out_step": out.stride(1)}
    return values


def bias_values(epilogue: str, bias: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    if epilogue == "identity":
        return {}
    data = bias if bias is not None else torch.zeros(1, dtype=dtype)
    values = {"bias_data": data, "bias_present": int(bias is not None)}
    if epilogue == "bias_relu":
        values["bias_data"] = data.contiguous()
    else:
        values["bias_stride"] = data.stride(0)
    return values
