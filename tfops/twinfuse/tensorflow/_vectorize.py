"""How `tf.vectorized_map` and `GradientTape.jacobian` turn many iterations of an op into one.

Iterations that share kernel and bias become one more leading dimension of the fused op. Where each
has its own, and for gradients, the work is a batch of products: TensorFlow's batched matmul.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

from twinfuse import _backend
from twinfuse.tensorflow import _binding


def _fall_back(reason: str) -> None:
    try:
        _backend.fall_back("linear_relu", reason)
    except _backend.FallbackError as error:
        # TensorFlow then loops over the iterations, and each takes the fused op.
        raise pfor.ConversionNotImplementedError(str(error)) from None


def _batch(value: Any) -> tf.Tensor:
    """[iterations or 1, rows, last dimension] of a wrapped tensor."""
    tensor, stacked, _ = value
    shape = tf.shape(tensor)
    first = shape[:1] if stacked else tf.ones([1], tf.int32)
    rows = tf.reduce_prod(shape[int(stacked) : -1], keepdims=True)
    return tf.reshape(tensor, tf.concat([first, rows, shape[-1:]], 0))


def _unbatch(tensor: tf.Tensor, like: Any) -> Any:
    """Undo `_batch`: the leading dimensions of `like`, the last one of `tensor`."""
    leading = tf.shape(like.t)[int(like.is_stacked) : -1]
    shape = tf.concat([tf.shape(tensor)[:1], leading, tf.shape(tensor)[-1:]], 0)
    result = tf.reshape(tensor, shape)
    if like.t.shape.rank is not None:
        rank = like.t.shape.rank - int(like.is_stacked)
        result.set_shape([None, *[None] * (rank - 1), tensor.shape[-1]])
    return pfor.wrap(result, True)


@pfor.RegisterPFor("TwinfuseLinearRelu")
def _convert_linear_relu(call: Any) -> Any:
    x, kernel, *bias = call.inputs
    if not any(value.is_stacked for value in (kernel, *bias)):
        assert _binding.ops is not None
        return pfor.wrap(
            _binding.ops.twinfuse_linear_relu(x.t, kernel.t, [value.t for value in bias]), True
        )
    _fall_back("each vectorized iteration has its own kernel or bias")
    y = tf.matmul(_batch(x), kernel.t)
    if bias:
        y += _batch(bias[0]) if bias[0].is_stacked else bias[0].t
    return _unbatch(tf.nn.relu(y), x)


@pfor.RegisterPFor("TwinfuseLinearReluGrad")
def _convert_linear_relu_grad(call: Any) -> list[Any]:
    _fall_back("a vectorized gradient is a batch of products")
    grad, y, x, kernel = call.inputs
    iterations = call.pfor.loop_len_vector[0]

    def every(batch: tf.Tensor) -> tf.Tensor:
        shape = tf.shape(batch)
        return tf.broadcast_to(batch, tf.concat([[iterations], shape[1:]], 0))

    g = tf.raw_ops.ReluGrad(gradients=every(_batch(grad)), features=every(_batch(y)))
    outputs = []
    if call.get_attr("num_x"):
        outputs.append(_unbatch(tf.matmul(g, kernel.t, transpose_b=True), x))
    if call.get_attr("num_kernel"):
        product = tf.matmul(every(_batch(x)), g, transpose_a=True)
        outputs.append(pfor.wrap(product, True))
    if call.get_attr("num_bias"):
        outputs.append(pfor.wrap(tf.reduce_sum(g, 1), True))
    return outputs
