"""Train `mlp_784` at its printed size on MNIST, natively and fused, from data you already have."""

from __future__ import annotations

import argparse
import gzip
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from examples.comparison import compare, finish
from examples.digits import FUSIBLE, NETWORKS
from examples.training import FRAMEWORKS, Data

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
    arrays = {part: read_idx(find_idx(folder, name)) for part, name in FILES.items()}
    return prepare(**arrays)


def from_torchvision(folder: Path) -> Data:
    """What `torchvision.datasets.MNIST(folder, download=True)` has left there."""
    from torchvision.datasets import MNIST  # type: ignore[import-not-found]

    train, test = (MNIST(str(folder), train=train) for train in (True, False))
    return prepare(
        train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy()
    )


def from_keras(_: Path) -> Data:
    """`keras.datasets.mnist`, which keeps the data in ~/.keras and fetches what is missing."""
    from keras.datasets import mnist

    (inputs, targets), (test_inputs, test_targets) = mnist.load_data()
    return prepare(inputs, targets, test_inputs, test_targets)


def prepare(
    inputs: NDArray[np.uint8],
    targets: NDArray[np.uint8],
    test_inputs: NDArray[np.uint8],
    test_targets: NDArray[np.uint8],
) -> Data:
    """Images [n, 28, 28] of bytes to [n, 784] in [0, 1]. Raises ValueError on unequal counts."""
    for images, labels in ((inputs, targets), (test_inputs, test_targets)):
        if len(images) != len(labels):
            raise ValueError(f"expected as many labels as images, got {len(labels)}, {len(images)}")

    def pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)

    return Data(
        pixels(inputs),
        targets.astype(np.int64),
        pixels(test_inputs),
        test_targets.astype(np.int64),
    )


SOURCES: dict[str, Callable[[Path], Data]] = {
    "idx": from_idx,
    "torchvision": from_torchvision,
    "keras": from_keras,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.mnist", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the files (not for --source keras)")
    parser.add_argument("--source", choices=SOURCES, default="idx")
    parser.add_argument("--epochs", type=int, help="instead of the network's own number")
    parser.add_argument("--framework", choices=(*FRAMEWORKS, "both"), default="both")
    parser.add_argument("--output", type=Path, default=Path("demo/mnist.png"), help="plot")
    chosen = parser.parse_args(arguments)
    if chosen.data is None and chosen.source != "keras":
        parser.error(f"--data is needed with --source {chosen.source}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        data = SOURCES[chosen.source](chosen.data)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        parser.error(str(error))
    problems = compare(
        console,
        NETWORKS,
        data,
        chosen.framework,
        "MNIST: native and fused",
        FUSIBLE,
        chosen.epochs,
        chosen.output,
    )
    return finish(console, problems)


if __name__ == "__main__":
    sys.exit(main())
