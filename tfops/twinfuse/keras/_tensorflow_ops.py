"""The LSTM of TensorFlow as Keras layers call it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from twinfuse.tensorflow._lstm_gradients import CELL, LAYER
from twinfuse.tensorflow._lstm_reference import Operands, Settings
from twinfuse.tensorflow.lstm import run


def lstm(
    x: tf.Tensor,
    state: tuple[tf.Tensor, tf.Tensor],
    weights: tuple[Any, Any, Any],
    mask: tf.Tensor | None,
    activations: tuple[str, str],
    go_backwards: bool,
    zero_output_for_mask: bool,
    sequence: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """Outputs in the order in which they are computed, None unless `sequence`; the last state.

    `weights` are kernel, recurrent kernel, and bias or None.
    """
    operands = _operands(x, state, weights, mask)
    settings = Settings(*activations, go_backwards, False, zero_output_for_mask)
    outputs, h, c = run(LAYER, operands, settings, sequence)
    return (tf.reverse(outputs, [1]) if sequence and go_backwards else outputs), h, c


def lstm_cell(
    x: tf.Tensor,
    state: tuple[tf.Tensor, tf.Tensor],
    weights: tuple[Any, Any, Any],
    activations: tuple[str, str],
) -> tuple[tf.Tensor, tf.Tensor]:
    h, c = run(CELL, _operands(x, state, weights, None), Settings(*activations))
    return h, c


def _operands(
    x: tf.Tensor,
    state: tuple[tf.Tensor, tf.Tensor],
    weights: tuple[Any, Any, Any],
    mask: tf.Tensor | None,
) -> Operands:
    # Keras hands out variables where it need not cast.
    kernel, recurrent, bias = (None if w is None else tf.convert_to_tensor(w) for w in weights)
    h, c = state
    return Operands(x, kernel, recurrent, bias, None, None, h, c, mask, None, None)
