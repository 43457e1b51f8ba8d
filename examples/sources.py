"""What the examples on data of the user's share: where it comes from, and their command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.comparison import parser, run
from examples.networks import NETWORKS
from examples.training import Data

Sources = Mapping[str, Callable[[Path], Data]]
FETCHING = "keras"  # the source that needs no folder


def run_source(
    program: str,
    description: str | None,
    networks: Sequence[str],
    sources: Sources,
    where: str,
    arguments: Sequence[str] | None,
) -> int:
    """Command line of an example: the first of `networks` on data of one of `sources`.

    Returns the exit status; raises SystemExit, with the reason, where there are no such data.
    """
    made = parser(program, description, networks)
    made.set_defaults(network=networks[0])
    made.add_argument("--source", choices=tuple(sources), default=next(iter(sources)))
    made.add_argument("--data", type=Path, help=f"folder with it (not for --source {FETCHING})")
    chosen = made.parse_args(arguments)
    if chosen.data is None and chosen.source != FETCHING:
        made.error(f"--data is needed with --source {chosen.source}")
    try:
        data = sources[chosen.source](chosen.data)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        made.error(str(error))

    def load(name: str) -> Data:
        features = len(NETWORKS[name].inputs) == 1
        return data.shaped(math.prod(data.sizes)) if features else data

    return run(chosen, networks, load, where)
