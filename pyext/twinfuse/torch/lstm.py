"""Fused LSTM: layers over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function

from twinfuse.torch import _binding, _calls, _lstm_call
from twinfuse.torch import _lstm_ops as _ops
from twinfuse.torch._lstm_call import Call, check_counts
from twinfuse.torch.lstm_cell import State

__all__ = ["lstm"]

Layer = Callable[..., tuple[Tensor, Tensor, Tensor]]
Results = tuple[Tensor, Tensor, Tensor]

# Aliases, because a call on a tiny input costs as much as its guards.
_are_unusual = _calls.are_unusual
_Proxy = torch.fx.Proxy
_raising = _binding.raising
# Of the operator's arguments: those between the biases and `batch_first`, and the defaults of what
# is behind `reverse`.
_NO_TENSORS = (None,) * 9
_USUAL = (0, 1, False, 1e-5, False)


def _run(layer: Layer, call: Call) -> Results:
    """All layers, each direction of each by `layer`."""
    params, count = call.params, call.layers
    per_layer, directions = len(params) // count, count // call.num_layers
    projected = per_layer % 2 == 1
    is_plain = call.is_plain and not projected
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
            args: tuple[Any, ...] = (input, hs[i], cs[i], weight_ih, weight_hh, bias_ih, bias_hh)
            if not is_plain:
                args += _extras(call, i, input, weight_hh, weight_hr, i > first)
            elif call.batch_first or i > first:
                args += (*_NO_TENSORS, call.batch_first, i > first)
            output, h, c = layer(*args)
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


def _extras(
    call: Call,
    layer: int,
    input: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    reverse: bool,
) -> tuple[Any, ...]:
    """The operator's arguments behind the biases."""
    width, units = weight_hh.shape[1], weight_hh.shape[0] // 4
    rare = (call.activation, call.recurrent_activation, False, call.norm_epsilon, call.recompute)
    return (
        weight_hr,
        _given(call, "peepholes", layer),
        _given(call, "norms", layer),
        call.batch_sizes,
        call.mask,
        _zoneout(call, call.zoneout_hidden, input, width),
        _zoneout(call, call.zoneout_cell, input, units),
        _given(call, "dropouts_input", layer),
        _hidden_dropout(call, layer, input, width),
        call.batch_first,
        reverse,
        *(() if rare == _USUAL else rare),
    )


def _given(call: Call, name: str, layer: int) -> Tensor | None:
    return call.lists[name][layer] if name in call.lists else None


def _hidden_dropout(call: Call, layer: int, input: Tensor, width: int) -> Tensor | None:
    if not (call.recurrent_dropout and call.train):
        return _given(call, "dropouts_hidden", layer)
    if not call.batch_is_traced:
        batch = call.batch
    else:  # more than enough where the number of sequences is data
        batch = input.shape[0] if call.h is None else call.h.shape[1]
    return F.dropout(input.new_ones((4, batch, width)), call.recurrent_dropout)


def _zoneout(call: Call, share: float, input: Tensor, width: int) -> Tensor | None:
    if not share:
        return None
    if not call.train:
        return input.new_full((), share)
    return input.new_empty((*input.shape[:-1], width)).bernoulli_(share)


def _public(call: Call) -> Results:
    return _run(_ops.public, call)


def _reference(call: Call) -> Results:
    if all(isinstance(tensor, Tensor) for _, tensor in _lstm_call.named(call)):
        _lstm_call.misfit(call)  # for native knows what is no tensor
    extras = (
        call.mask is not None
        or call.lists
        or call.zoneout_hidden
        or call.zoneout_cell
        or (call.recurrent_dropout and call.train)
        or (call.activation, call.recurrent_activation) != (0, 1)
    )
    # Native has no rules for vmap and forward mode.
    if extras or _calls.inside_transform() or forward_ad._current_level >= 0:
        return _run(_ops.reference, call)
    h, c = call.h, call.c
    if h is None or c is None:
        batch = call.batch
        units, width = call.params[0].shape[0] // 4, call.params[1].shape[1]
        h = call.input.new_zeros((call.layers, batch, width)) if h is None else h
        c = call.input.new_zeros((call.layers, batch, units)) if c is None else c
    options = (call.has_biases, call.num_layers, call.dropout, call.train, call.bidirectional)
    params = list(call.params)
    if call.batch_sizes is not None:
        return torch.lstm(call.input, call.batch_sizes, (h, c), params, *options)
    return torch.lstm(call.input, (h, c), params, *options, call.batch_first)


_OP = _calls.Op(
    *("lstm", "lstm", _public, _reference, _lstm_call.misfit, _lstm_call.named),
    renamed=True,
    on_gpu=_lstm_call.on_gpu,
)
# What the operator itself falls back to is slow on a GPU, for which native has kernels.
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
    norms: Sequence[Tensor] | None = None,
    norm_epsilon: float = 1e-5,
    zoneout_hidden: float = 0.0,
    zoneout_cell: float = 0.0,
    recurrent_dropout: float = 0.0,
    dropouts_input: Sequence[Tensor] | None = None,
    dropouts_hidden: Sequence[Tensor] | None = None,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    recompute: bool = False,
) -> tuple[Any, State]:
    """The layers of an LSTM over sequences, one kernel each, differentiable to any order.

    The same values, gradients, dtypes and errors as `torch.lstm(...)`, whose arguments it takes. A
    call that no kernel serves runs on torch's own operators, with a warning once per reason (see
    `twinfuse.explain` and `twinfuse.strict`).

    For its gradient a layer keeps 5H + R elements of the input's dtype for every step of every
    sequence, of H units and an output of R, besides its inputs and outputs; 13H + R with a norm.
    With `recompute` it keeps nothing of these, and runs forward a second time in the backward pass.

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
        norms: for each direction of each layer `[2, 4H]`, scales of W_ih x and of W_hh h, each of
            which is normalised over all of its 4H elements (less their mean, over the root of
            their variance plus `norm_epsilon`) before biases are added.
        zoneout_hidden, zoneout_cell: how often an element of the state stays what it was when
            `train`; without it, their mean.
        recurrent_dropout: the share of h that is zeroed when `train`, drawn for each gate, and for
            all steps at once; what is left of h is divided by the share that is.
        dropouts_input, dropouts_hidden: for each direction of each layer such factors that the
            caller has drawn, 0 or `1 / (1 - rate)`: of what broadcasts to `[4, B, I]`, for the
            input, and to `[4, B, R]`, for h. They are taken whatever `train` is, the second of
            them in place of `recurrent_dropout`. The kernels have no gradient of them.
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
        ValueError: an unknown activation, a share that is none, or an epsilon below 0.
    """
    if isinstance(input, _Proxy):
        return handle_torch_function(
            lstm,
            (input,),
            *(input, hx, params, has_biases, num_layers, dropout, train, bidirectional),
            batch_first,
            mask=mask,
            peepholes=peepholes,
            norms=norms,
            norm_epsilon=norm_epsilon,
            zoneout_hidden=zoneout_hidden,
            zoneout_cell=zoneout_cell,
            recurrent_dropout=recurrent_dropout,
            dropouts_input=dropouts_input,
            dropouts_hidden=dropouts_hidden,
            activation=activation,
            recurrent_activation=recurrent_activation,
            recompute=recompute,
        )
    call = _lstm_call.make(
        *(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first),
        mask=mask,
        peepholes=peepholes,
        norms=norms,
        norm_epsilon=norm_epsilon,
        zoneout_hidden=zoneout_hidden,
        zoneout_cell=zoneout_cell,
        recurrent_dropout=recurrent_dropout,
        dropouts_input=dropouts_input,
        dropouts_hidden=dropouts_hidden,
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


def _serve(call: Call) -> Results:
    if (
        _are_unusual(call.tensors())
        or (_native_on_gpu and call.input.is_cuda)
        or (call.lists and _lstm_call.needs_gradient(call))
    ):
        return _OP.unusual(call)
    try:
        check_counts(call)
        if not call.input.is_cuda:
            return _run(_ops.call, call)
        with _raising:
            return _run(_ops.call, call)
    except Exception as error:
        if str(error).startswith("lstm: batch_sizes: "):
            raise  # native takes some of them, and leaves out what they do not count
        return _OP.refused(error, call)


_OP.serve(lstm, lambda *args, **options: (_lstm_call.make(*args, **options),))
