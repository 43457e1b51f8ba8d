"""How `tf.vectorized_map` turns many iterations of the LSTM ops into one.

Iterations that share their weights become more sequences of one batch. Where each has its own, and
for gradients, TensorFlow loops over the iterations instead.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

from twinfuse.tensorflow import _binding

_BATCHED = ("x", "h", "c", "mask")


def _together(call: Any, value: Any) -> tf.Tensor:
    """[iterations, batch, ...] as [iterations * batch, ...]."""
    tensor = value.t
    if not value.is_stacked:
        iterations = tf.reshape(call.pfor.loop_len_vector, [1])
        tensor = tf.broadcast_to(tensor, tf.concat([iterations, tf.shape(tensor)], 0))
    shape = tf.shape(tensor)
    return tf.reshape(tensor, tf.concat([[shape[0] * shape[1]], shape[2:]], 0))


def _convert(call: Any, name: str, operands: tuple[str, ...], lists: tuple[str, ...]) -> list[Any]:
    values = iter(call.inputs)
    counts = {key: call.get_attr(f"num_{key}") if key in lists else 1 for key in operands}
    given = {key: [next(values) for _ in range(count)] for key, count in counts.items()}
    for key, inputs in given.items():
        stacked = any(value.is_stacked for value in inputs)
        if (stacked and key not in _BATCHED) or (inputs and key.startswith("zoneout")):
            raise pfor.ConversionNotImplementedError(f"each iteration has its own {key}")
    if name == "lstm" and call.get_attr("time_major"):
        raise pfor.ConversionNotImplementedError("iterations are put together along the batch")
    tensors = {
        key: [_together(call, v) if key in _BATCHED else v.t for v in inputs]
        for key, inputs in given.items()
    }
    arguments = {key: found if key in lists else found[0] for key, found in tensors.items()}
    settings = {"activation", "recurrent_activation", "num_saved"}
    if name == "lstm":
        settings |= {"go_backwards", "time_major", "zero_output_for_mask", "num_outputs"}
    assert _binding.ops is not None
    outputs = getattr(_binding.ops, f"twinfuse_{name}")(
        **arguments, **{key: call.get_attr(key) for key in settings}
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
    lists = ("bias", "projection", "peephole", "h", "c", "mask", "zoneout_hidden", "zoneout_cell")
    return _convert(call, "lstm", ("x", "kernel", "recurrent_kernel", *lists), lists)


@pfor.RegisterPFor("TwinfuseLstmCell")
def _convert_lstm_cell(call: Any) -> list[Any]:
    lists = ("bias", "peephole", "zoneout_hidden", "zoneout_cell")
    operands = ("x", "kernel", "recurrent_kernel", "bias", "peephole", "h", "c", *lists[2:])
    return _convert(call, "lstm_cell", operands, lists)
