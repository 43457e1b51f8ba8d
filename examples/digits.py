"""Train the reference networks on real handwritten digits, natively and fused, in both frameworks.

The digits have 8x8 pixels. Networks for larger images get them enlarged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from examples.comparison import parser, run
from examples.models import SEED
from examples.networks import NETWORKS
from examples.training import Data

SIDE = 8
# Fewer than printed where all of them together would take minutes; more where the printed number
# is one for 60,000 images.
EPOCHS = {
    "mlp_784": 10,
    "mlp_784_keras": 10,
    "lenet_cifar": 2,
    "convnet_mnist": 3,
    "small_cnn_mnist": 10,
    "cnn_mnist_keras": 3,
    "cnn2_mnist_keras": 2,
    "cnn2_mnist": 2,
}


def load() -> Data:
    """The 1,797 digits of scikit-learn, 8x8 pixels in [0, 1]: 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    inputs, test_inputs, targets, test_targets = train_test_split(
        (pixels / 16).astype(np.float32),
        labels.astype(np.int64),
        test_size=0.2,
        random_state=SEED,
        stratify=labels,
    )
    return Data(inputs, targets, test_inputs, test_targets)


def enlarged(pixels: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Digits [n, 64] as images [n, *sizes]: pixels repeated, in a frame of zeros, in all channels.

    `sizes` are channels, height and width, the last two equal and at least 8.
    """
    channels, size, _ = sizes
    times = size // SIDE
    before = (size - times * SIDE) // 2
    after = size - times * SIDE - before
    images = pixels.reshape(-1, 1, SIDE, SIDE).repeat(times, axis=2).repeat(times, axis=3)
    frame = (before, after)
    return np.pad(images, ((0, 0), (0, 0), frame, frame)).repeat(channels, axis=1)


def load_for(name: str) -> Data:
    """The digits in the sizes of network `name`, or flat for one that takes features."""
    data, sizes = load(), NETWORKS[name].inputs
    if len(sizes) == 1:
        return data
    return Data(
        enlarged(data.inputs, sizes),
        data.targets,
        enlarged(data.test_inputs, sizes),
        data.test_targets,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser("digits", __doc__, tuple(EPOCHS)).parse_args(arguments)
    return run(chosen, tuple(EPOCHS), load_for, "handwritten digits", EPOCHS)


if __name__ == "__main__":
    sys.exit(main())
