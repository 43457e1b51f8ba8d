"""The networks of the benchmark, how much there is to compute in each, and data for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.operands import FRAMEWORKS, Kind, Shape
from examples.networks import (
    ADAM,
    NETWORKS,
    Conv,
    Dense,
    Embedding,
    Flatten,
    Layer,
    Pool,
    Recipe,
    Recurrent,
)

SHAPE_FORM = "name B<batch> [compiled]"
VGG16, NOTHING = "vgg16", "mlp_gelu"

# Convolutions of 3x3 with a border of one zero, by their filters, and poolings between them.
VGG_BLOCKS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
VGG_TOP = (Flatten(), Dense(256), Dense(10, ""))
NOTHING_UNITS = (512, 512, 10)

INPUTS = {name: network.inputs for name, network in NETWORKS.items()}
INPUTS |= {VGG16: (3, 64, 64), NOTHING: (784,)}

RECIPES = {name: network.recipe for name, network in NETWORKS.items()}
RECIPES |= {VGG16: Recipe(1, 8, "sgd", 0.01, momentum=0.9), NOTHING: ADAM}

# The ops whose kernels a fused one calls.
OPS = {
    name: tuple(op for op, layers in network.fusible.items() if layers)
    for name, network in NETWORKS.items()
}
OPS |= {VGG16: ("linear_relu", "conv_relu"), NOTHING: ()}


class NetworkShape(NamedTuple):
    """A network and the samples of a batch. `compiled`: by torch.compile, on both sides."""

    name: str
    batch: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.name} B{self.batch}" + " compiled" * self.compiled


def parse_shape(text: str) -> NetworkShape:
    """The shape that `str` has written. Raises ValueError."""
    match text.split():
        case [name, batch, *rest] if rest in ([], ["compiled"]):
            if name not in INPUTS:
                raise ValueError(f"expected one of {', '.join(INPUTS)}, got {name!r}")
            if batch[:1] == "B" and batch[1:].isdigit() and int(batch[1:]) > 0:
                return NetworkShape(name, int(batch[1:]), bool(rest))
    raise ValueError(f"expected {SHAPE_FORM} with a positive size, got {text!r}")


def frameworks_of(shape: Shape) -> Sequence[str]:
    """The frameworks that `shape` is measured in."""
    return ("torch",) if shape[2] else tuple(FRAMEWORKS)


def _layers(name: str) -> tuple[Layer, ...]:
    """As an example has them; sizes of VGG16's convolutions are larger by their border."""
    if name == NOTHING:
        return tuple(Dense(units, "") for units in NOTHING_UNITS)
    if name != VGG16:
        return NETWORKS[name].layers
    layers: list[Layer] = []
    for block in VGG_BLOCKS:
        layers += [*(Conv(filters, 3) for filters in block), Pool(2)]
    return (*layers, *VGG_TOP)


def _products(name: str) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Of each layer: its weights, how often a sample meets each of them, its output's sizes."""
    sizes, border = INPUTS[name], 2 * (name == VGG16)
    for layer in _layers(name):
        weights = times = 0
        match layer:
            case Conv(filters, kernel):
                weights = sizes[0] * filters * kernel**2
                sizes = (filters, *(size + border - kernel + 1 for size in sizes[1:]))
                times = sizes[1] * sizes[2]
            case Pool(size):
                sizes = (sizes[0], *(s // size for s in sizes[1:]))
            case Embedding(symbols, units):
                weights, sizes = symbols * units, (*sizes, units)
            case Recurrent(kind, units, every):
                gates = 4 if kind == "lstm" else 1
                weights, times = gates * units * (sizes[1] + units), sizes[0]
                sizes = (sizes[0], units) if every else (units,)
            case Flatten():
                sizes = (math.prod(sizes),)
            case Dense(units):
                weights, times = sizes[-1] * units, math.prod(sizes[:-1])
                sizes = (*sizes[:-1], units)
        yield weights, times, sizes


def flops(shape: NetworkShape, kind: Kind) -> float:
    """Those of the products of all layers; the gradients count as much again each."""
    forward = 2.0 * shape.batch * sum(w * times for w, times, _ in _products(shape.name))
    return forward if kind == "forward" else 3 * forward


def elements_moved(shape: NetworkShape, kind: Kind) -> int:
    """The batch, the results and the weights, biases aside; in training weights and gradients."""
    layers = list(_products(shape.name))
    data = shape.batch * (math.prod(INPUTS[shape.name]) + math.prod(layers[-1][2]))
    return data + (1 if kind == "forward" else 2) * sum(weights for weights, _, _ in layers)


def random_batch(shape: NetworkShape) -> tuple[NDArray[Any], NDArray[Any]]:
    """Samples, images with channels first, and the classes or values that they should have."""
    draw = np.random.default_rng(0)
    sizes = (shape.batch, *INPUTS[shape.name])
    first = _layers(shape.name)[0]
    symbols = first.symbols if isinstance(first, Embedding) else 0
    inputs = draw.integers(symbols, size=sizes) if symbols else draw.standard_normal(sizes)
    *_, (_, _, outputs) = _products(shape.name)
    if RECIPES[shape.name].loss == "mse":
        return inputs, draw.standard_normal((shape.batch, *outputs))
    return inputs, draw.integers(outputs[-1], size=(shape.batch, *outputs[:-1]))
