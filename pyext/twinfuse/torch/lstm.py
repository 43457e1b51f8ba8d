"""Fused LSTM: layers over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function

from twinfuse.torch import _calls
from twinfuse.torch import _lstm_ops as _ops
from twinfuse.torch.lstm_cell import State, activation_numbers, expected, pair

__all__ = ["lstm"]

Layer = Callable[..., tuple[Tensor, Tensor, Tensor]]
Results = tuple[Tensor, Tensor, Tensor]

# Aliases, because a call on a tiny input costs as much as its guards.
_are_unusual = _calls.are_unusual
_Proxy = torch.fx.Proxy


class _Call(NamedTuple):
    """What `lstm` was called with, packed sequences taken apart and in order."""

    input: Tensor
    batch_sizes: Tensor | None
    h: Tensor | None
    c: Tensor | None
    params: tuple[Tensor, ...]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool
    mask: Tensor | None
    peepholes: tuple[Tensor, ...]
    zoneout_hidden: float
    zoneout_cell: float
    activation: int
    recurrent_activation: int
    recompute: bool

    @property
    def layers(self) -> int:
        """Layers of one direction each."""
        return self.num_layers * (2 if self.bidirectional else 1)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.input, self.h, self.c, self.mask, *self.params, *self.peepholes)


def _refuse(name: str, wanted: str, got: object) -> None:
    raise RuntimeError(f"lstm: {name}: expected {wanted}, got {got}")


def _check_counts(call: _Call) -> None:
    """What would be an error of Python's further on."""
    count, given = call.layers, len(call.params)
    least = 4 if call.has_biases else 2
    if given not in (count * least, count * (least + 1)) or count < 1:
        _refuse("params", f"{count * least} tensors, or {count * (least + 1)}", given)
    if call.peepholes and len(call.peepholes) != count:
        _refuse("peepholes", f"{count} tensors", len(call.peepholes))
    for name, state in (("hx[0]", call.h), ("hx[1]", call.c)):
        if state is not None and (state.dim() != 3 or state.shape[0] != count):
            _refuse(name, f"[{count}, B, n]", f"shape {list(state.shape)}")
    if call.input.dim() != (3 if call.batch_sizes is None else 2):
        wanted = "[N, I]" if call.batch_sizes is not None else "[T, B, I]"
        wanted = "[B, T, I]" if call.batch_first else wanted
        _refuse("input", wanted, f"shape {list(call.input.shape)}")
    if call.batch_sizes is None and call.input.shape[1 if call.batch_first else 0] == 0:
        _refuse("input", "one step or more", f"shape {list(call.input.shape)}")
    if call.mask is not None and call.batch_sizes is not None:
        _refuse("mask", "None with a PackedSequence", f"shape {list(call.mask.shape)}")


def _misfit(call: _Call) -> str:
    """Raises for sizes that do not fit together: native looks at few of them, and reads beyond."""
    _check_counts(call)
    size, units = call.input.shape[-1], call.params[0].shape[0] // 4
    per_layer = len(call.params) // call.layers
    projected = per_layer % 2 == 1
    width = call.params[per_layer - 1].shape[0] if projected else units
    gates = 4 * units
    sizes: list[tuple[int, ...]] = [(gates, width), (gates,), (gates,), (width, units)]
    sizes = sizes[: 3 if call.has_biases else 1] + ([sizes[3]] if projected else [])
    checks: list[str] = []
    for start in range(0, len(call.params), per_layer):
        if start == per_layer * (2 if call.bidirectional else 1):
            size = width * (2 if call.bidirectional else 1)
        wanted = [(gates, size), *sizes]
        checks += [
            expected(f"params[{i}]", tensor, *shape)
            for i, (tensor, shape) in enumerate(zip(call.params[start:], wanted), start)
        ]
    for i, peephole in enumerate(call.peepholes):
        checks.append(expected(f"peepholes[{i}]", peephole, 3, units))
    if call.batch_sizes is None or not _is_traced(call.batch_sizes):
        batch = _batch(call)
        if call.h is not None:
            checks.append(expected("hx[0]", call.h, call.layers, batch, width))
        if call.c is not None:
            checks.append(expected("hx[1]", call.c, call.layers, batch, units))
    if call.mask is not None:
        checks.append(expected("mask", call.mask, *call.input.shape[:2]))
        if call.mask.dtype != torch.bool:
            checks.append(f"mask: expected bool, got {call.mask.dtype}")
    for misfit in checks:
        if misfit:
            raise RuntimeError(f"lstm: {misfit}")
    return ""


def _named(call: _Call) -> _calls.Named:
    names = ("input", "hx[0]", "hx[1]")
    named = [(n, t) for n, t in zip(names, (call.input, call.h, call.c)) if t is not None]
    named += [(f"params[{i}]", tensor) for i, tensor in enumerate(call.params)]
    return named + [(f"peepholes[{i}]", tensor) for i, tensor in enumerate(call.peepholes)]


def _run(layer: Layer, call: _Call) -> Results:
    """All layers, each direction of each by `layer`."""
    params, count = call.params, call.layers
    per_layer, directions = len(params) // count, count // call.num_layers
    projected = per_layer % 2 == 1
    hs, cs = _split(call.h, count), _split(call.c, count)
    input, last_h, last_c = call.input, [], []
    for first in range(0, count, directions):
        if first and call.dropout and call.train:
            input = F.dropout(input, call.dropout)
        outputs = []
        for i in range(first, first + directions):
            weight_ih, weight_hh, *rest = params[i * per_layer : (i + 1) * per_layer]
            weight_hr = rest.pop() if projected else None
            bias_ih, bias_hh = rest if rest else (None, None)
            output, h, c = layer(
                *(input, hs[i], cs[i], weight_ih, weight_hh, bias_ih, bias_hh, weight_hr),
                call.peepholes[i] if call.peepholes else None,
                call.batch_sizes,
                call.mask,
                _zoneout(call, call.zoneout_hidden, input, weight_hh.shape[1]),
                _zoneout(call, call.zoneout_cell, input, weight_ih.shape[0] // 4),
                *(call.activation, call.recurrent_activation, i > first, call.batch_first),
                *(False, call.recompute),
            )
            outputs.append(output)
            last_h.append(h)
            last_c.append(c)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    if count == 1:
        return input, last_h[0].unsqueeze(0), last_c[0].unsqueeze(0)
    return input, torch.stack(last_h), torch.stack(last_c)


def _split(state: Tensor | None, count: int) -> Sequence[Tensor | None]:
    if state is None:
        return (None,) * count
    return (state.squeeze(0),) if count == 1 else state.unbind(0)


def _zoneout(call: _Call, share: float, input: Tensor, width: int) -> Tensor | None:
    if not share:
        return None
    if not call.train:
        return input.new_full((), share)
    return input.new_empty((*input.shape[:-1], width)).bernoulli_(share)


def _public(call: _Call) -> Results:
    return _run(_ops.public, call)


def _reference(call: _Call) -> Results:
    if all(isinstance(tensor, Tensor) for _, tensor in _named(call)):
        _misfit(call)  # for native knows what is no tensor
    extras = (
        call.mask is not None
        or call.peepholes
        or call.zoneout_hidden
        or call.zoneout_cell
        or (call.activation, call.recurrent_activation) != (0, 1)
    )
    # Native has no rules for vmap and forward mode.
    if extras or _calls.inside_transform() or forward_ad._current_level >= 0:
        return _run(_ops.reference, call)
    h, c = call.h, call.c
    if h is None or c is None:
        batch = _batch(call)
        units, width = call.params[0].shape[0] // 4, call.params[1].shape[1]
        h = call.input.new_zeros((call.layers, batch, width)) if h is None else h
        c = call.input.new_zeros((call.layers, batch, units)) if c is None else c
    options = (call.has_biases, call.num_layers, call.dropout, call.train, call.bidirectional)
    params = list(call.params)
    if call.batch_sizes is not None:
        return torch.lstm(call.input, call.batch_sizes, (h, c), params, *options)
    return torch.lstm(call.input, (h, c), params, *options, call.batch_first)


def _is_traced(batch_sizes: Tensor) -> bool:
    """Whether a tracer sees their numbers as data."""
    return torch.compiler.is_compiling() or type(batch_sizes) is not Tensor


def _batch(call: _Call) -> int:
    if call.batch_sizes is None:
        return call.input.shape[0 if call.batch_first else 1]
    return int(call.batch_sizes[0]) if call.batch_sizes.numel() else 0


_OP = _calls.Op("lstm", "lstm", _public, _reference, _misfit, _named, renamed=True)
# What the operator itself falls back to is slow: native has kernels of its own for GPUs.
_native_on_gpu = not _OP.has_kernels("cuda")


def lstm(
    input: Tensor | PackedSequence,
    hx: State | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    mask: Tensor | None = None,
    peepholes: Sequence[Tensor] | None = None,
    zoneout_hidden: float = 0.0,
    zoneout_cell: float = 0.0,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    recompute: bool = False,
) -> tuple[Any, State]:
    """The layers of an LSTM over sequences, one kernel each, differentiable to any order.

    The same values, gradients, dtypes and errors as `torch.lstm(...)`, whose arguments it takes. A
    call that no kernel serves runs on torch's own operators, with a warning once per reason (see
    `twinfuse.explain` and `twinfuse.strict`).

    For its gradient a layer keeps 5H + R elements of the input's dtype for every step of every
    sequence, of H units and an output of R, besides its inputs and outputs. With `recompute` it
    keeps nothing of these, and runs forward a second time in the backward pass.

    Args:
        input: `[T, B, I]`, with `batch_first` `[B, T, I]`, any strides, as all of them; float32,
            float64, bfloat16 or float16 for the fused kernels. Or a `PackedSequence`.
        hx: h `[L, B, R]` and c `[L, B, H]` before the first step, for L layers (times two if they
            are bidirectional), of sequences in the order of the user; None, or one of them None,
            for zeros.
        params: weights as `nn.LSTM` keeps them, one direction of a layer after the other:
            weight_ih `[4H, I]`, weight_hh `[4H, R]`, with `has_biases` bias_ih and bias_hh `[4H]`,
            and where there is a projection weight_hr `[R, H]`.
        dropout: the share of a layer's output that is zeroed when `train`, but for the last layer.
        mask: bool, `[T, B]` or with `batch_first` `[B, T]`: where it is False a sequence skips the
            step; the output there is that of the last step that it did not skip, or 0.
        peepholes: for each direction of each layer `[3, H]`, weights of the cell state in the gates
            i, f and o.
        zoneout_hidden, zoneout_cell: how often an element of the state stays what it was when
            `train`; without it, their mean.
        activation, recurrent_activation: of g and the new cell state, and of the other gates:
            "tanh", "sigmoid", "relu" or "hard_sigmoid".
        recompute: time for memory, see above.

    Returns:
        The output `[T, B, D * R]` (`[B, T, D * R]` with `batch_first`, contiguous as either;
        a `PackedSequence` for one), of D directions; h and c after the last step.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together; the text names the argument,
            what was expected and what was got.
        TypeError: `hx` is no pair, or an argument is no tensor.
        ValueError: an unknown activation, or a share that is none.
    """
    if isinstance(input, _Proxy):
        return handle_torch_function(
            lstm,
            (input,),
            *(input, hx, params, has_biases, num_layers, dropout, train, bidirectional),
            batch_first,
            mask=mask,
            peepholes=peepholes,
            zoneout_hidden=zoneout_hidden,
            zoneout_cell=zoneout_cell,
            activation=activation,
            recurrent_activation=recurrent_activation,
            recompute=recompute,
        )
    call = _call(
        *(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first),
        mask=mask,
        peepholes=peepholes,
        zoneout_hidden=zoneout_hidden,
        zoneout_cell=zoneout_cell,
        activation=activation,
        recurrent_activation=recurrent_activation,
        recompute=recompute,
    )
    output, h, c = _serve(call)
    if not isinstance(input, PackedSequence):
        return output, (h, c)
    if (order := input.unsorted_indices) is not None:
        h, c = h.index_select(1, order), c.index_select(1, order)
    return PackedSequence(output, input.batch_sizes, input.sorted_indices, order), (h, c)


def _serve(call: _Call) -> Results:
    if _are_unusual(call.tensors()) or (_native_on_gpu and call.input.is_cuda):
        return _OP.unusual(call)
    try:
        _check_counts(call)
        return _run(_ops.call, call)
    except Exception as error:
        if str(error).startswith("lstm: batch_sizes: "):
            raise  # native takes some of them, and leaves out what they do not count
        return _OP.refused(error, call)


def _call(
    input: Tensor | PackedSequence,
    hx: State | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    mask: Tensor | None,
    peepholes: Sequence[Tensor] | None,
    zoneout_hidden: float,
    zoneout_cell: float,
    activation: str,
    recurrent_activation: str,
    recompute: bool,
) -> _Call:
    h, c = (None, None) if hx is None else pair("lstm", hx)
    data: Any = input
    batch_sizes = None
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, _ = input
        batch_first = False
        if order is not None:
            h, c = (None if state is None else state.index_select(1, order) for state in (h, c))
    for name, share in (("zoneout_hidden", zoneout_hidden), ("zoneout_cell", zoneout_cell)):
        if not 0 <= share <= 1:
            raise ValueError(f"lstm: {name}: expected a number from 0 to 1, got {share}")
    act, gate = activation_numbers("lstm", activation, recurrent_activation)
    return _Call(
        *(data, batch_sizes, h, c, tuple(params), has_biases, num_layers, dropout, train),
        *(bidirectional, batch_first, mask, tuple(peepholes or ()), zoneout_hidden, zoneout_cell),
        *(act, gate, recompute),
    )


_OP.serve(lstm, lambda *args, **options: (_call(*args, **options),))
