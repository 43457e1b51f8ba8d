"""Gradients of the ops, and gradients of those.

With u, V, w the gradients handed to grad_x, grad_kernel, grad_bias and g = grad * (y > 0):

    d/d grad   = (u @ kernel + x @ V + w) * (y > 0)
    d/d x      = g @ V^T,   d/d kernel = u^T @ g     which is the same op at x = u, kernel = V
    d/d y      = 0
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from twinfuse import _backend
from twinfuse.tensorflow import _binding


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


def backward(
    grad: tf.Tensor,
    y: tf.Tensor,
    x: tf.Tensor,
    kernel: tf.Tensor,
    wanted: tuple[bool, bool, bool],
) -> list[tf.Tensor | None]:
    """Gradients of x, kernel and bias; None where not wanted."""
    if not any(wanted):
        return [None, None, None]
    device = _binding.device_type(grad)
    name, reason = _binding.find_kernel("linear_relu_backward", grad.dtype, device)
    if name:
        assert _binding.ops is not None
        num_x, num_kernel, num_bias = map(int, wanted)
        outputs = _binding.ops.twinfuse_linear_relu_grad(
            grad, y, x, kernel, num_x=num_x, num_kernel=num_kernel, num_bias=num_bias
        )
        return [output[0] if output else None for output in outputs]
    _backend.fall_back("the gradient of linear_relu", reason)
    g = tf.raw_ops.ReluGrad(gradients=grad, features=y)
    return [
        matmul(g, tf.transpose(kernel)) if wanted[0] else None,
        tf.matmul(_rows(x), _rows(g), transpose_a=True) if wanted[1] else None,
        tf.reduce_sum(_rows(g), 0) if wanted[2] else None,
    ]


def _skipped(op: Any) -> tuple[int, ...]:
    """Inputs whose gradient nobody will read; known to tapes, not to graph differentiation."""
    return getattr(op, "skip_input_indices", None) or ()


@tf.RegisterGradient("TwinfuseLinearRelu")
def _linear_relu_grad(op: Any, grad: Any) -> list[tf.Tensor | None]:
    x, kernel, *bias = op.inputs
    skipped = _skipped(op)
    wanted = (0 not in skipped, 1 not in skipped, bool(bias) and 2 not in skipped)
    # A gather behind us hands down IndexedSlices.
    grad = tf.convert_to_tensor(grad)
    return backward(grad, op.outputs[0], x, kernel, wanted)[: len(op.inputs)]


@tf.RegisterGradient("TwinfuseLinearReluGrad")
def _linear_relu_grad_grad(op: Any, *cotangents: Any) -> list[tf.Tensor | None]:
    grad, y, x, kernel = op.inputs
    remaining = iter(cotangents)
    u, v, w = (
        next(remaining) if op.get_attr(name) else None
        for name in ("num_x", "num_kernel", "num_bias")
    )
    skipped = _skipped(op)
    d_grad = None
    if 0 not in skipped:
        terms = [] if u is None else [matmul(u, kernel)]
        terms += [] if v is None else [matmul(x, v)]
        terms += [] if w is None else [tf.broadcast_to(w, tf.shape(grad))]
        d_grad = tf.raw_ops.ReluGrad(gradients=tf.add_n(terms), features=y) if terms else None
    wanted = (v is not None and 2 not in skipped, u is not None and 3 not in skipped, False)
    d_x, d_kernel, _ = backward(grad, y, x if u is None else u, kernel if v is None else v, wanted)
    # Zeros, not None: the native graph is connected through the mask too.
    return [d_grad, None if 1 in skipped else tf.zeros_like(y), d_x, d_kernel]
