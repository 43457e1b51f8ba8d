"""Linear layers whose ReLU is found while the model runs.

Such a layer returns a tensor that waits. A ReLU that is the first to use it makes both one call;
whatever else does, and the end of the call of the module that the layer is in, makes it the plain
result. Where that would not be what a native layer does, the layer is native.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.modules import module as hooked
from torch.utils._pytree import tree_map_only

from twinfuse.torch import _calls, _usage
from twinfuse.torch import _linear_relu_ops as _ops
from twinfuse.torch._clamp import is_relu
from twinfuse.torch._deferred_tensor import Arguments, Call, Deferred, settled
from twinfuse.torch._survey import is_exactly
from twinfuse.torch.linear_relu import linear_relu, serves

# So often a layer waits for a ReLU in vain before it is native for good.
PATIENCE = 16
_USES = "_twinfuse_uses"
# No number, as torch counts these anew in a process that loads a model.
_HOOK: Any = "twinfuse"

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _state(tensor: Tensor | None) -> tuple[Any, ...]:
    """What changes if somebody changes the tensor, or its place in memory or in the graph."""
    if tensor is None:
        return ()
    stream = torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0
    return tensor._version, tensor.data_ptr(), tensor.requires_grad, stream


_STATE = "version {}, memory at {:#x}, requires_grad={} and stream {}"


@dataclass
class Uses:
    """What became of the outputs of a layer."""

    fused: int = 0
    plain: int = 0

    @property
    def are_in_vain(self) -> bool:
        return not self.fused and self.plain >= PATIENCE

    def described(self) -> str:
        if self.are_in_vain:
            return f"native by now: no ReLU was the first to use its first {PATIENCE} outputs"
        if self.plain and not self.fused:
            return f"no ReLU was the first to use its {self.plain} outputs so far"
        if self.fused:
            calls = self.fused + self.plain
            return f"a ReLU was the first to use {self.fused} of {calls} outputs, and fused"
        return "fuses with a ReLU that is the first to use its output"


class _LinearCall(Call):
    def __init__(self, uses: Uses, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.uses = uses
        self.tensors = input, weight, bias
        self.is_graded = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in self.tensors
        )
        self.states = list(map(_state, self.tensors))

    def tensor(self) -> Deferred:
        if self.is_graded:
            made: Deferred = _apply(self, *self.tensors)
            return made
        return self.without_node()

    def without_node(self) -> Deferred:
        input, weight, _ = self.tensors
        return Deferred.waiting(self, (*input.shape[:-1], weight.shape[0]), input)

    def plain(self) -> Tensor:
        self._check()
        self.uses.plain += not self.is_fused
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if torch._C._is_any_autocast_enabled():
                device = self.tensors[0].device.type
                stack.enter_context(torch.autocast(device, enabled=False))
            if _calls.inside_transform():
                stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(_without_hooks_of_saved_tensors())
            stack.enter_context(torch.set_grad_enabled(self.is_graded))
            return F.linear(*self.tensors)

    def relu(self, limits: Arguments | None) -> Tensor | None:
        is_graded = self.is_graded and torch.is_grad_enabled()
        # At 0, clamp has another gradient than ReLU.
        if limits and (is_graded or not is_relu(*limits)):
            return None
        if _calls.is_unusual(*self.tensors) or _saved_tensors_hooks(True) is not None:
            return None
        self._check()
        self.uses.fused += 1
        with torch.set_grad_enabled(is_graded):
            return linear_relu(*self.tensors)

    def _check(self) -> None:
        for name, tensor, before in zip(("input", "weight", "bias"), self.tensors, self.states):
            if (after := _state(tensor)) != before:
                raise RuntimeError(
                    f"deferred Linear: {name}: expected {_STATE.format(*before)} until the output "
                    f"is used, got {_STATE.format(*after)}: use the output at once, or unfuse the "
                    "layer"
                )


class _LinearNode(torch.autograd.Function):
    """Of a waiting tensor; reached by whoever did not ask Python for a plain one."""

    @staticmethod
    def forward(
        ctx: Any, call: _LinearCall, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.call, call.node = call, weakref.ref(ctx)
        _, needs_input, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        return call.without_node()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call.check_kept()
        return None, *_ops.linear_backward(
            grad_output, *ctx.saved_tensors, *ctx.needs_input_grad[1:]
        )


# As of LinearReLU: torch.func transforms never get here.
_apply = super(torch.autograd.Function, _LinearNode).apply


@contextlib.contextmanager
def _without_hooks_of_saved_tensors() -> Iterator[None]:
    """A checkpoint that begins after the call does not run it again."""
    hooks = []
    while (hook := _saved_tensors_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hooks.append(hook)
    try:
        yield
    finally:
        for hook in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*hook)


class DeferredLinear(nn.Linear):
    """A Linear whose output becomes one call with a ReLU, if that is the first to use it."""

    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = settled(input), self.weight, self.bias
        if _calls.is_unusual(input, weight, bias) or self._is_native(input, weight, bias):
            return F.linear(input, weight, bias)
        if "torch._dynamo" in sys.modules:
            Deferred.hide_from_dynamo()
        lazy = _LinearCall(self.uses, input, weight, bias).tensor()
        _open.calls[-1][1].append(weakref.ref(lazy))
        return lazy

    @property
    def uses(self) -> Uses:
        found: Uses = getattr(self, _USES)
        return found

    def _is_native(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        return bool(
            not _open.calls  # for nobody would end the waiting
            or self.uses.are_in_vain
            or self._forward_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or hooked._global_forward_hooks
            or hooked._global_backward_hooks
            or hooked._global_backward_pre_hooks
            # Checkpoints expect tensors to be saved in the same order when they run again.
            or _saved_tensors_hooks(True) is not None
            # These have no versions.
            or torch.is_inference_mode_enabled()
            or input.is_inference()
            or weight.is_inference()
            or (bias is not None and bias.is_inference())
            or not serves(input, weight, bias)
        )


# What a layer becomes.
DEFERRED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: DeferredLinear}


class _Open(threading.local):
    """The calls of owners that this thread is in, and what waits for the end of each."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, list[weakref.ref[Deferred]]]] = []


_open = _Open()


def _begin(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _open.calls.append((module, []))


def _end(module: nn.Module, args: Any, output: Any) -> Any:
    """Let nothing wait any longer: some changes of weights, as by fused optimizers, do not show."""
    if torch.compiler.is_compiling() or all(owner is not module for owner, _ in _open.calls):
        return None
    kept = False
    ended = None
    while ended is not module:
        ended, waiting = _open.calls.pop()
        for reference in waiting:
            lazy = reference()
            kept |= lazy is not None and settled(lazy) is not lazy
    return tree_map_only(Deferred, settled, output) if kept else None


def defer(layer: nn.Module, owner: nn.Module) -> None:
    """Let the outputs of a layer wait no longer than until the end of the owner's call."""
    setattr(layer, _USES, Uses())
    owner._forward_pre_hooks[_HOOK] = _begin
    owner._forward_hooks[_HOOK] = _end
    owner._forward_hooks_always_called[_HOOK] = True


def undo(module: nn.Module) -> None:
    """Take away what `defer` has set."""
    vars(module).pop(_USES, None)
    hooks = module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called
    for registered in hooks:
        registered.pop(_HOOK, None)


def layers_with_owners(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """What may be deferred in `model`, with the modules whose calls end the waiting."""
    owners: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        holds = _usage.calls_nothing(module)
        owner = owners.get(module) if holds else module
        # In eval mode this one is a kernel of torch's own, unless there are hooks in it.
        if owner is None or isinstance(owner, nn.TransformerEncoderLayer):
            continue
        for child in module.children():
            owners.setdefault(child, owner)
            if is_exactly(child, nn.Linear):
                yield child, owner
