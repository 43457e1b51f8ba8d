"""`twinfuse.torch.fuse`: which pairs are fused, which are not, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
import torch.nn.utils.parametrizations as parametrizations  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse.torch.fuse import FusedReLU  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)
    )


class OneReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.relu = nn.ReLU()

    def forward(self, x: Any) -> Any:
        x = self.relu(self.fc1(x))
        x = F.dropout(x, 0.0)
        return self.fc3(self.relu(self.fc2(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = mlp()
        self.blocks = nn.ModuleList([mlp(), nn.Sequential(mlp(), nn.ReLU())])
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Any) -> Any:
        x = self.head(x)
        for block in self.blocks:
            x = block(x)
        return x if self.training else -x


def run(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(5, 8, requires_grad=True)
    y = model(x)
    y.pow(2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return y, {"input": x.grad, **gradients}


MODELS = {"sequential": (mlp, 2), "forward": (OneReLU, 2), "nested": (Blocks, 7)}


@pytest.mark.parametrize("name", MODELS)
def test_same_model_on_fused_kernels(name: str, launched: Launched) -> None:
    make, count = MODELS[name]
    model = make()
    expected = run(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert tft.fuse(model, inplace=True) is model
    with launched("linear_relu_forward_f32", count), launched("linear_relu_backward_f32", count):
        torch.testing.assert_close(run(model), expected)
    assert sum(type(m) is tft.nn.LinearReLU for m in model.modules()) == count
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_every_object(name: str) -> None:
    model = MODELS[name][0]()
    text, expected = repr(model), run(model)
    before = [(n, id(m), type(m)) for n, m in model.named_modules()]
    tft.fuse(model, inplace=True)
    assert repr(model) != text
    assert tft.unfuse(model) is model
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
    assert repr(model) == text
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0)
    assert not any("_twinfuse_fused" in vars(m) for m in model.modules())


def test_fusing_twice_changes_nothing() -> None:
    model = tft.fuse(mlp())
    text = repr(model)
    assert repr(tft.fuse(model, inplace=True)) == text
    assert "FusedReLU" not in repr(tft.unfuse(model))


def test_unfuse_leaves_other_fused_layers() -> None:
    model = nn.Sequential(tft.nn.LinearReLU(8, 8), nn.Linear(8, 8), nn.ReLU())
    tft.unfuse(tft.fuse(model, inplace=True))
    assert [type(m) for m in model] == [tft.nn.LinearReLU, nn.Linear, nn.ReLU]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_fused_models(duplicate: Any, launched: Launched) -> None:
    model = tft.fuse(mlp())
    twin = duplicate(model)
    with launched("linear_relu_forward_f32", times=2):
        y, _ = run(twin)
    torch.testing.assert_close(y, run(model)[0])
    assert [type(m) for m in tft.unfuse(twin)] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert type(model[0]) is tft.nn.LinearReLU


def test_training_mode_survives() -> None:
    model = tft.fuse(mlp()).eval()
    tft.unfuse(model)
    assert not any(m.training for m in model.modules())


def test_weights_move_between_native_and_fused() -> None:
    native, fused = mlp(), tft.fuse(mlp())
    fused.load_state_dict(native.state_dict(), strict=True)
    torch.testing.assert_close(run(fused), run(native))


def test_compiled(launched: Launched) -> None:
    torch._dynamo.reset()
    model = mlp()
    expected = run(model)
    compiled = torch.compile(tft.fuse(model, inplace=True), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    with launched("linear_relu_forward_f32", times=2):
        torch.testing.assert_close(compiled(x), expected[0])


def test_parametrized_layers(launched: Launched) -> None:
    model = mlp()
    parametrizations.weight_norm(model[0])
    expected = run(model)
    tft.fuse(model, inplace=True)
    assert isinstance(model[0], tft.nn.LinearReLU) and parametrize.is_parametrized(model[0])
    with launched("linear_relu_forward_f32", times=2):
        torch.testing.assert_close(run(model), expected)
    torch.testing.assert_close(run(copy.deepcopy(model)), expected)
    assert "Parametrized" in type(tft.unfuse(model)[0]).__name__
    torch.testing.assert_close(run(model), expected)
    parametrize.remove_parametrizations(tft.fuse(model, inplace=True)[0], "weight")
    assert type(model[0]) is tft.nn.LinearReLU
    tft.unfuse(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(run(model)[0], expected[0])


def test_pruned_layers(launched: Launched) -> None:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    expected = run(model)
    with launched("linear_relu_forward_f32", times=2):
        torch.testing.assert_close(run(tft.fuse(model, inplace=True)), expected)


class Subclass(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) - 1


class OddSequential(nn.Sequential):
    def forward(self, x: Any) -> Any:
        z = self[0](x)
        return self[1](z) + z


class Indexes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(this, x: Any) -> Any:
        return this.net[0](x) + this.net(x)


class ReachesDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OneReLU()

    def forward(self, x: Any) -> Any:
        return self.inner(x) + self.inner.fc1(x).sum()


class Branches(OneReLU):
    active = False

    def forward(self, x: Any) -> Any:
        x = self.fc1(x)
        return self.fc3(self.fc2(self.relu(x) if self.active else x))


class ValueUsedTwice(OneReLU):
    def forward(self, x: Any) -> Any:
        z = self.fc1(x)
        return self.fc3(self.fc2(self.relu(z) + z))


class CallsHelper(OneReLU):
    def first(self, x: Any) -> Any:
        return self.fc1(x)

    def forward(self, x: Any) -> Any:
        return self.fc3(self.fc2(self.relu(self.first(x))))


class OtherMethod(OneReLU):
    def embed(self, x: Any) -> Any:
        return self.fc1(x)


class Remembers(OneReLU):
    def forward(self, x: Any) -> Any:
        self.last = self.relu(self.fc1(x))
        return self.fc3(self.fc2(self.last))


def with_hook(index: int, register: str) -> nn.Module:
    model = mlp()
    hook = (lambda m, g: None) if "pre" in register else (lambda m, i, o: None)
    getattr(model[index], register)(hook)
    return model


def shared_linear() -> nn.Module:
    linear = nn.Linear(8, 8)
    return nn.Sequential(linear, nn.ReLU(), linear)


def replaced_forward() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) - 1
    return model


NATIVE: dict[str, tuple[Any, str, str]] = {
    "no_relu": (lambda: nn.Sequential(nn.Linear(8, 8)), "0", "no ReLU follows"),
    "subclass": (lambda: nn.Sequential(Subclass(8, 8), nn.ReLU()), "0", "a subclass"),
    "other_activation": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), "0", "no ReLU follows"),
    "shared": (shared_linear, "0", "used in more than one place"),
    "hook": (lambda: with_hook(0, "register_forward_hook"), "0", "hooks of the Linear"),
    "backward_hook": (
        lambda: with_hook(0, "register_full_backward_hook"),
        "0",
        "hooks of the Linear",
    ),
    "backward_pre_hook": (
        lambda: with_hook(0, "register_full_backward_pre_hook"),
        "0",
        "hooks of the Linear",
    ),
    "relu_hook": (lambda: with_hook(1, "register_forward_pre_hook"), "0", "the ReLU has hooks"),
    "forward_replaced": (replaced_forward, "0", "its forward method was replaced"),
    "own_forward": (lambda: OddSequential(nn.Linear(8, 8), nn.ReLU()), "0", "is used as well"),
    "indexed": (Indexes, "net.0", "may use parts of 'net'"),
    "reached_from_above": (ReachesDown, "inner.fc1", "may reach 'fc1' by itself"),
    "branches": (Branches, "fc1", "has branches"),
    "value_used_twice": (ValueUsedTwice, "fc1", "is used as well"),
    "helper": (CallsHelper, "fc1", "calls other Python functions"),
    "other_method": (OtherMethod, "fc1", "outside of its forward"),
    "assignment": (Remembers, "fc1", "assignments to attributes"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_certain_stays_native(name: str) -> None:
    make, where, reason = NATIVE[name]
    model = make()
    expected = run(model)
    report = twinfuse.explain(tft.fuse(model, inplace=True))
    (row,) = (row for row in report if row.where == where)
    assert (row.op, row.backend) == ("linear", "native")
    assert reason in row.reason
    assert type(model.get_submodule(where)) is not tft.nn.LinearReLU
    torch.testing.assert_close(run(model), expected)


def test_forward_pre_hooks_of_the_linear_are_kept(launched: Launched) -> None:
    model = mlp()
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    expected = run(model)
    with launched("linear_relu_forward_f32", times=2):
        torch.testing.assert_close(run(tft.fuse(model, inplace=True)), expected)


def test_a_shared_relu_is_replaced_only_where_it_follows_a_linear() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 8), relu, nn.LayerNorm(8), relu)
    expected = run(model)
    tft.fuse(model, inplace=True)
    assert type(model[1]) is FusedReLU and model[3] is relu
    torch.testing.assert_close(run(model), expected)
    assert tft.unfuse(model)[1] is relu


def test_a_block_used_in_two_places_is_fused_once(launched: Launched) -> None:
    block = mlp()
    model = nn.Sequential(block, block)
    expected = run(model)
    tft.fuse(model, inplace=True)
    with launched("linear_relu_forward_f32", times=4):
        torch.testing.assert_close(run(model), expected)


def test_explain_before_and_after() -> None:
    model = mlp()
    before = twinfuse.explain(model)
    assert [(row.where, row.op) for row in before] == [
        ("0", "linear"), ("1", "relu"), ("2", "linear"), ("3", "relu"), ("4", "linear"),
    ]  # fmt: skip
    assert {row.reason for row in before[:4]} == {"can be fused: call fuse(model)"}
    after = twinfuse.explain(tft.fuse(model, inplace=True))
    assert [row.backend for row in after] == ["cpu", "fused", "cpu", "fused", "native"]
    assert after[0].kernel in twinfuse.launches()
    assert "no ReLU follows" in str(after)
    with twinfuse.use_backend("reference"):
        assert twinfuse.explain(model)[0].backend == "reference"


def test_explain_runs_nothing(launched: Launched) -> None:
    model = OneReLU()
    with launched("linear_relu_", times=0):
        twinfuse.explain(model)
        twinfuse.explain(tft.fuse(model, inplace=True))


def test_fuse_trains_like_native() -> None:
    curves = []
    for prepare in (lambda m: m, tft.fuse):
        torch.manual_seed(4)
        model = prepare(mlp())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, target = torch.randn(64, 8), torch.randn(64, 8)
        losses = []
        for _ in range(30):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < 0.8 * curves[0][0]
