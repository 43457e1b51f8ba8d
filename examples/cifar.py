"""Train `lenet_cifar` as printed on CIFAR-10, natively and fused, on data you have.

The batch is 4; the article has a variant with `--batch 100`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.sources import Sources, run_source
from examples.training import Data, Labelled

NETWORKS = ("lenet_cifar",)


def from_torchvision(folder: Path) -> Data:
    """What `torchvision.datasets.CIFAR10(folder, download=True)` has left there."""
    from torchvision.datasets import CIFAR10  # type: ignore[import-not-found]

    train, test = (CIFAR10(str(folder), train=train) for train in (True, False))
    return prepare((train.data, train.targets), (test.data, test.targets))


def from_keras(_: Path) -> Data:
    """`keras.datasets.cifar10`, which keeps the data in ~/.keras and fetches what is missing."""
    from keras.datasets import cifar10

    return prepare(*cifar10.load_data())


def prepare(train: Labelled, test: Labelled) -> Data:
    """Images [n, 32, 32, 3] of bytes, with labels, to [n, 3, 32, 32] with mean and std 0.5."""

    def inputs(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = np.moveaxis(images, -1, 1).astype(np.float32) / np.float32(255)
        return (pixels - np.float32(0.5)) / np.float32(0.5)

    return Data.of_images(train, test, inputs)


SOURCES: Sources = {"torchvision": from_torchvision, "keras": from_keras}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_source("cifar", __doc__, NETWORKS, SOURCES, "CIFAR-10", arguments)


if __name__ == "__main__":
    sys.exit(main())
