"""What torch must know about any operator of ours besides its kernels.

Public operators have fake, autograd, autocast, vmap and FLOP rules. Private ones, whose names begin
with an underscore, know no autograd: they are what `torch.autograd.Function` calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
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


def define(schemas: Mapping[str, Rule], always: bool = False) -> None:
    """Define operators by torch's own: without the binding, an exported program runs all the same.

    Does nothing where the binding has defined them, unless `always`: those that the binding calls.
    """
    for schema, implementation in schemas.items() if missing or always else ():
        name = schema.partition("(")[0]
        _library.define(schema)
        explicit = "Explicit" if name.startswith("_") else "Implicit"
        _library.impl(name, implementation, f"Composite{explicit}Autograd")
        if always:
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def register(
    name: str,
    *,
    fake: Rule,
    vmap: Rule,
    reference: Rule,
    apply: Callable[..., Tensor],
    left_to_torch: Callable[..., str] = lambda *_: "",
) -> None:
    """Give a public operator `name(input, weight, bias=None, *options)` its rules.

    `reference` and `apply` (of the `autograd.Function`) take what the operator takes.
    `left_to_torch(trained, input, weight, bias, *options)`: whether a call on a GPU goes to
    `reference`, as the faster one.
    """
    if missing:
        return
    public = getattr(torch.ops.twinfuse, name).default
    autograd = _autograd(public, reference, apply, left_to_torch)
    register_rules(
        name,
        fake=fake,
        vmap=vmap,
        autograd=autograd,
        autocast=lambda device: _autocast(public, device),
    )


def register_rules(
    name: str, *, fake: Rule, vmap: Rule, autograd: Rule, autocast: Callable[[str], Rule]
) -> None:
    """As `register`, for another signature; `autocast` makes the rule of a device type."""
    if missing:
        return
    torch.library.register_fake(f"twinfuse::{name}", fake, lib=_library)
    torch.library.register_vmap(f"twinfuse::{name}", vmap, lib=_library)
    _library.impl(name, autograd, "Autograd")
    for device in ("cpu", "cuda"):
        _library.impl(name, autocast(device), f"Autocast{device.upper()}")


def register_private(name: str, *, fake: Rule) -> None:
    if missing:
        return
    torch.library.register_fake(f"twinfuse::{name}", fake, lib=_library)
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _autograd(
    public: Any,
    reference: Rule,
    apply: Callable[..., Tensor],
    left_to_torch: Callable[..., str],
) -> Rule:
    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        if transforms_active() or forward_ad._current_level >= 0:
            return reference(input, weight, bias, *options)
        trained = torch.is_grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        if input.is_cuda and left_to_torch(trained, input, weight, bias, *options):
            return reference(input, weight, bias, *options)
        if trained:
            return apply(input, weight, bias, *options)
        with torch._C._AutoDispatchBelowAutograd():
            return public(input, weight, bias, *options)

    return kernel


def autocast_keys(device: str) -> Any:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    return torch._C.DispatchKeySet(key)


def _autocast(public: Any, device: str) -> Rule:
    keys = autocast_keys(device)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return public(
                cast(input, device, dtype),
                cast(weight, device, dtype),
                None if bias is None else cast(bias, device, dtype),
                *options,
            )

    return kernel


def cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    # The rule of torch's own autocast for linear and convolution.
    wanted = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if wanted and tensor.device.type == device else tensor


def cast_all(
    tensors: Sequence[Tensor | None], device: str, dtype: torch.dtype
) -> list[Tensor | None]:
    return [None if tensor is None else cast(tensor, device, dtype) for tensor in tensors]


def complete(defaults: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """All arguments of an operator: torch leaves those out that have their default value."""
    return (*args, *defaults[len(args) :])


def for_both_biases(
    grad: Any, wants_ih: bool, wants_hh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of each of two biases; not one tensor, as either may be changed in place."""
    second = grad.clone() if wants_ih and wants_hh else grad
    return grad if wants_ih else None, second if wants_hh else None


def check_alike(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise as the kernels do, so that a wrong call fails when it is traced."""
    check_all_alike(op, input, weight=weight, bias=bias)


def check_all_alike(op: str, input: Tensor, **named: Tensor | None) -> None:
    for name, tensor in named.items():
        if tensor is None:
            continue
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


def check_sizes(op: str, name: str, tensor: Tensor | None, *sizes: Any) -> None:
    if tensor is not None:
        torch._check(
            tensor.dim() == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes)),
            lambda: f"{op}: {name}: expected {list(sizes)}, got shape {list(tensor.shape)}",
        )


def check_gates(op: str, name: str, weight: Tensor) -> None:
    torch._check(
        weight.dim() == 2 and weight.shape[0] % 4 == 0,
        lambda: f"{op}: {name}: expected [4H, n], got shape {list(weight.shape)}",
    )


def allows_tf32(backend: Any) -> bool:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:  # settings that contradict each other
        return False


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


def vector_product(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `function`, itself made of torch's operators, for the inputs that need one.

    They can be differentiated further where grad mode says so.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may be computed from another, which is not for us to differentiate.
        apart = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = function(*apart)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads)
        if output is not None and grad is not None and output.requires_grad
    ]
    wanted = [i for i, tensor in enumerate(apart) if tensor is not None and needs[i]]
    results: list[Tensor | None] = [None] * len(inputs)
    if pairs and wanted:
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [tensor for i, tensor in enumerate(apart) if i in wanted and tensor is not None],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        for i, gradient in zip(wanted, found):
            results[i] = gradient
    return results


def each_sample(op: Any, count: int, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """One call per sample: for vmap over weights, which no kernel takes several of."""
    calls = [
        op(*(a if dim is None else a.select(dim, k) for a, dim in zip(args, dims)))
        for k in range(count)
    ]
    return tuple(torch.stack(results) for results in zip(*calls))


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
