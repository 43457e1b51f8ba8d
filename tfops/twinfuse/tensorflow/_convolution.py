"""Convolutions by TensorFlow's own ops, wherever those run and have gradients.

On CPUs those take channels first, and gradients of groups and dilations, in some dtypes and with
oneDNN only. There, channels first is transposed, and groups and dilations become one product of the
stacked taps:

    y[..., g, k] = sum over taps t and channels c of  taps[..., t, g, c] * kernel[t, c, g, k]
"""

from __future__ import annotations

import itertools
from typing import Any

import tensorflow as tf

from twinfuse.tensorflow import _binding
from twinfuse.tensorflow._windows import Windows


def convolution(x: tf.Tensor, kernel: tf.Tensor, windows: Windows) -> tf.Tensor:
    """The convolution alone, differentiable to any order."""
    if _binding.in_xla() or _binding.device_type(x) != "cpu":
        return _native(x, kernel, windows)
    if windows.data_format == "channels_first":
        dims = range(1, windows.spatial + 1)
        last = tf.transpose(x, [0, *(d + 1 for d in dims), 1])
        y = convolution(last, kernel, windows._replace(data_format="channels_last"))
        return tf.transpose(y, [0, windows.spatial + 1, *dims])
    known = x.shape.rank is not None and kernel.shape.rank is not None
    grouped = not known or x.shape[-1] is None or x.shape[-1] != kernel.shape[-2]
    if (grouped or max(windows.dilations) > 1) and kernel.shape[
        : windows.spatial
    ].is_fully_defined():
        return _stacked(x, kernel, windows)
    return _native(x, kernel, windows)


def _native(x: tf.Tensor, kernel: tf.Tensor, windows: Windows) -> tf.Tensor:
    padding = windows.padding
    if padding in ("CAUSAL", "EXPLICIT"):
        x, padding = _pad(x, kernel, windows), "VALID"
    last = windows.data_format == "channels_last"
    arguments = {"padding": padding, "dilations": windows.dilations}
    if windows.spatial == 1:
        data_format = "NWC" if last else "NCW"
        return tf.nn.conv1d(x, kernel, windows.strides, data_format=data_format, **arguments)
    data_format = "NHWC" if last else "NCHW"
    return tf.nn.conv2d(x, kernel, windows.strides, data_format=data_format, **arguments)


def _stacked(x: tf.Tensor, kernel: tf.Tensor, windows: Windows) -> tf.Tensor:
    x = _pad(x, kernel, windows)
    sizes = kernel.shape.as_list()[: windows.spatial]
    taps = []
    for tap in itertools.product(*map(range, sizes)):
        place = [
            slice(t * dilation, (t + 1 - size) * dilation or None, stride)
            for t, size, dilation, stride in zip(tap, sizes, windows.dilations, windows.strides)
        ]
        taps.append(x[(slice(None), *place)])
    stacked = tf.stack(taps, axis=-2)
    shape, (*_, per_group, filters) = tf.shape(stacked), tf.unstack(tf.shape(kernel))
    # Not [..., -1, per_group]: TensorFlow cannot infer a size beside a zero.
    groups = shape[-1] // per_group
    stacked = tf.reshape(stacked, tf.concat([shape[:-1], [groups, per_group]], 0))
    kernel = tf.reshape(kernel, [len(taps), per_group, groups, filters // groups])
    y = tf.einsum("...tgc,tcgk->...gk", stacked, kernel)
    return tf.reshape(y, tf.concat([shape[:-2], [filters]], 0))


def _pad(x: tf.Tensor, kernel: tf.Tensor, windows: Windows) -> tf.Tensor:
    """`x` between the zeros that its padding asks for."""
    if windows.padding == "VALID":
        return x
    first = 1 if windows.data_format == "channels_last" else 2
    pads: list[Any] = [(0, 0)] * (windows.spatial + 2)
    for i in range(windows.spatial):
        if windows.padding == "EXPLICIT":
            pads[first + i] = windows.explicit_paddings[2 * i : 2 * i + 2]
            continue
        span = (_size(kernel, i) - 1) * windows.dilations[i] + 1
        if windows.padding == "CAUSAL":
            pads[first + i] = (span - 1, 0)
            continue
        size, stride = _size(x, first + i), windows.strides[i]
        zeros = (-(-size // stride) - 1) * stride + span - size
        zeros = max(zeros, 0) if isinstance(zeros, int) else tf.maximum(zeros, 0)
        pads[first + i] = (zeros // 2, zeros - zeros // 2)
    return tf.pad(x, pads)


def _size(tensor: tf.Tensor, dim: int) -> Any:
    """A number where it is known, else a scalar tensor."""
    known = tensor.shape[dim] if tensor.shape.rank is not None else None
    return tf.shape(tensor)[dim] if known is None else known
