"""A problem as the interpreter computes it: bfloat16 as float32 on values rounded to it, since the
interpreter's own bfloat16 is not right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from tests.arrays import Operand, encode
from tests.problem import Problem
from tests.torch_cases import tensor


def operands(
    problem: Problem, view: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Input, weight, bias and gradient; `view` makes of all but the bias what the kernels take."""

    def read(operand: Operand) -> Tensor:
        t = tensor(operand, problem.dtype)
        return t.float() if problem.dtype == "bfloat16" else t

    x, w, g = (view(read(o)) for o in (problem.input, problem.weight, problem.grad_output))
    return x, w, read(problem.bias) if problem.bias else None, g


def result(problem: Problem, t: Tensor, sizes: tuple[int, ...]) -> np.ndarray:
    """In the storage type of the problem."""
    values = t.reshape(sizes).numpy()
    return encode(values, "bfloat16") if problem.dtype == "bfloat16" else values
