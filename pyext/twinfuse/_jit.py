"""GPU kernels for architectures that this build has no machine code for, compiled by Triton.

The core asks for a kernel when it is first used. csrc/jit.py compiles it in a process of its own,
because Triton crashes where TensorFlow was imported before it; that takes seconds, and what it made
is kept in the user's cache.
"""

from __future__ import annotations

import _thread
import atexit
import base64
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinfuse import _build

# TwinfuseStatus: of a failure that stays, and of one that may not.
_UNSUPPORTED, _OUT_OF_MEMORY = 2, 3
_TIMEOUT = 600  # seconds
# Line information would triple the code, and the interpreter makes none.
_ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("image", ctypes.c_void_p),
        ("entry", ctypes.c_char_p),
        ("warps", ctypes.c_int32),
        ("shared", ctypes.c_int32),
    ]


_Compiler = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_char_p,
    ctypes.c_int32,
    ctypes.c_int32,
    ctypes.POINTER(_Kernel),
    ctypes.c_void_p,
    ctypes.c_int64,
)


class CompileError(Exception):
    """No code for a kernel; the text says why."""


@dataclass(frozen=True)
class Compiled:
    """Machine code, which the core points into, and what csrc/aot.py says of it."""

    image: bytes = field(repr=False)
    entry: bytes
    description: dict[str, Any]


# By name and architecture: never removed from.
compiled: dict[tuple[str, int], Compiled] = {}
_one_at_a_time = threading.RLock()
_sources = ""  # hash of what the core's kernels were compiled from


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "twinfuse_gpu_architectures": (ctypes.c_char_p, []),
    "twinfuse_gpu_sources": (ctypes.c_char_p, []),
    "twinfuse_device_backend": (ctypes.c_char_p, [ctypes.c_int32]),
    "twinfuse_set_kernel_compiler": (None, [ctypes.c_void_p]),
}


def attach(library: ctypes.CDLL) -> None:
    """Let the core compile kernels, where Triton is installed."""
    global _sources
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if not _find_triton() or not _script().exists():
        return
    _sources = library.twinfuse_gpu_sources().decode()
    library.twinfuse_set_kernel_compiler(_compile)
    # Threads may outlive the interpreter.
    atexit.register(library.twinfuse_set_kernel_compiler, _Compiler())


def _find_triton() -> Path | None:
    """The folder of what `import triton` would load."""
    try:
        spec = importlib.util.find_spec("triton")
    except ValueError:  # something else is in its place
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _script() -> Path:
    return _build.ROOT / "csrc" / "jit.py"


@_Compiler
def _compile(name: bytes, listed: int, arch: int, kernel: Any, message: int, capacity: int) -> int:
    """Nothing may be raised through the C caller."""
    status = _UNSUPPORTED
    try:
        found = kernel_of(name.decode(), listed, arch)
        made = kernel.contents
        made.image = ctypes.cast(ctypes.c_char_p(found.image), ctypes.c_void_p)
        made.entry = found.entry
        made.warps, made.shared = found.description["warps"], found.description["shared"]
        return 0
    except KeyboardInterrupt:
        # Raised again behind the caller.
        threading.Timer(0.1, _thread.interrupt_main).start()
        status, text = _OUT_OF_MEMORY, "interrupted"
    except MemoryError:
        status, text = _OUT_OF_MEMORY, "out of memory"
    except Exception as error:
        text = str(error)
    encoded = text.encode()[: capacity - 1] + b"\0"
    ctypes.memmove(message, encoded, len(encoded))
    return status


def kernel_of(name: str, listed: int, arch: int) -> Compiled:
    """The kernel for `arch` that is listed for another architecture: compiled once on a machine.

    Raises CompileError.
    """
    if found := compiled.get((name, arch)):
        return found
    with _one_at_a_time:
        if found := compiled.get((name, arch)):
            return found
        kept = _kept(name, arch)
        read = _read(kept)
        if read is None:
            with tempfile.TemporaryDirectory() as work:
                file = Path(work, "kernel.json")
                _run(name, listed, arch, file)
                read = _read(file)
                if read is None:
                    raise CompileError("Triton's compiler left no code")
                _keep(file, kept)
        return compiled.setdefault((name, arch), read)


def _read(file: Path | None) -> Compiled | None:
    try:
        if file is None:
            return None
        found = json.loads(file.read_text())
        image = base64.b64decode(found.pop("image"))
        found["warps"], found["shared"] = int(found["warps"]), int(found["shared"])
        return Compiled(image, found["entry"].encode(), found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _run(name: str, listed: int, arch: int, file: Path) -> None:
    _say(arch)
    command = [sys.executable, str(_script()), _sources, name, str(listed), str(arch), str(file)]
    # It must find the Triton that this process would.
    environment = os.environ | _ENVIRONMENT | {"TRITON_CACHE_DIR": str(file.parent / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in sys.path if entry)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            start_new_session=True,  # an interrupt is for this process alone
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"Triton's compiler does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CompileError(f"Triton does not compile it: {lines[-1]}")


@functools.cache
def _say(arch: int) -> None:
    print(
        f"twinfuse: compiling GPU kernels for architecture {arch // 10}.{arch % 10} with Triton "
        "(each once) ...",
        file=sys.stderr,
        flush=True,
    )


def _kept(name: str, arch: int) -> Path | None:
    """Where the user's cache has a kernel, or would have it; None: there is no cache."""
    folder = _build.cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _build._check_cache(folder)
        triton = _find_triton()
        if triton is None:  # not any more
            return None
        digest = hashlib.sha256(_sources.encode() + _script().read_bytes())
        digest.update((triton / "__init__.py").read_bytes())  # which holds its version
    except OSError:
        return None
    return folder / "kernels" / digest.hexdigest()[:16] / f"{name}.sm_{arch}.json"


def _keep(file: Path, kept: Path | None) -> None:
    if kept is None:
        return
    with contextlib.suppress(OSError):  # a cache that is full or read-only
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = kept.with_name(f".{kept.name}.{os.getpid()}")
        new.write_bytes(file.read_bytes())
        new.replace(kept)
