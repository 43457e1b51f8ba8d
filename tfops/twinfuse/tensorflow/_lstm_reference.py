"""The LSTM by TensorFlow's own ops, as Keras computes it, with all that `lstm` has besides.

This is what runs where no kernel does, and what gradients of gradients are taken of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

Activation = Callable[[Any], Any]


def _hard_sigmoid(x: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(x / 6 + 0.5, 0.0, 1.0)


# By the core's numbers.
ACTIVATIONS: dict[str, Activation] = {
    "tanh": tf.tanh,
    "sigmoid": tf.sigmoid,
    "relu": tf.nn.relu,
    "hard_sigmoid": _hard_sigmoid,
}
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


class Operands(NamedTuple):
    """The tensors of a call, in the order of the op's inputs; None where there is none.

    With `time_major` unset, whatever has steps has them behind the batch.
    """

    x: Any  # [T, B, I], of a cell [B, I]
    kernel: Any  # [I, 4H]
    recurrent_kernel: Any  # [R, 4H]
    bias: Any = None  # [4H]
    projection: Any = None  # [H, R]
    peephole: Any = None  # [3, H]
    norm: Any = None  # [2, 4H]
    h: Any = None  # [B, R]
    c: Any = None  # [B, H]
    mask: Any = None  # [T, B]
    zoneout_hidden: Any = None  # broadcasts to [T, B, R]
    zoneout_cell: Any = None  # broadcasts to [T, B, H]
    dropout_input: Any = None  # broadcasts to [4, B, I]
    dropout_hidden: Any = None  # broadcasts to [4, B, R]


class Settings(NamedTuple):
    activation: str | Activation
    recurrent_activation: str | Activation
    go_backwards: bool = False
    time_major: bool = False
    zero_output_for_mask: bool = False
    norm_epsilon: str = "0.001"  # as in the op, where a number would have 32 bits

    @property
    def functions(self) -> tuple[Activation, Activation]:
        """Of the cell and of the gates."""
        pair = (self.activation, self.recurrent_activation)
        cell, gate = (ACTIVATIONS[f] if isinstance(f, str) else f for f in pair)
        return cell, gate


def _mix(share: Any, old: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
    return new if share is None else share * old + (1 - share) * new


def _product(x: tf.Tensor, kernel: tf.Tensor, dropout: Any) -> tf.Tensor:
    if dropout is None:
        return tf.matmul(x, kernel)
    kept = x * tf.broadcast_to(dropout, tf.concat([[4], tf.shape(x)], 0))
    parts = zip(tf.unstack(kept, 4), tf.split(kernel, 4, -1))
    return tf.concat([tf.matmul(part, weights) for part, weights in parts], -1)


def _normalised(sums: tf.Tensor, scale: tf.Tensor, epsilon: float) -> tf.Tensor:
    # Squares of float16 overflow, and epsilon is a denormal there.
    wide = tf.cast(sums, tf.float32) if sums.dtype.size == 2 else sums
    centred = wide - tf.reduce_mean(wide, -1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
    return tf.cast(centred / tf.sqrt(variance + epsilon), sums.dtype) * scale


def _step(o: Operands, settings: Settings) -> tuple[tf.Tensor, tf.Tensor]:
    activation, gate = settings.functions
    of_x = _product(o.x, o.kernel, o.dropout_input)
    of_h = _product(o.h, o.recurrent_kernel, o.dropout_hidden)
    if o.norm is not None:
        epsilon = float(settings.norm_epsilon)
        of_x = _normalised(of_x, o.norm[0], epsilon)
        of_h = _normalised(of_h, o.norm[1], epsilon)
    z = of_x + of_h
    if o.bias is not None:
        z += o.bias
    i, f, g, out = tf.split(z, 4, -1)
    if o.peephole is not None:
        i += o.peephole[0] * o.c
        f += o.peephole[1] * o.c
    c = gate(f) * o.c + gate(i) * activation(g)
    if o.peephole is not None:
        out += o.peephole[2] * c
    h = gate(out) * activation(c)
    if o.projection is not None:
        h = tf.matmul(h, o.projection)
    return _mix(o.zoneout_hidden, o.h, h), _mix(o.zoneout_cell, o.c, c)


def cell(operands: Operands, settings: Settings) -> list[tf.Tensor]:
    """`[h_n, c_n]`."""
    return list(_step(operands, settings))


def layer(operands: Operands, settings: Settings) -> list[tf.Tensor]:
    """`[outputs, h_n, c_n]`; the outputs are in the order of time."""
    o, x, mask = operands, operands.x, operands.mask
    if not settings.time_major:
        x = tf.transpose(x, [1, 0, 2])
        mask = None if mask is None else tf.transpose(mask)
    shape = tf.shape(x)
    steps = shape[0] if x.shape[0] is None else x.shape[0]
    units = (o.recurrent_kernel.shape[0], o.recurrent_kernel.shape[1])
    hidden = tf.shape(o.recurrent_kernel)[0] if units[0] is None else units[0]
    cells = tf.shape(o.recurrent_kernel)[1] // 4 if units[1] is None else units[1] // 4
    h = tf.zeros([shape[1], hidden], x.dtype) if o.h is None else o.h
    c = tf.zeros([shape[1], cells], x.dtype) if o.c is None else o.c

    def read(tensor: Any) -> Any:
        array = tf.TensorArray(tensor.dtype, steps, element_shape=tensor.shape[1:])
        return array.unstack(tensor)

    def shares(tensor: Any, size: Any) -> Any:
        if tensor is None:
            return None
        order = [0, 1] if settings.time_major else [1, 0]
        full = tf.broadcast_to(tensor, [shape[order[0]], shape[order[1]], size])
        return read(tf.transpose(full, [*order, 2]))

    xs, flags = read(x), None if mask is None else read(mask[..., None])
    of_hidden, of_cells = shares(o.zoneout_hidden, hidden), shares(o.zoneout_cell, cells)
    outputs = tf.TensorArray(x.dtype, steps, element_shape=h.shape)

    def body(done: Any, outputs: Any, shown: Any, h: Any, c: Any) -> tuple[Any, ...]:
        t = steps - 1 - done if settings.go_backwards else done
        now = o._replace(
            x=xs.read(t),
            h=h,
            c=c,
            zoneout_hidden=None if of_hidden is None else of_hidden.read(t),
            zoneout_cell=None if of_cells is None else of_cells.read(t),
        )
        new_h, new_c = _step(now, settings)
        output = new_h
        if flags is not None:
            live = flags.read(t)
            hidden_output = tf.zeros_like(shown) if settings.zero_output_for_mask else shown
            output = tf.where(live, new_h, hidden_output)
            new_h, new_c = tf.where(live, new_h, h), tf.where(live, new_c, c)
        return done + 1, outputs.write(t, output), output, new_h, new_c

    _, outputs, _, h, c = tf.while_loop(
        lambda done, *_: done < steps,
        body,
        (tf.constant(0), outputs, tf.zeros_like(h), h, c),
        maximum_iterations=steps,
    )
    y = outputs.stack()
    y.set_shape([x.shape[0], *h.shape])
    return [y if settings.time_major else tf.transpose(y, [1, 0, 2]), h, c]
