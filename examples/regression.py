"""Two small regressions: one with a layer to fuse, and one that must stay native and says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from examples.comparison import parser, run
from examples.models import SEED
from examples.training import Data

NETWORKS = ("mlp_regression", "linear_regression")


def load() -> Data:
    """100 points of y = 3x + 2 with noise, x in [-1, 1]; tested on 50 more without noise."""
    random = np.random.default_rng(SEED)
    inputs = random.uniform(-1, 1, (100, 1)).astype(np.float32)
    noise = random.normal(0, 0.1, inputs.shape)
    test_inputs = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    return Data(
        inputs, (3 * inputs + 2 + noise).astype(np.float32), test_inputs, 3 * test_inputs + 2
    )


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser("regression", __doc__, NETWORKS).parse_args(arguments)
    return run(chosen, NETWORKS, lambda name: load(), "points of a line")


if __name__ == "__main__":
    sys.exit(main())
