"""The compiled core, read through ctypes. Works without any framework and without the library."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from twinfuse import _jit, _tuning

ABI_VERSION = 8
LIBRARY = Path(__file__).resolve().parent / "_lib" / "libtwinfuse.so"

# The core's numbers for dtypes and devices, by the names both frameworks use.
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
DEVICES = {"cpu": 0, "cuda": 1}

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "twinfuse_abi_version": (ctypes.c_int32, []),
    "twinfuse_version": (ctypes.c_char_p, []),
    "twinfuse_last_error": (ctypes.c_char_p, []),
    "twinfuse_isa": (ctypes.c_char_p, []),
    "twinfuse_isa_note": (ctypes.c_char_p, []),
    "twinfuse_built_isas": (ctypes.c_char_p, []),
    "twinfuse_kernel_count": (ctypes.c_int32, []),
    "twinfuse_kernel_name": (ctypes.c_char_p, [ctypes.c_int32]),
    "twinfuse_kernel_launches": (ctypes.c_int64, [ctypes.c_int32]),
    "twinfuse_find_kernel": (ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32]),
    "twinfuse_lstm_gpu_kernel": (
        ctypes.c_char_p,
        [*[ctypes.c_int32] * 4, *[ctypes.c_int64] * 3],
    ),
}


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Open the core once per process: `(library, "")`, or `(None, why not)`.

    It is opened by absolute path, so that the bindings, which need only its SONAME, find the copy
    that belongs to this package wherever they were built.
    """
    if not LIBRARY.exists():
        return None, "the compiled core is missing (twinfuse was installed without a C++ compiler)"
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return None, f"the compiled core does not load: {error}"
    found = library.twinfuse_abi_version()
    if found != ABI_VERSION:
        return None, (
            f"the compiled core has interface version {found}, expected {ABI_VERSION}: reinstall "
            "twinfuse"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _tuning.attach(library)
    _jit.attach(library)
    return library, ""


def _text(function: str) -> str:
    library, _ = load()
    return getattr(library, function)().decode() if library else ""


def version() -> str:
    return _text("twinfuse_version")


def isa() -> str:
    """Instruction set whose CPU kernels run in this process; empty without the core."""
    return _text("twinfuse_isa")


def isa_note() -> str:
    return _text("twinfuse_isa_note")


def built_isas() -> list[str]:
    text = _text("twinfuse_built_isas")
    return text.split(",") if text else []


def gpu_architectures() -> list[str]:
    """Those that the build has machine code for."""
    text = _text("twinfuse_gpu_architectures")
    return text.split(", ") if text else []


def launches() -> dict[str, int]:
    """How often each kernel has run in this process, by kernel name."""
    library, _ = load()
    if library is None:
        return {}
    return {
        library.twinfuse_kernel_name(i).decode(): library.twinfuse_kernel_launches(i)
        for i in range(library.twinfuse_kernel_count())
    }


@functools.cache
def find_kernel(role: str, dtype: str, device: str) -> tuple[str, str]:
    """`(kernel name, "")` for e.g. ("linear_relu_forward", "float32", "cpu"), or `("", reason)`."""
    library, reason = load()
    if library is None:
        return "", reason
    if device not in DEVICES:
        return "", f"no kernel runs on device type '{device}'"
    if dtype not in DTYPES:
        return "", f"no kernel takes dtype {dtype}"
    name = library.twinfuse_find_kernel(role.encode(), DTYPES[dtype], DEVICES[device])
    if name is None:
        return "", library.twinfuse_last_error().decode()
    return name.decode(), ""


def lstm_gpu_kernel(
    backward: bool, dtype: str, tf32: bool, index: int, *, steps: int, batch: int, units: int
) -> str:
    """What takes the steps of an LSTM of these sizes on this GPU; empty if nothing does."""
    library, _ = load()
    if library is None:
        return ""
    sizes = (steps, batch, units)
    name = library.twinfuse_lstm_gpu_kernel(backward, DTYPES[dtype], tf32, index, *sizes)
    return "" if name is None else str(name.decode())


def device_backend(index: int) -> tuple[str, str]:
    """What serves calls on this GPU: `("cuda", "")` or `("triton", "")`, or `("", reason)`."""
    library, reason = load()
    if library is None:
        return "", reason
    name = library.twinfuse_device_backend(index)
    return ("", library.twinfuse_last_error().decode()) if name is None else (name.decode(), "")


def serves(backend: str, device: str, index: int = 0) -> bool:
    """Whether calls on this device take that backend."""
    return backend == (device if device != "cuda" else device_backend(index)[0] or device)


def reported(kernel: str, reason: str, device: str, index: int = 0) -> tuple[str, str, str]:
    """`(backend, kernel, reason)` for reports, of what `find_kernel` has answered."""
    backend = device
    if kernel and device == "cuda":
        backend, reason = device_backend(index)
    return (backend, kernel, "") if kernel and backend else ("reference", "", reason)
