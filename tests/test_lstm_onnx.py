"""The LSTM of the core against that of ONNX: a reference that nobody here wrote.

ONNX has its gates in the order i, o, f, c, its peepholes in the order i, o, f, and one more
dimension for the directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.arrays import ROUNDOFF, Array, decode, lay_out
from tests.conftest import require
from tests.core_lstm_api import forward
from tests.lstm_problem import LstmCase, LstmProblem, reference
from tests.lstm_reference import ACTIVATIONS

module = require("onnx.backend.test.case.node.lstm")

Arrays = dict[str, Array]


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Arrays, Arrays]]:
    """ONNX's own node tests: node, inputs by name, expected outputs by name."""
    found = {}

    def expect(node: Any, inputs: list[Array], outputs: list[Array], name: str) -> None:
        names = [output for output in node.output if output]
        given = dict(zip(node.input, inputs, strict=True))
        found[name] = node, given, dict(zip(names, outputs, strict=True))

    monkeypatch.setattr(module, "expect", expect)
    for name in sorted(vars(module.LSTM)):
        if name.startswith("export_"):
            getattr(module.LSTM, name)()
    return found


def gates(array: Array) -> Array:
    """From i, o, f, c to i, f, g, o."""
    i, o, f, c = np.split(array, 4)
    return np.concatenate([i, f, c, o])


def problem_of(
    given: Arrays, direction: int, reverse: bool, dtype: str, **options: Any
) -> LstmProblem:
    """Of one direction; `X` and the states have their steps and directions first."""
    x, w = given["X"], given["W"][direction]
    units = len(w) // 4
    case = LstmCase(
        "onnx", x.shape[0], x.shape[1], x.shape[2], units, reverse=reverse, grads="none", **options
    )
    values = {
        "input": x,
        "weight_ih": gates(w),
        "weight_hh": gates(given["R"][direction]),
    }
    if "B" in given:
        values["bias_ih"], values["bias_hh"] = map(gates, np.split(given["B"][direction], 2))
    if "initial_h" in given:
        values["h0"], values["c0"] = (given[f"initial_{s}"][direction] for s in "hc")
    if "P" in given:
        i, o, f = np.split(given["P"][direction], 3)
        values["peephole"] = np.stack([i, f, o])
    operands = {
        name: lay_out(np.asarray(a, float), "contiguous", dtype) for name, a in values.items()
    }
    return LstmProblem(case, dtype, operands, None)


def results(given: Arrays, direction: str, batch_first: bool, dtype: str, **options: Any) -> Arrays:
    """`Y`, `Y_h` and `Y_c` of the core, with ONNX's dimensions."""
    if batch_first:
        swapped = ("X", "initial_h", "initial_c")
        given = {n: a.swapaxes(0, 1) if n in swapped else a for n, a in given.items()}
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    each = []
    for number, reverse in enumerate(ways):
        problem = problem_of(given, number, reverse, dtype, **options)
        got = forward(problem)
        exact = reference(problem)
        for name in ("output", "h_n", "c_n"):
            error = np.abs(decode(got[name]) - exact[name]).max(initial=0)
            assert error <= 64 * ROUNDOFF[dtype] * np.abs(exact[name]).max(initial=1), name
        each.append({name: decode(array) for name, array in got.items()})
    y = np.stack([one["output"] for one in each], 1)
    h, c = (np.stack([one[name] for one in each]) for name in ("h_n", "c_n"))
    if batch_first:
        return {"Y": y.transpose(2, 0, 1, 3), "Y_h": h.swapaxes(0, 1), "Y_c": c.swapaxes(0, 1)}
    return {"Y": y, "Y_h": h, "Y_c": c}


def test_node_cases_of_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recorded(monkeypatch)
    assert {"test_lstm_defaults", "test_lstm_with_initial_bias"} <= found.keys()
    assert {"test_lstm_with_peepholes", "test_lstm_batchwise"} <= found.keys()
    for name, (node, given, expected) in found.items():
        attributes = {a.name: a for a in node.attribute}
        direction = attributes["direction"].s.decode() if "direction" in attributes else "forward"
        batch_first = "layout" in attributes and attributes["layout"].i == 1
        assert attributes.keys() <= {"hidden_size", "direction", "layout"}, name
        got = results(given, direction, batch_first, "float32")
        for output, array in expected.items():
            np.testing.assert_allclose(got[output], array, 2e-6, 1e-7, f"{name}: {output}")


class OfAnyFunctions(module.LSTMHelper):  # type: ignore[misc, name-defined]
    gate, cell = "sigmoid", "tanh"

    def f(self, x: Array) -> Array:
        return ACTIVATIONS[self.gate][0](x)

    def g(self, x: Array) -> Array:
        return ACTIVATIONS[self.cell][0](x)

    h = g


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ACTIVATIONS)
@pytest.mark.parametrize("gate", ACTIVATIONS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_numbers_that_tell_gates_apart(
    direction: str, batch_first: bool, gate: str, cell: str, dtype: str
) -> None:
    """ONNX's loop on random numbers: the weights of its own tests are all equal."""
    random = np.random.default_rng(5)
    ways, steps, batch, inputs, units = (2 if direction[0] == "b" else 1), 4, 3, 5, 6
    first = (batch, steps) if batch_first else (steps, batch)
    states = (batch, ways) if batch_first else (ways, batch)
    sizes = {
        "X": (*first, inputs),
        "W": (ways, 4 * units, inputs),
        "R": (ways, 4 * units, units),
        "B": (ways, 8 * units),
        "P": (ways, 3 * units),
        "initial_h": (*states, units),
        "initial_c": (*states, units),
    }
    given = {name: random.standard_normal(size) * 0.5 for name, size in sizes.items()}
    given = {name: array.astype(dtype).astype(float) for name, array in given.items()}
    helper = OfAnyFunctions(**given, direction=direction, layout=int(batch_first))
    helper.gate, helper.cell = gate, cell
    expected = dict(zip(("Y", "Y_h", "Y_c"), helper.step()))
    got = results(
        given, direction, batch_first, dtype, activation=cell, recurrent_activation=gate,
        peephole=True,
    )  # fmt: skip
    for output, array in expected.items():
        assert got[output].shape == array.shape
        error = np.abs(got[output] - array).max()
        assert error <= 64 * ROUNDOFF[dtype] * np.abs(array).max(), output
