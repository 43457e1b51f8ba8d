"""What the norm and the dropout of the core's LSTM mean, in numbers that are exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.arrays import DTYPES, Array, decode, encode
from tests.core_lstm_api import both_ways, forward
from tests.lstm_cases import BY_ID, LstmCase, build
from tests.rule import assert_same_bits
from tests.test_core_lstm import assert_same_results, changed, some

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def gates_of(case: LstmCase, saved: dict[str, Array]) -> Array:
    return saved["gates"][:, : 4 * case.units]


# Not of float16, whose small numbers are soon too small to be halved.
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@some("norm_plain", "norm_above_tile", "norm_projection", "norm_dropout_packed", "cell_norm_3_5_17")
def test_a_norm_takes_no_notice_of_scale(case: LstmCase, dtype: str) -> None:
    """Products twice as large leave the same; what is saved of them is twice as large."""
    once = build(case, dtype)
    weights = {name: once.operands[name].values * 2 for name in ("weight_ih", "weight_hh")}
    larger = dataclasses.replace(case, norm_epsilon=4 * case.norm_epsilon)
    twice = dataclasses.replace(changed(once, **weights), case=larger)
    ours, theirs = both_ways(once), both_ways(twice)
    for name, array in ours.items():
        got = theirs[name]
        if name == "gates":
            assert_same_bits(gates_of(case, theirs), gates_of(case, ours), name)
            width = 4 * case.units
            np.testing.assert_array_equal(decode(got)[:, width:], 2 * decode(array)[:, width:])
        elif name in ("grad_weight_ih", "grad_weight_hh"):
            np.testing.assert_array_equal(2 * decode(got), decode(array), name)
        else:
            np.testing.assert_array_equal(decode(got), decode(array), name)


@every_dtype
def test_of_equal_numbers_a_norm_leaves_nothing(dtype: str) -> None:
    problem = build(BY_ID["norm_equal"], dtype)
    case, saved = problem.case, forward(problem)
    zeros = {name: np.zeros(case.sizes(name)) for name in ("weight_ih", "weight_hh")}
    plain = changed(problem, **zeros, norm=None)
    plain = dataclasses.replace(plain, case=dataclasses.replace(case, norm=False))
    expected = forward(plain)
    assert not decode(saved["gates"])[:, 4 * case.units :].any()
    assert_same_bits(gates_of(case, saved), expected["gates"], "gates")
    for name in ("output", "h_n", "c_n"):
        assert_same_bits(saved[name], expected[name], name)


@every_dtype
def test_what_a_norm_saves_of_products_is_centred(dtype: str) -> None:
    for name in ("norm_plain", "norm_at_tile", "norm_dropout_odd_everywhere", "cell_norm_3_5_17"):
        problem = build(BY_ID[name], dtype)
        width = 4 * problem.case.units
        saved = decode(forward(problem)["gates"])
        for part in (saved[:, width : 2 * width], saved[:, 2 * width :]):
            assert part.shape[1] == width
            error = np.abs(part.mean(axis=1)) / np.abs(part).max(axis=1)
            assert error.max() < {"bfloat16": 1e-3, "float16": 1e-4}.get(dtype, 1e-6), name


@every_dtype
@some(
    "dropout_both",
    "dropout_above_tile",
    "dropout_projection",
    "dropout_packed",
    "norm_dropout_plain",
    "cell_dropout_3_5_17",
)
def test_dropout_by_factors_of_one_is_none(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    names = ("dropout_input", "dropout_hidden")
    ones = changed(problem, **{name: np.ones(case.sizes(name)) for name in names})
    none = changed(problem, **dict.fromkeys(names))
    assert_same_results(forward(ones), forward(none))


@every_dtype
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gates_of_one_mask_are_those_of_an_input_with_it(norm: bool, dtype: str) -> None:
    """Products with factors are rounded, as the input would be."""
    case = dataclasses.replace(BY_ID["dropout_broadcast_batch"], dropout="input", norm=norm)
    problem = build(case, dtype)
    x, factors = (problem.operands[name].values for name in ("input", "dropout_input"))
    dropped = decode(encode(x * factors[0], dtype))
    assert 0.1 < (factors == 0).mean() < 0.6
    assert_same_results(
        forward(problem), forward(changed(problem, input=dropped, dropout_input=None))
    )


@every_dtype
@pytest.mark.parametrize("gate", range(4))
def test_each_gate_has_a_mask_of_its_own(gate: int, dtype: str) -> None:
    """Without inputs and states for one gate, its products are zero and those of others stay."""
    problem = build(BY_ID["cell_dropout_7_64_65"], dtype)
    case = problem.case
    factors = {}
    for name in ("dropout_input", "dropout_hidden"):
        factors[name] = np.ones(case.sizes(name))
        factors[name][gate] = 0
    got = np.split(forward(changed(problem, **factors))["gates"], 4, axis=1)
    whole = np.split(forward(changed(problem, **dict.fromkeys(factors)))["gates"], 4, axis=1)
    zeros = {name: np.zeros(case.sizes(name)) for name in ("weight_ih", "weight_hh")}
    of_bias = np.split(forward(changed(problem, **zeros))["gates"], 4, axis=1)
    for k in range(4):
        assert_same_bits(got[k], (of_bias if k == gate else whole)[k], f"gate {k}")


@every_dtype
def test_what_is_dropped_gets_no_gradient(dtype: str) -> None:
    problem = build(BY_ID["dropout_packed_reverse"], dtype)
    case = problem.case
    nothing = changed(problem, dropout_input=np.zeros(case.sizes("dropout_input")))
    results = both_ways(nothing)
    for name in ("grad_input", "grad_weight_ih"):
        assert not decode(results[name]).any(), name
    assert decode(results["grad_weight_hh"]).any()
