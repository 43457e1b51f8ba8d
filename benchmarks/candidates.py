"""The candidates that every op has: ours beside the framework's own, in each of its modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.harness import Candidate
from benchmarks.operands import Array, Case, Kind

TORCH, MODULE, NATIVE = "twinfuse torch", "twinfuse torch module", "torch eager"
GRAPH, EAGER, NATIVE_EAGER = "twinfuse tf.function", "twinfuse TF eager", "TF eager"
# Whose peak memory is measured, and beside whose.
EAGER_PAIRS = {"torch": (TORCH, NATIVE), "tensorflow": (EAGER, NATIVE_EAGER)}

Function = Callable[..., Any]
Run = Callable[[], Any]
Maker = Callable[[], Run]


@dataclass(frozen=True)
class TorchOp:
    """An op at one shape. `native` and what `fused` imports take `(input, weight, bias)`.

    `operands` are these three and the gradient of the output. `layer` makes a module of ours with
    `weight` and `bias`, whose values are set afterwards. `peers` compute forward passes only.
    """

    operands: Sequence[Any]
    native: Function
    fused: Callable[[], Function]
    layer: Callable[[], Any]
    peers: dict[str, Maker] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorflowOp:
    """As `TorchOp`; `layers` makes Keras layers, native and fused, or there are none.

    `arrays` brings the results of a candidate into the order of dimensions of the reference.
    """

    operands: Sequence[Any]
    native: Function
    fused: Callable[[], Function]
    arrays: Callable[[list[Array]], list[Array]]
    keras: str = "Keras"
    layers: tuple[Callable[[], Any], Callable[[], Any]] | None = None


@dataclass(frozen=True)
class Side:
    """What is measured in one framework.

    `makers`: framework and mode as reports name them -> name -> what builds a candidate. `arrays`
    brings what a candidate returned into the order and layout of the reference. `reference`
    computes one where the case has none for both frameworks.
    """

    makers: dict[str, dict[str, Maker]]
    arrays: Callable[[Any], list[Array]]
    reference: Callable[[], list[Array]] | None = None


def collect(
    built: Case,
    kind: Kind,
    frameworks: Sequence[str],
    only: Sequence[str],
    torch_op: Callable[[], TorchOp],
    tensorflow_op: Callable[[], TensorflowOp],
    input_gradient: bool = True,
) -> Case:
    """Fill `built` with the candidates of `frameworks`: all, or those named in `only`.

    For training, each returns the output and the gradients of input (unless `input_gradient` is
    off), weight and bias.
    """

    def in_torch() -> Side:
        return Side({"PyTorch": torch_makers(torch_op(), kind, input_gradient)}, _torch_arrays)

    def in_tensorflow() -> Side:
        op = tensorflow_op()
        modes = tensorflow_makers(op, kind, input_gradient).items()
        makers = {f"TensorFlow {mode}": of_mode for mode, of_mode in modes}
        return Side(makers, partial(_tensorflow_arrays, op))

    sides = {"torch": in_torch, "tensorflow": in_tensorflow}
    return gather(built, kind, [f for f in sides if f in frameworks], only, sides)


def gather(
    built: Case,
    kind: Kind,
    frameworks: Sequence[str],
    only: Sequence[str],
    sides: Mapping[str, Callable[[], Side]],
) -> Case:
    """Fill `built` with the candidates of both frameworks' sides: all, or those named in `only`.

    Building one may fail: it is then in `skipped`, with the reason.
    """
    converters: dict[str, Callable[[Any], list[Array]]] = {}
    if "torch" in frameworks:
        import torch

        built.context = partial(torch.set_grad_enabled, kind == "training")
    with built.context():
        for framework in frameworks:
            side = sides[framework]()
            # Nobody compares the one whose memory is measured.
            if side.reference and not only:
                try:
                    built.references |= dict.fromkeys(side.makers, side.reference())
                # Where the framework itself fails, there is nobody to be compared with.
                except Exception as error:
                    built.skipped[f"all of {framework}"] = _reason(error)
                    continue
            for mode, makers in side.makers.items():
                converters[mode] = side.arrays
                _add(built, mode, makers, only)
    built.outputs = lambda candidate, result: converters[candidate.framework](result)
    return built


def _add(built: Case, framework: str, makers: dict[str, Maker], only: Sequence[str]) -> None:
    for name, make in makers.items():
        if only and name not in only:
            continue
        try:
            run = make()
        # Whatever stops a candidate, the others are still to be measured; the report says why.
        except Exception as error:
            built.skipped[name] = _reason(error)
        else:
            built.candidates.append(Candidate(name, framework, run, name.startswith("twinfuse")))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _torch_arrays(result: Any) -> list[Array]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [r.detach().double().numpy() for r in results]


def _tensorflow_arrays(op: TensorflowOp, result: Any) -> list[Array]:
    import tensorflow as tf

    results = result if isinstance(result, (tuple, list)) else [result]
    return op.arrays([tf.cast(r, tf.float64).numpy() for r in results])


def torch_makers(op: TorchOp, kind: Kind, input_gradient: bool) -> dict[str, Maker]:
    """Name -> what builds a candidate in PyTorch. Sets `requires_grad` of the operands."""
    import torch

    x, weight, bias, grad = op.operands
    x.requires_grad_(kind == "training" and input_gradient)
    for parameter in (weight, bias):
        parameter.requires_grad_(kind == "training")

    def timed(function: Function, *arguments: Any) -> Run:
        if kind == "forward":
            return lambda: function(*arguments)
        inputs = arguments if len(arguments) == 3 else (x, *function.parameters())  # type: ignore[attr-defined]
        leaves = [leaf for leaf in inputs if leaf.requires_grad]

        def run() -> tuple[Any, ...]:
            output = function(*arguments)
            return (output, *torch.autograd.grad(output, leaves, grad))

        return run

    def compiled() -> Run:
        torch.compiler.reset()  # each shape its own graph, and none left from the shape before
        return timed(torch.compile(op.native, dynamic=False), x, weight, bias)

    def module() -> Run:
        layer = op.layer()
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return timed(layer, x)

    makers: dict[str, Maker] = {
        TORCH: lambda: timed(op.fused(), x, weight, bias),
        MODULE: module,
        NATIVE: lambda: timed(op.native, x, weight, bias),
        "torch.compile": compiled,
    }
    return makers | (op.peers if kind == "forward" else {})


def tensorflow_makers(
    op: TensorflowOp, kind: Kind, input_gradient: bool
) -> dict[str, dict[str, Maker]]:
    """Mode -> name -> what builds a candidate in TensorFlow."""
    import tensorflow as tf

    x, kernel, bias, grad = op.operands

    def timed(function: Function, wrap: Function | None) -> Run:
        def train(x: Any, kernel: Any, bias: Any, grad: Any) -> list[Any]:
            sources = (x, kernel, bias) if input_gradient else (kernel, bias)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                output = function(x, kernel, bias)
            return [output, *tape.gradient(output, sources, output_gradients=grad)]

        # Operands are arguments, never captured: a graph would fold captured constants.
        called = function if kind == "forward" else train
        arguments = (x, kernel, bias) if kind == "forward" else (x, kernel, bias, grad)
        wrapped = wrap(called) if wrap else called
        return lambda: wrapped(*arguments)

    def keras_layer(make: Callable[[], Any], wrap: Function | None) -> Run:
        layer = make()
        layer.build(x.shape)
        # A depthwise layer has another order of dimensions, and the same order of elements.
        values = zip((kernel, bias), layer.get_weights(), strict=True)
        layer.set_weights([value.numpy().reshape(old.shape) for value, old in values])

        def train(x: Any, grad: Any) -> list[Any]:
            variables = [v.value for v in layer.trainable_variables]
            sources = (x, *variables) if input_gradient else (*variables,)
            with tf.GradientTape() as tape:
                if input_gradient:
                    tape.watch(x)
                output = layer(x)
            return [output, *tape.gradient(output, sources, output_gradients=grad)]

        called = layer if kind == "forward" else train
        arguments = (x,) if kind == "forward" else (x, grad)
        wrapped = wrap(called) if wrap else called
        return lambda: wrapped(*arguments)

    graph, xla = tf.function, partial(tf.function, jit_compile=True)
    makers: dict[str, dict[str, Maker]] = {
        "eager": {
            EAGER: lambda: timed(op.fused(), None),
            NATIVE_EAGER: lambda: timed(op.native, None),
        },
        "graph": {
            GRAPH: lambda: timed(op.fused(), graph),
            "tf.function": lambda: timed(op.native, graph),
            "XLA": lambda: timed(op.native, xla),
        },
    }
    if op.layers:
        native, fused = op.layers
        for mode, wrap in (("eager", None), ("graph", graph)):
            makers[mode] |= {
                f"twinfuse Keras {mode}": partial(keras_layer, fused, wrap),
                f"{op.keras} {mode}": partial(keras_layer, native, wrap),
            }
    return makers
