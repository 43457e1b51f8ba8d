"""One step of an LSTM by torch's own operators, as `_lstm_reference` has whole sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twinfuse.torch._lstm_reference import check_dtype, step, step_backward


def forward(
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
    """The next h and c; and if `save`, else None: the gates."""
    check_dtype("lstm_cell", input)
    new_h, new_c, gates = step(
        F.linear(input, weight_ih, bias_ih),
        h,
        c,
        weight_hh,
        bias_hh,
        None,
        peephole,
        zoneout_hidden,
        zoneout_cell,
        activation,
        recurrent_activation,
    )
    return new_h, new_c, torch.cat(gates, -1) if save else None


def backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    peephole: Tensor | None,
    zoneout_hidden: Tensor | None,
    zoneout_cell: Tensor | None,
    activation: int,
    recurrent_activation: int,
    needs: int,
) -> tuple[Tensor | None, ...]:
    """Those of `GRADIENTS` in `_lstm_reference` but for `weight_hr`, which a cell has not."""
    da, dh, dc, _, _, cell = step_backward(
        torch.zeros_like(c) if grad_h is None else grad_h,
        torch.zeros_like(c) if grad_c is None else grad_c,
        gates,
        c,
        weight_hh,
        None,
        peephole,
        zoneout_hidden,
        zoneout_cell,
        activation,
        recurrent_activation,
    )
    results: list[Any] = [None] * 7
    if needs & 1:
        results[0] = da @ weight_ih
    results[1:3] = (value if needs & 2 << i else None for i, value in enumerate((dh, dc)))
    if needs & 8:
        results[3] = da.t() @ input
    if needs & 16:
        results[4] = da.t() @ h
    if needs & 32:
        results[5] = da.sum(0)
    if needs & 64:
        di, df, _, do = da.chunk(4, -1)
        results[6] = torch.stack(
            [(grad * value).sum(0) for grad, value in ((di, c), (df, c), (do, cell))]
        )
    return tuple(results)
