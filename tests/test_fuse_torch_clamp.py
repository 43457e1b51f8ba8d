"""`twinfuse.torch.fuse` on `clamp(min=0)`, whose gradient at 0 is not that of ReLU."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from tests.conftest import Launched, require
from tests.rule import assert_within_twice

torch = require("torch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402


class Clamps(nn.Module):
    low = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.line, self.fc = nn.Conv1d(4, 4, 3), nn.Linear(62, 8)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Any) -> Any:
        x = self.conv(x).clamp(min=0).flatten(2)
        x = torch.clamp_min(self.line(x), 0)
        x = self.fc(x)
        x.clamp_(0.0, None)
        return x


class OtherMinimum(Clamps):
    def forward(self, x: Any) -> Any:
        return self.conv(x).clamp(min=1e-3)


class Maximum(Clamps):
    def forward(self, x: Any) -> Any:
        return torch.clamp(self.conv(x), 0, 6)


class Attribute(Clamps):
    def forward(self, x: Any) -> Any:
        return torch.clamp(self.conv(x), min=self.low)


class Both(Clamps):
    def forward(self, x: Any) -> Any:
        return self.conv(x).relu() + self.conv(-x).clamp(0)


class Replaced(Clamps):
    def __init__(self) -> None:
        super().__init__()
        self.conv._conv_forward = lambda input, weight, bias: -input

    def forward(self, x: Any) -> Any:
        return self.conv(x).clamp(min=0)


class ReplacedBeforeReLU(Replaced):
    def forward(self, x: Any) -> Any:
        return self.conv(x).relu()


class BehindNorm(Clamps):
    def forward(self, x: Any) -> Any:
        return self.norm(self.line(self.conv(x).flatten(2))).clamp(min=0)


def images() -> Any:
    torch.manual_seed(0)
    return torch.randn(3, 2, 8, 8)


def test_fused_where_no_gradients_are_asked_for(launched: Launched) -> None:
    native = Clamps()
    fused = tft.fuse(native)
    x = images()
    reference = copy.deepcopy(native).double()(x.double()).detach().numpy()
    with torch.no_grad():
        for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            with launched("conv_relu_forward_f32", 2), launched("linear_relu_forward_f32", 1):
                got = model(x)
            values = got.numpy(), native(x).numpy(), reference
            assert_within_twice(*values, "output", dtype="float32")
    rows = twinfuse.explain(fused)
    assert [row.backend for row in rows] == ["cpu"] * 3
    assert all("no gradients" in row.reason for row in rows)
    tft.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in native.modules()]


def test_gradients_are_those_of_clamp(launched: Launched) -> None:
    native = Clamps()
    for parameter in native.fc.parameters():
        nn.init.zeros_(parameter)
    fused = tft.fuse(native)
    with launched("linear_relu", 0), launched("conv_relu", 0):
        ours, theirs = (
            torch.autograd.grad(model(images()).sum(), list(model.parameters())[:-2])
            for model in (fused, native)
        )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[-1].abs().min() > 0  # ReLU's gradient would be zero


def test_tangents_are_those_of_clamp() -> None:
    native = Clamps().requires_grad_(False)
    fused, x = tft.fuse(native), torch.zeros(1, 2, 8, 8)
    nn.init.zeros_(native.conv.bias)
    with forward_ad.dual_level():
        ours, theirs = (
            forward_ad.unpack_dual(model(forward_ad.make_dual(x, x + 1))).tangent
            for model in (fused, native)
        )
    assert torch.equal(ours, theirs) and theirs.abs().max() > 0


OTHERS = (OtherMinimum, Maximum, Attribute, Both, Replaced, ReplacedBeforeReLU, BehindNorm)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_certain_stays_native(kind: Any) -> None:
    native = kind().eval()
    fused = tft.fuse(native)
    assert [type(module) for module in fused.modules()] == [type(m) for m in native.modules()]
    with torch.no_grad():
        assert torch.equal(fused(images()), native(images()))
