"""`linear_relu`: relu(x @ kernel + bias) in one kernel."""

from __future__ import annotations

from typing import Any, NoReturn

import tensorflow as tf
from tensorflow.python.framework.ops import EagerTensor

from twinfuse import _backend
from twinfuse.tensorflow import _binding, _calls, _gradients, _vectorize  # noqa: F401

_NAME = "linear_relu"
_REFUSED = _calls.REFUSED
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
    return _calls.run(_op(), x, kernel, bias)


def reference(x: Any, kernel: Any, bias: Any = None) -> tf.Tensor:
    """TensorFlow's own ops, with the signature of `linear_relu`."""
    y = _gradients.matmul(x, kernel)
    return tf.nn.relu(y if bias is None else y + bias)


def _op() -> _calls.Op:
    return _calls.Op(_NAME, "linear_relu_forward", _fused, reference, _check)


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
        _refuse("x", f"[..., {inner}] for kernel {_calls.text(kernel)}", _calls.text(x))
    if bias is None:
        return ""
    if bias.shape.rank == 1 and units is not None and bias.shape[0] == units:
        return ""
    if (
        bias.shape.rank == 1
        and None not in (bias.shape[0], units)
        and 1 not in (*bias.shape, units)
    ):
        _refuse("bias", f"[{units}] for kernel {_calls.text(kernel)}", _calls.text(bias))
    return f"bias is not known to be of shape [{units}], so it may have to be broadcast"


def _refuse(argument: str, expected: str, got: str, kind: type[Exception] = ValueError) -> NoReturn:
    _calls.refuse(_NAME, argument, expected, got, kind)


def _explain(x: Any, kernel: Any, bias: Any = None) -> _backend.Report:
    return _calls.explain(_op(), x, kernel, bias)


linear_relu.__twinfuse_explain__ = _explain  # type: ignore[attr-defined]
_binding.do_not_convert(linear_relu)
