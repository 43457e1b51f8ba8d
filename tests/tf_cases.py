"""The case table as TensorFlow tensors, and TensorFlow's own Linear+ReLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.cases import Array, Problem, Results
from tests.conftest import require

tf = require("tensorflow")


@dataclass(frozen=True)
class Tensors:
    """One problem; the weight `[N, K]` of the table as a Keras kernel `[K, N]`."""

    x: Any
    kernel: Any
    bias: Any | None
    grad: Any

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


def tensors(problem: Problem) -> Tensors:
    return Tensors(
        tensor(problem.input.contiguous),
        tensor(problem.weight.contiguous.T),
        None if problem.bias is None else tensor(problem.bias.contiguous),
        tensor(problem.grad_output.contiguous),
    )


def native(x: Any, kernel: Any, bias: Any = None) -> Any:
    """What a TensorFlow user writes; `matmul` takes no vectors and no more than a batch."""
    y = tf.matmul(x, kernel) if x.shape.rank in (0, 2) else tf.tensordot(x, kernel, 1)
    return tf.nn.relu(y if bias is None else y + bias)


def run(function: Callable[..., Any], given: Tensors) -> Results:
    """Output and gradients, as arrays in the layouts of the table."""
    with tf.GradientTape() as tape:
        tape.watch(given.operands)
        y = function(*given.operands)
    grads = tape.gradient(y, given.operands, output_gradients=given.grad)
    bias = array(grads[2]) if given.bias is not None else np.zeros(0)
    return Results(array(y), array(grads[0]), array(grads[1]).T, bias)


def random(*shape: int, seed: int = 0, dtype: str = "float64") -> Any:
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return tf.cast(tf.constant(values), dtype)


def operands(*leading: int, k: int = 7, n: int = 5, dtype: str = "float64") -> list[Any]:
    """x `[*leading, k]`, kernel `[k, n]`, bias `[n]`."""
    return [random(*s, dtype=dtype) for s in ((*leading, k), (k, n), (n,))]


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """For float64 results of the same formula: to rounding, and not connected where not."""
    ours, theirs = tf.nest.flatten(ours), tf.nest.flatten(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None), f"expected {b}, got {a}"
        if a is not None:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)
