"""The LSTM of the core on a GPU, by way of the fake driver: the table, computed, and what calls ask
of the driver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.arrays import STORAGE, Array
from tests.conftest import Launched, skip
from tests.core_api import UNSUPPORTED, CallFailed, last_error
from tests.core_lstm_api import (
    GRADIENTS,
    SAVED,
    backward,
    both_ways,
    forward,
    saved_sizes,
    without_saved,
)
from tests.gpu import fake_driver
from tests.gpu.fake_driver import LARGE, NEW, OLD, PLAIN, Driver, driver_fixture
from tests.gpu.lstm_replay import OFFSETS, LstmLender
from tests.gpu.replay import TF32, Ran, architectures
from tests.lstm_cases import BY_ID, CASES, LstmCase, LstmProblem, assert_close, build
from tests.rule import assert_same_bits

native: Any = pytest.importorskip("tests._core.native")
__all__ = ["driver_fixture"]

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16"])
every_kind = pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
MOST_WORK = 20_000
ALONE = 64  # units that one block takes
SOME = [
    BY_ID[name]
    for name in (
        "batch_first_reverse", "packed_stairs", "mask_interior_zero", "zoneout_draws", "keras",
        "no_steps", "no_batch", "many_sequences", "above_tile", "cell_3_5_17",
        "cell_broadcast_rows", "cell_7_64_65",
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def built(driver: Driver, request: pytest.FixtureRequest) -> Iterator[None]:
    if not native.cuda_kernels() and "not_built" not in request.node.name:
        skip("nvcc", "this build has no kernels of CUDA C++")
    yield


def of_kind(cell: bool) -> LstmCase:
    """With all that a call of this kind may do: several launches, memory that is set, offsets."""
    if cell:
        return LstmCase("all_cell", 1, 150, 3, 20, cell=True)
    return LstmCase("all", 2, 150, 3, 20, lengths=(2,) * 140 + (1,) * 10)


def why_not_served(problem: LstmProblem) -> str | None:
    case = problem.case
    reasons = {
        "a projection": case.projection,
        "peepholes": case.peephole,
        "normalised gates": case.norm,
        "dropped inputs": case.dropout in ("both", "input"),
        "dropped states": case.dropout,
    }
    for what, wanted in reasons.items():
        if wanted:
            return f"no GPU kernel computes {what}"
    input = problem.operands["input"]
    if len(input.sizes) == 3:
        step, row, _ = input.strides
        at = np.arange(case.steps)[:, None] * step + np.arange(case.batch) * row
        if len({*np.diff((at.T if case.batch_first else at).ravel())}) > 1:
            return "rows of the input lie at uneven distances"
    return None


def close(problem: LstmProblem, results: dict[str, Array]) -> None:
    # The parts of numbers below the normal ones have few bits, if any.
    few = problem.dtype == "float32" and problem.case.values == "tiny"
    assert_close(problem, without_saved(results), flushed_below=16 * 2.0**-126 * few)


def check(case: LstmCase, dtype: str, *, compute: bool = True, **options: Any) -> LstmLender:
    """Both passes of a case, within the rule where they are computed."""
    problem, compute = build(case, dtype), compute and dtype != "bfloat16"
    lender = LstmLender(dtype=dtype, interpret=compute, **options)
    results = both_ways(problem, lender=lender)
    if compute:
        close(problem, results)
    return lender


def nothing_saved(problem: LstmProblem) -> dict[str, Array]:
    sizes = saved_sizes(problem.case)
    return {name: np.zeros(sizes[name], STORAGE[problem.dtype]) for name in SAVED}


def assert_refused(problem: LstmProblem, reason: str, **options: Any) -> None:
    """Both passes, and nothing is launched."""
    before, op = fake_driver.load().launch_count, f"lstm{'_cell' * problem.case.cell}"

    def lender() -> LstmLender:
        return LstmLender(dtype=problem.dtype, **options)

    with pytest.raises(CallFailed) as failure:
        forward(problem, lender())
    assert failure.value.status == UNSUPPORTED
    assert last_error().startswith(f"{op}: {reason}")
    with pytest.raises(CallFailed) as failure:
        backward(problem, nothing_saved(problem), lender())
    assert failure.value.status == UNSUPPORTED
    assert last_error().startswith(f"{op}: {reason}")
    assert fake_driver.load().launch_count == before


def computed(case: LstmCase, dtype: str) -> bool:
    """All take too long: what is large runs where it is fastest, and of the rest one in three in
    both types."""
    if case.steps > 100 or case.steps * case.batch * case.units > MOST_WORK:
        return False
    if case.units > ALONE or case.batch > 32:
        return dtype == "float16"
    return dtype == "float32" or CASES.index(case) % 3 == 0


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: LstmCase, dtype: str) -> None:
    """On a device that has few blocks for a batch, or many."""
    problem = build(case, dtype)
    few = case.units <= ALONE and (CASES.index(case) + (dtype == "float16")) % 2
    index = PLAIN if few else LARGE
    if reason := why_not_served(problem):
        assert_refused(problem, reason, index=index)
    else:
        check(case, dtype, index=index, compute=computed(case, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 86, 100, 120])
def test_other_architectures(driver: Driver, arch: int, dtype: str) -> None:
    if (80 if arch == 86 else arch) not in architectures():
        skip("kernels", f"none are built for architecture {arch}")
    index = [device.arch for device in fake_driver.DEVICES].index(arch)
    driver.set_occupancy(4)
    context = driver.new_context(index)
    with driver.stream(context) as stream:
        for case in SOME:
            compute = dtype == ("float32" if arch == 80 else "float16") and computed(case, dtype)
            lender = check(case, dtype, index=index, stream=stream, compute=compute)
            assert {made.launch.context for made in lender.launched} == {context}


def spans(lender: LstmLender, direction: str, units: int) -> list[tuple[int, int, int, int]]:
    """First sequence, sequences, those of a slice, and blocks, by launch."""
    found = []
    for made in lender.recurrent:
        if made.name.startswith(f"lstm_{direction}"):
            assert made.name.endswith(f"_{units}")
            shared = made.arguments.shared
            found.append((shared.first, shared.count, shared.slice, made.launch.grid[0]))
    return found


# Of a slice in one block, and by how many blocks 20 units are shared, forward and backward.
FEWEST = {"float32": (4, 3, 2), "float16": (8, 2, 2)}


@every_dtype
def test_slices_and_launches(driver: Driver, dtype: str) -> None:
    """One block has all units until others can take more sequences."""
    alone, *shared = FEWEST[dtype]
    for batch, occupancy in ((2, 1), (3 * alone, 1), (3 * alone + 1, 1), (150, 1), (300, 2)):
        driver.set_occupancy(occupancy)
        case = LstmCase("slices", 2, batch, 2, 20, batch_first=True, mask="interior")
        with driver.stream() as stream:
            lender = check(case, dtype, stream=stream, compute=batch < 30 + 150 * (alone == 8))
        for direction, blocks in zip(("forward", "backward"), shared, strict=True):
            slices = 3 * occupancy // blocks
            if batch <= 3 * alone:
                slice = -(-batch // 3)
                found = [(0, batch, slice, -(-batch // slice))]
            else:
                slice = min(-(-batch // slices // 8) * 8, 128)
                starts = range(0, batch, slice * slices)
                counts = [min(slice * slices, batch - first) for first in starts]
                grids = [-(-count // slice) * blocks for count in counts]
                found = [(*span[:2], slice, span[2]) for span in zip(starts, counts, grids)]
            assert spans(lender, direction, 64 if batch <= 3 * alone else 256) == found
        # What blocks exchange is emptied before each launch.
        assert lender.sets == sum(made.name.endswith("_256") for made in lender.recurrent)


def by_direction(lender: LstmLender) -> dict[str, list[str]]:
    """Of each direction: what its launches take, by name."""
    found: dict[str, list[str]] = {}
    for made in (made for made in lender.recurrent if made.name != OFFSETS):
        _, direction, _, units = made.name.split("_")
        found.setdefault(direction, []).append(units)
    return found


def test_units_that_need_more_blocks_than_there_are(driver: Driver) -> None:
    """Each step is a launch then, and backward one more gives the gradient of the state."""
    problem = build(LstmCase("blocks", 3, 3, 2, 70), "float32")
    for occupancy, expected in (
        (1, {"forward": ["widestep"] * 3, "backward": ["widestep"] * 4}),
        (2, {"forward": ["widestep"] * 3, "backward": ["256"]}),
        (3, {"forward": ["256"], "backward": ["256"]}),
    ):
        driver.set_occupancy(occupancy)
        with driver.stream() as stream:
            lender = LstmLender(stream=stream)
            close(problem, both_ways(problem, lender=lender))
        assert by_direction(lender) == expected


STEPS = {
    "keras": {"weight_layout": "transposed", "bias": "one"},
    "packed": {"lengths": (3, *(2,) * 10, 1), "zoneout": "draws"},
    "packed_reverse": {"lengths": (3, *(1,) * 39), "reverse": True},
    "mask": {"mask": "interior", "zero_masked_output": True},
    "batch_first": {"mask": "interior", "batch_first": True, "reverse": True, "zoneout": "draws"},
    "many_sequences": {"initial": "none"},
}


@every_dtype
@pytest.mark.parametrize("name", STEPS)
def test_steps(driver: Driver, name: str, dtype: str) -> None:
    """Of units that no kernel holds on a device with few blocks."""
    options = STEPS[name]
    batch = len(options.get("lengths", ())) or (70 if name == "many_sequences" else 5)
    # One block has all units up to 64, in halves 128.
    units = (72, 70) if dtype == "float32" else (136, 130)
    case = LstmCase(f"steps_{name}", 3, batch, 6, units[name != "keras"], **options)
    with driver.stream() as stream:
        lender = check(case, dtype, stream=stream)
    for kernels in by_direction(lender).values():
        assert set(kernels) == {"widestep"}
    assert not lender.sets


@pytest.mark.parametrize(
    ("dtype", "backward", "kernel", "forward"),
    [("float32", 512, "768", 1024), ("bfloat16", 1024, "1280", 1280)],
)
def test_more_units_than_any_kernel_holds(
    dtype: str, backward: int, kernel: str, forward: int
) -> None:
    for units, forward_kernel in ((backward + 1, kernel), (forward + 1, "step")):
        case = LstmCase("units", 2, 1, 1, units, initial="none")
        lender = check(case, dtype, compute=False, index=LARGE)
        kernels = by_direction(lender)
        assert {name.removeprefix("wide") for name in kernels["forward"]} == {forward_kernel}
        assert [name.removeprefix("wide") for name in kernels["backward"]] == ["step"] * 2


@every_dtype
def test_steps_whose_blocks_all_run_at_once(driver: Driver, dtype: str) -> None:
    """They do where the device has room: others have more sequences and units."""
    for occupancy, kind in ((16, "step"), (15, "widestep")):
        driver.set_occupancy(occupancy)
        with driver.stream() as stream:
            lender = check(LstmCase("steps", 1, 40, 17, 190, cell=True), dtype, stream=stream)
        assert by_direction(lender)["forward"] == [kind]


@every_dtype
def test_a_cell_is_one_launch(dtype: str) -> None:
    """Unless a product of its inputs is faster or, of few terms, more accurate."""
    few = 1 + (dtype == "float32")
    for batch, inputs, launches in (
        (1, 17, 1), (40, 17, 1), (128, 17, 1), (129, 17, 2), (1, 16, few), (1, 1, few)
    ):  # fmt: skip
        problem = build(LstmCase("launches", 1, batch, inputs, 20, cell=True), dtype)
        lender = LstmLender(dtype=dtype, interpret=False)
        forward(problem, lender)
        assert len(lender.launched) == launches
        (made,) = lender.recurrent
        arguments = made.arguments
        assert bool(arguments.x.data) == (launches == 1) != bool(arguments.inputs)


@pytest.mark.parametrize("steps", [511, 512, 1023, 1024])
def test_offsets_of_many_steps(steps: int) -> None:
    """A launch hands over 512 numbers, of which there is one more than steps."""
    case = LstmCase("many_packed", steps, 2, 1, 2, lengths=(steps, 2), grads="final")
    lender = check(case, "float32", compute=steps == 512)
    offsets = [made for made in lender.recurrent if made.name == OFFSETS]
    assert len(offsets) == 2 * -(-(steps + 1) // 512)


@every_kind
@every_dtype
def test_nothing_depends_on_which_results_are_wanted(cell: bool, dtype: str) -> None:
    problem = build(LstmCase("wanted", 1 if cell else 3, 5, 20, 9, cell=cell), dtype)
    lender = LstmLender(dtype=dtype)
    everything = both_ways(problem, lender=lender)
    arguments = lender.recurrent[0].arguments
    assert arguments.gates and arguments.inputs == (None if cell else arguments.gates)
    results = ("h_n", "c_n") if cell else ("output", "h_n", "c_n")
    for wanted in [*((name,) for name in results), results]:
        lender = LstmLender(dtype=dtype)
        got = forward(problem, lender, save=False, wanted=wanted)
        assert got.keys() == set(wanted) and lender.recurrent[0].arguments.gates is None
        for name, array in got.items():
            assert_same_bits(array, everything[name], name)
    for name in (name for name in GRADIENTS if name in everything):
        got = backward(problem, everything, LstmLender(dtype=dtype), wanted=(name,))
        assert got.keys() == {name}
        for key, array in got.items():
            assert_same_bits(array, everything[key], key)


@every_dtype
@pytest.mark.parametrize("layout", ["strided", "padded", "transposed", "misaligned"])
def test_layouts_of_results(layout: str, dtype: str) -> None:
    for case in (BY_ID["above_vector"], BY_ID["keras"], BY_ID["cell_3_5_17"]):
        problem = build(case, dtype)
        close(problem, both_ways(problem, lender=LstmLender(dtype=dtype), layout=layout))


@pytest.mark.parametrize("name", ["above_vector", "batch_first_reverse"])
def test_rows_that_are_saved_in_another_order_than_inputs_lie(driver: Driver, name: str) -> None:
    problem = build(BY_ID[name], "float32")
    major = not problem.case.batch_first
    with pytest.raises(CallFailed, match="lie at uneven distances"):
        forward(problem, LstmLender(), batch_major=major)
    with pytest.raises(CallFailed, match="lie at uneven distances"):
        backward(problem, nothing_saved(problem), LstmLender(), batch_major=major)
    assert driver.launch_count == 0


@pytest.mark.parametrize("name", ["one_sequence", "one_step"])
def test_rows_that_have_one_order(name: str) -> None:
    problem = build(BY_ID[name], "float32")
    close(problem, both_ways(problem, lender=LstmLender(), batch_major=True))


def test_precision_of_float32() -> None:
    for units in (16, 80):
        case = LstmCase("precision", 4, 16, 16, units)
        # Rounded operands are off by more than the rule allows.
        lender = check(case, "float32", compute=False, precision=TF32, index=LARGE)
        assert {made.name.split("_")[2] for made in lender.recurrent} == {"tf32"}
        products = [m for m in lender.launched if isinstance(m, Ran) and m.is_product]
        assert {made.variant.precision for made in products} == {"tf32"}


@every_kind
def test_calls_are_counted(cell: bool, launched: Launched) -> None:
    op = f"lstm{'_cell' * cell}"
    with (
        launched(f"{op}_forward_f32_cuda", times=1),
        launched(f"{op}_backward_f32_cuda", times=1),
        launched(f"{op}_forward_f16_cuda", times=0),
    ):
        check(of_kind(cell), "float32", compute=False)


@every_kind
def test_first_calls_while_a_stream_is_captured(driver: Driver, cell: bool) -> None:
    """What a capture forbids spoils it."""
    with driver.stream() as stream, driver.capture_mode(0), driver.capture(stream):
        lender = check(of_kind(cell), "float32", stream=stream)
        assert driver.held["mode"] == 0 and bool(lender.sets) != cell
        assert all(made.launch.captured for made in lender.launched)
        assert driver.calls.count("cuModuleLoadData") > 0


@every_kind
def test_no_kernel_takes_float64(driver: Driver, cell: bool) -> None:
    assert_refused(build(of_kind(cell), "float64"), "no GPU kernel takes float64")
    assert driver.calls == []


@every_kind
def test_kernels_that_are_not_built(driver: Driver, cell: bool) -> None:
    """For a device or, without nvcc, for any."""
    problem = build(of_kind(cell), "float32")
    archs = sorted({arch for arch, *_ in native.cuda_kernels()})
    if archs:
        assert_refused(problem, "this build has GPU kernels for the architectures", index=OLD)
        built = ", ".join(str(arch / 10) for arch in archs)
        text = f"this build has no LSTM kernels for architecture 11.0: it was built for {built}"
        assert_refused(problem, text, index=NEW)
    else:
        assert_refused(problem, "this build has no LSTM kernels: making them needs nvcc")
