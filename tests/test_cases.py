"""The rule and the table that every numeric test leans on: they must be able to fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import twinfuse
from tests import conftest
from tests.arrays import DTYPES, ROUNDOFF, decode, encode, flushed, lay_out
from tests.cases import CASES as LINEAR
from tests.conv_cases import CASES as CONV
from tests.core_cases import BY_ID
from tests.problem import Case, build, reference64
from tests.rule import assert_same_bits, assert_within_twice

NUMBERS = np.array([[1.0, -2.0, 3.5], [0.25, 8.0, -0.125]])


def test_rule_takes_a_result_as_good_as_the_native_one() -> None:
    native = NUMBERS + 1e-4
    assert_within_twice(NUMBERS - 2e-4, native, NUMBERS, "x", dtype="float32")


def test_rule_refuses_more_than_twice_the_native_error() -> None:
    native, ours = NUMBERS + 1e-4, NUMBERS.copy()
    ours[1, 2] += 2.1e-4
    with pytest.raises(AssertionError, match=r"output \(float32\).*2\.10 times.*Worst at \(1, 2\)"):
        assert_within_twice(ours, native, NUMBERS, "output", dtype="float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_takes_one_last_place_and_no_more_where_native_is_exact(dtype: str) -> None:
    one = NUMBERS * (1 + 2 * ROUNDOFF[dtype])
    assert_within_twice(one, NUMBERS, NUMBERS, "x", dtype=dtype)
    two = NUMBERS * (1 + 4 * ROUNDOFF[dtype])
    with pytest.raises(AssertionError, match="above the limit"):
        assert_within_twice(two, NUMBERS, NUMBERS, "x", dtype=dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rule_refuses_a_stray_nonfinite_and_a_missing_one(bad: float) -> None:
    spoilt = NUMBERS.copy()
    spoilt[0, 1] = bad
    with pytest.raises(AssertionError, match=r"ours.*first at \(0, 1\)"):
        assert_within_twice(spoilt, NUMBERS, NUMBERS, "x", dtype="float32")
    with pytest.raises(AssertionError, match=r"ours.*first at \(0, 1\)"):
        assert_within_twice(NUMBERS, spoilt, spoilt, "x", dtype="float32")
    with pytest.raises(AssertionError, match="native against reference"):
        assert_within_twice(NUMBERS, spoilt, NUMBERS, "x", dtype="float32")
    assert_within_twice(spoilt, spoilt, spoilt, "x", dtype="float32")


def test_rule_refuses_infinity_of_the_wrong_sign() -> None:
    up, down = np.array([np.inf, 1.0]), np.array([-np.inf, 1.0])
    with pytest.raises(AssertionError, match="inf differs"):
        assert_within_twice(down, up, up, "x", dtype="float32")


def test_rule_expects_infinity_where_the_dtype_overflows() -> None:
    reference = np.array([1e6, 1.0])
    overflowed = np.array([np.inf, 1.0])
    assert_within_twice(overflowed, overflowed, reference, "x", dtype="float16")
    with pytest.raises(AssertionError, match=r"\+inf differs"):
        assert_within_twice(np.array([65504.0, 1.0]), overflowed, reference, "x", dtype="float16")


def test_rule_refuses_another_shape() -> None:
    with pytest.raises(AssertionError, match=r"expected shape \(2, 3\), got \(3, 2\)"):
        assert_within_twice(NUMBERS.T, NUMBERS, NUMBERS, "x", dtype="float32")


def test_same_bits_sees_the_sign_of_zero_and_one_last_bit() -> None:
    zero = np.zeros(3, np.float32)
    with pytest.raises(AssertionError, match="differ in their bits"):
        assert_same_bits(-zero, zero, "x")
    with pytest.raises(AssertionError, match=r"first at \(1,\)"):
        assert_same_bits(zero + np.float32([0, 1e-45, 0]), zero, "x")
    with pytest.raises(AssertionError, match="float64"):
        assert_same_bits(zero.astype(np.float64), zero, "x")
    assert_same_bits(np.float32([np.nan]), -np.float32([np.nan]), "x")


def test_bfloat16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7; 1 + 3 * 2^-8 rounds up to even.
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.4e38, -np.inf, 2.0**-133]
    expected = [1.0, 1 + 2.0**-6, 1 + 2.0**-7, np.inf, -np.inf, 2.0**-133]
    np.testing.assert_array_equal(decode(encode(values, "bfloat16")), expected)
    assert np.isnan(decode(encode([np.nan], "bfloat16"))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "strides", "offset"),
    [
        ("contiguous", (15, 5, 1), 0),
        ("transposed", (3, 1, 6), 0),
        ("strided", (30, 10, 2), 0),
        ("padded", (42, 14, 1), 0),
        ("misaligned", (15, 5, 1), 1),
        ("permuted", (5, 10, 1), 0),
        ("broadcast_rows", (0, 0, 1), 0),
        ("broadcast_columns", (15, 5, 0), 0),
        ("scalar", (0, 0, 0), 0),
        ("channels_last", (15, 1, 3), 0),
        ("channels_last padded", (60, 1, 12), 0),
        ("channels_last misaligned", (15, 1, 3), 1),
        ("channels_last broadcast_columns", (15, 0, 3), 0),
        ("hwio", (1, 2, 6), 0),
        ("broadcast_batch", (0, 5, 1), 0),
    ],
)
def test_layouts(layout: str, strides: tuple[int, ...], offset: int, dtype: str) -> None:
    values = np.arange(30.0).reshape(2, 3, 5) - 7
    operand = lay_out(values, layout, dtype)
    assert (operand.sizes, operand.strides, operand.offset) == ((2, 3, 5), strides, offset)
    if 0 not in strides:
        np.testing.assert_array_equal(operand.values, values)
        # Whoever reads a gap reads NaN.
        assert np.isnan(decode(operand.base)).sum() == operand.base.size - values.size
    else:
        assert operand.values[0, 0, 0] == -7 and np.isfinite(operand.values).all()


def test_overlapping_layouts_share_elements() -> None:
    operand = lay_out(np.arange(30.0).reshape(2, 3, 5), "overlapping", "float32")
    assert (operand.sizes, operand.strides) == ((2, 3, 5), (5, 3, 1))
    assert np.isfinite(operand.values).all()
    np.testing.assert_array_equal(operand.values[:, 0, 3:], operand.values[:, 1, :2])


@pytest.mark.parametrize("table", [LINEAR, CONV], ids=["linear_relu", "conv_relu"])
def test_case_names_are_unique_and_arrays_reproducible(table: tuple[Case, ...]) -> None:
    assert len({case.id for case in table}) == len(table)
    first, second = (build(table[-1], "float32") for _ in range(2))
    assert_same_bits(first.input.base, second.input.base, "input")
    assert first.input.base is not second.input.base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BY_ID.values(), ids=[name.replace(" ", "-") for name in BY_ID])
def test_cases_say_something(case: Case, dtype: str) -> None:
    problem = build(case, dtype)
    output = reference64(problem, "select").output
    if output.size == 0 or case.terms[0] == 0 or (case.values == "denormal" and flushed(dtype)):
        return
    gradient = problem.grad_output.values
    # Without a bias, windows that lie in the padding are exactly at the kink.
    seen = case.pre_activation(np.ones(case.input_sizes), np.ones(case.weight_sizes), None) > 0
    assert (gradient != 0)[seen].mean() > 0.9, "too much of the gradient was zeroed at the kink"
    if case.values == "dead":
        assert (output == 0).all()
    elif output.size > 20:
        assert 0.1 < (output > 0).mean() < 0.9, "the mask must matter"
    if case.values == "integers":
        assert ((output == 0) & (gradient != 0)).any()
        assert np.array_equal(decode(encode(output, dtype)), output), "integers must be exact"
    if case.values == "denormal":
        normal = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(dtype, 2.0**-126)
        assert 0 < np.max(output) < normal
        assert (decode(encode(output, dtype)) > 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_table_do_not_hang_on_the_kink(dtype: str) -> None:
    """A mask from outputs that are wrong by some roundings gives the same gradients."""
    for case in BY_ID.values():
        if case.values in ("normal", "large"):
            problem = build(case, dtype)
            exact = reference64(problem, "select")
            x, w = problem.input.values, problem.weight.values
            bias = None if problem.bias is None else problem.bias.values
            magnitude = case.pre_activation(np.abs(x), np.abs(w), None)
            shift = ROUNDOFF["float64" if dtype == "float64" else "float32"] * magnitude
            z = case.pre_activation(x, w, bias)
            for moved in (z + shift, z - shift):
                other = reference64(problem, "select", output=np.maximum(moved, 0))
                np.testing.assert_array_equal(other.grad_bias, exact.grad_bias)


def test_relu_rules_differ_only_at_nan_and_masked_nonfinite_gradients() -> None:
    case = BY_ID["linear_relu nonfinite"]
    problem = build(case, "float32")
    select, multiply = (reference64(problem, rule) for rule in ("select", "multiply"))
    assert not np.array_equal(select.grad_bias, multiply.grad_bias, equal_nan=True)
    finite = build(dataclasses.replace(case, values="normal"), "float32")
    a, b = (reference64(finite, rule).grad_input for rule in ("select", "multiply"))
    np.testing.assert_array_equal(a, b)


def test_a_missing_framework_skips_and_a_required_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "REQUIRED", set())
    with pytest.raises(pytest.skip.Exception, match="needs no_such_framework: it cannot"):
        conftest.require("no_such_framework")
    monkeypatch.setattr(conftest, "REQUIRED", {"no_such_framework"})
    with pytest.raises(conftest.MissingRequirement, match="TWINFUSE_TEST_REQUIRE names no_such"):
        conftest.require("no_such_framework")


def test_launched_sees_what_ran(
    launched: conftest.Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"linear_relu_forward_f32": 5, "linear_relu_backward_f32": 5}
    monkeypatch.setattr(twinfuse, "launches", lambda: dict(counts))
    with launched("linear_relu_forward_"), launched("linear_relu_backward_", times=0):
        counts["linear_relu_forward_f32"] += 1
    for prefix, times in (
        ("linear_relu_backward_", None),
        ("linear_relu_forward_", 2),
        ("x", None),
    ):
        with pytest.raises(AssertionError), launched(prefix, times=times):
            counts["linear_relu_forward_f32"] += 1


def test_falling_back_is_an_error_in_tests() -> None:
    with pytest.raises(twinfuse.FallbackError):
        twinfuse._backend.fall_back("linear_relu", "a reason")


@pytest.mark.allow_fallback
def test_falling_back_can_be_allowed() -> None:
    with pytest.warns(twinfuse.FallbackWarning, match="a reason"):
        twinfuse._backend.fall_back("linear_relu", "a reason")
