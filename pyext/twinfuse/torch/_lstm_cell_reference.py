"""One step of an LSTM by torch's own operators (see `_lstm_reference`)."""

from __future__ import annotations

import torch
from torch import Tensor

from twinfuse.torch._lstm_reference import Step, check_dtype


def forward(
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
    """The next h and c; and if `save`, else None: the gates."""
    check_dtype("lstm_cell", input)
    step = Step(
        *(weight_ih, weight_hh, bias_ih, bias_hh, None, peephole, norm),
        *(activation, recurrent_activation, norm_epsilon),
    )
    sums = step.from_input(input, _factors(dropout_input, input))
    noise = (zoneout_hidden, zoneout_cell, _factors(dropout_hidden, h))
    new_h, new_c, gates = step.forward(sums, h, c, *noise)
    return new_h, new_c, torch.cat(gates, -1) if save else None


def _factors(dropout: Tensor | None, value: Tensor) -> Tensor | None:
    return None if dropout is None else dropout.expand(4, *value.shape)


def backward(
    needs: int,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    peephole: Tensor | None = None,
    norm: Tensor | None = None,
    zoneout_hidden: Tensor | None = None,
    zoneout_cell: Tensor | None = None,
    dropout_input: Tensor | None = None,
    dropout_hidden: Tensor | None = None,
    activation: int = 0,
    recurrent_activation: int = 1,
    norm_epsilon: float = 1e-5,
) -> tuple[Tensor | None, ...]:
    """Those of `GRADIENTS` that `needs` has the bit of, but for `weight_hr`."""
    step = Step(
        *(weight_ih, weight_hh, None, None, None, peephole, norm),
        *(activation, recurrent_activation, norm_epsilon),
    )
    factors = _factors(dropout_hidden, h)
    dh, dc, rows = step.backward(
        torch.zeros_like(c) if grad_h is None else grad_h,
        torch.zeros_like(c) if grad_c is None else grad_c,
        *(gates, c, zoneout_hidden, zoneout_cell, factors),
    )
    of_layer = needs & 63 | (needs & ~63) << 1
    results = step.gradients(rows, input, h, c, _factors(dropout_input, input), factors, of_layer)
    results[1:3] = (value if needs & 2 << i else None for i, value in enumerate((dh, dc)))
    return *results[:6], *results[7:]
