"""Gradients of the ops, and gradients of those.

All ops are y = relu(x * kernel + bias) with a product `*` that is linear in both. With u, V, w the
gradients handed to grad_x, grad_kernel, grad_bias and g = grad * (y > 0):

    d/d grad             = (u * kernel + x * V + w) * (y > 0)
    d/d x, d/d kernel    = the gradients of x and kernel for g, at x = u and kernel = V
    d/d y                = 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from twinfuse import _backend
from twinfuse.tensorflow import _binding
from twinfuse.tensorflow._convolution import convolution
from twinfuse.tensorflow._windows import Windows

Wanted = tuple[bool, bool, bool]


def matmul(a: Any, b: Any) -> tf.Tensor:
    """`a @ b` for `a` of any rank and a matrix `b`, as TensorFlow and Keras compute it."""
    ranks = (a.shape.rank, b.shape.rank) if hasattr(a, "shape") and hasattr(b, "shape") else ()
    if isinstance(a, tf.Tensor) and ranks != (2, 2) and ranks[1:] == (2,):
        return tf.tensordot(a, b, 1)
    return tf.matmul(a, b)


def _rows(tensor: tf.Tensor) -> tf.Tensor:
    if tensor.shape.rank == 2:
        return tensor
    # Not [-1, n]: TensorFlow cannot infer a size beside a zero.
    shape = tf.shape(tensor)
    return tf.reshape(tensor, [tf.reduce_prod(shape[:-1]), shape[-1]])


@dataclass(frozen=True)
class _Op:
    """What the gradients of an op are made of."""

    name: str  # what users call it
    stem: str  # of its compiled ops and kernels
    product: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # of x and kernel, by TensorFlow's own ops
    gradients: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, Wanted], list[tf.Tensor | None]]
    behind: int = 0  # dimensions behind the one that the bias is added along
    attributes: dict[str, Any] = field(default_factory=dict)


def _linear_gradients(
    g: tf.Tensor, x: tf.Tensor, kernel: tf.Tensor, wanted: Wanted
) -> list[tf.Tensor | None]:
    return [
        matmul(g, tf.transpose(kernel)) if wanted[0] else None,
        tf.matmul(_rows(x), _rows(g), transpose_a=True) if wanted[1] else None,
        tf.reduce_sum(_rows(g), 0) if wanted[2] else None,
    ]


_LINEAR = _Op("linear_relu", "linear_relu", matmul, _linear_gradients)


def _conv(node: Any) -> _Op:
    how = Windows.of(node)

    def gradients(
        g: tf.Tensor, x: tf.Tensor, kernel: tf.Tensor, wanted: Wanted
    ) -> list[tf.Tensor | None]:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            product = convolution(x, kernel, how)
        sources = [source for source, want in zip((x, kernel), wanted) if want]
        found = iter(tape.gradient(product, sources, g))
        dims = [d for d in range(how.spatial + 2) if d != how.spatial + 2 + how.channels]
        return [
            next(found) if wanted[0] else None,
            next(found) if wanted[1] else None,
            tf.reduce_sum(g, dims) if wanted[2] else None,
        ]

    def product(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return convolution(x, kernel, how)

    return _Op(how.op, "conv_relu", product, gradients, -1 - how.channels, how._asdict())


def backward(
    op: _Op, grad: tf.Tensor, y: tf.Tensor, x: tf.Tensor, kernel: tf.Tensor, wanted: Wanted
) -> list[tf.Tensor | None]:
    """Gradients of x, kernel and bias; None where not wanted."""
    if not any(wanted):
        return [None, None, None]
    device = _binding.device_type(grad)
    name, reason = _binding.find_kernel(f"{op.stem}_backward", grad.dtype, device)
    if name:
        fused = getattr(_binding.ops, f"twinfuse_{op.stem}_grad")
        num_x, num_kernel, num_bias = map(int, wanted)
        outputs = fused(
            *(grad, y, x, kernel),
            num_x=num_x,
            num_kernel=num_kernel,
            num_bias=num_bias,
            **op.attributes,
        )
        return [output[0] if output else None for output in outputs]
    _backend.fall_back(f"the gradient of {op.name}", reason)
    return op.gradients(tf.raw_ops.ReluGrad(gradients=grad, features=y), x, kernel, wanted)


def _skipped(node: Any) -> tuple[int, ...]:
    """Inputs whose gradient nobody will read; known to tapes, not to graph differentiation."""
    return getattr(node, "skip_input_indices", None) or ()


def _first(op: _Op, node: Any, grad: Any) -> list[tf.Tensor | None]:
    x, kernel, *bias = node.inputs
    skipped = _skipped(node)
    wanted = (0 not in skipped, 1 not in skipped, bool(bias) and 2 not in skipped)
    # A gather behind us hands down IndexedSlices.
    grad = tf.convert_to_tensor(grad)
    return backward(op, grad, node.outputs[0], x, kernel, wanted)[: len(node.inputs)]


def _second(op: _Op, node: Any, cotangents: tuple[Any, ...]) -> list[tf.Tensor | None]:
    grad, y, x, kernel = node.inputs
    remaining = iter(cotangents)
    u, v, w = (
        next(remaining) if node.get_attr(name) else None
        for name in ("num_x", "num_kernel", "num_bias")
    )
    skipped = _skipped(node)
    d_grad = None
    if 0 not in skipped:
        terms = [] if u is None else [op.product(u, kernel)]
        terms += [] if v is None else [op.product(x, v)]
        if w is not None:
            terms.append(tf.broadcast_to(tf.reshape(w, [-1] + [1] * op.behind), tf.shape(grad)))
        d_grad = tf.raw_ops.ReluGrad(gradients=tf.add_n(terms), features=y) if terms else None
    wanted = (v is not None and 2 not in skipped, u is not None and 3 not in skipped, False)
    d_x, d_kernel, _ = backward(
        op, grad, y, x if u is None else u, kernel if v is None else v, wanted
    )
    # Zeros, not None: the native graph is connected through the mask too.
    return [d_grad, None if 1 in skipped else tf.zeros_like(y), d_x, d_kernel]


@tf.RegisterGradient("TwinfuseLinearRelu")
def _linear_relu_grad(node: Any, grad: Any) -> list[tf.Tensor | None]:
    return _first(_LINEAR, node, grad)


@tf.RegisterGradient("TwinfuseLinearReluGrad")
def _linear_relu_grad_grad(node: Any, *cotangents: Any) -> list[tf.Tensor | None]:
    return _second(_LINEAR, node, cotangents)


@tf.RegisterGradient("TwinfuseConvRelu")
def _conv_relu_grad(node: Any, grad: Any) -> list[tf.Tensor | None]:
    return _first(_conv(node), node, grad)


@tf.RegisterGradient("TwinfuseConvReluGrad")
def _conv_relu_grad_grad(node: Any, *cotangents: Any) -> list[tf.Tensor | None]:
    return _second(_conv(node), node, cotangents)
