"""Who computes a network in the benchmark: the framework's layers, and the same after `fuse`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numpy.typing import NDArray

from benchmarks.candidates import NATIVE, TORCH, Maker, Run, Side
from benchmarks.lstm_candidates import (
    KERAS_EAGER,
    KERAS_GRAPH,
    NATIVE_KERAS_EAGER,
    NATIVE_KERAS_GRAPH,
)
from benchmarks.networks_shapes import (
    NOTHING,
    NOTHING_UNITS,
    RECIPES,
    VGG16,
    VGG_BLOCKS,
    NetworkShape,
    random_batch,
)
from benchmarks.operands import Array, Kind
from examples.models import channels_last
from examples.networks import NETWORKS, Dropout, keras_network, torch_network

COMPILED, NATIVE_COMPILED = "twinfuse torch.compile", "torch.compile"
SEED = 0
# Of the optimizer: it works as much, and the thousandth step on the same batch computes what the
# first has. A network that learns ends in saturated units and denormal numbers.
LEARNING_RATE = 0.0


def in_torch(
    shape: NetworkShape, kind: Kind, dtype: str, device: str = "cpu", last: bool = False
) -> Side:
    """A step of training returns the loss and the gradients of all weights.

    `last`: images have their channels last in memory.
    """
    import torch
    from torch.nn import functional as F

    recipe = RECIPES[shape.name]

    def place(array: NDArray[Any]) -> Any:
        tensor = torch.from_numpy(array).to(device)
        if last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor

    inputs, targets = map(place, random_batch(shape))
    losses: dict[str, Any] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
    criterion = losses[recipe.loss]
    wanted = targets if recipe.loss == "mse" else targets.flatten()
    drops = False
    if shape.name in NETWORKS:
        drops = any(isinstance(layer, Dropout) for layer in NETWORKS[shape.name].layers)
        if NETWORKS[shape.name].ends == "log_softmax":
            criterion = F.nll_loss

    def model(fused: bool, compiled: bool = False) -> Run:
        torch.manual_seed(SEED)
        network = torch_model(shape.name).to(device, getattr(torch, dtype))
        if last:
            network.to(memory_format=torch.channels_last)
        if fused:
            import twinfuse.torch as tft

            network = tft.fuse(network)
        network.train(kind == "training")
        weights = [p for p in network.parameters() if p.requires_grad]
        call: Callable[..., Any] = network
        if compiled:
            torch.compiler.reset()  # each network its own graph, and none left from the one before
            call = torch.compile(network, dynamic=False)
        if kind == "forward":
            return lambda: call(inputs)
        optimizer: Any = (
            torch.optim.Adam(weights, LEARNING_RATE)
            if recipe.optimizer == "adam"
            else torch.optim.SGD(weights, LEARNING_RATE, recipe.momentum)
        )

        def step() -> tuple[Any, ...]:
            if drops:
                torch.manual_seed(SEED)  # so that all drop the same elements
            optimizer.zero_grad()
            outputs = call(inputs)
            if outputs.dim() == 3:  # one for each step
                outputs = outputs.flatten(0, 1)
            loss = criterion(outputs, wanted)
            loss.backward()
            optimizer.step()
            return (loss, *(weight.grad for weight in weights))

        return step

    def arrays(result: Any) -> list[Array]:
        results = result if isinstance(result, tuple) else (result,)
        return [tensor.detach().double().numpy(force=True) for tensor in results]

    makers: dict[str, Maker] = {TORCH: partial(model, True), NATIVE: partial(model, False)}
    if shape.compiled:
        makers = {
            COMPILED: partial(model, True, True),
            NATIVE_COMPILED: partial(model, False, True),
        }
    return Side({"PyTorch": makers}, arrays, lambda: arrays(model(False)()))


def in_keras(shape: NetworkShape, kind: Kind, dtype: str) -> Side:
    """As `in_torch`."""
    import keras
    import tensorflow as tf

    recipe = RECIPES[shape.name]

    def place(array: NDArray[Any]) -> Any:
        tensor = tf.constant(array)
        return tf.cast(tensor, dtype) if tensor.dtype.is_floating else tensor

    samples, wanted = random_batch(shape)
    inputs, targets = place(channels_last(samples)), place(wanted)
    softmax = shape.name in NETWORKS and NETWORKS[shape.name].ends == "softmax"
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax)
    losses = {"cross_entropy": entropy, "mse": keras.losses.MeanSquaredError()}
    criterion = losses[recipe.loss]

    def model(fused: bool, wrap: Callable[..., Any] | None = None) -> Run:
        keras.utils.set_random_seed(SEED)
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(dtype)
        try:
            network = keras_model(shape.name)
        finally:
            keras.config.set_dtype_policy(policy)
        if fused:
            import twinfuse.keras as tfk

            network = tfk.fuse(network)
        optimizer = (
            keras.optimizers.Adam(LEARNING_RATE)
            if recipe.optimizer == "adam"
            else keras.optimizers.SGD(LEARNING_RATE, recipe.momentum)
        )
        variables = network.trainable_variables
        if kind == "training":
            optimizer.build(variables)

        def forward(inputs: Any) -> Any:
            return network(inputs, training=False)

        def step(inputs: Any, targets: Any) -> list[Any]:
            with tf.GradientTape() as tape:
                loss = criterion(targets, network(inputs, training=True))
            gradients = tape.gradient(loss, [variable.value for variable in variables])
            optimizer.apply(gradients, variables)
            return [loss, *gradients]

        # Data are arguments, never captured: a graph would fold captured constants.
        called: Callable[..., Any] = forward if kind == "forward" else step
        arguments = (inputs,) if kind == "forward" else (inputs, targets)
        wrapped = wrap(called) if wrap else called
        return lambda: wrapped(*arguments)

    def arrays(result: Any) -> list[Array]:
        results = result if isinstance(result, (tuple, list)) else [result]
        # Gradients of an embedding are sparse.
        return [tf.cast(tf.convert_to_tensor(r), tf.float64).numpy() for r in results]

    return Side(
        {
            "TensorFlow eager": {
                KERAS_EAGER: partial(model, True),
                NATIVE_KERAS_EAGER: partial(model, False),
            },
            "TensorFlow graph": {
                KERAS_GRAPH: partial(model, True, tf.function),
                NATIVE_KERAS_GRAPH: partial(model, False, tf.function),
            },
        },
        arrays,
        lambda: arrays(model(False)()),
    )


def torch_model(name: str) -> Any:
    from torch import nn

    if name == NOTHING:
        first, second, last = NOTHING_UNITS
        hidden = (nn.Linear(784, first), nn.GELU(), nn.Linear(first, second), nn.Tanh())
        return nn.Sequential(*hidden, nn.Linear(second, last))
    if name != VGG16:
        return torch_network(name)
    layers: list[nn.Module] = []
    channels = 3
    for block in VGG_BLOCKS:
        for filters in block:
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    top = (nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))
    model = nn.Sequential(*layers, *top)
    for module in model:
        # torch's own would leave nothing of an image after thirteen layers but their biases.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    return model


def keras_model(name: str) -> Any:
    import keras

    layers = keras.layers
    if name == NOTHING:
        first, second, last = NOTHING_UNITS
        hidden = (layers.Dense(first, activation="gelu"), layers.Dense(second, activation="tanh"))
        return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(last)])
    if name != VGG16:
        return keras_network(name)
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(64, 64, 3))
    top = (layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(10))
    return keras.Sequential([base, *top])
