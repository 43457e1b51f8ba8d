"""The fused ops as Keras layers call them, on the Keras backend of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from twinfuse import _backend, _core

BACKEND: str = keras.backend.backend()

_RELUS: list[Any] = [keras.activations.relu, keras.ops.relu]

_linear_relu: Callable[[Any, Any, Any], Any] | None = None
# A backend whose compiler meets our ops and cannot compile them.
xla_refuses_ops = BACKEND == "tensorflow"

if BACKEND == "tensorflow":
    import tensorflow as tf

    from twinfuse.tensorflow import _binding
    from twinfuse.tensorflow.linear_relu import linear_relu as _linear_relu

    _RELUS.append(tf.nn.relu)

elif BACKEND == "torch":
    import torch

    import twinfuse.torch

    _RELUS += [torch.relu, torch.nn.functional.relu]

    def _linear_relu(x: Any, kernel: Any, bias: Any) -> Any:
        # A view: the torch op takes [N, K] in any strides.
        return twinfuse.torch.linear_relu(x, kernel.T, bias)


def is_relu(activation: Any) -> bool:
    """Whether `activation` computes max(x, 0) and nothing else."""
    return any(activation is relu for relu in _RELUS)


def missing() -> str:
    """Why no op is fused in this process; empty when ops are."""
    return "" if _linear_relu else f"Keras runs on the backend '{BACKEND}'"


def linear_relu(op: str, inputs: Any, kernel: Any, bias: Any) -> Any | None:
    """`relu(inputs @ kernel + bias)` with the dtype that `keras.ops` would give it.

    Returns None where only the native layer can serve the call; `op` is then named in the warning.
    """
    if _backend.requested == "reference":
        return None
    if _linear_relu is None:
        _backend.fall_back(op, missing())
        return None
    if BACKEND == "tensorflow" and isinstance(inputs, tf.SparseTensor):
        _backend.fall_back(op, "its input is a SparseTensor")
        return None
    inputs, kernel = map(keras.ops.convert_to_tensor, (inputs, kernel))
    bias = None if bias is None else keras.ops.convert_to_tensor(bias)
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in (inputs, kernel)]
    if keras.backend.result_type(*dtypes) != dtypes[1]:
        _backend.fall_back(op, f"its input is {dtypes[0]} and its kernel {dtypes[1]}")
        return None
    return _linear_relu(keras.ops.cast(inputs, dtypes[1]), kernel, bias)


def find_kernel(role: str, layer: Any) -> tuple[str, str, str]:
    """`(backend, kernel, reason)` that a call of `layer` made now would take."""
    if _backend.requested == "reference":
        return "reference", "", "asked for by use_backend"
    if missing():
        return "reference", "", missing()
    if BACKEND == "tensorflow":
        device = _binding.device_type()
        kernel, reason = _binding.find_kernel(role, tf.as_dtype(layer.compute_dtype), device)
    else:
        device = layer.kernel.value.device.type if layer.built else "cpu"
        kernel, reason = _core.find_kernel(role, layer.compute_dtype, device)
    return (device if kernel else "reference"), kernel, reason
