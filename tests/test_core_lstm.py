"""The LSTM of the core, through its C API: numbers, and what each option means."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES, ROUNDOFF, Array, Operand, decode, lay_out
from tests.core_api import kernel
from tests.core_lstm_api import SAVED, backward, both_ways, forward, in_order, without_saved
from tests.lstm_cases import (
    BY_ID,
    CASES,
    LAYERS,
    LstmCase,
    LstmProblem,
    assert_close,
    build,
    computed,
    relaid,
)
from tests.lstm_problem import ROWS
from tests.rule import assert_same_bits
from twinfuse import _core

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [BY_ID[n] for n in names], ids=lambda case: case.id)


def changed(problem: LstmProblem, **values: Any) -> LstmProblem:
    """With other values for some operands; None takes one away."""
    operands = {**problem.operands}
    for name, value in values.items():
        operands.pop(name, None)
        if value is not None:
            operands[name] = lay_out(np.asarray(value, float), "contiguous", problem.dtype)
    return dataclasses.replace(problem, operands=operands)


def assert_same_results(got: dict[str, Array], expected: dict[str, Array], what: str = "") -> None:
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert_same_bits(array, expected[name], f"{name} {what}")


def assert_equal_numbers(got: dict[str, Array], expected: dict[str, Array]) -> None:
    """As the bits, but zero has no sign."""
    for name, array in got.items():
        np.testing.assert_array_equal(decode(array), decode(expected[name]), name)


@every_dtype
@every_case
def test_results_within_twice_the_error_of_numpy(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    assert_close(problem, without_saved(both_ways(problem)))


@every_dtype
@every_case
def test_saved_are_the_gates_and_the_state_before_each_step(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    lstm, _ = computed(problem)
    if not lstm.live.size or case.values in ("nonfinite", "tiny"):
        return
    got = forward(problem)
    for batch_major in (False, True):
        got = forward(problem, batch_major=batch_major)
        for name in SAVED[:1] if case.cell else SAVED:
            rows = decode(in_order(problem, got[name], batch_major))
            live = case.row(lstm.live)
            # With a norm, products stand behind the gates.
            parts = [name, "centred"] if case.norm and name == "gates" else [name]
            columns = np.split(rows, [rows.shape[-1] // 3], axis=-1) if parts[1:] else [rows]
            for part, columns_of_part in zip(parts, columns):
                expected = case.row(np.stack(lstm.steps[part]))
                assert columns_of_part.shape == expected.shape, part
                allowed = (200 + 4 * case.steps) * ROUNDOFF[dtype]
                scale = np.abs(expected[live]).max(initial=1)
                near = (allowed, allowed * scale, part)
                np.testing.assert_allclose(columns_of_part[live], expected[live], *near)


@every_dtype
@every_case
def test_each_call_counts_once_for_the_kernel_that_find_kernel_names(
    case: LstmCase, dtype: str
) -> None:
    problem, op = build(case, dtype), f"lstm{'_cell' * case.cell}"
    before = _core.launches()
    saved = forward(problem)
    between = _core.launches()
    backward(problem, saved)
    after = _core.launches()
    for role, old, new in (("forward", before, between), ("backward", between, after)):
        ran = {name: new[name] - old[name] for name in new if new[name] != old[name]}
        assert ran == {kernel(f"{op}_{role}", dtype): 1}


PLAIN = [case for case in LAYERS if not case.lengths]


@every_dtype
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_reverse_is_the_sequence_the_other_way_round(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    flipped = relaid(problem, "contiguous")
    for name in ("input", "grad_output", "zoneout_hidden", "zoneout_cell"):
        if name in problem.operands:
            flipped = changed(flipped, **{name: problem.operands[name].values[::-1]})
    flipped = dataclasses.replace(
        flipped,
        case=dataclasses.replace(case, reverse=not case.reverse),
        mask=None if problem.mask is None else problem.mask[::-1],
    )
    ours, theirs = both_ways(problem), both_ways(flipped)
    for name in ("output", "h_n", "c_n", "grad_input", "grad_h0", "grad_c0"):
        if name in ours:
            turned = theirs[name][::-1] if name in ("output", "grad_input") else theirs[name]
            assert_same_bits(ours[name], turned, name)


@every_dtype
@pytest.mark.parametrize("case", [c for c in LAYERS if c.lengths], ids=lambda case: case.id)
def test_packed_sequences_are_padded_ones_that_skip_the_rest(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    padded_case = dataclasses.replace(case, lengths=(), mask="right", zero_masked_output=True)
    operands = {}
    for name, operand in problem.operands.items():
        rows = len(operand.sizes) == 2 and operand.sizes[0] == sum(case.lengths)
        if rows and name in ("input", "grad_output", "zoneout_hidden", "zoneout_cell"):
            values = case.unrow(operand.values)
            operands[name] = lay_out(values, "contiguous", dtype)
        else:
            operands[name] = operand
    padded = LstmProblem(padded_case, dtype, operands, case.live_steps)
    ours, theirs = both_ways(problem), both_ways(padded)
    for name, array in ours.items():
        if name in ("output", "grad_input"):
            assert_same_bits(array, theirs[name][case.live_steps], name)
            assert not decode(theirs[name][~case.live_steps]).any(), f"{name} where skipped"
        elif name in ("h_n", "c_n", "grad_h0", "grad_c0"):
            assert_same_bits(array, theirs[name], name)
        elif name in SAVED:
            rows = in_order(padded, theirs[name])
            assert_same_bits(array, rows[case.live_steps], name)


@every_dtype
@some("packed_equal", "packed_equal_reverse")
def test_packed_sequences_of_one_length_are_no_others(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    shape = (case.steps, case.batch, -1)
    rows = {n: problem.operands[n].values.reshape(shape) for n in ("input", "grad_output")}
    flat = dataclasses.replace(problem, case=dataclasses.replace(case, lengths=()))
    got = both_ways(changed(flat, **rows))
    for name, array in both_ways(problem).items():
        assert_same_bits(got[name].reshape(array.shape), array, name)


@every_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("zero", [False, True], ids=["repeat", "zero"])
@pytest.mark.parametrize("mask", ["right", "left", "interior", "rows", "none"])
@pytest.mark.parametrize("extras", [{}, {"norm": True, "dropout": "both"}], ids=["plain", "norm"])
def test_a_masked_step_changes_nothing(
    extras: dict[str, Any], mask: str, zero: bool, reverse: bool, dtype: str
) -> None:
    name = f"mask_{mask}{'_reverse' * reverse}{'_zero' * zero}"
    case = dataclasses.replace(BY_ID[name], **extras)
    problem = build(case, dtype)
    results = both_ways(problem)
    assert problem.mask is not None
    for b in range(case.batch):
        last = np.zeros_like(results["output"][0, 0])
        final = problem.operands["h0"].contiguous[b]
        for t in range(case.steps)[:: -1 if reverse else 1]:
            shown = results["output"][t, b]
            if problem.mask[t, b]:
                last = final = shown
            else:
                repeated = np.zeros_like(last) if zero else last
                assert_same_bits(shown, repeated, f"output at {t}, {b}")
                assert not decode(results["grad_input"][t, b]).any()
        assert_same_bits(results["h_n"][b], final, f"h_n {b}")
        if not problem.mask[:, b].any():
            assert_same_bits(results["c_n"][b], problem.operands["c0"].contiguous[b], "c_n")
    # What lies in steps that are skipped has no influence; numbers like NaN have none forward.
    other = problem.operands["input"].values.copy()
    other[~problem.mask] = 7 - other[~problem.mask]
    assert_equal_numbers(both_ways(changed(problem, input=other)), results)
    other[~problem.mask] = np.nan
    got = without_saved(forward(changed(problem, input=other)))
    assert_same_results(got, {name: results[name] for name in got})


@every_dtype
@some("mask_kept", "mask_kept_reverse", "mask_kept_zero")
def test_a_mask_that_keeps_all_is_none(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    assert_same_results(both_ways(dataclasses.replace(problem, mask=None)), both_ways(problem))


@every_dtype
@pytest.mark.parametrize(
    "case", [c for c in LAYERS if c.steps == 1 and not c.lengths], ids=lambda case: case.id
)
def test_a_cell_is_a_layer_of_one_step(case: LstmCase, dtype: str) -> None:
    layer = build(dataclasses.replace(case, steps=1, grads="final"), dtype)
    squeezed = {
        name: Operand(a.base, a.sizes[1:], a.strides[1:], a.offset) if name in ROWS else a
        for name, a in layer.operands.items()
    }
    cell = LstmProblem(dataclasses.replace(layer.case, cell=True), dtype, squeezed, None)
    ours, theirs = both_ways(cell), both_ways(layer)
    for name, array in ours.items():
        assert_same_bits(array, theirs[name].reshape(array.shape), name)


@every_dtype
@some(
    "reverse",
    "projection_9",
    "zoneout_draws",
    "mask_interior",
    "packed_stairs",
    "batch_first",
    "norm_zoneout",
    "dropout_projection",
)
def test_what_is_absent_counts_as_zeros(case: LstmCase, dtype: str) -> None:
    """States, biases, peepholes, zoneouts, and gradients of what nobody used."""
    problem = build(case, dtype)
    names = ("h0", "c0", "bias_ih", "bias_hh", "zoneout_hidden", "zoneout_cell")
    names += ("peephole", "grad_output", "grad_h", "grad_c")
    for name in names:
        zeros = np.zeros(case.sizes(name))
        absent = both_ways(changed(problem, **{name: None}))
        given = both_ways(changed(problem, **{name: zeros}))
        assert_equal_numbers(absent, {key: given[key] for key in absent})


@every_dtype
@pytest.mark.parametrize("part", ["h0", "c0"])
def test_gradients_of_a_state_that_was_not_given(part: str, dtype: str) -> None:
    problem = build(BY_ID["batch_first_reverse"], dtype)
    zeros = changed(problem, **{part: np.zeros(problem.case.sizes(part))})
    saved = forward(changed(problem, **{part: None}))
    # `backward` asks for the gradients of what is there; the core does not read it.
    got, expected = backward(zeros, saved), both_ways(zeros)
    assert_same_results(got, {name: expected[name] for name in got})


@every_dtype
@some(
    "projection_9",
    "zoneout_draws",
    "mask_interior",
    "packed_stairs_reverse",
    "cell_peephole",
    "grad_final",
    "grad_cell",
    "batch_first",
    "norm_projection",
    "norm_mask_rows",
    "dropout_mask_interior",
    "dropout_projection",
    "norm_dropout_packed",
    "norm_dropout_extras",
    "cell_norm_dropout_3_5_17",
)
def test_nothing_depends_on_which_results_are_wanted(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    everything = forward(problem)
    results = ("h_n", "c_n") if case.cell else ("output", "h_n", "c_n")
    choices = [(), *((name,) for name in results), results]
    for wanted in choices:
        for save in (False, True):
            got = forward(problem, save=save, wanted=wanted)
            assert len(got) == len(wanted) + save * (1 if case.cell else 3)
            assert_same_results(got, {name: everything[name] for name in got}, f"of {wanted}")
    together = backward(problem, everything)
    for name in together:
        for names in ({name}, together.keys() - {name}):
            some = backward(problem, everything, wanted=names)
            assert_same_results(some, {key: together[key] for key in names}, f"of {names}")
    assert backward(problem, everything, wanted=()) == {}


def of_bias(case: LstmCase, dtype: str, gates: tuple[float, ...], c0: float) -> LstmProblem:
    """Every step has these pre-activations."""
    # Not with the activations of the case: no kink matters here.
    problem = build(dataclasses.replace(case, activation="tanh"), dtype)
    problem = dataclasses.replace(problem, case=case)
    zeros = {name: np.zeros(case.sizes(name)) for name in ("weight_ih", "weight_hh", "h0")}
    bias = np.repeat(gates, case.units)
    return changed(problem, **zeros, bias_ih=bias, bias_hh=None, c0=np.full(case.sizes("c0"), c0))


@every_dtype
def test_cells_are_not_rounded_between_steps(dtype: str) -> None:
    """Steps of 1/512 in a cell of four, which float16 and bfloat16 would lose."""
    case = LstmCase("steps", 512, 2, 3, 5, bias="one", activation="relu")
    got = forward(of_bias(case, dtype, (100.0, 100.0, 1 / 512, 100.0), 4.0))
    assert (decode(got["c_n"]) == 5).all()
    np.testing.assert_array_equal(decode(got["h_n"]), 5)


@every_dtype
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"dropout": "both"}], ids=["plain", "norm", "dropout"]
)
def test_inputs_without_elements_leave_biases_and_states(
    options: dict[str, Any], cell: bool, dtype: str
) -> None:
    case = LstmCase("no_inputs", 1 if cell else 4, 3, 0, 17, cell=cell, **options)
    problem = build(case, dtype)
    results = without_saved(both_ways(problem))
    assert results["grad_weight_ih"].shape == (68, 0)
    assert_close(problem, results)


@every_dtype
def test_gradients_of_nothing_are_zero(dtype: str) -> None:
    """In memory that was NaN; states pass through."""
    for name in (
        "no_steps",
        "no_steps_no_state",
        "no_batch",
        "no_batch_packed_order",
        "norm_no_steps",
        "norm_no_batch",
        "dropout_no_steps",
        "dropout_no_batch",
    ):
        problem = build(BY_ID[name], dtype)
        for what, array in both_ways(problem).items():
            given = {"grad_h0": "grad_h", "grad_c0": "grad_c", "h_n": "h0", "c_n": "c0"}.get(what)
            operand = problem.operands.get(given or "")
            expected = operand.contiguous if operand else np.zeros_like(array)
            assert_same_bits(array, expected, f"{name} {what}")
