"""The fused ops as Keras layers call them, on the Keras backend of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from twinfuse import _backend, _core

BACKEND: str = keras.backend.backend()

_RELUS: list[Any] = [keras.activations.relu, keras.ops.relu]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Of inputs, kernel and bias; a convolution's also of strides, padding, data_format and dilations.
_linear_relu: Callable[..., Any] | None = None
_conv_relu: dict[int, Callable[..., Any]] = {}  # by the number of spatial dimensions
# A backend whose compiler meets our ops and cannot compile them.
xla_refuses_ops = BACKEND == "tensorflow"

if BACKEND == "tensorflow":
    import tensorflow as tf

    from twinfuse.tensorflow import _binding, conv1d_relu, conv2d_relu
    from twinfuse.tensorflow.linear_relu import linear_relu as _linear_relu

    _conv_relu = {1: conv1d_relu, 2: conv2d_relu}
    _RELUS.append(tf.nn.relu)

elif BACKEND == "torch":
    import torch

    from twinfuse.keras import _torch_ops

    _linear_relu = _torch_ops.linear_relu
    _conv_relu = dict.fromkeys((1, 2), _torch_ops.conv_relu)
    _RELUS += [torch.relu, torch.nn.functional.relu]


def is_relu(activation: Any) -> bool:
    """Whether `activation` computes max(x, 0) and nothing else."""
    return any(activation is relu for relu in _RELUS)


def has_hooks(layer: Any) -> bool:
    """Whether `layer`, on torch a module, shows what it gets or returns to functions of others."""
    return any(vars(layer).get(name) for name in _HOOKS)


def keep_from_xla(layer: Any) -> None:
    """Keep Keras from compiling models with `layer` where XLA would meet its op."""
    if xla_refuses_ops and is_relu(layer.activation):
        layer.supports_jit = False


def own_convolution(layer: Any) -> str:
    """Why a convolution of a subclass cannot be fused: it uses the hook that Keras has for that."""
    native = type(layer).convolution_op is keras.layers.Conv2D.convolution_op
    return "" if native else "its convolution_op is overridden"


def native_reason(layer: Any) -> str:
    """Why a Dense or a convolution computes natively, whatever its activation is."""
    if layer.quantization_mode is not None:
        return f"it is quantized to {layer.quantization_mode}"
    is_dense = isinstance(layer, keras.layers.Dense)
    return missing() if is_dense else own_convolution(layer) or missing()


def missing() -> str:
    """Why no op is fused in this process; empty when ops are."""
    return "" if _linear_relu else f"Keras runs on the backend '{BACKEND}'"


def linear_relu(op: str, inputs: Any, kernel: Any, bias: Any) -> Any | None:
    """`relu(inputs @ kernel + bias)` with the dtype that `keras.ops` would give it.

    Returns None where only the native layer can serve the call; `op` is then named in the warning.
    """
    if not serves(op, inputs):
        return None
    assert _linear_relu is not None
    inputs, kernel, bias = _tensors(inputs, kernel, bias)
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in (inputs, kernel)]
    if not promotes(*dtypes):
        _backend.fall_back(op, f"its input is {dtypes[0]} and its kernel {dtypes[1]}")
        return None
    return _linear_relu(keras.ops.cast(inputs, dtypes[1]), kernel, bias)


def conv_relu(layer: Any, inputs: Any) -> Any | None:
    """`relu(conv(inputs, kernel) + bias)` with the settings of a `keras.layers.Conv1D` or `Conv2D`.

    Returns None where only the native layer can serve the call.
    """
    op = type(layer).__name__
    if not serves(op, inputs):
        return None
    if reason := own_convolution(layer):
        _backend.fall_back(op, reason)
        return None
    inputs, kernel, bias = _tensors(inputs, layer.kernel, layer.bias)
    if len(inputs.shape) != layer.rank + 2:
        _backend.fall_back(op, f"its input has {len(inputs.shape)} dimensions")
        return None
    if inputs.dtype != kernel.dtype:
        dtypes = [keras.backend.standardize_dtype(t.dtype) for t in (inputs, kernel)]
        _backend.fall_back(op, f"its input is {dtypes[0]} and its kernel {dtypes[1]}")
        return None
    outputs = _conv_relu[layer.rank](
        *(inputs, kernel, bias),
        strides=layer.strides,
        padding=layer.padding,
        data_format=layer.data_format,
        dilations=layer.dilation_rate,
    )
    # The native layer refuses an input that is smaller than a window.
    return None if 0 in outputs.shape and 0 not in inputs.shape else outputs


def serves(op: str, inputs: Any) -> bool:
    """Whether fused ops may be looked at for this call; says why not where that is news."""
    if _backend.requested == "reference":
        return False
    if missing():
        _backend.fall_back(op, missing())
        return False
    if BACKEND == "tensorflow" and isinstance(inputs, tf.SparseTensor):
        _backend.fall_back(op, "its input is a SparseTensor")
        return False
    return True


def promotes(given: str, weight: str) -> bool:
    """Whether Keras casts inputs of one dtype to that of the weight, rather than both to a third.

    Equal ones stay as they are, whatever `result_type` says of two float64 on torch.
    """
    return given == weight or keras.backend.result_type(given, weight) == weight


def _tensors(inputs: Any, kernel: Any, bias: Any) -> tuple[Any, Any, Any]:
    inputs, kernel = map(keras.ops.convert_to_tensor, (inputs, kernel))
    return inputs, kernel, None if bias is None else keras.ops.convert_to_tensor(bias)


def find_kernel(role: str, layer: Any, weight: str = "_kernel") -> tuple[str, str, str]:
    """`(backend, kernel, reason)` that a call of `layer`, which has `weight`, would take now."""
    if _backend.requested == "reference":
        return "reference", "", "asked for by use_backend"
    if missing():
        return "reference", "", missing()
    if BACKEND == "tensorflow":
        device = _binding.device_type()
        found = _binding.find_kernel(role, tf.as_dtype(layer.compute_dtype), device)
        return _core.reported(*found, device)
    place = getattr(layer, weight).value.device if layer.built else torch.device("cpu")
    found = _core.find_kernel(role, layer.compute_dtype, place.type)
    return _core.reported(*found, place.type, place.index or 0)
