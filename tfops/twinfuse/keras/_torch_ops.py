"""The fused ops of torch in the layouts of Keras: everything is passed on as views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import twinfuse.torch


def linear_relu(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Kernel `[K, N]`."""
    return twinfuse.torch.linear_relu(x, kernel.T, bias)


def conv_relu(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    padding: str,
    data_format: str,
    dilations: Sequence[int],
) -> Tensor:
    """Kernel `[S, C / groups, K]` or `[R, S, C / groups, K]`."""
    spatial = len(strides)
    if data_format == "channels_last":
        x = x.movedim(-1, 1)
    weight = kernel.permute(spatial + 1, spatial, *range(spatial))
    pads = _pads(x.shape[2:], weight.shape[2:], strides, padding, dilations)
    if any(low != high for low, high in pads):
        # torch's padding is the same at both ends; this one is listed from the last dimension.
        x = torch.nn.functional.pad(x, [zeros for pair in reversed(pads) for zeros in pair])
        pads = [(0, 0)] * spatial
    fused: Any = (twinfuse.torch.conv1d_relu, twinfuse.torch.conv2d_relu)[spatial - 1]
    groups = x.shape[1] // weight.shape[1]
    y = fused(x, weight, bias, tuple(strides), tuple(p for p, _ in pads), tuple(dilations), groups)
    return y.movedim(1, -1) if data_format == "channels_last" else y


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor | None],
    dropouts: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    activations: tuple[str, str],
    go_backwards: bool,
    zero_output_for_mask: bool,
    sequence: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Outputs in the order in which they are computed, None unless `sequence`; the last state.

    `weights` are kernel, recurrent kernel, and bias or None; `dropouts` are `[4, batch, ...]`, of
    inputs and of states, or None.
    """
    kernel, recurrent_kernel, bias = weights
    if go_backwards:
        x, mask = x.flip(1), None if mask is None else mask.flip(1)
    # torch has two biases that are added.
    biases = [] if bias is None else [bias, torch.zeros_like(bias)]
    of_x, of_h = (None if d is None else [d] for d in dropouts)
    outputs, (h, c) = twinfuse.torch.lstm(
        x,
        (state[0][None], state[1][None]),
        [kernel.T, recurrent_kernel.T, *biases],
        has_biases=bool(biases),
        batch_first=True,
        mask=mask,
        dropouts_input=of_x,
        dropouts_hidden=of_h,
        activation=activations[0],
        recurrent_activation=activations[1],
    )
    if zero_output_for_mask and mask is not None:
        outputs = outputs.masked_fill(~mask[..., None], 0)
    return (outputs if sequence else None), h[0], c[0]


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor | None],
    dropouts: tuple[Tensor | None, Tensor | None],
    activations: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    kernel, recurrent_kernel, bias = weights
    return twinfuse.torch.lstm_cell(
        *(x, state, kernel.T, recurrent_kernel.T, bias),
        dropout_input=dropouts[0],
        dropout_hidden=dropouts[1],
        activation=activations[0],
        recurrent_activation=activations[1],
    )


def _pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """Zeros before and after, per spatial dimension."""
    pads = []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations):
        span = (taps - 1) * dilation + 1
        if padding == "same":
            zeros = max((-(-size // stride) - 1) * stride + span - size, 0)
            pads.append((zeros // 2, zeros - zeros // 2))
        else:
            pads.append((span - 1 if padding == "causal" else 0, 0))
    return pads
