"""What the examples of data-parallel training share: networks, data, and what has to agree.

A batch is shared by all replicas, so that native, fused and one process alone take the same steps.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from examples import digits, sequences
from examples.comparison import curve_distances, disagreements, finish, print_pairs
from examples.models import build
from examples.networks import NETWORKS
from examples.training import Builder, Data, follow, train

# Networks, and how they are trained: for a few epochs, and the convolutions at a rate that suits
# these few images.
RECIPES = {
    "mlp_784": replace(NETWORKS["mlp_784"].recipe, epochs=3),
    "small_cnn_mnist": replace(NETWORKS["small_cnn_mnist"].recipe, epochs=4, learning_rate=0.02),
    "lstm": replace(NETWORKS["lstm"].recipe, epochs=2),
}

# Distance of the losses of two runs, as a share of the highest. Replicas sum gradients in another
# order than one process, which moves the losses of these networks by less than 1e-6.
TOLERANCE = 1e-5


def parser(program: str, description: str | None) -> ArgumentParser:
    """The options of both examples; they run all networks unless one is asked for."""
    made = ArgumentParser(prog=f"python -m examples.{program}", description=description)
    made.add_argument("--network", choices=(*RECIPES, "all"), default="all")
    made.add_argument("--epochs", type=int, help="instead of each network's own number")
    return made


def chosen_networks(network: str) -> Sequence[str]:
    return tuple(RECIPES) if network == "all" else (network,)


def load(name: str, batch: int) -> Data:
    """The digits for network `name`, in whole batches: all replicas have as many samples."""
    source = sequences if NETWORKS[name].inputs == (digits.SIDE, digits.SIDE) else digits
    return source.load_for(name).whole(batch)


def compare(
    console: Console,
    name: str,
    epochs: int | None,
    framework: str,
    where: str,
    make: Builder,
    replicas: int,
    here: int = 1,
) -> list[str]:
    """Train network `name` natively and fused by `make`, and natively in this process alone.

    `here` is how many of the `replicas` are in this process. Returns what is wrong. Raises
    SystemExit when a batch cannot be shared equally.
    """
    recipe = replace(RECIPES[name], epochs=epochs or RECIPES[name].epochs)
    if recipe.batch % replicas:
        raise SystemExit(f"{name}: {replicas} replicas cannot share a batch of {recipe.batch}")
    data = load(name, recipe.batch)
    alone = follow(build(framework, name, data.sizes, recipe, False), data, recipe)
    pair = train(framework, name, data, recipe, make=make)
    print_pairs(console, [pair], recipe, f"{name} on handwritten digits, {where}")
    steps = recipe.epochs * len(data.batches(0, recipe.batch)) * here
    found = disagreements(pair, recipe, steps, NETWORKS[name].fusible)
    for what, curve, other in (
        ("fused from native", pair.fused, pair.native),
        ("fused from one process", pair.fused, alone),
        ("native from one process", pair.native, alone),
    ):
        apart = max(curve_distances(curve, other))
        text = f"{what}: losses {apart:.1e} of the highest (allowed {TOLERANCE:.0e})"
        console.print(text, highlight=False)
        if not apart <= TOLERANCE:
            found.append(f"{framework}: {text}")
    return [f"{name}: {text}" for text in found]


def end(console: Console, problems: Sequence[str]) -> int:
    """As `finish`; a process that is quiet otherwise says what is wrong."""
    console.quiet = console.quiet and not problems
    return finish(console, problems)
