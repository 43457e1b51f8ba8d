"""The LSTM as Keras layers call it, on the Keras backend of this process.

Functions that compute a layer return None where only the native layer can serve the call; the
layer's class is then named in the warning.
"""

from __future__ import annotations

from typing import Any

import keras

from twinfuse import _backend
from twinfuse.keras import _ops

# What the core computes, by name, and the functions that compute it.
_ACTIVATIONS: dict[str, list[Any]] = {
    "tanh": [keras.activations.tanh, keras.ops.tanh],
    "sigmoid": [keras.activations.sigmoid, keras.ops.sigmoid],
    "relu": [keras.activations.relu, keras.ops.relu],
    "hard_sigmoid": [keras.activations.hard_sigmoid, keras.ops.hard_sigmoid],
}
_fused: Any = None

if _ops.BACKEND == "tensorflow":
    import tensorflow as tf

    from twinfuse.keras import _tensorflow_ops as _fused

    for _name, _module in (("tanh", tf.nn), ("sigmoid", tf.nn), ("relu", tf.nn)):
        _ACTIVATIONS[_name].append(getattr(_module, _name))

elif _ops.BACKEND == "torch":
    import torch

    from twinfuse.keras import _torch_ops as _fused

    for _name in ("tanh", "sigmoid", "relu"):
        _ACTIVATIONS[_name].append(getattr(torch, _name))


def native_reason(layer: Any) -> str:
    """Why a `keras.layers.LSTM` or `LSTMCell` always computes natively; empty when it does not."""
    cell = getattr(layer, "cell", layer)
    if cell is not layer and type(cell) is not keras.layers.LSTMCell:
        return f"its cell is a {type(cell).__name__}"
    if getattr(layer, "use_cudnn", None) is True:
        return "use_cudnn=True asks for another kernel"
    for name in ("activation", "recurrent_activation"):
        function = getattr(cell, name)
        if not _name_of(function):
            spelled = getattr(function, "__name__", type(function).__name__)
            return f"its {name} is {spelled}"
    return _ops.missing()


def keep_from_xla(layer: Any) -> None:
    """Keep Keras from compiling models with `layer` where XLA would meet its op."""
    if _ops.xla_refuses_ops and not native_reason(layer):
        layer.supports_jit = False


def find_kernel(layer: Any) -> tuple[str, str, str]:
    """`(backend, kernel, reason)` that a call of a layer or cell made now would take."""
    cell = getattr(layer, "cell", layer)
    role = "lstm_cell_forward" if cell is layer else "lstm_forward"
    return _ops.find_kernel(role, cell, "kernel")


def lstm(
    layer: Any, sequences: Any, initial_state: Any, mask: Any, training: Any
) -> tuple[Any, Any, list[Any]] | None:
    """What `keras.layers.LSTM.inner_loop` returns: last output, outputs, last state."""
    op, cell = type(layer).__name__, layer.cell
    # Without a step the native loop has no last output, and says so.
    if not _ops.serves(op, sequences) or sequences.shape[1] == 0:
        return None
    mask = _flags(mask)
    reason = _reason(layer)
    if mask is not None and len(mask.shape) != 2:
        reason = reason or f"its mask has {len(mask.shape)} dimensions"
    zeros = bool(layer.zero_output_for_mask)
    if layer.unroll and layer.go_backwards and zeros and mask is not None:
        # Keras then reverses the mask for the states, but not for the zeros.
        reason = reason or "an unrolled loop puts the zeros of a reversed mask elsewhere"
    operands = None if reason else _operands(op, cell, sequences, initial_state)
    if operands is None:
        if reason:
            _backend.fall_back(op, reason)
        return None
    x, state, weights = operands
    if _ops.BACKEND == "torch" and layer.stateful:
        # The layer writes the new state over this one, which the gradient still needs.
        state = (keras.ops.copy(state[0]), keras.ops.copy(state[1]))
    x, dropouts = _drop(cell, x, state[0], training)
    outputs, h, c = _fused.lstm(
        *(x, state, weights, dropouts, mask, _names(cell), bool(layer.go_backwards), zeros),
        bool(layer.return_sequences),
    )
    if layer.return_sequences:
        return outputs[:, -1], outputs, [h, c]
    last = h
    if mask is not None:
        # The state of a sequence without any step is the initial one, its output is not.
        final = mask[:, 0] if layer.go_backwards else mask[:, -1]
        shown = final if zeros else keras.ops.any(mask, axis=1)
        last = keras.ops.where(shown[:, None], h, keras.ops.zeros_like(h))
    return last, keras.ops.expand_dims(last, 1), [h, c]


def lstm_cell(cell: Any, inputs: Any, states: Any, training: Any) -> tuple[Any, list[Any]] | None:
    """What `keras.layers.LSTMCell.call` returns: output and new state."""
    op = type(cell).__name__
    if not _ops.serves(op, inputs):
        return None
    if reason := _reason(cell):
        _backend.fall_back(op, reason)
        return None
    operands = _operands(op, cell, inputs, states)
    if operands is None:
        return None
    x, state, weights = operands
    x, dropouts = _drop(cell, x, state[0], training)
    h, c = _fused.lstm_cell(x, state, weights, dropouts, _names(cell))
    return h, [h, c]


def _name_of(function: Any) -> str:
    for name, functions in _ACTIVATIONS.items():
        if any(function is known for known in functions):
            return name
    return ""


def _names(cell: Any) -> tuple[str, str]:
    return _name_of(cell.activation), _name_of(cell.recurrent_activation)


def _drop(cell: Any, x: Any, h: Any, training: Any) -> tuple[Any, tuple[Any, Any]]:
    """`x` without what one mask drops, and the masks `[4, batch, ...]` of the gates, or None.

    They are the ones that the native cell draws, in its order.
    """
    of_x = of_h = None
    if training and 0.0 < cell.dropout < 1.0:
        drawn = stacked(cell.get_dropout_mask(x if len(x.shape) == 2 else x[:, 0, :]))
        # It has the dtype that the input had before it was cast.
        drawn = keras.ops.cast(drawn, x.dtype)
        if cell.implementation == 1:
            of_x = drawn
        else:
            x = x * (drawn if len(x.shape) == 2 else keras.ops.expand_dims(drawn, 1))
    if training and 0.0 < cell.recurrent_dropout < 1.0:
        of_h = stacked(cell.get_recurrent_dropout_mask(h))
    return x, (of_x, of_h)


def stacked(masks: Any) -> Any:
    """One tensor, also where Keras draws a list with one for each gate."""
    return keras.ops.stack(masks) if isinstance(masks, list) else masks


def _reason(layer: Any) -> str:
    """Why this call is native."""
    if reason := native_reason(layer):
        return reason
    # Keras' own loop serves what XLA compiles, and whatever else no kernel does.
    backend, _, reason = find_kernel(layer) if _ops.BACKEND == "tensorflow" else ("", "", "")
    return reason if backend == "reference" else ""


def _flags(mask: Any) -> Any:
    """`[batch, steps]` of what Keras takes for a mask."""
    if keras.tree.is_nested(mask):
        mask = mask[0]
    if mask is None:
        return None
    mask = keras.ops.cast(mask, "bool")
    if len(mask.shape) == 3 and mask.shape[-1] == 1:
        return keras.ops.squeeze(mask, -1)
    return mask


def _operands(op: str, cell: Any, inputs: Any, states: Any) -> tuple[Any, Any, Any] | None:
    """Input, state and weights, of one dtype and of shapes that fit."""
    names = ("kernel", "recurrent_kernel", "bias")
    weights = [getattr(cell, name) for name in names]
    weights = [None if w is None else keras.ops.convert_to_tensor(w) for w in weights]
    x, h, c = map(keras.ops.convert_to_tensor, (inputs, states[0], states[1]))
    dtype, *others = (keras.backend.standardize_dtype(t.dtype) for t in (weights[0], x, h, c))
    if not _ops.promotes(others[0], dtype) or others[1:] != [dtype, dtype]:
        text = f"its input is {others[0]}, its state {others[1]} and {others[2]}"
        _backend.fall_back(op, f"{text}, its kernel {dtype}")
        return None
    for tensor in (h, c):
        shape = tuple(tensor.shape)
        expected = (x.shape[0], cell.units)
        if len(shape) != 2 or any(a != b and None not in (a, b) for a, b in zip(shape, expected)):
            _backend.fall_back(op, f"its state has the shape {shape}, not {expected}")
            return None
    return keras.ops.cast(x, dtype), (h, c), tuple(weights)
