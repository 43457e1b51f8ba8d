"""Clusters of blocks, which the LSTM of the core launches on request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import skip
from tests.gpu import fake_driver
from tests.gpu.fake_driver import Driver, driver_fixture
from tests.gpu.replay import architectures
from tests.gpu.test_lstm_launches import built, by_direction, check
from tests.lstm_cases import LstmCase

native: Any = pytest.importorskip("tests._core.native")
__all__ = ["built", "driver_fixture"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_clusters(driver: Driver, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are asked for, the device has room for one and it takes all sequences."""
    fewest = 65 if dtype == "float32" else 129  # which no block has alone
    lengths = (3,) * 5 + (1,) * 6
    packed = LstmCase("packed", 3, 11, 6, fewest, lengths=lengths, zoneout="draws")
    for wanted, occupancy, case, used in (
        ("1", 6, packed, True),
        ("1", 6, LstmCase("masked", 3, 16, 6, 256, mask="interior", batch_first=True), True),
        ("1", 12, LstmCase("slices", 2, 32, 6, 200), True),
        ("1", 6, LstmCase("many", 2, 17, 6, 200), False),
        ("1", 5, LstmCase("no_room", 2, 3, 6, 200), False),
        ("0", 6, LstmCase("not_wanted", 2, 3, 6, 200), False),
    ):
        monkeypatch.setenv("TWINFUSE_LSTM_CLUSTERS", wanted)
        driver.set_occupancy(occupancy)
        with driver.stream() as stream:
            lender = check(case, dtype, stream=stream, compute=used and dtype != "bfloat16")
        for direction, kernels in by_direction(lender).items():
            there = used and (direction == "forward" or dtype != "float32")
            assert (kernels == ["cluster256"]) == there
        of_memory = [made for made in lender.recurrent if made.name.endswith("_256")]
        assert lender.sets == len(of_memory)


def test_clusters_of_other_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.0 has none."""
    if 80 not in architectures():
        skip("kernels", "none are built for architecture 80")
    monkeypatch.setenv("TWINFUSE_LSTM_CLUSTERS", "1")
    index = [device.arch for device in fake_driver.DEVICES].index(80)
    case = LstmCase("units", 2, 3, 6, 200)
    lender = check(case, "float16", index=index, compute=False)
    assert "cluster256" not in {name for names in by_direction(lender).values() for name in names}
