"""Two small regressions: one with a layer to fuse, and one that must stay native and says so."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from examples.comparison import compare, finish
from examples.models import SEED
from examples.training import FRAMEWORKS, Data

NETWORKS = {
    "mlp_regression": {"torch": "mlp_regression"},
    "linear_regression": {"torch": "linear_regression", "keras": "linear_regression"},
}
FUSIBLE = {"mlp_regression": 1, "linear_regression": 0}


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
    parser = argparse.ArgumentParser(prog="python -m examples.regression", description=__doc__)
    parser.add_argument("--epochs", type=int, help="instead of each network's own number")
    parser.add_argument("--framework", choices=(*FRAMEWORKS, "both"), default="both")
    parser.add_argument("--network", choices=(*NETWORKS, "all"), default="all")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    names = list(NETWORKS) if chosen.network == "all" else [chosen.network]
    problems: list[str] = []
    for name in names:
        networks = NETWORKS[name]
        if chosen.framework != "both" and chosen.framework not in networks:
            console.print(f"left out: {name} is not a {chosen.framework} network", style="yellow")
            continue
        problems += compare(
            console, networks, load(), chosen.framework, name, FUSIBLE[name], chosen.epochs
        )
    return finish(console, problems)


if __name__ == "__main__":
    sys.exit(main())
