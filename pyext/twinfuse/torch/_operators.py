"""What torch must know about any operator of ours besides its kernels.

Public operators have fake, autograd, autocast, vmap and FLOP rules. Private ones, whose names begin
with an underscore, know no autograd: they are what `torch.autograd.Function` calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from twinfuse.torch import _binding

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Rule = Callable[..., Any]

transforms_active = torch._C._are_functorch_transforms_active

# Why the compiled binding is missing; empty if it is there.
missing = _binding.load()
_library = torch.library.Library("twinfuse", "FRAGMENT")


def define(schemas: Mapping[str, Rule]) -> None:
    """Define operators by torch's own: without the binding, an exported program runs all the same.

    Does nothing where the binding has defined them.
    """
    for schema, implementation in schemas.items() if missing else ():
        name = schema.partition("(")[0]
        _library.define(schema)
        explicit = "Explicit" if name.startswith("_") else "Implicit"
        _library.impl(name, implementation, f"Composite{explicit}Autograd")


def register(
    name: str, *, fake: Rule, vmap: Rule, reference: Rule, apply: Callable[..., Tensor]
) -> None:
    """Give a public operator `name(input, weight, bias=None, *options)` its rules.

    `reference` and `apply` (of the `autograd.Function`) take what the operator takes.
    """
    if missing:
        return
    public = getattr(torch.ops.twinfuse, name).default
    torch.library.register_fake(f"twinfuse::{name}", fake, lib=_library)
    torch.library.register_vmap(f"twinfuse::{name}", vmap, lib=_library)
    _library.impl(name, _autograd(public, reference, apply), "Autograd")
    for device in ("cpu", "cuda"):
        _library.impl(name, _autocast(public, device), f"Autocast{device.upper()}")


def register_private(name: str, *, fake: Rule) -> None:
    if missing:
        return
    torch.library.register_fake(f"twinfuse::{name}", fake, lib=_library)
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _autograd(public: Any, reference: Rule, apply: Callable[..., Tensor]) -> Rule:
    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        if transforms_active() or forward_ad._current_level >= 0:
            return reference(input, weight, bias, *options)
        if torch.is_grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(input, weight, bias, *options)
        with torch._C._AutoDispatchBelowAutograd():
            return public(input, weight, bias, *options)

    return kernel


def _autocast(public: Any, device: str) -> Rule:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    keys = torch._C.DispatchKeySet(key)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return public(
                _cast(input, device, dtype),
                _cast(weight, device, dtype),
                None if bias is None else _cast(bias, device, dtype),
                *options,
            )

    return kernel


def _cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    # The rule of torch's own autocast for linear and convolution.
    wanted = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if wanted and tensor.device.type == device else tensor


def check_alike(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise as the kernels do, so that a wrong call fails when it is traced."""
    named = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in named:
        if tensor.dtype != input.dtype or tensor.device != input.device:
            raise RuntimeError(
                f"{op}: {name}: expected {input.dtype} on {input.device} like input, got "
                f"{tensor.dtype} on {tensor.device}"
            )


def check_bias(op: str, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: f"{op}: bias: expected [{weight.shape[0]}], got shape {list(bias.shape)}",
        )


def empty_like(parameter: Tensor) -> Tensor:
    """A gradient in its parameter's own layout; one with gaps or overlaps becomes contiguous."""
    sizes, strides = parameter.shape, parameter.stride()
    own = [d for d in reversed(range(parameter.dim())) if sizes[d] > 1]
    order = sorted(own, key=lambda d: strides[d])
    step = 1
    for d in order:
        if strides[d] != step:
            return parameter.new_empty(sizes)
        step = step * sizes[d]
    if order == own:
        return parameter.new_empty(sizes)
    return parameter.new_empty_strided(sizes, strides)


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


register_flops = _flop_registration()
