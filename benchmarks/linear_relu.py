"""Linear+ReLU: shapes, candidates, and the goals set for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.candidates import (
    EAGER,
    EAGER_PAIRS,
    GRAPH,
    NATIVE,
    TORCH,
    TensorflowOp,
    TorchOp,
    collect,
)
from benchmarks.goals import ALL_PEERS, Goal
from benchmarks.operands import FRAMEWORKS, ITEM_SIZE, Array, Case, Kind, Section, Shape

OP = "linear_relu"
SHAPE_FORM = "MxKxN"
MEMORY_PAIRS = EAGER_PAIRS


class LinearShape(NamedTuple):
    """M rows of K features to M rows of N features."""

    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_shape(text: str) -> LinearShape:
    """The shape that `str` has written. Raises ValueError."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise ValueError(f"expected {SHAPE_FORM} with positive sizes, got {text!r}")
    return LinearShape(*map(int, sizes))


def frameworks_of(shape: Shape) -> Sequence[str]:
    """The frameworks that are measured at `shape`."""
    return tuple(FRAMEWORKS)


def _shapes(*texts: str) -> tuple[LinearShape, ...]:
    return tuple(map(parse_shape, texts))


LARGE = _shapes("512x1024x1024", "1024x1024x4096")
SHAPES = (
    *_shapes("64x784x128", "128x1024x1024"),
    *LARGE,
    *_shapes("4096x256x256", "16384x64x64"),
)
DECODE = _shapes("1x1024x1024", "8x1024x1024")
TINY = _shapes("1x16x16", "4x64x64")

SECTIONS = (
    Section("forward", "Forward", "forward", shapes=SHAPES, quick=SHAPES[:2]),
    Section("training", "Forward + backward", "training", shapes=SHAPES, quick=SHAPES[:1]),
    Section("bf16", "Forward, bfloat16", "forward", "bfloat16", SHAPES, SHAPES[:1]),
    Section("decode", "Forward, few rows", "forward", shapes=DECODE),
    Section("tiny", "Forward, tiny", "forward", shapes=TINY, quick=TINY[1:]),
    Section("tiny_training", "Forward + backward, tiny", "training", shapes=TINY),
    Section("memory", "Peak memory of forward + backward", "memory", shapes=SHAPES[2:]),
    Section("install", "Installation from a warm cache", "install", default=False),
)

AMD = "On AMD processors MKL, which torch eager calls, takes its AVX2 path."

GOALS = (
    Goal("forward", "geomean", 2.0, TORCH, NATIVE, "2.0x torch eager in geometric mean", note=AMD),
    Goal("forward", "each", 0.95, TORCH, ALL_PEERS, "0.95x the best of all peers on every shape"),
    Goal("forward", "geomean", 1.05, TORCH, ALL_PEERS, "1.05x the best peer in geometric mean"),
    Goal("forward", "fma", 0.85, TORCH, "", "85 % of the FMA peak from 512x1024x1024", LARGE),
    Goal("training", "geomean", 1.9, TORCH, NATIVE, "1.9x torch eager in geometric mean", note=AMD),
    Goal("training", "geomean", 1.2, GRAPH, "tf.function", "1.2x a graph in geometric mean"),
    Goal("bf16", "each", 0.95, TORCH, NATIVE, "0.95x torch eager on every shape"),
    Goal("bf16", "geomean", 1.0, TORCH, NATIVE, "1.0x torch eager in geometric mean"),
    Goal("tiny", "each", 1 / 1.2, TORCH, NATIVE, "within 1.2x of torch eager at 1x16x16", TINY[:1]),
    Goal("tiny", "each", 1.0, TORCH, NATIVE, "no slower than torch eager at 4x64x64", TINY[1:]),
    Goal("tiny", "each", 2.0, EAGER, "TF eager", "2x relu(matmul + bias) in TensorFlow eager"),
    Goal("tiny_training", "each", 1 / 1.1, TORCH, NATIVE, "within 1.1x of torch eager's time"),
    Goal("memory", "memory", 1.0, TORCH, NATIVE, "peak no higher than torch eager's"),
    Goal("install", "seconds", 180.0, sentence="pip install . in less than 180 seconds"),
)


@dataclass(frozen=True)
class Operands:
    """input [M, K], weight [N, K], bias [N], grad_output [M, N], all normal; outputs about 1."""

    input: Array
    weight: Array
    bias: Array
    grad_output: Array

    @classmethod
    def random(cls, shape: LinearShape) -> Operands:
        m, k, n = shape
        draw = np.random.default_rng(0).standard_normal
        return cls(draw((m, k)), draw((n, k)) / np.sqrt(k), draw(n), draw((m, n)))

    def reference(self, kind: Kind) -> list[Array]:
        """The output; for training also the gradients of input, weight and bias."""
        output = np.maximum(self.input @ self.weight.T + self.bias, 0)
        if kind == "forward":
            return [output]
        grad = self.grad_output * (output > 0)
        return [output, grad @ self.weight, grad.T @ self.input, grad.sum(0)]


def case(
    kind: Kind, shape: LinearShape, dtype: str, frameworks: Sequence[str], only: Sequence[str] = ()
) -> Case:
    """The candidates of the installed `frameworks`: all, or those named in `only`.

    Each computes `relu(input @ weight^T + bias)`; for training also the three gradients for a
    given random gradient of the output.
    """
    m, k, n = shape
    operands = Operands.random(shape)
    parts = (m * k, n * k, n, m * n)
    built = Case(
        reference=operands.reference(kind),
        flops=(2.0 if kind == "forward" else 6.0) * m * k * n,
        # Training reads the operands and the gradient, and writes the output and three gradients.
        traffic=ITEM_SIZE[dtype] * (sum(parts) if kind == "forward" else 2 * sum(parts)),
    )
    return collect(
        built,
        kind,
        frameworks,
        only,
        lambda: _in_torch(operands, dtype),
        lambda: _in_tensorflow(operands, dtype),
    )


def _in_torch(operands: Operands, dtype: str) -> TorchOp:
    import torch
    import torch.nn.functional as F

    tensors = [torch.tensor(a).to(getattr(torch, dtype)) for a in vars(operands).values()]
    x, weight, bias, _ = tensors

    def native(x: Any, weight: Any, bias: Any) -> Any:
        return F.relu(F.linear(x, weight, bias))

    def fused() -> Callable[..., Any]:
        import twinfuse.torch as tft

        return tft.linear_relu

    def layer() -> Any:
        import twinfuse.torch as tft

        return tft.nn.LinearReLU(x.shape[1], weight.shape[0], dtype=x.dtype)

    def onednn() -> Callable[[], Any]:
        op = torch.ops.mkldnn._linear_pointwise
        return lambda: op(x, weight, bias, "relu", [], "")

    return TorchOp(tensors, native, fused, layer, {"oneDNN fused": onednn})


def _in_tensorflow(operands: Operands, dtype: str) -> TensorflowOp:
    import keras
    import tensorflow as tf

    arrays = (operands.input, operands.weight.T, operands.bias, operands.grad_output)
    tensors = [tf.cast(tf.constant(a), dtype) for a in arrays]
    how = {"units": operands.bias.size, "activation": "relu", "dtype": dtype}

    def native(x: Any, kernel: Any, bias: Any) -> Any:
        return tf.nn.relu(tf.matmul(x, kernel) + bias)

    def fused() -> Callable[..., Any]:
        import twinfuse.tensorflow as tftf

        return tftf.linear_relu

    def fused_layer() -> Any:
        import twinfuse.keras as tfk

        return tfk.layers.Dense(**how)

    return TensorflowOp(
        tensors,
        native,
        fused,
        # The kernel, and so its gradient, is [K, N] here.
        arrays=lambda found: [a.T if i == 2 else a for i, a in enumerate(found)],
        keras="Keras Dense",
        layers=(lambda: keras.layers.Dense(**how), fused_layer),
    )
