"""Whole networks: sections, goals, and as each framework computes them before and after `fuse`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.candidates import NATIVE, TORCH, gather
from benchmarks.goals import Goal
from benchmarks.lstm_candidates import (
    KERAS_EAGER,
    KERAS_GRAPH,
    NATIVE_KERAS_EAGER,
    NATIVE_KERAS_GRAPH,
)
from benchmarks.networks_candidates import in_keras, in_torch
from benchmarks.networks_shapes import (
    INPUTS,
    NOTHING,
    OPS,
    RECIPES,
    SHAPE_FORM,
    NetworkShape,
    elements_moved,
    flops,
    frameworks_of,
    parse_shape,
)
from benchmarks.operands import ITEM_SIZE, Case, Kind, Section

__all__ = ["GOALS", "OP", "SECTIONS", "SHAPE_FORM", "case", "frameworks_of", "parse_shape"]

OP = "networks"
# Keras trains in graphs; they are traced before.
MEMORY_PAIRS = {"torch": (TORCH, NATIVE), "tensorflow": (KERAS_GRAPH, NATIVE_KERAS_GRAPH)}

SHAPES = tuple(NetworkShape(name, RECIPES[name].batch) for name in INPUTS)
FUSED = tuple(shape for shape in SHAPES if OPS[shape.name])
UNFUSED = tuple(shape for shape in SHAPES if not OPS[shape.name])
COMPILED = tuple(shape._replace(compiled=True) for shape in FUSED)
QUICK = tuple(shape for shape in SHAPES if shape.name in ("mlp_784", "lenet_cifar", NOTHING))
MEASURED = tuple(shape for shape in FUSED if shape.name != "mlp_regression")  # in memory: tiny

INFERENCE = Section(
    "forward",
    "Inference",
    "forward",
    shapes=SHAPES,
    quick=QUICK,
    accepts=lambda shape: not shape.compiled,
)
TRAINING = Section(
    "training",
    "Step of training",
    "training",
    shapes=SHAPES,
    quick=QUICK[:1],
    accepts=lambda shape: not shape.compiled,
)
SECTIONS = (
    INFERENCE,
    TRAINING,
    Section(
        "memory",
        "Peak memory of a step of training",
        "memory",
        shapes=MEASURED,
        accepts=lambda shape: not shape.compiled,
    ),
    Section(
        "compiled",
        "Inference, torch.compile",
        "forward",
        shapes=COMPILED,
        default=False,
        accepts=lambda shape: shape.compiled,
    ),
    Section(
        "compiled_training",
        "Step of training, torch.compile",
        "training",
        shapes=COMPILED,
        default=False,
        accepts=lambda shape: shape.compiled,
    ),
)

PAIRS = {
    "torch": (TORCH, NATIVE),
    "Keras in a graph": (KERAS_GRAPH, NATIVE_KERAS_GRAPH),
    "Keras eager": (KERAS_EAGER, NATIVE_KERAS_EAGER),
}
FASTER, SAME = "faster than native on every network", "within 2 % where nothing is fused"
GOALS = (
    *(
        Goal(section.name, "each", limit, own, peer, f"{mode}: {sentence}", shapes)
        for section in (INFERENCE, TRAINING)
        for mode, (own, peer) in PAIRS.items()
        for limit, sentence, shapes in ((1.0, FASTER, FUSED), (0.98, SAME, UNFUSED))
    ),
    *(
        Goal("memory", "memory", 1.0, own, peer, f"{mode}: peak memory no higher")
        for mode, (own, peer) in PAIRS.items()
        if (own, peer) in MEMORY_PAIRS.values()
    ),
)


def case(
    kind: Kind, shape: NetworkShape, dtype: str, frameworks: Sequence[str], only: Sequence[str] = ()
) -> Case:
    """The candidates of the installed `frameworks`: all, or those named in `only`.

    Each computes the outputs of a batch, or a step of training on it: forward, backward, and the
    optimizer. They are compared with what the framework's own layers compute eagerly, from the same
    weights: each framework draws its own.
    """
    built = Case(
        reference=[],
        flops=flops(shape, kind),
        traffic=ITEM_SIZE[dtype] * elements_moved(shape, kind),
        ops=OPS[shape.name],
    )
    sides = {
        "torch": partial(in_torch, shape, kind, dtype),
        "tensorflow": partial(in_keras, shape, kind, dtype),
    }
    return gather(built, kind, frameworks, only, sides)
