"""The numbers of a convolution, and the shapes and layouts that follow from them.

`conv` is what the private operators take: stride, dilation, padding below and padding above, each
with one number per spatial dimension, and the number of groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from twinfuse.torch import _operators

Numbers = int | Sequence[int]
IMAGES = {1: "[N, C, W]", 2: "[N, C, H, W]"}
FILTERS = {1: "[K, C / groups, S]", 2: "[K, C / groups, R, S]"}


def spread(
    rank: int, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int
) -> tuple[int, ...]:
    """The one list of the private operators, from the lists of a public one."""

    def each(name: str, value: Numbers, count: int) -> tuple[int, ...]:
        values = (value,) if isinstance(value, (int, torch.SymInt)) else tuple(value)
        if len(values) == 1:
            return values * count
        if len(values) != count:
            text = f"expected {count} numbers, got {len(values)}"
            raise RuntimeError(f"conv{rank}d_relu: {name}: {text}")
        return values

    if isinstance(padding, (int, torch.SymInt)) or len(padding) <= rank:
        padding = each("padding", padding, rank) * 2
    return (
        *each("stride", stride, rank),
        *each("dilation", dilation, rank),
        *each("padding", padding, 2 * rank),
        groups,
    )


def split(conv: Sequence[int]) -> tuple[list[int], ...]:
    rank = len(conv) // 4
    return tuple(list(conv[i * rank : (i + 1) * rank]) for i in range(4))


def is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """As native: in one dimension the weight alone decides."""
    images = (weight.unsqueeze(2),) if weight.dim() == 3 else (input, weight)
    return any(suggest_memory_format(t) == torch.channels_last for t in images)


def empty_images(like: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(sizes)
    strides, step = [], sizes[1]
    for size in reversed(sizes[2:]):
        strides.append(step)
        step = step * size
    return like.new_empty_strided(sizes, (step, 1, *reversed(strides)))


def check(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Sequence[int]) -> None:
    """Raise as the kernels do, so that a wrong call fails when it is traced."""
    rank, groups = len(conv) // 4, conv[-1]
    op = f"conv{rank}d_relu"
    _operators.check_alike(op, input, weight, bias)
    for name, values, least in zip(
        ("stride", "dilation", "padding", "padding", "groups"),
        (*split(conv), [groups]),
        (1, 1, 0, 0, 1),
    ):
        for value in values:
            torch._check(
                value >= least,
                lambda name=name, least=least, value=value: (
                    f"{op}: {name}: expected {least} or more, got {value}"
                ),
            )
    torch._check(
        input.dim() == rank + 2,
        lambda: f"{op}: input: expected {IMAGES[rank]}, got shape {list(input.shape)}",
    )
    torch._check(
        weight.dim() == rank + 2 and weight.shape[0] > 0,
        lambda: f"{op}: weight: expected {FILTERS[rank]}, got shape {list(weight.shape)}",
    )
    torch._check(
        weight.shape[0] % groups == 0,
        lambda: (
            f"{op}: weight: expected filters that the groups divide, got {weight.shape[0]} in "
            f"{groups} groups"
        ),
    )
    torch._check(
        weight.shape[1] * groups == input.shape[1],
        lambda: (
            f"{op}: input: expected {weight.shape[1] * groups} channels for weight of shape "
            f"{list(weight.shape)} and {groups} groups, got shape {list(input.shape)}"
        ),
    )
    _operators.check_bias(op, weight, bias)
    for d, size in enumerate(output_size(input, weight, conv), 2):
        torch._check(
            size >= 1,
            lambda d=d: (
                f"{op}: weight: expected a kernel no larger than the padded input, got "
                f"{weight.shape[d]}"
            ),
        )


def output_size(input: Tensor, weight: Tensor, conv: Sequence[int]) -> list[int]:
    sizes = zip(input.shape[2:], weight.shape[2:], *split(conv))
    return [
        (low + size + high - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation, low, high in sizes
    ]
