"""An LSTM's layer over whole sequences by torch's own operators (see `_lstm_reference`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from twinfuse.torch._lstm_reference import Step, check_dtype


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

    def optional(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * self.steps if tensor is None else self.steps_of(tensor)

    def zoneout(self, tensor: Tensor | None, width: int) -> Sequence[Tensor | None]:
        """Of one that may have any shape that broadcasts."""
        return self.optional(None if tensor is None else tensor.expand(*self._leading, width))

    def dropout(self, tensor: Tensor | None, width: int) -> Tensor | None:
        """[4, B, n] of one that may have any shape that broadcasts, packed also more sequences."""
        if tensor is None:
            return None
        if self._sizes is not None and tensor.dim() > 1:
            tensor = tensor[..., : self.batch, :]
        return tensor.expand(4, self.batch, width)

    def every_step(self, factors: Tensor | None) -> Tensor | None:
        """[4, ...] of what `dropout` gives: the same at every step."""
        if factors is None:
            return None
        if self._sizes is not None:
            return torch.cat([factors[:, :count] for count in self._sizes], 1)
        return factors.unsqueeze(1 + self._time).expand(4, *self._leading, factors.shape[-1])

    def every_row(self, factors: Tensor | None) -> Tensor | None:
        """As `every_step`, in the order of what was saved."""
        factors = self.every_step(factors)
        return factors if factors is None or self._sizes is not None else factors.flatten(1, 2)

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


def _first(factors: Tensor | None, count: int) -> Tensor | None:
    """Those of the sequences that have a step."""
    return factors if factors is None or count == factors.shape[1] else factors[:, :count]


def forward(
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
    """Output, last h and c; and if `save`, else None: gates, cells and hidden of all rows."""
    check_dtype("lstm", input)
    step = Step(
        *(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm),
        *(activation, recurrent_activation, norm_epsilon),
    )
    cut = _Cut(input, batch_sizes, batch_first)
    units, width = weight_hh.shape[0] // 4, weight_hh.shape[1]
    h = input.new_zeros(cut.batch, width) if h is None else h
    c = input.new_zeros(cut.batch, units) if c is None else c
    factors = cut.every_step(cut.dropout(dropout_input, input.shape[-1]))
    sums, centred = map(cut.optional, step.from_input(input, factors))
    hidden_zoneout = cut.zoneout(zoneout_hidden, width)
    cell_zoneout = cut.zoneout(zoneout_cell, units)
    factors = cut.dropout(dropout_hidden, width)
    masks = None if mask is None else cut.steps_of(mask.unsqueeze(-1))

    outputs: list[Any] = [None] * cut.steps
    saved: list[list[Any]] = [[None] * cut.steps for _ in range(3)]
    last = torch.zeros_like(h)
    for t in cut.order(reverse):
        from_input: Any = (sums[t], centred[t])
        count = from_input[0].shape[0]
        old_h, old_c = (h, c) if count == h.shape[0] else (h[:count], c[:count])
        noise = (hidden_zoneout[t], cell_zoneout[t], _first(factors, count))
        new_h, new_c, gates = step.forward(from_input, old_h, old_c, *noise)
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
    widths = ((4 if norm is None else 12) * units, units, width)
    rows = (cut.join_rows(*each) if save else None for each in zip(saved, widths))
    return cut.join(outputs, width), h, c, *rows


def backward(
    needs: int,
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
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
    """Those of `GRADIENTS` that `needs` has the bit of."""
    step = Step(
        *(weight_ih, weight_hh, None, None, weight_hr, peephole, norm),
        *(activation, recurrent_activation, norm_epsilon),
    )
    cut = _Cut(input, batch_sizes, batch_first)
    units, width = weight_hh.shape[0] // 4, weight_hh.shape[1]
    all_gates, all_cells = cut.rows_of(gates), cut.rows_of(cells)
    grads = cut.optional(grad_output)
    hidden_zoneout = cut.zoneout(zoneout_hidden, width)
    cell_zoneout = cut.zoneout(zoneout_cell, units)
    factors = cut.dropout(dropout_hidden, width)
    masks = None if mask is None else cut.steps_of(mask.unsqueeze(-1))

    dh = hidden.new_zeros(cut.batch, width) if grad_h is None else grad_h
    dc = hidden.new_zeros(cut.batch, units) if grad_c is None else grad_c
    repeated = torch.zeros_like(dh)  # from outputs of later steps that repeat this one's
    widths = (4 * units, units, width, units) + (() if norm is None else (16 * units,))
    rows: list[list[Any]] = [[None] * cut.steps for _ in widths]
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
        noise = (hidden_zoneout[t], cell_zoneout[t], _first(factors, count))
        new_dh, new_dc, parts = step.backward(new_dh, old_dc, all_gates[t], all_cells[t], *noise)
        if masks is not None:
            parts = [torch.where(masks[t], part, 0) for part in parts]
            new_dh = torch.where(masks[t], new_dh, old_dh)
            new_dc = torch.where(masks[t], new_dc, old_dc)
        for each, part in zip(rows, parts):
            each[t] = part
        dh, dc = _replaced(new_dh, dh), _replaced(new_dc, dc)

    results = step.gradients(
        [cut.join_rows(*each) for each in zip(rows, widths)],
        input if batch_sizes is not None else input.flatten(0, 1),
        hidden,
        cells,
        cut.every_row(cut.dropout(dropout_input, input.shape[-1])),
        cut.every_row(factors),
        needs,
    )
    if needs & 1:
        results[0] = results[0].reshape(input.shape)
    results[1:3] = (value if needs & 2 << i else None for i, value in enumerate((dh, dc)))
    return tuple(results)
