"""What tests of the LSTM on a GPU share: precisions, the rule in TF32, and large layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import twinfuse
from tests.lstm_cases import LstmProblem, assert_close, computed, reference
from tests.lstm_reference import Numbers
from tests.rule import assert_within_twice
from tests.torch_cases import array

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# With TF32 as native has it by default, float32 in full, and the halves.
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)

# Below these, terms of float32 lose bits as TF32 takes it apart, and a sum has many.
_FLUSHED = 128 * 2.0**-142
_TF32 = 2.0**-11  # roundoff


def dtype_of(precision: str) -> str:
    return "float32" if precision == "tf32" else precision


@contextmanager
def clean(precision: str = "float32", matrices: bool | None = None) -> Iterator[None]:
    """New memory is NaN, only "tf32" rounds float32 in products, and nothing falls back."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    backends.cudnn.allow_tf32 = precision == "tf32"
    backends.cuda.matmul.allow_tf32 = precision == "tf32" if matrices is None else matrices
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with twinfuse.strict():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before


@contextmanager
def skipping(unserved: object) -> Iterator[None]:
    """Skip, with the reason, what no GPU kernel takes; where that is not `unserved`, it fails."""
    try:
        yield
    except RuntimeError as error:  # the operators' own fall-back has no type of ours
        if not unserved or "runs on the framework's own layers" not in str(error):
            raise
        pytest.skip(str(error))


def assert_problem(
    problem: LstmProblem,
    precision: str,
    ours: Mapping[str, npt.ArrayLike],
    native: Mapping[str, npt.ArrayLike] | None,
) -> None:
    """The rule; in TF32 against a loop whose products round to it, as native may not."""
    if precision != "tf32":
        assert_close(problem, ours, native, _FLUSHED if precision == "float32" else 0.0)
        return
    exact = reference(problem)
    rivals = [computed(problem, np.float32, product=_product(seed))[1] for seed in (None, 1, 2, 3)]
    for name, wanted in exact.items():
        with np.errstate(invalid="ignore"):
            errors = [np.abs(each[name].astype(float) - wanted) for each in rivals[1:]]
        noise = max(float(e[np.isfinite(e)].max(initial=0)) for e in errors)
        assert_within_twice(
            ours[name], rivals[0][name], wanted, f"{problem.case.id} {name}", dtype="float32",
            flushed_below=_FLUSHED, noise=noise,
        )  # fmt: skip


def _product(seed: int | None) -> Callable[[Numbers, Numbers], Numbers]:
    """Of operands in TF32, to the nearest or, with a seed, moved as far at random."""
    random = np.random.default_rng(seed)

    def rounded(values: Numbers) -> Numbers:
        if seed is not None:
            by = random.uniform(-_TF32, _TF32, values.shape).astype(values.dtype)
            return values + by * values
        mantissa, exponent = np.frexp(values)
        return np.ldexp(np.round(mantissa * 2048) / 2048, exponent).astype(values.dtype)

    return lambda a, b: rounded(a) @ rounded(b)


class _Tf32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        x, w = _nearest(x), _nearest(w)
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x, w), grad = ctx.saved_tensors, _nearest(grad)
        return grad @ w, grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _nearest(values: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


Tensors = list[Tensor]


def layer(precision: str, steps: int, batch: int, inputs: int, units: int) -> Tensors:
    """input, h, c and weights."""
    sizes = (steps, batch, inputs), (batch, units), (batch, units)
    weights = (4 * units, inputs), (4 * units, units), (4 * units,), (4 * units,)
    scales = (1, 1, 1, inputs**-0.5, units**-0.5, units**-0.5, units**-0.5)
    return [
        (torch.randn(s, device="cuda") * scale).to(getattr(torch, dtype_of(precision)))
        for s, scale in zip((*sizes, *weights), scales)
    ]


def native(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensors:
    state = h.unsqueeze(0), c.unsqueeze(0)
    y, h, c = torch.lstm(x, state, list(weights), True, 1, 0.0, True, False, False)
    return [y, h.squeeze(0), c.squeeze(0)]


def composed(tf32: bool, backwards: bool, *leaves: Tensor) -> Tensors:
    """By operators that round every result to the dtype of `leaves`; with sums from the end."""
    x, h, c, ih, hh, bias_ih, bias_hh = leaves

    def linear(x: Tensor, w: Tensor) -> Tensor:
        x, w = (x.flip(-1), w.flip(-1)) if backwards else (x, w)
        return _Tf32Linear.apply(x, w) if tf32 else F.linear(x, w)

    outputs, from_input = [], linear(x, ih) + bias_ih
    for each in from_input.unbind(0):
        i, f, g, o = (each + linear(h, hh) + bias_hh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return [torch.stack(outputs), h, c]


NAMES = ("output", "h", "c", "input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


def trained(function: Callable[..., Tensors], tensors: Tensors, grads: Tensors) -> Tensors:
    """Outputs and the gradients of all of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    given = [g.to(leaves[0].dtype) for g in grads]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, given))]


def assert_layer(precision: str, ours: Tensors, tensors: Tensors, grads: Tensors) -> None:
    """The rule against native for outputs and, where there are any, gradients.

    Where native's errors happen to cancel, or it computes in float32 what may be in TF32, those of
    composed operators count, in two orders of sums.
    """
    exact = trained(native, [t.double() for t in tensors], grads)
    theirs = trained(native, tensors, grads)
    loops: list[Tensors] = []
    for k, (name, got) in enumerate(zip(NAMES, ours)):
        what, dtype = f"{name} of {[*tensors[0].shape]}", dtype_of(precision)
        results = (array(got), array(theirs[k]), array(exact[k]), what)
        try:
            assert_within_twice(*results, dtype=dtype)
        except AssertionError:
            loops = loops or [
                trained(partial(composed, precision == "tf32", backwards), tensors, grads)
                for backwards in (False, True)
            ]
            noise = max((loop[k].double() - exact[k]).abs().max().item() for loop in loops)
            assert_within_twice(*results, dtype=dtype, noise=noise)
