"""The compiled TensorFlow ops, and what an op asks before it takes them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import tensorflow as tf
from tensorflow.python.autograph.impl.api import autograph_artifact
from tensorflow.python.framework import ops as tf_ops
from tensorflow.python.ops import control_flow_util

from twinfuse import _backend, _build, _core


def _load() -> tuple[ModuleType | None, str]:
    library, reason = _core.load()  # the binding finds the core by its SONAME
    if library is None:
        return None, reason
    path, reason = _build.tensorflow_binding()
    for _ in range(2):
        if path is None:
            break
        try:
            return tf.load_op_library(str(path)), ""
        except (OSError, tf.errors.OpError) as error:
            # A wheel's binding can outlive the TensorFlow that it was built for: build another.
            refused = f"the TensorFlow binding does not load: {error}"
            path, reason = _build.tensorflow_binding(unloadable=path)
            reason = reason or refused
    return None, reason


# The module of generated op functions, or None and the reason.
ops, missing = _load()


def do_not_convert(function: Callable[..., Any]) -> None:
    """Keep AutoGraph from rewriting `function`; the public decorator costs a microsecond a call."""
    autograph_artifact(function)


def in_xla() -> bool:
    """Whether the graph being traced will be compiled by XLA, which knows no custom op."""
    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf_ops.get_default_graph()))


def device_type(tensor: tf.Tensor | None = None) -> str:
    """ "cpu", "cuda" or another type: where an op on `tensor` will run, as far as is known now."""
    if tensor is not None and tf.executing_eagerly():
        name = tensor.device.rsplit("device:", 1)[-1].split(":")[0].lower()
        return {"gpu": "cuda"}.get(name, name or "cpu")
    # Placement happens after tracing, and it prefers a GPU.
    return "cuda" if tf.config.list_physical_devices("GPU") else "cpu"


def device_index(tensor: tf.Tensor) -> int:
    """Of its GPU, as far as is known now."""
    number = tensor.device.rsplit(":", 1)[-1] if tf.executing_eagerly() else ""
    return int(number) if number.isdigit() else 0


def find_kernel(role: str, dtype: tf.DType, device: str) -> tuple[str, str]:
    """`(kernel, "")` for a call made now, or `("", reason)`, also when it may not be used."""
    if ops is None:
        return "", missing
    if in_xla():
        return "", "XLA compiles this function, and it cannot compile custom ops"
    if _backend.requested is not None and not _core.serves(_backend.requested, device):
        return "", f"backend '{_backend.requested}' was asked for, and the call is on {device}"
    return _core.find_kernel(role, dtype.base_dtype.name, device)
