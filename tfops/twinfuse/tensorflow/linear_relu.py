"""`linear_relu`: relu(x @ kernel + bias) in one kernel."""

from __future__ import annotations

from typing import Any, NoReturn

import tensorflow as tf
from tensorflow.python.framework.ops import EagerTensor

from twinfuse import _backend
from twinfuse.tensorflow import _binding, _gradients, _vectorize  # noqa: F401

_ROLE = "linear_relu_forward"
_REFUSED = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, TypeError, ValueError)
_fused = None if _binding.ops is None else _binding.ops.twinfuse_linear_relu


def linear_relu(x: Any, kernel: Any, bias: Any = None) -> tf.Tensor:
    """Compute `relu(x @ kernel + bias)`.

    Args:
        x: `[..., K]`, a tensor or anything that converts to one; any leading dimensions or none,
            known or not.
        kernel: `[K, N]` of the dtype of `x`.
        bias: `[N]` of the same dtype, or None.

    Returns:
        `[..., N]`. float32, float64, bfloat16 and float16 take the fused kernel; whatever else
        `tf.nn.relu(tf.matmul(x, kernel) + bias)` accepts (other dtypes, ragged tensors, biases that
        broadcast, functions that XLA compiles) takes exactly that, with a `FallbackWarning`.
        A `tf.function` keeps the choice made while it was traced.

    Raises:
        tf.errors.InvalidArgumentError: Shapes or dtypes do not fit (eager).
        ValueError, TypeError: The same while tracing: shapes, dtypes.
        twinfuse.FallbackError: The call would fall back and `twinfuse.strict()` is on.
    """
    # Only what is cheap to ask stands before the op; a call that it refuses is looked at below.
    eager = isinstance(x, EagerTensor) and tf.executing_eagerly()
    if eager and _backend.requested is None and _fused is not None:
        try:
            return _fused(x, kernel, () if bias is None else (bias,))
        except _REFUSED:
            pass
    return _checked(x, kernel, bias)


def reference(x: Any, kernel: Any, bias: Any = None) -> tf.Tensor:
    """TensorFlow's own ops, with the signature of `linear_relu`."""
    y = _gradients.matmul(x, kernel)
    return tf.nn.relu(y if bias is None else y + bias)


def _checked(x: Any, kernel: Any, bias: Any) -> tf.Tensor:
    if _backend.requested == "reference":
        return reference(x, kernel, bias)
    for name, value in (("x", x), ("kernel", kernel), ("bias", bias)):
        if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
            _backend.fall_back("linear_relu", f"{name} is a {type(value).__name__}")
            return reference(x, kernel, bias)
    x, kernel, bias = _convert(x, kernel, bias)
    _, reason = _choose(x, kernel, bias)
    if not reason:
        assert _fused is not None
        try:
            return _fused(x, kernel, () if bias is None else (bias,))
        except tf.errors.UnimplementedError as error:
            reason = error.message
    _backend.fall_back("linear_relu", reason)
    return reference(x, kernel, bias)


def _convert(x: Any, kernel: Any, bias: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    x = tf.convert_to_tensor(x, name="x")
    hint = x.dtype.base_dtype
    kernel = tf.convert_to_tensor(kernel, dtype_hint=hint, name="kernel")
    if bias is not None:
        bias = tf.convert_to_tensor(bias, dtype_hint=hint, name="bias")
    return x, kernel, bias


def _choose(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None) -> tuple[str, str]:
    """`(kernel name, "")`, or `("", why the reference path serves it)`; raises if none can."""
    reason = _check(x, kernel, bias)
    if reason:
        return "", reason
    return _binding.find_kernel(_ROLE, x.dtype, _binding.device_type(x))


def _check(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None) -> str:
    """Raise for what no path accepts; a reason for what only the reference path accepts."""
    tensors = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            if {tensor.dtype, x.dtype} == {tf.bfloat16, tf.float32}:
                return f"x is {x.dtype.name} and {name} is {tensor.dtype.name}"
            _refuse(name, f"dtype {x.dtype.name} as x has", tensor.dtype.name, TypeError)
    if x.shape.rank == 0:
        _refuse("x", "at least one dimension ([..., K])", "a scalar")
    if kernel.shape.rank != 2:
        return "kernel is not known to be a matrix"
    inner, units = kernel.shape
    if x.shape.rank is not None and not x.shape[-1:].is_compatible_with([inner]):
        _refuse("x", f"[..., {inner}] for kernel {_text(kernel)}", _text(x))
    if bias is None:
        return ""
    if bias.shape.rank == 1 and units is not None and bias.shape[0] == units:
        return ""
    if (
        bias.shape.rank == 1
        and None not in (bias.shape[0], units)
        and 1 not in (*bias.shape, units)
    ):
        _refuse("bias", f"[{units}] for kernel {_text(kernel)}", _text(bias))
    return f"bias is not known to be of shape [{units}], so it may have to be broadcast"


def _text(tensor: tf.Tensor) -> str:
    return str(tensor.shape.as_list() if tensor.shape.rank is not None else "an unknown shape")


def _refuse(argument: str, expected: str, got: str, kind: type[Exception] = ValueError) -> NoReturn:
    message = f"linear_relu: {argument}: expected {expected}, got {got}"
    if tf.executing_eagerly():
        raise tf.errors.InvalidArgumentError(None, None, message)
    raise kind(message)


def _explain(x: Any, kernel: Any, bias: Any = None) -> _backend.Report:
    if _backend.requested == "reference":
        name, reason = "", "asked for by use_backend"
    elif any(isinstance(t, (tf.RaggedTensor, tf.SparseTensor)) for t in (x, kernel, bias)):
        name, reason = "", "an argument is a ragged or sparse tensor"
    else:
        x, kernel, bias = _convert(x, kernel, bias)
        name, reason = _choose(x, kernel, bias)
    backend = _binding.device_type(x) if name else "reference"
    return _backend.Report([_backend.Choice("linear_relu", backend, name, reason)])


linear_relu.__twinfuse_explain__ = _explain  # type: ignore[attr-defined]
_binding.do_not_convert(linear_relu)
