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
from twinfuse.torch._lstm_reference import noise_needs_gradient

# Operators take `_TENSORS` tensors and three options, of which what is rare comes last and may be
# left out; the private one takes `save` before them. Those with gradients come first.
_TENSORS = 13
PLAIN = 7
_DIFFERENTIABLE = 9
_NOISE = slice(_DIFFERENTIABLE, _TENSORS)
_DEFAULTS = (*(None,) * _TENSORS, 0, 1, 1e-5)

_EXTRAS = (
    "Tensor? peephole=None, Tensor? norm=None, Tensor? zoneout_hidden=None, "
    "Tensor? zoneout_cell=None, Tensor? dropout_input=None, Tensor? dropout_hidden=None, "
    "int activation=0, int recurrent_activation=1, float norm_epsilon=1e-05"
)
_ARGUMENTS = (
    "Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, "
    f"Tensor? bias_hh=None, {_EXTRAS}"
)
_PUBLIC = f"({_ARGUMENTS}) -> (Tensor, Tensor)"
_PRIVATE = f"(bool save, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "(int needs, Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor input, Tensor h, Tensor c, "
    f"Tensor weight_ih, Tensor weight_hh, {_EXTRAS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_reference_forward: Callable[..., Any] = _lstm_cell_reference.forward
_reference_backward: Callable[..., Any] = _lstm_cell_reference.backward


_complete = functools.partial(_operators.complete, _DEFAULTS)


def reference(*args: Any) -> tuple[Tensor, Tensor]:
    """The public operator by torch's own."""
    return _reference_forward(False, *args)[:2]


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


def _of_backward(
    needs: int, grads: Sequence[Any], gates: Any, args: Sequence[Any]
) -> Sequence[Any]:
    """The backward operator's arguments."""
    return (needs, *grads, gates, *args[:5], *args[PLAIN:])


class LstmCell(torch.autograd.Function):
    """The cell with its gradients, for calls outside of torch.func transforms.

    Takes what the public operator takes, the first `PLAIN`, all tensors or everything.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        h, c, gates = forward(True, *args)
        ctx.options = args[_TENSORS:]
        ctx.save_for_backward(*args[:_TENSORS], gates)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, gates = ctx.saved_tensors
        args = (*tensors, *ctx.options)
        input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, *extras = ctx.needs_input_grad
        needs = (
            (1 if input else 0)
            | (2 if h else 0)
            | (4 if c else 0)
            | (8 if weight_ih else 0)
            | (16 if weight_hh else 0)
            | (32 if bias_ih or bias_hh else 0)
            | (64 if extras and extras[0] else 0)
            | (128 if extras and extras[1] else 0)
        )
        if _operators.transforms_active():  # vmap over torch.autograd.grad
            results = _reference_backward(*_of_backward(needs, grads, gates, args))
        elif torch.is_grad_enabled():
            results = LstmCellBackward.apply(needs, *grads, gates.detach(), *args)
        else:
            results = backward(*_of_backward(needs, grads, gates, args))
        *before, bias, for_peephole, for_norm = results
        biases = _operators.for_both_biases(bias, bias_ih, bias_hh)
        if not extras:
            return *before, *biases
        return *before, *biases, for_peephole, for_norm, *(None,) * (len(extras) - 2)


class LstmCellBackward(torch.autograd.Function):
    """The cell's gradients with their own, which torch's operators compute to any order."""

    @staticmethod
    def forward(ctx: Any, needs: int, *args: Any) -> tuple[Tensor | None, ...]:
        grads, gates, call = args[:2], args[2], args[3:]
        ctx.save_for_backward(*grads, *call[:_TENSORS])
        ctx.needs, ctx.options = needs, call[_TENSORS:]
        ctx.set_materialize_grads(False)
        return backward(*_of_backward(needs, grads, gates, call))

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradients(*tensors: Any) -> tuple[Tensor | None, ...]:
            call = (*tensors[2:], *ctx.options)
            gates = _reference_forward(True, *call)[2]
            return _reference_backward(*_of_backward(ctx.needs, tensors[:2], gates, call))

        _, grad_h, grad_c, _, *needs = ctx.needs_input_grad
        needs = (grad_h, grad_c, *needs)[: len(ctx.saved_tensors)]
        results = _operators.vector_product(gradients, ctx.saved_tensors, needs, incoming)
        return None, *results[:2], None, *results[2:], *(None,) * len(ctx.options)


# torch.autograd.Function.apply wraps this builtin for torch.func transforms, which never get here.
apply = super(torch.autograd.Function, LstmCell).apply


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    args = _complete(args)
    if _operators.transforms_active() or forward_ad._current_level >= 0:
        return reference(*args)
    if reason := noise_needs_gradient(*args[_NOISE]):
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
    return private(False, *args)[:2]


def _fake_private(
    save: bool,
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    peephole: Tensor | None = None,
    norm: Tensor | None = None,
    zoneout_hidden: Tensor | None = None,
    zoneout_cell: Tensor | None = None,
    dropout_input: Tensor | None = None,
    dropout_hidden: Tensor | None = None,
    activation: int = 0,
    recurrent_activation: int = 1,
    norm_epsilon: float = 1e-5,
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
        norm=norm,
        zoneout_hidden=zoneout_hidden,
        zoneout_cell=zoneout_cell,
        dropout_input=dropout_input,
        dropout_hidden=dropout_hidden,
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
    _check("norm", norm, 2, gates)
    _check("h", h, batch, units)
    _check("c", c, batch, units)
    new_h, new_c = (input.new_empty((batch, units)) for _ in range(2))
    saved = gates if norm is None else 3 * gates
    return new_h, new_c, input.new_empty((batch, saved)) if save else None


def _fake_backward(*args: Any) -> tuple[Tensor | None, ...]:
    needs, _, _, _, input, h, c, weight_ih, weight_hh, *scales = args
    peephole, norm = (*scales, None, None)[:2]
    makers = (
        lambda: _operators.empty_like(input),
        lambda: h.new_empty(h.shape),
        lambda: c.new_empty(c.shape),
        lambda: _operators.empty_like(weight_ih),
        lambda: _operators.empty_like(weight_hh),
        lambda: input.new_empty(weight_ih.shape[:1]),
        lambda: _operators.empty_like(peephole),
        lambda: _operators.empty_like(norm),
    )
    return tuple(make() if needs >> bit & 1 else None for bit, make in enumerate(makers))


def _vmap(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    args, dims = _complete(args), (*dims, *(None,) * (len(_DEFAULTS) - len(dims)))
    count = info.batch_size
    if any(dim is not None for dim in dims[3:]) or any(z is not None for z in args[_NOISE]):
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


def _flops_private(save: bool, *args: Any, **_: Any) -> int:
    return _flops(*args)


def _flops_backward(needs: int, *args: Any, **_: Any) -> int:
    input, weight_ih, weight_hh = args[3], args[6], args[7]
    counts = (
        (bool(needs & 1) + bool(needs & 8)) * math.prod(weight_ih),
        (bool(needs & 2) + bool(needs & 16)) * math.prod(weight_hh),
    )
    return 2 * input[0] * sum(counts)


_operators.register_flops(torch.ops.twinfuse.lstm_cell)(_flops)
_operators.register_flops(torch.ops.twinfuse._lstm_cell)(_flops_private)
_operators.register_flops(torch.ops.twinfuse._lstm_cell_backward)(_flops_backward)
_operators.register_rules(
    "lstm_cell", fake=_fake, vmap=_vmap, autograd=_autograd, autocast=_autocast
)
_operators.register_private("_lstm_cell", fake=_fake_private)
_operators.register_private("_lstm_cell_backward", fake=_fake_backward)
