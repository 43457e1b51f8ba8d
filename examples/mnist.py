"""Train the networks for MNIST at their printed sizes, natively and fused, on data you have.

`small_cnn_mnist`, printed for 16x16 images, gets the first Linear that 28x28 images need.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.sources import Sources, run_source
from examples.training import Data, Labelled

NETWORKS = (
    "mlp_784",
    "mlp_784_keras",
    "convnet_mnist",
    "small_cnn_mnist",
    "cnn_mnist_keras",
    "cnn2_mnist_keras",
    "cnn2_mnist",
)

FILES = {
    "inputs": "train-images-idx3-ubyte",
    "targets": "train-labels-idx1-ubyte",
    "test_inputs": "t10k-images-idx3-ubyte",
    "test_targets": "t10k-labels-idx1-ubyte",
}
UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Array of an IDX file of unsigned bytes, gzipped or not.

    Raises ValueError naming the file when it is of another format, or shorter or longer than its
    header says.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # Two zero bytes, the element type, the number of dimensions, then each size in 4 bytes.
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, got {len(content)}")
    sizes = np.frombuffer(content[4:header], ">u4").tolist()
    data = np.frombuffer(content[header:], np.uint8)
    if data.size != math.prod(sizes):
        raise ValueError(f"{path}: expected {sizes} bytes of data, got {data.size}")
    return data.reshape(sizes)


def find_idx(folder: Path, name: str) -> Path:
    """The file called `name` or `name`.gz in `folder`, or where torchvision keeps it below."""
    for base in (folder, folder / "raw", folder / "MNIST" / "raw"):
        for candidate in (base / name, base / f"{name}.gz"):
            if candidate.exists():
                return candidate
    raise FileNotFoundError(f"{folder}: no {name} or {name}.gz")


def from_idx(folder: Path) -> Data:
    inputs, targets, test_inputs, test_targets = (
        read_idx(find_idx(folder, name)) for name in FILES.values()
    )
    return prepare((inputs, targets), (test_inputs, test_targets))


def from_torchvision(folder: Path) -> Data:
    """What `torchvision.datasets.MNIST(folder, download=True)` has left there."""
    from torchvision.datasets import MNIST  # type: ignore[import-not-found]

    train, test = (MNIST(str(folder), train=train) for train in (True, False))
    return prepare(*((part.data.numpy(), part.targets.numpy()) for part in (train, test)))


def from_keras(_: Path) -> Data:
    """`keras.datasets.mnist`, which keeps the data in ~/.keras and fetches what is missing."""
    from keras.datasets import mnist

    return prepare(*mnist.load_data())


def prepare(train: Labelled, test: Labelled) -> Data:
    """Images [n, 28, 28] of bytes, with labels, to [n, 1, 28, 28] in [0, 1]."""

    def inputs(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images[:, None].astype(np.float32) / np.float32(255)

    return Data.of_images(train, test, inputs)


SOURCES: Sources = {"idx": from_idx, "torchvision": from_torchvision, "keras": from_keras}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_source("mnist", __doc__, NETWORKS, SOURCES, "MNIST", arguments)


if __name__ == "__main__":
    sys.exit(main())
