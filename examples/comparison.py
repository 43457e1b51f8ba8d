"""What the runs of one program have to agree on, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.networks import RECIPES, Recipe
from examples.training import FRAMEWORKS, VARIANTS, Curve, Data, available, train

# Largest distance of the fused loss from the native one, relative to it. The order in which a
# float32 sum is rounded moves these curves by 1e-7 to 1e-5 (the float64 run shows it each time),
# more once a rounding has switched a ReLU; a wrong gradient moves them by 1e-2 or more.
TOLERANCE = 1e-4
SHOWN_EPOCHS = 10


def distance(curve: Curve, other: Curve) -> float:
    """Largest |curve - other| / |other| over the epochs; infinite when one is not finite."""
    pairs = zip(curve.losses, other.losses, strict=True)
    distances = [abs(a - b) / max(abs(b), 1e-30) for a, b in pairs]
    return max(d if d == d else float("inf") for d in distances)


def variants(curves: Sequence[Curve], framework: str) -> tuple[Curve, Curve, Curve]:
    """The native, fused and float64 run of `framework`."""
    by_variant = {c.variant: c for c in curves if c.framework == framework}
    native, fused, double = (by_variant[v] for v in VARIANTS)
    return native, fused, double


def frameworks(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(c.framework for c in curves))


def disagreements(curves: Sequence[Curve], recipe: Recipe, steps: int, fusible: int) -> list[str]:
    """What is wrong with the runs: curves that part, or fused kernels that did not run.

    `fusible` is the number of layers that must run fused in each of the `steps` of training.
    """
    found = []
    for framework in frameworks(curves):
        native, fused, double = variants(curves, framework)
        allowed = max(TOLERANCE, 2 * distance(native, double))
        if (apart := distance(fused, native)) > allowed:
            found.append(
                f"{framework}: the fused loss is {apart:.1e} from the native one, "
                f"allowed {allowed:.1e}"
            )
        for kind in ("forward", "backward"):
            ran = sum(count for name, count in fused.kernels.items() if kind in name)
            wanted = steps * fusible
            if ran < wanted or (ran and not wanted):
                found.append(f"{framework}: {ran} fused {kind} kernels ran, expected {wanted}")
        if native.kernels or double.kernels:
            found.append(f"{framework}: the native run launched fused kernels")
    if recipe.loss == "cross_entropy":
        found += [f"{c.name}: the loss did not fall" for c in curves if not falls(c)]
    return found


def falls(curve: Curve) -> bool:
    return len(curve.losses) < 2 or curve.losses[-1] < curve.losses[0]


def loss_table(curves: Sequence[Curve], recipe: Recipe, title: str) -> Table:
    """Native and fused side by side; a row for each epoch, or for ten when there are more."""
    shown = [c for c in curves if c.variant != "float64"]
    table = Table("", *(c.name for c in shown), title=title)
    step = max(1, recipe.epochs // SHOWN_EPOCHS)
    for epoch in range(step - 1, recipe.epochs, step):
        table.add_row(f"loss, epoch {epoch + 1}", *(f"{c.losses[epoch]:.6f}" for c in shown))
    table.add_section()
    if recipe.loss == "cross_entropy":
        table.add_row("test accuracy", *(f"{c.score:.2%}" for c in shown))
    else:
        table.add_row("test error", *(f"{c.score:.6f}" for c in shown))
    # The median: the first epoch pays for tracing and for waking the threads.
    table.add_row("ms per epoch", *(f"{statistics.median(c.seconds) * 1e3:.1f}" for c in shown))
    table.add_section()
    kernels = list(dict.fromkeys(name for c in shown for name in c.kernels))
    for kernel in kernels:
        counts = (c.kernels.get(kernel) for c in shown)
        table.add_row(kernel, *(f"x {count}" if count else "" for count in counts))
    if not kernels:
        table.add_row("fused kernels", *("none" for _ in shown))
    return table


def print_curves(console: Console, curves: Sequence[Curve], recipe: Recipe, title: str) -> None:
    """The table, what each layer runs on, and how near the curves are to each other."""
    console.print(loss_table(curves, recipe, title))
    for framework in frameworks(curves):
        native, fused, double = variants(curves, framework)
        console.print(f"{framework}, fused:", style="bold")
        console.print(fused.explanation, highlight=False, markup=False)
        console.print(
            "largest relative distance of losses: "
            f"fused from native {distance(fused, native):.1e}, "
            f"native from float64 {distance(native, double):.1e}\n",
            highlight=False,
        )


def plot(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Losses above, and below them how far fused is from native, one panel for each framework."""
    from matplotlib.figure import Figure

    shown = frameworks(curves)
    figure = Figure(figsize=(1 + 4.5 * len(shown), 5.5), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False, sharex=True, height_ratios=[2, 1])
    for column, framework in enumerate(shown):
        native, fused, _ = variants(curves, framework)
        epochs = range(1, len(native.losses) + 1)
        top, bottom = axes[0][column], axes[1][column]
        top.plot(epochs, native.losses, color="#0072B2", linewidth=4, alpha=0.4, label="native")
        top.plot(epochs, fused.losses, color="black", linewidth=1, linestyle="--", label="fused")
        top.set(title=f"{framework}: {native.network}", ylabel="training loss", yscale="log")
        top.legend(frameon=False)
        apart = [abs(a - b) / b for a, b in zip(fused.losses, native.losses, strict=True)]
        bottom.plot(epochs, [max(a, 1e-10) for a in apart], color="black", marker=".")
        bottom.axhline(TOLERANCE, color="#D55E00", linewidth=1, label="allowed")
        bottom.set(xlabel="epoch", ylabel="|fused - native|\n/ native", yscale="log")
        bottom.set_ylim(5e-11, 1e-2)
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
    wanted = list(networks) if framework == "both" else [framework]
    present = [f for f in available(framework) if f in networks]
    for missing in (f for f in wanted if f not in present):
        reason = f"{FRAMEWORKS[missing]} is not installed" if missing in networks else "no network"
        console.print(f"left out: {missing} ({reason})", style="yellow")
    if not present:
        raise SystemExit("nothing to train: install torch or tensorflow")
    recipe = RECIPES[networks[present[0]]]
    if epochs is not None:
        recipe = Recipe(epochs, recipe.batch, recipe.optimizer, recipe.learning_rate, recipe.loss)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    curves: list[Curve] = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in present:
            task = progress.add_task(f"training in {name}", total=len(VARIANTS) * recipe.epochs)

            def advance(task: object = task) -> None:
                progress.advance(task)  # type: ignore[arg-type]

            curves += train(name, networks[name], data, recipe, advance)
    print_curves(console, curves, recipe, title)
    if output:
        plot(curves, output, title)
        console.print(f"curves: {output}", highlight=False)
    steps = recipe.epochs * len(data.batches(0, recipe.batch))
    return disagreements(curves, recipe, steps, fusible)


def finish(console: Console, problems: Sequence[str]) -> int:
    """Say how it went; the exit status."""
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    if not problems:
        console.print("native and fused follow the same curve", style="green")
    return 1 if problems else 0
