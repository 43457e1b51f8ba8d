"""The cases of the tables as torch tensors, and the native ops they are compared with."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.arrays import Operand
from tests.conv_case import ConvCase
from tests.problem import Case, Problem, Results, build, reference64
from tests.rule import assert_within_twice

Op = Callable[..., Tensor]

_PERTURB = -6  # glibc's M_PERTURB
_PATTERN = 0x80  # new memory is filled with its complement: 3.4e38 in float32, NaN in float16


def native(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def native_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    conv = F.conv1d if weight.dim() == 3 else F.conv2d
    return F.relu(conv(input, weight, bias, *args, **options))


def conv_calls(case: ConvCase) -> tuple[Op, Op]:
    """The op with the options of `case`, ours and native.

    Where the padding differs between the two ends, only our operator can say it.
    """
    import twinfuse.torch

    stride, padding, *rest = case.torch_arguments
    symmetric = case.symmetric
    ours = getattr(twinfuse.torch if symmetric else torch.ops.twinfuse, case.name)
    pads = [n for pair in reversed(case.padding) for n in pair]

    def our_call(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return ours(x, w, b, stride, padding, *rest)

    def native_call(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        x = x if symmetric else F.pad(x, pads)
        return native_conv(x, w, b, stride, padding if symmetric else 0, *rest)

    return our_call, native_call


def tensor(operand: Operand, dtype: str, device: str = "cpu") -> Tensor:
    """A view with the operand's sizes, strides and offset, on storage of its own."""
    base = torch.from_numpy(operand.base.copy()).to(device)
    if dtype == "bfloat16":
        base = base.view(torch.bfloat16)
    return base.as_strided(operand.sizes, operand.strides, operand.offset)


def array(result: Tensor) -> np.ndarray:
    result = result.detach().cpu()
    return (result.view(torch.uint16) if result.dtype == torch.bfloat16 else result).numpy()


def arguments(problem: Problem, requires_grad: bool = True, device: str = "cpu") -> list[Tensor]:
    operands = [problem.input, problem.weight] + ([problem.bias] if problem.bias else [])
    return [tensor(o, problem.dtype, device).requires_grad_(requires_grad) for o in operands]


def run(op: Op, problem: Problem, device: str = "cpu") -> Results:
    inputs = arguments(problem, device=device)
    output = op(*inputs)
    grad_output = tensor(problem.grad_output, problem.dtype, device)
    gradients = torch.autograd.grad(output, inputs, grad_output)
    grad_bias = array(gradients[2]) if problem.bias else np.zeros(problem.case.weight_sizes[0])
    return Results(array(output), array(gradients[0]), array(gradients[1]), grad_bias)


def check(op: Op, case: Case, dtype: str, rival: Op = native) -> None:
    """The op's outputs and gradients are at most twice as far off as those of `rival`."""
    problem = build(case, dtype)
    with poisoned_memory():
        ours = run(op, problem)
    compare(problem, ours, rival)


def in_float32(op: Op) -> Op:
    """`op` computed in float32, with results of its arguments' dtype."""

    def wide(input: Tensor, *others: Tensor) -> Tensor:
        return op(input.float(), *(tensor.float() for tensor in others)).to(input.dtype)

    return wide


def compare(problem: Problem, ours: Results, rival: Op, device: str = "cpu") -> None:
    """Asserts the rule for every result that the case has."""
    case = problem.case
    if device != "cpu" and case.values in ("large", "nonfinite"):
        # There, and on CPUs in bfloat16, torch's convolutions may sum in tiles, where one infinity
        # reaches several outputs.
        theirs = run(in_float32(rival), problem)
    else:
        theirs = run(rival, problem, device)
    expected = reference64(problem, "select", output=ours.output)
    for name in ("output", "grad_input", "grad_weight", "grad_bias")[: 4 if case.bias else 3]:
        values = (getattr(results, name) for results in (ours, theirs, expected))
        # Terms of TF32 lose the last bits of denormals.
        flushed = 2.0**-142 if device != "cpu" and problem.dtype == "float32" else 0.0
        what = f"{case.id} {name}"
        assert_within_twice(*values, what, dtype=problem.dtype, flushed_below=flushed)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch allocates holds garbage, so that an element nobody wrote shows."""
    mallopt = ctypes.CDLL(None).mallopt
    # AddressSanitizer's malloc refuses, and has an option of its own for this.
    asan = os.environ.get("ASAN_OPTIONS", "")
    assert mallopt(_PERTURB, _PATTERN) == 1 or "malloc_fill_byte" in asan
    try:
        yield
    finally:
        mallopt(_PERTURB, 0)


def random(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    """Reproducible whatever ran before, but different from call to call of one test."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def assert_same(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
