"""GPUs of an architecture that nothing is built for: Triton compiles kernels when they are used."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import twinfuse
from tests.conftest import require
from tests.core_api import GRADIENTS, OK, OUT_OF_MEMORY, UNSUPPORTED, last_error, load
from tests.core_cases import BY_ID, output_layouts
from tests.gpu import fake_driver, launcher
from tests.gpu.fake_driver import NEW, ODD, OLD, PLAIN, Driver, driver_fixture  # noqa: F401
from tests.gpu.launch_cases import CASES as VECTORS
from tests.gpu.replay import GpuLender
from tests.gpu.test_driver_failures import CASES, Call
from tests.gpu.test_launches import check, loads
from tests.problem import Case
from twinfuse import _build, _core, _jit

SOME = [BY_ID["linear_relu at_block"], VECTORS[0], BY_ID["conv_relu three_by_three_stride_nhwc"]]
SOME.append(next(case for case in VECTORS if case.id == "vectors_stride"))
Compiler = Callable[[str, int, int, Any], tuple[int, str]]


@pytest.fixture(autouse=True, scope="module")
def _cache() -> Iterator[None]:
    """One for all runs: what is compiled is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINFUSE_CACHE", str(launcher.ROOT / "build" / "jit_cache"))
        yield


@contextmanager
def compiler(compile: Compiler | None) -> Iterator[None]:
    """Another compiler than Triton, or none."""

    @_jit._Compiler
    def call(name: bytes, listed: int, arch: int, kernel: Any, message: int, room: int) -> int:
        assert compile is not None
        status, text = compile(name.decode(), listed, arch, kernel.contents)
        ctypes.memmove(message, text.encode() + b"\0", len(text) + 1)
        return status

    library = load()
    library.twinfuse_set_kernel_compiler(call if compile else None)
    try:
        yield
    finally:
        library.twinfuse_set_kernel_compiler(_jit._compile)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda case: f"{case.op}-{case.id}")
def test_case(driver: Driver, case: Case, dtype: str) -> None:
    parts = (GRADIENTS, ("grad_weight",))
    lender = check(case, dtype, output_layouts(case)[-1], index=NEW, parts=parts)
    assert {ran.kernel["arch"] for ran in lender.ran} == {110}
    assert {ran.launch.device for ran in lender.ran} == {NEW}
    assert not any(ran.name.startswith("tensor_") for ran in lender.ran)


def test_what_serves_a_device(driver: Driver) -> None:
    assert _core.device_backend(PLAIN) == ("cuda", "")
    assert _core.device_backend(NEW) == ("triton", "")
    backend, reason = _core.device_backend(OLD)
    assert backend == "" and "7.5" in reason
    assert "CUDA_ERROR_INVALID_DEVICE" in _core.device_backend(len(fake_driver.DEVICES))[1]
    assert _core.reported("kernel", "", "cuda", NEW) == ("triton", "kernel", "")
    assert _core.reported("kernel", "", "cuda", OLD) == ("reference", "", reason)
    assert _core.serves("triton", "cuda", NEW) and not _core.serves("cuda", "cuda", NEW)


def test_without_triton(driver: Driver) -> None:
    with compiler(None):
        for _ in range(2):
            assert Call(CASES[0], False)(GpuLender(index=NEW)) == UNSUPPORTED
            assert "11.0" in last_error() and "pip install triton" in last_error()
        assert _core.device_backend(NEW) == ("", last_error().removeprefix("linear_relu: "))
        assert driver.launch_count == 0
        assert Call(CASES[0], False)(GpuLender()) == OK
    assert Call(CASES[0], False)(GpuLender(index=NEW)) == OK


def test_what_triton_does_not_compile(driver: Driver) -> None:
    for _ in range(2):
        assert Call(CASES[0], False)(GpuLender(index=ODD)) == UNSUPPORTED
        assert "for architecture 10.1: Triton does not compile it: " in last_error()
    assert driver.launch_count == 0


@pytest.mark.parametrize(("status", "calls"), [(UNSUPPORTED, 1), (OUT_OF_MEMORY, 3)])
def test_failures_are_remembered_unless_they_may_pass(
    driver: Driver, status: int, calls: int
) -> None:
    asked = []

    def fail(name: str, listed: int, arch: int, kernel: Any) -> tuple[int, str]:
        asked.append((name, listed, arch))
        return status, "no such luck"

    with driver.stream(driver.new_context(NEW)) as stream, compiler(fail):
        for _ in range(3):
            assert Call(CASES[0], False)(GpuLender(stream=stream)) == UNSUPPORTED
            name, _, arch = asked[0]
            text = f"linear_relu: kernel {name} for architecture 11.0: no such luck"
            assert last_error() == text and arch == 110
    assert len(asked) == calls


def test_code_that_needs_too_much_shared_memory(driver: Driver) -> None:
    def greedy(name: str, listed: int, arch: int, kernel: Any) -> tuple[int, str]:
        found = _jit.kernel_of(name, listed, arch)
        kernel.image = ctypes.cast(ctypes.c_char_p(found.image), ctypes.c_void_p)
        kernel.entry, kernel.warps, kernel.shared = found.entry, 4, 1 << 20
        return OK, ""

    with driver.stream(driver.new_context(NEW)) as stream, compiler(greedy):
        assert Call(CASES[0], False)(GpuLender(stream=stream)) == UNSUPPORTED
    assert f"needs {1 << 20} bytes of shared memory, the device has {227 << 10}" in last_error()
    assert driver.launch_count == loads(driver) == 0


def test_first_calls_while_a_stream_is_captured(driver: Driver) -> None:
    context = driver.new_context(NEW)
    with driver.stream(context) as stream, driver.capture_mode(0), driver.capture(stream):
        lender = check(SOME[0], "float16", stream=stream, compute=False)
    assert {ran.launch.captured for ran in lender.ran} == {True}


def test_many_threads_compile_once(driver: Driver) -> None:
    call, count, asked = Call(CASES[0], False), 8, []
    context = driver.new_context(NEW)
    streams = [driver.library.fake_create_stream(context, False) for _ in range(count)]
    barrier, statuses = threading.Barrier(count), []

    def slow(name: str, listed: int, arch: int, kernel: Any) -> tuple[int, str]:
        asked.append(name)
        barrier.wait()  # all of them ask before one is answered
        status = _jit._compile(name.encode(), listed, arch, ctypes.pointer(kernel), 0, 0)
        return status, ""

    def work(stream: int) -> None:
        statuses.append(call(GpuLender(stream=stream)))

    with compiler(slow):
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [OK] * count
    assert len(asked) == count * len(set(asked)) and loads(driver) == len(set(asked))
    for stream in streams:
        driver.library.fake_destroy_stream(stream)


def in_a_process(script: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    variables = {"TRITON_INTERPRET": "1"} | ({"TWINFUSE_CACHE": str(cache)} if cache else {})
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=launcher.ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def test_threads_that_hold_pythons_lock(driver: Driver, tmp_path: Path) -> None:
    """Calls that keep it while they are in the core, and the compiler that waits for it."""
    done = in_a_process(
        """
        import ctypes, threading
        from tests.core_api import OK, last_error, load
        from tests.gpu import fake_driver
        from tests.gpu.replay import GpuLender
        from tests.gpu.test_driver_failures import CASES, Call
        from twinfuse import _core
        driver = fake_driver.load()
        driver.set_load_delay(3000)
        holding = ctypes.PyDLL(str(_core.LIBRARY))
        context = driver.new_context(fake_driver.NEW)
        calls = [Call(case, backward) for case in CASES for backward in (False, True)]
        barrier, statuses = threading.Barrier(8), []
        def work(index):
            stream = driver.library.fake_create_stream(context, False)
            library = holding if index % 2 else load()
            barrier.wait()
            for i in range(len(calls)):
                call = calls[(i + index) % len(calls)]
                function = getattr(library, call.name)
                function.argtypes = getattr(load(), call.name).argtypes
                statuses.append(function(*call.arguments, GpuLender(stream=stream).context()))
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert statuses == [OK] * 32, (statuses, last_error())
        images = {launch.image for launch in driver.launches()}
        assert driver.calls.count("cuModuleLoadData") == driver.modules
        print(len(images) > 4)
        """,
        tmp_path,
    )
    assert done.stdout.strip() == "True"
    assert done.stderr.count("compiling GPU kernels for architecture 11.0") == 1


ONE = """
    from tests.core_api import OK, last_error
    from tests.gpu import fake_driver
    from tests.gpu.replay import GpuLender
    from tests.gpu.test_driver_failures import CASES, Call
    fake_driver.load()
    assert Call(CASES[0], False)(GpuLender(index=fake_driver.NEW)) == OK, last_error()
"""


def test_what_was_compiled_is_kept(driver: Driver, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "compiling" in in_a_process(ONE, cache).stderr
    kept, *_ = cache.rglob("*.json")
    content = kept.read_bytes()
    assert "compiling" not in in_a_process(ONE, cache).stderr
    kept.write_bytes(content[: len(content) // 2])
    assert "compiling" in in_a_process(ONE, cache).stderr
    assert kept.read_bytes() == content
    cache.chmod(0o777)  # others may have put code there
    assert "compiling" in in_a_process(ONE, cache).stderr


def test_sources_must_be_those_of_the_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWINFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(_jit, "_sources", "of another build")
    name = launcher.catalogue.variants(80)[0].name
    with pytest.raises(_jit.CompileError, match="other sources than these: reinstall twinfuse"):
        _jit.kernel_of(name, 80, 119)
    assert not list(tmp_path.rglob("*.json"))


def test_a_compiler_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWINFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(_jit.CompileError, match="does not run: "):
        _jit.kernel_of("any", 80, 119)


def test_an_interrupt_is_raised_behind_the_call(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with driver.stream(driver.new_context(NEW)) as stream:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_jit, "kernel_of", interrupted)
            assert Call(CASES[0], False)(GpuLender(stream=stream)) == UNSUPPORTED
            assert last_error().endswith(": interrupted")
            time.sleep(10)
        assert Call(CASES[0], False)(GpuLender(stream=stream)) == OK


def test_triton_is_looked_for_and_not_imported() -> None:
    if reason := _build._missing_core():
        pytest.skip(reason)
    program = "import sys, twinfuse; twinfuse.doctor(); print('triton' in sys.modules)"
    assert in_a_process(program).stdout.strip() == "False"


def test_explain_and_use_backend(driver: Driver) -> None:
    require("torch")
    import twinfuse.torch as tft

    def explained(index: int) -> tuple[str, str]:
        with FakeTensorMode():
            x, w = (torch.ones(4, 8, device=f"cuda:{index}") for _ in range(2))
            (row,) = twinfuse.explain(tft.linear_relu, x, w)
        assert bool(row.kernel) == (not row.reason)
        return row.backend, row.reason

    assert explained(PLAIN) == ("cuda", "")
    assert explained(NEW) == ("triton", "")
    backend, reason = explained(OLD)
    assert backend == "reference" and "7.5" in reason
    with twinfuse.use_backend("triton"):
        assert explained(NEW) == ("triton", "")
        backend, reason = explained(PLAIN)
        assert backend == "reference" and "backend 'triton' was asked for" in reason
    with twinfuse.use_backend("cuda"):
        assert explained(PLAIN) == ("cuda", "")
        assert explained(NEW)[0] == "reference"
