"""What the core's LSTM reads and writes: guard pages, huge strides, scratch, many callers."""

from __future__ import annotations

import dataclasses
import re
import threading
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES, STORAGE, Operand, encode, lay_out
from tests.core_api import OUT_OF_MEMORY, CallFailed, Lender, Output, guarded, last_error
from tests.core_lstm_api import (
    SAVED,
    backward,
    both_ways,
    forward,
    function,
    guarded_problem,
    row_count,
    without_saved,
)
from tests.lstm_cases import BY_ID, CASES, LstmCase, build
from tests.rule import assert_same_bits
from tests.test_core_memory import PlainOutput, sparse
from twinfuse import _core

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_access_outside_any_tensor(case: LstmCase, dtype: str, at_end: bool) -> None:
    """An access one element beyond a tensor, the mask or the batch sizes ends the process."""

    def make_output(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        operand = Output.poisoned(sizes, dtype, layout).operand
        return PlainOutput(guarded(operand, at_end), dtype)

    problem = build(case, dtype)
    tight = guarded_problem(problem, at_end)
    expected = both_ways(problem)
    got = both_ways(tight, make_output=make_output, place=lambda operand: guarded(operand, at_end))
    for name, array in got.items():
        assert_same_bits(array, expected[name], name)


FAR = [
    LstmCase("far", 4, 3, 3, 5, projection=2, peephole=True, zoneout="draws"),
    LstmCase("far_norm", 4, 3, 3, 5, norm=True, dropout="both", projection=2),
    LstmCase("far_mask", 4, 3, 3, 5, mask="interior", reverse=True),
    LstmCase("far_cell", 1, 3, 3, 5, cell=True, peephole=True, zoneout="draws"),
    LstmCase("far_cell_norm", 1, 3, 3, 5, cell=True, norm=True, dropout="both"),
]


@every_dtype
@pytest.mark.parametrize("dimension", range(3))
@pytest.mark.parametrize("case", FAR, ids=lambda case: case.id)
def test_strides_beyond_32_bits(case: LstmCase, dimension: int, dtype: str) -> None:
    """Neighbours in one dimension lie 2^33 bytes apart, in inputs and outputs alike."""
    problem = build(case, dtype)
    memory = sparse(21 << 33)
    base = np.frombuffer(memory, STORAGE[dtype])
    far = (1 << 33) // base.itemsize
    used = 0

    def spread(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        nonlocal used
        laid = lay_out(np.zeros(sizes), layout, dtype)
        strides = list(laid.strides)
        # A dimension of twenty gates needs more room than there is.
        if dimension < len(sizes) and sizes[dimension] <= 5:
            strides[dimension] = far
        operand = Operand(base, sizes, tuple(strides), used)
        used += 4096  # each operand in pages of its own
        operand.view[...] = encode(np.nan, dtype)
        return PlainOutput(operand, dtype)

    def moved(operand: Operand) -> Operand:
        copy = spread(operand.sizes, dtype, "contiguous").operand
        copy.view[...] = operand.view
        return copy

    def make_output(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        saved = len(sizes) == 2 and sizes[0] == row_count(case) and not case.cell
        return (Output.poisoned if saved else spread)(sizes, dtype, layout)

    wide = dataclasses.replace(
        problem, operands={name: moved(a) for name, a in problem.operands.items()}
    )
    if case.cell:
        make_output = Output.poisoned
    expected, got = both_ways(problem), both_ways(wide, make_output=make_output)
    for name, array in got.items():
        assert_same_bits(array, expected[name], name)


SOME = [
    BY_ID[name]
    for name in (
        "odd_everywhere",
        "projection_tile",
        "weight_strided",
        "grads_scalar",
        "packed_stairs",
        "mask_rows_reverse",
        "peephole_tile",
        "batch_first_overlapping",
        "norm_odd_everywhere",
        "norm_dropout_packed",
        "norm_transposed_strided",
        "dropout_odd_everywhere",
        "dropout_strided",
        "cell_13_131_130",
        "cell_norm_dropout_13_131_130",
        "cell_strided",
        "cell_projection",
    )
]


@every_dtype
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_a_failing_allocator_gives_a_status(case: LstmCase, dtype: str) -> None:
    """Each allocation of the call fails once; a call that makes none succeeds."""
    problem, op = build(case, dtype), f"lstm{'_cell' * case.cell}"
    saved = forward(problem)
    for role in ("forward", "backward"):
        for failing in range(24):
            lender = Lender("forward", 2, fail_allocation=failing)
            launches = _core.launches()
            try:
                # With outputs that the core may want to stage.
                if role == "forward":
                    forward(problem, lender, "strided")
                else:
                    backward(problem, saved, lender, "strided")
            except CallFailed as failed:
                assert failed.status == OUT_OF_MEMORY, failed
                assert re.match(rf"{op}: .*memory", last_error()), last_error()
                assert _core.launches() == launches, "a kernel that never ran was counted"
                lender.check()
            else:
                assert len(lender.scratch) <= failing, "an allocation failed and nobody noticed"
                # So little that it lies on the stack.
                small = case.cell or case.units < 32
                assert failing > 0 or small, f"{role} takes no scratch from the framework"
                break
        else:
            raise AssertionError(f"{role} makes more than 24 allocations")


def scratch_of(case: LstmCase, dtype: str) -> dict[str, int]:
    problem, lenders = build(case, dtype), [Lender("forward", 2) for _ in range(2)]
    saved = forward(problem, lenders[0])
    backward(problem, saved, lenders[1])
    return {
        role: sum(size for _, _, size in lender.scratch)
        for role, lender in zip(("forward", "backward"), lenders)
    }


@every_dtype
@pytest.mark.parametrize(
    ("options", "elements"),
    [
        ({}, 4 * 64),
        ({"projection": 32}, 4 * 64 + 32 + 64),
        ({"norm": True}, 12 * 64),
        ({"dropout": "input"}, 4 * 64 + 480),
        ({"dropout": "hidden"}, 4 * 64 + 64),
        ({"norm": True, "dropout": "both", "projection": 32}, 12 * 64 + 32 + 64 + 480 + 32),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_scratch_grows_by_what_the_header_says(
    batch_first: bool, options: dict[str, Any], elements: int, dtype: str
) -> None:
    """With the steps: not at all forward, some elements a row backward up to a block of steps."""
    # With weights of so many rows, blocks of steps are as large as they get.
    case = LstmCase("scratch", 100, 6, 480, 64, batch_first=batch_first, **options)
    few, many, more, most = (
        scratch_of(dataclasses.replace(case, steps=steps), dtype)
        for steps in (case.steps, 170, 800, 1600)
    )
    assert most["forward"] == many["forward"] == few["forward"]
    if batch_first and "dropout" not in options:
        elements += max(case.inputs, case.outputs)
    if batch_first and options.get("dropout") == "hidden":
        elements += case.inputs - case.outputs  # one copy at a time: the larger one counts
    if _core.isa() in ("avx2", "portable"):  # whose products pack what they multiply by
        elements += int(1.2 * (case.inputs + case.outputs))
    grown = many["backward"] - few["backward"]
    if dtype != "bfloat16":  # whose products pack more, the more rows there are
        assert grown <= 70 * 6 * elements * STORAGE[dtype].itemsize * 1.1 + (1 << 14), grown
    assert most["backward"] == more["backward"]
    sums = 4 * 64 * (case.inputs + case.outputs) * 4 * 1.5  # with padding
    kept = many["backward"] * 1.2 + sums + (1 << 19)  # packed weights lie beside them
    assert more["backward"] <= kept, more


@pytest.mark.parametrize("threads", (1, 2, 4, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_of_the_gradient_of_a_dropped_input(dtype: str, threads: int) -> None:
    """Its rows are multiplied in blocks, and the last one may be cut in another way."""
    case = LstmCase("dropped_blocks", 154, 3, 64, 49, dropout="input")
    problem = build(case, dtype)
    saved = forward(problem)
    alone = backward(problem, saved, wanted=("grad_input",))
    shared = backward(problem, saved, Lender("threads", threads), wanted=("grad_input",))
    assert_same_bits(shared["grad_input"], alone["grad_input"], "grad_input")


def test_16_threads_call_at_once() -> None:
    """Different cases and dtypes, good calls and bad ones, each thread with its own error text."""
    names = ("above_tile", "packed_stairs", "mask_interior", "projection_9", "tiny", "cell_wide")
    names += ("norm_dropout_extras", "cell_norm_strided")
    problems = [build(BY_ID[name], dtype) for name in names for dtype in DTYPES]
    expected = [both_ways(problem) for problem in problems]
    before = sum(_core.launches().values())
    failures: list[BaseException] = []
    start = threading.Barrier(16)
    refuse = function("lstm_cell_forward")

    def work(seed: int) -> None:
        try:
            start.wait()
            for step in range(6):
                index = (seed * 7 + step) % len(problems)
                problem, results = problems[index], expected[index]
                got = forward(problem, Lender("threads", 2))
                status = refuse(None, None, None, None, None, None, None, None)
                assert status != 0
                text = last_error()
                got |= backward(problem, results, Lender("reversed", 2))
                assert text == last_error() and text.startswith("lstm_cell: "), text
                for name, array in without_saved(got).items():
                    what = f"thread {seed}, {problem.case.id} {problem.dtype} {name}"
                    assert_same_bits(array, results[name], what)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert sum(_core.launches().values()) - before == 16 * 6 * 2


@every_dtype
@pytest.mark.parametrize("name", ["projection_9", "norm_projection"])
def test_rows_of_what_is_saved_may_lie_apart(name: str, dtype: str) -> None:
    """Gates, cells and hidden states as columns of one array."""
    problem = build(BY_ID[name], dtype)
    expected = both_ways(problem)
    case, rows = problem.case, row_count(problem.case)
    widths = [expected[name].shape[1] for name in SAVED]
    base = np.full(rows * sum(widths), 0x7E00, STORAGE[dtype]).copy()
    made: list[str] = []

    def make_output(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        if sizes in [expected[name].shape for name in SAVED]:
            index = [expected[name].shape for name in SAVED].index(sizes)
            made.append(SAVED[index])
            operand = Operand(base, sizes, (sum(widths), 1), sum(widths[:index]))
            return PlainOutput(operand, dtype)
        return Output.poisoned(sizes, dtype, layout)

    got = both_ways(problem, make_output=make_output)
    assert set(made) == set(SAVED) and case.projection
    for name, array in got.items():
        assert_same_bits(array, expected[name], name)
