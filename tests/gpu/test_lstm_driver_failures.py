"""What the LSTM of the core makes of a CUDA driver that fails."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import skip
from tests.core_api import OUT_OF_MEMORY, CallFailed, last_error
from tests.core_lstm_api import both_ways
from tests.gpu.fake_driver import Driver, driver_fixture
from tests.gpu.lstm_replay import LstmLender
from tests.gpu.test_driver_failures import DRIVER_ERROR, GIVING_BACK, REASON
from tests.lstm_cases import LstmCase, build

native: Any = pytest.importorskip("tests._core.native")
__all__ = ["driver_fixture"]

# With several launches, memory that is set, and offsets.
CASES = (
    LstmCase("failures", 2, 300, 3, 20, lengths=(2,) * 290 + (1,) * 10),
    LstmCase("failures_cell", 1, 150, 3, 20, cell=True),
    LstmCase("failures_steps", 2, 40, 3, 70),
    LstmCase("failures_clusters", 2, 12, 3, 140),
)
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
MOST_CALLS = 400


def name_of(case: LstmCase) -> str:
    return f"lstm{'_cell' * case.cell}"


@pytest.fixture(autouse=True)
def built(driver: Driver, request: pytest.FixtureRequest) -> None:
    if not native.cuda_kernels():
        skip("nvcc", "this build has no kernels of CUDA C++")
    if request.node.callspec.params["case"].id == "failures_clusters":
        driver.set_occupancy(6)


class Call:
    """Both passes of a case, as often as wanted; nothing is run."""

    def __init__(self, case: LstmCase) -> None:
        dtype = "float16" if case.id == "failures_clusters" else "float32"
        self.problem = build(case, dtype)

    def __call__(self, **options: Any) -> tuple[LstmLender, int]:
        lender = LstmLender(dtype=self.problem.dtype, interpret=False, **options)
        try:
            both_ways(self.problem, lender=lender)
        except CallFailed as failure:
            return lender, failure.status
        return lender, 0


def fail_once(driver: Driver, call: Call, index: int, stream: int) -> str:
    """What fails if the driver's call of this index does, or nothing if there are fewer."""
    driver.clear()
    held = driver.held
    driver.fail_call(index)
    _, status = call(stream=stream)
    failed, text = driver.failed, last_error()
    driver.clear()
    assert driver.held == held, f"after a failure of {failed}"
    if not failed or (failed in GIVING_BACK and not status):
        assert not status
        return failed
    assert status == DRIVER_ERROR, f"{failed}: {text}"
    name = name_of(call.problem.case)
    assert text == f"{name}: {failed.removesuffix('_v2')} failed: {REASON}"
    return failed


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@every_op
def test_every_driver_call_may_fail(driver: Driver, case: LstmCase, first: bool) -> None:
    """Of the first calls in a context, or of later ones. The next call does what this could not."""
    call = Call(case)
    with driver.stream() as stream:
        call(stream=stream)  # the first one in the process may do more
    with driver.stream() as stream:
        for _ in range(2 - first):
            driver.clear()
            before = driver.modules
            assert call(stream=stream)[1] == 0, last_error()
        wanted, loaded = set(driver.calls), driver.modules - before
        names = [launch.entry for launch in driver.launches()]
    assert ("cuModuleLoadData" in wanted) == first
    assert "cuLaunchKernelEx" in wanted
    assert ("cuMemsetD32Async" in wanted) == (case.id in ("failures", "failures_clusters"))
    clusters = first and case.id == "failures_clusters"
    assert ("cuOccupancyMaxActiveClusters" in wanted) == clusters
    seen = set()
    context = driver.new_context()
    for index in range(MOST_CALLS):
        context = driver.new_context() if first else context
        with driver.stream(context) as stream:
            if not first:
                assert call(stream=stream)[1] == 0
            before = driver.modules
            failed = fail_once(driver, call, index, stream)
            if not failed:
                break
            seen.add(failed)
            assert call(stream=stream)[1] == 0, f"{failed}: {last_error()}"
            assert driver.modules - before == loaded, failed
            assert [launch.entry for launch in driver.launches()] == names
    assert seen == wanted


@every_op
def test_every_allocation_may_fail(driver: Driver, case: LstmCase) -> None:
    call = Call(case)
    for index in range(MOST_CALLS):
        held = driver.held
        with driver.stream() as stream:
            lender, status = call(fail_allocation=index, stream=stream)
        assert driver.held == held
        if not status:
            break
        assert status == OUT_OF_MEMORY and len(lender.scratch) == index
        assert last_error().startswith(f"{name_of(case)}: ")
    # Backward gradients of gates, sums, and what is exchanged or carried; a layer forward the last,
    # but for clusters.
    assert index >= 4 - (case.cell or case.id == "failures_clusters")
