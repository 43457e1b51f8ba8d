"""The `lstm` operators, one layer in one direction: what torch must know besides their kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from twinfuse import _backend
from twinfuse.torch import _lstm_reference, _operators

# The public operator takes `_TENSORS` tensors, five options and `recompute`; the private one
# `save` in place of the last. Those with gradients come first.
_TENSORS = 13
_OPTIONS = _TENSORS + 5
_DIFFERENTIABLE = 9
_BATCH_SIZES, _MASK = 9, 10
_DEFAULTS = (*(None,) * _TENSORS, 0, 1, False, False, False, False)

_ARGUMENTS = (
    "Tensor input, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih{0}, "
    "Tensor? bias_hh{0}, Tensor? weight_hr{0}, Tensor? peephole{0}, Tensor? batch_sizes{0}, "
    "Tensor? mask{0}, Tensor? zoneout_hidden{0}, Tensor? zoneout_cell{0}, int activation{1}, "
    "int recurrent_activation{2}, bool reverse{3}, bool batch_first{3}, bool zero_masked_output{3}"
)
_PUBLIC = (
    f"({_ARGUMENTS.format('=None', '=0', '=1', '=False')}, bool recompute=False) "
    "-> (Tensor output, Tensor h_n, Tensor c_n)"
)
_PRIVATE = (
    f"({_ARGUMENTS.format('', '', '', '')}, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor cells, "
    "Tensor hidden, Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? weight_hr, "
    "Tensor? peephole, Tensor? batch_sizes, Tensor? mask, Tensor? zoneout_hidden, "
    "Tensor? zoneout_cell, int activation, int recurrent_activation, bool reverse, "
    "bool batch_first, bool zero_masked_output, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_reference_forward: Callable[..., Any] = _lstm_reference.forward
_reference_backward: Callable[..., Any] = _lstm_reference.backward


_complete = functools.partial(_operators.complete, _DEFAULTS)


def reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The public operator by torch's own."""
    return _reference_forward(*_complete(args)[:_OPTIONS], False)[:3]


_operators.define(
    {
        f"lstm{_PUBLIC}": reference,
        f"_lstm{_PRIVATE}": _reference_forward,
        f"_lstm_backward{_BACKWARD}": _reference_backward,
    }
)
# What the binding calls where no kernel serves.
_operators.define(
    {
        f"_lstm_reference{_PRIVATE}": _reference_forward,
        f"_lstm_reference_backward{_BACKWARD}": _reference_backward,
    },
    always=True,
)

public = torch.ops.twinfuse.lstm.default
# The builtin below an OpOverload skips a Python call.
forward = torch.ops.twinfuse._lstm.default._op
backward = torch.ops.twinfuse._lstm_backward.default._op


def _of_backward(grads: Sequence[Any], rows: Sequence[Any], args: Sequence[Any]) -> Sequence[Any]:
    """The backward operator's arguments, but for `needs`, of those of forward."""
    return (*grads, *rows, args[0], args[3], args[4], *args[7:_OPTIONS])


class Lstm(torch.autograd.Function):
    """The layer with its gradients, for calls outside of torch.func transforms."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        recompute = args[_OPTIONS]
        output, h, c, *rows = forward(*args[:_OPTIONS], not recompute)
        ctx.options = args[_TENSORS:_OPTIONS]
        ctx.save_for_backward(*args[:_TENSORS], *rows)
        ctx.set_materialize_grads(False)
        return output, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        args, rows = (*saved[:_TENSORS], *ctx.options), saved[_TENSORS:]
        input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole = (
            ctx.needs_input_grad[:_DIFFERENTIABLE]
        )
        flags = (input, h, c, weight_ih, weight_hh, bias_ih or bias_hh, weight_hr, peephole)
        needs = sum(1 << bit for bit, flag in enumerate(flags) if flag)
        if args[_BATCH_SIZES] is not None and (h or c) and grads[1] is None and grads[2] is None:
            # The batch size, which a tracer cannot read off `batch_sizes`, comes from these.
            grads = (grads[0], *(s if s is None else torch.zeros_like(s) for s in args[1:3]))
        if rows[0] is None:
            with torch.no_grad():
                rows = forward(*args, True)[3:]
        if _operators.transforms_active():  # vmap over torch.autograd.grad
            results = _reference_backward(*_of_backward(grads, rows, args), needs)
        elif torch.is_grad_enabled():
            rows = [tensor.detach() for tensor in rows]
            results = LstmBackward.apply(*grads, *rows, needs, *args)
        else:
            results = backward(*_of_backward(grads, rows, args), needs)
        *before, bias, for_hr, for_peephole = results
        biases = _operators.for_both_biases(bias, bias_ih, bias_hh)
        return *before, *biases, for_hr, for_peephole, *(None,) * (_OPTIONS + 1 - _DIFFERENTIABLE)


class LstmBackward(torch.autograd.Function):
    """The layer's gradients with their own, which torch's operators compute to any order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        grads, rows, needs, call = args[:3], args[3:6], args[6], args[7:]
        ctx.save_for_backward(*grads, *call[:_TENSORS])
        ctx.needs, ctx.options = needs, call[_TENSORS:]
        ctx.set_materialize_grads(False)
        return backward(*_of_backward(grads, rows, call), needs)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradients(*tensors: Any) -> tuple[Tensor | None, ...]:
            call = (*tensors[3:], *ctx.options)
            rows = _reference_forward(*call, True)[3:]
            return _reference_backward(*_of_backward(tensors[:3], rows, call), ctx.needs)

        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[7 : 7 + _TENSORS])
        results = _operators.vector_product(gradients, ctx.saved_tensors, needs, incoming)
        options = (None,) * (_OPTIONS - _TENSORS)
        return *results[:3], None, None, None, None, *results[3:], *options


# torch.autograd.Function.apply wraps this builtin for torch.func transforms, which never get here.
apply = super(torch.autograd.Function, Lstm).apply
_grad_enabled = torch.is_grad_enabled


def call(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The layer for plain tensors, outside of transforms, modes and compilers."""
    if _grad_enabled():
        for tensor in args[:_DIFFERENTIABLE]:
            if tensor is not None and tensor.requires_grad:
                return apply(*args)
    return forward(*args[:_OPTIONS], False)[:3]


def _autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = _complete(args)
    if _operators.transforms_active() or forward_ad._current_level >= 0:
        return reference(*args)
    if reason := _lstm_reference.zoneout_needs_gradient(*args[11:13]):
        _backend.fall_back("lstm", reason)
        return reference(*args)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in args[:_DIFFERENTIABLE]
    ):
        return apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return public(*args)


def _autocast(device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    keys = _operators.autocast_keys(device)

    def kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        args = _complete(args)
        dtype = torch.get_autocast_dtype(device)
        cast = _operators.cast_all(args[:_TENSORS], device, dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            output, h, c = public(*cast, *args[_TENSORS:])
            # Native's dtypes: its packed sequences and projections keep what the cell state had.
            state = args[0] if args[2] is None else args[2]
            wide = torch.promote_types(c.dtype, state.dtype)
            packed, projected = args[_BATCH_SIZES] is not None, args[7] is not None
            if packed and not projected:
                output, h = output.to(wide), h.to(wide)
            return output, h, c.to(wide) if packed or projected else c

    return kernel


def _batch(input: Tensor, states: Sequence[Tensor | None], sizes: Tensor | None, axis: int) -> Any:
    if sizes is None:
        return input.shape[axis]
    for state in states:
        if state is not None:
            return state.shape[0]
    if type(sizes) is Tensor and sizes.device.type == "cpu":
        return int(sizes[0])
    return torch.library.get_ctx().new_dynamic_size()


_check = functools.partial(_operators.check_sizes, "lstm")


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    private: Callable[..., Any] = _fake_private
    return private(*_complete(args)[:_OPTIONS], False)[:3]


def _fake_private(
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    batch_sizes: Tensor | None,
    mask: Tensor | None,
    zoneout_hidden: Tensor | None,
    zoneout_cell: Tensor | None,
    activation: int,
    recurrent_activation: int,
    reverse: bool,
    batch_first: bool,
    zero_masked_output: bool,
    save: bool,
) -> tuple[Tensor | None, ...]:
    _operators.check_all_alike(
        "lstm",
        input,
        h=h,
        c=c,
        weight_ih=weight_ih,
        weight_hh=weight_hh,
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        weight_hr=weight_hr,
        peephole=peephole,
        zoneout_hidden=zoneout_hidden,
        zoneout_cell=zoneout_cell,
    )
    dims = 2 if batch_sizes is not None else 3
    torch._check(
        input.dim() == dims,
        lambda: f"lstm: input: expected {dims} dimensions, got shape {list(input.shape)}",
    )
    _operators.check_gates("lstm", "weight_ih", weight_ih)
    _operators.check_gates("lstm", "weight_hh", weight_hh)
    gates = weight_ih.shape[0]
    units = gates // 4
    width = units if weight_hr is None else weight_hh.shape[1]
    batch = _batch(input, (h, c), batch_sizes, 0 if batch_first else 1)
    _check("weight_ih", weight_ih, gates, input.shape[-1])
    _check("weight_hh", weight_hh, gates, width)
    _check("bias_ih", bias_ih, gates)
    _check("bias_hh", bias_hh, gates)
    _check("weight_hr", weight_hr, width, units)
    _check("peephole", peephole, 3, units)
    _check("h", h, batch, width)
    _check("c", c, batch, units)
    _check("mask", mask, *input.shape[:-1])
    rows = math.prod(input.shape[:-1])
    return (
        input.new_empty((*input.shape[:-1], width)),
        input.new_empty((batch, width)),
        input.new_empty((batch, units)),
        *(input.new_empty((rows, n)) if save else None for n in (gates, units, width)),
    )


def _fake_backward(*args: Any) -> tuple[Tensor | None, ...]:
    input, weight_ih, weight_hh, weight_hr, peephole, batch_sizes = args[6:12]
    needs = args[-1]
    batch = _batch(input, args[1:3], batch_sizes, 0 if args[18] else 1) if needs & 6 else 0
    gates = weight_ih.shape[0]
    makers = (
        lambda: _operators.empty_like(input),
        lambda: input.new_empty((batch, weight_hh.shape[1])),
        lambda: input.new_empty((batch, gates // 4)),
        lambda: _operators.empty_like(weight_ih),
        lambda: _operators.empty_like(weight_hh),
        lambda: input.new_empty((gates,)),
        lambda: _operators.empty_like(weight_hr),
        lambda: _operators.empty_like(peephole),
    )
    return tuple(make() if needs >> bit & 1 else None for bit, make in enumerate(makers))


def _vmap(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    args, dims = _complete(args), (*dims, *(None,) * (len(_DEFAULTS) - len(dims)))
    shared = all(dim is None for dim in dims[3:_MASK])
    if not shared or any(tensor is not None for tensor in (args[_BATCH_SIZES], *args[11:13])):
        return _operators.each_sample(public, info.batch_size, dims, args), (0, 0, 0)

    # One more axis of the batch.
    axis = 0 if args[_TENSORS + 3] else 1
    folded = list(args)
    for i, where in ((0, axis), (1, 0), (2, 0), (_MASK, axis)):
        if args[i] is not None:
            moved = args[i].unsqueeze(where) if dims[i] is None else args[i].movedim(dims[i], where)
            sizes = [*moved.shape]
            sizes[where] = info.batch_size
            folded[i] = moved.expand(sizes).flatten(where, where + 1)
    output, h, c = public(*folded)
    samples = (info.batch_size, h.shape[0] // info.batch_size)
    unfolded = (output.unflatten(axis, samples), h.unflatten(0, samples), c.unflatten(0, samples))
    return unfolded, (axis, 0, 0)


def _flops(
    input: Sequence[int],
    h: Any,
    c: Any,
    weight_ih: Sequence[int],
    weight_hh: Sequence[int],
    bias_ih: Any = None,
    bias_hh: Any = None,
    weight_hr: Sequence[int] | None = None,
    *_: Any,
    **__: Any,
) -> int:
    per_row = math.prod(weight_ih) + math.prod(weight_hh) + math.prod(weight_hr or (0,))
    return 2 * math.prod(input[:-1]) * per_row


def _flops_backward(*args: Any, **_: Any) -> int:
    input, weight_ih, weight_hh, weight_hr = args[6:10]
    needs = args[20]
    # Through the recurrence, whatever is asked for, and then for each gradient.
    counts = (
        bool(needs & 1) * math.prod(weight_ih),
        bool(needs & 8) * math.prod(weight_ih),
        (1 + bool(needs & 16)) * math.prod(weight_hh),
        (1 + bool(needs & 64)) * math.prod(weight_hr or (0,)),
    )
    return 2 * math.prod(input[:-1]) * sum(counts)


_operators.register_flops([torch.ops.twinfuse.lstm, torch.ops.twinfuse._lstm])(_flops)
_operators.register_flops(torch.ops.twinfuse._lstm_backward)(_flops_backward)
_operators.register_rules("lstm", fake=_fake, vmap=_vmap, autograd=_autograd, autocast=_autocast)
_operators.register_private("_lstm", fake=_fake_private)
_operators.register_private("_lstm_backward", fake=_fake_backward)
