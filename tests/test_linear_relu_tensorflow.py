"""`twinfuse.tensorflow.linear_relu`: numbers, in eager code and in graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.arrays import DTYPES
from tests.cases import CASES, LinearCase
from tests.conftest import Launched, require
from tests.problem import build
from tests.rule import assert_same_bits

tf = require("tensorflow")

import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

BY_ID = {case.id: case for case in CASES}
SOME = [
    BY_ID[i] for i in ("row_of_digits_network", "several_blocks", "two_leading", "vector_input")
]


@every_dtype
@every_case
def test_eager(case: LinearCase, dtype: str, launched: Launched) -> None:
    problem = build(case, dtype)
    given = tf_cases.tensors(problem)
    tf_cases.poison(problem)
    with launched("linear_relu_forward_", times=1), launched("linear_relu_backward_", times=1):
        ours = tf_cases.run(tftf.linear_relu, given)
    tf_cases.check(problem, ours, tf_cases.run(tf_cases.native, given))


@every_dtype
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
@pytest.mark.parametrize("known", ["known", "batch", "rank"])
def test_graph_has_the_bits_of_eager(
    case: LinearCase, dtype: str, known: str, launched: Launched
) -> None:
    given = tf_cases.tensors(build(case, dtype))
    shape = {"known": given.x.shape, "rank": None}.get(known, [None] * len(case.leading) + [case.k])
    others = [tf.TensorSpec(t.shape, t.dtype) for t in given.operands[1:]]
    function = tf.function(
        lambda *operands: tftf.linear_relu(*operands),
        input_signature=[tf.TensorSpec(shape, given.x.dtype), *others],
    )
    shape = function.get_concrete_function().output_shapes
    leading = {"known": list(case.leading), "batch": [None] * len(case.leading)}
    if known == "rank":
        assert shape.rank is None
    else:
        assert shape.as_list() == [*leading[known], case.n]
    with launched("linear_relu_forward_", times=1), launched("linear_relu_backward_", times=1):
        graph = tf_cases.run(function, given)
    eager = tf_cases.run(tftf.linear_relu, given)
    for name in tf_cases.RESULTS:
        assert_same_bits(getattr(graph, name), getattr(eager, name), f"{case.id} {name}")


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_higher_gradients(leading: tuple[int, ...], with_bias: bool, graph: bool) -> None:
    operands = tf_cases.operands(*leading)[: 2 + with_bias]

    run = tf.function(tf_cases.derivatives) if graph else tf_cases.derivatives
    ours, theirs = (run(f, operands) for f in (tftf.linear_relu, tf_cases.native))
    tf_cases.assert_close(ours, theirs)
    assert all(float(tf.reduce_max(tf.abs(g))) > 0 for g in tf.nest.flatten(ours))


def test_gradient_matches_differences() -> None:
    x, kernel, bias = tf_cases.operands(4)
    # Far from the kink, where differences would straddle it.
    bias = tf.where(tf.range(5) % 2 == 0, 9.0, -9.0) + 0 * tf.cast(bias, tf.float32)
    bias = tf.cast(bias, tf.float64)
    theory, numeric = tf.test.compute_gradient(tftf.linear_relu, [x, kernel, bias])
    for t, n in zip(theory, numeric, strict=True):
        np.testing.assert_allclose(t, n, atol=1e-6)


@pytest.mark.parametrize("target", range(3))
def test_only_the_gradient_asked_for(target: int, launched: Launched) -> None:
    operands = tf_cases.operands(6)
    with tf.GradientTape() as tape:
        tape.watch(operands[target])
        y = tftf.linear_relu(*operands)
    recorded = []
    fused = tftf.linear_relu.__globals__["_binding"].ops.twinfuse_linear_relu_grad

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        recorded.append([kwargs[n] for n in ("num_x", "num_kernel", "num_bias")])
        return fused(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tftf.linear_relu.__globals__["_binding"].ops, "twinfuse_linear_relu_grad", spy
        )
        with launched("linear_relu_backward_", times=1):
            grad = tape.gradient(y, operands[target])
    assert recorded == [[int(i == target) for i in range(3)]]
    with tf.GradientTape() as tape:
        tape.watch(operands[target])
        y = tf_cases.native(*operands)
    tf_cases.assert_close(grad, tape.gradient(y, operands[target]))


def test_zero_and_none_gradients_as_native() -> None:
    x, kernel, bias = tf_cases.operands(3)

    def connected(function):  # type: ignore[no-untyped-def]
        with tf.GradientTape(persistent=True) as outer:
            outer.watch([x, kernel, bias])
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = function(x, kernel, bias)
            grad = inner.gradient(y, x)
        return outer.gradient(grad, [x, kernel, bias])

    ours, theirs = connected(tftf.linear_relu), connected(tf_cases.native)
    assert [g is None for g in ours] == [g is None for g in theirs] == [False] * 3
    tf_cases.assert_close(ours, theirs)


def test_indexed_slices_gradient() -> None:
    operands = tf_cases.operands(6)

    def grads(function):  # type: ignore[no-untyped-def]
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = tf.gather(function(*operands), [0, 4, 4])
        return tape.gradient(y, operands)

    tf_cases.assert_close(grads(tftf.linear_relu), grads(tf_cases.native))


def test_sixteen_threads(launched: Launched) -> None:
    given = tf_cases.tensors(build(BY_ID["several_blocks"], "float32"))
    graph = tf.function(tftf.linear_relu)
    expected = tf_cases.run(tftf.linear_relu, given)
    graph(*given.operands)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                got = tf_cases.run(graph if number % 2 else tftf.linear_relu, given)
                for name in tf_cases.RESULTS:
                    assert_same_bits(getattr(got, name), getattr(expected, name), name)
        except BaseException as error:  # a thread's exception would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    with launched("linear_relu_forward_", times=160), launched("linear_relu_backward_", times=160):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


def test_inside_the_thread_pools_of_tf_data() -> None:
    x, kernel, bias = tf_cases.operands(64, k=300, n=200, dtype="float32")
    data = tf.data.Dataset.from_tensors(x).repeat(64)
    data = data.map(lambda v: tftf.linear_relu(v, kernel, bias), num_parallel_calls=16)
    expected = tf_cases.array(tftf.linear_relu(x, kernel, bias))
    results = list(data)
    assert len(results) == 64
    for result in results:
        assert_same_bits(tf_cases.array(result), expected, "tf.data")
