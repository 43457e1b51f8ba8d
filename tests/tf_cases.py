"""The case tables as TensorFlow tensors, and TensorFlow's own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.arrays import Array
from tests.conftest import require
from tests.conv_case import ConvCase
from tests.problem import Problem, Results, numpy_results, reference64
from tests.rule import assert_within_twice

tf = require("tensorflow")

RESULTS = ("output", "grad_input", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Tensors:
    """One problem; a weight `[N, K]` or `[K, C, R, S]` of the table as a Keras kernel."""

    x: Any
    kernel: Any
    bias: Any | None
    grad: Any
    # Which dimension of the table each dimension of x and y, and of the kernel, is.
    image: tuple[int, ...]
    weight: tuple[int, ...]

    @property
    def operands(self) -> list[Any]:
        return [self.x, self.kernel] + ([] if self.bias is None else [self.bias])


def tensor(array: Array) -> Any:
    array = np.ascontiguousarray(array).reshape(array.shape)
    return tf.bitcast(array, tf.bfloat16) if array.dtype == np.uint16 else tf.constant(array)


def array(value: Any) -> Array:
    """As NumPy; bfloat16 as its bits."""
    value = tf.convert_to_tensor(value)
    return (tf.bitcast(value, tf.uint16) if value.dtype == tf.bfloat16 else value).numpy()


def tensors(problem: Problem, data_format: str = "channels_last") -> Tensors:
    rank = len(problem.case.output_sizes)
    image, weight = tuple(range(rank)), (1, 0)
    if isinstance(problem.case, ConvCase):
        weight = (*range(2, rank), 1, 0)
        image = (0, *range(2, rank), 1) if data_format == "channels_last" else image
    return Tensors(
        tensor(problem.input.contiguous.transpose(image)),
        tensor(problem.weight.contiguous.transpose(weight)),
        None if problem.bias is None else tensor(problem.bias.contiguous),
        tensor(problem.grad_output.contiguous.transpose(image)),
        image,
        weight,
    )


def native(x: Any, kernel: Any, bias: Any = None) -> Any:
    """What a TensorFlow user writes; `matmul` takes no vectors and no more than a batch."""
    y = tf.matmul(x, kernel) if x.shape.rank in (0, 2) else tf.tensordot(x, kernel, 1)
    return tf.nn.relu(y if bias is None else y + bias)


def native_conv(
    x: Any,
    kernel: Any,
    bias: Any = None,
    strides: Sequence[int] = (1, 1),
    padding: Any = "VALID",
    data_format: str = "channels_last",
    dilations: Sequence[int] = (1, 1),
) -> Any:
    """`tf.nn.conv1d` or `conv2d` as it runs on CPUs, in every dtype and with its gradients.

    Channels are brought to the end, groups are separate convolutions, dilated kernels are filled
    up with zeros. `padding` may also be pairs, one per dimension of `x`.
    """
    rank = kernel.shape.rank
    if data_format == "channels_first":
        x = tf.transpose(x, [0, *range(2, rank), 1])
        pads = padding if isinstance(padding, str) else [padding[0], *padding[2:], padding[1]]
        y = native_conv(x, kernel, bias, strides, pads, "channels_last", dilations)
        return tf.transpose(y, [0, rank - 1, *range(1, rank - 1)])
    if padding == "CAUSAL":
        padding = [(0, 0), (dilations[0] * (kernel.shape[0] - 1), 0), (0, 0)]
    if not isinstance(padding, str):
        x, padding = tf.pad(x, padding), "VALID"
    for dim, dilation in enumerate(dilations):
        size = kernel.shape[dim]
        kernel = tf.stack([kernel] + [tf.zeros_like(kernel)] * (dilation - 1), dim + 1)
        shape = [*kernel.shape[:dim], size * dilation, *kernel.shape[dim + 2 :]]
        kernel = tf.reshape(kernel, shape)
        last = (size - 1) * dilation + 1
        kernel = kernel[(slice(None),) * dim + (slice(last),)]
    groups = x.shape[-1] // kernel.shape[-2]
    convolve = tf.nn.conv1d if rank == 3 else tf.nn.conv2d
    parts = [
        convolve(part, filters, list(strides), padding)
        for part, filters in zip(tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True)
    ]
    y = tf.concat(parts, -1)
    return tf.nn.relu(y if bias is None else tf.nn.bias_add(y, bias))


def run(function: Callable[..., Any], given: Tensors) -> Results:
    """Output and gradients, as arrays in the layouts of the table."""
    with tf.GradientTape() as tape:
        tape.watch(given.operands)
        y = function(*given.operands)
    grads = tape.gradient(y, given.operands, output_gradients=given.grad)
    bias = array(grads[2]) if given.bias is not None else np.zeros(0)
    image, weight = np.argsort(given.image), np.argsort(given.weight)
    return Results(
        array(y).transpose(image),
        array(grads[0]).transpose(image),
        array(grads[1]).transpose(weight),
        bias,
    )


def poison(problem: Problem) -> None:
    """Leave NaN in the memory that outputs are about to be allocated from."""
    shapes = (problem.grad_output.sizes, problem.input.sizes, problem.weight.sizes)
    for shape in shapes:
        for _ in range(3):
            tf.fill(shape, tf.cast(np.nan, problem.dtype)).numpy()


def check(problem: Problem, ours: Results, theirs: Results | None) -> None:
    """The rule for output and gradients; without `theirs`, against NumPy in the same precision."""
    expected = reference64(problem, "multiply", output=ours.output)
    theirs = theirs or numpy_results(problem, "multiply", output=ours.output)
    for name in RESULTS[: 3 + problem.case.bias]:
        assert_within_twice(
            getattr(ours, name),
            getattr(theirs, name),
            getattr(expected, name),
            f"{problem.case.id} {name}",
            dtype=problem.dtype,
        )


def derivatives(function: Callable[..., Any], operands: list[Any]) -> tuple[list[Any], ...]:
    """Of three orders, each of a nonlinear function of those before."""
    with tf.GradientTape() as t3:
        t3.watch(operands)
        with tf.GradientTape(persistent=True) as t2:
            t2.watch(operands)
            with tf.GradientTape() as t1:
                t1.watch(operands)
                y = tf.reduce_sum(tf.sin(function(*operands)))
            first = t1.gradient(y, operands)
            norm = tf.add_n([tf.reduce_sum(tf.sin(g)) for g in first])
        second = t2.gradient(norm, operands)
        total = tf.add_n([tf.reduce_sum(tf.cos(g)) for g in second])
    return first, second, t3.gradient(total, operands)


def forward_mode(function: Callable[..., Any], operands: list[Any]) -> list[Any]:
    """Tangents along all operands together and along each, and products with the Hessian."""
    tangents = [random(*t.shape, seed=1) for t in operands]
    with tf.autodiff.ForwardAccumulator(operands, tangents) as accumulator:
        results = [accumulator.jvp(function(*operands))]
    for operand, tangent in zip(operands, tangents, strict=True):
        with tf.autodiff.ForwardAccumulator(operand, tangent) as accumulator:
            results.append(accumulator.jvp(function(*operands)))
        with tf.autodiff.ForwardAccumulator(operand, tangent) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(operands)
                y = tf.reduce_sum(tf.sin(function(*operands)))
            results += [accumulator.jvp(g) for g in tape.gradient(y, operands)]
    return results


def jacobians(function: Callable[..., Any], operands: list[Any]) -> Any:
    """Of the output and of the gradient of the second operand."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(operands)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(operands)
            y = function(*operands)
            total = tf.reduce_sum(tf.sin(y))
        grads = tape.gradient(total, operands)
    return tape.jacobian(y, operands), outer.jacobian(grads[1], operands)


def mapped(
    mapping: Callable[..., Any],
    function: Callable[..., Any],
    operands: list[Any],
    names: str,
) -> Any:
    """Output and gradients with four values of each operand named, by `tf.vectorized_map` say."""
    named = dict(zip(("x", "kernel", "bias"), operands))
    stacked = {name: random(4, *named[name].shape, seed=2) for name in names.split()}

    def one(values: dict[str, Any]) -> tuple[Any, Any]:
        arguments = list({**named, **values}.values())
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = function(*arguments)
        return y, tape.gradient(y, arguments)

    return mapping(one, stacked)


def random(*shape: int, seed: int = 0, dtype: str = "float64") -> Any:
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return tf.cast(tf.constant(values), dtype)


def operands(*leading: int, k: int = 7, n: int = 5, dtype: str = "float64") -> list[Any]:
    """x `[*leading, k]`, kernel `[k, n]`, bias `[n]`."""
    return [random(*s, dtype=dtype) for s in ((*leading, k), (k, n), (n,))]


def one_by_one(function: Callable[..., Any], stacked: dict[str, Any]) -> Any:
    """`tf.vectorized_map` without vectorization, for `mapped`."""
    return tf.map_fn(function, stacked, fn_output_signature=(tf.float64, [tf.float64] * 3))


def conv_operands(x: tuple[int, ...], kernel: tuple[int, ...], dtype: str = "float64") -> list[Any]:
    """x, kernel and bias of these shapes."""
    return [random(*shape, dtype=dtype) for shape in (x, kernel, kernel[-1:])]


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """For float64 results of the same formula: to rounding, and not connected where not."""
    ours, theirs = tf.nest.flatten(ours), tf.nest.flatten(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None), f"expected {b}, got {a}"
        if a is not None:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)
