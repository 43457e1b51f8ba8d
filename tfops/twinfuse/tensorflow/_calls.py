"""What public ops do around their fused kernels: arguments, the choice of a path, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import tensorflow as tf

from twinfuse import _backend, _core
from twinfuse.tensorflow import _binding

# What an op raises for a call that it does not take, or that nothing takes.
REFUSED = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, TypeError, ValueError)


class Op(NamedTuple):
    """An op of x, kernel and bias, with whatever else it takes bound."""

    name: str  # what users call it
    role: str  # of its forward kernel
    # The fused op takes none or one bias in a tuple; None where nothing was built.
    fused: Callable[[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...]], tf.Tensor] | None
    reference: Callable[[Any, Any, Any], tf.Tensor]
    # Raises for what no path accepts; a reason for what only the reference path accepts.
    check: Callable[[tf.Tensor, tf.Tensor, tf.Tensor | None], str]


def run(op: Op, x: Any, kernel: Any, bias: Any) -> tf.Tensor:
    """Take the path that serves the call."""
    if _backend.requested == "reference":
        return op.reference(x, kernel, bias)
    for name, value in (("x", x), ("kernel", kernel), ("bias", bias)):
        if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
            _backend.fall_back(op.name, f"{name} is a {type(value).__name__}")
            return op.reference(x, kernel, bias)
    x, kernel, bias = convert(x, kernel, bias)
    _, reason = _choose(op, x, kernel, bias)
    if not reason:
        assert op.fused is not None
        try:
            return op.fused(x, kernel, () if bias is None else (bias,))
        except tf.errors.UnimplementedError as error:
            reason = error.message
    _backend.fall_back(op.name, reason)
    return op.reference(x, kernel, bias)


def explain(op: Op, x: Any, kernel: Any, bias: Any) -> _backend.Report:
    """What `run` would take."""
    if _backend.requested == "reference":
        choice = ("reference", "", "asked for by use_backend")
    elif any(isinstance(t, (tf.RaggedTensor, tf.SparseTensor)) for t in (x, kernel, bias)):
        choice = ("reference", "", "an argument is a ragged or sparse tensor")
    else:
        x, kernel, bias = convert(x, kernel, bias)
        device, index = _binding.device_type(x), _binding.device_index(x)
        choice = _core.reported(*_choose(op, x, kernel, bias), device, index)
    return _backend.Report([_backend.Choice(op.name, *choice)])


def convert(x: Any, kernel: Any, bias: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    x = tf.convert_to_tensor(x, name="x")
    hint = x.dtype.base_dtype
    kernel = tf.convert_to_tensor(kernel, dtype_hint=hint, name="kernel")
    if bias is not None:
        bias = tf.convert_to_tensor(bias, dtype_hint=hint, name="bias")
    return x, kernel, bias


def _choose(op: Op, x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None) -> tuple[str, str]:
    """`(kernel name, "")`, or `("", why the reference path serves it)`; raises if none can."""
    reason = op.check(x, kernel, bias)
    if reason:
        return "", reason
    return _binding.find_kernel(op.role, x.dtype, _binding.device_type(x))


def text(tensor: tf.Tensor) -> str:
    return str(tensor.shape.as_list() if tensor.shape.rank is not None else "an unknown shape")


def refuse(
    op: str,
    argument: str,
    expected: str,
    got: Any,
    tracing: type[Exception] = ValueError,
    eager: type[Exception] = tf.errors.InvalidArgumentError,
) -> NoReturn:
    """Raise what TensorFlow's own ops raise for a bad argument."""
    message = f"{op}: {argument}: expected {expected}, got {got}"
    kind = eager if tf.executing_eagerly() else tracing
    raise kind(None, None, message) if issubclass(kind, tf.errors.OpError) else kind(message)
