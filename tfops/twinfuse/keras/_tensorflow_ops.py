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
    dropouts: tuple[Any, Any],
    mask: tf.Tensor | None,
    activations: tuple[str, str],
    go_backwards: bool,
    zero_output_for_mask: bool,
    sequence: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """Outputs in the order in which they are computed, None unless `sequence`; the last state.

    `weights` are kernel, recurrent kernel, and bias or None; `dropouts` are `[4, batch, ...]`, of
    inputs and of states, or None.
    """
    operands = _operands(x, state, weights, dropouts)._replace(mask=mask)
    settings = Settings(*activations, go_backwards, False, zero_output_for_mask)
    outputs, h, c = run(LAYER, operands, settings, sequence)
    return (tf.reverse(outputs, [1]) if sequence and go_backwards else outputs), h, c


def lstm_cell(
    x: tf.Tensor,
    state: tuple[tf.Tensor, tf.Tensor],
    weights: tuple[Any, Any, Any],
    dropouts: tuple[Any, Any],
    activations: tuple[str, str],
) -> tuple[tf.Tensor, tf.Tensor]:
    h, c = run(CELL, _operands(x, state, weights, dropouts), Settings(*activations))
    return h, c


def _operands(
    x: tf.Tensor,
    state: tuple[tf.Tensor, tf.Tensor],
    weights: tuple[Any, Any, Any],
    dropouts: tuple[Any, Any],
) -> Operands:
    # Keras hands out variables where it need not cast.
    kernel, recurrent, bias, h, c = (
        None if t is None else tf.convert_to_tensor(t) for t in (*weights, *state)
    )
    of_x, of_h = dropouts
    return Operands(x, kernel, recurrent, bias, h=h, c=c, dropout_input=of_x, dropout_hidden=of_h)
