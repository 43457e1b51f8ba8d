"""Right arguments of the four functions of the LSTM, one of which a test makes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.core_api import OK, CTensor, Lender, Output
from tests.core_lstm_api import (
    ACTIVATIONS,
    CLstm,
    CNoise,
    CSaved,
    CState,
    CWeights,
    function,
    group,
)
from tests.test_core_errors import dense
from twinfuse import _core

# Steps, sequences, inputs, units, outputs.
T, B, N, H, R = 4, 3, 5, 7, 2
STATES = {"h": (B, R), "c": (B, H)}
WEIGHTS = {
    "weight_ih": (4 * H, N),
    "weight_hh": (4 * H, R),
    "bias_ih": (4 * H,),
    "bias_hh": (4 * H,),
    "weight_hr": (R, H),
    "peephole": (3, H),
    "norm": (2, 4 * H),
}
WIDTHS = {"zoneout_hidden": R, "zoneout_cell": H, "input": N, "output": R}
DROPOUTS = {"dropout_input": (4, B, N), "dropout_hidden": (4, B, R)}
GATES = 12 * H  # with a norm
SAVED = {"gates": (T * B, GATES), "cells": (T * B, H), "hidden": (T * B, R)}
STATE_NAMES = [f"initial_{s}" for s in STATES]
NOISE = ["zoneout_hidden", "zoneout_cell", *DROPOUTS]


@dataclass(frozen=True)
class Op:
    """One of the four functions, with names of its arguments as its errors have them."""

    cell: bool
    backward: bool

    def __str__(self) -> str:
        return f"{self.name}-{'backward' if self.backward else 'forward'}"

    @property
    def name(self) -> str:
        return "lstm_cell" if self.cell else "lstm"

    @property
    def call(self) -> Callable[..., int]:
        return function(f"{self.name}_{'backward' if self.backward else 'forward'}")

    @property
    def writes(self) -> list[str]:
        if self.backward:
            states = [f"grad_initial_{s}" for s in STATES]
            return ["grad_input", *states, *(f"grad_{name}" for name in WEIGHTS)]
        final = [f"final_{s}" for s in STATES]
        return [*final, "gates"] if self.cell else ["output", *final, *SAVED]

    @property
    def reads(self) -> list[str]:
        names = ["input", *WEIGHTS, *NOISE]
        if not self.backward:
            return [*names, *STATE_NAMES]
        given = [f"grad_final_{s}" for s in STATES]
        if self.cell:
            return [*names, *given, "gates", *STATE_NAMES]
        return [*names, *given, "grad_output", *SAVED]

    @property
    def names(self) -> list[str]:
        return [*self.writes, *self.reads]

    @property
    def optional(self) -> list[str]:
        """What may be NULL, each alone; of what is saved all or none."""
        required = {"input", "weight_ih", "weight_hh", "norm"}
        if self.backward:
            required |= {*SAVED, *STATE_NAMES, "peephole", "weight_hr"}
        return [name for name in self.names if name not in required | set(SAVED) | {"weight_hr"}]

    def sizes(self, name: str) -> tuple[int, ...]:
        if name in SAVED:
            return (B, GATES) if self.cell else SAVED[name]
        name = name.removeprefix("grad_")
        if name in WIDTHS:
            return (B, WIDTHS[name]) if self.cell else (T, B, WIDTHS[name])
        return WEIGHTS.get(name) or DROPOUTS.get(name) or STATES[name[-1]]


OPS = [Op(cell, backward) for cell in (False, True) for backward in (False, True)]


def settings(**changes: Any) -> CLstm:
    lstm = CLstm(ACTIVATIONS["tanh"], ACTIVATIONS["sigmoid"])
    for name, value in changes.items():
        setattr(lstm, name, value)
    return lstm


def call(op: Op, changes: dict[str, CTensor | None], **given: Any) -> int:
    """One call with `changes` to otherwise right arguments; outputs must stay as they are."""
    outputs = {name: Output.poisoned(op.sizes(name), "float32") for name in op.writes}
    before = {name: output.operand.base.copy() for name, output in outputs.items()}
    tensors: dict[str, CTensor | None] = {
        name: outputs[name].tensor if name in outputs else dense(op.sizes(name))
        for name in op.names
    }
    tensors.update(changes)

    def state(prefix: str) -> Any:
        return group(CState, [f"{prefix}_{s}" for s in STATES], tensors)

    weights = None if given.pop("no_weights", False) else group(CWeights, WEIGHTS, tensors)
    noise = group(CNoise, NOISE, tensors)
    grads = group(CWeights, [f"grad_{name}" for name in WEIGHTS], tensors)
    saved = group(CSaved, SAVED, tensors)
    given.setdefault("settings", settings())
    rest = [weights, noise, given.pop("settings")]
    rest.append(None if given.pop("no_context", False) else Lender(**given).context())
    x = tensors["input"]
    arguments = {
        (False, False): [tensors.get("output"), state("final"), saved, x, state("initial")],
        (False, True): [
            tensors.get("grad_input"),
            state("grad_initial"),
            grads,
            tensors.get("grad_output"),
            state("grad_final"),
            saved,
            x,
        ],
        (True, False): [state("final"), tensors.get("gates"), x, state("initial")],
        (True, True): [
            tensors.get("grad_input"),
            state("grad_initial"),
            grads,
            state("grad_final"),
            tensors.get("gates"),
            x,
            state("initial"),
        ],
    }[op.cell, op.backward]
    launches = _core.launches()
    status = op.call(*arguments, *rest)
    if status != OK:
        for name, output in outputs.items():
            same = output.operand.base.view(np.uint8) == before[name].view(np.uint8)
            assert same.all(), f"a refused call wrote {name}"
        assert _core.launches() == launches, "a refused call was counted"
    return status
