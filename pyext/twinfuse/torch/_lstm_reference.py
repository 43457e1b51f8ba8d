"""The LSTM's equations (csrc/include/twinfuse/lstm.h) by torch's own operators.

They serve what no kernel does: transforms, gradients of gradients, and options that the native
layers lack where no kernel runs. Autograd, forward mode and vmap can go through all of them.

Whole sequences are in `_lstm_layer_reference`, a step alone in `_lstm_cell_reference`. Arguments
there are those of the private operators, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# TwinfuseActivation.
ACTIVATIONS = {"tanh": 0, "sigmoid": 1, "relu": 2, "hard_sigmoid": 3}

# In the order in which the layer's backward operator returns them. A cell's has no `weight_hr`.
GRADIENTS = ("input", "h", "c", "weight_ih", "weight_hh", "bias", "weight_hr", "peephole", "norm")


def _hard_sigmoid(value: Tensor) -> Tensor:
    # F.hardsigmoid takes 1 / 6 in float32, in float64 too.
    return (value / 6 + 0.5).clamp(0, 1)


_FUNCTIONS = (torch.tanh, torch.sigmoid, torch.relu, _hard_sigmoid)


def noise_needs_gradient(*noise: Tensor | None) -> str:
    """Why the kernels cannot take these zoneouts and dropouts, or ""."""
    names = ("zoneout_hidden", "zoneout_cell", "dropout_input", "dropout_hidden")
    for name, tensor in zip(names, noise):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return f"{name}: no kernel computes its gradient"
    return ""


def missing_on_gpu(input: Tensor, given: Mapping[str, object]) -> str:
    """Which of the options that are given no kernel has for the device, or ""."""
    if not input.is_cuda:
        return ""
    for name, value in given.items():
        if value is not None:
            return f"{name}: no GPU kernel takes it"
    return ""


def check_dtype(op: str, input: Tensor) -> None:
    # Native refuses the others, with which torch's operators would compute something.
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"{op}: input: expected a floating-point dtype, got {input.dtype}")


def _slope(activation: int, value: Tensor) -> Tensor:
    """The derivative where the activation has this value."""
    if activation == 0:
        return 1 - value * value
    if activation == 1:
        return value * (1 - value)
    if activation == 2:
        return (value > 0).to(value.dtype)
    return ((value > 0) & (value < 1)).to(value.dtype) / 6


def _mixed(zoneout: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if zoneout is None else zoneout * old + (1 - zoneout) * new


# Of dropouts, `factors` are [4, ...]: those of the value in the product of each gate.


def _product(value: Tensor, weight: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return F.linear(value, weight)
    pairs = zip(factors.unbind(0), weight.chunk(4))
    return torch.cat([F.linear(value * each, part) for each, part in pairs], -1)


def _gradient_of_value(grad: Tensor, weight: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return grad @ weight
    triples = zip(grad.chunk(4, -1), weight.chunk(4), factors.unbind(0))
    return torch.stack([(g @ part) * each for g, part, each in triples]).sum(0)


def _gradient_of_weight(grad: Tensor, value: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return grad.t() @ value
    pairs = zip(grad.chunk(4, -1), factors.unbind(0))
    return torch.cat([g.t() @ (value * each) for g, each in pairs])


def _wide(values: Tensor) -> Tensor:
    """As norms are computed: squares of float16 overflow, and an epsilon is a denormal there."""
    return values.float() if values.dtype.itemsize == 2 else values


def _inverse_deviation(centred: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt((centred * centred).mean(-1, keepdim=True) + epsilon)


def _through_norm(
    grad: Tensor, centred: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The gradient of a product before its norm, and rows whose sum is that of the scale."""
    dtype, centred, grad = grad.dtype, _wide(centred), _wide(grad)
    inverse = _inverse_deviation(centred, epsilon)
    unit, scaled = centred * inverse, grad * _wide(scale)
    both = scaled.mean(-1, keepdim=True) + unit * (scaled * unit).mean(-1, keepdim=True)
    return (inverse * (scaled - both)).to(dtype), (grad * unit).to(dtype)


# What a product adds to the gates, and with a norm the product less its mean.
Sums = tuple[Tensor, Tensor | None]


class Step(NamedTuple):
    """The weights and options that all steps have in common."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    peephole: Tensor | None
    norm: Tensor | None
    activation: int
    recurrent_activation: int
    norm_epsilon: float

    def from_input(self, input: Tensor, factors: Tensor | None) -> Sums:
        scale = None if self.norm is None else self.norm[0]
        return self._sums(input, self.weight_ih, self.bias_ih, factors, scale)

    def _from_hidden(self, h: Tensor, factors: Tensor | None) -> Sums:
        scale = None if self.norm is None else self.norm[1]
        return self._sums(h, self.weight_hh, self.bias_hh, factors, scale)

    def _sums(
        self,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: Tensor | None,
        scale: Tensor | None,
    ) -> Sums:
        if factors is None and scale is None:
            return F.linear(value, weight, bias), None
        total, centred = _product(value, weight, factors), None
        if scale is not None:
            dtype, total = total.dtype, _wide(total)
            total = total - total.mean(-1, keepdim=True)
            unit = total * _inverse_deviation(total, self.norm_epsilon)
            total, centred = scale * unit.to(dtype), total.to(dtype)
        return total if bias is None else total + bias, centred

    def forward(
        self,
        from_input: Sums,
        h: Tensor,
        c: Tensor,
        zoneout_hidden: Tensor | None,
        zoneout_cell: Tensor | None,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The next state, and what is saved of the gates."""
        act, gate = _FUNCTIONS[self.activation], _FUNCTIONS[self.recurrent_activation]
        from_hidden = self._from_hidden(h, factors)
        i, f, g, o = (from_input[0] + from_hidden[0]).chunk(4, -1)
        peephole = self.peephole
        if peephole is not None:
            i, f = i + peephole[0] * c, f + peephole[1] * c
        i, f, g = gate(i), gate(f), act(g)
        cell = f * c + i * g
        o = gate(o if peephole is None else o + peephole[2] * cell)
        hidden = o * act(cell)
        if self.weight_hr is not None:
            hidden = F.linear(hidden, self.weight_hr)
        centred = [each for _, each in (from_input, from_hidden) if each is not None]
        new_h, new_c = _mixed(zoneout_hidden, h, hidden), _mixed(zoneout_cell, c, cell)
        return new_h, new_c, [i, f, g, o, *centred]

    def backward(
        self,
        dh: Tensor,
        dc: Tensor,
        saved: Tensor,
        c: Tensor,
        zoneout_hidden: Tensor | None,
        zoneout_cell: Tensor | None,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of the state before the step, and rows that `gradients` takes.

        They are the gradients of the gates before their activations, o * t(c~), the gradient of the
        hidden state without zoneout, c~, and with a norm the gradients of both products beside the
        rows of both scales.
        """
        gates = 4 * c.shape[-1]
        i, f, g, o = saved[..., :gates].chunk(4, -1)
        cell = f * c + i * g
        bounded = _FUNCTIONS[self.activation](cell)
        dhidden = dh if zoneout_hidden is None else (1 - zoneout_hidden) * dh
        dcell = dc if zoneout_cell is None else (1 - zoneout_cell) * dc
        dout = dhidden if self.weight_hr is None else dhidden @ self.weight_hr
        do = dout * bounded * _slope(self.recurrent_activation, o)
        dcell = dcell + dout * o * _slope(self.activation, bounded)
        peephole = self.peephole
        if peephole is not None:
            dcell = dcell + peephole[2] * do
        di = dcell * g * _slope(self.recurrent_activation, i)
        df = dcell * c * _slope(self.recurrent_activation, f)
        dg = dcell * i * _slope(self.activation, g)
        da = torch.cat([di, df, dg, do], -1)
        rows = [da, o * bounded, dhidden, cell]
        if self.norm is not None:
            pairs = zip(saved[..., gates:].chunk(2, -1), self.norm.unbind(0))
            (d_ih, of_ih), (d_hh, of_hh) = (
                _through_norm(da, centred, scale, self.norm_epsilon) for centred, scale in pairs
            )
            rows.append(torch.cat([d_ih, d_hh, of_ih, of_hh], -1))
            da = d_hh
        old_dh, old_dc = _gradient_of_value(da, self.weight_hh, factors), dcell * f
        if peephole is not None:
            old_dc = old_dc + peephole[0] * di + peephole[1] * df
        if zoneout_hidden is not None:
            old_dh = old_dh + zoneout_hidden * dh
        if zoneout_cell is not None:
            old_dc = old_dc + zoneout_cell * dc
        return old_dh, old_dc, rows

    def gradients(
        self,
        rows: list[Tensor],
        input: Tensor,
        hidden: Tensor,
        cells: Tensor,
        input_factors: Tensor | None,
        hidden_factors: Tensor | None,
        needs: int,
    ) -> list[Any]:
        """Those of `GRADIENTS` that `needs` has the bit of, but for h and c; else None.

        Everything has a row for each step of each sequence.
        """
        da, unprojected, dhidden, cell, *normed = rows
        d_ih, d_hh, *scales = normed[0].chunk(4, -1) if normed else (da, da)
        results: list[Any] = [None] * len(GRADIENTS)
        if needs & 1:
            results[0] = _gradient_of_value(d_ih, self.weight_ih, input_factors)
        if needs & 8:
            results[3] = _gradient_of_weight(d_ih, input, input_factors)
        if needs & 16:
            results[4] = _gradient_of_weight(d_hh, hidden, hidden_factors)
        if needs & 32:
            results[5] = da.sum(0)
        if needs & 64:
            results[6] = dhidden.t() @ unprojected
        if needs & 128:
            di, df, _, do = da.chunk(4, -1)
            pairs = ((di, cells), (df, cells), (do, cell))
            results[7] = torch.stack([(grad * value).sum(0) for grad, value in pairs])
        if needs & 256:
            results[8] = torch.stack([each.sum(0) for each in scales])
        return results
