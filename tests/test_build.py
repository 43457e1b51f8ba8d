"""How bindings are found, compiled and cached, and what the compiled files may contain."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import twinfuse
from tests.conftest import require, skip
from twinfuse import _build, _core

Compiler = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no prebuilt binding, so that bindings have to be compiled."""
    if reason := _build._missing_core():
        skip("core", reason)
    require("torch")
    monkeypatch.setenv("TWINFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "package_folder", lambda name: tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Puts a program in place of the compiler: it notes each link, and succeeds or fails."""

    def install(exit_code: int = 0) -> Path:
        links, program = tmp_path / "links", tmp_path / "compiler"
        links.write_text("")
        program.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text('made')\n"
            f"if '-shared' in sys.argv: open({str(links)!r}, 'a').write('link\\n')\n"
            "print('the complaint', file=sys.stderr)\n"
            f"sys.exit({exit_code})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))
        return links

    return install


def test_compiled_once_and_kept(
    cache: Path, compiler: Compiler, capfd: pytest.CaptureFixture[str]
) -> None:
    links = compiler()
    path, reason = _build.status("torch")
    assert path is None
    assert "will be compiled" in reason
    assert not cache.exists(), "asking for the status must not make anything"

    path, reason = _build.torch_binding()
    assert (path is not None, reason) == (True, "")
    assert path is not None and path.parent == cache and path.read_text() == "made"
    assert capfd.readouterr().err.count("\n") == 1, "one line of progress"
    assert _build.torch_binding() == (path, "") == _build.status("torch")
    assert links.read_text().count("link") == 1
    assert capfd.readouterr().err == ""
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {file.suffix for file in cache.iterdir()} == {".so", ".lock"}, "nothing half-made stays"


def test_failure_is_remembered_and_explained(
    cache: Path, compiler: Compiler, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler(exit_code=1)
    path, reason = _build.torch_binding()
    assert path is None
    (log,) = cache.glob("*.log")
    assert str(log) in reason
    assert "the complaint" in log.read_text()
    capfd.readouterr()

    links = compiler()
    assert _build.torch_binding() == (None, reason), "an import must not wait for it every time"
    assert _build.status("torch") == (None, reason)
    assert capfd.readouterr().err == ""
    log.unlink()
    assert _build.torch_binding()[0] is not None
    assert links.read_text().count("link") == 1


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    path, reason = _build.torch_binding()
    assert path is None
    assert "no C++ compiler" in reason
    assert not cache.exists()


def test_cache_open_to_others_is_refused(cache: Path, compiler: Compiler) -> None:
    links = compiler()
    cache.mkdir()
    for mode in (0o777, 0o720):
        cache.chmod(mode)
        path, reason = _build.torch_binding()
        assert path is None
        assert "writable by others" in reason
    assert links.read_text() == ""


def test_cache_of_another_user_is_refused(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = compiler()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    path, reason = _build.torch_binding()
    assert path is None
    assert "belongs to another user" in reason
    assert links.read_text() == ""


def test_a_cached_binding_is_trusted_only_from_a_cache_of_our_own(
    cache: Path, compiler: Compiler
) -> None:
    compiler()
    assert _build.torch_binding()[0] is not None
    cache.chmod(0o777)
    path, reason = _build.torch_binding()
    assert path is None
    assert "writable by others" in reason


def test_key_follows_version_and_sources(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    framework = _build.find("torch")
    assert framework is not None
    names = {_build._cached(framework), _build._cached(framework)}
    names.add(_build._cached(framework._replace(version="2.12.1")))
    for changed in ("csrc/include/twinfuse/core.h", "pyext/binding/linear_relu.cc"):
        for file in _build.source_files("torch"):
            copy = tmp_path / changed.replace("/", "_") / file.relative_to(_build.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes() + (b"//" if str(file).endswith(changed) else b""))
        monkeypatch.setattr(_build, "ROOT", tmp_path / changed.replace("/", "_"))
        names.add(_build._cached(framework))
        monkeypatch.undo()
        monkeypatch.setenv("TWINFUSE_CACHE", str(cache))
    assert len(names) == 4


def test_old_framework(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _build.Framework("torch", "2.9.1", "/nowhere")
    monkeypatch.setattr(_build, "find", lambda name: old)
    for path, reason in (_build.torch_binding(), _build.status("torch")):
        assert path is None
        assert "PyTorch 2.9.1 is older than 2.10" in reason


def test_unloadable_prebuilt_is_replaced(cache: Path, compiler: Compiler) -> None:
    links = compiler()
    prebuilt = _build.package_folder("torch") / "_C.abi3.so"
    prebuilt.write_text("for another torch")
    assert _build.torch_binding() == (prebuilt, "")
    path, reason = _build.torch_binding(unloadable=prebuilt)
    assert (path is not None, reason) == (True, "")
    assert path != prebuilt
    assert links.read_text().count("link") == 1
    # What was built on this machine and does not load either is given up.
    path, reason = _build.torch_binding(unloadable=path)
    assert path is None
    assert "does not load" in reason


def test_tensorflow_binding_serves_one_minor_version() -> None:
    names = {
        _build.file_name(_build.Framework("tensorflow", version, "/nowhere"))
        for version in ("2.21.0", "2.21.3", "2.20.0", "2.22.0-rc1")
    }
    assert names == {"_tf_2_21.so", "_tf_2_20.so", "_tf_2_22.so"}


def _dynamic(path: Path, tag: str) -> set[str]:
    output = subprocess.check_output(["readelf", "-d", path], text=True)
    return set(re.findall(rf"\({tag}\).*\[(.*)\]", output))


def test_bindings_find_core_and_framework_by_name_only() -> None:
    assert _dynamic(_core.LIBRARY, "SONAME") == {"libtwinfuse.so"}
    for name in _build.SOURCES:
        require(name)
        path, reason = _build.status(name)
        assert path is not None, reason
        assert "libtwinfuse.so" in _dynamic(path, "NEEDED")
        assert not _dynamic(path, "RUNPATH") | _dynamic(path, "RPATH")


def test_core_needs_and_shows_nothing_else() -> None:
    allowed = r"lib(stdc\+\+|m|gcc_s|c|pthread|asan|ubsan)\.so\.\d+|ld-linux.*"
    needed = _dynamic(_core.LIBRARY, "NEEDED")
    assert not {name for name in needed if not re.fullmatch(allowed, name)}
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", _core.LIBRARY], text=True)
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert not {name for name in names if not name.startswith("twinfuse_")}


def test_core_is_small() -> None:
    """Machine code for all architectures would be as large by itself, were it not packed."""
    assert _core.LIBRARY.stat().st_size < 45e6


def test_no_code_of_one_instruction_set_can_serve_another() -> None:
    """Functions that the linker merges by name must carry the name of their instruction set.

    The linker keeps one copy of an inline function, whatever flags it was compiled with: one of an
    AVX-512 object in the portable path would crash an older processor.
    """
    objects = sorted((_build.ROOT / "build/objects/csrc/cpu").glob("kernels.*.o"))
    if _build.INSTALLED or not objects:
        pytest.skip("needs the objects of a build in this checkout")
    for path in objects:
        isa = path.name.split(".")[1]
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", path], text=True)
        merged = re.findall(r"^[0-9a-f]+ [Wu] (.*)$", symbols, re.MULTILINE)
        # A name that `nm` cannot read stays as it is in the object.
        ours = re.compile(rf"twinfuse::cpu::{isa}::|^_ZZ?N8twinfuse3cpu{len(isa)}{isa}")
        foreign = [name for name in merged if not ours.search(name)]
        assert not foreign, f"{path.name}: {foreign}"


def test_native_module_is_the_same_core() -> None:
    native = pytest.importorskip("tests._core.native")
    assert native.abi_version() == _core.ABI_VERSION
    assert native.version() == twinfuse.__version__ == _core.version()
    assert native.isa() == _core.isa()
    assert native.built_isas() == ",".join(_core.built_isas())


def test_import_is_light() -> None:
    """`import twinfuse` loads no framework and no NumPy, and takes no time to speak of."""
    program = (
        "import sys, time; start = time.process_time(); import twinfuse;"
        "print(time.process_time() - start, *sys.modules)"
    )
    runs = [subprocess.check_output([sys.executable, "-c", program], text=True) for _ in range(3)]
    modules = set(runs[0].split()[1:])
    assert not modules & {"torch", "tensorflow", "keras", "numpy", "triton"}
    assert min(float(run.split()[0]) for run in runs) < 0.15  # seconds of processor time
