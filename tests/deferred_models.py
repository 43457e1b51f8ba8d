"""Models whose forward methods do not trace, functions that torch does not ask Python for, and how
native and deferred models are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import twinfuse.torch as tft

Use = Callable[[Any], Any]


class Decoder(nn.Module):
    """As those of OPT: chooses by attributes and shapes, and calls any activation."""

    def __init__(self, activation: Any = None, norm_first: bool = True) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)
        self.activation_fn = activation or nn.ReLU()

    def forward(self, hidden_states: Tensor, scale: float | None = None) -> tuple[Any, ...]:
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, hidden_states.size(-1))
        residual = hidden_states
        if self.norm_first:
            hidden_states = self.norm(hidden_states)
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        if scale is not None:
            hidden_states = hidden_states * scale
        hidden_states = (residual + hidden_states).view(shape)
        return (hidden_states,) if self.norm_first else (self.norm(hidden_states), shape)


class Probe(nn.Module):
    """Uses the output of its Linear as a test says."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6, bias=bias, dtype=dtype)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, use: Use) -> Any:
        return use(self.fc(x))


def probes(**options: Any) -> tuple[Any, Any]:
    """A native one, and a deferred one with equal weights of its own."""
    native = Probe(**options)
    ours = Probe(**options)
    ours.load_state_dict(native.state_dict())
    return native, tft.fuse(ours, deferred=True)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (5, 8)), dtype=torch.float64).to(dtype).requires_grad_()


def run(model: nn.Module, x: Tensor, use: Use) -> tuple[Any, list[Tensor]]:
    """What `use` makes of the output of the Linear, and the gradients of its sum."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(x, use)
    parameters = [x, *model.parameters()]
    if not output.requires_grad:
        return output, []
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return output, list(torch.autograd.grad(output, parameters, weights))


def assert_same(use: Use, x: Tensor | None = None, **options: Any) -> None:
    """Natively and deferred, the same output and gradients."""
    native, ours = probes(**options)
    x = inputs() if x is None else x
    expected, got = run(native, x, use), run(ours, x, use)
    assert type(got[0]) is type(expected[0]) and got[0].requires_grad == expected[0].requires_grad
    assert type(got[0].grad_fn) is type(expected[0].grad_fn) or "LinearReLU" in str(got[0].grad_fn)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class Exp(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        ctx.save_for_backward(z)
        return z.exp()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad * z.exp()


class Same(torch.autograd.Function):
    """Returns its input, as reentrant checkpoints and hooks of modules do."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        return z

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 3


class Straight(torch.autograd.Function):
    """Takes nothing of its input but the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        return torch.ones(z.shape, dtype=z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2


class Dirty(torch.autograd.Function):
    """Changes its input in place."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        ctx.mark_dirty(z)
        z.mul_(2)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2
