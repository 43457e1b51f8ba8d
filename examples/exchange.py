"""The same initial weights for both frameworks, by `twinfuse.convert`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.models import SEED
from examples.networks import NETWORKS, Recurrent, keras_network, torch_network
from examples.training import Weights

if TYPE_CHECKING:
    import keras
    import torch


def starts(name: str, sizes: tuple[int, ...], frameworks: Sequence[str]) -> dict[str, Weights]:
    """What each of two frameworks starts network `name` with: torch's own initial weights.

    Nothing where there is one framework, or for networks that `to_keras` does not take.
    """
    kinds = [layer.kind for layer in NETWORKS[name].layers if isinstance(layer, Recurrent)]
    if set(kinds) != {"lstm"} or set(frameworks) != {"torch", "keras"}:
        return {}
    import torch
    import torch._dynamo  # an optimizer needs it, and it Triton, which cannot follow TensorFlow

    torch.manual_seed(SEED)
    module, model = torch_network(name, sizes), keras_network(name, sizes)
    to_keras(module, model)
    ours = [parameter.detach().numpy().copy() for parameter in module.parameters()]
    return {"torch": ours, "keras": model.get_weights()}


def to_keras(module: torch.nn.Module, model: keras.Model) -> None:
    """Give the weights of each Embedding, LSTM and Linear to the layer in its place in `model`."""
    from torch import nn

    from twinfuse.convert import torch_to_keras

    kinds = (nn.Embedding, nn.LSTM, nn.Linear)
    modules = [found for found in module.modules() if isinstance(found, kinds)]
    layers = [layer for layer in model.layers if layer.weights]
    for source, layer in zip(modules, layers, strict=True):
        if isinstance(source, nn.Embedding):
            layer.set_weights([source.weight.detach().numpy()])
        else:
            torch_to_keras(source, layer)
