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
from twinfuse.torch import _lstm_layer_reference, _operators
from twinfuse.torch._lstm_reference import noise_needs_gradient

# Operators take `_TENSORS` tensors and six options, of which what is rare comes last and may be
# left out; the private one takes `save` before them, the public one `recompute` behind. Those with
# gradients come first.
_TENSORS = 16
PLAIN = 7
_OPTIONS = _TENSORS + 6
_DIFFERENTIABLE = 10
_BATCH_SIZES, _MASK = 10, 11
_NOISE = slice(12, _TENSORS)
_BATCH_FIRST = _TENSORS
_DEFAULTS = (*(None,) * _TENSORS, False, False, 0, 1, False, 1e-5, False)
_BACKWARD_DEFAULTS = (*(None,) * 9, *_DEFAULTS[PLAIN:_OPTIONS])  # behind `needs`

_EXTRAS = (
    "Tensor? weight_hr=None, Tensor? peephole=None, Tensor? norm=None, Tensor? batch_sizes=None, "
    "Tensor? mask=None, Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, "
    "Tensor? dropout_input=None, Tensor? dropout_hidden=None, bool batch_first=False, "
    "bool reverse=False, int activation=0, int recurrent_activation=1, "
    "bool zero_masked_output=False, float norm_epsilon=1e-05"
)
_ARGUMENTS = (
    "Tensor input, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, "
    f"Tensor? bias_hh=None, {_EXTRAS}"
)
_PUBLIC = f"({_ARGUMENTS}, bool recompute=False) -> (Tensor output, Tensor h_n, Tensor c_n)"
_PRIVATE = f"(bool save, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    "(int needs, Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor cells, "
    f"Tensor hidden, Tensor input, Tensor weight_ih, Tensor weight_hh, {_EXTRAS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_reference_forward: Callable[..., Any] = _lstm_layer_reference.forward
_reference_backward: Callable[..., Any] = _lstm_layer_reference.backward


_complete = functools.partial(_operators.complete, _DEFAULTS)


def reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The public operator by torch's own."""
    return _reference_forward(False, *args[:_OPTIONS])[:3]


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


def _of_backward(
    needs: int, grads: Sequence[Any], rows: Sequence[Any], args: Sequence[Any]
) -> Sequence[Any]:
    """The backward operator's arguments."""
    return (needs, *grads, *rows, args[0], args[3], args[4], *args[PLAIN:])


class Lstm(torch.autograd.Function):
    """The layer with its gradients, for calls outside of torch.func transforms.

    Takes `recompute`, and what the private operator takes behind `save`, the first `PLAIN`, or
    also all other tensors, or also options.
    """

    @staticmethod
    def forward(ctx: Any, recompute: bool, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output, h, c, *rows = forward(not recompute, *args)
        ctx.options = args[_TENSORS:]
        ctx.save_for_backward(*rows, *args[:_TENSORS])
        ctx.set_materialize_grads(False)
        return output, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, cells, hidden, *tensors = ctx.saved_tensors
        rows, args = (gates, cells, hidden), (*tensors, *ctx.options)
        _, *first, bias_ih, bias_hh = ctx.needs_input_grad[: 1 + PLAIN]
        extras = ctx.needs_input_grad[1 + PLAIN :]
        flags = (*first, bias_ih or bias_hh, *extras[: _DIFFERENTIABLE - PLAIN])
        needs = sum(1 << bit for bit, flag in enumerate(flags) if flag)
        packed = bool(extras) and args[_BATCH_SIZES] is not None
        if packed and needs & 6 and grads[1] is None and grads[2] is None:
            # The batch size, which a tracer cannot read off `batch_sizes`, comes from these.
            grads = (grads[0], *(s if s is None else torch.zeros_like(s) for s in args[1:3]))
        if gates is None:
            with torch.no_grad():
                rows = forward(True, *args)[3:]
        if _operators.transforms_active():  # vmap over torch.autograd.grad
            results = _reference_backward(*_of_backward(needs, grads, rows, args))
        elif torch.is_grad_enabled():
            apart = (tensor.detach() for tensor in rows)
            results = LstmBackward.apply(needs, *grads, *apart, *args)
        else:
            results = backward(*_of_backward(needs, grads, rows, args))
        before, bias, after = results[:5], results[5], results[6:]
        biases = _operators.for_both_biases(bias, bias_ih, bias_hh)
        if not extras:
            return None, *before, *biases
        return None, *before, *biases, *after, *(None,) * (len(extras) - len(after))


class LstmBackward(torch.autograd.Function):
    """The layer's gradients with their own, which torch's operators compute to any order."""

    @staticmethod
    def forward(ctx: Any, needs: int, *args: Any) -> tuple[Tensor | None, ...]:
        grads, rows, call = args[:3], args[3:6], args[6:]
        ctx.save_for_backward(*grads, *call[:_TENSORS])
        ctx.needs, ctx.options = needs, call[_TENSORS:]
        ctx.set_materialize_grads(False)
        return backward(*_of_backward(needs, grads, rows, call))

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradients(*tensors: Any) -> tuple[Tensor | None, ...]:
            call = (*tensors[3:], *ctx.options)
            rows = _reference_forward(True, *call)[3:]
            return _reference_backward(*_of_backward(ctx.needs, tensors[:3], rows, call))

        given = ctx.needs_input_grad
        needs = (*given[1:4], *given[7 : 4 + len(ctx.saved_tensors)])
        results = _operators.vector_product(gradients, ctx.saved_tensors, needs, incoming)
        return None, *results[:3], None, None, None, *results[3:], *(None,) * len(ctx.options)


# torch.autograd.Function.apply wraps this builtin for torch.func transforms, which never get here.
apply = super(torch.autograd.Function, Lstm).apply
_grad_enabled = torch.is_grad_enabled


def call(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The public operator for plain tensors, outside of transforms, modes and compilers.

    Takes its arguments as `Lstm` does.
    """
    if _grad_enabled():
        for tensor in args[:_DIFFERENTIABLE]:
            if tensor is not None and tensor.requires_grad:
                return apply(args[-1] if len(args) > _OPTIONS else False, *args[:_OPTIONS])
    return forward(False, *args[:_OPTIONS])[:3]


def _autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = _complete(args)
    if _operators.transforms_active() or forward_ad._current_level >= 0:
        return reference(*args)
    if reason := noise_needs_gradient(*args[_NOISE]):
        _backend.fall_back("lstm", reason)
        return reference(*args)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in args[:_DIFFERENTIABLE]
    ):
        return apply(args[-1], *args[:-1])
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
    return private(False, *args[:_OPTIONS])[:3]


def _fake_private(
    save: bool,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    norm: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    mask: Tensor | None = None,
    zoneout_hidden: Tensor | None = None,
    zoneout_cell: Tensor | None = None,
    dropout_input: Tensor | None = None,
    dropout_hidden: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
    activation: int = 0,
    recurrent_activation: int = 1,
    zero_masked_output: bool = False,
    norm_epsilon: float = 1e-5,
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
        norm=norm,
        zoneout_hidden=zoneout_hidden,
        zoneout_cell=zoneout_cell,
        dropout_input=dropout_input,
        dropout_hidden=dropout_hidden,
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
    _check("norm", norm, 2, gates)
    _check("h", h, batch, width)
    _check("c", c, batch, units)
    _check("mask", mask, *input.shape[:-1])
    rows = math.prod(input.shape[:-1])
    widths = (gates if norm is None else 3 * gates, units, width)
    return (
        input.new_empty((*input.shape[:-1], width)),
        input.new_empty((batch, width)),
        input.new_empty((batch, units)),
        *(input.new_empty((rows, n)) if save else None for n in widths),
    )


def _fake_backward(needs: int, *args: Any) -> tuple[Tensor | None, ...]:
    args = _operators.complete(_BACKWARD_DEFAULTS, args)
    input, weight_ih, weight_hh, weight_hr, peephole, norm, batch_sizes = args[6:13]
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
        lambda: _operators.empty_like(norm),
    )
    return tuple(make() if needs >> bit & 1 else None for bit, make in enumerate(makers))


def _vmap(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    args, dims = _complete(args), (*dims, *(None,) * (len(_DEFAULTS) - len(dims)))
    shared = all(dim is None for dim in dims[3:_MASK])
    if not shared or any(tensor is not None for tensor in (args[_BATCH_SIZES], *args[_NOISE])):
        return _operators.each_sample(public, info.batch_size, dims, args), (0, 0, 0)

    # One more axis of the batch.
    axis = 0 if args[_BATCH_FIRST] else 1
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


def _flops_private(save: bool, *args: Any, **options: Any) -> int:
    return _flops(*args, **options)


def _flops_backward(needs: int, *args: Any, weight_hr: Any = None, **_: Any) -> int:
    input, weight_ih, weight_hh, weight_hr = (*args, weight_hr)[6:10]
    # Through the recurrence, whatever is asked for, and then for each gradient.
    counts = (
        bool(needs & 1) * math.prod(weight_ih),
        bool(needs & 8) * math.prod(weight_ih),
        (1 + bool(needs & 16)) * math.prod(weight_hh),
        (1 + bool(needs & 64)) * math.prod(weight_hr or (0,)),
    )
    return 2 * math.prod(input[:-1]) * sum(counts)


_operators.register_flops(torch.ops.twinfuse.lstm)(_flops)
_operators.register_flops(torch.ops.twinfuse._lstm)(_flops_private)
_operators.register_flops(torch.ops.twinfuse._lstm_backward)(_flops_backward)
_operators.register_rules("lstm", fake=_fake, vmap=_vmap, autograd=_autograd, autocast=_autocast)
_operators.register_private("_lstm", fake=_fake_private)
_operators.register_private("_lstm_backward", fake=_fake_backward)
