"""Read and set the SSE control register of the calling thread (x86-64 only)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

DEFAULT = 0x1F80  # exceptions masked, round to nearest, denormals kept
FLUSH = DEFAULT | 0x8040  # flush to zero, denormals are zero: how TensorFlow runs kernels
ROUND_UP = DEFAULT | 0x4000

# Bits 0-5 record exceptions that happened: no mode.
_MODES = 0xFFC0


@functools.cache
def _instructions() -> tuple[Callable[..., None], Callable[..., None]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"MXCSR exists on x86-64 only, not on {platform.machine()}")
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\xae\x17\xc3")  # ldmxcsr [rdi]; ret
    code.write(b"\x0f\xae\x1f\xc3")  # stmxcsr [rdi]; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    prototype = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))
    functions = prototype(address), prototype(address + 4)
    functions[0].memory = code  # the mapping lives as long as the functions
    return functions


def _read() -> int:
    value = ctypes.c_uint32()
    _instructions()[1](value)
    return value.value


@contextmanager
def mxcsr(mode: int) -> Iterator[Callable[[], int]]:
    """Run the block in `mode`; the value it yields tells, afterwards, which mode the block left."""
    load = _instructions()[0]
    before = _read()
    left = [0]
    load(ctypes.c_uint32(mode))
    try:
        yield lambda: left[0]
    finally:
        left[0] = _read() & _MODES
        load(ctypes.c_uint32(before & ~0x3F))
