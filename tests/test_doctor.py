"""`twinfuse.doctor()` and `python -m twinfuse doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import twinfuse
from tests.conftest import require, skip
from twinfuse import _build, _core


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twinfuse", *arguments]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_command_prints_what_the_function_returns() -> None:
    printed = run("doctor", "--json")
    assert printed.returncode == 0, printed.stderr
    found = json.loads(printed.stdout)
    assert found == twinfuse.doctor() | {"kernels": found["kernels"]}
    assert found["versions"]["twinfuse"] == twinfuse.__version__
    page = run("doctor").stdout
    for text in (twinfuse.__version__, *found, *found["devices"]):
        assert text.replace("_", " ") in page


def test_unknown_command() -> None:
    assert run("docter").returncode == 2
    assert run().returncode == 2


def test_describes_the_core() -> None:
    if reason := _build._missing_core():
        skip("core", reason)
    core = twinfuse.doctor()["core"]
    assert core["problem"] == ""
    assert Path(core["library"]).samefile(_core.LIBRARY)
    assert core["isa"] in core["built_isas"]


@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_describes_an_installed_framework(name: str) -> None:
    framework = require(name)
    found = twinfuse.doctor()
    assert found["versions"][name] == framework.__version__
    binding = found["bindings"][name]
    assert binding["problem"] == ""
    assert Path(binding["path"]).is_file()
    assert found["advice"] == []
    assert f"{binding['serves']}, {binding['origin']}: {binding['path']}" in str(found)


def test_counts_launches() -> None:
    torch = require("torch")
    import twinfuse.torch as tft

    before = twinfuse.doctor()["kernels"]
    tft.linear_relu(torch.ones(2, 3), torch.ones(4, 3))
    after = twinfuse.doctor()["kernels"]
    assert sum(after.values()) == sum(before.values()) + 1


def test_imports_no_framework_and_compiles_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, twinfuse; from twinfuse import _build;"
        f"_build.package_folder = lambda name: _build.Path({str(tmp_path)!r});"
        "found = twinfuse.doctor();"
        "print({'torch', 'tensorflow', 'keras'} & set(sys.modules), found['advice'])"
    )
    cache = tmp_path / "cache"
    environment = os.environ | {"TWINFUSE_CACHE": str(cache)}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert output.startswith("set()")
    assert not cache.exists()
    for name in _build.SOURCES:
        if _build.find(name):
            assert f"import twinfuse.{name}" in output


def test_without_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "load", lambda: (None, "the compiled core is missing"))
    found = twinfuse.doctor()
    assert found["core"]["problem"] == "the compiled core is missing"
    assert found["kernels"] == {}
    assert any("compiler" in advice for advice in found["advice"])
    assert "the compiled core is missing" in str(found)


def test_without_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find", lambda name: None)
    found = twinfuse.doctor()
    assert found["versions"]["torch"] == found["versions"]["tensorflow"] == ""
    assert found["bindings"]["torch"]["problem"] == "PyTorch is not installed"
    assert any(advice.startswith("install torch") for advice in found["advice"])


def test_with_an_old_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    old = _build.Framework("torch", "2.9.1", "/nowhere")
    monkeypatch.setattr(_build, "find", lambda name: old if name == "torch" else None)
    (advice,) = twinfuse.doctor()["advice"]
    assert advice.startswith("upgrade torch: PyTorch 2.9.1 is older than 2.10")


def test_says_when_the_wanted_instruction_set_is_not_there() -> None:
    if reason := _build._missing_core():
        skip("core", reason)
    found = json.loads(run("doctor", "--json", TWINFUSE_ISA="mmx").stdout)
    assert "mmx" in found["core"]["isa_note"]
    assert any("TWINFUSE_ISA" in advice for advice in found["advice"])
