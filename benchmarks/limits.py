"""The machine's limits, measured in the same run as everything that is compared with them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.cc")
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-pthread"]
ARITHMETIC = {"float32": 0, "float64": 1, "bfloat16": 2}
PATTERNS = {"read": 0, "copy": 1, "triad": 2}
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
DEFAULT_CACHE_SIZES = {"L2": 1 << 20, "L3": 32 << 20}


class LimitsError(RuntimeError):
    """The probes could not be built; the text says why."""


def cpu_model() -> str:
    """Name of the processor as the kernel gives it, or the machine type where it gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return os.uname().machine


def cpu_flags() -> list[str]:
    """The vector instruction sets that the processor reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    words = next((line.split() for line in lines if line.startswith("flags")), [])
    return [w for w in words if w.startswith(("avx", "amx", "fma", "f16c", "sse4"))]


def cache_sizes() -> dict[str, int]:
    """Bytes of L2 (one core's) and L3 (the first core's)."""
    sizes = dict(DEFAULT_CACHE_SIZES)
    # glibc's own figure adds up the whole socket, which a virtual machine may see a slice of.
    for index in sorted(CACHES.glob("index*")):
        try:
            level = f"L{(index / 'level').read_text().strip()}"
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if level in sizes and size.endswith("K"):
            sizes[level] = int(size[:-1]) << 10
    return sizes


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "twinfuse" / "benchmarks"


@functools.cache
def load() -> ctypes.CDLL:
    """Compile the probes for this processor, once, and load them. Raises `LimitsError`."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    text = SOURCE.read_bytes()
    # -march=native makes the binary this processor's own: a home folder may be shared by several.
    key = hashlib.sha256(repr((text, compiler, FLAGS, cpu_model(), cpu_flags())).encode())
    target = cache_folder() / f"limits-{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / "limits.so"
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise LimitsError(f"no C++ compiler ({compiler[0]}) to build the probes") from error
            except subprocess.CalledProcessError as error:
                raise LimitsError(f"the probes do not compile: {error.stderr[-800:]}") from error
            os.replace(built, target)
    library = ctypes.CDLL(str(target))
    library.limits_multiply_add.restype = ctypes.c_double
    library.limits_multiply_add.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    library.limits_bandwidth.restype = ctypes.c_double
    library.limits_bandwidth.argtypes = [
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_double,
    ]
    return library


@dataclass
class Limits:
    """Best rates seen on `threads` threads: FLOP/s by dtype, bytes/s by memory level and pattern.

    A limit is the best of every probe of a run, which takes one before each section: a machine
    whose clock rises during the run would otherwise show kernels above 100 %.
    """

    threads: int
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    caches: dict[str, int] = field(default_factory=cache_sizes)
    error: str = ""

    def probe(self, seconds: float = 0.05, repeats: int = 3) -> None:
        """Measure everything again and keep what is better. Without a compiler: say so, once."""
        try:
            library = load()
        except LimitsError as error:
            self.error = str(error)
            return
        for _ in range(repeats):
            for dtype, number in ARITHMETIC.items():
                rate = library.limits_multiply_add(number, self.threads, seconds)
                self.flops[dtype] = max(rate, self.flops.get(dtype, 0.0))
            for level, size in self._working_sets().items():
                rates = self.bytes.setdefault(level, {})
                for pattern, number in PATTERNS.items():
                    rate = library.limits_bandwidth(number, size, self.threads, seconds)
                    rates[pattern] = max(rate, rates.get(pattern, 0.0))

    def _working_sets(self) -> dict[str, int]:
        l2 = self.caches["L2"] * self.threads
        return {"L2": l2 // 2, "L3": max(self.caches["L3"] // 2, 2 * l2), "DRAM": 256 << 20}

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s for `dtype`: float32's for half precision without an instruction of its own."""
        return self.flops.get(dtype) or self.flops.get("float32")

    def level(self, working_set: int) -> str:
        """Nearest memory that holds `working_set` bytes when it is used again and again."""
        if working_set <= self.caches["L2"] * self.threads:
            return "L2"
        return "L3" if working_set <= self.caches["L3"] else "DRAM"

    def bound(self, flops: float, traffic: int, dtype: str) -> tuple[str, float] | None:
        """What limits such a call, and the least seconds it can take; None without probes.

        `traffic` is the bytes that must move when every operand is touched once.
        """
        peak = self.peak_flops(dtype)
        if not peak or not self.bytes:
            return None
        level = self.level(traffic)
        arithmetic, memory = flops / peak, traffic / max(self.bytes[level].values())
        return ("FMA", arithmetic) if arithmetic >= memory else (level, memory)
