"""Fused Linear + ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from twinfuse.torch import _calls
from twinfuse.torch import _linear_relu_ops as _ops

__all__ = ["linear_relu"]

# Aliases, because a call on a tiny input costs as much as its guards.
_forward = _ops.forward
_apply = _ops.apply
_is_unusual = _calls.is_unusual
_grad_enabled = torch.is_grad_enabled


def _misfit(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if input.dim() < 1:
        return f"input: expected [..., K], got shape {list(input.shape)}"
    k = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k:
        return f"weight: expected [N, {k}], got shape {list(weight.shape)}"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return f"bias: expected [{weight.shape[0]}], got shape {list(bias.shape)}"
    return ""


_OP = _calls.Op("linear_relu", "linear_relu", _ops.public, _ops.reference, _misfit)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`relu(input @ weight.T + bias)` in one kernel, differentiable to any order.

    The same values, gradients, dtypes and errors as
    `torch.nn.functional.relu(torch.nn.functional.linear(input, weight, bias))`; a NaN passes
    through. A call that no kernel serves runs on torch's own operators, with a warning once per
    reason (see `twinfuse.explain` and `twinfuse.strict`).

    Args:
        input: `[..., K]`, any strides; float32, float64, bfloat16 or float16 for the fused kernels.
        weight: `[N, K]`, any strides.
        bias: `[N]`, or None.

    Returns:
        `[..., N]`, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together; the text names the argument,
            what was expected and what was got.
    """
    if _is_unusual(input, weight, bias):
        return _OP.unusual(input, weight, bias)
    try:
        if _grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _apply(input, weight, bias)
        return _forward(input, weight, bias)
    except RuntimeError as error:
        return _OP.refused(error, input, weight, bias)


_OP.serve(linear_relu)
serves = _OP.serves
