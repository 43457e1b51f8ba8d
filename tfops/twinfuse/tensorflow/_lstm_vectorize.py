"""How `tf.vectorized_map` turns many iterations of the LSTM ops into one.

Iterations that share their weights become more sequences of one batch. Where each has its own, with
zoneouts and dropouts, and for gradients, TensorFlow loops over the iterations instead.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

from twinfuse.tensorflow._lstm_gradients import CELL, LAYER, Kind
from twinfuse.tensorflow._lstm_reference import Operands

_BATCHED = ("x", "h", "c", "mask")


def _together(call: Any, value: Any) -> tf.Tensor:
    """[iterations, batch, ...] as [iterations * batch, ...]."""
    tensor = value.t
    if not value.is_stacked:
        iterations = tf.reshape(call.pfor.loop_len_vector, [1])
        tensor = tf.broadcast_to(tensor, tf.concat([iterations, tf.shape(tensor)], 0))
    shape = tf.shape(tensor)
    return tf.reshape(tensor, tf.concat([[shape[0] * shape[1]], shape[2:]], 0))


def _convert(call: Any, kind: Kind) -> list[Any]:
    values, given = iter(call.inputs), dict[str, Any]()
    for key in kind.operands:
        if key in kind.required or call.get_attr(f"num_{key}"):
            given[key] = value = next(values)
            if (value.is_stacked and key not in _BATCHED) or key.startswith(("zoneout", "dropout")):
                raise pfor.ConversionNotImplementedError(f"each iteration has its own {key}")
    settings = [*kind.settings, "num_saved"]
    if kind is LAYER:
        settings.append("num_outputs")
        if call.get_attr("time_major"):
            raise pfor.ConversionNotImplementedError("iterations are put together along the batch")
    tensors = {
        key: _together(call, value) if key in _BATCHED else value.t for key, value in given.items()
    }
    outputs = kind.op()(
        **kind.arguments(Operands(**tensors)), **{key: call.get_attr(key) for key in settings}
    )
    results = []
    for output, like in zip(tf.nest.flatten(list(outputs)), call.op.outputs):
        iterations = tf.reshape(call.pfor.loop_len_vector, [])
        shape = tf.shape(output)
        # Without any iteration there is nothing to divide.
        each = shape[0] // tf.maximum(iterations, 1)
        apart = tf.reshape(output, tf.concat([[iterations, each], shape[1:]], 0))
        apart.set_shape([None, *like.shape])
        results.append(pfor.wrap(apart, True))
    return results


@pfor.RegisterPFor("TwinfuseLstm")
def _convert_lstm(call: Any) -> list[Any]:
    return _convert(call, LAYER)


@pfor.RegisterPFor("TwinfuseLstmCell")
def _convert_lstm_cell(call: Any) -> list[Any]:
    return _convert(call, CELL)
