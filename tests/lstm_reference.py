"""The equations of lstm.h in NumPy, forward and backward, in any precision.

Written as a loop over steps, operation by operation, from the header and nothing else. Packed
sequences are padded by the caller: a sequence skips steps that it does not have like masked ones.
"""

from __future__ import annotations

import functools
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
WHICH = ("ih", "hh")
DROPOUTS = {"ih": "dropout_input", "hh": "dropout_hidden"}
NORMED = ("centred", "normalised", "scale")
# Where a derivative jumps, by activation, in terms of the argument.
KINKS = {"relu": (0.0,), "hard_sigmoid": (-3.0, 3.0)}


@dataclass
class Lstm:
    """One call. Arrays may lack whatever lstm.h lets be NULL; all are [T, B, ...].

    `live` is false where a sequence skips a step. `rounded` is applied to the result of every
    operation: the identity, or rounding to a dtype that NumPy does not compute in. `product` is
    that of two matrices, and `inner` is applied within operations that do more than one thing.
    """

    arrays: Arrays
    live: Bools
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    reverse: bool = False
    zero_masked_output: bool = False
    norm_epsilon: float = 0.0
    rounded: Function = lambda x: x
    product: Callable[[Numbers, Numbers], Numbers] = np.matmul
    inner: Function = lambda x: x
    # By step: gates and pre-activations [T, B, 4H], states before and what came of them, and what
    # the norms made of the products, those with ih and then those with hh [T, B, 8H].
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

    def _dropped(self, x: Numbers, which: str) -> list[Numbers]:
        """[..., B, n] as the gates have it: one that all share, or one for each."""
        factors = self.arrays.get(DROPOUTS[which])
        return [x] if factors is None else [self.rounded(factor * x) for factor in factors]

    def _sums(self, x: Numbers, which: str) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Of the gates, with norm and bias; and the product centred, normalised, and by what."""
        dropped = self._dropped(x, which)
        weights = np.split(self.arrays[f"weight_{which}"], len(dropped))
        product = np.concatenate([self.product(x, w.T) for x, w in zip(dropped, weights)], -1)
        bias = self.arrays.get(f"bias_{which}", product.dtype.type(0))
        if "norm" not in self.arrays:
            return self.rounded(product + bias), *(np.zeros_like(product),) * 3
        # One operation, as in frameworks: of 16 bits only the product and the result are rounded.
        product = self.rounded(product)
        centred = self.inner(product - self._mean(product))
        epsilon = product.dtype.type(self.norm_epsilon)
        scale = self.inner(1 / np.sqrt(self._mean(centred * centred) + epsilon))
        normalised = self.inner(centred * scale)
        sums = self.rounded(self.arrays["norm"][WHICH.index(which)] * normalised + bias)
        return sums, centred, normalised, scale

    def _mean(self, values: Numbers) -> Numbers:
        width = values.shape[-1]
        return self.product(values, np.ones((width, 1), values.dtype)) / values.dtype.type(width)

    def _through_norm(self, d_a: Numbers, which: str, t: int) -> Numbers:
        """The gradient of the product, from that of the sums of the gates."""
        if "norm" not in self.arrays:
            return d_a
        k = WHICH.index(which)
        normalised, scale = (np.split(self.steps[n][t], 2, -1)[k] for n in ("normalised", "scale"))
        d = self.inner(self.arrays["norm"][k] * d_a)
        d = self.inner(d - self._mean(d)) - self.inner(normalised * self._mean(d * normalised))
        return np.where(self.live[t, :, None], self.rounded(d * scale), 0)

    def _through_product(self, d: Numbers, which: str) -> Numbers:
        """The gradient of x (or h), from that of the product."""
        r, weight = self.rounded, self.arrays[f"weight_{which}"]
        factors = self.arrays.get(DROPOUTS[which])
        if factors is None:
            return r(self.product(d, weight))
        gates = zip(np.split(d, 4, axis=-1), np.split(weight, 4), factors)
        parts = [r(factor * r(self.product(d_k, w))) for d_k, w, factor in gates]
        return functools.reduce(lambda a, b: r(a + b), parts)

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
        names = ("pre", "gates", "cells", "hidden", "new_cells", "squashed", "outputs", *NORMED)
        self.steps = {name: [h] * len(self.live) for name in names}
        for t in self.order:
            of_x, of_h = self._sums(self.arrays["input"][t], "ih"), self._sums(h, "hh")
            a = r(of_x[0] + of_h[0])
            a_i, a_f, a_g, a_o = np.split(a, 4, axis=-1)
            a_i, a_f = self._peep(a_i, 0, c), self._peep(a_f, 1, c)
            i, f, g = r(self.gate(a_i)), r(self.gate(a_f)), r(self.cell(a_g))
            new_c = r(r(f * c) + r(i * g))
            a_o = self._peep(a_o, 2, new_c)
            o, squashed = r(self.gate(a_o)), r(self.cell(new_c))
            new_h = r(o * squashed)
            if "weight_hr" in self.arrays:
                new_h = r(self.product(new_h, self.arrays["weight_hr"].T))
            saved = {
                "pre": np.concatenate([a_i, a_f, a_g, a_o], -1),
                "gates": np.concatenate([i, f, g, o], -1),
                "cells": c,
                "hidden": h,
                "new_cells": new_c,
                "squashed": squashed,
            }
            for name, *pair in zip(NORMED, of_x[1:], of_h[1:]):
                saved[name] = np.concatenate(pair, -1)
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
        d_products = {which: blank.copy() for which in WHICH}
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
            for which in WHICH:
                d_products[which][t] = self._through_norm(d_a, which, t)
            d_input[t] = self._through_product(d_products["ih"][t], "ih")
            d_c = r(d_new_c * f)
            if "peephole" in arrays:
                p = arrays["peephole"]
                d_c = r(r(d_c + r(d_i * p[0])) + r(d_f * p[1]))
            d_h = self._through_product(d_products["hh"][t], "hh")
            d_h = d_h if z_h is None else r(d_h + r(z_h * total))
            d_c = d_c if z_c is None else r(d_c + r(z_c * dc))
            dh, dc = np.where(live[t], d_h, dh), np.where(live[t], d_c, dc)

        def over_rows(grads: Numbers, values: list[Numbers] | Numbers) -> Numbers:
            rows = np.concatenate([*np.asarray(values, dh.dtype)])
            return self.product(np.concatenate([*grads]).T, rows)

        def of_weight(which: str, values: Numbers) -> Numbers:
            dropped = self._dropped(values, which)
            gates = np.split(d_products[which], len(dropped), axis=-1)
            return np.concatenate([over_rows(d, v) for d, v in zip(gates, dropped)])

        results = {"input": d_input, "h0": dh, "c0": dc}
        if not len(self.order) or not self.live.size:
            results |= {
                name: np.zeros_like(value)
                for name, value in arrays.items()
                if name.startswith(("weight", "bias", "peephole", "norm"))
            }
        else:
            results["weight_ih"] = of_weight("ih", arrays["input"])
            results["weight_hh"] = of_weight("hh", np.stack(self.steps["hidden"]))
            ones = np.ones((*self.live.shape, 1), dh.dtype)
            results["bias_ih"] = results["bias_hh"] = over_rows(d_gates, ones)[:, 0]
            if "weight_hr" in arrays:
                results["weight_hr"] = over_rows(np.stack(d_out), np.stack(hidden_out))
            i, f, _, o = np.split(d_gates, 4, axis=-1)
            before = np.stack(self.steps["cells"])
            sums = [(d * c).sum(axis=(0, 1)) for d, c in ((i, before), (f, before), (o, d_cells))]
            results["peephole"] = np.stack(sums)
            normalised = np.split(np.stack(self.steps["normalised"]), 2, axis=-1)
            sums = [over_rows(ones, self.inner(d_gates * n))[0] for n in normalised]
            results["norm"] = np.stack(sums)
        return {f"grad_{name}": r(results[name]) for name in results if name in arrays}
