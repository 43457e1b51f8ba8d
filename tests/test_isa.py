"""The core's tests under every instruction set: it is fixed per process, so each has its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import skip
from tests.core_api import load
from twinfuse import _core

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    path
    for pattern in ("test_core*.py", "test_properties*.py")
    for path in sorted((ROOT / "tests").glob(pattern))
]

# What Linux calls the features that each build may use.
FEATURES = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "amx_bf16": {
        *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
        *("amx_tile", "amx_bf16"),
    },
}


def processor_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())


def isa_of_a_process(forced: str) -> tuple[str, str]:
    """What `twinfuse_isa()` and its note say in a new process that forces `forced`."""
    code = "from twinfuse import _core; print(_core.isa()); print(_core.isa_note())"
    env = {**os.environ, "TWINFUSE_ISA": forced}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    isa, note = result.stdout.splitlines()
    return isa, note


@pytest.mark.slow
@pytest.mark.parametrize("isa", FEATURES)
def test_core_under(isa: str, request: pytest.FixtureRequest) -> None:
    load()
    missing = FEATURES[isa] - processor_flags()
    if missing or platform.machine() not in ("x86_64", "AMD64"):
        skip(isa, f"this processor lacks {', '.join(sorted(missing)) or 'x86-64'}")
    assert isa in _core.built_isas(), f"the build holds {_core.built_isas()} only"
    assert isa_of_a_process(isa) == (isa, "")
    if _core.isa() == isa:
        return  # the tests of this very process
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    if sample := request.config.getoption("--sample"):
        command += ["--sample", str(sample)]
    env = {**os.environ, "TWINFUSE_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [*command, *map(str, MODULES)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"


def test_best_isa_is_taken() -> None:
    if "TWINFUSE_ISA" in os.environ:
        pytest.skip("TWINFUSE_ISA is set")
    flags = processor_flags()
    usable = [isa for isa in _core.built_isas() if FEATURES[isa] <= flags]
    best = max(usable, key=list(FEATURES).index)
    assert (_core.isa(), _core.isa_note()) == (best, "")


def test_unknown_isa_falls_back_and_says_so() -> None:
    load()
    best = isa_of_a_process("")[0]
    isa, note = isa_of_a_process("sse17")
    assert isa == best
    assert "sse17" in note and best in note
