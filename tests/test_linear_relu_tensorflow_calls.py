"""`twinfuse.tensorflow.linear_relu`: transformations, unusual arguments, errors, fall-backs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched, require

tf = require("tensorflow")

import twinfuse  # noqa: E402
import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402
from twinfuse.tensorflow import _binding  # noqa: E402

InvalidArgument = tf.errors.InvalidArgumentError


def in_fresh_process(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Transformations


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_forward_accumulator(leading: tuple[int, ...]) -> None:
    operands = tf_cases.operands(*leading)
    ours, theirs = (tf_cases.forward_mode(f, operands) for f in (tftf.linear_relu, tf_cases.native))
    assert float(tf.norm(ours[0])) > 0
    tf_cases.assert_close(ours, theirs)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_jacobian_and_hessian(strict: bool, graph: bool, launched: Launched) -> None:
    operands = tf_cases.operands(3)

    run = tf.function(tf_cases.jacobians) if graph else tf_cases.jacobians
    with twinfuse.strict(strict), launched(f"linear_relu_{'backward' if strict else 'forward'}_"):
        ours = run(tftf.linear_relu, operands)
    tf_cases.assert_close(ours, tf_cases.jacobians(tf_cases.native, operands))


@pytest.mark.parametrize("mapped", ["x", "kernel", "bias", "x kernel", "kernel bias", "x bias"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.allow_fallback
def test_vectorized_map(mapped: str, leading: tuple[int, ...], launched: Launched) -> None:
    operands = tf_cases.operands(*leading)
    with launched("linear_relu_forward_", times=1 if mapped == "x" else 0):
        ours = tf_cases.mapped(tf.vectorized_map, tftf.linear_relu, operands, mapped)
    theirs = tf_cases.mapped(tf_cases.one_by_one, tf_cases.native, operands, mapped)
    tf_cases.assert_close(ours, theirs)


def test_function_retraces_and_keeps_the_backend_it_was_traced_with(launched: Launched) -> None:
    traces = []

    @tf.function
    def function(x: Any, kernel: Any) -> Any:
        traces.append(x.shape)
        return tftf.linear_relu(x, kernel)

    x, kernel, _ = tf_cases.operands(3)
    with launched("linear_relu_forward_", times=3):
        function(x, kernel), function(x, kernel), function(x[:2], kernel)
    assert len(traces) == 2
    with twinfuse.use_backend("reference"):
        with launched("linear_relu_forward_", times=1):
            function(x, kernel)
        with launched("linear_relu_forward_", times=0):
            tf.function(tftf.linear_relu)(x, kernel)
            tftf.linear_relu(x, kernel)


def test_variables_and_their_gradients(launched: Launched) -> None:
    x, kernel, bias = tf_cases.operands(3)
    kernel, bias = tf.Variable(kernel), tf.Variable(bias)

    def grads(function: Any) -> Any:
        with tf.GradientTape() as tape:
            y = function(x, kernel, bias)
        return tape.gradient(y, [kernel, bias])

    with launched("linear_relu_backward_", times=2):
        ours = grads(tftf.linear_relu), tf.function(grads)(tftf.linear_relu)
    theirs = grads(tf_cases.native)
    tf_cases.assert_close(ours, (theirs, theirs))


def test_what_converts_to_a_tensor(launched: Launched) -> None:
    x = [[1.0, -2.0]]
    kernel, bias = np.eye(2), np.array([0.5, 0.5])  # float64, read as the float32 of x
    with launched("linear_relu_forward_", times=1):
        y = tftf.linear_relu(x, kernel, bias)
    assert y.dtype == tf.float32
    np.testing.assert_array_equal(y, [[1.5, 0.0]])


# Fall-backs: what the native layer accepts


@pytest.mark.allow_fallback
@pytest.mark.parametrize("graph", [False, True])
def test_native_serves_what_no_kernel_does(graph: bool, launched: Launched) -> None:
    x, kernel, bias = tf_cases.operands(3)
    narrow = [tf.cast(t, tf.bfloat16) for t in (x, kernel)]
    calls: list[tuple[str, list[Any]]] = [
        ("no kernel takes dtype int32", [tf.cast(4 * t, tf.int32) for t in (x, kernel, bias)]),
        ("bias is not known to be", [x, kernel, bias[0]]),
        ("bias is not known to be", [x, kernel, bias[:1]]),
        ("bias is not known to be", [x, kernel, tf.stack([bias] * 3)]),
        ("bias is not known to be", [x, kernel[:, :1], bias]),
        ("kernel is not known to be a matrix", [x, kernel[None]]),
        ("x is bfloat16 and kernel is float32", [narrow[0], tf.cast(kernel, tf.float32)]),
    ]
    for reason, operands in calls:
        y = tf.matmul(*operands[:2])
        expected = tf.nn.relu(y + operands[2] if len(operands) > 2 else y)
        function = tf.function(tftf.linear_relu) if graph else tftf.linear_relu
        none = launched("linear_relu_forward_", times=0)
        with pytest.warns(twinfuse.FallbackWarning, match=reason), none:
            got = function(*operands)
        np.testing.assert_array_equal(got, expected, reason)
        report = twinfuse.explain(tftf.linear_relu, *operands)
        assert report[0].backend == "reference" and reason in report[0].reason
        twinfuse._backend._warned.clear()


@pytest.mark.allow_fallback
def test_ragged_and_complex_as_native() -> None:
    kernel = tf.ones((2, 3))
    ragged = tf.RaggedTensor.from_row_lengths(tf.ones((3, 2)), [1, 2])
    batch = tf.ones((2, 2, 3))
    with pytest.warns(twinfuse.FallbackWarning, match="x is a RaggedTensor"):
        got = tftf.linear_relu(ragged, batch, tf.ones(3))
    np.testing.assert_array_equal(got.flat_values, np.full((3, 3), 3.0))
    sparse = tf.sparse.from_dense(tf.ones((2, 2)))
    for operands in (
        [sparse, kernel],
        [tf.ones((2, 2), tf.complex64), tf.ones((2, 3), tf.complex64)],
    ):
        with pytest.raises(Exception) as theirs:
            tf.nn.relu(tf.matmul(*operands))
        with pytest.raises(type(theirs.value)):
            tftf.linear_relu(*operands)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("nested", [False, True])
def test_xla_takes_the_reference(nested: bool, launched: Launched) -> None:
    operands = tf_cases.operands(3)
    inner = tf.function(tftf.linear_relu) if nested else tftf.linear_relu

    @tf.function(jit_compile=True)
    def grads(*operands: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = inner(*operands)
        return y, tape.gradient(y, operands)

    with launched("linear_relu_", times=0), pytest.warns(twinfuse.FallbackWarning, match="XLA"):
        got = grads(*operands)
    with tf.GradientTape() as tape:
        tape.watch(operands)
        y = tf_cases.native(*operands)
    tf_cases.assert_close(got, (y, tape.gradient(y, operands)))
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="XLA"):
        tf.function(lambda *o: tftf.linear_relu(*o), jit_compile=True)(*operands)


@pytest.mark.allow_fallback
def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["twinfuse.tensorflow.linear_relu"]
    monkeypatch.setattr(module, "_fused", None)
    monkeypatch.setattr(_binding, "ops", None)
    monkeypatch.setattr(_binding, "missing", "nothing was built")
    operands = tf_cases.operands(3)
    with pytest.warns(twinfuse.FallbackWarning, match="nothing was built"):
        tf_cases.assert_close(tftf.linear_relu(*operands), tf_cases.native(*operands))
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="nothing was built"):
        tftf.linear_relu(*operands)


@pytest.mark.allow_fallback
def test_a_gpu_without_kernels_and_a_backend_that_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = tf_cases.operands(3)
    with twinfuse.use_backend("cpu"):
        assert twinfuse.explain(tftf.linear_relu, *operands)[0].backend == "cpu"
        with twinfuse.strict():
            tftf.linear_relu(*operands)
    with twinfuse.use_backend("cuda"), pytest.warns(twinfuse.FallbackWarning, match="'cuda' was"):
        tf_cases.assert_close(tftf.linear_relu(*operands), tf_cases.native(*operands))
    # Tracing cannot know where an op will be placed.
    monkeypatch.setattr(_binding, "device_type", lambda tensor=None: "cuda")
    with pytest.warns(twinfuse.FallbackWarning, match="GPU|CUDA"):
        got = tf.function(tftf.linear_relu)(*operands)
    tf_cases.assert_close(got, tf_cases.native(*operands))


# Errors


@pytest.mark.parametrize("graph", [False, True])
def test_errors_as_native(graph: bool) -> None:
    x, kernel, bias = tf_cases.operands(3, k=7, n=5)
    single = tf.cast(kernel, tf.float32)
    calls = [
        ([x[:, :6], kernel], r"x: expected \[\.\.\., 7\] for kernel \[7, 5\], got \[3, 6\]"),
        ([x, kernel, bias[:4]], r"bias: expected \[5\] for kernel \[7, 5\], got \[4\]"),
        ([x[0, 0], kernel], r"x: expected at least one dimension .* got a scalar"),
        ([x, single], r"kernel: expected dtype float64 as x has, got float32"),
        ([x, kernel, tf.cast(bias, tf.float32)], r"bias: expected dtype float64 .* got float32"),
    ]
    for operands, message in calls:
        function = tf.function(tftf.linear_relu) if graph else tftf.linear_relu
        native = tf.function(tf_cases.native) if graph else tf_cases.native
        with pytest.raises((InvalidArgument, ValueError, TypeError)) as theirs:
            native(*operands)
        with pytest.raises(type(theirs.value), match="linear_relu: " + message):
            function(*operands)


def test_errors_at_run_time_name_the_argument() -> None:
    x, kernel, _ = tf_cases.operands(3)
    spec = [tf.TensorSpec(None, tf.float64), tf.TensorSpec([7, 5], tf.float64)]
    function = tf.function(lambda x, kernel: tftf.linear_relu(x, kernel), input_signature=spec)
    with pytest.raises(InvalidArgument, match=r"linear_relu: x: expected .*7.* got \[3,6\]"):
        function(x[:, :6], kernel)
    with pytest.raises(InvalidArgument, match=r"linear_relu: x: expected .* got \[\]"):
        function(x[0, 0], kernel)


def test_shape_function() -> None:
    raw = _binding.ops.twinfuse_linear_relu
    graph = tf.Graph()
    with graph.as_default():
        make = lambda shape: tf.compat.v1.placeholder(tf.float32, shape)  # noqa: E731
        shapes = [
            ([[2, 3], [3, 4], [4]], [2, 4]),
            ([[None, 3], [3, 4], [4]], [None, 4]),
            ([[None, None, None], [3, 4], None], [None, None, 4]),
            ([[2, 3], None, [4]], [2, 4]),
            ([[2, 3], None, None], [2, None]),
            ([[2, None], [None, None], None], [2, None]),
            ([None, [3, 4], [4]], None),
        ]
        for (x, kernel, bias), expected in shapes:
            y = raw(make(x), make(kernel), [make(bias)])
            assert (y.shape.as_list() if y.shape.rank is not None else None) == expected
        grads = _binding.ops.twinfuse_linear_relu_grad(
            make([None, 4]), make([2, None]), make([2, None]), make([3, None]), 1, 1, 1
        )
        assert [g.shape.as_list() for (g,) in grads] == [[2, 3], [3, 4], [4]]
        for x, kernel, bias in [([2, 3], [4, 4], [4]), ([2, 3], [3, 4], [5]), ([], [3, 4], [4])]:
            with pytest.raises(ValueError):
                raw(make(x), make(kernel), [make(bias)])


# Files and speed


@pytest.mark.slow
def test_saved_model_in_a_fresh_process(tmp_path: Path) -> None:
    x, kernel, bias = tf_cases.operands(3)

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 7], tf.float64)])
        def run(self, x: Any) -> Any:
            return tftf.linear_relu(x, kernel, bias)

    tf.saved_model.save(Module(), str(tmp_path / "fused"))
    with tftf.use_backend("reference"):
        tf.saved_model.save(Module(), str(tmp_path / "portable"))
    np.savez(tmp_path / "case.npz", x=x, y=tf_cases.native(x, kernel, bias))
    load = """
        import numpy as np, sys, tensorflow as tf
        {first}
        case = np.load({folder!r} + "/case.npz")
        module = tf.saved_model.load({folder!r} + "/{name}")
        np.testing.assert_allclose(module.run(case["x"]), case["y"], rtol=1e-12)
        assert ("twinfuse" in sys.modules) == bool({first!r})
        {last}
    """
    folder = str(tmp_path)
    in_fresh_process(load.format(first="", folder=folder, name="portable", last=""))
    in_fresh_process(
        load.format(
            first="import twinfuse.tensorflow",
            folder=folder,
            name="fused",
            last="assert sum(sys.modules['twinfuse'].launches().values()) == 1",
        )
    )


def test_eager_call_costs_less_than_half_of_the_composed_one() -> None:
    x, kernel, bias = tf_cases.operands(1, k=16, n=16, dtype="float32")
    pairs = []
    for _ in range(7):
        pairs.append(
            [
                timeit.timeit(lambda f=f: f(x, kernel, bias), number=200)
                for f in (tftf.linear_relu, lambda x, k, b: tf.nn.relu(tf.matmul(x, k) + b))
            ]
        )
    ours, theirs = np.min(pairs, axis=0)
    assert ours * 2 < theirs, f"ours {ours * 5e3:.1f} us, composed {theirs * 5e3:.1f} us"
