"""What the benchmark of the LSTM is measured at: shapes, and operands with their results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.operands import Array, Kind

SHAPE_FORM = "B32 [T64] I128 H128 [P<projection>] [packed]; without T one step of a cell"
FORM = re.compile(r"B(\d+)(?: T(\d+))? I(\d+) H(\d+)(?: P(\d+))?( packed)?")


class LstmShape(NamedTuple):
    """T steps of B sequences of I inputs to H units, and from these to a projection of P.

    `steps` is 0 for a cell, `projection` where there is none. `packed` sequences have `lengths`.
    """

    batch: int
    steps: int
    inputs: int
    units: int
    projection: int = 0
    packed: bool = False

    def __str__(self) -> str:
        numbers = zip("BTIHP", self[:5])
        words = [f"{letter}{number}" for letter, number in numbers if number]
        return " ".join([*words, *(["packed"] if self.packed else [])])

    @property
    def cell(self) -> bool:
        return not self.steps

    @property
    def variant(self) -> tuple[bool, bool, bool]:
        return self.cell, self.packed, self.projection > 0

    @property
    def outputs(self) -> int:
        return self.projection or self.units

    @property
    def batch_sizes(self) -> list[int]:
        """How many sequences have each step, the longest ones first."""
        steps = max(self.steps, 1)
        if not self.packed:
            return [self.batch] * steps
        # Spread evenly: the longest has all steps, the shortest about one in `batch` of them.
        lengths = [max(1, steps * (k + 1) // self.batch) for k in range(self.batch)]
        return [sum(length > t for length in lengths) for t in range(steps)]

    @property
    def rows(self) -> int:
        return sum(self.batch_sizes)

    @property
    def weights(self) -> int:
        """Elements of the weight matrices: as many multiply-adds for a row."""
        return 4 * self.units * (self.inputs + self.outputs) + self.projection * self.units

    def flops(self, kind: Kind) -> float:
        """The products alone; the gradients of operands and weights count as much again each."""
        return (2.0 if kind == "forward" else 6.0) * self.rows * self.weights

    def elements_moved(self, kind: Kind) -> int:
        """Every operand and result once, two biases among them."""
        state = self.batch * (self.outputs + self.units)
        if self.cell:
            read, written = self.batch * self.inputs + state, state
        else:
            read, written = self.rows * self.inputs, self.rows * self.outputs
        moved = read + written + self.weights + 8 * self.units
        # A layer's last state is a result without a gradient of its own.
        return (moved if kind == "forward" else 2 * moved) + (0 if self.cell else state)


def parse_shape(text: str) -> LstmShape:
    """The shape that `str` has written. Raises ValueError."""
    found = FORM.fullmatch(text)
    if not found:
        raise ValueError(f"expected {SHAPE_FORM}, got {text!r}")
    *numbers, packed = found.groups()
    if not all(int(number) for number in numbers if number):
        raise ValueError(f"expected positive sizes, got {text!r}")
    batch, steps, inputs, units, projection = (int(number or 0) for number in numbers)
    shape = LstmShape(batch, steps, inputs, units, projection, bool(packed))
    if shape.cell and (shape.packed or shape.projection):
        raise ValueError(f"expected steps T with a projection or packed sequences, got {text!r}")
    if shape.projection >= shape.units:
        raise ValueError(f"expected a projection below H, got {text!r}")
    return shape


def frameworks_of(shape: LstmShape) -> Sequence[str]:
    """The frameworks that are measured at `shape`: Keras has no projection."""
    return ("torch",) if shape.projection else ("torch", "tensorflow")


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True)
class Operands:
    """input [T, B, I], h [B, R], c [B, H], weights as of `nn.LSTM`, and gradients of output
    [T, B, R] (a layer) or of the state (a cell), all normal; gates and outputs of order 1.

    A cell is a layer of one step. A layer starts from zeros. Where a sequence has no step, `input`
    and `grad_output` are 0.
    """

    shape: LstmShape
    input: Array
    h: Array
    c: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    weight_hr: Array
    grad_output: Array
    grad_h: Array
    grad_c: Array

    @classmethod
    def random(cls, shape: LstmShape) -> Operands:
        draw = np.random.default_rng(0).standard_normal
        steps, batch, units, outputs = max(shape.steps, 1), shape.batch, shape.units, shape.outputs
        live = np.arange(batch) < np.array(shape.batch_sizes)[:, None]
        has_state = float(shape.cell)
        return cls(
            shape,
            draw((steps, batch, shape.inputs)) * live[..., None],
            draw((batch, outputs)) * has_state,
            draw((batch, units)) * has_state,
            draw((4 * units, shape.inputs)) / np.sqrt(shape.inputs),
            draw((4 * units, outputs)) / np.sqrt(outputs),
            draw(4 * units),
            draw(4 * units),
            draw((shape.projection, units)) / np.sqrt(units),
            draw((steps, batch, outputs)) * live[..., None] * (1 - has_state),
            draw((batch, outputs)) * has_state,
            draw((batch, units)) * has_state,
        )

    def weights(self) -> list[Array]:
        """In the order of `nn.LSTM`'s parameters."""
        weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        return [*weights, self.weight_hr] if self.shape.projection else weights

    def rows(self, array: Array) -> Array:
        """Of what is [T, B, n] the steps that sequences have: itself, or packed [N, n]."""
        if not self.shape.packed:
            return array
        return np.concatenate([a[:n] for a, n in zip(array, self.shape.batch_sizes)])

    def reference(self, kind: Kind) -> list[Array]:
        """A layer's output, and the last state; for training also the gradients of the input, of a
        cell's state before, and of the weights in the order of `weights`.
        """
        h, c, h_all, steps = self.h.copy(), self.c.copy(), [], []
        for x, n in zip(self.input, self.shape.batch_sizes):
            a = x[:n] @ self.weight_ih.T + h[:n] @ self.weight_hh.T + self.bias_ih + self.bias_hh
            i, f, g, o = np.split(a, 4, axis=1)
            i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
            before = h.copy(), c.copy()
            c[:n] = f * c[:n] + i * g
            squashed = np.tanh(c[:n])
            raw = o * squashed
            h[:n] = raw @ self.weight_hr.T if self.shape.projection else raw
            h_all.append(np.zeros_like(h))
            h_all[-1][:n] = h[:n]
            steps.append((*before, i, f, g, o, squashed, raw))
        found = [h, c] if self.shape.cell else [self.rows(np.stack(h_all)), h, c]
        return found if kind == "forward" else found + self._gradients(steps)

    def _gradients(self, steps: Sequence[tuple[Array, ...]]) -> list[Array]:
        dh, dc = self.grad_h.copy(), self.grad_c.copy()
        d_input = np.zeros_like(self.input)
        d_ih, d_hh, d_bias, _, d_hr = map(
            np.zeros_like,
            (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr),
        )
        for t in reversed(range(len(steps))):
            h, c, i, f, g, o, squashed, raw = steps[t]
            n = len(i)
            d_raw = dh[:n] + self.grad_output[t, :n]
            if self.shape.projection:
                d_hr += d_raw.T @ raw
                d_raw = d_raw @ self.weight_hr
            d_c = dc[:n] + d_raw * o * (1 - squashed**2)
            gates = (d_c * g * i * (1 - i), d_c * c[:n] * f * (1 - f), d_c * i * (1 - g**2))
            a = np.concatenate([*gates, d_raw * squashed * o * (1 - o)], axis=1)
            d_input[t, :n] = a @ self.weight_ih
            d_ih += a.T @ self.input[t, :n]
            d_hh += a.T @ h[:n]
            d_bias += a.sum(0)
            dh[:n], dc[:n] = a @ self.weight_hh, d_c * f
        state = [dh, dc] if self.shape.cell else []
        weights = [d_ih, d_hh, d_bias, d_bias, *([d_hr] if self.shape.projection else [])]
        first = d_input[0] if self.shape.cell else self.rows(d_input)
        return [first, *state, *weights]
