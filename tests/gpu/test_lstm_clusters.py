"""Clusters of blocks, which the forward pass of the core's LSTM launches."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import skip
from tests.core_api import last_error
from tests.gpu import fake_driver
from tests.gpu.fake_driver import LARGE, Driver, driver_fixture
from tests.gpu.replay import TF32, architectures
from tests.gpu.test_lstm_launches import built, by_direction, check
from tests.lstm_cases import LstmCase
from twinfuse import _core

native: Any = pytest.importorskip("tests._core.native")
__all__ = ["built", "driver_fixture"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_clusters(driver: Driver, dtype: str) -> None:
    """Where the device has room for them and they take all sequences; float32 as TF32."""
    fewest = 65 if dtype == "float32" else 129  # which no block has alone
    lengths = (3,) * 5 + (1,) * 6
    packed = LstmCase("packed", 3, 11, 6, fewest, lengths=lengths, zoneout="draws")
    wide = ["cluster512"] if dtype != "float32" else ["512"]
    for occupancy, case, used in (
        (6, packed, ["cluster256"]),
        (6, LstmCase("masked", 3, 16, 6, 256, mask="interior", batch_first=True), ["cluster256"]),
        (12, LstmCase("slices", 2, 32, 6, 200), ["cluster256"]),
        (12, LstmCase("many", 2, 33, 6, 200), ["256"]),
        (5, LstmCase("no_room", 2, 3, 6, fewest), ["256"]),
        (12, LstmCase("wide", 2, 3, 6, 257), wide),
    ):
        driver.set_occupancy(occupancy)
        computed = used == ["cluster256"] and dtype == "float16"
        with driver.stream() as stream:
            lender = check(case, dtype, stream=stream, compute=computed, precision=TF32)
        kernels = by_direction(lender)
        assert kernels["forward"] == used, case
        assert "cluster" not in "".join(kernels["backward"])


def test_no_clusters_for_exact_float32(driver: Driver) -> None:
    driver.set_occupancy(6)
    with driver.stream() as stream:
        lender = check(LstmCase("exact", 2, 3, 6, 65), "float32", stream=stream, compute=False)
    assert by_direction(lender)["forward"] == ["256"]


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_no_clusters_on_other_architectures(driver: Driver, arch: int) -> None:
    if arch not in architectures():
        skip("kernels", f"none are built for architecture {arch}")
    driver.set_occupancy(6)
    index = [device.arch for device in fake_driver.DEVICES].index(arch)
    case = LstmCase("units", 2, 3, 6, 200)
    with driver.stream(driver.new_context(index)) as stream:
        lender = check(case, "float16", index=index, stream=stream, compute=False)
    assert by_direction(lender)["forward"] == ["256"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernels_by_size(driver: Driver, dtype: str) -> None:
    """What the core says is what it launches."""
    for case in (
        LstmCase("alone", 2, 3, 6, 20),
        LstmCase("cluster", 2, 3, 6, 200),
        LstmCase("wide_cluster", 2, 3, 6, 300),
        LstmCase("shared", 2, 3, 6, 600),
        LstmCase("steps", 2, 3, 6, 2000),
        LstmCase("cell", 1, 3, 6, 20, cell=True),
    ):
        lender = check(case, dtype, index=LARGE, compute=False, precision=TF32)
        sizes = {"steps": case.steps, "batch": case.batch, "units": case.units}
        for direction, kernels in by_direction(lender).items():
            said = _core.lstm_gpu_kernel(direction == "backward", dtype, True, LARGE, **sizes)
            assert said.split("_")[1] == direction
            assert {said.split("_")[-1]} == set(kernels), case
    sizes = {"steps": 2, "batch": 3, "units": 20}
    assert _core.lstm_gpu_kernel(False, "float64", False, LARGE, **sizes) == ""
    assert "float64" in last_error()
    assert _core.lstm_gpu_kernel(False, dtype, False, LARGE, **sizes | {"units": 0}) == ""
