"""The `conv_relu` operators: what torch must know about them besides their kernels.

The public ones, `conv1d_relu` and `conv2d_relu`, take lists as `torch.ops.aten.conv2d` does, but
`padding` may also hold two numbers per spatial dimension: first all below, then all above. The
private ones serve both and take all numbers as one list, `conv`: stride, dilation, padding below
and padding above, each with one number per spatial dimension, and the number of groups. All take
batched tensors only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twinfuse.torch import _operators
from twinfuse.torch._conv_choice import gradients_left_to_torch, left_to_torch
from twinfuse.torch._conv_shapes import (
    Numbers,
    check,
    empty_images,
    is_channels_last,
    output_size,
    split,
    spread,
)
from twinfuse.torch._operators import Gradients


def _padded(input: Tensor, conv: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The input between its zeros where torch's convolution cannot add them; the padding left."""
    *_, low, high = split(conv)
    if low == high:
        return input, low
    pairs = zip(reversed(low), reversed(high))
    return F.pad(input, [n for pair in pairs for n in pair]), [0] * len(low)


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Sequence[int]) -> Tensor:
    stride, dilation, *_ = split(conv)
    padded, padding = _padded(input, conv)
    zeros = [0] * len(stride)
    return torch.convolution(
        padded, weight, bias, stride, padding, dilation, False, zeros, conv[-1]
    )


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Sequence[int]) -> Tensor:
    """The op by torch's own operators."""
    return F.relu(_convolution(input, weight, bias, conv))


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, conv: Sequence[int], needs: Sequence[bool]
) -> Gradients:
    """Those of the convolution without its ReLU."""
    stride, dilation, low, _ = split(conv)
    padded, padding = _padded(input, conv)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        padded,
        weight,
        weight.shape[:1],
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        conv[-1],
        needs,
    )
    if grad_input is not None and padded is not input:
        for d, start in enumerate(low, 2):
            grad_input = grad_input.narrow(d, start, input.shape[d])
    return grad_input, grad_weight, grad_bias


def _reference_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: Sequence[int],
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Gradients:
    """The op's gradients by torch's own operators, which autograd and vmap can go through."""
    grad = torch.ops.aten.threshold_backward(grad_output, output.detach(), 0)
    return _gradients(grad, input, weight, conv, (needs_input, needs_weight, needs_bias))


def _on_lists(rank: int, on_numbers: Any) -> Any:
    """A public operator's form of a function with the signature of the private one."""

    def function(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Numbers = 1,
        padding: Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
    ) -> Any:
        conv = spread(rank, stride, padding, dilation, groups)
        return on_numbers(input, weight, bias, conv)

    return function


_operators.define(
    {
        f"conv{rank}d_relu(Tensor input, Tensor weight, Tensor? bias=None, int[{rank}] stride=1, "
        f"int[{rank}] padding=0, int[{rank}] dilation=1, int groups=1) -> Tensor": (
            _on_lists(rank, _reference)
        )
        for rank in (1, 2)
    }
    | {
        "_conv_relu(Tensor input, Tensor weight, Tensor? bias, int[] conv) -> Tensor": _reference,
        "_conv_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, "
        "int[] conv, bool needs_input, bool needs_weight, bool needs_bias) "
        "-> (Tensor, Tensor, Tensor)": _reference_backward,
    }
)

public = {
    1: torch.ops.twinfuse.conv1d_relu.default,
    2: torch.ops.twinfuse.conv2d_relu.default,
}
# The builtin below an OpOverload skips a Python call.
forward = torch.ops.twinfuse._conv_relu.default._op
backward = torch.ops.twinfuse._conv_relu_backward.default._op


class ConvReLU(torch.autograd.Function):
    """The op with its gradient, for calls outside of torch.func transforms."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, conv: Sequence[int]
    ) -> Tensor:
        output = forward(input, weight, bias, conv)
        ctx.conv = conv
        ctx.natively = input.is_cuda and bool(gradients_left_to_torch(input, weight, conv))
        # All of them, as native: a gradient takes its sizes and layout from its tensor.
        ctx.save_for_backward(output, input, weight)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        output, input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # Under transforms: torch.autograd.grad(..., is_grads_batched=True)
        if ctx.natively or _operators.transforms_active():
            gradients = _reference_backward(grad_output, output, input, weight, ctx.conv, *needs)
        elif torch.is_grad_enabled():
            # The mask is constant: without `detach` the engine would come back here with zeros.
            gradients = ConvReLUBackward.apply(
                grad_output, output.detach(), input, weight, ctx.conv, *needs
            )
        else:
            gradients = backward(grad_output, output, input, weight, ctx.conv, *needs)
        return *gradients, None


class ConvReLUBackward(torch.autograd.Function):
    """The op's gradient with its own gradient, which torch's operators compute to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        conv: Sequence[int],
        *needs: bool,
    ) -> Gradients:
        ctx.conv = conv
        ctx.save_for_backward(grad_output, output, input, weight)
        ctx.set_materialize_grads(False)
        return backward(grad_output, output, input, weight, conv, *needs)

    @staticmethod
    def backward(
        ctx: Any, grad_input: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, output, input, weight = ctx.saved_tensors
        conv = ctx.conv
        needs_grad_output, _, needs_input, needs_weight, *_ = ctx.needs_input_grad
        dead = output <= 0
        masked = grad_output.masked_fill(dead, 0)

        for_grad_output = for_input = for_weight = None
        if needs_grad_output:
            terms = []
            if grad_input is not None:
                terms.append(_convolution(grad_input, weight, None, conv))
            if grad_weight is not None:
                terms.append(_convolution(input, grad_weight, None, conv))
            if grad_bias is not None:
                terms.append(grad_bias.view(-1, *[1] * (len(conv) // 4)).expand_as(grad_output))
            if terms:
                for_grad_output = sum(terms[1:], terms[0]).masked_fill(dead, 0)
        if needs_input and grad_weight is not None:
            for_input = _gradients(masked, input, grad_weight, conv, (True, False, False))[0]
        if needs_weight and grad_input is not None:
            for_weight = _gradients(masked, grad_input, weight, conv, (False, True, False))[1]
        return for_grad_output, None, for_input, for_weight, None, None, None, None


# torch.autograd.Function.apply wraps this builtin for torch.func transforms, which never get here.
apply = super(torch.autograd.Function, ConvReLU).apply


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Sequence[int]) -> Tensor:
    check(input, weight, bias, conv)
    sizes = (input.shape[0], weight.shape[0], *output_size(input, weight, conv))
    return empty_images(input, sizes, is_channels_last(input, weight))


def _fake_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: Sequence[int],
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Gradients:
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        grad_input = empty_images(input, input.shape, is_channels_last(input, weight))
    if needs_weight:
        grad_weight = _operators.empty_like(weight)
    if needs_bias:
        grad_bias = weight.new_empty(weight.shape[:1])
    return grad_input, grad_weight, grad_bias


def _vmap(
    rank: int,
    info: Any,
    dims: Sequence[Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> tuple[Tensor, int]:
    # Torch leaves arguments out that have their default value.
    input_dim, weight_dim, bias_dim = (*dims, None)[:3]

    def samples(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape)
        return tensor.movedim(dim, 0)

    images = samples(input, input_dim)
    if weight_dim is None and bias_dim is None:
        folded = images.flatten(0, 1)
        output = public[rank](folded, weight, bias, stride, padding, dilation, groups)
        return output.unflatten(0, images.shape[:2]), 0

    # One weight per sample: the samples become groups of channels.
    count = info.batch_size
    weights = samples(weight, weight_dim)
    output = public[rank](
        images.transpose(0, 1).flatten(1, 2),
        weights.flatten(0, 1),
        None if bias is None else samples(bias, bias_dim).flatten(),
        stride,
        padding,
        dilation,
        groups * count,
    )
    return output.unflatten(1, (count, weights.shape[1])), 1


def _left_to_torch(rank: int, trained: bool, *args: Any) -> Any:
    def on_numbers(input: Tensor, weight: Tensor, _: Any, conv: Sequence[int]) -> str:
        return left_to_torch(trained, input, weight, conv)

    return _on_lists(rank, on_numbers)(*args)


def _flops(
    input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    pixels = input[0] * math.prod(out_shape[2:])
    return 2 * pixels * math.prod(weight)


def _flops_backward(
    grad_output: Sequence[int],
    output: Sequence[int],
    input: Sequence[int],
    weight: Sequence[int],
    conv: Sequence[int],
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    **_: Any,
) -> int:
    return (needs_input + needs_weight) * _flops(input, weight, out_shape=grad_output)


_ops = torch.ops.twinfuse
_operators.register_flops([_ops.conv1d_relu, _ops.conv2d_relu, _ops._conv_relu])(_flops)
_operators.register_flops(_ops._conv_relu_backward)(_flops_backward)
for _rank in (1, 2):
    _operators.register(
        f"conv{_rank}d_relu",
        fake=_on_lists(_rank, _fake),
        vmap=functools.partial(_vmap, _rank),
        reference=_on_lists(_rank, _reference),
        apply=_on_lists(_rank, apply),
        left_to_torch=functools.partial(_left_to_torch, _rank),
    )
_operators.register_private("_conv_relu", fake=_fake)
_operators.register_private("_conv_relu_backward", fake=_fake_backward)
