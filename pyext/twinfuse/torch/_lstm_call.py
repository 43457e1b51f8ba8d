"""What `twinfuse.torch.lstm` was called with, and whether it fits together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from twinfuse import _core
from twinfuse.torch import _calls, _operators
from twinfuse.torch._lstm_reference import missing_on_gpu, noise_needs_gradient
from twinfuse.torch.lstm_cell import (
    State,
    activation_numbers,
    broadcast,
    check_epsilon,
    expected,
    pair,
)


class Call(NamedTuple):
    """Arguments of `lstm`, packed sequences taken apart and in order."""

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
    norm_epsilon: float
    # What else has a tensor for each direction of each layer, by the names of arguments: only what
    # is given.
    lists: dict[str, tuple[Tensor, ...]]
    zoneout_hidden: float
    zoneout_cell: float
    recurrent_dropout: float
    activation: int
    recurrent_activation: int
    recompute: bool

    @property
    def is_plain(self) -> bool:
        """Whether it has no option that `nn.LSTM` has not, and is not packed."""
        return self.batch_sizes is None and self.mask is None and self[_LISTS:] == _PLAIN

    @property
    def layers(self) -> int:
        """Layers of one direction each."""
        return self.num_layers * (2 if self.bidirectional else 1)

    @property
    def batch(self) -> int:
        if self.batch_sizes is None:
            return self.input.shape[0 if self.batch_first else 1]
        return int(self.batch_sizes[0]) if self.batch_sizes.numel() else 0

    @property
    def batch_is_traced(self) -> bool:
        """Whether a tracer sees the sizes of packed sequences as data."""
        sizes = self.batch_sizes
        return sizes is not None and (torch.compiler.is_compiling() or type(sizes) is not Tensor)

    def tensors(self) -> tuple[Tensor | None, ...]:
        found = (self.input, self.h, self.c, self.mask, *self.params)
        for tensors in self.lists.values():
            found += tensors
        return found


_LISTS = Call._fields.index("lists")
_PLAIN: tuple[Any, ...] = ({}, 0, 0, 0, 0, 1, False)  # from `lists` on


def make(
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
    norms: Sequence[Tensor] | None,
    norm_epsilon: float,
    zoneout_hidden: float,
    zoneout_cell: float,
    recurrent_dropout: float,
    dropouts_input: Sequence[Tensor] | None,
    dropouts_hidden: Sequence[Tensor] | None,
    activation: str,
    recurrent_activation: str,
    recompute: bool,
) -> Call:
    h, c = (None, None) if hx is None else pair("lstm", hx)
    lists: dict[str, tuple[Tensor, ...]] = {}
    if peepholes or norms or dropouts_input or dropouts_hidden:
        given = {"peepholes": peepholes, "norms": norms}
        given |= {"dropouts_input": dropouts_input, "dropouts_hidden": dropouts_hidden}
        lists = {name: tuple(tensors) for name, tensors in given.items() if tensors}
        check_epsilon("lstm", norm_epsilon)
    data: Any = input
    batch_sizes = None
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, _ = input
        batch_first = False
        if order is not None:
            h, c = (None if state is None else state.index_select(1, order) for state in (h, c))
            for name in lists.keys() & {"dropouts_input", "dropouts_hidden"}:
                lists[name] = tuple(_sorted(name, tensor, order) for tensor in lists[name])
    for name, share in (
        ("zoneout_hidden", zoneout_hidden),
        ("zoneout_cell", zoneout_cell),
        ("recurrent_dropout", recurrent_dropout),
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"lstm: {name}: expected a number from 0 to 1, got {share}")
    if recurrent_dropout and dropouts_hidden:
        raise ValueError(
            f"lstm: recurrent_dropout: expected 0 with dropouts_hidden, got {recurrent_dropout}"
        )
    act, gate = activation_numbers("lstm", activation, recurrent_activation)
    return Call(
        *(data, batch_sizes, h, c, tuple(params), has_biases, num_layers, dropout, train),
        *(bidirectional, batch_first, mask, norm_epsilon, lists, zoneout_hidden, zoneout_cell),
        *(recurrent_dropout, act, gate, recompute),
    )


def _sorted(name: str, dropout: Tensor, order: Tensor) -> Tensor:
    if dropout.dim() < 2 or dropout.shape[-2] == 1:
        return dropout
    if dropout.shape[-2] < len(order):
        _refuse(name, f"one row or {len(order)} for each gate", f"shape {list(dropout.shape)}")
    return dropout.index_select(-2, order)


def _refuse(name: str, wanted: str, got: object) -> None:
    raise RuntimeError(f"lstm: {name}: expected {wanted}, got {got}")


def check_counts(call: Call) -> None:
    """What would be an error of Python's further on."""
    count, given = call.layers, len(call.params)
    least = 4 if call.has_biases else 2
    if given not in (count * least, count * (least + 1)) or count < 1:
        _refuse("params", f"{count * least} tensors, or {count * (least + 1)}", given)
    for name, tensors in call.lists.items():
        if len(tensors) != count:
            _refuse(name, f"{count} tensors", len(tensors))
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


def misfit(call: Call) -> str:
    """Raises for sizes that do not fit together: native looks at few of them, and reads beyond."""
    check_counts(call)
    units = call.params[0].shape[0] // 4
    per_layer = len(call.params) // call.layers
    projected = per_layer % 2 == 1
    width = call.params[per_layer - 1].shape[0] if projected else units
    gates = 4 * units
    directions = 2 if call.bidirectional else 1
    inputs = [call.input.shape[-1]] * directions
    inputs += [width * directions] * (call.layers - directions)
    sizes: list[tuple[int, ...]] = [(gates, width), (gates,), (gates,), (width, units)]
    sizes = sizes[: 3 if call.has_biases else 1] + ([sizes[3]] if projected else [])
    checks: list[str] = []
    for layer, size in enumerate(inputs):
        start, wanted = layer * per_layer, [(gates, size), *sizes]
        checks += [
            expected(f"params[{i}]", tensor, *shape)
            for i, (tensor, shape) in enumerate(zip(call.params[start:], wanted), start)
        ]
    for name, shape in (("peepholes", (3, units)), ("norms", (2, gates))):
        for i, tensor in enumerate(call.lists.get(name, ())):
            checks.append(expected(f"{name}[{i}]", tensor, *shape))
    if not call.batch_is_traced:
        batch = call.batch
        if call.h is not None:
            checks.append(expected("hx[0]", call.h, call.layers, batch, width))
        if call.c is not None:
            checks.append(expected("hx[1]", call.c, call.layers, batch, units))
        for name, widths in (
            ("dropouts_input", inputs),
            ("dropouts_hidden", [width] * call.layers),
        ):
            for i, (tensor, n) in enumerate(zip(call.lists.get(name, ()), widths)):
                more = call.batch_sizes is not None and tensor.dim() > 1  # than `batch` may be
                rows = max(batch, tensor.shape[-2]) if more else batch
                checks.append(broadcast(f"{name}[{i}]", tensor, 4, rows, n))
    if call.mask is not None:
        checks.append(expected("mask", call.mask, *call.input.shape[:2]))
        if call.mask.dtype != torch.bool:
            checks.append(f"mask: expected bool, got {call.mask.dtype}")
    for found in checks:
        if found:
            raise RuntimeError(f"lstm: {found}")
    options: dict[str, object] = {"projection": projected or None, **call.lists}
    options["recurrent_dropout"] = (call.train and call.recurrent_dropout) or None
    return needs_gradient(call) or missing_on_gpu(call.input, options)


def needs_gradient(call: Call) -> str:
    """Why the kernels cannot take the dropouts, or ""."""
    names = ("dropouts_input", "dropouts_hidden")
    for dropouts in zip_longest(*(call.lists.get(name, ()) for name in names)):
        if reason := noise_needs_gradient(None, None, *dropouts):
            return reason
    return ""


def named(call: Call) -> _calls.Named:
    names = ("input", "hx[0]", "hx[1]")
    found = [(n, t) for n, t in zip(names, (call.input, call.h, call.c)) if t is not None]
    for name, tensors in (("params", call.params), *call.lists.items()):
        found += [(f"{name}[{i}]", tensor) for i, tensor in enumerate(tensors)]
    return found


def on_gpu(backward: bool, dtype: str, call: Call) -> str:
    """What takes the steps of the layers."""
    packed = call.batch_sizes
    steps = call.input.shape[1 if call.batch_first else 0] if packed is None else len(packed)
    sizes = {"steps": steps, "batch": call.batch, "units": call.params[0].shape[0] // 4}
    tf32 = _operators.allows_tf32(torch.backends.cudnn)
    return _core.lstm_gpu_kernel(backward, dtype, tf32, call.input.device.index, **sizes)
