"""Loads the compiled PyTorch binding, once per process."""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

import torch

from twinfuse import _backend, _build, _core

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
)


@_Callback
def _on_fallback(op: bytes, reason: bytes, message: int, capacity: int) -> int:
    """The binding took torch's own operators by itself: warn, or refuse with a text."""
    try:
        _backend.fall_back(op.decode(), reason.decode(errors="replace"))
    except Exception as error:  # nothing may be raised through the C caller
        text = str(error).encode()[: capacity - 1] + b"\0"
        ctypes.memmove(message, text, len(text))
        return 1
    return 0


_state = threading.local()


def _depth() -> int:
    return getattr(_state, "raises", 0)


class _Raising:
    def __enter__(self) -> None:
        _state.raises = _depth() + 1

    def __exit__(self, *_: object) -> None:
        _state.raises = _depth() - 1


# Inside, operators of this thread raise for what no kernel serves, and leave it to the caller.
raising = _Raising()


@ctypes.CFUNCTYPE(ctypes.c_int32)
def _on_native() -> int:
    return _depth()


def _load(path: Path) -> str:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the PyTorch binding does not load: {error}"
    return ""


@functools.cache
def load() -> str:
    """Register the operators of the binding with torch; the reason if that cannot be, else ""."""
    core, reason = _core.load()
    if core is None:
        return reason
    path, reason = _build.torch_binding()
    if path is None:
        return reason
    refused = _load(path)
    if refused:  # a prebuilt binding that this torch does not take: compile one
        path, _ = _build.torch_binding(unloadable=path)
        if path is None or _load(path):
            return refused
    binding = ctypes.CDLL(str(path))
    if binding.twinfuse_torch_abi_version() != _core.ABI_VERSION:
        # Its operators are registered by now, and there is no way back.
        raise ImportError("the PyTorch binding was built for another version: reinstall twinfuse")
    binding.twinfuse_torch_on_fallback(_on_fallback)
    binding.twinfuse_torch_on_native(_on_native)
    return ""
