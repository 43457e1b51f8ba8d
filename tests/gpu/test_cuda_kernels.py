"""Kernels of CUDA C++ as the core loads and launches them; nothing runs them here."""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import skip
from tests.gpu import fake_driver
from tests.gpu.fake_driver import DEVICES, OLD, PLAIN, Driver, driver_fixture  # noqa: F401

native: Any = pytest.importorskip("tests._core.native")
THREADS, SHARED = 128, 60 << 10
MOST_CALLS = 50
FAILED = "failed: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"


def entries(arch: int = 90) -> list[list[str]]:
    """Of each file of machine code for this architecture."""
    found = defaultdict(list)
    for of, entry, _, offset in native.cuda_kernels():
        if of == arch:
            found[offset].append(entry)
    return list(found.values())


@pytest.fixture(name="entry")
def entry_fixture(driver: Driver) -> Iterator[str]:
    """One for the first device."""
    if not entries():
        skip("nvcc", "this build has no kernels of CUDA C++ for architecture 9.0")
    yield entries()[0][0]


def resident(stream: int, entry: str, index: int = PLAIN, shared: int = SHARED) -> int:
    return native.cuda_resident(index, stream, entry, THREADS, shared)


def test_what_is_built(driver: Driver, entry: str) -> None:
    rows = native.cuda_kernels()
    assert len({row[:2] for row in rows}) == len(rows)
    assert all(arch % 10 == 0 and 0 < registers <= 255 for arch, _, registers, _ in rows)


def test_kernels_share_what_they_are_loaded_from(driver: Driver, entry: str) -> None:
    with driver.stream() as stream:
        before = driver.modules
        for number, file in enumerate(entries(), 1):
            for name in file:
                assert resident(stream, name) == DEVICES[PLAIN].multiprocessors
                assert driver.modules == before + number
        driver.clear()
        resident(stream, entry)
        assert driver.calls == ["cuStreamGetCtx", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]


def test_threads_that_ask_at_once_load_once(driver: Driver, entry: str) -> None:
    driver.set_load_delay(2000)
    with driver.stream() as stream, ThreadPoolExecutor(8) as pool:
        before = driver.modules
        found = list(pool.map(lambda name: resident(stream, name), entries()[0] * 4))
        assert set(found) == {DEVICES[PLAIN].multiprocessors}
        assert driver.modules == before + 1
        assert driver.calls.count("cuModuleGetFunction") == len(entries()[0])


def test_a_launch_is_cooperative(driver: Driver, entry: str) -> None:
    given = bytes(i % 251 for i in range(4096))
    driver.set_occupancy(2)
    with driver.stream() as stream:
        native.cuda_launch(PLAIN, stream, entry, THREADS, SHARED, 6, given)
        (launch,) = driver.launches()
    assert launch.entry == entry and launch.stream == stream
    assert launch.cooperative and launch.attributes == 1 and launch.cluster == (0, 0, 0)
    assert (launch.grid, launch.block, launch.shared) == ((6, 1, 1), (THREADS, 1, 1), SHARED)
    (argument,) = launch.arguments
    assert len(argument) > 100 and argument == given[: len(argument)]


def test_blocks_that_would_wait_for_ever_are_refused(driver: Driver, entry: str) -> None:
    driver.set_occupancy(2)
    text = f"kernel {entry} needs 7 blocks at once, the device has room for 6"
    with driver.stream() as stream:
        assert resident(stream, entry) == 6
        with pytest.raises(RuntimeError, match=text):
            native.cuda_launch(PLAIN, stream, entry, THREADS, SHARED, 7, bytes(4096))
    assert driver.launch_count == 0 and not driver.complaint


def test_more_shared_memory_than_there_is(driver: Driver, entry: str) -> None:
    most = DEVICES[PLAIN].shared
    text = f"kernel {entry} needs {most + 1} bytes of shared memory, the device has {most}"
    with driver.stream() as stream:
        before = driver.modules
        with pytest.raises(RuntimeError, match=text):
            resident(stream, entry, shared=most + 1)
        assert driver.modules == before
        assert resident(stream, entry, shared=most)


def test_an_architecture_without_kernels(driver: Driver, entry: str) -> None:
    archs = sorted({arch for arch, *_ in native.cuda_kernels()})
    built = ", ".join(str(arch / 10) for arch in archs)
    text = f"this build has no LSTM kernels for architecture 7.5: it was built for {built}"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        native.cuda_find(OLD, entry)
    with pytest.raises(RuntimeError, match=r"no kernel other for architecture 9\.0"):
        native.cuda_find(PLAIN, "other")


@pytest.mark.parametrize("index", range(len(DEVICES)), ids=lambda i: f"{i}_{DEVICES[i].arch}")
def test_code_runs_on_later_devices_of_its_major_number(
    driver: Driver,
    index: int,
) -> None:
    arch = DEVICES[index].arch
    files = entries(arch // 10 * 10)
    if not files:
        with pytest.raises(RuntimeError, match=f"architecture {arch / 10}|LSTM kernels"):
            native.cuda_find(index, "lstm")
        return
    with driver.stream(driver.new_context(index)) as stream:
        try:
            found = resident(stream, files[0][0], index)
        except RuntimeError as error:
            # Nothing else is built for this one.
            assert str(error).startswith("this build has GPU kernels for")
        else:
            assert found == DEVICES[index].multiprocessors


def test_every_call_of_a_first_use_may_fail(driver: Driver, entry: str) -> None:
    seen = set()
    for index in range(MOST_CALLS):
        with driver.stream() as stream:  # of a new context
            before, held = driver.modules, driver.held
            driver.fail_call(index)
            try:
                native.cuda_launch(PLAIN, stream, entry, THREADS, SHARED, 3, bytes(4096))
                native.cuda_set_bits(PLAIN, stream, 64, 5)
            except RuntimeError as error:
                text = f"{driver.failed.removesuffix('_v2')} {FAILED}"
                assert str(error) == text
            failed = driver.failed
            driver.clear()
            assert driver.held == held
            if not failed:
                break
            seen.add(failed)
            native.cuda_launch(PLAIN, stream, entry, THREADS, SHARED, 3, bytes(4096))
            assert driver.launch_count == 1 and driver.modules == before + 1
    assert {
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        "cuLaunchKernelEx",
        "cuMemsetD32Async",
    } <= seen


def test_a_capture_takes_all_of_it(driver: Driver, entry: str) -> None:
    with driver.stream() as stream, driver.capture(stream):
        native.cuda_set_bits(PLAIN, stream, 64, 5)
        native.cuda_launch(PLAIN, stream, entry, THREADS, SHARED, 3, bytes(4096))
        (launch,) = driver.launches()
        assert launch.captured


def test_bits_of_words_are_set(driver: Driver, entry: str) -> None:
    words = (ctypes.c_uint32 * 9)()
    at = ctypes.addressof(words)
    with driver.stream() as stream:
        native.cuda_set_bits(PLAIN, stream, at, 0)
        assert "cuMemsetD32Async" not in driver.calls
        native.cuda_set_bits(PLAIN, stream, at, 9)
        assert driver.memsets == [fake_driver.Memset(at, 9, 0, stream, 0xFFFFFFFF)]
