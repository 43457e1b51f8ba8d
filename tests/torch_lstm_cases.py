"""Cases of the LSTM as torch tensors: our operators, and native layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.lstm_case import NOISE, ROWS
from tests.lstm_cases import LstmCase, LstmProblem
from tests.torch_cases import array, tensor
from twinfuse.torch._lstm_reference import ACTIVATIONS

GIVEN = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}
Arrays = dict[str, np.ndarray]


def operand(problem: LstmProblem, name: str, device: str = "cpu") -> Any:
    """As torch takes it: `[B, T, ...]` where the case is batch-first."""
    given = problem[name]
    if given is None:
        return None
    view = tensor(given, problem.dtype, device)
    return view.transpose(0, 1) if problem.case.batch_first and name in ROWS else view


def fused(problem: LstmProblem, leaves: dict[str, Any]) -> dict[str, Any]:
    case = problem.case
    names = ["input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
    scales = (leaves.get("peephole"), leaves.get("norm"))
    device = leaves["input"].device.type
    noise = [operand(problem, name, device) for name in NOISE]
    activations = [ACTIVATIONS[case.activation], ACTIVATIONS[case.recurrent_activation]]
    first = [leaves.get(name) for name in names]
    if case.cell:
        call = (*first[:7], *scales, *noise, *activations, case.norm_epsilon)
        return dict(zip(("h_n", "c_n"), torch.ops.twinfuse.lstm_cell(*call)))
    sizes = problem.batch_sizes
    mask = None if problem.mask is None else torch.from_numpy(problem.mask).to(device)
    output, h, c = torch.ops.twinfuse.lstm(
        *first,
        *scales,
        None if sizes is None else torch.from_numpy(sizes),
        mask.t() if case.batch_first and mask is not None else mask,
        *noise,
        case.batch_first,
        case.reverse,
        *activations,
        case.zero_masked_output,
        case.norm_epsilon,
    )
    return {"output": output, "h_n": h, "c_n": c}


def native(problem: LstmProblem, leaves: dict[str, Any]) -> dict[str, Any]:
    case = problem.case
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    weights = [leaves[name].contiguous() for name in names if name in leaves]  # as cuDNN wants them
    x, state = leaves["input"], (leaves.get("h0"), leaves.get("c0"))
    if case.cell:
        return dict(zip(("h_n", "c_n"), torch.lstm_cell(x, state, *weights)))
    if state[0] is None:
        state = tuple(x.new_zeros(case.batch, n) for n in (case.outputs, case.units))
    state = tuple(each.unsqueeze(0).contiguous() for each in state)
    # cuDNN computes gradients in training alone, which without a dropout changes nothing.
    options = (state, weights, "bias_ih" in leaves, 1, 0.0, True, False)
    if case.lengths:
        output, h, c = torch.lstm(x, torch.from_numpy(problem.batch_sizes), *options)
    else:
        output, h, c = torch.lstm(x, *options, case.batch_first)
    return {"output": output, "h_n": h.squeeze(0), "c_n": c.squeeze(0)}


def run(op: Any, problem: LstmProblem, device: str = "cpu") -> Arrays:
    """Results by name, `[T, B, ...]` whatever the layout."""
    leaves = {name: operand(problem, name, device).requires_grad_() for name in problem.leaves}
    outputs = op(problem, leaves)
    given = {n: operand(problem, g, device) for n, g in GIVEN.items() if problem[g] is not None}
    gradients = torch.autograd.grad(
        [outputs[name] for name in given], list(leaves.values()), list(given.values()),
        allow_unused=True,
    )  # fmt: skip
    results = dict(outputs)
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        results[f"grad_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    turned = {name for name in results if name in ROWS and problem.case.batch_first}
    return {n: array(t.transpose(0, 1) if n in turned else t) for n, t in results.items()}


def has_native(case: LstmCase) -> bool:
    """Whether native layers compute it, and compute it well."""
    extent = case.steps and case.batch and case.values in ("normal", "wide")
    return bool(case.in_torch and extent and not case.reverse)
