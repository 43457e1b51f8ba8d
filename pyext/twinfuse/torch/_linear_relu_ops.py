"""The `linear_relu` operators: what torch must know about them besides their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twinfuse.torch import _operators
from twinfuse.torch._operators import Gradients


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op by torch's own operators."""
    return F.relu(F.linear(input, weight, bias))


def _rows(tensor: Tensor) -> Tensor:
    # No reshape to [-1, n]: torch infers no size beside a zero.
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def reference_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Gradients:
    """The op's gradients by torch's own operators, which autograd and vmap can go through."""
    grad = grad_output.masked_fill(output <= 0, 0)
    return linear_backward(grad, input, weight, needs_input, needs_weight, needs_bias)


def linear_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Gradients:
    """The gradients of a linear layer alone, by the same operators."""
    rows = _rows(grad)
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        assert weight is not None
        grad_input = grad @ weight
    if needs_weight:
        assert input is not None
        grad_weight = rows.t() @ _rows(input)
    if needs_bias:
        grad_bias = rows.sum(0)
    return grad_input, grad_weight, grad_bias


_operators.define(
    {
        "linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor": reference,
        "_linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor": reference,
        "_linear_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, "
        "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)": (
            reference_backward
        ),
    }
)

public = torch.ops.twinfuse.linear_relu.default
# The builtin below an OpOverload skips a Python call.
forward = torch.ops.twinfuse._linear_relu.default._op
backward = torch.ops.twinfuse._linear_relu_backward.default._op


class LinearReLU(torch.autograd.Function):
    """The op with its gradient, for calls outside of torch.func transforms."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = forward(input, weight, bias)
        needs_input, needs_weight, _ = ctx.needs_input_grad
        # What is not needed is not kept alive, nor guarded against changes in place: as native.
        ctx.save_for_backward(
            output, input if needs_weight else None, weight if needs_input else None
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        output, input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if _operators.transforms_active():  # torch.autograd.grad(..., is_grads_batched=True)
            return reference_backward(grad_output, output, input, weight, *needs)
        if torch.is_grad_enabled():
            # The mask is constant: without `detach` the engine would come back here with zeros.
            return LinearReLUBackward.apply(grad_output, output.detach(), input, weight, *needs)
        return backward(grad_output, output, input, weight, *needs)


class LinearReLUBackward(torch.autograd.Function):
    """The op's gradient with its own gradient, which torch's operators compute to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        *needs: bool,
    ) -> Gradients:
        ctx.save_for_backward(grad_output, output, input, weight)
        ctx.set_materialize_grads(False)
        return backward(grad_output, output, input, weight, *needs)

    @staticmethod
    def backward(
        ctx: Any, grad_input: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, output, input, weight = ctx.saved_tensors
        needs_grad_output, _, needs_input, needs_weight, *_ = ctx.needs_input_grad
        dead = output <= 0
        masked = grad_output.masked_fill(dead, 0)

        for_grad_output = for_input = for_weight = None
        if needs_grad_output:
            terms = []
            if grad_input is not None:
                terms.append(F.linear(grad_input, weight))
            if grad_weight is not None:
                terms.append(F.linear(input, grad_weight))
            if grad_bias is not None:
                terms.append(grad_bias.expand_as(grad_output))
            if terms:
                for_grad_output = sum(terms[1:], terms[0]).masked_fill(dead, 0)
        if needs_input and grad_weight is not None:
            for_input = masked @ grad_weight
        if needs_weight and grad_input is not None:
            for_weight = _rows(masked).t() @ _rows(grad_input)
        return for_grad_output, None, for_input, for_weight, None, None, None


# torch.autograd.Function.apply wraps this builtin for torch.func transforms, which never get here.
apply = super(torch.autograd.Function, LinearReLU).apply


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _operators.check_alike("linear_relu", input, weight, bias)
    torch._check(
        input.dim() >= 1,
        lambda: f"linear_relu: input: expected [..., K], got shape {list(input.shape)}",
    )
    torch._check(
        weight.dim() == 2,
        lambda: f"linear_relu: weight: expected [N, K], got shape {list(weight.shape)}",
    )
    torch._check(
        weight.shape[1] == input.shape[-1],
        lambda: (
            f"linear_relu: weight: expected [N, {input.shape[-1]}] for input of shape "
            f"{list(input.shape)}, got shape {list(weight.shape)}"
        ),
    )
    _operators.check_bias("linear_relu", weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Gradients:
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        assert weight is not None
        grad_input = grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))
    if needs_weight:
        assert input is not None
        sizes = (grad_output.shape[-1], input.shape[-1])
        grad_weight = (
            grad_output.new_empty(sizes) if weight is None else _operators.empty_like(weight)
        )
    if needs_bias:
        grad_bias = grad_output.new_empty((grad_output.shape[-1],))
    return grad_input, grad_weight, grad_bias


def _vmap(
    info: Any,
    dims: Sequence[int | None],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, int]:
    # Torch leaves arguments out that have their default value.
    input_dim, weight_dim, bias_dim = (*dims, None)[:3]
    if weight_dim is None and bias_dim is None:
        assert input_dim is not None
        return public(input.movedim(input_dim, 0), weight, bias), 0

    # One weight per sample: a batched product, which is no case of the fused kernel.
    batch = info.batch_size
    if input_dim is not None:
        input = input.movedim(input_dim, 0)
    leading = input.shape[0 if input_dim is None else 1 : -1]
    count = 1
    for size in leading:
        count *= size
    rows = input.reshape(1 if input_dim is None else batch, count, input.shape[-1])
    columns = weight if weight_dim is None else weight.movedim(weight_dim, 0)
    output = rows @ columns.transpose(-1, -2)
    if bias is not None:
        output = output + (bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1))
    return torch.relu(output).reshape(batch, *leading, output.shape[-1]), 0


def _flops(input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    rows = 1
    for size in input[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


def _flops_backward(
    grad_output: Sequence[int],
    output: Sequence[int],
    input: Sequence[int] | None,
    weight: Sequence[int] | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    **_: Any,
) -> int:
    k = weight[1] if weight is not None else input[-1] if input is not None else 0
    return (needs_input + needs_weight) * _flops(grad_output, (grad_output[-1], k))


_operators.register_flops([torch.ops.twinfuse.linear_relu, torch.ops.twinfuse._linear_relu])(_flops)
_operators.register_flops(torch.ops.twinfuse._linear_relu_backward)(_flops_backward)
_operators.register("linear_relu", fake=_fake, vmap=_vmap, reference=reference, apply=apply)
_operators.register_private("_linear_relu", fake=_fake)
_operators.register_private("_linear_relu_backward", fake=_fake_backward)
