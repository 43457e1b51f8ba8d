"""The reference networks, by name, as they are printed in the articles they come from.

`TORCH` and `KERAS` map a name to a function that builds it; a framework is imported only when one
of its networks is built. `features` fits the input layer to other data than the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import keras
    import torch


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    epochs: int
    batch: int
    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    loss: Literal["cross_entropy", "mse"]


def mlp_784(features: int = 784) -> torch.nn.Module:
    """Logits [M, 10] of inputs [M, features]; weights drawn by `xavier_uniform_`."""
    from torch import nn

    model = nn.Sequential(
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


def mlp_784_keras(features: int = 784) -> keras.Model:
    """Probabilities [M, 10] of inputs [M, features]."""
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ],
        name="mlp_784_keras",
    )


def mlp_regression(features: int = 1) -> torch.nn.Module:
    """Values [M, 1] of inputs [M, features]."""
    from torch import nn

    return nn.Sequential(nn.Linear(features, 10), nn.ReLU(), nn.Linear(10, 1))


def linear_regression(features: int = 1) -> torch.nn.Module:
    """Values [M, 1] of inputs [M, features]. Nothing here can be fused."""
    from torch import nn

    return nn.Sequential(nn.Linear(features, 1))


def linear_regression_keras(features: int = 1) -> keras.Model:
    """As `linear_regression`, in Keras."""
    import keras
    from keras import layers

    return keras.Sequential(
        [keras.Input((features,)), layers.Dense(1)],
        name="linear_regression",
    )


TORCH: dict[str, Callable[..., torch.nn.Module]] = {
    "mlp_784": mlp_784,
    "mlp_regression": mlp_regression,
    "linear_regression": linear_regression,
}
KERAS: dict[str, Callable[..., keras.Model]] = {
    "mlp_784_keras": mlp_784_keras,
    "linear_regression": linear_regression_keras,
}
RECIPES = {
    "mlp_784": Recipe(10, 32, "adam", 1e-3, "cross_entropy"),
    "mlp_784_keras": Recipe(10, 32, "adam", 1e-3, "cross_entropy"),
    "mlp_regression": Recipe(100, 1, "adam", 1e-3, "mse"),
    "linear_regression": Recipe(1000, 100, "sgd", 0.01, "mse"),
}
