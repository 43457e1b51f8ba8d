"""The equations of lstm.h in NumPy, forward and backward, in any precision.

Written as a loop over steps, operation by operation, from the header and nothing else. Packed
sequences are padded by the caller: a sequence skips steps that it does not have like masked ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Arrays = dict[str, Numbers]
Function = Callable[[Numbers], Numbers]


def _sigmoid(x: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-x))


def _relu(x: Numbers) -> Numbers:
    return np.where(x <= 0, np.zeros_like(x), x)


def _hard_sigmoid(x: Numbers) -> Numbers:
    return np.clip(x / 6 + x.dtype.type(0.5), 0, 1)


# Functions, and derivatives in terms of what they return.
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "tanh": (np.tanh, lambda y: 1 - y * y),
    "sigmoid": (_sigmoid, lambda y: y * (1 - y)),
    "relu": (_relu, lambda y: (y > 0).astype(y.dtype)),
    "hard_sigmoid": (_hard_sigmoid, lambda y: ((y > 0) & (y < 1)).astype(y.dtype) / 6),
}
# Where a derivative jumps, by activation, in terms of the argument.
KINKS = {"relu": (0.0,), "hard_sigmoid": (-3.0, 3.0)}


@dataclass
class Lstm:
    """One call. Arrays may lack whatever lstm.h lets be NULL; all are [T, B, ...].

    `live` is false where a sequence skips a step. `rounded` is applied to the result of every
    operation: the identity, or rounding to a dtype that NumPy does not compute in. `product` is
    that of two matrices.
    """

    arrays: Arrays
    live: Bools
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    reverse: bool = False
    zero_masked_output: bool = False
    rounded: Function = lambda x: x
    product: Callable[[Numbers, Numbers], Numbers] = np.matmul
    # By step: gates and pre-activations [T, B, 4H], states before and what came of them.
    steps: dict[str, list[Numbers]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = range(len(self.live))[:: -1 if self.reverse else 1]
        self.cell, self.cell_slope = ACTIVATIONS[self.activation]
        self.gate, self.gate_slope = ACTIVATIONS[self.recurrent_activation]

        self.units = self.arrays["weight_hh"].shape[0] // 4

    def _state(self, h: str, c: str) -> tuple[Numbers, Numbers]:
        weight, batch = self.arrays["weight_hh"], self.live.shape[1]
        zeros = (np.zeros((batch, n), weight.dtype) for n in (weight.shape[1], self.units))
        return self.arrays.get(h, next(zeros)), self.arrays.get(c, next(zeros))

    def _linear(self, x: Numbers, weight: str, bias: str = "") -> Numbers:
        product = self.product(x, self.arrays[weight].T)
        return self.rounded(product + self.arrays[bias] if bias in self.arrays else product)

    def _peep(self, a: Numbers, which: int, c: Numbers) -> Numbers:
        if "peephole" not in self.arrays:
            return a
        return self.rounded(a + self.rounded(self.arrays["peephole"][which] * c))

    def _mix(self, share: str, t: int, old: Numbers, new: Numbers) -> Numbers:
        if share not in self.arrays:
            return new
        r, z = self.rounded, self.arrays[share][t]
        return r(r(z * old) + r(r(1 - z) * new))

    def forward(self) -> Arrays:
        """`output`, `h_n` and `c_n`."""
        r, live = self.rounded, self.live[..., None]
        h, c = self._state("h0", "c0")
        last = np.zeros_like(h)
        names = ("pre", "gates", "cells", "hidden", "new_cells", "squashed", "outputs")
        self.steps = {name: [h] * len(self.live) for name in names}
        for t in self.order:
            x = self.arrays["input"][t]
            a = r(self._linear(x, "weight_ih", "bias_ih") + self._linear(h, "weight_hh", "bias_hh"))
            a_i, a_f, a_g, a_o = np.split(a, 4, axis=-1)
            a_i, a_f = self._peep(a_i, 0, c), self._peep(a_f, 1, c)
            i, f, g = r(self.gate(a_i)), r(self.gate(a_f)), r(self.cell(a_g))
            new_c = r(r(f * c) + r(i * g))
            a_o = self._peep(a_o, 2, new_c)
            o, squashed = r(self.gate(a_o)), r(self.cell(new_c))
            new_h = r(o * squashed)
            if "weight_hr" in self.arrays:
                new_h = self._linear(new_h, "weight_hr")
            saved = {
                "pre": np.concatenate([a_i, a_f, a_g, a_o], -1),
                "gates": np.concatenate([i, f, g, o], -1),
                "cells": c,
                "hidden": h,
                "new_cells": new_c,
                "squashed": squashed,
            }
            next_h = self._mix("zoneout_hidden", t, h, new_h)
            next_c = self._mix("zoneout_cell", t, c, new_c)
            last = np.where(live[t], next_h, last)
            shown = np.zeros_like(last) if self.zero_masked_output else last
            saved["outputs"] = np.where(live[t], next_h, shown)
            h, c = np.where(live[t], next_h, h), np.where(live[t], next_c, c)
            for name, value in saved.items():
                self.steps[name][t] = value
        empty = np.zeros((0, *h.shape), h.dtype)
        output = np.stack(self.steps["outputs"]) if self.steps["outputs"] else empty
        return {"output": output, "h_n": h, "c_n": c}

    def backward(self) -> Arrays:
        """Gradients of everything given, from grad_output, grad_h and grad_c; after `forward`."""
        r, live, arrays = self.rounded, self.live[..., None], self.arrays
        dh, dc = self._state("grad_h", "grad_c")
        # What later steps that were skipped hand back to the last one that was not.
        waiting = np.zeros_like(dh)
        blank = np.zeros((*self.live.shape, 4 * self.units), dh.dtype)
        d_gates, d_cells, d_out = blank, blank[..., : self.units].copy(), []
        d_input = np.zeros_like(arrays["input"])
        hidden_out = []
        one = dh.dtype.type(1)
        for t in reversed(self.order):
            gates, c, new_c, squashed = (
                self.steps[name][t] for name in ("gates", "cells", "new_cells", "squashed")
            )
            i, f, g, o = np.split(gates, 4, axis=-1)
            shown = arrays["grad_output"][t] if "grad_output" in arrays else np.zeros_like(dh)
            grad = r(shown + waiting)
            keep = np.zeros_like(grad) if self.zero_masked_output else grad
            waiting = np.where(live[t], np.zeros_like(grad), keep)
            total = r(dh + grad)
            z_h, z_c = (
                arrays[name][t] if name in arrays else None
                for name in ("zoneout_hidden", "zoneout_cell")
            )
            d_new_h = total if z_h is None else r(r(one - z_h) * total)
            d_new_c = dc if z_c is None else r(r(one - z_c) * dc)
            d_u = d_new_h
            if "weight_hr" in arrays:
                d_out.append(np.where(live[t], d_new_h, 0))
                hidden_out.append(r(o * squashed))
                d_u = r(self.product(d_new_h, arrays["weight_hr"]))
            d_o = r(r(d_u * squashed) * r(self.gate_slope(o)))
            d_new_c = r(d_new_c + r(r(d_u * o) * r(self.cell_slope(squashed))))
            if "peephole" in arrays:
                d_new_c = r(d_new_c + r(d_o * arrays["peephole"][2]))
            d_i = r(r(d_new_c * g) * r(self.gate_slope(i)))
            d_f = r(r(d_new_c * c) * r(self.gate_slope(f)))
            d_g = r(r(d_new_c * i) * r(self.cell_slope(g)))
            d_a = np.where(live[t], np.concatenate([d_i, d_f, d_g, d_o], -1), 0)
            d_gates[t], d_cells[t] = d_a, new_c
            d_input[t] = r(self.product(d_a, arrays["weight_ih"]))
            d_c = r(d_new_c * f)
            if "peephole" in arrays:
                p = arrays["peephole"]
                d_c = r(r(d_c + r(d_i * p[0])) + r(d_f * p[1]))
            d_h = r(self.product(d_a, arrays["weight_hh"]))
            d_h = d_h if z_h is None else r(d_h + r(z_h * total))
            d_c = d_c if z_c is None else r(d_c + r(z_c * dc))
            dh, dc = np.where(live[t], d_h, dh), np.where(live[t], d_c, dc)

        def over_rows(grads: Numbers, values: list[Numbers] | Numbers) -> Numbers:
            rows = np.concatenate([*np.asarray(values, dh.dtype)])
            return self.product(np.concatenate([*grads]).T, rows)

        results = {"input": d_input, "h0": dh, "c0": dc}
        if not len(self.order) or not self.live.size:
            results |= {
                name: np.zeros_like(value)
                for name, value in arrays.items()
                if name.startswith(("weight", "bias", "peephole"))
            }
        else:
            results["weight_ih"] = over_rows(d_gates, arrays["input"])
            results["weight_hh"] = over_rows(d_gates, self.steps["hidden"])
            ones = np.ones((*self.live.shape, 1), dh.dtype)
            results["bias_ih"] = results["bias_hh"] = over_rows(d_gates, ones)[:, 0]
            if "weight_hr" in arrays:
                results["weight_hr"] = over_rows(np.stack(d_out), np.stack(hidden_out))
            i, f, _, o = np.split(d_gates, 4, axis=-1)
            before = np.stack(self.steps["cells"])
            sums = [(d * c).sum(axis=(0, 1)) for d, c in ((i, before), (f, before), (o, d_cells))]
            results["peephole"] = np.stack(sums)
        return {f"grad_{name}": r(results[name]) for name in results if name in arrays}
