"""Random operands, what a case is made of, and the check that candidates compute the same thing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Candidate

Shape = tuple[Any, ...]  # of an op's own kind: a NamedTuple whose `str` is its name in reports
Kind = Literal["forward", "training"]
Array = NDArray[np.float64]
FRAMEWORKS = {"torch": "torch", "tensorflow": "tensorflow"}
ITEM_SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# ||got - reference|| / ||reference||. Wide: rounding flips the sign of a few outputs next to zero,
# and with it their whole gradient. A candidate that computes something else is off by about 1.
TOLERANCE = {"float32": 1e-2, "float64": 1e-2, "float16": 5e-2, "bfloat16": 1.5e-1}


@dataclass
class Case:
    """One op at one shape and dtype: who computes it, and how much there is to compute.

    `outputs` turns what a candidate's `run` returned into float64 arrays in the order and layout of
    `reference`; `references` has others for some frameworks and modes. `traffic` is the bytes of
    every operand and result, once. `notes` say what a candidate's time leaves out. `steps` follow
    one another in a call; 0: it has no steps. `ops` are those whose kernels ours is to launch; by
    default the one that is measured.
    """

    reference: list[Array]
    flops: float
    traffic: int
    candidates: list[Candidate] = field(default_factory=list)
    outputs: Callable[[Candidate, Any], list[Array]] = lambda candidate, result: list(result)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    references: dict[str, list[Array]] = field(default_factory=dict)
    ops: tuple[str, ...] | None = None
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: one op, one kind of pass, one dtype, several shapes.

    `accepts` says which shapes asked for by hand it is about.
    """

    name: str
    title: str
    kind: Literal["forward", "training", "memory", "install"]
    dtype: str = "float32"
    shapes: tuple[Shape, ...] = ()
    quick: tuple[Shape, ...] = ()
    default: bool = True
    accepts: Callable[[Any], bool] = lambda shape: True


def installed(frameworks: Sequence[str] = tuple(FRAMEWORKS)) -> list[str]:
    """Those of `frameworks` that can be imported, without importing them."""
    return [f for f in frameworks if importlib.util.find_spec(FRAMEWORKS[f]) is not None]


def set_threads(threads: int, frameworks: Sequence[str]) -> None:
    """Give each framework `threads` threads. Call it before any of them has computed anything."""
    # Read when the libraries are loaded; Keras must not take the other framework.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # torch.compile loads Triton, which crashes when TensorFlow's LLVM was loaded before its own.
    if "torch" in frameworks and importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    if "torch" in frameworks:
        import torch

        torch.set_num_threads(threads)
    if "tensorflow" in frameworks:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        # Each candidate of each shape is a graph of its own, which TensorFlow takes for retracing.
        tf.get_logger().setLevel("ERROR")


def error(got: Sequence[Array], reference: Sequence[Array]) -> float:
    """Largest relative distance in norm; infinite for a wrong count, a wrong shape or a NaN."""
    if [g.shape for g in got] != [r.shape for r in reference]:
        return float("inf")
    distances = [
        float(np.linalg.norm(g - r)) / max(float(np.linalg.norm(r)), 1e-30)
        for g, r in zip(got, reference, strict=True)
    ]
    return float("inf") if np.isnan(distances).any() else max(distances)
