"""Who computes an LSTM in the benchmark: ours beside the layers and cells of each framework."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.candidates import EAGER, GRAPH, MODULE, TORCH, Function, Maker, Run, Side
from benchmarks.lstm_shapes import Operands
from benchmarks.operands import Array, Kind

TORCH_LAYER, TORCH_CELL, COMPILED = "nn.LSTM", "nn.LSTMCell", "torch.compile"
KERAS_GRAPH, KERAS_EAGER = "twinfuse Keras graph", "twinfuse Keras eager"
NATIVE_KERAS_EAGER, NATIVE_KERAS_GRAPH, KERAS_XLA = "Keras eager", "Keras graph", "Keras XLA"


def in_torch(operands: Operands, kind: Kind, dtype: str, notes: dict[str, str]) -> Side:
    """For training, each returns its results and the gradients of input, a cell's state and
    weights, for given gradients of a layer's output or of a cell's state.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.utils.rnn import PackedSequence

    shape, training = operands.shape, kind == "training"

    def place(array: Array) -> Any:
        return torch.tensor(array).to(getattr(torch, dtype))

    data = place(operands.input[0] if shape.cell else operands.rows(operands.input))
    x: Any = data.requires_grad_(training)
    if shape.packed:
        x = PackedSequence(data, torch.tensor(shape.batch_sizes))
    state = [place(a).requires_grad_(training) for a in (operands.h, operands.c)]
    weights = [place(a).requires_grad_(training) for a in operands.weights()]
    if shape.cell:
        grads = [place(operands.grad_h), place(operands.grad_c)]
    else:
        grads = [place(operands.rows(operands.grad_output))]

    def timed(function: Function, parameters: list[Any]) -> Run:
        """`function` takes the input, and a cell's the state."""
        if shape.cell:
            hx, leaves = tuple(state), [x, *state, *parameters]
            if not training:
                return lambda: function(x, hx)

            def train_cell() -> tuple[Any, ...]:
                results = function(x, hx)
                return (*results, *torch.autograd.grad(results, leaves, grads))

            return train_cell
        if not training:
            return lambda: function(x)
        leaves = [data, *parameters]

        def train() -> tuple[Any, ...]:
            output, final = function(x)
            rows = output[0] if shape.packed else output
            return (rows, final, *torch.autograd.grad(rows, leaves, grads))

        return train

    def module(make: Callable[..., Any], function: Function | None = None) -> Run:
        options = {} if shape.cell else {"proj_size": shape.projection}
        layer = make(shape.inputs, shape.units, dtype=data.dtype, **options)
        parameters = list(layer.parameters())
        with torch.no_grad():
            for parameter, value in zip(parameters, weights, strict=True):
                parameter.copy_(value)
        return timed(function(layer) if function else layer, parameters)

    def fused() -> Run:
        import twinfuse.torch as tft

        if shape.cell:
            return timed(lambda x, hx: tft.lstm_cell(x, hx, *weights), weights)
        return timed(lambda x: tft.lstm(x, None, weights), weights)

    def fused_module() -> Run:
        import twinfuse.torch as tft

        return module(tft.nn.LSTMCell if shape.cell else tft.nn.LSTM)

    def compiled_cell() -> Run:
        torch.compiler.reset()  # each shape its own graph, and none left from the shape before
        return module(torch.nn.LSTMCell, partial(torch.compile, dynamic=False))

    def loop(x: Any) -> Any:
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        h = c = x.new_zeros(shape.batch, shape.units)
        outputs = []
        for inputs in F.linear(x, weight_ih, bias_ih + bias_hh).unbind(0):
            i, f, g, o = torch.addmm(inputs, h, weight_hh.t()).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)

    def compiled_loop() -> Run:
        torch.compiler.reset()
        notes[COMPILED] = (
            f"a loop over all {shape.steps} steps in one graph, the input's product in front of it"
        )
        return timed(torch.compile(loop, dynamic=False), weights)

    ours = {TORCH: fused, MODULE: fused_module}
    if shape.cell:
        peers: dict[str, Maker] = {TORCH_CELL: partial(module, torch.nn.LSTMCell)}
        peers[COMPILED] = compiled_cell
    else:
        peers = {TORCH_LAYER: partial(module, torch.nn.LSTM)}
        # torch.compile leaves nn.LSTM as it is, so what it is given is a loop of its operators.
        if not shape.packed and not shape.projection:
            peers[COMPILED] = compiled_loop

    def flat(result: Any) -> list[Any]:
        if isinstance(result, PackedSequence):
            return [result.data]
        if isinstance(result, (tuple, list)):
            return [tensor for part in result for tensor in flat(part)]
        return [result]

    def arrays(result: Any) -> list[Array]:
        found = [tensor.detach().double().numpy() for tensor in flat(result)]
        if not shape.cell:  # a layer of torch has its last state for each of its layers
            found[1:3] = [a.reshape(shape.batch, -1) for a in found[1:3]]
        return found

    return Side({"PyTorch": {**ours, **peers}}, arrays)


def in_tensorflow(operands: Operands, kind: Kind, dtype: str) -> Side:
    """As `in_torch`. Sequences are batch-major, and packed ones padded, with a mask."""
    import keras
    import tensorflow as tf

    shape, training = operands.shape, kind == "training"

    def place(array: Array) -> Any:
        return tf.cast(tf.constant(np.ascontiguousarray(array)), dtype)

    def batch_major(array: Array) -> Any:
        return place(array.swapaxes(0, 1))

    bias = operands.bias_ih + operands.bias_hh
    weights = [place(a) for a in (operands.weight_ih.T, operands.weight_hh.T, bias)]
    mask = None
    if shape.cell:
        inputs = [place(a) for a in (operands.input[0], operands.h, operands.c)]
        grads = [place(operands.grad_h), place(operands.grad_c)]
    else:
        inputs, grads = [batch_major(operands.input)], [batch_major(operands.grad_output)]
    if shape.packed:
        mask = tf.constant(np.arange(shape.batch)[:, None] < np.array(shape.batch_sizes))

    def timed(function: Function, variables: Callable[[], list[Any]], wrap: Function | None) -> Run:
        """`function` takes the inputs, the mask of packed sequences, and `weights` if it has no
        variables.
        """
        given = [] if variables() else weights
        rest = [] if mask is None else [mask]

        def forward(inputs: list[Any], rest: list[Any], given: list[Any]) -> Any:
            return function(*inputs, *rest, *given)

        def train(inputs: list[Any], rest: list[Any], given: list[Any], grads: list[Any]) -> Any:
            sources = [*inputs, *given, *variables()]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                results = function(*inputs, *rest, *given)
                shown = results[: len(grads)]
            return [*results, *tape.gradient(shown, sources, output_gradients=grads)]

        # Operands are arguments, never captured: a graph would fold captured constants.
        called = train if training else forward
        arguments = (inputs, rest, given, grads) if training else (inputs, rest, given)
        wrapped = wrap(called) if wrap else called
        return lambda: wrapped(*arguments)

    def fused(wrap: Function | None) -> Run:
        import twinfuse.tensorflow as tftf

        def cell(x: Any, h: Any, c: Any, *weights: Any) -> Any:
            return tftf.lstm_cell(x, (h, c), *weights)

        def layer(x: Any, *rest: Any) -> Any:
            if not shape.packed:
                return tftf.lstm(x, *rest)
            mask, *weights = rest
            return tftf.lstm(x, *weights, mask=mask, zero_output_for_mask=True)

        return timed(cell if shape.cell else layer, list, wrap)

    def keras_layer(ours: bool, wrap: Function | None) -> Run:
        layers = keras.layers
        if ours:
            from twinfuse.keras import layers
        options: dict[str, Any] = {"dtype": dtype}
        if not shape.cell:
            options |= {"return_sequences": True, "return_state": True}
            options["zero_output_for_mask"] = shape.packed
        made = (layers.LSTMCell if shape.cell else layers.LSTM)(shape.units, **options)
        made.build(inputs[0].shape)
        made.set_weights([value.numpy() for value in weights])

        def cell(x: Any, h: Any, c: Any) -> Any:
            return made(x, [h, c])[1]

        def layer(x: Any, mask: Any = None) -> Any:
            return made(x, mask=mask)

        def variables() -> list[Any]:
            return [variable.value for variable in made.trainable_variables]

        return timed(cell if shape.cell else layer, variables, wrap)

    def arrays(result: Any) -> list[Array]:
        found = [tf.cast(tensor, tf.float64).numpy() for tensor in result]
        states = 2 if shape.cell else 3
        if not shape.cell:
            sequences = (0, 3) if training else (0,)
            for i in sequences:
                found[i] = operands.rows(found[i].swapaxes(0, 1))
        if training:
            *others, kernel, recurrent, bias = found[states:]
            found[states:] = [*others, kernel.T, recurrent.T, bias, bias]
        return found

    graph, xla = tf.function, partial(tf.function, jit_compile=True)
    return Side(
        {
            "TensorFlow eager": {
                KERAS_EAGER: partial(keras_layer, True, None),
                EAGER: partial(fused, None),
                NATIVE_KERAS_EAGER: partial(keras_layer, False, None),
            },
            "TensorFlow graph": {
                KERAS_GRAPH: partial(keras_layer, True, graph),
                GRAPH: partial(fused, graph),
                NATIVE_KERAS_GRAPH: partial(keras_layer, False, graph),
                KERAS_XLA: partial(keras_layer, False, xla),
            },
        },
        arrays,
    )
