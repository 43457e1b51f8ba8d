"""Conv+ReLU: sections, candidates, and the goals set for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.candidates import (
    EAGER,
    EAGER_PAIRS,
    NATIVE,
    NATIVE_EAGER,
    TORCH,
    Maker,
    TensorflowOp,
    TorchOp,
    collect,
)
from benchmarks.conv_shapes import SHAPE_FORM, ConvShape, Operands, frameworks_of, parse_shape
from benchmarks.goals import ALL_PEERS, Goal
from benchmarks.harness import Spread, timeit_timer
from benchmarks.operands import ITEM_SIZE, Array, Case, Kind, Section

__all__ = ["GOALS", "OP", "SECTIONS", "SHAPE_FORM", "case", "frameworks_of", "parse_shape"]

OP = "conv_relu"
MEMORY_PAIRS = EAGER_PAIRS


def _both(*texts: str) -> tuple[ConvShape, ...]:
    """Each shape in both layouts."""
    layouts = [("NCHW", "NHWC") if "x" in text else ("NCW", "NWC") for text in texts]
    return tuple(parse_shape(f"{t} {one}") for t, both in zip(texts, layouts) for one in both)


STEMS = _both(
    "N4 C3 224x224 K64 5x5 p2",
    "N64 C1 28x28 K32 3x3",
    "N64 C3 32x32 K6 5x5",
    "N64 C6 14x14 K16 5x5",
)
LARGE = _both("N8 C64 56x56 K64 3x3 p1", "N16 C256 14x14 K256 3x3 p1", "N8 C256 28x28 K512 1x1")
SMALL_IMAGE = _both("N1 C512 7x7 K512 3x3 p1")
BODY = (*LARGE, *SMALL_IMAGE)
DEPTHWISE = _both("N8 C64 56x56 K64 3x3 p1 g64", "N8 C256 14x14 K256 3x3 p1 g256")
OTHERS = _both("N8 C64 56x56 K128 3x3 s2 p1", "N16 C64 1024 K64 3")
SHAPES = (*STEMS, *BODY, *DEPTHWISE, *OTHERS)
TINY = _both("N1 C1 8x8 K8 3x3", "N1 C8 8x8 K16 3x3 p1", "N1 C4 16 K8 3")
TRAINED = (*STEMS, *BODY)


def _measured(framework: str, shapes: Sequence[ConvShape]) -> tuple[ConvShape, ...]:
    return tuple(shape for shape in shapes if framework in frameworks_of(shape))


IN_TORCH, TINY_IN_TORCH = _measured("torch", SHAPES), _measured("torch", TINY)
IN_TENSORFLOW = _measured("tensorflow", SHAPES)

WITHOUT = "no gradient of the input where C is 1 or 3"
SECTIONS = (
    Section("forward", "Forward", "forward", shapes=SHAPES, quick=(STEMS[6], SMALL_IMAGE[1])),
    Section(
        "training",
        f"Forward + backward ({WITHOUT})",
        "training",
        shapes=SHAPES,
        quick=(STEMS[3], SMALL_IMAGE[1]),
    ),
    Section("bf16", "Forward, bfloat16", "forward", "bfloat16", SHAPES, STEMS[7:8]),
    Section("tiny", "Forward, tiny", "forward", shapes=TINY, quick=TINY[1:2]),
    Section(
        "tiny_training",
        f"Forward + backward, tiny ({WITHOUT})",
        "training",
        shapes=TINY,
        quick=TINY[1:2],
    ),
    Section("memory", f"Peak memory of forward + backward ({WITHOUT})", "memory", shapes=SHAPES),
)

STEMS_3X = "stems and small networks: 3x torch eager in geometric mean"
BODY_EACH = "body: 0.95x the best of all peers on every shape"
BODY_MEAN = "body: 1.1x the best peer in geometric mean"
PEAK = "80 % of the FMA peak on the large shapes"
TRAINED_MEAN = "stems and body: 1.2x torch eager in geometric mean"
TRAINED_EACH = "stems and body: 0.95x torch eager on every shape"
NEVER = "never over 5 % slower than torch eager"
TORCH_PEAK, TF_PEAK = "peak no higher than torch eager's", "peak no higher than TF eager's"

GOALS = (
    Goal("forward", "geomean", 3.0, TORCH, NATIVE, STEMS_3X, STEMS),
    Goal("forward", "each", 0.95, TORCH, ALL_PEERS, BODY_EACH, BODY),
    Goal("forward", "geomean", 1.1, TORCH, ALL_PEERS, BODY_MEAN, BODY),
    Goal("forward", "fma", 0.80, TORCH, "", PEAK, LARGE),
    Goal("forward", "each", 1 / 1.05, TORCH, NATIVE, NEVER, IN_TORCH),
    Goal("training", "geomean", 1.2, TORCH, NATIVE, TRAINED_MEAN, TRAINED),
    Goal("training", "each", 0.95, TORCH, NATIVE, TRAINED_EACH, TRAINED),
    Goal("training", "each", 1 / 1.05, TORCH, NATIVE, NEVER, IN_TORCH),
    Goal("tiny", "each", 1 / 1.05, TORCH, NATIVE, NEVER, TINY_IN_TORCH),
    Goal("tiny_training", "each", 1 / 1.05, TORCH, NATIVE, NEVER, TINY_IN_TORCH),
    Goal("memory", "memory", 1.0, TORCH, NATIVE, TORCH_PEAK, IN_TORCH),
    Goal("memory", "memory", 1.0, EAGER, NATIVE_EAGER, TF_PEAK, IN_TENSORFLOW),
)


def case(
    kind: Kind, shape: ConvShape, dtype: str, frameworks: Sequence[str], only: Sequence[str] = ()
) -> Case:
    """The candidates of the installed `frameworks`: all, or those named in `only`.

    Each computes `relu(conv(input, weight) + bias)` in the layout of `shape`; for training also the
    gradients for a given random gradient of the output: of weight, bias and, but for the first
    layer of a network, the input.
    """
    operands = Operands.random(shape)
    multiplications = operands.grad_output.size * operands.weight[0].size
    passes = 1 if kind == "forward" else 2 + shape.input_gradient
    sizes = [a.size for a in (operands.input, operands.weight, operands.bias)]
    moved = sum(sizes) + operands.grad_output.size
    if kind == "training":
        # The operands and the gradient are read; the output and two or three gradients written.
        moved = 2 * moved - (0 if shape.input_gradient else operands.input.size)
    built = Case(
        reference=operands.reference(kind),
        flops=2.0 * multiplications * passes,
        traffic=ITEM_SIZE[dtype] * moved,
    )
    return collect(
        built,
        kind,
        frameworks,
        only,
        lambda: _in_torch(operands, dtype, built.notes),
        lambda: _in_tensorflow(operands, dtype),
        shape.input_gradient,
    )


def _in_torch(operands: Operands, dtype: str, notes: dict[str, str]) -> TorchOp:
    import torch
    import torch.nn.functional as F

    shape = operands.shape
    last = shape.channels_last and shape.spatial == 2
    layout = torch.channels_last if last else torch.contiguous_format

    def place(array: Array) -> Any:
        tensor = torch.tensor(array).to(getattr(torch, dtype))
        if tensor.dim() < 4:
            return tensor
        # Not `.to(memory_format=...)`, which leaves a single channel in any layout.
        return torch.empty_like(tensor, memory_format=layout).copy_(tensor)

    arrays = (operands.input, operands.weight, operands.bias, operands.grad_output)
    tensors = x, weight, bias, _ = [place(a) for a in arrays]
    conv = F.conv1d if shape.spatial == 1 else F.conv2d
    stride, padding, groups = shape.stride, shape.padding, shape.groups
    each: list[Any] = [[n] * shape.spatial for n in (padding, stride, 1)]

    def native(x: Any, weight: Any, bias: Any) -> Any:
        return F.relu(conv(x, weight, bias, stride, padding, 1, groups))

    def fused() -> Callable[..., Any]:
        import twinfuse.torch as tft

        op = tft.conv1d_relu if shape.spatial == 1 else tft.conv2d_relu
        return lambda x, weight, bias: op(x, weight, bias, stride, padding, 1, groups)

    def layer() -> Any:
        import twinfuse.torch as tft

        make: Any = tft.nn.ConvReLU1d if shape.spatial == 1 else tft.nn.ConvReLU2d
        how = {"stride": stride, "padding": padding, "groups": groups, "dtype": x.dtype}
        made = make(shape.channels, shape.filters, shape.kernel, **how)
        return made.to(memory_format=layout) if last else made

    def onednn(weight: Any) -> Callable[[], Any]:
        op = torch.ops.mkldnn._convolution_pointwise
        return lambda: op(x, weight, bias, *each, groups, "relu", [], "")

    def prepacked() -> Callable[[], Any]:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight

        def pack() -> Any:
            return reorder(weight.to_mkldnn(), *each, groups, x.shape)

        run = onednn(pack())
        seconds = Spread.of([timeit_timer(pack, 1) for _ in range(11)]).median
        text = f"packing the weight takes {seconds * 1e6:.0f} us, which are not counted"
        notes["oneDNN prepacked"] = text
        return run

    peers: dict[str, Maker] = {"oneDNN fused": lambda: onednn(weight)}
    # With packed weights its output has channels last, whatever the input has.
    if last:
        peers["oneDNN prepacked"] = prepacked
    return TorchOp(tensors, native, fused, layer, peers)


def _in_tensorflow(operands: Operands, dtype: str) -> TensorflowOp:
    import keras
    import tensorflow as tf

    shape = operands.shape
    kernel_axes = (*range(2, 2 + shape.spatial), 1, 0)
    images = (np.moveaxis(a, 1, -1) for a in (operands.input, operands.grad_output))
    x, grad, kernel, bias = (
        tf.cast(tf.constant(np.ascontiguousarray(a)), dtype)
        for a in (*images, operands.weight.transpose(kernel_axes), operands.bias)
    )
    word = _padding_word(shape)
    pairs = [[0, 0], *([shape.padding] * 2 for _ in shape.size), [0, 0]]

    def native(x: Any, kernel: Any, bias: Any) -> Any:
        if shape.depthwise:  # TensorFlow's own kernel for it, with its own order of dimensions
            kernel = tf.reshape(kernel, (*shape.kernel, shape.channels, 1))
            strides = (1, shape.stride, shape.stride, 1)
            y = tf.nn.depthwise_conv2d(x, kernel, strides, word.upper() or pairs)
        else:
            conv = tf.nn.conv1d if shape.spatial == 1 else tf.nn.conv2d
            y = conv(x, kernel, shape.stride, word.upper() or pairs)
        return tf.nn.relu(tf.nn.bias_add(y, bias))

    def fused() -> Callable[..., Any]:
        import twinfuse.tensorflow as tftf

        op = tftf.conv1d_relu if shape.spatial == 1 else tftf.conv2d_relu
        return lambda x, kernel, bias: op(x, kernel, bias, shape.stride, word or pairs)

    how = {"strides": shape.stride, "padding": word, "activation": "relu", "dtype": dtype}

    def native_layer() -> Any:
        if shape.depthwise:
            name = f"DepthwiseConv{shape.spatial}D"
            return getattr(keras.layers, name)(shape.kernel, **how)
        name = f"Conv{shape.spatial}D"
        return getattr(keras.layers, name)(shape.filters, shape.kernel, groups=shape.groups, **how)

    def fused_layer() -> Any:
        import twinfuse.keras as tfk

        name = f"Conv{shape.spatial}D"
        make = getattr(tfk.layers, name)
        return make(shape.filters, shape.kernel, groups=shape.groups, **how)

    def arrays(found: list[Array]) -> list[Array]:
        output, *gradients = found
        converted = [np.moveaxis(output, -1, 1)]
        if gradients:
            *inputs, grad_kernel, grad_bias = gradients
            converted += [np.moveaxis(a, -1, 1) for a in inputs]
            # A depthwise layer's has two dimensions the other way round, one of them of size 1.
            grad_kernel = grad_kernel.reshape(kernel.shape)
            converted += [grad_kernel.transpose(np.argsort(kernel_axes)), grad_bias]
        return converted

    return TensorflowOp(
        (x, kernel, bias, grad),
        native,
        fused,
        arrays,
        keras="Keras Conv",
        # A Keras layer has no padding but these.
        layers=(native_layer, fused_layer) if word else None,
    )


def _padding_word(shape: ConvShape) -> str:
    """Keras' word for the padding; empty where there is none."""
    if not shape.padding:
        return "valid"
    same = shape.stride == 1 and all(2 * shape.padding == k - 1 for k in shape.kernel)
    return "same" if same else ""
