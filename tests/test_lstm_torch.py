"""`torch.ops.twinfuse.lstm` and `lstm_cell` over the table of cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.arrays import DTYPES
from tests.conftest import Launched, require
from tests.lstm_cases import BY_ID, CASES, LstmCase, build
from tests.lstm_problem import assert_close
from tests.rule import assert_same_bits

torch = require("torch")

import twinfuse.torch  # noqa: E402, F401
from tests.torch_cases import assert_same, poisoned_memory  # noqa: E402
from tests.torch_lstm_cases import fused, has_native, native, operand, run  # noqa: E402

# A cell of ours has no projection, as native's.
TABLE = [case for case in CASES if not (case.cell and case.projection)]
every_case = pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_dtype
@every_case
def test_matches_the_reference(case: LstmCase, dtype: str, launched: Launched) -> None:
    problem = build(case, dtype)
    op = "lstm_cell" if case.cell else "lstm"
    with (
        poisoned_memory(),
        launched(f"{op}_forward_{SHORT[dtype]}", times=1),
        launched(f"{op}_backward_{SHORT[dtype]}", times=1),
    ):
        ours = run(fused, problem)
    assert_close(problem, ours, run(native, problem) if has_native(case) else None)


REFERENCE = [
    *("one_sequence", "no_steps", "reverse", "batch_first_reverse", "packed_stairs_reverse"),
    *("packed_pairs", "mask_interior_reverse", "mask_interior_zero", "mask_rows", "zoneout_mask"),
    *("peephole_projection", "zoneout_projection", "packed_zoneout_projection", "relu_relu"),
    *(
        "hard_sigmoid_hard_sigmoid",
        "sigmoid_tanh",
        "grad_cell",
        "cell_peephole",
        "cell_zoneout_draws",
    ),
    *("cell_relu_hard_sigmoid", "cell_cell"),
    *("norm_plain", "norm_packed_reverse", "norm_mask_interior", "norm_projection", "norm_relu"),
    *("norm_no_state", "norm_no_bias", "norm_grad_cell", "norm_peephole", "dropout_both"),
    *("dropout_packed", "dropout_input_tile", "dropout_hidden_tile", "dropout_batch_first_reverse"),
    *("norm_dropout_extras", "cell_norm_hidden", "cell_norm_cell", "cell_dropout_3_5_17"),
]


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", REFERENCE)
def test_torchs_own_operators_match_it(name: str, launched: Launched) -> None:
    """The binding's fall-back: the same call of the operators that it calls instead of kernels."""
    problem = build(BY_ID[name], "float64")
    leaves = {n: operand(problem, n).requires_grad_() for n in problem.leaves}
    ours = fused(problem, leaves)
    with launched("lstm", times=0), torch.autograd.forward_ad.dual_level():
        theirs = fused(problem, leaves)
        assert_same(theirs, ours)
        # By autograd through the loop, and by the backward operator's own loop.
        results = [each.sum() for each in theirs.values()]
        expected = torch.autograd.grad(sum(results), list(leaves.values()), allow_unused=True)
    ours = fused(problem, leaves)
    seeds = tuple(torch.ones(2, *each.shape, dtype=torch.float64) for each in ours.values())
    with launched("lstm", times=0):
        got = torch.func.vmap(
            lambda *seeds: torch.autograd.grad(
                list(ours.values()), list(leaves.values()), seeds, retain_graph=True
            )
        )(*seeds)
    for a, b in zip(got, expected):
        for each in a:
            assert_same(each, torch.zeros_like(each) if b is None else b)


@pytest.mark.usefixtures("threads")
@every_dtype
def test_bits_do_not_depend_on_threads(dtype: str) -> None:
    for name in ("digits", "packed_tile", "cell_16_64_16"):
        problem = build(BY_ID[name], dtype)
        torch.set_num_threads(1)
        expected = run(fused, problem)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for what, got in run(fused, problem).items():
                assert_same_bits(got, expected[what], f"{name} {what}, {count} threads")
