"""Train a network natively and fused, from the same weights and on the same batches."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.networks import KERAS, TORCH, Recipe

FRAMEWORKS = {"torch": "torch", "keras": "tensorflow"}
VARIANTS = ("native", "fused", "float64")
SEED = 0


@dataclass(frozen=True)
class Data:
    """Inputs [n, features] float32 with targets [n] int64 (classes) or [n, 1] float32 (values)."""

    inputs: NDArray[np.float32]
    targets: NDArray[Any]
    test_inputs: NDArray[np.float32]
    test_targets: NDArray[Any]

    def batches(self, epoch: int, size: int) -> list[NDArray[np.int64]]:
        """Indices of each batch of `epoch`; the same ones whoever asks."""
        order = np.random.default_rng((SEED, epoch)).permutation(len(self.inputs))
        return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass
class Curve:
    """One training run: mean loss and duration of each epoch, and what ran.

    `score` is the share of right answers on the test data, or its mean squared error.
    """

    network: str
    framework: str
    variant: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    score: float = float("nan")
    kernels: dict[str, int] = field(default_factory=dict)
    explanation: str = ""

    @property
    def name(self) -> str:
        return f"{self.framework} {self.variant}"


def available(framework: str) -> list[str]:
    """The frameworks to run: those asked for ("torch", "keras" or "both") that are installed."""
    wanted = FRAMEWORKS if framework == "both" else (framework,)
    return [f for f in wanted if importlib.util.find_spec(FRAMEWORKS[f]) is not None]


@contextmanager
def launches(into: dict[str, int]) -> Iterator[None]:
    """Put into `into` how often each fused kernel is launched inside the block."""
    import twinfuse

    before = twinfuse.launches()
    yield
    for name, count in twinfuse.launches().items():
        if count > before.get(name, 0):
            into[name] = count - before.get(name, 0)


def train(
    framework: str,
    network: str,
    data: Data,
    recipe: Recipe,
    on_epoch: Callable[[], object] = lambda: None,
) -> list[Curve]:
    """Train `network` in each of `VARIANTS`, all from the same weights.

    The float64 run is native; it shows how far rounding alone moves the loss.
    """
    run = _train_torch if framework == "torch" else _train_keras
    return [run(network, variant, data, recipe, on_epoch) for variant in VARIANTS]


def _train_torch(
    network: str, variant: str, data: Data, recipe: Recipe, on_epoch: Callable[[], object]
) -> Curve:
    import torch
    from torch.nn import functional as F

    torch.manual_seed(SEED)
    model = TORCH[network](data.inputs.shape[1])
    curve = Curve(network, "torch", variant)
    dtype = torch.float32
    if variant == "fused":
        import twinfuse.torch as tft

        model = tft.fuse(model)
        curve.explanation = str(tft.explain(model))
    elif variant == "float64":
        dtype = torch.float64
        model = model.double()
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer](
        model.parameters(), lr=recipe.learning_rate
    )
    criterion = F.cross_entropy if recipe.loss == "cross_entropy" else F.mse_loss
    inputs, test_inputs = (torch.tensor(a, dtype=dtype) for a in (data.inputs, data.test_inputs))
    targets = torch.tensor(data.targets)
    if recipe.loss == "mse":
        targets = targets.to(dtype)

    with launches(curve.kernels):
        for epoch in range(recipe.epochs):
            start = time.perf_counter()
            total = 0.0
            for batch in map(torch.from_numpy, data.batches(epoch, recipe.batch)):
                loss = criterion(model(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            curve.seconds.append(time.perf_counter() - start)
            curve.losses.append(total / len(inputs))
            on_epoch()
        with torch.no_grad():
            outputs = model(test_inputs).double().numpy()
    curve.score = _score(outputs, data, recipe)
    return curve


def _train_keras(
    network: str, variant: str, data: Data, recipe: Recipe, on_epoch: Callable[[], object]
) -> Curve:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    keras.utils.set_random_seed(SEED)
    model = KERAS[network](data.inputs.shape[1])
    curve = Curve(network, "keras", variant)
    if variant == "fused":
        import twinfuse.keras as tfk

        model = tfk.fuse(model)
        curve.explanation = str(tfk.explain(model))
    elif variant == "float64":
        weights = model.get_weights()
        model = KERAS[network](data.inputs.shape[1], dtype="float64")
        model.set_weights(weights)
    optimizers = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}
    losses = {"cross_entropy": "sparse_categorical_crossentropy", "mse": "mean_squared_error"}
    model.compile(
        optimizer=optimizers[recipe.optimizer](recipe.learning_rate), loss=losses[recipe.loss]
    )
    # Batch by batch, so that both frameworks see the same ones in the same order.
    with launches(curve.kernels):
        for epoch in range(recipe.epochs):
            start = time.perf_counter()
            total = 0.0
            for batch in data.batches(epoch, recipe.batch):
                model.reset_metrics()
                loss = model.train_on_batch(data.inputs[batch], data.targets[batch])
                total += float(loss) * len(batch)
            curve.seconds.append(time.perf_counter() - start)
            curve.losses.append(total / len(data.inputs))
            on_epoch()
        outputs = np.asarray(model(data.test_inputs), dtype=np.float64)
    curve.score = _score(outputs, data, recipe)
    return curve


def _score(outputs: NDArray[np.float64], data: Data, recipe: Recipe) -> float:
    if recipe.loss == "cross_entropy":
        return float((outputs.argmax(1) == data.test_targets).mean())
    return float(np.mean((outputs - data.test_targets) ** 2))
