"""`twinfuse.torch.fuse` where classes and modules are not, or do not stay, as in their source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import twinfuse.torch as tft  # noqa: E402

FORWARD = "linear_relu_forward_f32"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.relu = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.out(self.relu(self.fc(x)))

    def features(self, x: Any) -> Any:
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Any) -> Any:
        return self.net(x)


def features(self: Any, x: Any) -> Any:
    return self.fc(x)


def forward(self: Any, x: Any) -> Any:
    return self.net(x) + self.net[0](x)


def inputs() -> Any:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def reason(model: nn.Module, where: str) -> str:
    (row,) = (row for row in tft.explain(model) if row.where == where)
    assert row.backend == "native"
    return row.reason


@pytest.mark.parametrize("name", ["features", "others"])
def test_methods_that_a_class_has_got(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(tft.fuse(Block()).fc) is not nn.Linear  # what was read then is no longer true
    monkeypatch.setattr(Block, name, features, raising=False)
    model = Block()
    fused: Any = tft.fuse(model)
    assert torch.equal(getattr(fused, name)(inputs()), model.fc(inputs()))
    assert reason(fused, "fc") == "the source of Block is not available"
    monkeypatch.undo()
    assert type(tft.fuse(Block()).fc) is not nn.Linear


def test_a_forward_method_above_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(tft.fuse(Outer()).net[0]) is not nn.Linear
    monkeypatch.setattr(Outer, "forward", forward)
    model = Outer()
    fused = tft.fuse(model)
    assert torch.equal(fused(inputs()), model(inputs()))
    assert reason(fused, "net.0") == "the source of Outer is not available"


PATCHED: Any = None


def test_a_method_above_that_one_module_has_got(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Outer())
    monkeypatch.setitem(globals(), "PATCHED", model[0])
    model[0].forward = lambda x: PATCHED.net(x) + PATCHED.net[0](x)  # type: ignore[method-assign]
    expected = model(inputs())
    assert torch.equal(tft.fuse(model, inplace=True)(inputs()), expected)
    assert reason(model, "0.net.0") == "the method forward of Outer was replaced"


@pytest.mark.parametrize("kind", [nn.Linear, nn.ReLU, nn.Module])
def test_classes_of_torch_that_were_patched(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "__call__" if kind is nn.Module else "forward"
    native = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, x: native(self, x) - 1)
    model = Block()
    fused = tft.fuse(model)
    assert torch.equal(fused(inputs()), model(inputs()))
    assert "replaced" in reason(fused, "relu" if kind is nn.ReLU else "fc")


def test_a_patched_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noted(self: Any, x: Any) -> Any:
        for layer in self:
            x = layer(x)
            seen.append(x)
        return x

    monkeypatch.setattr(nn.Sequential, "forward", noted)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fused = tft.fuse(model)
    assert torch.equal(fused(inputs()), model(inputs()))
    assert all(map(torch.equal, seen[:2], seen[2:]))


class Projected(Block):
    """Whether there is a projection decides which layer the ReLU is behind."""

    def __init__(self, projection: bool) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8) if projection else None

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        if self.projection is not None:
            y = self.projection(y)
        return self.out(self.relu(y))


class CalledProjected(Projected):
    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        if self.projection is not None:
            y = self.projection(y)
        return self.out(F.relu(y))


@pytest.mark.parametrize("kind", [Projected, CalledProjected])
@pytest.mark.parametrize("projection", [True, False])
def test_optional_children_have_to_stay(kind: Any, projection: bool, launched: Launched) -> None:
    model = kind(projection)
    fused = tft.fuse(model)
    with launched(FORWARD, times=1):
        torch.testing.assert_close(fused(inputs()), model(inputs()))
    for one in (model, fused):
        one.projection = None if projection else nn.Tanh()
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}\.projection: expected .*unfuse"):
        fused(inputs())
    assert torch.equal(tft.unfuse(fused)(inputs()), model(inputs()))
    fused = tft.fuse(fused)
    with launched(FORWARD, times=int(projection)):
        torch.testing.assert_close(fused(inputs()), model(inputs()))


class Tapped(Block):
    """What is None may get a function, too, which would see the value."""

    def __init__(self) -> None:
        super().__init__()
        self.tap: Callable[[Any], object] | None = None

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        if self.tap is not None:
            self.tap(y)
        return self.relu(y)


def test_a_function_that_is_set_later() -> None:
    fused = tft.fuse(Tapped())
    seen: list[Any] = []
    fused.tap = seen.append
    with pytest.raises(RuntimeError, match=r"Tapped\.tap: expected None"):
        fused(inputs())
    assert not seen


class Twice(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class TwiceAndPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Twice(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Any) -> Any:
        return self.net(x) + self.net[0](x)


def test_elements_of_a_sequential_with_a_forward_method() -> None:
    model = TwiceAndPart()
    fused = tft.fuse(model)
    assert torch.equal(fused(inputs()), model(inputs()))
    assert reason(fused, "net.0") == "TwiceAndPart may use parts of 'net' by themselves"


class Evaluates(Block):
    def forward(self, x: Any) -> Any:
        return self.out(self.relu(self.fc(x)))

    def features(self, x: Any) -> Any:
        return eval("self.fc")(x)


def test_layers_that_evaluated_text_names() -> None:
    model = Evaluates()
    fused = tft.fuse(model)
    assert torch.equal(fused.features(inputs()), model.features(inputs()))


class NoGradient(Block):
    """Without the indented blocks that would be branches."""

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = F.relu(y)
        torch.set_grad_enabled(before)
        return y


def test_forward_methods_that_switch_gradients() -> None:
    model = NoGradient()
    fused = tft.fuse(model)
    assert fused(inputs()).requires_grad is model(inputs()).requires_grad is False
    assert reason(fused, "fc").endswith("switches gradients or autocast")


class Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Slotted:
    __slots__ = ("layer", "unset")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Unregistered(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class Chain:
    """Longer than Python may recurse."""

    def __init__(self, layer: nn.Module) -> None:
        self.next: Any = layer
        for _ in range(5000):
            link = object.__new__(Chain)
            link.next, self.next = self.next, link


class Holds(Block):
    def __init__(self, hold: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.held: Any = (hold(self.fc),)

    def pre(self, x: Any) -> Any:
        return self.held[0].layer(x)


@pytest.mark.parametrize("hold", [Holder, Slotted, Unregistered])
def test_objects_that_hold_a_layer(hold: Any) -> None:
    model = Holds(hold)
    fused = tft.fuse(model)
    assert torch.equal(fused.pre(inputs()), model.pre(inputs()))
    assert reason(fused, "fc") == "an attribute holds the Linear"


def test_a_long_chain_of_objects_that_hold_a_layer() -> None:
    assert reason(Holds(Chain), "fc") == "an attribute holds the Linear"


class LowRank(nn.Linear):
    """As in LoRA, where weights are merged in eval mode, and only there."""

    merged = False

    def train(self, mode: bool = True) -> Any:
        self.merged = not mode
        return super().train(mode)


def test_example_inputs_merge_no_weights() -> None:
    model = nn.Sequential(LowRank(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Dropout())
    fused = tft.fuse(model, inputs())
    assert tft.explain(fused, inputs())
    for one in (model, fused):
        assert not one[0].merged and all(module.training for module in one.modules())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("total", torch.zeros(8))
        self.register_buffer("last", None)

    def forward(self, x: Any) -> Any:
        with torch.inference_mode(self.calls.is_inference()):
            self.calls += 1
        self.total, self.last = self.total + x.sum(0), x
        return x * self.calls


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_example_inputs_change_no_buffers(mode: Any) -> None:
    with mode():
        counts = Counts()
    model = nn.Sequential(counts, nn.Linear(8, 8), nn.ReLU())
    before = dict(model[0]._buffers)
    fused = tft.fuse(model, inputs())
    tft.explain(fused, inputs())
    for one in (model, fused):
        assert all(one[0]._buffers[name] is before[name] for name in before)
        assert not one[0].calls and not one[0].total.any()
