"""The NumPy reference of the LSTM: against torch, Keras and finite differences."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES, decode, encode
from tests.conftest import require
from tests.lstm_cases import (
    BY_ID,
    CASES,
    ONE_BIAS,
    OPTIONS,
    LstmCase,
    LstmProblem,
    build,
    computed,
    reference,
    rival,
)
from tests.lstm_problem import LEAVES, NOISE, ROWS
from tests.rule import assert_same_bits, assert_within_twice

# Of which 64 bits do not hold all results, or differences see nothing.
SPECIAL = ("nonfinite", "large", "tiny", "saturated")
FINITE = [case for case in CASES if case.values not in SPECIAL]


# Through a norm some gradients are sums of large numbers that cancel.
CANCELLED = 1e-13


def close(
    ours: dict[str, np.ndarray], theirs: dict[str, Any], names: list[str], least: float = 0.0
) -> None:
    for name in names:
        got, expected = (np.asarray(a[name], np.float64) for a in (ours, theirs))
        scale = np.abs(expected).max() if expected.size else 0.0
        np.testing.assert_allclose(
            got, expected, rtol=1e-11, atol=1e-12 * scale + least, err_msg=name
        )


def torch_lstm(problem: LstmProblem) -> dict[str, np.ndarray]:
    """Through nn.LSTM; a reversed case is the second direction of a bidirectional one."""
    import torch
    from torch.nn.utils.rnn import PackedSequence

    case = problem.case
    leaves = {
        n: torch.tensor(problem.operands[n].values, requires_grad=True) for n in problem.leaves
    }
    bias = "bias_ih" in leaves
    options = {"bias": bias, "dtype": torch.float64}
    if case.cell:
        module: Any = torch.nn.LSTMCell(case.inputs, case.units, **options)
        named = {
            name: leaves[name]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            if name in leaves
        }
        state = (leaves["h0"], leaves["c0"])
        results = torch.func.functional_call(module, named, (leaves["input"], state))
        outputs = dict(zip(("h_n", "c_n"), results))
    else:
        module = torch.nn.LSTM(
            case.inputs,
            case.units,
            proj_size=case.projection,
            bidirectional=case.reverse,
            **options,
        )
        suffix = "_l0_reverse" if case.reverse else "_l0"
        named = {f"{n}{suffix}": a for n, a in leaves.items() if n.startswith(("weight", "bias"))}
        width = 2 if case.reverse else 1
        state = tuple(torch.stack([leaves[n]] * width) for n in ("h0", "c0") if n in leaves)
        x = leaves["input"]
        if case.lengths:
            x = PackedSequence(x, torch.from_numpy(problem.batch_sizes))
        output, final = torch.func.functional_call(module, named, (x, state or None))
        output = (output.data if case.lengths else output)[..., (width - 1) * case.outputs :]
        outputs = {"output": output, "h_n": final[0][-1], "c_n": final[1][-1]}
    given = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}
    loss = sum(
        (array * torch.tensor(problem.operands[given[name]].values)).sum()
        for name, array in outputs.items()
        if given[name] in problem.operands
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    outputs |= {f"grad_{name}": grad for name, grad in zip(leaves, grads)}
    return {name: array.detach().numpy() for name, array in outputs.items()}


TORCH = [case for case in FINITE if case.in_torch and case.steps * case.batch]


@pytest.mark.parametrize("case", TORCH, ids=lambda case: case.id)
def test_reference_is_that_of_torch(case: LstmCase) -> None:
    require("torch")
    problem = build(case, "float64")
    expected = torch_lstm(problem)
    close(reference(problem), expected, list(expected))


def torch_loop(problem: LstmProblem) -> dict[str, np.ndarray]:
    """Through a loop of torch's functions, for what no layer of torch has."""
    import torch

    case = problem.case
    arrays = {n: a.values for n, a in problem.operands.items()}
    rows = {n: case.unrow(a) for n, a in arrays.items() if n in ROWS}
    named = {n: torch.tensor(a, requires_grad=n in LEAVES) for n, a in (arrays | rows).items()}
    function = {"hard_sigmoid": lambda a: torch.clamp(a / 6 + 0.5, 0, 1)}
    cell, gate = (
        function.get(name) or getattr(torch, name)
        for name in (case.activation, case.recurrent_activation)
    )
    live = torch.tensor(case.live_steps if problem.mask is None else problem.mask)[..., None]

    def zeros(name: str) -> torch.Tensor:
        return torch.zeros(case.sizes(name), dtype=torch.float64)

    def sums(x: torch.Tensor, which: str, factors: torch.Tensor | None) -> torch.Tensor:
        weight = named[f"weight_{which}"]
        if factors is None:
            product = x @ weight.T
        else:
            product = torch.einsum("kbn,khn->bkh", factors * x, weight.unflatten(0, (4, -1)))
        product = product.reshape(case.batch, -1)
        if case.norm:
            scale = named["norm"][("ih", "hh").index(which)]
            shape = product.shape[1:]
            product = torch.nn.functional.layer_norm(product, shape, scale, None, case.norm_epsilon)
        return product + named.get(f"bias_{which}", 0)

    h, c = (named.get(name, zeros(name)) for name in ("h0", "c0"))
    p = named.get("peephole", zeros("peephole"))
    last, outputs = torch.zeros_like(h), [h] * case.steps
    for t in range(case.steps)[:: -1 if case.reverse else 1]:
        a = sums(named["input"][t], "ih", named.get("dropout_input"))
        a = a + sums(h, "hh", named.get("dropout_hidden"))
        i, f, g, o = a.chunk(4, 1)
        new_c = gate(f + p[1] * c) * c + gate(i + p[0] * c) * cell(g)
        new_h = gate(o + p[2] * new_c) * cell(new_c)
        new_h = new_h @ named["weight_hr"].T if case.projection else new_h
        kept = (named.get(name, {t: 0.0})[t] for name in ("zoneout_hidden", "zoneout_cell"))
        h_c = [z * old + (1 - z) * new for z, old, new in zip(kept, (h, c), (new_h, new_c))]
        h, c, last = (torch.where(live[t], a, b) for a, b in zip((*h_c, h_c[0]), (h, c, last)))
        shown = torch.zeros_like(last) if case.zero_masked_output else last
        outputs[t] = torch.where(live[t], h, shown)
    results = {"output": case.row(torch.stack(outputs)), "h_n": h, "c_n": c}
    given = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}
    loss = sum(
        (array * torch.tensor(arrays[given[name]])).sum()
        for name, array in results.items()
        if given[name] in arrays
    )
    grads = torch.autograd.grad(loss, [named[n] for n in problem.leaves], materialize_grads=True)
    named_grads = {f"grad_{name}": grad for name, grad in zip(problem.leaves, grads)}
    named_grads["grad_input"] = case.row(named_grads["grad_input"])
    results = {n: a for n, a in results.items() if n != "output" or not case.cell} | named_grads
    return {name: array.detach().numpy() for name, array in results.items()}


LOOP = [case for case in FINITE if (case.norm or case.dropout) and case.steps * case.batch]


@pytest.mark.parametrize("case", LOOP, ids=lambda case: case.id)
def test_norm_and_dropout_are_those_of_a_loop_of_torch(case: LstmCase) -> None:
    require("torch")
    problem = build(case, "float64")
    expected = torch_loop(problem)
    assert expected.keys() == reference(problem).keys()
    close(reference(problem), expected, list(expected), CANCELLED * case.norm)


KERAS = [
    case
    for case in ONE_BIAS
    if case.in_keras and case.values not in SPECIAL and case.steps * case.batch and not case.cell
]


def keras_lstm(problem: LstmProblem) -> dict[str, np.ndarray]:
    import tensorflow as tf

    case = problem.case
    leaves = {name: tf.Variable(problem.operands[name].values) for name in problem.leaves}
    layer = require("keras").layers.LSTM(
        case.units,
        activation=case.activation,
        recurrent_activation=case.recurrent_activation,
        use_bias=case.bias != "none",
        return_sequences=True,
        return_state=True,
        go_backwards=case.reverse,
        # Without cuDNN: Keras looks for one mask there.
        **({"implementation": 1, "use_cudnn": False} if case.dropout else {}),
        dropout=0.5 * case.has("dropout_input"),
        recurrent_dropout=0.5 * case.has("dropout_hidden"),
        zero_output_for_mask=case.zero_masked_output,
        dtype="float64",
    )
    zeros = tf.zeros((case.batch, case.units), tf.float64)
    mask = None if problem.mask is None else tf.constant(problem.mask.T)
    layer.build((case.batch, case.steps, case.inputs))
    # Its masks are its own until it has drawn some.
    drawn = {name: [*problem.operands[name].values] for name in NOISE if case.has(name)}
    layer.cell._dropout_mask = drawn.get("dropout_input")
    layer.cell._recurrent_dropout_mask = drawn.get("dropout_hidden")
    with tf.GradientTape() as tape:
        weights = [leaves["weight_ih"], leaves["weight_hh"], leaves.get("bias_ih")]
        values = [tf.transpose(w) for w in weights if w is not None]
        state = [leaves.get(name, zeros) + 0 for name in ("h0", "c0")]
        x = tf.transpose(leaves["input"], [1, 0, 2])
        variables = [v.path for v in layer.trainable_variables]
        assert [path.split("/")[-1] for path in variables][:2] == ["kernel", "recurrent_kernel"]
        results = layer.stateless_call(
            values,
            list(layer.non_trainable_variables),
            x,
            mask=mask,
            initial_state=state,
            training=True,
        )[0]
        output = tf.transpose(results[0], [1, 0, 2])
        output = output[::-1] if case.reverse else output
        outputs = {"output": output, "h_n": results[1], "c_n": results[2]}
        given = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}
        loss = sum(
            tf.reduce_sum(array * problem.operands[given[name]].values)
            for name, array in outputs.items()
            if given[name] in problem.operands
        )
    grads = tape.gradient(loss, leaves, unconnected_gradients="zero")
    outputs |= {f"grad_{name}": grad for name, grad in grads.items()}
    return {name: np.asarray(array) for name, array in outputs.items()}


@pytest.mark.parametrize("case", KERAS, ids=lambda case: case.id)
def test_reference_is_that_of_keras(case: LstmCase) -> None:
    require("tensorflow")
    problem = build(case, "float64")
    expected = keras_lstm(problem)
    close(reference(problem), expected, list(expected))


def test_frameworks_see_most_of_the_table() -> None:
    assert len(TORCH) > 60 and len(KERAS) > 60
    assert any(case.lengths and case.reverse for case in TORCH)
    assert any(case.projection and case.reverse for case in TORCH)
    masks = {(case.mask, case.reverse) for case in KERAS}
    assert len(masks) >= 6, masks
    assert {case.dropout for case in KERAS} == {"", "input", "hidden", "both"}
    assert any(case.dropout and case.mask for case in KERAS)


@pytest.mark.parametrize("case", [c for c in FINITE if c.steps <= 9], ids=lambda case: case.id)
def test_gradients_are_differences(case: LstmCase) -> None:
    """Along one direction of each operand, by central differences in extended precision."""
    problem = build(case, "float64")
    lstm, results = computed(problem, np.longdouble)
    random = np.random.default_rng(0)
    given = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}

    def loss(name: str, shift: np.ndarray) -> np.longdouble:
        moved = dataclasses.replace(lstm, arrays={**lstm.arrays, name: lstm.arrays[name] + shift})
        outputs = moved.forward()
        pairs = [(outputs[n], lstm.arrays[g]) for n, g in given.items() if g in lstm.arrays]
        return sum(((a * g).sum() for a, g in pairs), np.longdouble(0))

    with np.errstate(all="ignore"):
        for name in problem.leaves:
            grad, value = results[f"grad_{name}"], lstm.arrays[name]
            grad = case.unrow(grad) if name == "input" else grad
            way = random.standard_normal(value.shape)
            step = np.longdouble(1e-7)
            slope = (loss(name, step * way) - loss(name, -step * way)) / (2 * step)
            size = (np.abs(grad) * np.abs(way)).sum()
            least = CANCELLED / 1e-4 * case.norm
            assert abs(slope - (grad * way).sum()) <= 1e-7 * size + least, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cases_say_something(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    exact, other = reference(problem), rival(problem)
    results = ["output", "h_n", "c_n"][case.cell :] + [f"grad_{name}" for name in problem.leaves]
    assert list(exact) == results and list(other) == results
    for name, array in exact.items():
        assert array.shape == case.sizes(name), name
        assert_within_twice(encode(other[name], dtype), other[name], array, name, dtype=dtype)
    if case.values == "nonfinite":
        assert not np.isfinite(exact["output"]).all() and np.isfinite(exact["output"]).any()
    elif case.values == "saturated":
        gates = encode(np.stack(computed(problem)[0].steps["gates"]), dtype)
        assert np.isin(decode(gates), (-1, 0, 1)).all()
    if case.values == "tiny":
        normal = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(dtype, 2.0**-126)
        assert 0 < np.abs(exact["h_n"]).max() < normal


def test_every_two_options_meet() -> None:
    cases = [case for case in CASES if case.id.startswith("pairs_")]
    for a, b in itertools.combinations(OPTIONS, 2):
        for one, two in itertools.product(OPTIONS[a], OPTIONS[b]):
            # An empty option is the default, which any case without the others has.
            wanted = {**one, **two}
            assert any(
                all(getattr(case, name) == value for name, value in wanted.items())
                for case in cases
            ), wanted


def test_case_names_are_unique_and_arrays_reproducible() -> None:
    assert len(BY_ID) == len(CASES)
    first, second = (build(CASES[-1], "float32") for _ in range(2))
    for name, operand in first.operands.items():
        assert_same_bits(operand.base, second.operands[name].base, name)
        assert operand.base is not second.operands[name].base
