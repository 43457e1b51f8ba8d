"""`twinfuse.torch.fuse` across nested Sequentials, and past branches on optional children."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import twinfuse.torch as tft  # noqa: E402

FORWARD = "linear_relu_forward_f32"


class Act(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(), nn.ReLU())


class Chained(nn.Sequential):
    """A layer and what is behind it, each in a Sequential, as in MONAI."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("layers", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
        self.add_module("act", Act())


class Optional(nn.Module):
    """As blocks of residual networks: a shortcut that only some have."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.shortcut = nn.Linear(8, 8) if shortcut else None
        self.scale: Any = None

    def forward(self, x: Any) -> Any:
        y = F.relu(self.fc1(x))
        if self.shortcut is not None:
            x = self.shortcut(x).relu()
        return F.relu(self.fc2(y) + x)


class Expression(Optional):
    def forward(self, x: Any) -> Any:
        y = x if self.shortcut is None else torch.relu(self.shortcut(x))
        return F.relu(self.fc1(y))


class OptionalTensor(Optional):
    """What is None now may be a number in another call."""

    def forward(self, x: Any) -> Any:
        y = self.fc1(x)
        if self.scale is not None:
            y = y * self.scale
        return F.relu(y)


class Asks(Optional):
    """A condition that more than the children decides."""

    def forward(self, x: Any) -> Any:
        y = F.relu(self.fc1(x))
        if self.shortcut is not None and x.sum() > 0:
            y = self.shortcut(y)
        return y


class HandedOn(Optional):
    def forward(self, x: Any) -> Any:
        y = F.relu(self.fc1(x))
        if self.shortcut is not None:
            y = torch.utils.checkpoint.checkpoint(self.shortcut, y, use_reentrant=False)
        return y


def run(model: nn.Module) -> tuple[Any, ...]:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = model(x)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.pow(2).sum(), (x, *wanted), allow_unused=True)


def hooked() -> nn.Module:
    model = Chained()
    model.act.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
    return model


def shared() -> nn.Module:
    act = Act()
    return nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), nn.LayerNorm(8), act)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Chained()

    def forward(self, x: Any) -> Any:
        return self.net(x) + self.net.layers(x)


FUSED = {
    "nested": (Chained, 2),
    "shortcut": (lambda: Optional(True), 2),
    "no shortcut": (lambda: Optional(False), 1),
    "expression with": (lambda: Expression(True), 2),
    "expression without": (lambda: Expression(False), 1),
}
NATIVE = {
    "hook between": (hooked, "layers.2", "no ReLU follows", 1),
    "shared": (shared, "0", "no ReLU follows", 0),
    "part used": (Inner, "net.layers.2", "may use parts of 'net'", 0),
    "tensor": (lambda: OptionalTensor(False), "fc1", "has branches", 0),
    "other condition": (lambda: Asks(True), "fc1", "has branches", 0),
    "handed on": (lambda: HandedOn(True), "fc1", "has branches", 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, launched: Launched) -> None:
    torch.manual_seed(3)
    make, count = FUSED[name]
    native = make()
    fused = tft.fuse(native)
    with launched(FORWARD, times=count):
        got = run(fused)
    torch.testing.assert_close(got, run(native))
    with launched(FORWARD, times=count):
        torch.testing.assert_close(run(pickle.loads(pickle.dumps(fused))), got, rtol=0, atol=0)
    with launched(FORWARD, times=0):
        torch.testing.assert_close(run(tft.unfuse(fused)), run(native), rtol=0, atol=0)


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_certain_stays_native(name: str, launched: Launched) -> None:
    torch.manual_seed(3)
    make, where, reason, count = NATIVE[name]
    native = make()
    fused = tft.fuse(native)
    with launched(FORWARD, times=count):
        torch.testing.assert_close(run(fused), run(native))
    (row,) = (row for row in tft.explain(fused) if row.where == where)
    assert row.backend == "native" and reason in row.reason
