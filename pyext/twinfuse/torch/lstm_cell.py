"""Fused LSTM: one step of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from twinfuse import _core
from twinfuse.torch import _binding, _calls, _operators
from twinfuse.torch import _lstm_cell_ops as _ops
from twinfuse.torch._lstm_reference import ACTIVATIONS, missing_on_gpu, noise_needs_gradient

__all__ = ["lstm_cell"]

State = tuple[Tensor, Tensor]

# Aliases, because a call on a tiny input costs as much as its guards.
_forward = _ops.forward
_apply = _ops.apply
_are_unusual = _calls.are_unusual
_grad_enabled = torch.is_grad_enabled
_Proxy = torch.fx.Proxy
_raising = _binding.raising

_NAMES = (
    *("input", "hx[0]", "hx[1]", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    *("peephole", "norm", "zoneout_hidden", "zoneout_cell", "dropout_input", "dropout_hidden"),
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


def check_epsilon(op: str, norm_epsilon: float) -> None:
    if not norm_epsilon >= 0:
        raise ValueError(f"{op}: norm_epsilon: expected 0 or more, got {norm_epsilon}")


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
    input, weight_ih, noise = args[0], args[3], args[9:13]
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
    wanted += [(gates,), (gates,), (3, units), (2, gates)]
    for name, tensor, sizes in zip(_NAMES[1:], args[1:9], wanted):
        if tensor is not None and (misfit := expected(name, tensor, *sizes)):
            return misfit
    wanted = [(batch, units), (batch, units), (4, batch, input.shape[1]), (4, batch, units)]
    for name, tensor, sizes in zip(_NAMES[9:], noise, wanted):
        if tensor is not None and (misfit := broadcast(name, tensor, *sizes)):
            return misfit
    given = dict(zip((*_NAMES[7:9], *_NAMES[11:]), (*args[7:9], *noise[2:])))
    return noise_needs_gradient(*noise) or missing_on_gpu(input, given)


def broadcast(name: str, tensor: Tensor, *sizes: int) -> str:
    """As `expected`, for what may have any shape that broadcasts."""
    pairs = zip(reversed(tensor.shape), reversed(sizes))
    if tensor.dim() <= len(sizes) and all(n in (1, size) for n, size in pairs):
        return ""
    return f"{name}: expected what broadcasts to {list(sizes)}, got shape {list(tensor.shape)}"


def _reference(*args: Any) -> State:
    # Native has no rule for vmap, neither of its own nor of its tangents.
    if len(args) > _ops.PLAIN or _calls.inside_transform() or forward_ad._current_level >= 0:
        return _ops.reference(*args)
    input, h, c, *weights = args[:7]
    return torch.lstm_cell(input, (h, c), *weights)


def _on_gpu(backward: bool, dtype: str, input: Tensor, h: Tensor, *_: Any) -> str:
    sizes = {"steps": 1, "batch": h.shape[0], "units": h.shape[1]}
    tf32 = _operators.allows_tf32(torch.backends.cuda.matmul)
    return _core.lstm_gpu_kernel(backward, dtype, tf32, input.device.index, **sizes)


_OP = _calls.Op(
    *("lstm_cell", "lstm_cell", _ops.public, _reference, _misfit, _named),
    renamed=True,
    on_gpu=_on_gpu,
)
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
    norm: Tensor | None = None,
    norm_epsilon: float = 1e-5,
    zoneout_hidden: Tensor | None = None,
    zoneout_cell: Tensor | None = None,
    dropout_input: Tensor | None = None,
    dropout_hidden: Tensor | None = None,
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
        norm: `[2, 4H]`, scales of W_ih x and of W_hh h, each of which is normalised over all of its
            4H elements (less their mean, over the root of their variance plus `norm_epsilon`)
            before biases are added.
        zoneout_hidden, zoneout_cell: the share of the old state that stays, of any shape that
            broadcasts to `[B, H]`: zeros and ones drawn at random in training, their mean
            otherwise.
        dropout_input, dropout_hidden: factors of the input and of h in the products of each gate,
            of any shape that broadcasts to `[4, B, I]` and `[4, B, H]`: 0 or `1 / (1 - rate)`.
            The kernels have no gradient of these four.
        activation, recurrent_activation: of g and the new cell state, and of the other gates:
            "tanh", "sigmoid", "relu" or "hard_sigmoid".

    Returns:
        h and c after the step, `[B, H]` each, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together; the text names the argument,
            what was expected and what was got.
        TypeError: `hx` is no pair, or an argument is no tensor.
        ValueError: an unknown activation, or an epsilon below 0.
    """
    if isinstance(input, _Proxy):
        return handle_torch_function(
            lstm_cell,
            (input,),
            *(input, hx, weight_ih, weight_hh, bias_ih, bias_hh),
            peephole=peephole,
            norm=norm,
            norm_epsilon=norm_epsilon,
            zoneout_hidden=zoneout_hidden,
            zoneout_cell=zoneout_cell,
            dropout_input=dropout_input,
            dropout_hidden=dropout_hidden,
            activation=activation,
            recurrent_activation=recurrent_activation,
        )
    h, c = hx if type(hx) is tuple and len(hx) == 2 else pair("lstm_cell", hx)
    args: tuple[Any, ...] = (input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    is_plain = True
    if (
        peephole is not None
        or norm is not None
        or zoneout_hidden is not None
        or zoneout_cell is not None
        or dropout_input is not None
        or dropout_hidden is not None
        or activation != "tanh"
        or recurrent_activation != "sigmoid"
    ):
        is_plain = False
        args += (peephole, norm, zoneout_hidden, zoneout_cell, dropout_input, dropout_hidden)
        if norm is not None or activation != "tanh" or recurrent_activation != "sigmoid":
            check_epsilon("lstm_cell", norm_epsilon)
            numbers = activation_numbers("lstm_cell", activation, recurrent_activation)
            args += (*numbers, norm_epsilon)
    if _are_unusual(args[:13]) or (_native_on_gpu and input.is_cuda):
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
            or not (is_plain or all(t is None or not t.requires_grad for t in args[7:13]))
        ):
            if not is_plain and noise_needs_gradient(*args[9:13]):
                return _OP.unusual(*args)
            if not input.is_cuda:
                return _apply(*args)
            with _raising:
                return _apply(*args)
        if not input.is_cuda:
            h, c, _ = _forward(False, *args)
            return h, c
        with _raising:
            h, c, _ = _forward(False, *args)
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
    norm_epsilon: float,
    **tensors: Tensor | None,
) -> tuple[Any, ...]:
    numbers = (*activation_numbers("lstm_cell", activation, recurrent_activation), norm_epsilon)
    return input, *hx, weight_ih, weight_hh, bias_ih, bias_hh, *tensors.values(), *numbers


_OP.serve(lstm_cell, _arguments)
