"""LSTM: sections, candidates, and the goals set for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.candidates import MODULE, TORCH, gather
from benchmarks.goals import Goal
from benchmarks.lstm_candidates import (
    KERAS_GRAPH,
    KERAS_XLA,
    NATIVE_KERAS_GRAPH,
    TORCH_CELL,
    TORCH_LAYER,
    in_tensorflow,
    in_torch,
)
from benchmarks.lstm_shapes import SHAPE_FORM, LstmShape, Operands, frameworks_of, parse_shape
from benchmarks.operands import ITEM_SIZE, Case, Kind, Section

__all__ = ["GOALS", "OP", "SECTIONS", "SHAPE_FORM", "case", "frameworks_of", "parse_shape"]

OP = "lstm"
# Whose peak memory is measured, and beside whose. Keras trains in graphs; they are traced before.
MEMORY_PAIRS = {"torch": (MODULE, TORCH_LAYER), "tensorflow": (KERAS_GRAPH, NATIVE_KERAS_GRAPH)}

SHAPES = (
    LstmShape(1, 64, 64, 64),
    LstmShape(32, 64, 128, 128),
    LstmShape(32, 64, 512, 512),
    LstmShape(128, 32, 256, 256),
)
CELLS = tuple(shape._replace(steps=0) for shape in SHAPES)
PACKED = tuple(shape._replace(packed=True) for shape in SHAPES)
PROJECTED = tuple(shape._replace(projection=shape.units // 2) for shape in SHAPES)

MEASURED = (*SHAPES, PACKED[1], PROJECTED[1])  # in memory


def _pair(prefix: str, title: str, shapes: tuple[LstmShape, ...]) -> tuple[Section, Section]:
    """A section of forward passes, and one of both passes."""
    forward = Section(
        prefix or "forward",
        f"{title}, forward",
        "forward",
        shapes=shapes,
        quick=shapes[1:2],
        accepts=lambda shape: shape.variant == shapes[0].variant,
    )
    name, both = f"{prefix}_training".strip("_"), f"{title}, forward + backward"
    return forward, replace(forward, name=name, title=both, kind="training")


SECTIONS = (
    *_pair("cell", "One step of a cell", CELLS),
    *_pair("", "Layer", SHAPES),
    *_pair("packed", "Layer, packed sequences", PACKED),
    *_pair("projected", "Layer with a projection", PROJECTED),
    Section(
        "memory",
        "Peak memory of a layer's forward + backward",
        "memory",
        shapes=MEASURED,
        accepts=lambda shape: not shape.cell,
    ),
)

NATIVE_KERAS = (NATIVE_KERAS_GRAPH, KERAS_XLA)
BATCHES, SINGLE = CELLS[1:], CELLS[:1]
IN_KERAS = tuple(shape for shape in MEASURED if "tensorflow" in frameworks_of(shape))

CELL_3X = "lstm_cell: 3x nn.LSTMCell in geometric mean from batches of 32"
CELL_EACH = "lstm_cell: no slower than nn.LSTMCell on one sequence"
LAYER_EACH = "no slower than nn.LSTM on every shape"
TRAINED = "1.4x nn.LSTM in geometric mean"
PACKED_2X = "2x nn.LSTM on packed sequences in geometric mean"
PROJECTED_2X = "2x nn.LSTM with a projection in geometric mean"
KERAS_2X = "Keras: 2x the better of its graph and XLA in geometric mean"
KERAS_TRAINED = "Keras: 1.8x the better of its graph and XLA in geometric mean"
TORCH_PEAK, KERAS_PEAK = "peak no higher than nn.LSTM's", "Keras: peak no higher than its graph's"

GOALS = (
    Goal("cell", "geomean", 3.0, TORCH, TORCH_CELL, CELL_3X, BATCHES),
    Goal("cell", "each", 1.0, TORCH, TORCH_CELL, CELL_EACH, SINGLE),
    Goal("forward", "each", 1.0, MODULE, TORCH_LAYER, LAYER_EACH),
    Goal("training", "geomean", 1.4, MODULE, TORCH_LAYER, TRAINED),
    Goal("packed", "geomean", 2.0, MODULE, TORCH_LAYER, PACKED_2X),
    Goal("projected", "geomean", 2.0, MODULE, TORCH_LAYER, PROJECTED_2X),
    Goal("forward", "geomean", 2.0, KERAS_GRAPH, NATIVE_KERAS, KERAS_2X),
    Goal("training", "geomean", 1.8, KERAS_GRAPH, NATIVE_KERAS, KERAS_TRAINED),
    Goal("memory", "memory", 1.0, MODULE, TORCH_LAYER, TORCH_PEAK),
    Goal("memory", "memory", 1.0, KERAS_GRAPH, NATIVE_KERAS_GRAPH, KERAS_PEAK, IN_KERAS),
)


def case(
    kind: Kind, shape: LstmShape, dtype: str, frameworks: Sequence[str], only: Sequence[str] = ()
) -> Case:
    """The candidates of the installed `frameworks`: all, or those named in `only`.

    Each computes a layer's output and last state, or a cell's new state; for training also the
    gradients of the input, of a cell's state and of the weights, for given random gradients of a
    layer's output or of a cell's new state.
    """
    operands = Operands.random(shape)
    built = Case(
        reference=operands.reference(kind),
        flops=shape.flops(kind),
        traffic=ITEM_SIZE[dtype] * shape.elements_moved(kind),
        steps=shape.steps,
    )
    sides = {
        "torch": partial(in_torch, operands, kind, dtype, built.notes),
        "tensorflow": partial(in_tensorflow, operands, kind, dtype),
    }
    return gather(built, kind, frameworks, only, sides)
