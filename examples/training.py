"""Train a network natively and fused, from the same weights and on the same batches."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.models import SEED, Model, build
from examples.networks import Recipe

FRAMEWORKS = {"torch": "torch", "keras": "tensorflow"}
CHECKPOINTS = 10

Labelled = tuple[Any, Any]  # images and labels
Weights = list[NDArray[Any]]
Builder = Callable[[str, str, tuple[int, ...], Recipe, bool], Model]  # as `build`


@dataclass(frozen=True)
class Data:
    """Inputs [n, features], [n, channels, height, width] or [n, steps, features] float32, or
    [n, steps] int64 (symbols), with targets [n] or [n, steps] int64 (classes) or [n, 1] float32
    (values).
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    test_inputs: NDArray[Any]
    test_targets: NDArray[Any]

    @classmethod
    def of_images(cls, train: Labelled, test: Labelled, inputs: Callable[[Any], Any]) -> Data:
        """Images and their labels; `inputs` makes the inputs of images.

        Raises ValueError when there are not as many labels as images.
        """
        arrays: list[NDArray[Any]] = []
        for images, labels in (train, test):
            if len(images) != len(labels):
                got = f"{len(labels)}, {len(images)}"
                raise ValueError(f"expected as many labels as images, got {got}")
            arrays += [inputs(images), np.asarray(labels, np.int64).reshape(-1)]
        return cls(*arrays)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.inputs.shape[1:]

    def shaped(self, *sizes: int) -> Data:
        """The same samples in other sizes, of as many elements."""
        inputs, test_inputs = (a.reshape(-1, *sizes) for a in (self.inputs, self.test_inputs))
        return replace(self, inputs=inputs, test_inputs=test_inputs)

    def whole(self, batch: int) -> Data:
        """As many of the samples to train with as whole batches take."""
        count = len(self.inputs) // batch * batch
        return replace(self, inputs=self.inputs[:count], targets=self.targets[:count])

    def batches(self, epoch: int, size: int) -> list[NDArray[np.int64]]:
        """Indices of each batch of `epoch`; the same ones whoever asks."""
        order = np.random.default_rng((SEED, epoch)).permutation(len(self.inputs))
        return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass
class Curve:
    """One training run: mean loss and duration of each epoch, and what ran.

    `score` is the share of right answers on the test data, or its mean squared error.
    `checkpoints` holds the weights before the first epoch and after up to ten others.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    score: float = float("nan")
    kernels: dict[str, int] = field(default_factory=dict)
    explanation: str = ""
    checkpoints: dict[int, list[NDArray[Any]]] = field(default_factory=dict)


@dataclass
class Pair:
    """The native and the fused run of one network.

    `gradient_distance`: at each checkpoint of the fused run both compute the gradients of one batch
    from the same weights; this is the median over the checkpoints of the largest relative distance.
    """

    network: str
    framework: str
    native: Curve
    fused: Curve
    gradient_distance: float


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
    weights: Weights | None = None,
    make: Builder = build,
) -> Pair:
    """Train `network` natively and fused; `on_epoch` is called after each epoch of both.

    `weights` are those to begin with, instead of the network's own; `make` builds the models.
    """
    curves = []
    for fused in (False, True):
        model = make(framework, network, data.sizes, recipe, fused)
        if weights is not None:
            model.load(weights)
        curves.append(follow(model, data, recipe, on_epoch))
    native, ours = curves
    models = [make(framework, network, data.sizes, recipe, fused) for fused in (False, True)]
    apart = _gradient_distance(models, data, recipe, ours)
    return Pair(network, framework, native, ours, apart)


def follow(
    model: Model, data: Data, recipe: Recipe, on_epoch: Callable[[], object] = lambda: None
) -> Curve:
    """Train one model."""
    curve = Curve(explanation=model.explanation, checkpoints={0: model.weights()})
    every = max(1, recipe.epochs // CHECKPOINTS)
    with launches(curve.kernels):
        for epoch in range(recipe.epochs):
            start = time.perf_counter()
            total = 0.0
            for batch in data.batches(epoch, recipe.batch):
                total += model.step(data.inputs[batch], data.targets[batch]) * len(batch)
            curve.seconds.append(time.perf_counter() - start)
            curve.losses.append(total / len(data.inputs))
            if (epoch + 1) % every == 0:
                curve.checkpoints[epoch + 1] = model.weights()
            on_epoch()
        outputs = model.predict(data.test_inputs)
    if recipe.loss == "cross_entropy":
        curve.score = float((outputs.argmax(-1) == data.test_targets).mean())
    else:
        curve.score = float(np.mean((outputs - data.test_targets) ** 2))
    return curve


def _gradient_distance(models: Sequence[Model], data: Data, recipe: Recipe, curve: Curve) -> float:
    worst = []
    for epoch, weights in curve.checkpoints.items():
        batch = data.batches(epoch, recipe.batch)[0]
        for model in models:
            model.load(weights)
        native, fused = (m.gradients(data.inputs[batch], data.targets[batch]) for m in models)
        distances = [
            float(np.linalg.norm(f - n)) / max(float(np.linalg.norm(n)), 1e-30)
            for n, f in zip(native, fused, strict=True)
        ]
        worst.append(max(distances))
    # The median: a ReLU that rounding has switched counts at one checkpoint, an error at all.
    return float(np.median(worst))
