"""Peak memory of one pass, in a process of its own, which prints it as JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.operands import Case, Shape, set_threads
from benchmarks.results import MemoryUse

ROOT = Path(__file__).resolve().parent.parent


def measure(
    op: str, name: str, framework: str, shape: Shape, dtype: str, threads: int
) -> MemoryUse:
    """Peak memory of candidate `name`. Raises RuntimeError with the last words of its process."""
    command = [sys.executable, "-m", "benchmarks.memory", op, name, framework, str(shape), dtype]
    done = subprocess.run(
        [*command, str(threads)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return MemoryUse(**json.loads(done.stdout.splitlines()[-1]))


def resident_peak(run: Callable[[], Any]) -> int:
    """Bytes that the process's resident set rises by at most while `run` works; Linux only."""
    gc.collect()
    # What has been freed goes back to the system, or the peak would hide in it.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def torch_peak(run: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator holds at most while `run` works, from its own events."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()
    del result
    held = peak = 0
    results = profile.profiler.kineto_results.events()
    events = (e for e in results if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def tensorflow_peak(run: Callable[[], Any]) -> int | None:
    """Bytes that TensorFlow's CPU allocator holds at most while `run` works, or None."""
    import tensorflow as tf

    memory = tf.config.experimental
    try:
        memory.reset_memory_stats("CPU:0")
    except ValueError:  # an allocator that keeps no count, as in builds without oneDNN
        return None
    before = memory.get_memory_info("CPU:0")["current"]
    result = run()
    peak = memory.get_memory_info("CPU:0")["peak"]
    del result
    return int(peak) - int(before)


def find(
    op: Any, name: str, framework: str, shape: Shape, dtype: str
) -> tuple[Callable[[], Any], Case]:
    """What candidate `name` runs. Exits with the reason when there is no such candidate."""
    case: Case = op.case("training", shape, dtype, [framework], [name])
    case.reference.clear()
    for candidate in case.candidates:
        return candidate.run, case
    sys.exit(case.skipped.get(name, f"no candidate {name!r}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("candidate")
    parser.add_argument("framework", choices=("torch", "tensorflow"))
    parser.add_argument("shape")
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    # A block of this size or more is its own mapping, so that freeing it shows at once: without
    # this, glibc raises the threshold with the sizes it sees and keeps what was freed.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 << 10)
    # TensorFlow's usual allocator for CPUs does not count blocks under 256 KB, of which a loop over
    # steps has most of what it keeps.
    os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"
    set_threads(arguments.threads, [arguments.framework])
    op = importlib.import_module(f"benchmarks.{arguments.op}")
    shape = op.parse_shape(arguments.shape)
    run, case = find(op, arguments.candidate, arguments.framework, shape, arguments.dtype)
    with case.context():
        run()  # one-time costs: threads, tables, code
        if arguments.framework == "torch":
            use = MemoryUse(resident_peak(run), torch_peak(run))
        else:
            use = MemoryUse(allocator=tensorflow_peak(run))
    print(json.dumps(asdict(use)))
    # TensorFlow's threads may still be at work: nothing is left to save.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
