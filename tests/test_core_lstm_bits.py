"""What the bits of the core's LSTM may depend on: the instruction set and the dtype alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.arrays import DTYPES, Array, Operand, decode, flushed, lay_out, part
from tests.core_api import Lender
from tests.core_lstm_api import SAVED, backward, both_ways, forward, in_order
from tests.lstm_cases import BY_ID, CASES, LAYERS, LstmCase, LstmProblem, build, relaid
from tests.lstm_problem import ROWS
from tests.mxcsr import FLUSH, ROUND_UP, mxcsr
from tests.rule import assert_same_bits

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
# Enough of everything for threads to share: sequences, units, steps.
LARGE = [
    LstmCase("large_batch", 3, 70, 28, 128, initial="none"),
    LstmCase("large_batch_extras", 3, 70, 28, 65, peephole=True, zoneout="draws", projection=33),
    LstmCase("large_units", 3, 2, 64, 300, reverse=True),
    LstmCase("large_one_sequence", 5, 1, 131, 260),
    LstmCase("large_steps", 120, 3, 17, 40, batch_first=True, weight_layout="transposed"),
    LstmCase("large_blocks", 40, 60, 17, 40, projection=21, batch_first=True),
    LstmCase("large_blocks_extras", 40, 60, 17, 30, norm=True, dropout="both", peephole=True),
    LstmCase("large_packed", 9, 40, 17, 66, lengths=(9,) * 3 + (6,) * 20 + (2,) * 17),
    LstmCase("large_mask", 6, 40, 17, 66, mask="interior", reverse=True),
    LstmCase("large_norm", 3, 70, 28, 65, norm=True, projection=33),
    LstmCase("large_norm_units", 3, 2, 64, 300, norm=True, reverse=True),
    LstmCase(
        "large_norm_packed", 9, 40, 17, 66, norm=True, lengths=(9,) * 3 + (6,) * 20 + (2,) * 17
    ),
    LstmCase("large_dropout", 3, 70, 28, 65, dropout="both", projection=33),
    LstmCase("large_dropout_units", 3, 2, 64, 300, dropout="both", batch_first=True),
    LstmCase("large_dropout_mask", 6, 40, 17, 66, dropout="both", norm=True, mask="interior"),
    LstmCase("large_cell_norm", 1, 70, 64, 128, cell=True, norm=True, dropout="both"),
    LstmCase("large_cell", 1, 70, 64, 128, cell=True),
    LstmCase("large_cell_projection", 1, 70, 64, 128, cell=True, projection=65, peephole=True),
]
every_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)

LAYOUTS = ("contiguous", "transposed", "strided", "misaligned", "padded", "permuted")


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits_do_not_depend_on_layout(case: LstmCase, dtype: str) -> None:
    """Every case against its contiguous copy; outputs, masks and what is saved in all orders."""
    problem = build(case, dtype)
    expected = both_ways(problem)
    rows = {name: in_order(problem, expected[name]) for name in SAVED if name in expected}
    for number, layout in enumerate(LAYOUTS):
        for variant in (problem, relaid(problem, layout)):
            major = number % 2 == 0
            mask = ("contiguous", "transposed", "padded")[number % 3]
            got = both_ways(variant, layout=layout, batch_major=major, mask_layout=mask)
            for name, array in got.items():
                what = f"{name}, {layout}"
                if name in SAVED:
                    assert_same_bits(in_order(problem, array, major), rows[name], what)
                else:
                    assert_same_bits(array, expected[name], what)


@every_dtype
@every_large
def test_bits_do_not_depend_on_order_or_threads(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    expected = both_ways(problem)
    lenders = [Lender(order, 4, thread_work=1) for order in ("forward", "reversed", "random")]
    lenders += [Lender("threads", count, thread_work=1) for count in (1, 2, 3, 7, 16)]
    for lender in lenders:
        got = forward(problem, lender)
        got |= backward(problem, expected, lender)
        for name, array in got.items():
            what = f"{name}, {lender.order}, {lender.num_threads} threads"
            assert_same_bits(array, expected[name], what)


@every_dtype
@pytest.mark.parametrize("case", [c for c in LARGE if c.batch > 1], ids=lambda case: case.id)
def test_large_problems_are_split(case: LstmCase, dtype: str) -> None:
    problem, lender = build(case, dtype), Lender("forward", 2)
    saved = forward(problem, lender)
    assert lender.tasks >= 2, "the forward pass ran in one task"
    lender.tasks = 0
    backward(problem, saved, lender)
    assert lender.tasks >= 2, "the backward pass ran in one task"
    lender = Lender("forward", 2, thread_work=1 << 40)
    both_ways(problem, lender=lender)
    assert not lender.tasks, "a thread was woken for less work than the framework asks for"


def of_sequence(problem: LstmProblem, b: int) -> LstmProblem:
    """One sequence alone, as long as it is, and not packed."""
    case = problem.case
    steps = case.lengths[b] if case.lengths else case.steps
    operands: dict[str, Operand] = {}
    for name, operand in problem.operands.items():
        if name in ("h0", "c0", "grad_h", "grad_c"):
            operands[name] = part(operand, (b + 1, operand.sizes[1]), (b, 0))
        elif name.startswith("dropout"):
            operands[name] = part(operand, (4, b + 1, operand.sizes[2]), (0, b, 0))
        elif name not in ROWS:
            operands[name] = operand
        elif not case.lengths:
            operands[name] = part(operand, (steps, b + 1, operand.sizes[2]), (0, b, 0))
        else:
            values = case.unrow(operand.values)[:steps, b : b + 1]
            operands[name] = lay_out(values, "contiguous", problem.dtype)
    alone = dataclasses.replace(
        case, batch=1, steps=steps, lengths=(), mask="" if problem.mask is None else case.mask
    )
    mask = None if problem.mask is None else problem.mask[:, b : b + 1]
    return LstmProblem(alone, problem.dtype, operands, mask)


TOGETHER = [
    *(case for case in LAYERS if case.lengths),
    *(case for case in LARGE if not case.cell),
    *(BY_ID[name] for name in ("odd_everywhere", "mask_tile", "projection_tile", "tiny")),
]


@every_dtype
@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.id)
def test_bits_of_a_sequence_do_not_depend_on_its_batch(case: LstmCase, dtype: str) -> None:
    """Nor on being packed with shorter and longer ones."""
    problem = build(case, dtype)
    together = both_ways(problem)
    for b in range(0, case.batch, max(case.batch // 5, 1)):
        alone = of_sequence(problem, b)
        got = both_ways(alone)
        for name in ("h_n", "c_n", "grad_h0", "grad_c0"):
            if name in got:
                assert_same_bits(got[name][0], together[name][b], f"{name} of sequence {b}")
        for name in ("output", "grad_input"):
            rows: Array = together[name]
            if case.lengths:
                padded = np.zeros((case.steps, case.batch, rows.shape[-1]), rows.dtype)
                padded[case.live_steps] = rows
                rows = padded[: alone.case.steps]
            assert_same_bits(got[name][:, 0], rows[:, b], f"{name} of sequence {b}")


@every_dtype
@pytest.mark.parametrize("mode", [FLUSH, ROUND_UP], ids=["flush_denormals", "round_up"])
@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny_extras",
        "norm_dropout_tiny",
        "odd_everywhere",
        "norm_odd_everywhere",
        "dropout_odd_everywhere",
        "mask_rows",
        "cell_tiny",
        "cell_norm_tiny",
        "cell_7_64_65",
    ],
)
def test_bits_do_not_depend_on_the_floating_point_mode(name: str, mode: int, dtype: str) -> None:
    """Neither the caller's nor the workers', and every thread finds its own mode back."""
    problem = build(BY_ID[name], dtype)
    expected = both_ways(problem)
    if problem.case.values == "tiny" and not flushed(dtype):
        assert (decode(expected["h_n"]) != 0).any(), "the state was flushed"
    for order in ("serial", "threads"):
        lenders = [Lender(order, 2, mxcsr=mode) for _ in range(2)]
        with mxcsr(mode) as left:
            got = forward(problem, lenders[0])
            got |= backward(problem, expected, lenders[1])
        assert left() == mode, f"{order}: the caller's MXCSR was {mode:#x}, is {left():#x}"
        for result, array in got.items():
            assert_same_bits(array, expected[result], f"{result}, {order}")
