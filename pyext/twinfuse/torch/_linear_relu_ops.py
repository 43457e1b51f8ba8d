"""What torch must know about the `linear_relu` operators besides their kernels.

The public operator, `torch.ops.twinfuse.linear_relu`, has fake, autograd, autocast, vmap and FLOP
rules. The private ones, `_linear_relu` and `_linear_relu_backward`, know no autograd: they are what
`torch.autograd.Function` calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from twinfuse.torch import _binding

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_SCHEMAS = (
    "linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "_linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "_linear_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, "
    "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)

transforms_active = torch._C._are_functorch_transforms_active


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


# Without the compiled binding the operators still exist, so that a program exported with them runs.
missing = _binding.load()
_library = torch.library.Library("twinfuse", "FRAGMENT")
if missing:
    for schema in _SCHEMAS:
        _library.define(schema)
    _library.impl("linear_relu", reference, "CompositeImplicitAutograd")
    _library.impl("_linear_relu", reference, "CompositeExplicitAutograd")
    _library.impl("_linear_relu_backward", reference_backward, "CompositeExplicitAutograd")

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
        if transforms_active():  # torch.autograd.grad(..., is_grads_batched=True)
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


def _autograd(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if transforms_active() or forward_ad._current_level >= 0:
        return reference(input, weight, bias)
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return apply(input, weight, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return public(input, weight, bias)


def _autocast(device: str) -> Any:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    keys = torch._C.DispatchKeySet(key)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return public(
                _cast(input, device, dtype),
                _cast(weight, device, dtype),
                None if bias is None else _cast(bias, device, dtype),
            )

    return kernel


def _cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    # The rule of torch's own autocast for linear.
    wanted = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if wanted and tensor.device.type == device else tensor


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise as the kernels do, so that a wrong call fails when it is traced."""
    named = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in named:
        if tensor.dtype != input.dtype or tensor.device != input.device:
            raise RuntimeError(
                f"linear_relu: {name}: expected {input.dtype} on {input.device} like input, got "
                f"{tensor.dtype} on {tensor.device}"
            )
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
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: (
                f"linear_relu: bias: expected [{weight.shape[0]}], got shape {list(bias.shape)}"
            ),
        )


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(input, weight, bias)
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
        n, k = grad_output.shape[-1], input.shape[-1]
        transposed = weight is not None and weight.stride() == (1, n) and n > 1 and k > 1
        grad_weight = (
            grad_output.new_empty((k, n)).t() if transposed else grad_output.new_empty((n, k))
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


def _flop_registration() -> Callable[..., Any]:
    # The flop counter imports Triton if it can, and Triton crashes the process when it is loaded
    # after TensorFlow 2.21. Without it the counter only loses its view of Triton kernels.
    hide = "tensorflow" in sys.modules and "triton" not in sys.modules
    log = logging.getLogger("torch.utils.flop_counter")
    try:
        if hide:
            log.disabled = True
            sys.modules["triton"] = None  # type: ignore[assignment]
        from torch.utils.flop_counter import register_flop_formula
    finally:
        if hide:
            log.disabled = False
            del sys.modules["triton"]
    return register_flop_formula


def _register() -> None:
    ops = torch.ops.twinfuse
    register_flop_formula = _flop_registration()
    register_flop_formula([ops.linear_relu, ops._linear_relu])(_flops)
    register_flop_formula(ops._linear_relu_backward)(_flops_backward)
    if missing:
        return
    for name in ("linear_relu", "_linear_relu"):
        torch.library.register_fake(f"twinfuse::{name}", _fake, lib=_library)
    torch.library.register_fake("twinfuse::_linear_relu_backward", _fake_backward, lib=_library)
    _library.impl("linear_relu", _autograd, "Autograd")
    for name in ("_linear_relu", "_linear_relu_backward"):
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for device in ("cpu", "cuda"):
        _library.impl("linear_relu", _autocast(device), f"Autocast{device.upper()}")
    torch.library.register_vmap("twinfuse::linear_relu", _vmap, lib=_library)


_register()
