"""What the native and the fused run have to agree on, and how they are shown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.networks import RECIPES, Recipe
from examples.training import FRAMEWORKS, Data, Pair, available, train

# Relative distance of the gradients from the same weights: float32 sums in another order differ by
# 1e-7 to 1e-6 here, and a gradient that lacks one row or one column by 1e-2.
GRADIENT_TOLERANCE = 1e-5

# Relative distance of the losses of two whole runs. They stay within 1e-7 until rounding switches
# one ReLU for one sample; from there on they part, and so does a native run whose initial weights
# are changed in the last bit: by up to 5e-3 on these data.
LOSS_TOLERANCE = 2e-2

SHOWN_EPOCHS = 10


def loss_distance(pair: Pair) -> float:
    """Largest |fused - native| / |native| over the epochs; infinite when one is not a number."""
    losses = zip(pair.fused.losses, pair.native.losses, strict=True)
    distances = [abs(a - b) / max(abs(b), 1e-30) for a, b in losses]
    return max(d if d == d else float("inf") for d in distances)


def disagreements(pair: Pair, recipe: Recipe, steps: int, fusible: int) -> list[str]:
    """What is wrong with the runs: curves that part, or fused kernels that did not run.

    `fusible` is the number of layers that must run fused in each of the `steps` of training.
    """
    found = []
    if not (apart := loss_distance(pair)) <= LOSS_TOLERANCE:
        found.append(f"the losses are {apart:.1e} apart, allowed {LOSS_TOLERANCE:.0e}")
    if not pair.gradient_distance <= GRADIENT_TOLERANCE:
        found.append(
            f"gradients from the same weights are {pair.gradient_distance:.1e} apart, allowed "
            f"{GRADIENT_TOLERANCE:.0e}"
        )
    for kind in ("forward", "backward"):
        ran = sum(count for name, count in pair.fused.kernels.items() if kind in name)
        wanted = steps * fusible
        if ran < wanted or (ran and not wanted):
            found.append(f"{ran} fused {kind} kernels ran, expected {wanted}")
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
            f"fused from native, relative: gradients from the same weights "
            f"{pair.gradient_distance:.1e} (allowed {GRADIENT_TOLERANCE:.0e}), losses "
            f"{loss_distance(pair):.1e} (allowed {LOSS_TOLERANCE:.0e})\n",
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
        apart = [abs(a - b) / b for a, b in zip(fused, native, strict=True)]
        bottom.plot(epochs, [max(a, 1e-10) for a in apart], color="black", marker=".")
        bottom.axhline(LOSS_TOLERANCE, color="#D55E00", linewidth=1, label="allowed")
        bottom.set(xlabel="epoch", ylabel="|fused - native|\n/ native", yscale="log")
        bottom.set_ylim(5e-11, 1)
        bottom.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def compare(
    console: Console,
    networks: dict[str, str],
    data: Data,
    framework: str,
    title: str,
    fusible: int,
    epochs: int | None = None,
    output: Path | None = None,
) -> list[str]:
    """Train `networks` (framework -> name) on `data`, show the runs, and return what is wrong.

    Raises SystemExit when no wanted framework is installed; one that is missing is named.
    """
    present = [f for f in available(framework) if f in networks]
    wanted = [f for f in networks if framework in (f, "both")]
    for missing in (f for f in wanted if f not in present):
        reason = f"{FRAMEWORKS[missing]} is not installed"
        console.print(f"left out: {missing} ({reason})", style="yellow")
    if not present:
        raise SystemExit("nothing to train: install torch or tensorflow")
    recipe = RECIPES[networks[present[0]]]
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    pairs = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in present:
            task = progress.add_task(f"training in {name}", total=2 * recipe.epochs)
            pairs.append(
                train(name, networks[name], data, recipe, lambda t=task: progress.advance(t))  # type: ignore[misc]
            )
    print_pairs(console, pairs, recipe, title)
    if output:
        plot(pairs, output, title)
        console.print(f"curves: {output}", highlight=False)
    steps = recipe.epochs * len(data.batches(0, recipe.batch))
    return [text for pair in pairs for text in disagreements(pair, recipe, steps, fusible)]


def finish(console: Console, problems: Sequence[str]) -> int:
    """Say how it went; the exit status."""
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    if not problems:
        console.print("native and fused follow the same curve", style="green")
    return 1 if problems else 0
