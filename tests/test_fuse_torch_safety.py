"""`twinfuse.torch.fuse` where values before a ReLU are seen in roundabout ways, or ReLUs chosen."""

from __future__ import annotations

import cProfile
import functools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.relu = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.out(F.relu(self.fc(x)))


class Clones(Block):
    def clone(self) -> Any:
        return self.__class__()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def pre(block: Any, x: Any) -> Any:
    return block.fc(x)


def first(owner: Any, x: Any) -> Any:
    return owner.net[0](x)


class Indexes(nn.Sequential):
    def pre(self, x: Any) -> Any:
        return self[0](x)


class Iterates(nn.Sequential):
    def __call__(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = x - 1
        return x


class Base(nn.ModuleList):
    def forward(self, x: Any) -> Any:
        return self[0][0](x)


class Inherits(Base):
    pass


class IndexesList(nn.ModuleList):
    def pre(self, x: Any) -> Any:
        return self[0][0](x)


class InList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = IndexesList([net()])

    def forward(self, x: Any) -> Any:
        for layers in self.nets:
            x = layers(x)
        return x


class HandsChildOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Any) -> Any:
        return self.block(x) + pre(self.block, x)


class HandsElementsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"a": Block()})

    def forward(self, x: Any) -> Any:
        for block in self.blocks.values():
            x = block(x) + pre(block, x)
        return x


class HandsTheLastOn(HandsElementsOn):
    def forward(self, x: Any) -> Any:
        for block in self.blocks.values():
            x = block(x)
        return pre(block, x)


class HandsItselfOn(Block):
    def pre(self, x: Any) -> Any:
        return pre(self, x)


class HandsOwnerOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Any) -> Any:
        return self.net(x)


class HandsOwnersOwnerOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.owner = HandsOwnerOn()

    def forward(self, x: Any) -> Any:
        return self.owner(x) + first(self.owner, x)


class Aliases(Block):
    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.held = hold(self)

    def pre(self, x: Any) -> Any:
        held = self.held
        while not callable(held):
            held = next(iter(held.values() if isinstance(held, dict) else held))
        held = held() if isinstance(held, weakref.ref) else held
        return held(x)


class Attribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.acts, self.which = F.relu, [F.relu, torch.tanh], 0

    def forward(self, x: Any) -> Any:
        return self.out(self.act(self.fc(x)))

    def change(self) -> None:
        self.act, self.which = torch.tanh, 1


class Element(Attribute):
    def forward(self, x: Any) -> Any:
        return self.out(self.acts[self.which](self.fc(x)))


class Argument(Attribute):
    def forward(self, x: Any) -> Any:
        relu = self.act
        return self.out(relu(self.fc(x)))


class ChosenLayer(Attribute):
    def forward(self, x: Any) -> Any:
        return F.relu((self.fc, self.out)[self.which](x))


class ChosenReLU(Attribute):
    def forward(self, x: Any) -> Any:
        return self.out((self.relu, torch.tanh)[self.which](self.fc(x)))


ACT = F.relu


class Global(Block):
    def forward(self, x: Any) -> Any:
        return self.out(ACT(self.fc(x)))

    def change(self) -> None:
        globals()["ACT"] = torch.tanh


def stores() -> nn.Module:
    last = None

    class Stores(Block):
        def forward(self, x: Any) -> Any:
            nonlocal last
            last = self.fc(x)
            return self.out(F.relu(last))

        def pre(self, x: Any) -> Any:
            self(x)
            return last

    return Stores()


class SetsAttribute(Block):
    def forward(self, x: Any) -> Any:
        hidden = self.fc(x)
        super().__setattr__("last", hidden)
        return self.out(F.relu(hidden))

    def pre(self, x: Any) -> Any:
        self(x)
        return self.last


class Queues(Block):
    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.Queue[Any] = queue.Queue()

    def forward(self, x: Any) -> Any:
        hidden = self.fc(x)
        self.queue.put(hidden)
        return self.out(F.relu(hidden))

    def pre(self, x: Any) -> Any:
        self(x)
        return list(self.queue.queue)[-1]


def replaced_part() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU())
    model[0]._conv_forward = lambda x, weight, bias: F.conv1d(x.T, weight, bias).T
    return model


NATIVE: dict[str, Callable[[], nn.Module]] = {
    "indexes": lambda: Indexes(*net()),
    "iterates": lambda: Iterates(*net()),
    "inherited_forward": lambda: Inherits([net()]),
    "list_with_methods": InList,
    "hands_child_on": HandsChildOn,
    "hands_elements_on": HandsElementsOn,
    "hands_the_last_on": HandsTheLastOn,
    "hands_itself_on": HandsItselfOn,
    "hands_owner_on": HandsOwnersOwnerOn,
    "tuple": lambda: Aliases(lambda block: (block.fc,)),
    "dict": lambda: Aliases(lambda block: {"fc": [block.fc]}),
    "partial": lambda: Aliases(lambda block: functools.partial(block.fc)),
    "bound": lambda: Aliases(lambda block: block.fc.forward),
    "function": lambda: Aliases(lambda block: lambda x: block.fc(x)),
    "weak": lambda: Aliases(lambda block: [weakref.ref(block.fc)]),
    "attribute": Attribute,
    "element": Element,
    "variable": Argument,
    "chosen_layer": ChosenLayer,
    "chosen_relu": ChosenReLU,
    "global": Global,
    "nonlocal": stores,
    "sets_attribute": SetsAttribute,
    "queues": Queues,
    "replaced_part": replaced_part,
}


@pytest.mark.parametrize("name", NATIVE)
def test_stays_native(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ACT", F.relu)
    torch.manual_seed(0)
    model, x = NATIVE[name](), torch.randn(8, 8)

    def run() -> list[Any]:
        return [model(x), getattr(getattr(model, "nets", model), "pre", model)(x)]

    expected = run()
    tft.fuse(model, inplace=True)
    reasons = {row.backend: row.reason for row in twinfuse.explain(model)}
    assert set(reasons) == {"native"} and all(reasons.values())
    assert all(torch.equal(got, want) for got, want in zip(run(), expected, strict=True))
    if hasattr(model, "change"):
        model.change()
        changed = run()
        tft.unfuse(model)
        assert all(torch.equal(got, want) for got, want in zip(changed, run(), strict=True))


@pytest.mark.parametrize("how", ["type", "clone", "subclass"])
def test_other_instances_apply_their_relus(how: str) -> None:
    native, x = Clones(), torch.randn(4, 8)
    fused = tft.fuse(native)
    kind: Any = type(fused)
    make = {"type": kind, "clone": fused.clone, "subclass": type("Sub", (kind,), {})}[how]
    other = make()
    other.load_state_dict(native.state_dict())
    assert torch.equal(other(x), native(x))
    assert torch.equal(tft.unfuse(tft.fuse(other))(x), native(x))


@pytest.mark.parametrize("make", [Block, net])
def test_relus_of_layers_that_are_unfused(make: Any) -> None:
    native, x = make(), torch.randn(4, 8)
    fused = tft.fuse(native)
    layer = fused.fc if make is Block else fused[0]
    assert isinstance(layer, tft.nn.LinearReLU)
    tft.unfuse(layer)
    assert torch.equal(fused(x), native(x))
    rows = {row.where: row.backend for row in twinfuse.explain(fused)}
    assert rows.get("1", "native") == "native"
    assert torch.equal(tft.unfuse(fused)(x), native(x))


def test_relus_behind_a_norm_that_is_unfused() -> None:
    native = nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
    fused, x = tft.fuse(native), torch.randn(4, 8, 5)
    assert type(fused[1]) is not nn.BatchNorm1d
    tft.unfuse(fused[1])
    assert torch.equal(fused(x), native(x))


def test_fusing_a_slice_of_a_fused_model() -> None:
    native, x = net(), torch.randn(4, 8)
    fused = tft.fuse(native)
    tft.fuse(fused[:1], inplace=True)
    assert torch.equal(fused(x), native(x)) and list(fused.state_dict()) == list(
        native.state_dict()
    )


def test_hooks_of_all_modules() -> None:
    seen: list[Any] = []
    hook = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[2].min()))
    try:
        fused = tft.fuse(net())
        fused(torch.randn(4, 8))
    finally:
        hook.remove()
    assert type(fused[0]) is nn.Linear and seen[0] < 0


class Collects(Block):
    def __init__(self) -> None:
        super().__init__()
        self.list, self.dict = [nn.Parameter(torch.zeros(8))], {"a": (torch.ones(8) * 2,)}
        self.cache = [self.fc(torch.ones(8))]


def test_a_copy_shares_tensors_in_containers() -> None:
    model = Collects()
    fused = tft.fuse(model)
    assert fused.list[0] is model.list[0] and fused.dict["a"][0] is model.dict["a"][0]
    assert isinstance(fused.fc, tft.nn.LinearReLU) and fused.list is not model.list


def test_under_a_profiler() -> None:
    profile = cProfile.Profile()
    profile.enable()
    try:
        fused = tft.fuse(Block())
        sum([1, 2])
    finally:
        profile.disable()
    assert isinstance(fused.fc, tft.nn.LinearReLU)
    assert any("sum" in str(entry.code) for entry in profile.getstats())


def test_models_that_cannot_be_copied() -> None:
    model = Block()
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match="inplace=True"):
        tft.fuse(model)
    assert isinstance(tft.fuse(model, inplace=True).fc, tft.nn.LinearReLU)


class Transforms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))

    def forward(self, x: Any, *, scale: Any = 1) -> Any:
        x += 1
        return torch.fft.fft(self.net(x)) * scale


def test_example_inputs() -> None:
    x = torch.randn(64, 512)
    before = x.clone()
    assert isinstance(tft.fuse(Transforms(), x).net[0], tft.nn.LinearReLU)
    fused = tft.fuse(Transforms(), {"x": x, "scale": torch.tensor(2.0)})
    assert isinstance(fused.net[0], tft.nn.LinearReLU) and torch.equal(x, before)
