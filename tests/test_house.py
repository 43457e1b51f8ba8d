"""Rules of the source tree that no compiler checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".cc", ".h", ".cu", ".sh", ".toml", ".yaml", ".j2")
TEXT = (*CODE, ".md", "Makefile", "run", ".in")


def tracked(*endings: str) -> list[Path]:
    """Files of the repository but for others' code, those that git does not know yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in names.splitlines() if name.endswith(endings))
    return [p for p in paths if p.is_file() and not p.is_relative_to(ROOT / "csrc/third_party")]


def matches(pattern: str, paths: list[Path]) -> list[str]:
    found = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if found.search(line)
    ]


def test_core_includes_no_framework() -> None:
    core = [path for path in tracked(".cc", ".h", ".cu") if path.is_relative_to(ROOT / "csrc")]
    assert len(core) > 10
    foreign = r"#\s*include\s*[<\"](torch|ATen|c10|tensorflow|xla|tsl|absl|Python|pybind11)"
    assert not matches(foreign, core)
    # Its own folder of kernels has the same name as what they are compiled with.
    host = [path for path in core if not path.is_relative_to(ROOT / "csrc/cuda")]
    assert not matches(r"#\s*include\s*(<cuda|\"cuda(?!/))", host)


def test_core_includes_what_exists() -> None:
    """Own headers are named from csrc/ or csrc/include, never by a relative path."""
    for path in tracked(".cc", ".h", ".cu"):
        if not path.is_relative_to(ROOT / "csrc"):
            continue
        # Without nvcc, instructions are what the tests say.
        shim = ("tests/gpu",) if path == ROOT / "csrc/cuda/device.h" else ()
        for name in re.findall(r'#include "(.*)"', path.read_text()):
            bases = ("csrc", "csrc/include", *shim)
            assert any((ROOT / base / name).is_file() for base in bases), name


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked(*CODE)
        if (lines := len(path.read_text().splitlines())) >= 400
    }
    assert not long


def test_no_path_of_one_machine() -> None:
    paths = [path for path in tracked(*TEXT) if path != Path(__file__)]
    assert len(paths) > 30
    assert not matches(r"/(work|root|opt|home|srv|mnt)/", paths)


def test_versions_are_pinned_in_one_place() -> None:
    others = [path for path in tracked(*TEXT) if path.name != "pyproject.toml"]
    assert not matches(r"\b[a-z][\w-]*==\d", others)
    assert not matches(r"^\s*rev:", others), "hooks take their tools from .venv"


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT / tree).parts)
        for tree in ("pyext", "tfops")
        for path in (ROOT / tree).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == folders


def test_an_op_has_one_name_everywhere() -> None:
    headers = {path.stem for path in (ROOT / "csrc/include/twinfuse").glob("*.h")}
    headers -= {"core", "kept_scratch"}  # what all ops share
    assert "linear_relu" in headers
    for op in headers:
        for place in (
            f"csrc/api/{op}.cc",
            f"pyext/binding/{op}.cc",
            f"pyext/twinfuse/torch/{op}.py",
            f"tfops/binding/{op}.cc",
            f"tfops/twinfuse/tensorflow/{op}.py",
            f"benchmarks/{op}.py",
        ):
            assert (ROOT / place).is_file(), f"{op} lacks {place}"
        for framework in ("torch", "tensorflow"):
            assert list((ROOT / "tests").glob(f"test_{op}_{framework}*.py"))
