"""`keras.layers.LSTMCell` and `LSTM` with all of a step, or of a sequence, in one kernel."""

from __future__ import annotations

from typing import Any

import keras

from twinfuse.keras import _lstm_ops


@keras.saving.register_keras_serializable(package="twinfuse")
class LSTMCell(keras.layers.LSTMCell):
    """A `keras.layers.LSTMCell` that runs fused.

    Constructor, weights (kernel `[I, 4H]`, recurrent kernel `[H, 4H]`, bias `[4H]`) and config are
    those of `keras.layers.LSTMCell`. It runs natively, and says so, with activations other than
    tanh, sigmoid, relu and hard_sigmoid, and in training with `recurrent_dropout`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _lstm_ops.keep_from_xla(self)

    def call(self, inputs: Any, states: Any, training: Any = False) -> Any:
        found = _lstm_ops.lstm_cell(self, inputs, states, training)
        return super().call(inputs, states, training=training) if found is None else found


@keras.saving.register_keras_serializable(package="twinfuse")
class LSTM(keras.layers.LSTM):
    """A `keras.layers.LSTM` that runs fused.

    Constructor, weights (kernel `[I, 4H]`, recurrent kernel `[H, 4H]`, bias `[4H]`) and config are
    those of `keras.layers.LSTM`. Inputs are `[batch, steps, I]`, and any steps may be masked. It
    runs natively, and says so, with activations other than tanh, sigmoid, relu and hard_sigmoid,
    in training with `recurrent_dropout`, and with `use_cudnn=True`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _lstm_ops.keep_from_xla(self)

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> Any:
        found = _lstm_ops.lstm(self, sequences, initial_state, mask, training)
        if found is not None:
            return found
        return super().inner_loop(sequences, initial_state, mask, training=training)
