"""The LSTM of the C API as tests call it: on the hostile memory of `tests.core_api`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.arrays import Array, Operand, lay_out
from tests.core_api import (
    OK,
    CallFailed,
    CContext,
    CTensor,
    Lender,
    MakeOutput,
    Output,
    guarded,
    operand_tensor,
)
from tests.core_api import load as load_core
from tests.lstm_problem import LEAVES, NOISE, ROWS, WEIGHTS, LstmCase, LstmProblem

ACTIVATIONS = {"tanh": 0, "sigmoid": 1, "relu": 2, "hard_sigmoid": 3}
TENSOR = ctypes.POINTER(CTensor)
SAVED = ("gates", "cells", "hidden")
FINAL = ("h_n", "c_n")
GRADIENTS = tuple(f"grad_{name}" for name in LEAVES)


class CState(ctypes.Structure):
    _fields_ = [("h", TENSOR), ("c", TENSOR)]


class CWeights(ctypes.Structure):
    _fields_ = [(name.removeprefix("weight_"), TENSOR) for name in WEIGHTS]


class CNoise(ctypes.Structure):
    _fields_ = [(name, TENSOR) for name in NOISE]


class CSaved(ctypes.Structure):
    _fields_ = [(name, TENSOR) for name in SAVED]


class CLstm(ctypes.Structure):
    _fields_ = [
        ("cell_activation", ctypes.c_int32),
        ("gate_activation", ctypes.c_int32),
        ("reverse", ctypes.c_int32),
        ("batch_major", ctypes.c_int32),
        ("batch_sizes", ctypes.POINTER(ctypes.c_int64)),
        ("steps", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64 * 2),
        ("zero_masked_output", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_double),
    ]


POINTERS = {
    kind: ctypes.POINTER(kind) for kind in (CState, CWeights, CNoise, CSaved, CLstm, CContext)
}
_INPUTS = [TENSOR, *(POINTERS[k] for k in (CState, CWeights, CNoise, CLstm, CContext))]
_GRADS = [TENSOR, POINTERS[CState], POINTERS[CWeights]]
_WEIGHTS = [POINTERS[k] for k in (CWeights, CNoise, CLstm, CContext)]
SIGNATURES: dict[str, list[Any]] = {
    "lstm_forward": [TENSOR, POINTERS[CState], POINTERS[CSaved], *_INPUTS],
    "lstm_backward": [*_GRADS, TENSOR, POINTERS[CState], POINTERS[CSaved], TENSOR, *_WEIGHTS],
    "lstm_cell_forward": [POINTERS[CState], TENSOR, *_INPUTS],
    "lstm_cell_backward": [*_GRADS, POINTERS[CState], TENSOR, *_INPUTS],
}


def function(name: str) -> Callable[..., int]:
    call = getattr(load_core(), f"twinfuse_{name}")
    call.argtypes = SIGNATURES[name]
    return call


Tensors = dict[str, "CTensor | None"]
Place = Callable[[Operand], Operand]


def group(kind: type[ctypes.Structure], names: Iterable[str], tensors: Tensors) -> Any:
    """A struct of pointers to the tensors of these names, or None if there are none."""
    given = [tensors.get(name) for name in names]
    if not any(given):
        return None
    return kind(*(None if a is None else ctypes.pointer(a) for a in given))


def weights_of(tensors: Tensors, prefix: str = "") -> Any:
    return group(CWeights, [prefix + name for name in WEIGHTS], tensors)


@dataclass
class Settings:
    """TwinfuseLstm, and the memory that it points to."""

    lstm: CLstm
    kept: list[Operand]


def settings(
    problem: LstmProblem,
    batch_major: bool | None = None,
    mask_layout: str = "contiguous",
    place: Place = lambda operand: operand,
) -> Settings:
    """Of a case; what the core must not look at is garbage."""
    case, kept = problem.case, []
    garbage = 0xBAD
    lstm = CLstm(
        ACTIVATIONS[case.activation],
        ACTIVATIONS[case.recurrent_activation],
        garbage if case.cell else case.reverse,
        case.batch_first if batch_major is None else batch_major,
        None,
        -garbage,
        None,
        (ctypes.c_int64 * 2)(-(1 << 62), 1 << 62),
        0,
        case.norm_epsilon,
    )
    if case.cell:
        lstm.batch_sizes = ctypes.cast(garbage, ctypes.POINTER(ctypes.c_int64))
        lstm.mask = garbage
    if (sizes := problem.batch_sizes) is not None:
        kept.append(place(Operand(sizes.astype(np.int64), sizes.shape, (1,), 0)))
        address = kept[-1].base.ctypes.data
        lstm.batch_sizes = ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))
        lstm.steps = case.steps
    if problem.mask is not None:
        # Whatever is not zero counts as one.
        shape = lay_out(np.zeros(case.sizes("mask")), mask_layout, "float32")
        base = np.zeros(max(shape.base.size, 1), np.uint8)
        operand = Operand(base, shape.sizes, shape.strides, shape.offset)
        numbers = 1 + np.arange(problem.mask.size).reshape(problem.mask.shape) % 255
        operand.view[...] = np.where(problem.mask, numbers, 0)
        kept.append(place(operand))
        lstm.mask = kept[-1].base.ctypes.data + kept[-1].offset
        lstm.mask_stride[:] = kept[-1].strides
        lstm.zero_masked_output = case.zero_masked_output
    return Settings(lstm, kept)


def laid(case: LstmCase, name: str, layout: str) -> str:
    """How an output of the core lies: batch-first cases have batch-first outputs."""
    return f"permuted {layout}" if case.batch_first and name in ROWS else layout


def row_count(case: LstmCase) -> int:
    return int(np.prod(case.sizes("input")[:-1]))


def saved_sizes(case: LstmCase) -> dict[str, tuple[int, ...]]:
    gates = (12 if case.norm else 4) * case.units
    widths = {"gates": gates, "cells": case.units, "hidden": case.outputs}
    return {name: (row_count(case), width) for name, width in widths.items()}


def in_order(problem: LstmProblem, saved: Array, batch_major: bool | None = None) -> Array:
    """Saved rows by step and sequence, [T, B, n]; packed ones and those of a cell as they are."""
    case = problem.case
    if case.cell or case.lengths:
        return saved
    batch_major = case.batch_first if batch_major is None else batch_major
    shape = (case.batch, case.steps) if batch_major else (case.steps, case.batch)
    rows = saved.reshape(*shape, -1) if saved.size else saved.reshape(*shape, saved.shape[-1])
    return rows.swapaxes(0, 1) if batch_major else rows


def forward(
    problem: LstmProblem,
    lender: Lender | None = None,
    layout: str = "contiguous",
    *,
    save: bool = True,
    wanted: tuple[str, ...] = ("output", *FINAL),
    make_output: MakeOutput = Output.poisoned,
    batch_major: bool | None = None,
    mask_layout: str = "contiguous",
    place: Place = lambda operand: operand,
) -> dict[str, Array]:
    """`output` (not of a cell), `h_n`, `c_n`, and what is saved, by name, in storage dtype."""
    lender = lender or Lender()
    case, dtype = problem.case, problem.dtype
    tensors: Tensors = {n: operand_tensor(a, dtype) for n, a in problem.operands.items()}
    outputs = {
        name: make_output(case.sizes(name), dtype, laid(case, name, layout))
        for name in wanted[case.cell and "output" in wanted :]
    }
    if save:
        sizes = saved_sizes(case)
        names = SAVED[:1] if case.cell else SAVED
        outputs |= {name: make_output(sizes[name], dtype, "contiguous") for name in names}
    tensors |= {name: output.tensor for name, output in outputs.items()}
    called = settings(problem, batch_major, mask_layout, place)
    final = group(CState, FINAL, tensors)
    if case.cell:
        written = [final, tensors.get("gates")]
    else:
        written = [tensors.get("output"), final, group(CSaved, SAVED, tensors)]
    status = function(f"lstm{'_cell' * case.cell}_forward")(
        *written,
        tensors["input"],
        group(CState, ("h0", "c0"), tensors),
        weights_of(tensors),
        group(CNoise, NOISE, tensors),
        called.lstm,
        lender.context(),
    )
    if status != OK:
        raise CallFailed(status, f"{case.id} {dtype}")
    lender.check()
    return {name: output.read(f"{case.id} {dtype} {name}") for name, output in outputs.items()}


def backward(
    problem: LstmProblem,
    saved: dict[str, Array],
    lender: Lender | None = None,
    layout: str = "contiguous",
    *,
    wanted: Iterable[str] = GRADIENTS,
    make_output: MakeOutput = Output.poisoned,
    batch_major: bool | None = None,
    mask_layout: str = "contiguous",
    place: Place = lambda operand: operand,
) -> dict[str, Array]:
    """Gradients of the core that are in `wanted` and that the case has, by name."""
    lender = lender or Lender()
    case, dtype = problem.case, problem.dtype
    tensors: Tensors = {n: operand_tensor(a, dtype) for n, a in problem.operands.items()}
    grads = {
        name: make_output(case.sizes(name), dtype, laid(case, name, layout))
        for name in wanted
        if name.removeprefix("grad_") in problem.operands
    }
    tensors |= {name: grad.tensor for name, grad in grads.items()}
    kept = {}
    for name in SAVED[:1] if case.cell else SAVED:
        kept[name] = make_output(saved_sizes(case)[name], dtype, "contiguous")
        kept[name].operand.view[...] = saved[name]
        tensors[name] = kept[name].tensor
    # What no gradient asked for reads is not lent.
    if "grad_weight_ih" not in grads:
        tensors["input"] = None
    called = settings(problem, batch_major, mask_layout, place)
    written = [
        tensors.get("grad_input"),
        group(CState, ("grad_h0", "grad_c0"), tensors),
        weights_of(tensors, "grad_"),
    ]
    given = group(CState, ("grad_h", "grad_c"), tensors)
    if case.cell:
        read = [given, tensors["gates"], tensors["input"], group(CState, ("h0", "c0"), tensors)]
    else:
        read = [tensors.get("grad_output"), given, group(CSaved, SAVED, tensors), tensors["input"]]
    status = function(f"lstm{'_cell' * case.cell}_backward")(
        *written,
        *read,
        weights_of(tensors),
        group(CNoise, NOISE, tensors),
        called.lstm,
        lender.context(),
    )
    if status != OK:
        raise CallFailed(status, f"{case.id} {dtype}")
    lender.check()
    for name, output in kept.items():
        assert np.array_equal(output.read(name), saved[name], equal_nan=True), f"{name} was written"
    return {name: grad.read(f"{case.id} {dtype} {name}") for name, grad in grads.items()}


def both_ways(problem: LstmProblem, **options: Any) -> dict[str, Array]:
    """All results, and what was saved."""
    results = forward(problem, **options)
    return results | backward(problem, results, **options)


def without_saved(results: dict[str, npt.NDArray[Any]]) -> dict[str, Array]:
    return {name: array for name, array in results.items() if name not in SAVED}


def guarded_problem(problem: LstmProblem, at_end: bool) -> LstmProblem:
    """`problem` with all its operands guarded."""
    named = {name: guarded(a, at_end) for name, a in problem.operands.items()}
    return replace(problem, operands=named)
