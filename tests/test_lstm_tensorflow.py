"""`twinfuse.tensorflow.lstm` and `lstm_cell`: numbers, in eager code and in graphs."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES
from tests.conftest import Launched, require
from tests.lstm_cases import ONE_BIAS, LstmCase, LstmProblem, assert_close, build
from tests.rule import assert_same_bits

tf = require("tensorflow")

import twinfuse  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402

# Packed sequences and projected cells are torch's.
CASES = [case for case in ONE_BIAS if not case.lengths and not (case.cell and case.projection)]
BY_ID = {case.id: case for case in CASES}
SOME = [
    BY_ID[i]
    for i in (
        *("mask_interior_reverse", "zoneout_projection", "peephole_tile", "norm_dropout_extras"),
        *("cell_peephole", "cell_norm_dropout_3_5_17"),
    )
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

# Names of the table, and of the functions here.
NAMES = {
    "input": "x",
    "weight_ih": "kernel",
    "weight_hh": "recurrent_kernel",
    "bias_ih": "bias",
    "weight_hr": "projection",
    "peephole": "peephole",
    "norm": "norm",
    "h0": "h",
    "c0": "c",
    "zoneout_hidden": "zoneout_hidden",
    "zoneout_cell": "zoneout_cell",
    "dropout_input": "dropout_input",
    "dropout_hidden": "dropout_hidden",
}
GRADS = {"output": "grad_output", "h_n": "grad_h", "c_n": "grad_c"}


def turned(name: str, problem: LstmProblem, values: Any) -> Any:
    """Between the layout of the table and ours; either way."""
    name = name.removeprefix("grad_")
    if name in ("weight_ih", "weight_hh", "weight_hr"):
        return values.swapaxes(0, 1)
    sequence = name in ("input", "output", "zoneout_hidden", "zoneout_cell")
    return values.swapaxes(0, 1) if sequence and problem.case.batch_first else values


def tensors(problem: LstmProblem) -> dict[str, Any]:
    """Operands and the gradients given, by the names of the table."""
    found = {}
    for name, operand in problem.operands.items():
        if name.startswith("zoneout") and problem.case.zoneout == "means":
            found[name] = tf_cases.tensor(operand.contiguous.ravel()[:1].reshape(()))
        else:
            found[name] = tf_cases.tensor(turned(name, problem, operand.contiguous))
    return found


def call(problem: LstmProblem, given: dict[str, Any]) -> dict[str, Any]:
    """The results, by the names of the table."""
    case = problem.case
    named: dict[str, Any] = {ours: given.get(name) for name, ours in NAMES.items()}
    state = [named.pop("h"), named.pop("c")]
    named |= {
        "activation": case.activation,
        "recurrent_activation": case.recurrent_activation,
        "norm_epsilon": case.norm_epsilon,
    }
    if case.cell:
        del named["projection"]
        return dict(zip(("h_n", "c_n"), tftf.lstm_cell(states=state, **named), strict=True))
    mask = problem.mask
    if mask is not None and case.batch_first:
        mask = mask.T
    results = tftf.lstm(
        initial_state=None if state == [None, None] else state,
        mask=mask,
        go_backwards=case.reverse,
        time_major=not case.batch_first,
        zero_output_for_mask=case.zero_masked_output,
        **named,
    )
    return dict(zip(("output", "h_n", "c_n"), results, strict=True))


def gradients(problem: LstmProblem, given: dict[str, Any]) -> dict[str, Any]:
    leaves = {name: given[name] for name in problem.leaves}
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        results = call(problem, given)
    targets = [name for name in results if GRADS[name] in given]
    grads = tape.gradient(
        [results[name] for name in targets],
        leaves,
        [given[GRADS[name]] for name in targets],
        unconnected_gradients="zero",
    )
    return results | {f"grad_{name}": grad for name, grad in grads.items()}


def arrays(problem: LstmProblem, found: dict[str, Any]) -> dict[str, Any]:
    """As the table has them."""
    return {name: turned(name, problem, tf_cases.array(value)) for name, value in found.items()}


def poison(problem: LstmProblem) -> None:
    """Leave NaN in the memory that outputs are about to be allocated from."""
    for name in ("output", *problem.leaves):
        if name != "output" or not problem.case.cell:
            tf.fill(problem.case.sizes(name), tf.cast(np.nan, problem.dtype)).numpy()


@every_dtype
@every_case
def test_eager(case: LstmCase, dtype: str, launched: Launched) -> None:
    problem = build(case, dtype)
    given = tensors(problem)
    poison(problem)
    name = "lstm_cell" if case.cell else "lstm"
    with launched(f"{name}_forward_", times=1), launched(f"{name}_backward_", times=1):
        ours = arrays(problem, gradients(problem, given))
    native = None
    if case.in_keras:
        with twinfuse.use_backend("reference"):
            native = arrays(problem, gradients(problem, given))
    assert_close(problem, ours, native)


@every_dtype
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
@pytest.mark.parametrize("known", ["known", "rank"])
def test_graph_has_the_bits_of_eager(
    case: LstmCase, dtype: str, known: str, launched: Launched
) -> None:
    problem = build(case, dtype)
    given = tensors(problem)
    specs = {
        name: tf.TensorSpec(t.shape if known == "known" else [None] * t.shape.rank, t.dtype)
        for name, t in given.items()
    }
    function = tf.function(lambda given: gradients(problem, given), input_signature=[specs])
    shapes = function.get_concrete_function().output_shapes
    name = "lstm_cell" if case.cell else "lstm"
    with launched(f"{name}_forward_", times=1), launched(f"{name}_backward_", times=1):
        graph = arrays(problem, function(given))
    eager = arrays(problem, gradients(problem, given))
    for name, array in graph.items():
        assert_same_bits(array, eager[name], f"{case.id} {name}")
        assert shapes[name].rank == array.ndim
        if known == "known":
            assert shapes[name] == turned(name, problem, array).shape


def operands(steps: int = 4, batch: int = 3, inputs: int = 5, units: int = 6) -> dict[str, Any]:
    """In float64, of a layer."""
    shapes = {
        "x": (batch, steps, inputs),
        "kernel": (inputs, 4 * units),
        "recurrent_kernel": (units, 4 * units),
        "bias": (4 * units,),
        "h": (batch, units),
        "c": (batch, units),
    }
    return {n: tf_cases.random(*s, seed=i) / 2 for i, (n, s) in enumerate(shapes.items())}


def factors(*shape: int, seed: int = 0) -> Any:
    """Of a dropout."""
    return tf.cast(tf.random.stateless_uniform(shape, [5, seed]) < 0.75, tf.float64) / 0.75


NORM = {"norm": 1 + tf_cases.random(2, 24) / 2, "norm_epsilon": 0.1}
DROPOUT = {"dropout_input": factors(4, 3, 5), "dropout_hidden": factors(4, 3, 6, seed=1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]},
    "backwards": {
        "mask": [[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]],
        "go_backwards": True,
        "zero_output_for_mask": True,
    },
    "extras": {
        "peephole": tf_cases.random(3, 6),
        "projection": tf_cases.random(6, 6),
        "zoneout_hidden": tf.constant(0.25, tf.float64),
        "zoneout_cell": tf.cast(tf.random.stateless_uniform((3, 4, 6), [1, 2]) < 0.5, tf.float64),
    },
    "activations": {"activation": "sigmoid", "recurrent_activation": "tanh"},
    "norm": NORM,
    "dropout": {**DROPOUT, "mask": [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]},
}


def layer(options: dict[str, Any]) -> Any:
    def function(x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, h: Any, c: Any) -> Any:
        found = tftf.lstm(x, kernel, recurrent_kernel, bias, (h, c), **options)
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in found], 0)

    return function


def cell(options: dict[str, Any]) -> Any:
    def function(x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, h: Any, c: Any) -> Any:
        found = tftf.lstm_cell(x[:, 0], (h, c), kernel, recurrent_kernel, bias, **options)
        return tf.concat(found, 0)

    return function


FUNCTIONS = {name: layer(options) for name, options in OPTIONS.items()} | {
    "cell": cell({}),
    "cell_extras": cell({"peephole": tf_cases.random(3, 6), "zoneout_cell": np.float64(0.25)}),
    "cell_norm": cell(NORM),
    "cell_dropout": cell(DROPOUT),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("graph", ["eager", "known", "unknown"])
def test_higher_gradients(name: str, graph: str) -> None:
    values = list(operands().values())

    def run(*values: Any) -> Any:
        return tf_cases.derivatives(FUNCTIONS[name], list(values))

    function = run
    if graph != "eager":
        unknown = [tf.TensorSpec([None] * t.shape.rank, t.dtype) for t in values]
        function = tf.function(run, input_signature=unknown if graph == "unknown" else None)
    ours = function(*values)
    with twinfuse.use_backend("reference"):
        tf_cases.assert_close(ours, run(*values), 1e-11)
    assert all(float(tf.reduce_max(tf.abs(g))) > 0 for g in tf.nest.flatten(ours))


def test_gradients_of_extras_are_those_of_the_reference() -> None:
    options = OPTIONS["extras"] | NORM | DROPOUT
    names = ("peephole", "projection", "norm")
    values = [*operands().values(), *(options.pop(name) for name in names)]

    def function(*values: Any) -> Any:
        return layer({**options, **dict(zip(names, values[-3:], strict=True))})(*values[:-3])

    ours = tf_cases.derivatives(function, values)[:2]
    with twinfuse.use_backend("reference"):
        tf_cases.assert_close(ours, tf_cases.derivatives(function, values)[:2], 1e-11)


@pytest.mark.parametrize("name", ["plain", "mask", "cell"])
def test_gradient_matches_differences(name: str) -> None:
    values = list(operands(steps=4, batch=3, inputs=2, units=2).values())
    theory, numeric = tf.test.compute_gradient(FUNCTIONS[name], values)
    for t, n in zip(theory, numeric, strict=True):
        np.testing.assert_allclose(t, n, atol=1e-6)


def test_sixteen_threads() -> None:
    problem = build(BY_ID["mask_tile"], "float32")
    given = tensors(problem)
    graph = tf.function(lambda given: gradients(problem, given))
    expected = arrays(problem, gradients(problem, given))
    graph(given)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                found = graph(given) if number % 2 else gradients(problem, given)
                for name, array in arrays(problem, found).items():
                    assert_same_bits(array, expected[name], name)
        except BaseException as error:  # a thread's exception would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
