"""Layers that are reached without their names: `twinfuse.torch.fuse` must leave them alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

from torch import nn  # noqa: E402

import twinfuse.torch as tft  # noqa: E402


class WalksModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Any) -> Any:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = module(x)
        return x


class AsksByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.relu(self.fc(x))

    def logits(self, x: Any) -> Any:
        return getattr(self, "fc")(x)  # noqa: B009


class WalksInAMethodNamedAlmostLikeASetup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def logits(self, x: Any) -> Any:
        return self.finite(x)

    def finite(self, x: Any) -> Any:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = module(x)
        return x.nan_to_num()


class InitializesByWalking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.ones_(module.weight)

    def forward(self, x: Any) -> Any:
        return self.net(x)


@pytest.mark.parametrize("kind", [WalksModules, AsksByName, WalksInAMethodNamedAlmostLikeASetup])
@pytest.mark.parametrize("inside", [False, True])
def test_children_reached_without_their_name_stay_native(kind: Any, inside: bool) -> None:
    model = kind()
    whole = nn.Sequential(model, nn.Linear(8, 8)) if inside else model
    x = torch.randn(4, 8)
    expected, logits = whole(x), getattr(model, "logits", model)(x)
    tft.fuse(whole, inplace=True)
    torch.testing.assert_close(whole(x), expected)
    torch.testing.assert_close(getattr(model, "logits", model)(x), logits)
    assert not any(isinstance(m, tft.nn.LinearReLU) for m in whole.modules())


def test_walking_over_modules_to_set_them_up_is_no_obstacle() -> None:
    model = tft.fuse(InitializesByWalking())
    assert isinstance(model.net[0], tft.nn.LinearReLU)
