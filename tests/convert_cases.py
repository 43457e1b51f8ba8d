"""Layers of both frameworks that are each other's counterparts, and runs of both alike.

Inputs are [batch, ..., features], or [batch, channels, *image] of torch, which Keras gets with the
channels last. A run gives every result and gradient as float64 arrays in torch's layouts, the
gradient of torch's two biases once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.float64]]
PARTNERS = {"Linear": "Dense", "Conv1d": "Conv1D", "Conv2d": "Conv2D", "LSTM": "LSTM"}
FUSED = {"Linear": "LinearReLU", "Conv1d": "ConvReLU1d", "Conv2d": "ConvReLU2d", "LSTM": "LSTM"}
STEMS = {"Linear": "linear_relu", "Conv1d": "conv_relu", "Conv2d": "conv_relu", "LSTM": "lstm"}


@dataclass(frozen=True)
class Pair:
    """`sizes` and `torch` are arguments of torch's class `kind`, `keras` the config of Keras'."""

    id: str
    kind: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    torch: dict[str, Any] = field(default_factory=dict)
    keras: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return STEMS[self.kind]

    @property
    def bias(self) -> bool:
        return self.keras.get("use_bias", True)

    @property
    def kernels(self) -> int:
        """How often a fused run launches each."""
        return self.torch.get("num_layers", 1) * (1 + self.torch.get("bidirectional", False))

    def module(self, dtype: str, fused: bool) -> Any:
        import torch
        from torch import nn

        import twinfuse.torch as tft

        cls = getattr(tft.nn, FUSED[self.kind]) if fused else getattr(nn, self.kind)
        options = {"batch_first": True} if self.op == "lstm" else {}
        return cls(*self.sizes, **options, **self.torch, dtype=getattr(torch, dtype))

    def layers(self, dtype: str, fused: bool) -> Any:
        """A built layer; a list of them for several layers of an LSTM. Biases are random."""
        import keras

        import twinfuse.keras as tfk

        made = getattr(tfk.layers if fused else keras.layers, PARTNERS[self.kind])
        config: dict[str, Any] = {"bias_initializer": "random_normal", "dtype": dtype, **self.keras}
        outputs = self.sizes[1]
        batch, *rest = self.shape
        shape = (batch, *rest[1:], rest[0]) if self.op == "conv_relu" else self.shape
        if self.op != "lstm":
            layer = made(outputs, **config, activation="relu")
            layer.build(shape)
            return layer
        # The default for recurrent kernels computes in no 16 bits.
        config |= {"recurrent_initializer": "glorot_uniform", "return_sequences": True}
        built = []
        for _ in range(self.torch.get("num_layers", 1)):
            layer = made(outputs, **config)
            if self.torch.get("bidirectional"):
                layer = keras.layers.Bidirectional(layer, dtype=dtype)
            layer.build(shape)
            shape = (*shape[:-1], outputs * (1 + self.torch.get("bidirectional", False)))
            built.append(layer)
        return built if "num_layers" in self.torch else built[0]


PAIRS = (
    Pair("linear", "Linear", (5, 7), (7, 9)),
    Pair("linear-3d", "Linear", (2, 3, 7), (7, 9), {"bias": False}, {"use_bias": False}),
    Pair(
        "conv1d", "Conv1d", (2, 6, 11), (6, 8, 3), {"stride": 2}, {"kernel_size": 3, "strides": 2}
    ),
    Pair(
        "conv1d-depthwise",
        "Conv1d",
        (2, 6, 11),
        (6, 12, 4),
        {"groups": 6, "bias": False},
        {"kernel_size": 4, "groups": 6, "use_bias": False},
    ),
    Pair(
        "conv2d",
        "Conv2d",
        (2, 3, 9, 8),
        (3, 5),
        {"kernel_size": (3, 2), "dilation": (1, 2)},
        {"kernel_size": (3, 2), "dilation_rate": (1, 2)},
    ),
    Pair(
        "conv2d-groups",
        "Conv2d",
        (2, 4, 7, 8),
        (4, 6, 3),
        {"groups": 2, "padding": 1},
        {"kernel_size": 3, "groups": 2, "padding": "same"},
    ),
    Pair("lstm", "LSTM", (3, 6, 5), (5, 7)),
    Pair("lstm-no-bias", "LSTM", (3, 6, 5), (5, 7), {"bias": False}, {"use_bias": False}),
    Pair("lstm-bidirectional", "LSTM", (3, 6, 5), (5, 7), {"bidirectional": True}),
    Pair("lstm-deep", "LSTM", (3, 6, 5), (5, 7), {"num_layers": 2}),
    Pair(
        "lstm-deep-bidirectional",
        "LSTM",
        (3, 6, 5),
        (5, 7),
        {"num_layers": 2, "bidirectional": True, "bias": False},
        {"use_bias": False},
    ),
)


def numbers(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def run_torch(pair: Pair, module: Any) -> Arrays:
    import torch

    parameters = dict(module.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    x = torch.from_numpy(numbers(*pair.shape)).to(dtype).requires_grad_()
    found = module(x)
    y = found[0] if pair.op == "lstm" else torch.relu(found)
    g = torch.from_numpy(numbers(*y.shape)).to(dtype)
    grads = torch.autograd.grad(y, [x, *parameters.values()], g)
    named = dict(zip(("input", *parameters), grads, strict=True))
    # Both biases have the same gradient.
    kept = {name: grad for name, grad in named.items() if not name.startswith("bias_hh")}
    return {n: t.detach().double().numpy() for n, t in {"output": y, **kept}.items()}


def run_keras(pair: Pair, layers: Any, jit: bool = False) -> Arrays:
    """With `jit`, by XLA, which has gradients of convolutions that TensorFlow lacks on CPUs."""
    import tensorflow as tf

    layers = layers if isinstance(layers, list) else [layers]
    dtype = layers[0].compute_dtype
    image = pair.op == "conv_relu"

    def last(array: Any) -> Any:
        return tf.cast(np.moveaxis(array, 1, -1) if image else array, dtype)

    def results(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y)
            shape = y.shape if not image else (y.shape[0], y.shape[-1], *y.shape[1:-1])
            loss = tf.reduce_sum(tf.cast(y * last(numbers(*shape)), tf.float64))
        variables = [v.value for layer in layers for v in layer.trainable_variables]
        return y, tape.gradient(loss, [x, *variables])

    run = tf.function(results, jit_compile=True) if jit else results
    y, found = run(last(numbers(*pair.shape)))
    gx, *grads = map(wide, found)
    ends = {"output": wide(y), "input": gx}
    if image:
        ends = {name: np.moveaxis(array, -1, 1) for name, array in ends.items()}
    # The order of both frameworks is the same: kernels before the bias, layer by layer.
    names = [n for n, _ in pair.module("float32", False).named_parameters() if "bias_hh" not in n]
    transposed = (np.moveaxis(grad, (-1, -2), (0, 1)) if grad.ndim > 1 else grad for grad in grads)
    return ends | dict(zip(names, transposed, strict=True))


def wide(tensor: Any) -> npt.NDArray[np.float64]:
    import tensorflow as tf

    return np.asarray(tf.cast(tensor, tf.float64))
