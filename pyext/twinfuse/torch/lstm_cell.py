"""Fused LSTM: one step of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from twinfuse.torch import _calls
from twinfuse.torch import _lstm_cell_ops as _ops
from twinfuse.torch._lstm_reference import ACTIVATIONS, zoneout_needs_gradient

__all__ = ["lstm_cell"]

State = tuple[Tensor, Tensor]

# Aliases, because a call on a tiny input costs as much as its guards.
_forward = _ops.forward
_apply = _ops.apply
_are_unusual = _calls.are_unusual
_grad_enabled = torch.is_grad_enabled
_Proxy = torch.fx.Proxy

_NAMES = (
    *("input", "hx[0]", "hx[1]", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    *("peephole", "zoneout_hidden", "zoneout_cell"),
)


def activation_numbers(op: str, activation: str, recurrent_activation: str) -> tuple[int, int]:
    """Those of the core."""
    for name, value in (
        ("activation", activation),
        ("recurrent_activation", recurrent_activation),
    ):
        if value not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"{op}: {name}: expected one of {known}, got {value!r}")
    return ACTIVATIONS[activation], ACTIVATIONS[recurrent_activation]


def pair(op: str, hx: Any) -> Sequence[Any]:
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{op}: hx: expected a pair of tensors, got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{op}: hx: expected two tensors, got {len(hx)}")
    return hx


def _named(*args: Any) -> _calls.Named:
    named = zip(_NAMES, args)
    return [(n, t) for i, (n, t) in enumerate(named) if i < 5 or t is not None]


def expected(name: str, tensor: Tensor, *sizes: int) -> str:
    if tensor.dim() == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes)):
        return ""
    return f"{name}: expected {list(sizes)}, got shape {list(tensor.shape)}"


def _misfit(*args: Any) -> str:
    input, weight_ih, zoneouts = args[0], args[3], args[8:10]
    if input.dim() != 2:
        return f"input: expected [B, I], got shape {list(input.shape)}"
    if weight_ih.dim() != 2 or weight_ih.shape[0] % 4:
        return f"weight_ih: expected [4H, I], got shape {list(weight_ih.shape)}"
    batch, gates = input.shape[0], weight_ih.shape[0]
    units = gates // 4
    wanted: list[tuple[int, ...]] = [
        (batch, units),
        (batch, units),
        (gates, input.shape[1]),
        (gates, units),
    ]
    wanted += [(gates,), (gates,), (3, units)]
    for name, tensor, sizes in zip(_NAMES[1:], args[1:8], wanted):
        if tensor is not None and (misfit := expected(name, tensor, *sizes)):
            return misfit
    for name, zoneout in zip(_NAMES[8:], zoneouts):
        if zoneout is not None and not broadcasts(zoneout, (batch, units)):
            return (
                f"{name}: expected what broadcasts to [{batch}, {units}], got shape "
                f"{list(zoneout.shape)}"
            )
    return zoneout_needs_gradient(*zoneouts)


def broadcasts(tensor: Tensor, sizes: Sequence[int]) -> bool:
    pairs = zip(reversed(tensor.shape), reversed(sizes))
    return tensor.dim() <= len(sizes) and all(n in (1, size) for n, size in pairs)


def _reference(*args: Any) -> State:
    extras = any(tensor is not None for tensor in args[7:10]) or args[10:] != (0, 1)
    # Native has no rule for vmap, neither of its own nor of its tangents.
    if extras or _calls.inside_transform() or forward_ad._current_level >= 0:
        return _ops.reference(*args)
    input, h, c, *weights = args[:7]
    return torch.lstm_cell(input, (h, c), *weights)


_OP = _calls.Op("lstm_cell", "lstm_cell", _ops.public, _reference, _misfit, _named, renamed=True)
_native_on_gpu = not _OP.has_kernels("cuda")  # as in `lstm`


def lstm_cell(
    input: Tensor,
    hx: State,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    peephole: Tensor | None = None,
    zoneout_hidden: Tensor | None = None,
    zoneout_cell: Tensor | None = None,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
) -> State:
    """One step of an LSTM in one kernel, differentiable to any order.

    The same values, gradients, dtypes and errors as
    `torch.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)`; under autocast, too, the
    state keeps native's dtype, the wider one of autocast's and of `hx[1]`. A call that no kernel
    serves runs on torch's own operators, with a warning once per reason (see `twinfuse.explain` and
    `twinfuse.strict`).

    Args:
        input: `[B, I]`, any strides, as all of them; float32, float64, bfloat16 or float16 for the
            fused kernels.
        hx: h and c before the step, `[B, H]` each.
        weight_ih, weight_hh: `[4H, I]` and `[4H, H]`, in the order i, f, g, o.
        bias_ih, bias_hh: `[4H]`, or None.
        peephole: `[3, H]`, weights of the cell state in the gates i, f (of the old one) and o (of
            the new one).
        zoneout_hidden, zoneout_cell: the share of the old state that stays, of any shape that
            broadcasts to `[B, H]`: zeros and ones drawn at random in training, their mean
            otherwise. The kernels have no gradient of them.
        activation, recurrent_activation: of g and the new cell state, and of the other gates:
            "tanh", "sigmoid", "relu" or "hard_sigmoid".

    Returns:
        h and c after the step, `[B, H]` each, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together; the text names the argument,
            what was expected and what was got.
        TypeError: `hx` is no pair, or an argument is no tensor.
        ValueError: an unknown activation.
    """
    if isinstance(input, _Proxy):
        return handle_torch_function(
            lstm_cell,
            (input,),
            *(input, hx, weight_ih, weight_hh, bias_ih, bias_hh),
            peephole=peephole,
            zoneout_hidden=zoneout_hidden,
            zoneout_cell=zoneout_cell,
            activation=activation,
            recurrent_activation=recurrent_activation,
        )
    h, c = hx if type(hx) is tuple and len(hx) == 2 else pair("lstm_cell", hx)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, peephole, zoneout_hidden, zoneout_cell)
    act, gate = 0, 1
    if activation != "tanh" or recurrent_activation != "sigmoid":
        act, gate = activation_numbers("lstm_cell", activation, recurrent_activation)
    args = (input, h, c, *weights, act, gate)
    if _are_unusual(args[:10]) or (_native_on_gpu and input.is_cuda):
        return _OP.unusual(*args)
    try:
        if _grad_enabled() and (
            input.requires_grad
            or h.requires_grad
            or c.requires_grad
            or weight_ih.requires_grad
            or weight_hh.requires_grad
            or (bias_ih is not None and bias_ih.requires_grad)
            or (bias_hh is not None and bias_hh.requires_grad)
            or (peephole is not None and peephole.requires_grad)
            or (zoneout_hidden is not None and zoneout_hidden.requires_grad)
            or (zoneout_cell is not None and zoneout_cell.requires_grad)
        ):
            if zoneout_needs_gradient(zoneout_hidden, zoneout_cell):
                return _OP.unusual(*args)
            return _apply(*args)
        h, c, _ = _forward(*args, False)
        return h, c
    except Exception as error:
        return _OP.refused(error, *args)


def _arguments(
    input: Tensor,
    hx: State,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    activation: str,
    recurrent_activation: str,
    **tensors: Tensor | None,
) -> tuple[Any, ...]:
    numbers = activation_numbers("lstm_cell", activation, recurrent_activation)
    return input, *hx, weight_ih, weight_hh, bias_ih, bias_hh, *tensors.values(), *numbers


_OP.serve(lstm_cell, _arguments)
