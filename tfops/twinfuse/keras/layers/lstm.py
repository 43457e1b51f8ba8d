"""`keras.layers.LSTMCell` and `LSTM` with all of a step, or of a sequence, in one kernel."""

from __future__ import annotations

from typing import Any

import keras

from twinfuse.keras import _lstm_ops


@keras.saving.register_keras_serializable(package="twinfuse")
class LSTMCell(keras.layers.LSTMCell):
    """A `keras.layers.LSTMCell` that runs fused.

    Constructor, weights (kernel `[I, 4H]`, recurrent kernel `[H, 4H]`, bias `[4H]`) and config are
    those of `keras.layers.LSTMCell`; so are the masks of `dropout` and `recurrent_dropout`, given
    the same seed. It runs natively, and says so, with activations other than tanh, sigmoid, relu
    and hard_sigmoid.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _lstm_ops.keep_from_xla(self)

    def call(self, inputs: Any, states: Any, training: Any = False) -> Any:
        found = _lstm_ops.lstm_cell(self, inputs, states, training)
        return super().call(inputs, states, training=training) if found is None else found

    def _create_dropout_mask(self, step_input: Any, dropout_rate: float) -> Any:
        # Once, rather than at every step that uses it.
        return _lstm_ops.stacked(super()._create_dropout_mask(step_input, dropout_rate))


@keras.saving.register_keras_serializable(package="twinfuse")
class LSTM(keras.layers.LSTM):
    """A `keras.layers.LSTM` that runs fused.

    Constructor, weights (kernel `[I, 4H]`, recurrent kernel `[H, 4H]`, bias `[4H]`) and config are
    those of `keras.layers.LSTM`; so are the masks of `dropout` and `recurrent_dropout`, given the
    same seed. Inputs are `[batch, steps, I]`, and any steps may be masked. It runs natively, and
    says so, with activations other than tanh, sigmoid, relu and hard_sigmoid, and with
    `use_cudnn=True`.
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
