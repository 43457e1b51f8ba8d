"""Linear+ReLU: shapes, candidates, and the goals set for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.goals import ALL_PEERS, Goal
from benchmarks.harness import Candidate
from benchmarks.operands import ITEM_SIZE, Array, Case, Kind, Section, Shape

OP = "linear_relu"
SHAPE_NAMES = ("M", "K", "N")

SHAPES = (
    (64, 784, 128),
    (128, 1024, 1024),
    (512, 1024, 1024),
    (1024, 1024, 4096),
    (4096, 256, 256),
    (16384, 64, 64),
)
LARGE = ((512, 1024, 1024), (1024, 1024, 4096))
DECODE = ((1, 1024, 1024), (8, 1024, 1024))
TINY = ((1, 16, 16), (4, 64, 64))

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

TORCH, MODULE = "twinfuse torch", "twinfuse torch module"
NATIVE = "torch eager"
AMD = "On AMD processors MKL, which torch eager calls, takes its AVX2 path."
GRAPH, EAGER = "twinfuse tf.function", "twinfuse TF eager"

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
    def random(cls, shape: Shape) -> Operands:
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
    kind: Kind, shape: Shape, dtype: str, frameworks: Sequence[str], only: Sequence[str] = ()
) -> Case:
    """The candidates of the installed `frameworks`: all, or those named in `only`.

    Building one may fail: it is then in `skipped`, with the reason.
    Each computes `relu(input @ weight^T + bias)`; for training also the three gradients for a
    given random gradient of the output.
    """
    m, k, n = shape
    operands = Operands.random(shape)
    parts = (m * k, n * k, n, m * n)
    built = Case(
        candidates=[],
        reference=operands.reference(kind),
        outputs=_outputs,
        flops=(2.0 if kind == "forward" else 6.0) * m * k * n,
        # Training reads the operands and the gradient, and writes the output and three gradients.
        traffic=ITEM_SIZE[dtype] * (sum(parts) if kind == "forward" else 2 * sum(parts)),
    )
    if "torch" in frameworks:
        import torch

        built.context = partial(torch.set_grad_enabled, kind == "training")
        with built.context():
            _collect(built, "PyTorch", _torch_candidates(operands, kind, dtype), only)
    if "tensorflow" in frameworks:
        for framework, makers in _tensorflow_candidates(operands, kind, dtype).items():
            _collect(built, framework, makers, only)
    return built


Maker = Callable[[], Callable[[], Any]]


def _collect(built: Case, framework: str, makers: dict[str, Maker], only: Sequence[str]) -> None:
    for name, make in makers.items():
        if only and name not in only:
            continue
        try:
            run = make()
        # Whatever stops a candidate, the others are still to be measured; the report says why.
        except Exception as error:
            built.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            built.candidates.append(Candidate(name, framework, run, name.startswith("twinfuse")))


def _outputs(candidate: Candidate, result: Any) -> list[Array]:
    arrays = result if isinstance(result, (tuple, list)) else [result]
    if candidate.framework == "PyTorch":
        return [a.detach().double().numpy() for a in arrays]
    import tensorflow as tf

    converted = [tf.cast(a, tf.float64).numpy() for a in arrays]
    # The kernel, and so its gradient, is [K, N] here.
    return [a.T if i == 2 else a for i, a in enumerate(converted)]


def _torch_candidates(operands: Operands, kind: Kind, dtype: str) -> dict[str, Maker]:
    import torch
    import torch.nn.functional as F

    kept = [torch.tensor(a).to(getattr(torch, dtype)) for a in vars(operands).values()]
    x, weight, bias, grad = kept
    for leaf in (x, weight, bias):
        leaf.requires_grad_(kind == "training")

    def timed(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        if kind == "forward":
            return lambda: function(*arguments)
        leaves = arguments if len(arguments) == 3 else (x, *function.parameters())  # type: ignore[attr-defined]

        def run() -> tuple[Any, ...]:
            output = function(*arguments)
            return (output, *torch.autograd.grad(output, leaves, grad))

        return run

    def eager(x: Any, weight: Any, bias: Any) -> Any:
        return F.relu(F.linear(x, weight, bias))

    def compiled() -> Callable[[], Any]:
        torch.compiler.reset()  # each shape its own graph, and none left from the shape before
        return timed(torch.compile(eager, dynamic=False), x, weight, bias)

    def onednn() -> Callable[[], Any]:
        op = torch.ops.mkldnn._linear_pointwise
        return lambda: op(x, weight, bias, "relu", [], "")

    def ours() -> Callable[[], Any]:
        import twinfuse.torch as tft

        return timed(tft.linear_relu, x, weight, bias)

    def module() -> Callable[[], Any]:
        import twinfuse.torch as tft

        layer = tft.nn.LinearReLU(x.shape[1], weight.shape[0], dtype=x.dtype)
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return timed(layer, x)

    makers: dict[str, Maker] = {
        TORCH: ours,
        MODULE: module,
        "torch eager": lambda: timed(eager, x, weight, bias),
        "torch.compile": compiled,
    }
    if kind == "forward":
        makers["oneDNN fused"] = onednn
    return makers


def _tensorflow_candidates(
    operands: Operands, kind: Kind, dtype: str
) -> dict[str, dict[str, Maker]]:
    import keras
    import tensorflow as tf

    arrays = (operands.input, operands.weight.T, operands.bias, operands.grad_output)
    x, kernel, bias, grad = (tf.cast(tf.constant(a), dtype) for a in arrays)

    def plain(x: Any, kernel: Any, bias: Any) -> Any:
        return tf.nn.relu(tf.matmul(x, kernel) + bias)

    def ours(x: Any, kernel: Any, bias: Any) -> Any:
        import twinfuse.tensorflow as tftf

        return tftf.linear_relu(x, kernel, bias)

    def timed(function: Callable[..., Any], wrap: Callable[..., Any] | None) -> Callable[[], Any]:
        def train(x: Any, kernel: Any, bias: Any, grad: Any) -> list[Any]:
            with tf.GradientTape() as tape:
                tape.watch((x, kernel, bias))
                output = function(x, kernel, bias)
            return [output, *tape.gradient(output, (x, kernel, bias), output_gradients=grad)]

        # Operands are arguments, never captured: a graph would fold captured constants.
        called = function if kind == "forward" else train
        arguments = (x, kernel, bias) if kind == "forward" else (x, kernel, bias, grad)
        wrapped = wrap(called) if wrap else called
        return lambda: wrapped(*arguments)

    def dense(layers: Callable[[], Any], wrap: Callable[..., Any] | None) -> Callable[[], Any]:
        layer = layers().Dense(bias.shape[0], activation="relu", dtype=dtype)
        layer.build(x.shape)
        layer.set_weights([kernel.numpy(), bias.numpy()])

        def train(x: Any, grad: Any) -> list[Any]:
            variables = [v.value for v in layer.trainable_variables]
            with tf.GradientTape() as tape:
                tape.watch(x)
                output = layer(x)
            return [output, *tape.gradient(output, (x, *variables), output_gradients=grad)]

        called = layer if kind == "forward" else train
        arguments = (x,) if kind == "forward" else (x, grad)
        wrapped = wrap(called) if wrap else called
        return lambda: wrapped(*arguments)

    def fused_layers() -> Any:
        import twinfuse.keras as tfk

        return tfk.layers

    def native_layers() -> Any:
        return keras.layers

    graph, xla = tf.function, partial(tf.function, jit_compile=True)
    return {
        "TensorFlow eager": {
            EAGER: lambda: timed(ours, None),
            "twinfuse Keras eager": lambda: dense(fused_layers, None),
            "TF eager": lambda: timed(plain, None),
            "Keras Dense eager": lambda: dense(native_layers, None),
        },
        "TensorFlow graph": {
            GRAPH: lambda: timed(ours, graph),
            "twinfuse Keras graph": lambda: dense(fused_layers, graph),
            "tf.function": lambda: timed(plain, graph),
            "XLA": lambda: timed(plain, xla),
            "Keras Dense graph": lambda: dense(native_layers, graph),
        },
    }
