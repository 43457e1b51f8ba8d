"""The activations of the core's LSTM, read from the gates that it saves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.arrays import DTYPES, ROUNDOFF, SMALLEST, Array, decode, encode
from tests.core_lstm_api import forward
from tests.lstm_cases import LstmCase, build
from tests.lstm_reference import ACTIVATIONS
from tests.test_core_lstm import changed

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


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
