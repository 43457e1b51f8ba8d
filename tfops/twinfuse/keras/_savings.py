"""What fused layers save: estimates for `explain`, from the calls of one run."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from math import prod
from threading import get_ident
from typing import Any

import keras

from twinfuse._backend import Saving
from twinfuse.keras import _graph

Sizes = list[int | None]  # elements of the output of each call; None in a graph


def recorded(model: keras.layers.Layer, inputs: Any) -> dict[int, Sizes]:
    """The calls that `model(inputs)` makes of layers that can be fused, by the id of the layer."""
    calls: dict[int, Sizes] = defaultdict(list)
    native = keras.layers.Layer.__call__

    here = get_ident()  # other threads may be calling other models

    @functools.wraps(native)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = native(self, *args, **kwargs)
        layer = _graph.first_layer(self)
        if isinstance(layer, tuple(_graph.FUSED)) and get_ident() == here:
            known = hasattr(outputs, "numpy")
            calls[id(layer)].append(prod(outputs.shape) if known else None)
        return outputs

    # Keras has no hooks, and a layer whose own call is replaced is not fused.
    keras.layers.Layer.__call__ = noting
    try:
        model(inputs)
    finally:
        keras.layers.Layer.__call__ = native
    return calls


def saving(layer: Any, chain: _graph.Chain | None, calls: Sizes) -> Saving:
    """Of a Dense or convolution with a ReLU, in `chain` if in any; next to layers called eagerly.

    `calls` are those that were seen: none where nobody looked, or a wrapper computes the layer.
    """
    size = int(layer.compute_dtype[-2:]) // 8
    passes = 1 + bool(layer.use_bias)  # Keras adds the bias by an op of its own
    found = Saving(2 * size * passes, 0, passes)
    if chain and chain.norm:
        kernels = passes + 1 - _graph.folding_kernels(chain)
        found = Saving(2 * size * (passes + 1), -2 * size * prod(layer.kernel.shape), kernels)
    if not calls or None in calls:
        return found
    return replace(found, calls=len(calls), elements=sum(n for n in calls if n))
