"""`conv1d_relu` and `conv2d_relu`: relu(conv(x, kernel) + bias) in one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.ops import EagerTensor
from tensorflow.python.ops.nn_ops import squeeze_batch_dims

from twinfuse import _backend
from twinfuse.tensorflow import _binding, _calls
from twinfuse.tensorflow._convolution import convolution
from twinfuse.tensorflow._windows import Numbers, Padding, Windows, windows

_REFUSED = _calls.REFUSED
_fused = None if _binding.ops is None else _binding.ops.twinfuse_conv_relu


def conv1d_relu(
    x: Any,
    kernel: Any,
    bias: Any = None,
    strides: Numbers = 1,
    padding: Padding = "valid",
    data_format: str | None = "channels_last",
    dilations: Numbers = 1,
) -> tf.Tensor:
    """Compute `relu(conv1d(x, kernel) + bias)`, a cross-correlation as in `tf.nn.conv1d`.

    Args:
        x: `[N, W, C]`, or `[N, C, W]` with channels first; more leading dimensions, and sizes that
            are not known, are as in `tf.nn.conv1d`.
        kernel: `[S, C / groups, K]` of the dtype of `x`. The groups follow from the shapes.
        bias: `[K]` of the same dtype, or None.
        strides, dilations: A number, or a list of one; a list of three has ones for the batch and
            the channels.
        padding: "valid", "same" (as TensorFlow has it: one zero more at the end where they are
            odd), "causal" (as Keras has it), or a list of pairs, one per dimension of `x`.
        data_format: "channels_last" or "channels_first", or TensorFlow's names for them.

    Returns:
        `[N, Q, K]`, or `[N, K, Q]` with channels first. float32, float64, bfloat16 and float16 take
        the fused kernel; whatever else `tf.nn.relu(tf.nn.bias_add(tf.nn.conv1d(...), bias))`
        accepts (int32, functions that XLA compiles) takes exactly that, with a `FallbackWarning`.
        Unlike TensorFlow's own, it has every layout, dilation and group, and their gradients, on
        CPUs. A `tf.function` keeps the choice made while it was traced.

    Raises:
        tf.errors.InvalidArgumentError: Shapes, dtypes or numbers do not fit (eager).
        ValueError, TypeError: The same while tracing.
        twinfuse.FallbackError: The call would fall back and `twinfuse.strict()` is on.
    """
    return _conv_relu(1, x, kernel, bias, strides, padding, data_format, dilations)


def conv2d_relu(
    x: Any,
    kernel: Any,
    bias: Any = None,
    strides: Numbers = 1,
    padding: Padding = "valid",
    data_format: str | None = "channels_last",
    dilations: Numbers = 1,
) -> tf.Tensor:
    """Compute `relu(conv2d(x, kernel) + bias)`; see `conv1d_relu`.

    Args:
        x: `[N, H, W, C]`, or `[N, C, H, W]` with channels first.
        kernel: `[R, S, C / groups, K]`.
        bias: `[K]`, or None.
        strides, dilations: A number, or a list of one, two or four.
        padding: As in `conv1d_relu`, without "causal"; a list has four pairs.
        data_format: As in `conv1d_relu`.

    Returns:
        `[N, P, Q, K]`, or `[N, K, P, Q]` with channels first.
    """
    return _conv_relu(2, x, kernel, bias, strides, padding, data_format, dilations)


def _conv_relu(spatial: int, x: Any, kernel: Any, bias: Any, *how: Any) -> tf.Tensor:
    # Only what is cheap to ask stands before the op; a call that it refuses is looked at below.
    eager = isinstance(x, EagerTensor) and tf.executing_eagerly()
    if eager and _backend.requested is None and _fused is not None:
        try:
            return _fused(x, kernel, () if bias is None else (bias,), *windows(spatial, *how))
        except _REFUSED:
            pass
    return _calls.run(_op(windows(spatial, *how)), x, kernel, bias)


def _op(how: Windows) -> _calls.Op:
    def fused(x: tf.Tensor, kernel: tf.Tensor, bias: tuple[tf.Tensor, ...]) -> tf.Tensor:
        assert _fused is not None
        return _flat(lambda flat: _fused(flat, kernel, bias, *how), x, how)

    return _calls.Op(
        how.op,
        "conv_relu_forward",
        None if _fused is None else fused,
        functools.partial(reference, how),
        functools.partial(_check, how),
    )


def reference(how: Windows, x: Any, kernel: Any, bias: Any = None) -> tf.Tensor:
    """TensorFlow's own ops; where they lack something on CPUs, a composition of others."""
    x, kernel, bias = _calls.convert(x, kernel, bias)
    data_format = "NHWC" if how.data_format == "channels_last" else "NCHW"

    def run(flat: tf.Tensor) -> tf.Tensor:
        y = convolution(flat, kernel, how)
        return tf.nn.relu(y if bias is None else tf.nn.bias_add(y, bias, data_format))

    return _flat(run, x, how)


def _flat(function: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, how: Windows) -> tf.Tensor:
    """`function` with all leading dimensions of `x` as one, which is all that most ops take."""
    if x.shape.rank is None or x.shape.rank <= how.spatial + 2:
        return function(x)
    return squeeze_batch_dims(x, function, how.spatial + 1)


_MOST_GROUPS_ON_GPU = 4  # as in csrc/gpu/conv_relu.cc


def _check(how: Windows, x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None) -> str:
    """Raise for what no path accepts."""
    op, spatial = how.op, how.spatial
    refuse = functools.partial(_calls.refuse, op)
    if kernel.dtype != x.dtype:
        refuse("kernel", f"dtype {x.dtype.name} as x has", kernel.dtype.name, tracing=TypeError)
    if bias is not None and bias.dtype != x.dtype:
        refuse("bias", f"dtype {x.dtype.name} as x has", bias.dtype.name)
    sizes = "W" if spatial == 1 else "H, W"
    if x.shape.rank is not None and x.shape.rank < spatial + 2:
        layout = f"[N, {sizes}, C]" if how.data_format == "channels_last" else f"[N, C, {sizes}]"
        refuse("x", layout, _calls.text(x))
    if kernel.shape.rank not in (None, spatial + 2):
        layout = "[S, C / groups, K]" if spatial == 1 else "[R, S, C / groups, K]"
        refuse("kernel", layout, _calls.text(kernel))
    if bias is not None and bias.shape.rank not in (None, 1):
        refuse("bias", "[K]", _calls.text(bias))
    if kernel.shape.rank is None:
        return ""
    per_group, filters = kernel.shape[-2:]
    given = "for a kernel of shape " + _calls.text(kernel)
    channels = None if x.shape.rank is None else x.shape[how.channels]
    if channels is not None and per_group and channels % per_group:
        refuse("x", f"channels in a multiple of {per_group} {given}", _calls.text(x))
    if bias is not None and not bias.shape.is_compatible_with([filters]):
        refuse("bias", f"[{filters}] {given}", _calls.text(bias))
    # A graph cannot fall back once it runs.
    groups = channels // per_group if channels and per_group else 1
    if groups > _MOST_GROUPS_ON_GPU and _binding.device_type(x) == "cuda":
        return f"more than {_MOST_GROUPS_ON_GPU} groups on a GPU"
    return ""


def _explain(spatial: int) -> Callable[..., _backend.Report]:
    def explain(
        x: Any,
        kernel: Any,
        bias: Any = None,
        strides: Numbers = 1,
        padding: Padding = "valid",
        data_format: str | None = "channels_last",
        dilations: Numbers = 1,
    ) -> _backend.Report:
        how = windows(spatial, strides, padding, data_format, dilations)
        return _calls.explain(_op(how), x, kernel, bias)

    return explain


for _function, _spatial in ((conv1d_relu, 1), (conv2d_relu, 2)):
    _function.__twinfuse_explain__ = _explain(_spatial)  # type: ignore[attr-defined]
    _binding.do_not_convert(_function)
