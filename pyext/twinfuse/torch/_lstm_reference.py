"""The LSTM's equations (csrc/include/twinfuse/lstm.h) by torch's own operators.

They serve what no kernel does: transforms, gradients of gradients, and options that the native
layers lack where no kernel runs. Autograd, forward mode and vmap can go through all of them.

Arguments are those of the private operators, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# TwinfuseActivation.
ACTIVATIONS = {"tanh": 0, "sigmoid": 1, "relu": 2, "hard_sigmoid": 3}


def _hard_sigmoid(value: Tensor) -> Tensor:
    # F.hardsigmoid takes 1 / 6 in float32, in float64 too.
    return (value / 6 + 0.5).clamp(0, 1)


_FUNCTIONS = (torch.tanh, torch.sigmoid, torch.relu, _hard_sigmoid)


def zoneout_needs_gradient(*zoneouts: Tensor | None) -> str:
    """Why the kernels cannot take these, or ""."""
    for kind, zoneout in zip(("hidden", "cell"), zoneouts):
        if zoneout is not None and zoneout.requires_grad and torch.is_grad_enabled():
            return f"zoneout_{kind}: no kernel computes its gradient"
    return ""


def _slope(activation: int, value: Tensor) -> Tensor:
    """The derivative where the activation has this value."""
    if activation == 0:
        return 1 - value * value
    if activation == 1:
        return value * (1 - value)
    if activation == 2:
        return (value > 0).to(value.dtype)
    return ((value > 0) & (value < 1)).to(value.dtype) / 6


def check_dtype(op: str, input: Tensor) -> None:
    # Native refuses the others, with which torch's operators would compute something.
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"{op}: input: expected a floating-point dtype, got {input.dtype}")


def _mixed(zoneout: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if zoneout is None else zoneout * old + (1 - zoneout) * new


def step(
    from_input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    zoneout_hidden: Tensor | None,
    zoneout_cell: Tensor | None,
    activation: int,
    recurrent_activation: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The next state, and the gates."""
    act, gate = _FUNCTIONS[activation], _FUNCTIONS[recurrent_activation]
    i, f, g, o = (from_input + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    if peephole is not None:
        i, f = i + peephole[0] * c, f + peephole[1] * c
    i, f, g = gate(i), gate(f), act(g)
    cell = f * c + i * g
    o = gate(o if peephole is None else o + peephole[2] * cell)
    hidden = o * act(cell)
    if weight_hr is not None:
        hidden = F.linear(hidden, weight_hr)
    return _mixed(zoneout_hidden, h, hidden), _mixed(zoneout_cell, c, cell), (i, f, g, o)


class _Cut:
    """Tensors of a whole sequence cut into steps, and put together again."""

    def __init__(self, input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> None:
        self._time = 1 if batch_first else 0
        self._sizes: list[int] | None = None if batch_sizes is None else batch_sizes.tolist()
        self._like, self._leading = input, input.shape[:-1]
        if self._sizes is not None:
            self.steps, self.batch = len(self._sizes), self._sizes[0]
        else:
            self.steps, self.batch = input.shape[self._time], input.shape[1 - self._time]

    def steps_of(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unbind(self._time) if self._sizes is None else tensor.split(self._sizes)

    def optional(self, tensor: Tensor | None, width: int) -> Sequence[Tensor | None]:
        """Of a zoneout, which may have any shape that broadcasts."""
        if tensor is None:
            return [None] * self.steps
        return self.steps_of(tensor.expand(*self._leading, width))

    def rows_of(self, rows: Tensor) -> Sequence[Tensor]:
        """Of what was saved."""
        return self.steps_of(rows if self._sizes is not None else rows.unflatten(0, self._leading))

    def join(self, steps: list[Tensor], width: int) -> Tensor:
        if not steps:
            return self._like.new_empty((*self._leading, width))
        return torch.stack(steps, self._time) if self._sizes is None else torch.cat(steps)

    def join_rows(self, steps: list[Tensor], width: int) -> Tensor:
        joined = self.join(steps, width)
        return joined if self._sizes is not None else joined.flatten(0, 1)

    def order(self, reverse: bool) -> Iterable[int]:
        return reversed(range(self.steps)) if reverse else range(self.steps)


def _replaced(new: Tensor, whole: Tensor) -> Tensor:
    """`whole` with its first rows replaced: those of sequences that have this step."""
    count = new.shape[0]
    return new if count == whole.shape[0] else torch.cat([new, whole[count:]])


def forward(
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
    """Output, last h and c; and if `save`, else None: gates, cells and hidden of all rows."""
    check_dtype("lstm", input)
    cut = _Cut(input, batch_sizes, batch_first)
    units, width = weight_hh.shape[0] // 4, weight_hh.shape[1]
    h = input.new_zeros(cut.batch, width) if h is None else h
    c = input.new_zeros(cut.batch, units) if c is None else c
    projected = cut.steps_of(F.linear(input, weight_ih, bias_ih))
    hidden_zoneout = cut.optional(zoneout_hidden, width)
    cell_zoneout = cut.optional(zoneout_cell, units)
    masks = None if mask is None else cut.steps_of(mask.unsqueeze(-1))

    outputs: list[Any] = [None] * cut.steps
    saved: list[list[Any]] = [[None] * cut.steps for _ in range(3)]
    last = torch.zeros_like(h)
    for t in cut.order(reverse):
        count = projected[t].shape[0]
        old_h, old_c = (h, c) if count == h.shape[0] else (h[:count], c[:count])
        new_h, new_c, gates = step(
            projected[t],
            old_h,
            old_c,
            weight_hh,
            bias_hh,
            weight_hr,
            peephole,
            hidden_zoneout[t],
            cell_zoneout[t],
            activation,
            recurrent_activation,
        )
        outputs[t] = new_h
        if masks is not None:
            last = outputs[t] = torch.where(masks[t], new_h, 0 if zero_masked_output else last)
            new_h, new_c = (
                torch.where(masks[t], new, old) for new, old in ((new_h, old_h), (new_c, old_c))
            )
        if save:
            for each, value in zip(saved, (torch.cat(gates, -1), old_c, old_h)):
                each[t] = value
        h, c = _replaced(new_h, h), _replaced(new_c, c)
    widths = (4 * units, units, width)
    rows = (cut.join_rows(*each) if save else None for each in zip(saved, widths))
    return cut.join(outputs, width), h, c, *rows


def backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
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
    needs: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of `GRADIENTS`, of those that `needs` has the bit of."""
    cut = _Cut(input, batch_sizes, batch_first)
    units, width = weight_hh.shape[0] // 4, weight_hh.shape[1]
    all_gates, all_cells = cut.rows_of(gates), cut.rows_of(cells)
    grads = [None] * cut.steps if grad_output is None else cut.steps_of(grad_output)
    hidden_zoneout = cut.optional(zoneout_hidden, width)
    cell_zoneout = cut.optional(zoneout_cell, units)
    masks = None if mask is None else cut.steps_of(mask.unsqueeze(-1))

    dh = hidden.new_zeros(cut.batch, width) if grad_h is None else grad_h
    dc = hidden.new_zeros(cut.batch, units) if grad_c is None else grad_c
    repeated = torch.zeros_like(dh)  # from outputs of later steps that repeat this one's
    rows: list[list[Any]] = [[None] * cut.steps for _ in range(4)]
    for t in cut.order(not reverse):
        count = all_cells[t].shape[0]
        old_dh, old_dc = dh[:count], dc[:count]
        new_dh, grad = old_dh, grads[t]
        if grad is not None:
            if masks is not None and zero_masked_output:
                grad = torch.where(masks[t], grad, 0)
            elif masks is not None:
                grad = grad + repeated
                repeated = torch.where(masks[t], 0, grad)
            new_dh = new_dh + grad
        da, new_dh, new_dc, *rest = step_backward(
            new_dh,
            old_dc,
            all_gates[t],
            all_cells[t],
            weight_hh,
            weight_hr,
            peephole,
            hidden_zoneout[t],
            cell_zoneout[t],
            activation,
            recurrent_activation,
        )
        if masks is not None:
            da, *rest = (torch.where(masks[t], value, 0) for value in (da, *rest))
            new_dh = torch.where(masks[t], new_dh, old_dh)
            new_dc = torch.where(masks[t], new_dc, old_dc)
        for each, value in zip(rows, (da, *rest)):
            each[t] = value
        dh, dc = _replaced(new_dh, dh), _replaced(new_dc, dc)

    widths = (4 * units, units, width, units)
    da, unprojected, dhidden, cell = (cut.join_rows(*each) for each in zip(rows, widths))
    inputs = input if batch_sizes is not None else input.flatten(0, 1)
    results: list[Any] = [None] * len(GRADIENTS)
    if needs & 1:
        results[0] = cut.join(rows[0], 4 * units) @ weight_ih
    results[1:3] = (value if needs & 2 << i else None for i, value in enumerate((dh, dc)))
    if needs & 8:
        results[3] = da.t() @ inputs
    if needs & 16:
        results[4] = da.t() @ hidden
    if needs & 32:
        results[5] = da.sum(0)
    if needs & 64:
        results[6] = dhidden.t() @ unprojected
    if needs & 128:
        di, df, _, do = da.chunk(4, -1)
        pairs = ((di, cells), (df, cells), (do, cell))
        results[7] = torch.stack([(grad * value).sum(0) for grad, value in pairs])
    return tuple(results)


GRADIENTS = ("input", "h", "c", "weight_ih", "weight_hh", "bias", "weight_hr", "peephole")


def step_backward(
    dh: Tensor,
    dc: Tensor,
    gates: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    zoneout_hidden: Tensor | None,
    zoneout_cell: Tensor | None,
    activation: int,
    recurrent_activation: int,
) -> tuple[Tensor, ...]:
    """Gradients of the gates before their activations and of the state before the step.

    Behind them o * t(c~), the gradient of the hidden state without zoneout, and c~, which those of
    the projection and the peepholes need.
    """
    i, f, g, o = gates.chunk(4, -1)
    cell = f * c + i * g
    bounded = _FUNCTIONS[activation](cell)
    dhidden = dh if zoneout_hidden is None else (1 - zoneout_hidden) * dh
    dcell = dc if zoneout_cell is None else (1 - zoneout_cell) * dc
    dout = dhidden if weight_hr is None else dhidden @ weight_hr
    do = dout * bounded * _slope(recurrent_activation, o)
    dcell = dcell + dout * o * _slope(activation, bounded)
    if peephole is not None:
        dcell = dcell + peephole[2] * do
    di = dcell * g * _slope(recurrent_activation, i)
    df = dcell * c * _slope(recurrent_activation, f)
    dg = dcell * i * _slope(activation, g)
    da = torch.cat([di, df, dg, do], -1)
    old_dh, old_dc = da @ weight_hh, dcell * f
    if peephole is not None:
        old_dc = old_dc + peephole[0] * di + peephole[1] * df
    if zoneout_hidden is not None:
        old_dh = old_dh + zoneout_hidden * dh
    if zoneout_cell is not None:
        old_dc = old_dc + zoneout_cell * dc
    return da, old_dh, old_dc, o * bounded, dhidden, cell
