"""What fused layers save: estimates for `explain`, from the calls of one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from twinfuse._backend import Saving
from twinfuse.torch import _norm
from twinfuse.torch._conv_choice import layer_left_to_torch


class Call(NamedTuple):
    """One call of a layer."""

    elements: int  # of its output
    folded: bool  # as one with the ReLU, and with the BatchNorm behind it, if there is one


Calls = dict[int, list[Call]]  # by the id of a layer


def recorded(layers: Iterable[nn.Module], run: Callable[[], object]) -> Calls:
    """The calls of `layers` that `run` makes."""
    calls: Calls = defaultdict(list)

    def note(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        (input,) = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if hasattr(layer, _norm.NORM):
            folded = layer.pays(input, layer.weight)
        else:
            is_conv = input.is_cuda and not isinstance(layer, nn.Linear)
            folded = not (is_conv and layer_left_to_torch(layer, layer.weight, input))
        calls[id(layer)].append(Call(output.numel(), folded))

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        run()
    return calls


def saving(layer: Any, weight: Tensor, calls: list[Call] | None) -> Saving:
    """Of a layer with a ReLU, and maybe a BatchNorm, behind it.

    `calls` are those that were seen; None where nobody looked.
    """
    size = weight.element_size()
    found = Saving(2 * size)
    if norm := getattr(layer, "norm", None):
        kernels = 2 - _norm.folding_kernels(norm)
        found = Saving(4 * size, -2 * size * weight.numel(), kernels)
    if calls is None:
        return found
    fused = [call.elements for call in calls if call.folded]
    return replace(found, calls=len(fused), elements=sum(fused))
