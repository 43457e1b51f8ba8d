"""`keras.layers.Conv1D` and `Conv2D` with convolution, bias and ReLU in one kernel."""

from __future__ import annotations

from typing import Any

import keras

from twinfuse.keras import _ops


class _Conv:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _ops.keep_from_xla(self)

    def call(self, inputs: Any) -> Any:
        if _ops.is_relu(self.activation):  # type: ignore[attr-defined]
            outputs = _ops.conv_relu(self, inputs)
            if outputs is not None:
                return outputs
        return super().call(inputs)  # type: ignore[misc]


@keras.saving.register_keras_serializable(package="twinfuse")
class Conv1D(_Conv, keras.layers.Conv1D):
    """A `keras.layers.Conv1D` that runs fused when its activation is relu, and natively otherwise.

    Constructor, weights (kernel `[S, C / groups, K]`, bias `[K]`), config and LoRA are those of
    `keras.layers.Conv1D`. Inputs are `[batch, steps, C]`, or `[batch, C, steps]` with channels
    first.
    """


@keras.saving.register_keras_serializable(package="twinfuse")
class Conv2D(_Conv, keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that runs fused when its activation is relu, and natively otherwise.

    Constructor, weights (kernel `[R, S, C / groups, K]`, bias `[K]`), config and LoRA are those of
    `keras.layers.Conv2D`. Inputs are `[batch, height, width, C]`, or `[batch, C, height, width]`
    with channels first. A subclass with a `convolution_op` of its own runs natively.
    """
