"""`twinfuse.tensorflow.conv1d_relu` and `conv2d_relu`: what they refuse, and their shapes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import require

tf = require("tensorflow")

import twinfuse.tensorflow as tftf  # noqa: E402
from tests import tf_cases  # noqa: E402
from twinfuse.tensorflow import _binding  # noqa: E402

InvalidArgument = tf.errors.InvalidArgumentError
Any_ = (InvalidArgument, tf.errors.UnimplementedError, ValueError, TypeError)

X, KERNEL, BIAS = tf_cases.conv_operands((2, 7, 6, 4), (3, 2, 4, 5))


def native(x: Any, kernel: Any, bias: Any = None, **given: Any) -> Any:
    y = tf.nn.conv2d(x, kernel, **{"strides": 1, "padding": "VALID", **given})
    return y if bias is None else tf.nn.bias_add(y, bias)


REFUSED: list[tuple[str, list[Any], dict[str, Any]]] = [
    (r"x: expected channels in a multiple of 4 .* got \[2, 7, 6, 3\]", [X[..., :3], KERNEL], {}),
    (r"kernel: expected \[R, S, C / groups, K\], got \[2, 4, 5\]", [X, KERNEL[0]], {}),
    (
        r"kernel: expected filters in a multiple of 2 groups, got 5",
        [X, KERNEL[:, :, :2]],
        {},
    ),
    (r"kernel: expected dtype float64 as x has, got float32", [X, tf.cast(KERNEL, "float32")], {}),
    (r"kernel: expected dtype .*, got bfloat16", [X, tf.cast(KERNEL, "bfloat16")], {}),
    (r"bias: expected \[5\] .*, got \[4\]", [X, KERNEL, BIAS[:4]], {}),
    (r"bias: expected \[K\], got \[1, 5\]", [X, KERNEL, BIAS[None]], {}),
    (r"bias: expected dtype float64 .*, got int32", [X, KERNEL, tf.cast(BIAS, "int32")], {}),
    (r"kernel: expected windows .* at most 7 elements.* got 11", [X, KERNEL], {"dilations": 5}),
    (r"strides: expected numbers from 1 .*, got 0", [X, KERNEL], {"strides": 0}),
    (r"strides: expected numbers from 1 .*, got \(1, -1\)", [X, KERNEL], {"strides": (1, -1)}),
    (r"strides: expected 1 or 2 or 4 numbers", [X, KERNEL], {"strides": (1, 1, 1)}),
    (r"strides: expected 1 for the batch", [X, KERNEL], {"strides": (2, 1, 1, 1)}),
    (r"dilations: expected numbers from 1 .*, got -1", [X, KERNEL], {"dilations": -1}),
    (r"dilations: expected 1 for the batch", [X, KERNEL], {"dilations": (1, 1, 1, 2)}),
    (r"padding: expected 'VALID', 'SAME' or .* got 'FULL'", [X, KERNEL], {"padding": "FULL"}),
    (r"padding: expected .*, got 'CAUSAL'", [X, KERNEL], {"padding": "CAUSAL"}),
    (r"padding: expected .*, got 'EXPLICIT'", [X, KERNEL], {"padding": "EXPLICIT"}),
    (r"padding: expected .*, got None", [X, KERNEL], {"padding": None}),
    (r"padding: expected 4 pairs", [X, KERNEL], {"padding": [(0, 0), (1, 1), (0, 0)]}),
    (r"padding: expected 4 pairs", [X, KERNEL], {"padding": [0, 1, 1, 0]}),
    (r"data_format: expected one of .*'NHWC'.* got 'NHCW'", [X, KERNEL], {"data_format": "NHCW"}),
]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("message", "operands", "given"), REFUSED, ids=[m for m, _, _ in REFUSED])
def test_errors_as_native(
    message: str, operands: list[Any], given: dict[str, Any], graph: bool
) -> None:
    def run(function: Any) -> Any:
        traced = tf.function(lambda *o: function(*o, **given))
        return traced(*operands) if graph else function(*operands, **given)

    with pytest.raises(Any_) as theirs:
        run(native)
    with pytest.raises(type(theirs.value), match="conv2d_relu: " + message):
        run(tftf.conv2d_relu)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("message", "operands", "given"),
    [
        # TensorFlow's own convolutions end the process here, or read what is not there.
        (r"conv2d_relu: x: expected \[N, H, W, C\], got \[7, 6, 4\]", [X[0], KERNEL], {}),
        (r"conv2d_relu: x: expected \[N, C, H, W\], got \[\]", [X[0, 0, 0, 0], KERNEL], "NCHW"),
        (r"padding: expected no zeros in the batch", [X, KERNEL], {"padding": [(1, 0)] * 4}),
        (
            r"padding: expected numbers from 0 .*",
            [X, KERNEL],
            {"padding": [(0, 0), (0, -1), (0, 0), (0, 0)]},
        ),
        (r"strides: expected numbers from 1 to 2\^31 - 1", [X, KERNEL], {"strides": 2**40}),
    ],
)
def test_errors_that_native_does_not_raise(
    message: str, operands: list[Any], given: Any, graph: bool
) -> None:
    given = {"data_format": given} if isinstance(given, str) else given
    function = tf.function(lambda *o: tftf.conv2d_relu(*o, **given))
    with pytest.raises(ValueError if graph else InvalidArgument, match=message):
        function(*operands) if graph else tftf.conv2d_relu(*operands, **given)


def test_errors_in_one_dimension() -> None:
    x, kernel, bias = X[0], KERNEL[0], BIAS
    for message, operands, given in [
        (r"x: expected \[N, W, C\], got \[6, 4\]", [x[0], kernel], {}),
        (r"kernel: expected \[S, C / groups, K\], got \[3, 2, 4, 5\]", [x, KERNEL], {}),
        (r"bias: expected \[5\]", [x, kernel, bias[:1]], {}),
        (r"strides: expected 1 or 3 numbers", [x, kernel], {"strides": (1, 2)}),
        (r"padding: expected 'VALID', 'SAME', 'CAUSAL' or a list", [x, kernel], {"padding": "A"}),
        (r"kernel: expected windows", [x, kernel], {"dilations": 9}),
    ]:
        with pytest.raises((InvalidArgument, ValueError), match="conv1d_relu: " + message):
            tftf.conv1d_relu(*operands, **given)


@pytest.mark.parametrize("value", ["ragged", "sparse", "complex64", "int64"])
@pytest.mark.allow_fallback
def test_what_no_path_takes_fails_as_native(value: str) -> None:
    x: Any = X[0]
    kernel: Any = KERNEL[0]
    if value == "ragged":
        x = tf.RaggedTensor.from_tensor(x)
    elif value == "sparse":
        x = tf.sparse.from_dense(x)
    else:
        x, kernel = tf.cast(x, value), tf.cast(kernel, value)
    with pytest.raises(Any_) as theirs:
        tf.nn.conv1d(x, kernel, 1, "VALID")
    with pytest.raises(type(theirs.value)):
        tftf.conv1d_relu(x, kernel)


def test_errors_at_run_time_name_the_argument() -> None:
    specs = [tf.TensorSpec(None, tf.float64)] * 3
    function = tf.function(lambda *o: tftf.conv2d_relu(*o), input_signature=specs)
    for message, operands in [
        (r"x: expected \[N, H, W, C\], got \[7,6,4\]", [X[0], KERNEL, BIAS]),
        (r"x: expected \[N, H, W, C\], got \[\]", [X[0, 0, 0, 0], KERNEL, BIAS]),
        (r"kernel: expected \[R, S, C / groups, K\], got \[2,4,5\]", [X, KERNEL[0], BIAS]),
        (
            r"x: expected channels in a multiple of the kernel's 4, got 3",
            [X[..., :3], KERNEL, BIAS],
        ),
        (
            r"x: expected channels in a multiple of the kernel's 4, got 0",
            [X[..., :0], KERNEL, BIAS],
        ),
        (r"x: expected channels .* kernel's 0, got 4", [X, KERNEL[:, :, :0], BIAS]),
        (r"kernel: expected filters in a multiple of 2", [X, KERNEL[:, :, :2], BIAS]),
        (r"kernel: expected windows that span at most 1 elements", [X[:, :1], KERNEL, BIAS]),
        (r"kernel: expected windows of at least 1", [X, KERNEL[:0], BIAS]),
        (r"bias: expected \[5\], got \[4\]", [X, KERNEL, BIAS[:4]]),
        (r"bias: expected \[5\], got \[\]", [X, KERNEL, BIAS[0]]),
    ]:
        with pytest.raises(InvalidArgument, match="conv2d_relu: " + message):
            function(*operands)


WINDOWS: dict[str, Any] = {
    "strides": [1, 1],
    "dilations": [1, 1],
    "padding": "VALID",
    "explicit_paddings": [],
    "data_format": "channels_last",
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strides": []}, "conv_relu: strides: expected 1 or 2 numbers, got 0"),
        ({"strides": [1, 1, 1]}, "conv_relu: strides: expected 1 or 2 numbers, got 3"),
        ({"strides": [1, 0]}, r"conv2d_relu: strides: .* got \[1, 0\]"),
        ({"strides": [1, 2**62]}, r"conv2d_relu: strides: expected 2 numbers from 1 to"),
        ({"dilations": [1]}, r"conv2d_relu: dilations: expected 2 numbers .* got \[1\]"),
        ({"explicit_paddings": [1, 1, 1, 1]}, "explicit_paddings: expected 0 numbers"),
        ({"padding": "EXPLICIT"}, "explicit_paddings: expected 4 numbers"),
        (
            {"padding": "EXPLICIT", "explicit_paddings": [0, 0, 0, -1]},
            r"conv2d_relu: explicit_paddings: .* from 0",
        ),
    ],
)
def test_attributes_of_a_graph_from_elsewhere(wrong: dict[str, Any], message: str) -> None:
    """Nothing is taken for granted about a node that no function of ours has made."""
    windows = {**WINDOWS, **wrong}
    with pytest.raises(InvalidArgument, match=message):
        _binding.ops.twinfuse_conv_relu(X, KERNEL, [BIAS], **windows)
    y = tftf.conv2d_relu(X, KERNEL)
    with pytest.raises(InvalidArgument, match=message):
        _binding.ops.twinfuse_conv_relu_grad(y, y, X, KERNEL, 1, 1, 1, **windows)


def test_operands_of_the_gradient_are_checked() -> None:
    y = tftf.conv2d_relu(X, KERNEL)
    raw = _binding.ops.twinfuse_conv_relu_grad
    for message, operands, counts in [
        ("grad: expected", [y[:1], y, X, KERNEL], (1, 1, 1)),
        ("y: expected", [y, y[:, :1], X, KERNEL], (1, 1, 1)),
        ("x: expected", [y, y, X[..., :3], KERNEL], (1, 1, 1)),
        ("kernel: expected", [y, y, X, KERNEL[0]], (1, 1, 1)),
        ("num_x: expected 0 or 1, got 2", [y, y, X, KERNEL], (2, 1, 1)),
        ("num_bias: expected 0 or 1, got 3", [y, y, X, KERNEL], (1, 1, 3)),
    ]:
        with pytest.raises(InvalidArgument, match="conv2d_relu: " + message):
            raw(*operands, *counts, **WINDOWS)
    with pytest.raises(InvalidArgument, match="conv2d_relu: num_bias: expected 0 or 1, got 2"):
        _binding.ops.twinfuse_conv_relu(X, KERNEL, [BIAS, BIAS], **WINDOWS)


SHAPES: list[tuple[list[Any], list[Any], dict[str, Any], list[Any]]] = [
    ([2, 7, 6, 4], [3, 2, 4, 5], {}, [2, 5, 5, 5]),
    ([None, 7, 6, 4], [3, 2, 4, 5], {}, [None, 5, 5, 5]),
    ([None, None, 6, 4], [3, 2, 4, 5], {}, [None, None, 5, 5]),
    ([None, None, None, None], [3, 2, 4, None], {}, [None, None, None, 5]),
    ([2, 7, 6, 4], [None, None, None, None], {}, [2, None, None, 5]),
    ([2, 7, 6, 4], [None, None, None, None], {"padding": "SAME"}, [2, 7, 6, 5]),
    ([2, 7, 6, 4], [3, 2, 2, 6], {"strides": [2, 3]}, [2, 3, 2, 6]),
    ([2, 7, 6, 4], [3, 2, 4, 5], {"dilations": [3, 2]}, [2, 1, 4, 5]),
    ([2, 4, 7, 6], [3, 2, 4, 5], {"data_format": "channels_first"}, [2, 5, 5, 5]),
    ([2, 3, 6, 4], [4, 2, 4, 5], {}, [2, 0, 5, 5]),
    (
        [2, None, 6, 4],
        [3, 2, 4, 5],
        {"padding": "EXPLICIT", "explicit_paddings": [9, 9, 1, 2]},
        [2, None, 8, 5],
    ),
]


@pytest.mark.parametrize(("x", "kernel", "given", "expected"), SHAPES)
def test_shape_function(x: Any, kernel: Any, given: Any, expected: Any) -> None:
    raw, windows = _binding.ops.twinfuse_conv_relu, {**WINDOWS, **given}
    with tf.Graph().as_default():
        make = lambda shape: tf.compat.v1.placeholder(tf.float32, shape)  # noqa: E731
        y = raw(make(x), make(kernel), [make([expected[-1] or 5])], **windows)
        last = windows["data_format"] == "channels_last"
        if last:
            assert y.shape.as_list() == expected
        assert y.shape.as_list() == (expected if last else [2, 5, 5, 5])
        grads = _binding.ops.twinfuse_conv_relu_grad(
            make(y.shape), make(None), make([None, *x[1:]]), make(kernel), 1, 1, 1, **windows
        )
        assert [g.shape.as_list() for (g,) in grads[1:]] == [
            [*kernel[:3], 5 if kernel[3] is None else kernel[3]],
            [expected[-1] if last else 5],
        ]
        assert grads[0][0].shape.as_list() == x


def test_shape_function_of_unknown_ranks_and_of_what_does_not_fit() -> None:
    raw = _binding.ops.twinfuse_conv_relu
    with tf.Graph().as_default():
        make = lambda shape: tf.compat.v1.placeholder(tf.float32, shape)  # noqa: E731
        assert raw(make(None), make(None), [], **WINDOWS).shape.as_list() == [None] * 4
        assert raw(make(None), make(None), [make([3])], **WINDOWS).shape.as_list()[-1] == 3
        causal = {**WINDOWS, "strides": [2], "dilations": [3], "padding": "CAUSAL"}
        assert raw(make([2, 9, 4]), make([4, 4, 5]), [], **causal).shape.as_list() == [2, 5, 5]
        for x, kernel, bias in [
            ([2, 7, 6, 3], [3, 2, 4, 5], [5]),
            ([2, 7, 6, 4], [3, 2, 2, 5], [5]),
            ([2, 7, 6, 4], [3, 2, 4, 5], [4]),
            ([2, 7, 6, 4], [9, 2, 4, 5], [5]),
            ([2, 7, 6], [3, 2, 4, 5], [5]),
            ([2, 7, 6, 4], [3, 2, 4], [5]),
        ]:
            with pytest.raises(ValueError):
                raw(make(x), make(kernel), [make(bias)], **WINDOWS)
