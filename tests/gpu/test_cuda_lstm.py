"""The kernels of the LSTM in CUDA C++ compute what they should, on a CPU and in many orders."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest

from tests.arrays import Array, decode, encode, lay_out
from tests.gpu.cuda_lstm import (
    DTYPES,
    NAMES,
    KernelFailed,
    Way,
    backward,
    forward,
    kernels,
    named,
    run,
)
from tests.gpu.lstm_recurrence import Recurrence, assert_close, build, saved
from tests.gpu.lstm_structs import COffsets
from tests.lstm_case import LstmCase
from tests.lstm_cases import BY_ID, LAYERS
from tests.lstm_reference import ACTIVATIONS
from tests.rule import assert_same_bits

FORMATS = tuple(DTYPES)
every_format = pytest.mark.parametrize("format", FORMATS)
# By the most units: one block has all of a sequence, or blocks share them.
ALONE, SHARED, CLUSTER = 64, 256, "cluster256"
STEP, WIDE = "step", "widestep"  # a launch for each step
# Clusters have many threads, which take long: they are in fewer tests.
every_kind = pytest.mark.parametrize("units", [ALONE, SHARED, STEP, WIDE])
LAYOUTS = ("transposed", "strided", "padded", "misaligned", "broadcast_rows")
# Those that the table has with what no such kernel serves.
MORE = (
    *(
        LstmCase(f"layout_{way}", 4, 5, 6, 17, state_layout=way, weight_layout=way,
                 bias_layout=way.replace("rows", "columns"), grad_layout=way)
        for way in LAYOUTS
    ),
    *(
        LstmCase(f"only_{name}", 3, 2, 4, 5, activation=name, recurrent_activation=name)
        for name in ACTIVATIONS
    ),
    LstmCase("columns_lie_together", 3, 9, 6, 160, weight_layout="transposed"),
    LstmCase("packed_zoneout", 5, 3, 6, 9, lengths=(5, 2, 1), zoneout="draws", reverse=True),
    LstmCase("packed_means", 5, 3, 6, 9, lengths=(5, 4, 1), zoneout="means", initial="none"),
)  # fmt: skip
# The others have no such kernel, or would take too long.
CASES = [
    case
    for case in (*LAYERS, *MORE)
    if not (case.norm or case.dropout or case.peephole or case.projection)
    and 0 < case.steps <= 100
    and case.batch
]


def both(
    problem: Recurrence, format: str, units: int | str, way: Way | None = None
) -> dict[str, Array]:
    results = forward(named("forward", format, units), problem, way)
    # Clusters have the forward pass alone.
    kernel = named("backward", format, SHARED if units == CLUSTER else units)
    return results | backward(kernel, problem, results, way)


def without_clusters(units: int | str, format: str) -> bool:
    return units == CLUSTER and f"lstm_forward_{format}_{units}" not in NAMES


def assert_same(got: dict[str, Array], expected: dict[str, Array], what: str) -> None:
    for name, array in got.items():
        assert_same_bits(array, expected[name], f"{what} {name}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cases(case: LstmCase) -> None:
    """In slices, layouts and orders by the case."""
    number = CASES.index(case)
    for k, format in enumerate(FORMATS):
        kinds = (SHARED, STEP, CLUSTER, WIDE, ALONE)[: 4 if case.units > ALONE else 5]
        units = kinds[(number + k) % len(kinds)]
        units = SHARED if without_clusters(units, format) else units
        layout = ("contiguous", "strided", "transposed")[number % 3]
        way = Way(
            slice=2 + number % 2 + case.batch // 4,
            layout=layout,
            saved_layout=("contiguous", "padded")[k % 2],
            seed=number + k,
        )
        problem = build(case, DTYPES[format])
        assert_close(problem, both(problem, format, units, way), format)


@pytest.mark.parametrize("name", NAMES)
def test_units(name: str) -> None:
    """That fill a tile, a block and a kernel, that do not, and that need one more."""
    kernel = kernels()[name]
    own, most = kernel.units, 130 if kernel.of_steps else kernel.width
    sizes = {own - 1, own, own + 1, most // 2 + 1, most - 1, most}
    if kernel.alone or kernel.of_steps:
        sizes |= {1, 5, 8, 9}
    if most > SHARED:
        sizes = {own + 1, most}
    if kernel.of_steps:
        sizes |= {320}  # more groups than are on their way at a time
    for units in sorted(n for n in sizes if 0 < n <= max(most, 320 * kernel.of_steps)):
        case = LstmCase(f"units_{units}", 2, 3 if most > SHARED else 9, 3, units)
        problem, way = build(case, kernel.dtype), Way(seed=units)
        if kernel.backward:
            results = backward(kernel, problem, saved(problem), way)
        else:
            results = forward(kernel, problem, way)
        assert_close(problem, results, kernel.format)


@every_format
@pytest.mark.parametrize(
    ("batch", "way"),
    [
        (9, Way(slice=1)),
        (33, Way(slice=32, seed=1)),
        (33, Way(slice=33, seed=2)),
        (100, Way(slice=90, seed=3)),
        (40, Way(slice=16, starts=(3, 20), seed=4)),
        (40, Way(starts=(39,), seed=5)),
    ],
    ids=lambda way: f"{way.slice}_{len(way.starts)}" if isinstance(way, Way) else str(way),
)
def test_slices_and_launches(batch: int, way: Way, format: str) -> None:
    """With chunks of a slice, several and cut ones, and slices that are cut."""
    for case in (
        LstmCase("slices", 3, batch, 2, 19, mask="interior"),
        LstmCase(
            "slices_packed", 3, batch, 2, 19, lengths=(3,) * (batch // 2) + (1,) * -(-batch // 2)
        ),
    ):
        problem = build(case, DTYPES[format])
        for units in (ALONE, SHARED, CLUSTER, STEP, WIDE):
            if not without_clusters(units, format):
                assert_close(problem, both(problem, format, units, way), format)


@pytest.mark.parametrize(
    ("units", "format"),
    [
        (units, format)
        for units in (ALONE, SHARED, CLUSTER, STEP, WIDE)
        for format in FORMATS
        if not without_clusters(units, format)
    ],
)
def test_orders_have_the_same_bits(units: int | str, format: str) -> None:
    case = LstmCase("orders", 6, 12, 3, 40, zoneout="draws", mask="interior")
    problem = build(case, DTYPES[format])
    expected = both(problem, format, units, Way(slice=6))
    for seed in range(1, 3 if units == CLUSTER else 6):
        got = both(problem, format, units, Way(slice=6, seed=seed))
        assert_same(got, expected, f"seed {seed}")


@every_format
@every_kind
def test_gates_in_the_place_of_inputs(units: int | str, format: str) -> None:
    """Steps that are skipped leave them."""
    for name in ("mask_interior", "packed_stairs", "batch_first_reverse"):
        problem, kernel = build(BY_ID[name], DTYPES[format]), named("forward", format, units)
        got = forward(kernel, problem, Way(in_place=True))
        expected = forward(kernel, problem, Way())
        live = ~np.isnan(expected["gates"]) if format != "bf16" else expected["gates"] != 0x7FC0
        assert_same_bits(got["gates"][live], expected["gates"][live], name)
        assert_same_bits(got["gates"][~live], problem.inputs[~live], name)
        del got["gates"]
        assert_same(got, expected, name)


@every_format
@every_kind
def test_what_is_not_wanted(units: int | str, format: str) -> None:
    problem, kernel = build(BY_ID["mask_interior"], DTYPES[format]), named("forward", format, units)
    everything = forward(kernel, problem)
    few = forward(kernel, problem, save=False)
    assert few.keys() == {"output", "h_n", "c_n"}
    assert_same(few, everything, "without what is saved")
    kernel = named("backward", format, units)
    expected = backward(kernel, problem, everything)
    got = backward(kernel, problem, everything, bias=False)
    assert got.keys() == expected.keys() - {"grad_bias"}
    assert_same(got, expected, "without gradients of biases")
    given = {name: a for name, a in problem.operands.items() if name not in ("h0", "c0")}
    stateless = dataclasses.replace(problem, operands=given)
    got = backward(kernel, stateless, everything)
    assert_same(got, expected, "without gradients of states")


@every_format
def test_no_number_is_taken_for_none(format: str) -> None:
    """All bits set is a place that waits to be written, and a NaN."""
    problem = build(LstmCase("all_bits", 3, 4, 2, 40), DTYPES[format])
    for name, row in (("h0", 1), ("grad_h", 2), ("c0", 3)):
        view = problem.operands[name].view
        bits = view.view(f"u{view.itemsize}")
        bits[row, 7] = np.iinfo(bits.dtype).max
    assert_close(problem, both(problem, format, SHARED), format)


@every_format
@every_kind
def test_cells_are_not_rounded_between_steps(units: int | str, format: str) -> None:
    """Steps of 1/512 in a cell of four, which 16 bits would lose."""
    case = LstmCase("steps", 512, 2, 1, 3, bias="one", activation="relu")
    # With the activations of the case no draw would stay away from their kinks.
    problem = build(dataclasses.replace(case, activation="tanh"), DTYPES[format])
    values = {name: np.zeros(case.sizes(name)) for name in ("weight_hh", "h0")}
    values["bias_ih"] = np.repeat([100.0, 100.0, 1 / 512, 100.0], 3)
    values["c0"] = np.full(case.sizes("c0"), 4.0)
    given = {name: lay_out(a, "contiguous", problem.dtype) for name, a in values.items()}
    problem = dataclasses.replace(
        problem,
        case=case,
        operands=problem.operands | given,
        inputs=encode(np.zeros(problem.inputs.shape), problem.dtype),
    )
    got = forward(named("forward", format, units), problem)
    assert (decode(got["c_n"]) == 5).all()
    assert (decode(got["h_n"]) == 5).all()


@pytest.mark.parametrize(
    ("direction", "units", "bug"),
    [
        *(
            (direction, units, bug)
            for direction in ("forward", "backward")
            for units, bug in (
                (SHARED, "no fence"),
                (SHARED, "no emptying"),
                *((units, "no block_sync") for units in (SHARED, STEP, WIDE)),
            )
        ),
        ("forward", CLUSTER, "no wait"),
        ("forward", CLUSTER, "no block_sync"),
    ],
)
def test_bugs_are_found(direction: str, units: int | str, bug: str) -> None:
    """What these tests could not see would not be tested."""
    problem = build(LstmCase("bugs", 16, 12, 3, 40), "bfloat16")
    kernel, kept = named(direction, "bf16", units), saved(problem)

    def computed(seed: int, bug: str) -> dict[str, Array]:
        way = Way(slice=6, seed=seed)
        if direction == "forward":
            return forward(kernel, problem, way, bug=bug)
        return backward(kernel, problem, kept, way, bug=bug)

    expected = computed(0, "none")
    assert_close(problem, expected, "bf16")
    with pytest.raises((KernelFailed, AssertionError)):
        for seed in range(8):
            assert_same(computed(seed, bug), expected, bug)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 512])
def test_offsets(count: int) -> None:
    numbers = np.arange(512, dtype=np.int32) * 3 + 1
    to = np.full(600, -1, np.int32)
    run("lstm_offsets", COffsets(to.ctypes.data, count, (ctypes.c_int32 * 512)(*numbers)))
    np.testing.assert_array_equal(to[:count], numbers[:count])
    assert (to[count:] == -1).all()


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(KernelFailed, match="no such kernel"):
        run("lstm_forward_bf16_1", COffsets())
