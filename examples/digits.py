"""Train a network on real handwritten digits, natively and fused, in PyTorch and in Keras."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from examples.comparison import compare, finish
from examples.models import SEED
from examples.training import FRAMEWORKS, Data

NETWORKS = {"torch": "mlp_784", "keras": "mlp_784_keras"}
FUSIBLE = 2  # layers with a ReLU


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--epochs", type=int, help="instead of the network's own number")
    parser.add_argument("--framework", choices=(*FRAMEWORKS, "both"), default="both")
    parser.add_argument("--output", type=Path, default=Path("demo/digits.png"), help="plot")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    problems = compare(
        console,
        NETWORKS,
        load(),
        chosen.framework,
        "Handwritten digits: native and fused",
        FUSIBLE,
        chosen.epochs,
        chosen.output,
    )
    return finish(console, problems)


if __name__ == "__main__":
    sys.exit(main())
