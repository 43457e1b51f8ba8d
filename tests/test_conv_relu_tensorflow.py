"""`twinfuse.tensorflow.conv1d_relu` and `conv2d_relu`: numbers, in eager code and in graphs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.arrays import DTYPES
from tests.conftest import Launched, require
from tests.conv_case import ConvCase
from tests.conv_cases import CASES
from tests.problem import build
from tests.rule import assert_same_bits

tf = require("tensorflow")

import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402
from twinfuse.tensorflow import _binding  # noqa: E402

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_format = pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])

BY_ID = {case.id: case for case in CASES}
SOME = [
    BY_ID[i] for i in ("three_by_three", "same_stride", "groups", "dilation", "1d_causal_dilation")
]


def ours(case: ConvCase, data_format: str) -> Callable[..., Any]:
    function = getattr(tftf, case.name)
    return functools.partial(function, **case.tensorflow_arguments(data_format))


@every_format
@every_dtype
@every_case
def test_eager(case: ConvCase, dtype: str, data_format: str, launched: Launched) -> None:
    problem = build(case, dtype)
    given = tf_cases.tensors(problem, data_format)
    tf_cases.poison(problem)
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        got = tf_cases.run(ours(case, data_format), given)
    # TensorFlow refuses kernels without elements, and gives an empty batch a wrong shape; in
    # bfloat16 oneDNN makes NaN of infinity.
    no_rival = 0 in (*case.input_sizes, *case.weight_sizes)
    no_rival |= case.values == "nonfinite" and dtype == "bfloat16"
    arguments = case.tensorflow_arguments(data_format)
    native = functools.partial(tf_cases.native_conv, **arguments)
    tf_cases.check(problem, got, None if no_rival else tf_cases.run(native, given))


@every_dtype
@every_format
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
@pytest.mark.parametrize("known", ["known", "sizes", "rank"])
def test_graph_has_the_bits_of_eager(
    case: ConvCase, data_format: str, dtype: str, known: str, launched: Launched
) -> None:
    given = tf_cases.tensors(build(case, dtype), data_format)
    rank = given.x.shape.rank
    channels = rank - 1 if data_format == "channels_last" else 1
    sizes = [None] * rank
    sizes[channels] = case.channels
    shape = {"known": given.x.shape, "sizes": sizes, "rank": None}[known]
    others = [tf.TensorSpec(t.shape, t.dtype) for t in given.operands[1:]]
    operation = ours(case, data_format)
    function = tf.function(
        lambda *operands: operation(*operands),
        input_signature=[tf.TensorSpec(shape, given.x.dtype), *others],
    )
    shape = function.get_concrete_function().output_shapes.as_list()
    if known == "known":
        assert shape == given.grad.shape
    else:
        assert [size for size in shape if size is not None] == [case.filters]
        assert shape[channels] == case.filters
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        graph = tf_cases.run(function, given)
    eager = tf_cases.run(operation, given)
    for name in tf_cases.RESULTS:
        assert_same_bits(getattr(graph, name), getattr(eager, name), f"{case.id} {name}")


@pytest.mark.parametrize("size", [(7, 9), (8, 6), (3, 4)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("strides", [1, 2, (3, 2)], ids=str)
@pytest.mark.parametrize("dilations", [1, 2])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_words_for_padding_mean_what_they_do_natively(
    size: tuple[int, int], kernel: tuple[int, int], strides: Any, dilations: int, padding: str
) -> None:
    x, kernel, bias = tf_cases.conv_operands((2, *size, 4), (*kernel, 4, 3))
    step = strides if isinstance(strides, int) else strides[-1]
    for native, function, operands in (
        (tf.nn.conv2d, tftf.conv2d_relu, (x, kernel, strides)),
        (tf.nn.conv1d, tftf.conv1d_relu, (x[0], kernel[0], step)),
    ):
        try:
            expected = tf.nn.relu(native(*operands, padding, dilations=dilations) + bias)
        except tf.errors.InvalidArgumentError:
            with pytest.raises(tf.errors.InvalidArgumentError, match="kernel: expected windows"):
                function(*operands[:2], bias, operands[2], padding, dilations=dilations)
        else:
            got = function(*operands[:2], bias, operands[2], padding, dilations=dilations)
            tf_cases.assert_close(got, expected)


# What TensorFlow lacks on CPUs in float64: channels first, and gradients of groups and dilations.
SETTINGS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 5, 4, 3), (3, 2, 3, 2), {}),
    "stride": ((2, 5, 6, 2), (3, 3, 2, 2), {"strides": (2, 1), "padding": "SAME"}),
    "explicit": ((1, 4, 5, 2), (2, 3, 2, 3), {"padding": [(0, 0), (2, 0), (1, 3), (0, 0)]}),
    "dilation": ((1, 7, 6, 2), (2, 2, 2, 2), {"dilations": (3, 2), "padding": "SAME"}),
    "groups": ((2, 4, 4, 6), (2, 2, 2, 6), {"strides": (1, 2)}),
    "depthwise": ((1, 4, 4, 3), (3, 3, 1, 6), {"padding": "SAME", "dilations": (2, 2)}),
    "first": ((2, 3, 5, 4), (2, 2, 3, 2), {"data_format": "channels_first", "padding": "SAME"}),
    "first groups": (
        (1, 4, 5, 6),
        (2, 3, 2, 4),
        {"data_format": "channels_first", "strides": (2, 2), "dilations": (1, 2)},
    ),
    "1d": ((2, 7, 3), (3, 3, 2), {"strides": (2,), "dilations": (1,), "padding": "SAME"}),
    "1d causal": ((1, 6, 4), (2, 2, 4), {"strides": (1,), "dilations": (3,), "padding": "CAUSAL"}),
    "1d first": (
        (2, 3, 6),
        (3, 3, 2),
        {"strides": (1,), "dilations": (2,), "data_format": "channels_first"},
    ),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def both(setting: str) -> tuple[list[Any], Callable[..., Any], Callable[..., Any]]:
    """Operands, our op and TensorFlow's."""
    x, kernel, arguments = SETTINGS[setting]
    function = tftf.conv1d_relu if len(x) == 3 else tftf.conv2d_relu
    arguments = {"strides": (1, 1), "dilations": (1, 1), **arguments}
    return (
        tf_cases.conv_operands(x, kernel),
        functools.partial(function, **arguments),
        functools.partial(tf_cases.native_conv, **arguments),
    )


@every_setting
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_higher_gradients(setting: str, with_bias: bool, graph: bool, launched: Launched) -> None:
    operands, function, native = both(setting)
    operands = operands[: 2 + with_bias]
    run = tf.function(tf_cases.derivatives) if graph else tf_cases.derivatives
    with launched("conv_relu_backward_"):
        got = run(function, operands)
    tf_cases.assert_close(got, tf_cases.derivatives(native, operands), 1e-11)
    assert all(float(tf.reduce_max(tf.abs(g))) > 0 for g in tf.nest.flatten(got))


@every_setting
def test_forward_mode(setting: str) -> None:
    operands, function, native = both(setting)
    got, expected = (tf_cases.forward_mode(f, operands) for f in (function, native))
    assert float(tf.norm(got[0])) > 0
    tf_cases.assert_close(got, expected, 1e-11)


@every_setting
@pytest.mark.parametrize("graph", [False, True])
def test_jacobian_and_hessian(setting: str, graph: bool, launched: Launched) -> None:
    operands, function, native = both(setting)
    run = tf.function(tf_cases.jacobians) if graph else tf_cases.jacobians
    with launched("conv_relu_backward_"):
        got = run(function, operands)
    tf_cases.assert_close(got, tf_cases.jacobians(native, operands), 1e-11)


@every_setting
@pytest.mark.parametrize("names", ["x", "kernel", "bias", "x kernel", "kernel bias", "x bias"])
def test_vectorized_map(setting: str, names: str, launched: Launched) -> None:
    operands, function, native = both(setting)
    with launched("conv_relu_forward_", times=1), launched("conv_relu_backward_", times=1):
        got = tf_cases.mapped(tf.vectorized_map, function, operands, names)
    expected = tf_cases.mapped(tf_cases.one_by_one, native, operands, names)
    tf_cases.assert_close(got, expected)


@every_setting
@pytest.mark.parametrize("names", ["x", "kernel", "bias", "x kernel"])
def test_vectorized_map_over_nothing(setting: str, names: str) -> None:
    operands, function, _ = both(setting)
    named = dict(zip(("x", "kernel", "bias"), operands))

    def one(values: dict[str, Any]) -> tuple[Any, Any]:
        arguments = list({**named, **values}.values())
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = function(*arguments)
        return y, tape.gradient(y, arguments)

    y, gradients = tf.vectorized_map(one, {name: named[name][None][:0] for name in names.split()})
    assert y.shape == (0, *function(*operands).shape)
    assert [g.shape for g in gradients] == [(0, *operand.shape) for operand in operands]


@every_setting
def test_gradient_matches_differences(setting: str) -> None:
    (x, kernel, bias), function, _ = both(setting)
    # Far from the kink, where differences would straddle it.
    bias = tf.where(tf.range(len(bias)) % 2 == 0, 99.0, -99.0)
    operands = [x, kernel, tf.cast(bias, tf.float64)]
    theory, numeric = tf.test.compute_gradient(function, operands)
    for t, n in zip(theory, numeric, strict=True):
        np.testing.assert_allclose(t, n, atol=1e-5)


@pytest.mark.parametrize("target", range(3))
def test_only_the_gradient_asked_for(target: int, launched: Launched) -> None:
    operands, function, native = both("first groups")
    recorded = []
    fused = _binding.ops.twinfuse_conv_relu_grad

    def spy(*args: Any, **kwargs: Any) -> Any:
        recorded.append([kwargs[n] for n in ("num_x", "num_kernel", "num_bias")])
        return fused(*args, **kwargs)

    def grad(function: Callable[..., Any]) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands[target])
            y = function(*operands)
        return tape.gradient(y, operands[target])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_binding.ops, "twinfuse_conv_relu_grad", spy)
        with launched("conv_relu_backward_", times=1):
            got = grad(function)
    assert recorded == [[int(i == target) for i in range(3)]]
    tf_cases.assert_close(got, grad(native))


def test_zero_and_none_gradients_as_native() -> None:
    operands, function, native = both("plain")

    def connected(function: Callable[..., Any]) -> Any:
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(operands)
            with tf.GradientTape() as inner:
                inner.watch(operands[0])
                y = function(*operands)
            grad = inner.gradient(y, operands[0])
        return outer.gradient(grad, operands)

    got = connected(function)
    assert [g is None for g in got] == [False] * 3
    tf_cases.assert_close(got, connected(native))


def test_indexed_slices_gradient() -> None:
    operands, function, native = both("plain")

    def grads(function: Callable[..., Any]) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = tf.gather(function(*operands), [0, 1, 1])
        return tape.gradient(y, operands)

    tf_cases.assert_close(grads(function), grads(native))


@every_format
def test_no_window(data_format: str) -> None:
    """A kernel that is larger than the image by one gives nothing, and gradients of zero."""
    x, kernel, bias = tf_cases.conv_operands((2, 2, 5, 3), (3, 2, 3, 4))
    x = x if data_format == "channels_last" else tf.transpose(x, [0, 3, 1, 2])
    tf.fill([2, 2, 5, 3], tf.constant(np.nan, tf.float64)).numpy()
    with tf.GradientTape() as tape:
        tape.watch([x, kernel, bias])
        y = tftf.conv2d_relu(x, kernel, bias, data_format=data_format)
    shape = [2, 0, 4, 4] if data_format == "channels_last" else [2, 4, 0, 4]
    assert y.shape == shape
    for operand, grad in zip((x, kernel, bias), tape.gradient(y, [x, kernel, bias]), strict=True):
        np.testing.assert_array_equal(grad, np.zeros(operand.shape))


def test_an_image_of_padding_alone() -> None:
    x, kernel, bias = tf_cases.conv_operands((2, 0, 3, 3), (2, 2, 3, 4))
    with tf.GradientTape() as tape:
        tape.watch([x, kernel, bias])
        y = tftf.conv2d_relu(x, kernel, bias, padding=[(0, 0), (1, 2), (0, 0), (0, 0)])
    expected = np.broadcast_to(np.maximum(bias, 0), (2, 2, 2, 4))
    np.testing.assert_array_equal(y, expected)
    grads = tape.gradient(y, [x, kernel, bias])
    assert grads[0].shape == x.shape
    np.testing.assert_array_equal(grads[1], np.zeros(kernel.shape))
    np.testing.assert_array_equal(grads[2], 8.0 * (np.asarray(bias) > 0))


def test_sixteen_threads(launched: Launched) -> None:
    case = BY_ID["three_by_three_nhwc"]
    given = tf_cases.tensors(build(case, "float32"))
    eager = ours(case, "channels_last")
    graph = tf.function(lambda *operands: eager(*operands))
    expected = tf_cases.run(eager, given)
    graph(*given.operands)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                got = tf_cases.run(graph if number % 2 else eager, given)
                for name in tf_cases.RESULTS:
                    assert_same_bits(getattr(got, name), getattr(expected, name), name)
        except BaseException as error:  # a thread's exception would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    with launched("conv_relu_forward_", times=160), launched("conv_relu_backward_", times=160):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


def test_inside_the_thread_pools_of_tf_data() -> None:
    x, kernel, bias = tf_cases.conv_operands((4, 20, 20, 16), (3, 3, 16, 32), dtype="float32")
    data = tf.data.Dataset.from_tensors(x).repeat(64)
    data = data.map(lambda v: tftf.conv2d_relu(v, kernel, bias), num_parallel_calls=16)
    expected = tf_cases.array(tftf.conv2d_relu(x, kernel, bias))
    results = list(data)
    assert len(results) == 64
    for result in results:
        assert_same_bits(tf_cases.array(result), expected, "tf.data")
