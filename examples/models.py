"""One network ready to train, with the same few methods for PyTorch and Keras."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from examples.networks import NETWORKS, Recipe, keras_network, torch_network

if TYPE_CHECKING:
    import torch

# A seed at which no hidden unit of `mlp_784` comes so near to zero on the digits that rounding
# decides about its ReLU: native runs whose initial weights differ in the last bit then stay within
# 1e-6 of each other, where at other seeds they may part by 5e-3.
SEED = 1
Array = NDArray[Any]


class Model(Protocol):
    """A network with its loss and optimizer. Built twice, it has the same weights.

    Inputs are [M, features], [M, channels, height, width] or [M, steps, features] of numbers, or
    [M, steps] of symbols, for both frameworks.
    """

    explanation: str  # what each layer runs on; empty for a native network

    def step(self, inputs: Array, targets: Array) -> float:
        """One step of the optimizer on a batch; its loss before the step."""

    def gradients(self, inputs: Array, targets: Array) -> list[Array]:
        """Gradient of the loss of a batch for each weight."""

    def predict(self, inputs: Array) -> Array:
        """Outputs as float64."""

    def weights(self) -> list[Array]:
        """Copies of the weights."""

    def load(self, weights: Sequence[Array]) -> None:
        """Take over weights that `weights` has returned."""


class TorchModel:
    """See `Model`. `spread` wraps the network when it has been fused."""

    def __init__(
        self,
        network: str,
        sizes: tuple[int, ...],
        recipe: Recipe,
        fused: bool,
        spread: Callable[[Any], Any] = lambda network: network,
    ) -> None:
        import torch
        from torch.nn import functional as F

        torch.manual_seed(SEED)
        self.model: Any = torch_network(network, sizes)
        self.explanation = ""
        if fused:
            import twinfuse.torch as tft

            self.model = tft.fuse(self.model)
            self.explanation = str(tft.explain(self.model))
        self.model = spread(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer: Any = (
            torch.optim.Adam(self.parameters, recipe.learning_rate)
            if recipe.optimizer == "adam"
            else torch.optim.SGD(self.parameters, recipe.learning_rate, recipe.momentum)
        )
        losses: dict[str, Any] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
        logarithms = NETWORKS[network].ends == "log_softmax"
        self.criterion = F.nll_loss if logarithms else losses[recipe.loss]

    def _backward(self, inputs: Array, targets: Array) -> float:
        import torch

        self.model.train()
        self.optimizer.zero_grad()
        outputs, wanted = self.model(torch.from_numpy(inputs)), torch.from_numpy(targets)
        if outputs.dim() == 3:  # one for each step
            outputs, wanted = outputs.flatten(0, 1), wanted.flatten()
        loss = self.criterion(outputs, wanted)
        loss.backward()
        return float(loss.item())

    def step(self, inputs: Array, targets: Array) -> float:
        loss = self._backward(inputs, targets)
        self.optimizer.step()
        return loss

    def gradients(self, inputs: Array, targets: Array) -> list[Array]:
        import torch

        torch.manual_seed(SEED)  # the same elements are dropped in every model that is asked
        self._backward(inputs, targets)
        return [self._array(p.grad) for p in self.parameters if p.grad is not None]

    def _array(self, tensor: torch.Tensor) -> Array:
        return tensor.detach().numpy().copy()

    def predict(self, inputs: Array) -> Array:
        import torch

        self.model.eval()
        with torch.no_grad():
            return self.model(torch.from_numpy(inputs)).double().numpy()

    def weights(self) -> list[Array]:
        return [self._array(p) for p in self.parameters]

    def load(self, weights: Sequence[Array]) -> None:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.copy_(torch.from_numpy(value))


class KerasModel:
    """See `Model`; Keras on TensorFlow."""

    def __init__(self, network: str, sizes: tuple[int, ...], recipe: Recipe, fused: bool) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        import keras

        keras.utils.set_random_seed(SEED)
        self.model = keras_network(network, sizes)
        self.explanation = ""
        if fused:
            import twinfuse.keras as tfk

            self.model = tfk.fuse(self.model)
            self.explanation = str(tfk.explain(self.model))
        optimizer = (
            keras.optimizers.Adam(recipe.learning_rate)
            if recipe.optimizer == "adam"
            else keras.optimizers.SGD(recipe.learning_rate, recipe.momentum)
        )
        entropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=NETWORKS[network].ends != "softmax"
        )
        losses = {"cross_entropy": entropy, "mse": "mean_squared_error"}
        self.model.compile(optimizer=optimizer, loss=losses[recipe.loss])

    def step(self, inputs: Array, targets: Array) -> float:
        # It returns the mean over all batches since the last reset.
        self.model.reset_metrics()
        return float(self.model.train_on_batch(channels_last(inputs), targets))

    def gradients(self, inputs: Array, targets: Array) -> list[Array]:
        import tensorflow as tf

        inputs = channels_last(inputs)
        with tf.GradientTape() as tape:
            outputs = self.model(inputs, training=True)
            loss = self.model.compute_loss(x=inputs, y=targets, y_pred=outputs)
        weights = [v.value for v in self.model.trainable_variables]
        # Those of an embedding are sparse.
        return [np.asarray(tf.convert_to_tensor(g)) for g in tape.gradient(loss, weights)]

    def predict(self, inputs: Array) -> Array:
        return np.asarray(self.model(channels_last(inputs)), dtype=np.float64)

    def weights(self) -> list[Array]:
        found: list[Array] = self.model.get_weights()
        return found

    def load(self, weights: Sequence[Array]) -> None:
        self.model.set_weights(weights)


def channels_last(inputs: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(inputs, 1, -1)) if inputs.ndim == 4 else inputs


def build(
    framework: str, network: str, sizes: tuple[int, ...], recipe: Recipe, fused: bool
) -> Model:
    """A model of `framework` ("torch" or "keras") for samples of `sizes`; `fused` or native."""
    make = TorchModel if framework == "torch" else KerasModel
    return make(network, sizes, recipe, fused)
