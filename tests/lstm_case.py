"""What a case of the LSTM is: sizes, options, and how its operands lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tests.lstm_reference import Bools, Numbers

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "peephole", "norm")
LEAVES = ("input", "h0", "c0", *WEIGHTS)
GIVEN = ("grad_output", "grad_h", "grad_c")
# By the mean of the zoneout, by the rate of the dropout.
NOISE = {"zoneout_hidden": 0.15, "zoneout_cell": 0.4, "dropout_input": 0.3, "dropout_hidden": 0.25}
# What has a row for every step of every sequence.
ROWS = ("input", "zoneout_hidden", "zoneout_cell", "grad_output", "output", "grad_input")


@dataclass(frozen=True)
class LstmCase:
    """`steps` x `batch` vectors of `inputs` through `units`; 0 for `projection` is none.

    `bias` is "both", "one" (bias_ih) or "none"; `initial` and `grads` say which of two or three are
    given: "both", "hidden", "cell" or "none", and "all", "output", "final", "hidden" or "cell".
    `zoneout` is "", "draws" (zeros and ones), "means" (one number for all) or "hidden", "cell"
    (draws for this one); `dropout` is "", "both", "input" or "hidden". `mask` is "" or a key of
    MASKS; `lengths`, longest first, makes it packed.
    """

    op: ClassVar[str] = "lstm"

    id: str
    steps: int
    batch: int
    inputs: int
    units: int
    projection: int = 0
    bias: str = "both"
    initial: str = "both"
    peephole: bool = False
    norm: bool = False
    norm_epsilon: float = 1e-3
    zoneout: str = ""
    dropout: str = ""
    mask: str = ""
    zero_masked_output: bool = False
    lengths: tuple[int, ...] = ()
    reverse: bool = False
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    grads: str = "all"
    batch_first: bool = False
    input_layout: str = "contiguous"
    state_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    bias_layout: str = "contiguous"
    dropout_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    values: str = "normal"
    cell: bool = False

    @property
    def outputs(self) -> int:
        return self.projection or self.units

    @property
    def in_torch(self) -> bool:
        """Whether nn.LSTM (nn.LSTMCell) computes it, given both biases or none."""
        usual = (self.activation, self.recurrent_activation) == ("tanh", "sigmoid")
        extras = self.mask or self.peephole or self.zoneout or self.norm or self.dropout
        projected = self.projection and (self.cell or self.projection >= self.units)
        given = self.initial in ("both", "none") and self.bias != "one"
        return usual and given and not extras and not projected

    @property
    def in_keras(self) -> bool:
        """Whether a Keras layer computes it (or LSTMCell), given one bias or none.

        With dropout it is one of `implementation` 1, whose gates have a mask each.
        """
        extras = self.projection or self.peephole or self.zoneout or self.lengths or self.norm
        return not extras and self.bias != "both"

    def sizes(self, name: str) -> tuple[int, ...]:
        """Of an operand, a result or a gradient, by name."""
        if name in ROWS or name == "mask":
            last = {"input": self.inputs, "grad_input": self.inputs, "zoneout_cell": self.units}
            rows = (self.batch,) if self.cell else (self.steps, self.batch)
            rows = (sum(self.lengths),) if self.lengths else rows
            return rows if name == "mask" else (*rows, last.get(name, self.outputs))
        name, gates = name.removeprefix("grad_"), 4 * self.units
        return {
            "weight_ih": (gates, self.inputs),
            "weight_hh": (gates, self.outputs),
            "bias_ih": (gates,),
            "bias_hh": (gates,),
            "weight_hr": (self.projection, self.units),
            "peephole": (3, self.units),
            "norm": (2, gates),
            "dropout_input": (4, self.batch, self.inputs),
            "dropout_hidden": (4, self.batch, self.outputs),
        }.get(name) or (self.batch, self.units if name[0] == "c" else self.outputs)

    def has(self, name: str) -> bool:
        """Whether the operand is there."""
        states, final = ("both", "hidden"), ("all", "final", "hidden")
        return {
            "h0": self.initial in states,
            "c0": self.initial in ("both", "cell"),
            "bias_ih": self.bias != "none",
            "bias_hh": self.bias == "both",
            "weight_hr": self.projection > 0,
            "peephole": self.peephole,
            "norm": self.norm,
            "dropout_input": self.dropout in ("both", "input"),
            "dropout_hidden": self.dropout in ("both", "hidden"),
            "zoneout_hidden": self.zoneout not in ("", "cell"),
            "zoneout_cell": self.zoneout not in ("", "hidden"),
            "grad_output": self.grads in ("all", "output") and not self.cell,
            "grad_h": self.grads in final,
            "grad_c": self.grads in ("all", "final", "cell"),
        }.get(name, True)

    def layout(self, name: str) -> str:
        if name.startswith("zoneout"):
            way = "scalar" if self.zoneout == "means" else "contiguous"
        elif name.startswith("dropout"):
            way = self.dropout_layout
        elif name == "input":
            way = self.input_layout
        elif name in GIVEN:
            way = self.grad_layout
        elif name in ("h0", "c0"):
            way = self.state_layout
        else:
            way = self.weight_layout if name.startswith("weight") else self.bias_layout
        return f"permuted {way}" if self.batch_first and name in ROWS else way

    def row(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[T, B, ...] as operands of this case have it."""
        if self.lengths:
            return values[self.live_steps]
        return values[0] if self.cell else values

    def unrow(self, values: Numbers) -> Numbers:
        """[T, B, ...], with zeros where a packed sequence has ended."""
        if not self.lengths:
            return values[None] if self.cell else values
        padded = np.zeros((self.steps, self.batch, *values.shape[1:]), values.dtype)
        padded[self.live_steps] = values
        return padded

    @property
    def live_steps(self) -> Bools:
        """[T, B]: steps that the sequences have; masks are another matter."""
        lengths = np.array(self.lengths or [self.steps] * self.batch, np.int64)
        return np.arange(self.steps)[:, None] < lengths
