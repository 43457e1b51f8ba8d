"""The fake driver (fake_driver.cc), built and told what to do.

`load()` builds it once and names it to the core, which opens the driver at the first use of a GPU
in the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import skip
from twinfuse import _core

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "fake_driver"
SOURCES = sorted(HERE.glob("fake_*.cc"))
VARIABLE = "TWINFUSE_CUDA_DRIVER"
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
LAUNCH_FAILED = 719


@dataclass(frozen=True)
class Device:
    arch: int
    multiprocessors: int = 3  # so that persistent grids have more tiles than programs
    shared: int = 227 << 10


# What `load` gives the process, by number: the second has as many multiprocessors as real ones do,
# and then come one without kernels and one that runs the code of its older sibling, as do 10.3 and
# 12.1. Nothing is ever built for NEW and ODD: Triton compiles for the first alone.
SMALL = 99 << 10
DEVICES = (
    Device(90),
    Device(90, 132),
    Device(75, shared=64 << 10),
    Device(86, shared=SMALL),
    Device(80, shared=163 << 10),
    Device(100),
    Device(103),
    Device(120, shared=SMALL),
    Device(121, shared=SMALL),
    Device(110),
    Device(101),
    Device(90),
)
PLAIN, LARGE, OLD, SIBLING = range(4)
NEW, ODD, SPARE = range(len(DEVICES) - 3, len(DEVICES))  # the last of which no other test uses


class _Device(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("arch", "multiprocessors", "shared")]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("image_size", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("captured", ctypes.c_int32),
        ("arguments", ctypes.c_uint64),
        ("cooperative", ctypes.c_int32),
        ("cluster", ctypes.c_uint32 * 3),
    ]


class _Memset(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("launch", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("value", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class Launch:
    """A launch as it was recorded; the bytes of an argument are as many as the kernel takes."""

    entry: str
    image: bytes = field(repr=False)
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int | None
    context: int
    device: int
    captured: bool
    arguments: tuple[bytes, ...]
    cooperative: bool
    cluster: tuple[int, ...]  # zeros: none


@dataclass(frozen=True)
class Memset:
    """Words of 32 bits that were set before the launch of this index."""

    at: int
    count: int
    launch: int
    stream: int | None
    value: int


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "fake_set_devices": (None, [ctypes.POINTER(_Device), ctypes.c_int]),
    "fake_set_version": (None, [ctypes.c_int]),
    "fake_set_occupancy": (None, [ctypes.c_int]),
    "fake_set_load_delay": (None, [ctypes.c_uint]),
    "fake_primary_context": (ctypes.c_void_p, [ctypes.c_int]),
    "fake_create_context": (ctypes.c_void_p, [ctypes.c_int]),
    "fake_create_stream": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]),
    "fake_destroy_stream": (None, [ctypes.c_void_p]),
    "fake_begin_capture": (None, [ctypes.c_void_p]),
    "fake_end_capture": (ctypes.c_int, [ctypes.c_void_p]),
    "fake_fail_call": (None, [ctypes.c_int64, ctypes.c_int]),
    "fake_fail_function": (None, [ctypes.c_char_p, ctypes.c_int]),
    "fake_clear": (None, []),
    "fake_complaint": (ctypes.c_char_p, []),
    "fake_failed": (ctypes.c_char_p, []),
    "fake_call_count": (ctypes.c_uint64, []),
    "fake_call": (ctypes.c_char_p, [ctypes.c_uint64]),
    "fake_launch_count": (ctypes.c_uint64, []),
    "fake_launch": (None, [ctypes.c_uint64, ctypes.POINTER(_Launch)]),
    "fake_argument": (
        ctypes.c_uint64,
        [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64],
    ),
    "fake_memset_count": (ctypes.c_uint64, []),
    "fake_memset": (None, [ctypes.c_uint64, ctypes.POINTER(_Memset)]),
    "fake_module_count": (ctypes.c_int64, []),
    "fake_retained": (ctypes.c_int64, []),
    "fake_abandoned": (ctypes.c_int64, []),
    "fake_depth": (ctypes.c_int, []),
    "fake_current": (ctypes.c_void_p, []),
    "fake_capture_mode": (ctypes.c_int, []),
    "cuCtxPushCurrent_v2": (ctypes.c_int, [ctypes.c_void_p]),
    "cuCtxPopCurrent_v2": (ctypes.c_int, [ctypes.c_void_p]),
}


class Driver:
    """One of these per process: what it tells and asks is the state of the library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    def set_devices(self, devices: Iterable[Device]) -> None:
        """Before the first call of the driver."""
        specs = [_Device(d.arch, d.multiprocessors, d.shared) for d in devices]
        self.library.fake_set_devices((_Device * len(specs))(*specs), len(specs))

    def clear(self) -> None:
        """Forget records and failures asked for."""
        self.library.fake_clear()

    def fail_call(self, index: int, error: int = LAUNCH_FAILED) -> None:
        """The call of this index from now on fails."""
        self.library.fake_fail_call(index, error)

    def fail_function(self, name: str, error: int = LAUNCH_FAILED) -> None:
        """Every call of this function fails; error 0 ends that."""
        self.library.fake_fail_function(name.encode(), error)

    @property
    def failed(self) -> str:
        """The function whose call failed last because a test wanted it."""
        return self.library.fake_failed().decode()

    @property
    def complaint(self) -> str:
        """Why a call was refused last."""
        return self.library.fake_complaint().decode()

    @property
    def calls(self) -> list[str]:
        library = self.library
        return [library.fake_call(i).decode() for i in range(library.fake_call_count())]

    @property
    def launch_count(self) -> int:
        return self.library.fake_launch_count()

    def launches(self, first: int = 0) -> list[Launch]:
        """From this index on."""
        return [self._launch(i) for i in range(first, self.launch_count)]

    def _launch(self, index: int) -> Launch:
        found = _Launch()
        self.library.fake_launch(index, found)
        arguments = []
        room = ctypes.create_string_buffer(4096)  # what a kernel takes at most
        for i in range(found.arguments):
            size = self.library.fake_argument(index, i, room, len(room))
            arguments.append(room.raw[:size])
        return Launch(
            found.entry.decode(),
            ctypes.string_at(found.image, found.image_size),
            tuple(found.grid),
            tuple(found.block),
            found.shared,
            found.attributes,
            found.stream,
            found.context,
            found.device,
            bool(found.captured),
            tuple(arguments),
            bool(found.cooperative),
            tuple(found.cluster),
        )

    @property
    def memsets(self) -> list[Memset]:
        found = _Memset()
        made = []
        for i in range(self.library.fake_memset_count()):
            self.library.fake_memset(i, found)
            made.append(Memset(*(getattr(found, name) for name, _ in found._fields_)))
        return made

    def primary(self, device: int) -> int:
        return self.library.fake_primary_context(device)

    def new_context(self, device: int = PLAIN) -> int:
        """One that nobody has used yet."""
        return self.library.fake_create_context(device)

    @contextmanager
    def stream(self, context: int | None = None) -> Iterator[int]:
        """A stream of this context, or of a new one on the first device."""
        handle = self.library.fake_create_stream(context or self.new_context(), False)
        try:
            yield handle
        finally:
            self.library.fake_destroy_stream(handle)

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """Makes a context current, as a framework does."""
        assert self.library.cuCtxPushCurrent_v2(context) == 0
        try:
            yield
        finally:
            assert self.library.cuCtxPopCurrent_v2(None) == 0

    @contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """What is launched on the stream is captured; nothing may spoil that."""
        self.library.fake_begin_capture(stream)
        try:
            yield
        finally:
            spoilt = not self.library.fake_end_capture(stream)
        assert not spoilt, self.complaint

    @contextmanager
    def capture_mode(self, mode: int) -> Iterator[None]:
        """Of this thread; the modes count from the global one, and relaxed is 2."""
        value = ctypes.c_int(mode)
        assert self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) == 0
        try:
            yield
        finally:
            assert self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) == 0

    def set_occupancy(self, blocks: int) -> None:
        """Of any kernel on one multiprocessor, in contexts made from now on; the fixture sets 1
        again."""
        self.library.fake_set_occupancy(blocks)

    def set_load_delay(self, microseconds: int) -> None:
        self.library.fake_set_load_delay(microseconds)

    @property
    def held(self) -> dict[str, int | None]:
        """What a call must leave as it was, but for modules that it loads for later ones."""
        library = self.library
        return {
            "depth": library.fake_depth(),
            "current": library.fake_current(),
            "mode": library.fake_capture_mode(),
            "abandoned": library.fake_abandoned(),
        }

    @property
    def modules(self) -> int:
        return self.library.fake_module_count()

    @property
    def retained(self) -> int:
        return self.library.fake_retained()


def build(folder: Path = FOLDER, *, without: str | None = None) -> Path:
    """The library, compiled where it is not yet; `without`: a function that it shall lack."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        skip("compiler", f"there is no {compiler[0]}")
    flags = FLAGS + (SANITIZE if "ASAN_OPTIONS" in os.environ else [])
    flags += [f"-D{without}=absent"] if without else []
    command = [*compiler, *flags, *map(str, SOURCES)]
    key = hashlib.sha256(" ".join(command).encode())
    for source in (*SOURCES, *sorted(HERE.glob("fake_*.h"))):
        key.update(source.read_bytes())
    path = folder / f"libfake-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # The sanitizer is loaded into this process, and is not meant for the compiler.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            subprocess.run([*command, "-o", str(made)], check=True, env=environment)
            made.replace(path)
    return path


@functools.cache
def load() -> Driver:
    path = build()
    os.environ[VARIABLE] = str(path)
    driver = Driver(path)
    driver.set_devices(DEVICES)
    return driver


@pytest.fixture(name="driver")
def driver_fixture() -> Iterator[Driver]:
    """The driver with nothing recorded; a test must leave contexts and modes as it found them."""
    _, reason = _core.find_kernel("linear_relu_forward", "float32", "cuda")
    if reason:
        skip("kernels", reason)
    driver = load()
    driver.clear()
    before = driver.held
    yield driver
    if driver.complaint:
        print("the driver refused", driver.complaint)
    driver.clear()
    driver.set_load_delay(0)
    driver.set_occupancy(1)
    assert driver.held == before
