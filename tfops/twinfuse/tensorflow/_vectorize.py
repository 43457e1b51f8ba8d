"""How `tf.vectorized_map` and `GradientTape.jacobian` turn many iterations of an op into one.

Iterations that share kernel and bias become one more leading dimension of the fused op. Where each
has its own, and for gradients, the work of linear_relu is a batch of products: TensorFlow's batched
matmul. That of a convolution is one with more groups, which the fused ops have.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

from twinfuse import _backend
from twinfuse.tensorflow import _binding
from twinfuse.tensorflow._windows import Windows


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


def _merged(call: Any, value: Any, dim: int, rank: int) -> tf.Tensor:
    """The iterations of a tensor next to each other along its dimension `dim`.

    Without any there is one of zeros, as no convolution has zero channels.
    """
    tensor, most = value.t, tf.maximum(tf.reshape(call.pfor.loop_len_vector, [1]), 1)
    if value.is_stacked:
        missing = tf.concat([most - tf.shape(tensor)[:1], tf.zeros([rank], tf.int32)], 0)
        tensor = tf.pad(tensor, tf.stack([tf.zeros_like(missing), missing], 1))
    else:
        tensor = tf.broadcast_to(tensor, tf.concat([most, tf.shape(tensor)], 0))
    tensor = tf.transpose(tensor, [*range(1, dim + 1), 0, *range(dim + 1, rank + 1)])
    shape = tf.shape(tensor)
    merged = [shape[dim] * shape[dim + 1]]
    return tf.reshape(tensor, tf.concat([shape[:dim], merged, shape[dim + 2 :]], 0))


def _divided(call: Any, tensor: tf.Tensor, dim: int, like: tf.Tensor) -> Any:
    """Undo `_merged`; `like` is the tensor of one iteration."""
    iterations = tf.reshape(call.pfor.loop_len_vector, [])
    shape, rank = tf.shape(tensor), like.shape.rank
    most = tf.maximum(iterations, 1)
    each = [most, shape[dim] // most]
    tensor = tf.reshape(tensor, tf.concat([shape[:dim], each, shape[dim + 1 :]], 0))
    tensor = tf.transpose(tensor, [dim, *range(dim), *range(dim + 1, rank + 1)])[:iterations]
    tensor.set_shape([None, *like.shape])
    return pfor.wrap(tensor, True)


@pfor.RegisterPFor("TwinfuseConvRelu")
def _convert_conv_relu(call: Any) -> Any:
    assert _binding.ops is not None
    fused, how = _binding.ops.twinfuse_conv_relu, Windows.of(call.op)
    x, kernel, *bias = call.inputs
    (like,) = call.op.outputs
    if not any(value.is_stacked for value in (kernel, *bias)):
        shape = tf.shape(x.t)
        together = tf.reshape(x.t, tf.concat([[shape[0] * shape[1]], shape[2:]], 0))
        y = fused(together, kernel.t, [value.t for value in bias], *how)
        y = tf.reshape(y, tf.concat([shape[:2], tf.shape(y)[1:]], 0))
        y.set_shape([None, *like.shape])
        return pfor.wrap(y, True)
    rank = how.spatial + 2
    y = fused(
        _merged(call, x, rank + how.channels, rank),
        _merged(call, kernel, rank - 1, rank),
        [_merged(call, value, 0, 1) for value in bias],
        *how,
    )
    return _divided(call, y, rank + how.channels, like)


@pfor.RegisterPFor("TwinfuseConvReluGrad")
def _convert_conv_relu_grad(call: Any) -> list[Any]:
    assert _binding.ops is not None
    how = Windows.of(call.op)
    rank = how.spatial + 2
    dims = {"num_x": rank + how.channels, "num_kernel": rank - 1, "num_bias": 0}
    wanted = {name: call.get_attr(name) for name in dims}
    grad, y, x, kernel = call.inputs
    outputs = _binding.ops.twinfuse_conv_relu_grad(
        *(_merged(call, value, rank + how.channels, rank) for value in (grad, y, x)),
        _merged(call, kernel, rank - 1, rank),
        **wanted,
        **how._asdict(),
    )
    places = [dim for name, dim in dims.items() for _ in range(wanted[name])]
    flat = [tensor for listed in outputs for tensor in listed]
    return [
        _divided(call, tensor, dim, like)
        for tensor, dim, like in zip(flat, places, call.op.outputs)
    ]
