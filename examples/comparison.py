"""What the native and the fused run have to agree on, and how they are shown."""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.exchange import starts
from examples.networks import NETWORKS, Recipe
from examples.training import FRAMEWORKS, Curve, Data, Pair, available, train

# Relative distance of the gradients from the same weights: float32 sums in another order differ by
# 1e-7 to 1e-6 here, and a gradient that lacks one row or one column by 1e-2.
GRADIENT_TOLERANCE = 1e-5

# Distance of the losses of two whole runs, as a share of the highest. They stay within 1e-7 until
# rounding switches one ReLU or one maximum for one sample; from there on they part, and so does a
# native run whose initial weights are changed in the last bit: by up to 1e-2 on these data.
LOSS_TOLERANCE = 2e-2

# The same of two frameworks that start with the same weights, for networks without ReLUs and
# maxima: theirs stay within 1e-5, and with gates in the wrong order they are 2e-3 apart or more.
FRAMEWORK_TOLERANCE = 1e-3

SHOWN_EPOCHS = 10


def curve_distances(curve: Curve, reference: Curve) -> list[float]:
    """|curve - reference| of each epoch over the reference's highest loss; infinite for what is no
    number.

    Losses close to zero are as unsteady as those before, so each is not held to its own size.
    """
    highest = max(map(abs, reference.losses), default=0.0)
    losses = zip(curve.losses, reference.losses, strict=True)
    distances = [abs(a - b) / max(highest, 1e-30) for a, b in losses]
    return [d if d == d else float("inf") for d in distances]


def loss_distances(pair: Pair) -> list[float]:
    return curve_distances(pair.fused, pair.native)


def loss_distance(pair: Pair) -> float:
    return max(loss_distances(pair))


def framework_distance(pairs: Sequence[Pair]) -> float:
    """How far the native runs, and the fused ones, of two frameworks are from each other."""
    first, second = pairs
    natives = curve_distances(second.native, first.native)
    return max(natives + curve_distances(second.fused, first.fused))


def disagreements(pair: Pair, recipe: Recipe, steps: int, fusible: dict[str, int]) -> list[str]:
    """What is wrong with the runs: curves that part, or fused kernels that did not run.

    `fusible` is the number of layers of each op that must run fused in each of the `steps` of
    training.
    """
    found = []
    if not (apart := loss_distance(pair)) <= LOSS_TOLERANCE:
        found.append(f"the losses are {apart:.1e} apart, allowed {LOSS_TOLERANCE:.0e}")
    if not pair.gradient_distance <= GRADIENT_TOLERANCE:
        found.append(
            f"gradients from the same weights are {pair.gradient_distance:.1e} apart, allowed "
            f"{GRADIENT_TOLERANCE:.0e}"
        )
    for op, layers in fusible.items():
        for role in (f"{op}_forward", f"{op}_backward"):
            ran = sum(count for name, count in pair.fused.kernels.items() if role in name)
            wanted = steps * layers
            if ran < wanted or (ran and not wanted):
                found.append(f"{ran} kernels {role} ran, expected {wanted}")
    if pair.native.kernels:
        found.append("the native run launched fused kernels")
    for name, curve in (("native", pair.native), ("fused", pair.fused)):
        if recipe.epochs > 1 and not curve.losses[-1] < curve.losses[0]:
            found.append(f"the {name} loss did not fall")
    return [f"{pair.framework}: {text}" for text in found]


def loss_table(pairs: Sequence[Pair], recipe: Recipe, title: str) -> Table:
    """Native and fused side by side; a row for each epoch, or for ten when there are more."""
    curves = [curve for pair in pairs for curve in (pair.native, pair.fused)]
    names = [f"{pair.framework} {variant}" for pair in pairs for variant in ("native", "fused")]
    table = Table("", *names, title=title)
    step = max(1, recipe.epochs // SHOWN_EPOCHS)
    for epoch in range(step - 1, recipe.epochs, step):
        table.add_row(f"loss, epoch {epoch + 1}", *(f"{c.losses[epoch]:.6f}" for c in curves))
    table.add_section()
    if recipe.loss == "cross_entropy":
        table.add_row("test accuracy", *(f"{c.score:.2%}" for c in curves))
    else:
        table.add_row("test error", *(f"{c.score:.6f}" for c in curves))
    # The median: the first epoch pays for tracing and for waking the threads.
    table.add_row("ms per epoch", *(f"{statistics.median(c.seconds) * 1e3:.1f}" for c in curves))
    table.add_section()
    kernels = list(dict.fromkeys(name for c in curves for name in c.kernels))
    for kernel in kernels:
        counts = (c.kernels.get(kernel) for c in curves)
        table.add_row(kernel, *(f"x {count}" if count else "" for count in counts))
    if not kernels:
        table.add_row("fused kernels", *("none" for _ in curves))
    return table


def print_pairs(console: Console, pairs: Sequence[Pair], recipe: Recipe, title: str) -> None:
    """The table, what each layer runs on, and how near native and fused are to each other."""
    console.print(loss_table(pairs, recipe, title))
    for pair in pairs:
        console.print(f"{pair.framework}, fused:", style="bold")
        console.print(pair.fused.explanation, highlight=False, markup=False)
        console.print(
            f"fused from native: gradients from the same weights {pair.gradient_distance:.1e} of "
            f"their norm (allowed {GRADIENT_TOLERANCE:.0e}), losses {loss_distance(pair):.1e} of "
            f"the highest (allowed {LOSS_TOLERANCE:.0e})\n",
            highlight=False,
        )


def plot(pairs: Sequence[Pair], path: Path, title: str) -> None:
    """Losses above, and below them how far fused is from native, one panel for each framework."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.5 * len(pairs), 5.5), layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False, sharex=True, height_ratios=[2, 1])
    for (top, bottom), pair in zip(axes.T, pairs, strict=True):
        native, fused = pair.native.losses, pair.fused.losses
        epochs = range(1, len(native) + 1)
        top.plot(epochs, native, color="#0072B2", linewidth=4, alpha=0.4, label="native")
        top.plot(epochs, fused, color="black", linewidth=1, linestyle="--", label="fused")
        top.set(title=f"{pair.framework}: {pair.network}", ylabel="training loss", yscale="log")
        top.legend(frameon=False)
        apart = [max(d, 1e-10) for d in loss_distances(pair)]
        bottom.plot(epochs, apart, color="black", marker=".")
        bottom.axhline(LOSS_TOLERANCE, color="#D55E00", linewidth=1, label="allowed")
        bottom.set(xlabel="epoch", ylabel="|fused - native|\n/ highest", yscale="log")
        bottom.set_ylim(5e-11, 1)
        bottom.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def compare(
    console: Console,
    name: str,
    data: Data,
    recipe: Recipe,
    frameworks: Sequence[str],
    title: str,
    output: Path | None = None,
) -> list[str]:
    """Train network `name` on `data`, show the runs, plot into `output`; returns what is wrong."""
    start = starts(name, data.sizes, frameworks)
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn())
    pairs = []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        for framework in frameworks:
            task = progress.add_task(f"{name} in {framework}", total=2 * recipe.epochs)
            advance = partial(progress.advance, task)
            pairs.append(train(framework, name, data, recipe, advance, start.get(framework)))
    print_pairs(console, pairs, recipe, title)
    if output:
        plot(pairs, output / f"{name}.png", title)
        console.print(f"curves: {output / name}.png\n", highlight=False)
    steps = recipe.epochs * len(data.batches(0, recipe.batch))
    fusible = NETWORKS[name].fusible
    found = [text for pair in pairs for text in disagreements(pair, recipe, steps, fusible)]
    if start:
        apart = framework_distance(pairs)
        text = (
            f"{' from '.join(frameworks)}: losses from the same weights {apart:.1e} of the highest "
            f"(allowed {FRAMEWORK_TOLERANCE:.0e})"
        )
        console.print(f"{text}\n", highlight=False)
        if not apart <= FRAMEWORK_TOLERANCE:
            found.append(text)
    if not any(fusible.values()):
        console.print(f"{name}: no fused kernel computes a layer of it, so it stays native\n")
    return [f"{name}: {text}" for text in found]


def parser(program: str, description: str | None, networks: Sequence[str]) -> ArgumentParser:
    """The options of every example; it runs all `networks` unless one is asked for."""
    made = ArgumentParser(prog=f"python -m examples.{program}", description=description)
    made.add_argument("--network", choices=(*networks, "all"), default="all")
    made.add_argument("--framework", choices=(*FRAMEWORKS, "both"), default="both")
    made.add_argument("--epochs", type=int, help="instead of each network's own number")
    made.add_argument("--batch", type=int, help="instead of each network's own")
    made.add_argument("--output", type=Path, default=Path("demo"), help="folder for the curves")
    return made


def run(
    chosen: Namespace,
    networks: Sequence[str],
    load: Callable[[str], Data],
    where: str,
    epochs: Mapping[str, int] | None = None,
) -> int:
    """Compare the networks that the options of `parser` ask for; returns the exit status.

    `load` gives the data of a network, `epochs` shorter runs than its own. Raises SystemExit when
    no wanted framework is installed; one that is missing is named.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    present = available(chosen.framework)
    for missing in FRAMEWORKS if chosen.framework == "both" else (chosen.framework,):
        if missing not in present:
            reason = f"{FRAMEWORKS[missing]} is not installed"
            console.print(f"left out: {missing} ({reason})", style="yellow")
    if not present:
        raise SystemExit("nothing to train: install torch or tensorflow")
    problems: list[str] = []
    for name in networks if chosen.network == "all" else (chosen.network,):
        recipe = NETWORKS[name].recipe
        recipe = replace(
            recipe,
            epochs=chosen.epochs or (epochs or {}).get(name, recipe.epochs),
            batch=chosen.batch or recipe.batch,
        )
        title = f"{name} on {where}"
        problems += compare(console, name, load(name), recipe, present, title, chosen.output)
    return finish(console, problems)


def finish(console: Console, problems: Sequence[str]) -> int:
    """Say how it went; the exit status."""
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    if not problems:
        console.print("native and fused follow the same curve", style="green")
    return 1 if problems else 0
