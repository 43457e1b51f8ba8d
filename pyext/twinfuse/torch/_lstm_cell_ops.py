"""The `lstm_cell` operators: what torch must know about them besides their kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from twinfuse import _backend
from twinfuse.torch import _lstm_cell_reference, _operators
from twinfuse.torch._lstm_reference import zoneout_needs_gradient

# Operators take `_TENSORS` tensors and the two activations; the private one takes `save`, too.
# Those with gradients come first.
_TENSORS = 10
_OPTIONS = _TENSORS + 2
_DIFFERENTIABLE = 8
_DEFAULTS = (*(None,) * _TENSORS, 0, 1)

_ARGUMENTS = (
    "Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih{0}, "
    "Tensor? bias_hh{0}, Tensor? peephole{0}, Tensor? zoneout_hidden{0}, Tensor? zoneout_cell{0}, "
    "int activation{1}, int recurrent_activation{2}"
)
_PUBLIC = f"({_ARGUMENTS.format('=None', '=0', '=1')}) -> (Tensor, Tensor)"
_PRIVATE = f"({_ARGUMENTS.format('', '', '')}, bool save) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor input, Tensor h, Tensor c, "
    "Tensor weight_ih, Tensor weight_hh, Tensor? peephole, Tensor? zoneout_hidden, "
    "Tensor? zoneout_cell, int activation, int recurrent_activation, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_reference_forward: Callable[..., Any] = _lstm_cell_reference.forward
_reference_backward: Callable[..., Any] = _lstm_cell_reference.backward


_complete = functools.partial(_operators.complete, _DEFAULTS)


def reference(*args: Any) -> tuple[Tensor, Tensor]:
    """The public operator by torch's own."""
    return _reference_forward(*_complete(args), False)[:2]


_operators.define(
    {
        f"lstm_cell{_PUBLIC}": reference,
        f"_lstm_cell{_PRIVATE}": _reference_forward,
        f"_lstm_cell_backward{_BACKWARD}": _reference_backward,
    }
)
# What the binding calls where no kernel serves.
_operators.define(
    {
        f"_lstm_cell_reference{_PRIVATE}": _reference_forward,
        f"_lstm_cell_reference_backward{_BACKWARD}": _reference_backward,
    },
    always=True,
)

public = torch.ops.twinfuse.lstm_cell.default
# The builtin below an OpOverload skips a Python call.
forward = torch.ops.twinfuse._lstm_cell.default._op
backward = torch.ops.twinfuse._lstm_cell_backward.default._op


def _of_backward(grads: Sequence[Any], gates: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The backward operator's arguments, but for `needs`, of those of forward."""
    return (*grads, gates, *args[:5], *args[7:])


class LstmCell(torch.autograd.Function):
    """The cell with its gradients, for calls outside of torch.func transforms."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        h, c, gates = forward(*args, True)
        ctx.options = args[_TENSORS:]
        ctx.save_for_backward(*args[:_TENSORS], gates)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, gates = ctx.saved_tensors
        args = (*tensors, *ctx.options)
        input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, peephole, *_ = ctx.needs_input_grad
        needs = (
            (1 if input else 0)
            | (2 if h else 0)
            | (4 if c else 0)
            | (8 if weight_ih else 0)
            | (16 if weight_hh else 0)
            | (32 if bias_ih or bias_hh else 0)
            | (64 if peephole else 0)
        )
        if _operators.transforms_active():  # vmap over torch.autograd.grad
            results = _reference_backward(*_of_backward(grads, gates, args), needs)
        elif torch.is_grad_enabled():
            results = LstmCellBackward.apply(*grads, gates.detach(), needs, *args)
        else:
            results = backward(*_of_backward(grads, gates, args), needs)
        *before, bias, for_peephole = results
        biases = _operators.for_both_biases(bias, bias_ih, bias_hh)
        return *before, *biases, for_peephole, None, None, None, None


class LstmCellBackward(torch.autograd.Function):
    """The cell's gradients with their own, which torch's operators compute to any order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        grads, gates, needs, call = args[:2], args[2], args[3], args[4:]
        ctx.save_for_backward(*grads, *call[:_TENSORS])
        ctx.needs, ctx.options = needs, call[_TENSORS:]
        ctx.set_materialize_grads(False)
        return backward(*_of_backward(grads, gates, call), needs)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradients(*tensors: Any) -> tuple[Tensor | None, ...]:
            call = (*tensors[2:], *ctx.options)
            gates = _reference_forward(*call, True)[2]
            return _reference_backward(*_of_backward(tensors[:2], gates, call), ctx.needs)

        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4 : 4 + _TENSORS])
        results = _operators.vector_product(gradients, ctx.saved_tensors, needs, incoming)
        return *results[:2], None, None, *results[2:], None, None


# torch.autograd.Function.apply wraps this builtin for torch.func transforms, which never get here.
apply = super(torch.autograd.Function, LstmCell).apply


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    args = _complete(args)
    if _operators.transforms_active() or forward_ad._current_level >= 0:
        return reference(*args)
    if reason := zoneout_needs_gradient(*args[8:10]):
        _backend.fall_back("lstm_cell", reason)
        return reference(*args)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in args[:_DIFFERENTIABLE]
    ):
        return apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return public(*args)


def _autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    keys = _operators.autocast_keys(device)

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        args = _complete(args)
        dtype = torch.get_autocast_dtype(device)
        cast = _operators.cast_all(args[:_TENSORS], device, dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            h, c = public(*cast, *args[_TENSORS:])
            # As native, whose state keeps the wider dtype of the two.
            wide = torch.promote_types(c.dtype, args[2].dtype)
            return h.to(wide), c.to(wide)

    return kernel


_check = functools.partial(_operators.check_sizes, "lstm_cell")


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    private: Callable[..., Any] = _fake_private
    return private(*_complete(args), False)[:2]


def _fake_private(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    peephole: Tensor | None,
    zoneout_hidden: Tensor | None,
    zoneout_cell: Tensor | None,
    activation: int,
    recurrent_activation: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    _operators.check_all_alike(
        "lstm_cell",
        input,
        h=h,
        c=c,
        weight_ih=weight_ih,
        weight_hh=weight_hh,
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        peephole=peephole,
        zoneout_hidden=zoneout_hidden,
        zoneout_cell=zoneout_cell,
    )
    torch._check(
        input.dim() == 2,
        lambda: f"lstm_cell: input: expected [B, I], got shape {list(input.shape)}",
    )
    _operators.check_gates("lstm_cell", "weight_ih", weight_ih)
    batch, gates = input.shape[0], weight_ih.shape[0]
    units = gates // 4
    _check("weight_ih", weight_ih, gates, input.shape[1])
    _check("weight_hh", weight_hh, gates, units)
    _check("bias_ih", bias_ih, gates)
    _check("bias_hh", bias_hh, gates)
    _check("peephole", peephole, 3, units)
    _check("h", h, batch, units)
    _check("c", c, batch, units)
    new_h, new_c = (input.new_empty((batch, units)) for _ in range(2))
    return new_h, new_c, input.new_empty((batch, gates)) if save else None


def _fake_backward(*args: Any) -> tuple[Tensor | None, ...]:
    input, h, c, weight_ih, weight_hh, peephole = args[3:9]
    needs = args[-1]
    makers = (
        lambda: _operators.empty_like(input),
        lambda: h.new_empty(h.shape),
        lambda: c.new_empty(c.shape),
        lambda: _operators.empty_like(weight_ih),
        lambda: _operators.empty_like(weight_hh),
        lambda: input.new_empty(weight_ih.shape[:1]),
        lambda: _operators.empty_like(peephole),
    )
    return tuple(make() if needs >> bit & 1 else None for bit, make in enumerate(makers))


def _vmap(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    args, dims = _complete(args), (*dims, *(None,) * (len(_DEFAULTS) - len(dims)))
    count = info.batch_size
    if any(dim is not None for dim in dims[3:]) or any(z is not None for z in args[8:10]):
        return _operators.each_sample(public, count, dims, args), (0, 0)

    # More rows of the batch.
    folded = [
        (state.expand(count, *state.shape) if dim is None else state.movedim(dim, 0)).flatten(0, 1)
        for state, dim in zip(args[:3], dims)
    ]
    h, c = public(*folded, *args[3:])
    samples = (count, h.shape[0] // count)
    return (h.unflatten(0, samples), c.unflatten(0, samples)), (0, 0)


def _flops(
    input: Sequence[int],
    h: Any,
    c: Any,
    weight_ih: Sequence[int],
    weight_hh: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return 2 * input[0] * (math.prod(weight_ih) + math.prod(weight_hh))


def _flops_backward(*args: Any, **_: Any) -> int:
    input, weight_ih, weight_hh, needs = args[3], args[6], args[7], args[13]
    counts = (
        (bool(needs & 1) + bool(needs & 8)) * math.prod(weight_ih),
        (bool(needs & 2) + bool(needs & 16)) * math.prod(weight_hh),
    )
    return 2 * input[0] * sum(counts)


_operators.register_flops([torch.ops.twinfuse.lstm_cell, torch.ops.twinfuse._lstm_cell])(_flops)
_operators.register_flops(torch.ops.twinfuse._lstm_cell_backward)(_flops_backward)
_operators.register_rules(
    "lstm_cell", fake=_fake, vmap=_vmap, autograd=_autograd, autocast=_autocast
)
_operators.register_private("_lstm_cell", fake=_fake_private)
_operators.register_private("_lstm_cell_backward", fake=_fake_backward)
