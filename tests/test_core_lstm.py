"""The LSTM of the core, through its C API: numbers, and what each option means."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES, ROUNDOFF, SMALLEST, Array, Operand, decode, encode, lay_out
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
from tests.lstm_reference import ACTIVATIONS
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
            steps = np.stack(lstm.steps[name])
            expected = case.row(steps)
            live = case.row(lstm.live)
            rows = decode(in_order(problem, got[name], batch_major))
            assert rows.shape == expected.shape, name
            allowed = (200 + 4 * case.steps) * ROUNDOFF[dtype]
            scale = np.abs(expected[live]).max(initial=1)
            np.testing.assert_allclose(rows[live], expected[live], allowed, allowed * scale, name)


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
def test_a_masked_step_changes_nothing(mask: str, zero: bool, reverse: bool, dtype: str) -> None:
    name = f"mask_{mask}{'_reverse' * reverse}{'_zero' * zero}"
    case = BY_ID[name]
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
        name: Operand(a.base, a.sizes[1:], a.strides[1:], a.offset) if len(a.sizes) == 3 else a
        for name, a in layer.operands.items()
    }
    cell = LstmProblem(dataclasses.replace(layer.case, cell=True), dtype, squeezed, None)
    ours, theirs = both_ways(cell), both_ways(layer)
    for name, array in ours.items():
        assert_same_bits(array, theirs[name].reshape(array.shape), name)


@every_dtype
@some("reverse", "projection_9", "zoneout_draws", "mask_interior", "packed_stairs", "batch_first")
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


def functions(values: Array, dtype: str, cell: str, gate: str) -> tuple[Array, Array, Array]:
    """Arguments as rounded to the dtype, and both activations of them, read from saved gates."""
    case = LstmCase("functions", 1, len(values), 1, 1, bias="none", cell=True)
    problem = changed(
        build(case, dtype),
        input=values[:, None],
        **{name: np.zeros(case.sizes(name)) for name in ("weight_hh", "h0", "c0")},
        weight_ih=np.ones((4, 1)),
    )
    case = dataclasses.replace(case, activation=cell, recurrent_activation=gate)
    gates = decode(forward(dataclasses.replace(problem, case=case))["gates"])
    return problem.operands["input"].values[:, 0], gates[:, 2], gates[:, 0]


PAIRS = [("tanh", "sigmoid"), ("sigmoid", "tanh"), ("relu", "hard_sigmoid")]
every_pair = pytest.mark.parametrize(("cell", "gate"), PAIRS, ids=lambda name: name)


@every_dtype
@every_pair
def test_activations_are_accurate(cell: str, gate: str, dtype: str) -> None:
    random = np.random.default_rng(0)
    values = np.concatenate(
        [
            np.linspace(-40, 40, 40001),
            random.standard_normal(40000) * 2,
            random.standard_normal(20000) * np.exp(-random.uniform(0, 80, 20000)),
        ]
    )
    x, *got = functions(values, dtype, cell, gate)
    for name, array in zip((cell, gate), got):
        exact = ACTIVATIONS[name][0](x.astype(np.longdouble))
        # A hard sigmoid is a sum, whose terms lie between zero and one.
        size = np.maximum(np.abs(exact), 1.0 if name == "hard_sigmoid" else 0.0)
        least = SMALLEST[dtype] / ROUNDOFF[dtype]
        unit = 2 * ROUNDOFF[dtype] * np.exp2(np.floor(np.log2(np.maximum(size, least))))
        off = np.abs(array - exact) / unit
        assert off.max() < 2.5, f"{name}({x[off.argmax()]!r}): {float(off.max()):.2f} units"


@every_dtype
@every_pair
def test_activations_have_exact_limits(cell: str, gate: str, dtype: str) -> None:
    values = [0.0, -0.0, 1e3, -1e3, 1e4, -1e4, 6e4, -6e4, np.inf, -np.inf, np.nan]
    values += [3e38, -3e38] * (dtype != "float16")
    x, *got = functions(np.array(values), dtype, cell, gate)
    with np.errstate(over="ignore"):
        for name, array in zip((cell, gate), got):
            expected = decode(encode(ACTIVATIONS[name][0](x.astype(np.longdouble)), dtype))
            np.testing.assert_array_equal(array, expected, name)
            if name == "tanh":
                assert not np.signbit(array[:2]).any(), "sums start at +0"
            elif name != "relu":
                assert set(array[2:10]) == {0, 1}


@every_dtype
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
def test_inputs_without_elements_leave_biases_and_states(cell: bool, dtype: str) -> None:
    case = LstmCase("no_inputs", 1 if cell else 4, 3, 0, 17, cell=cell)
    problem = build(case, dtype)
    results = without_saved(both_ways(problem))
    assert results["grad_weight_ih"].shape == (68, 0)
    assert_close(problem, results)


@every_dtype
def test_gradients_of_nothing_are_zero(dtype: str) -> None:
    """In memory that was NaN; states pass through."""
    for name in ("no_steps", "no_steps_no_state", "no_batch", "no_batch_packed_order"):
        problem = build(BY_ID[name], dtype)
        for what, array in both_ways(problem).items():
            given = {"grad_h0": "grad_h", "grad_c0": "grad_c", "h_n": "h0", "c_n": "c0"}.get(what)
            operand = problem.operands.get(given or "")
            expected = operand.contiguous if operand else np.zeros_like(array)
            assert_same_bits(array, expected, f"{name} {what}")
