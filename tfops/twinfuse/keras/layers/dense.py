"""`keras.layers.Dense` with matmul, bias and ReLU in one kernel."""

from __future__ import annotations

from typing import Any

import keras

from twinfuse.keras import _ops


@keras.saving.register_keras_serializable(package="twinfuse")
class Dense(keras.layers.Dense):
    """A `keras.layers.Dense` that runs fused when its activation is relu, and natively otherwise.

    Constructor, weights (kernel `[K, N]`, bias `[N]`), config, LoRA and quantization are those of
    `keras.layers.Dense`. Inputs are `[batch, ..., K]`, outputs `[batch, ..., N]`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _ops.keep_from_xla(self)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if _ops.is_relu(self.activation):
            outputs = _ops.linear_relu("Dense", inputs, self.kernel, self.bias)
            if outputs is not None:
                return outputs
        return super().call(inputs, training=training)

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        # The native method refuses subclasses because they may compute something else.
        if type_check and type(self) not in (Dense, keras.layers.Dense):
            raise self._not_implemented_error(self.quantize)
        keras.layers.Dense.quantize(self, mode, type_check=False, config=config)
