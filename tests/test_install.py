"""The package installed in fresh environments, and what its wheel holds.

`python -m tests.install_matrix --full` takes every way of installing with every set of frameworks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require, skip
from tests.install_matrix import REDUCED, REPOSITORY, Case, Workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    for name in ("torch", "tensorflow"):
        require(name)
    if not shutil.which("g++"):
        skip("core", "there is no C++ compiler")
    folder = tmp_path_factory.mktemp("install")
    yield Workspace(folder)
    shutil.rmtree(folder)  # the copies of the package in it are large


@pytest.mark.parametrize("case", REDUCED, ids=lambda case: case.name.replace(" ", "_"))
def test_install(case: Case, workspace: Workspace) -> None:
    print(case.run(workspace))


def test_wheel_contents(workspace: Workspace) -> None:
    wheel = workspace.wheel()
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    libraries = {name for name in names if name.endswith(".so")}
    major, minor, _ = require("tensorflow").__version__.split(".", 2)
    assert libraries == {
        "twinfuse/_lib/libtwinfuse.so",
        "twinfuse/torch/_C.abi3.so",
        f"twinfuse/tensorflow/_tf_{major}_{minor}.so",
    }
    sources = {
        f"twinfuse/_src/{path.relative_to(REPOSITORY).as_posix()}"
        for folder in ("csrc/include", "pyext/binding", "tfops/binding")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file()
    }
    sources |= {
        f"twinfuse/_src/{path.relative_to(REPOSITORY).as_posix()}"
        for path in (REPOSITORY / "csrc").rglob("*.py")
        if path.name != "cuda_build.py"  # what needs nvcc is never compiled at first use
    }
    assert {name for name in names if name.startswith("twinfuse/_src/")} == sources
    modules = {
        "twinfuse/" + path.relative_to(root).as_posix()
        for root in (REPOSITORY / "pyext/twinfuse", REPOSITORY / "tfops/twinfuse")
        for path in root.rglob("*.py")
    }
    assert {name for name in names - sources if name.endswith(".py")} == modules
    assert "twinfuse/py.typed" in names
    licences = {name.partition(".dist-info/licenses/")[2] for name in names}
    assert licences == {"", "LICENSE", "NOTICE", "csrc/third_party/tinf/LICENSE"}
    assert not [name for name in names if "test" in name]


def test_wheel_after_another_build_has_no_leftovers(workspace: Workspace) -> None:
    """A module or binding that an earlier build left in the build folder must not ship."""
    workspace.wheel()
    (library,) = workspace.tree.glob("build/lib*")
    (library / "twinfuse/removed.py").write_text("")
    (library / "twinfuse/torch/_C.abi3.so").write_text("")
    environment = workspace.environment((), tools=True)
    target = environment.folder / "wheel"
    environment.pip("wheel", "--no-build-isolation", "--no-deps", "-w", target, workspace.tree)
    (wheel,) = target.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")] == ["twinfuse/_lib/libtwinfuse.so"]
    assert "twinfuse/removed.py" not in names


def test_torch_binding_needs_nothing_newer_than_2_10(workspace: Workspace, tmp_path: Path) -> None:
    require("torch_abi_audit")
    with zipfile.ZipFile(workspace.wheel()) as wheel:
        binding = wheel.extract("twinfuse/torch/_C.abi3.so", tmp_path)
    command = [Path(sys.executable).parent / "torch-abi-audit", binding, "--check=both", "--json"]
    audit = subprocess.run(command, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    (library,) = json.loads(audit.stdout)["bundled_libs"]
    assert library["torch"]["stable"], audit.stdout
    assert library["torch"]["min_torch_version"] == "2.10.0", audit.stdout
    assert not library["torch"]["unknown_shim_symbols"], audit.stdout
