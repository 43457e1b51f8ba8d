"""The reference networks, by name, with the sizes and the training of the articles they come from.

`NETWORKS` describes each one once; `torch_network` and `keras_network` build it in either
framework, which is imported only then. Other data than the original's change the first layer, and
the first Linear behind convolutions, whose size follows from the image's.

Two are printed with sizes that do not fit together. `small_cnn_mnist` has 6*7*7 = 294 values before
its first Linear, as 16x16 images give (28x28 would give 6*13*13): it is a network for 16x16 images
here. `cnn2_mnist` has 64*12*12 = 9216, as one pooling of 28x28 images leaves: the second pooling
that is printed as well is left out.

`lstm` and `rnn` are printed as equations, without sizes. In both, each gate has one bias, as Keras
has it; of torch's two, the second is zero and stays so. No kernel computes `rnn`: it stays native.
`char_lstm`, of no article, reads text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import keras
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `momentum` is for SGD."""

    epochs: int
    batch: int
    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    momentum: float = 0.0


@dataclass(frozen=True)
class Conv:
    """Square windows, no padding, and a ReLU."""

    filters: int
    kernel: int


@dataclass(frozen=True)
class Pool:
    """The largest of each square."""

    size: int


@dataclass(frozen=True)
class Dropout:
    rate: float


@dataclass(frozen=True)
class Embedding:
    """A vector of `units` for each number below `symbols`."""

    symbols: int
    units: int


@dataclass(frozen=True)
class Recurrent:
    """What it has computed at the last step, or at `every` one."""

    kind: Literal["lstm", "rnn"]
    units: int
    every: bool = False


@dataclass(frozen=True)
class Flatten:
    """An image as features."""


@dataclass(frozen=True)
class Dense:
    """In torch a softmax is left to the cross entropy, which takes logits."""

    units: int
    activation: Literal["", "relu", "softmax", "log_softmax"] = "relu"


Layer = Conv | Pool | Dropout | Embedding | Recurrent | Flatten | Dense


@dataclass(frozen=True)
class Network:
    """`inputs` are the sizes of one sample: features; channels, height and width; steps and
    features; steps, of symbols.
    """

    inputs: tuple[int, ...]
    layers: tuple[Layer, ...]
    recipe: Recipe
    xavier: bool = False  # weights drawn by torch's `xavier_uniform_`

    @property
    def ends(self) -> str:
        """The activation of the last layer."""
        last = self.layers[-1]
        return last.activation if isinstance(last, Dense) else ""

    @property
    def fusible(self) -> dict[str, int]:
        """How many layers there are that each op computes."""
        linears = sum(
            isinstance(layer, Dense) and layer.activation == "relu" for layer in self.layers
        )
        convolutions = sum(isinstance(layer, Conv) for layer in self.layers)
        lstms = sum(isinstance(layer, Recurrent) and layer.kind == "lstm" for layer in self.layers)
        return {"linear_relu": linears, "conv_relu": convolutions, "lstm": lstms}


def _recurrent(learning_rate: float) -> Recipe:
    """By SGD, in which both frameworks have the same steps; each has an Adam of its own."""
    return Recipe(6, 32, "sgd", learning_rate, momentum=0.9)


ADAM = Recipe(10, 32, "adam", 1e-3)
SYMBOLS = 96  # a line break and the 95 printable characters of ASCII
TEXT_STEPS = 32
FLAT_128 = (Flatten(), Dense(128))

NETWORKS = {
    "mlp_784": Network((784,), (Dense(128), Dense(64), Dense(10, "")), ADAM, xavier=True),
    "mlp_784_keras": Network((784,), (Dense(128), Dense(64), Dense(10, "softmax")), ADAM),
    "mlp_regression": Network((1,), (Dense(10), Dense(1, "")), Recipe(100, 1, "adam", 1e-3, "mse")),
    "linear_regression": Network((1,), (Dense(1, ""),), Recipe(1000, 100, "sgd", 0.01, "mse")),
    "lenet_cifar": Network(
        (3, 32, 32),
        (
            *(Conv(6, 5), Pool(2), Conv(16, 5), Pool(2)),
            *(Flatten(), Dense(120), Dense(84), Dense(10, "")),
        ),
        Recipe(10, 4, "sgd", 1e-3, momentum=0.9),
    ),
    "convnet_mnist": Network(
        (1, 28, 28), (Conv(32, 3), *FLAT_128, Dense(10, "")), Recipe(10, 64, "sgd", 0.01)
    ),
    "small_cnn_mnist": Network(
        (1, 16, 16),
        (Conv(6, 3), Pool(2), Flatten(), Dense(120), Dense(84), Dense(10, "")),
        Recipe(2, 64, "sgd", 1e-3, momentum=0.9),
    ),
    "cnn_mnist_keras": Network((1, 28, 28), (Conv(32, 3), Pool(2), *FLAT_128, Dense(10, "")), ADAM),
    "cnn2_mnist_keras": Network(
        (1, 28, 28),
        (Conv(32, 3), Pool(2), Conv(64, 3), Pool(2), *FLAT_128, Dense(10, "softmax")),
        ADAM,
    ),
    "cnn2_mnist": Network(
        (1, 28, 28),
        (
            *(Conv(32, 3), Conv(64, 3), Pool(2), Dropout(0.25), Dropout(0.5)),
            *(*FLAT_128, Dense(10, "log_softmax")),
        ),
        Recipe(10, 100, "adam", 1e-3),
    ),
    "lstm": Network((8, 8), (Recurrent("lstm", 64), Dense(10, "")), _recurrent(0.2)),
    "rnn": Network((8, 8), (Recurrent("rnn", 64), Dense(10, "")), _recurrent(0.05)),
    "char_lstm": Network(
        (TEXT_STEPS,),
        (Embedding(SYMBOLS, 16), Recurrent("lstm", 64, every=True), Dense(SYMBOLS, "")),
        _recurrent(1.0),
    ),
}


def torch_network(name: str, inputs: tuple[int, ...] = ()) -> torch.nn.Module:
    """Network `name` for samples of sizes `inputs`, its own without; images are [M, C, H, W].

    Returns values, logits or log probabilities [M, units of the last layer], or [M, steps, units].
    """
    from torch import nn

    class Steps(nn.Module):
        def __init__(self, layer: Recurrent, features: int) -> None:
            super().__init__()
            kind = nn.LSTM if layer.kind == "lstm" else nn.RNN
            self.layer = kind(features, layer.units, batch_first=True)
            nn.init.zeros_(self.layer.get_parameter("bias_hh_l0")).requires_grad_(False)
            self.every = layer.every

        def forward(self, input: Tensor) -> Tensor:
            output: Tensor = self.layer(input)[0]
            return output if self.every else output[:, -1]

    network = NETWORKS[name]
    sizes = inputs or network.inputs
    modules: list[nn.Module] = []
    for layer in network.layers:
        match layer:
            case Conv(filters, kernel):
                modules += [nn.Conv2d(sizes[0], filters, kernel), nn.ReLU()]
                sizes = (filters, *(size - kernel + 1 for size in sizes[1:]))
            case Pool(size):
                modules.append(nn.MaxPool2d(size))
                sizes = (sizes[0], *(s // size for s in sizes[1:]))
            case Dropout(rate):
                modules.append(nn.Dropout(rate))
            case Embedding(symbols, units):
                modules.append(nn.Embedding(symbols, units))
                sizes = (*sizes, units)
            case Recurrent(_, units):
                modules.append(Steps(layer, sizes[-1]))
                sizes = (units,)
            case Flatten():
                modules.append(nn.Flatten())
                sizes = (math.prod(sizes),)
            case Dense(units, activation):
                modules.append(nn.Linear(sizes[0], units))
                sizes = (units,)
                if activation == "relu":
                    modules.append(nn.ReLU())
                elif activation == "log_softmax":
                    modules.append(nn.LogSoftmax(1))
    for module in modules if network.xavier else ():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return nn.Sequential(*modules)


def keras_network(name: str, inputs: tuple[int, ...] = ()) -> keras.Model:
    """As `torch_network`, in Keras: images are [M, H, W, C], and a softmax is in the model."""
    import keras
    from keras import layers

    network = NETWORKS[name]
    sizes = inputs or network.inputs
    if len(sizes) == 3:
        sizes = (*sizes[1:], sizes[0])
    dtype = "int64" if isinstance(network.layers[0], Embedding) else None
    found: list[Any] = [keras.Input(sizes, dtype=dtype)]
    for layer in network.layers:
        match layer:
            case Conv(filters, kernel):
                found.append(layers.Conv2D(filters, kernel, activation="relu"))
            case Pool(pool):
                found.append(layers.MaxPooling2D(pool))
            case Dropout(rate):
                found.append(layers.Dropout(rate))
            case Embedding(symbols, units):
                found.append(layers.Embedding(symbols, units))
            case Recurrent(kind, units, every):
                recurrent = layers.LSTM if kind == "lstm" else layers.SimpleRNN
                found.append(recurrent(units, return_sequences=every))
            case Flatten():
                found.append(layers.Flatten())
            case Dense(units, activation):
                found.append(layers.Dense(units, activation=activation or None))
    return keras.Sequential(found, name=name)
