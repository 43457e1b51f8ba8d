"""`twinfuse.torch.fuse` on convolutions: what is fused, what is not, and what it changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
import torch.nn.utils.parametrizations as parametrizations  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

FORWARD, BACKWARD = "conv_relu_forward_f32", "conv_relu_backward_f32"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def network() -> nn.Sequential:
    """Conv2d, Conv1d and Linear, each with a ReLU behind it."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 2, padding=1, padding_mode="reflect"), nn.ReLU(inplace=True)),
        *(nn.Flatten(2), nn.Conv1d(8, 4, 5, stride=2, groups=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(44, 5), nn.ReLU(), nn.Linear(5, 3)),
    )


class OneReLU(nn.Module):
    """Layers of two kinds share one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        return self.relu(self.fc(self.relu(self.conv(x))))


def images() -> Any:
    torch.manual_seed(0)
    return torch.randn(3, 2, 8, 8)


def run(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    x = images().requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return y, {"input": x.grad, **gradients}


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


MODELS = {"sequential": (network, 3, 1), "forward": (OneReLU, 1, 1)}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_same_model_on_fused_kernels(name: str, channels_last: bool, launched: Launched) -> None:
    make, convs, linears = MODELS[name]
    model = make()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    expected = run(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert tft.fuse(model, inplace=True) is model
    with (
        launched(FORWARD, convs),
        launched(BACKWARD, convs),
        launched("linear_relu_forward_f32", linears),
    ):
        assert_same(run(model), expected)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_every_object(name: str) -> None:
    model = MODELS[name][0]()
    text, expected = repr(model), run(model)
    before = [(n, id(m), type(m)) for n, m in model.named_modules()]
    assert "ConvReLU2d" in repr(tft.fuse(model, inplace=True))
    tft.unfuse(model)
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
    assert repr(model) == text
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0)


def test_unfuse_leaves_other_fused_layers() -> None:
    model = nn.Sequential(
        tft.nn.ConvReLU2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(), tft.nn.ConvReLU1d(2, 2, 1)
    )
    tft.unfuse(tft.fuse(model, inplace=True))
    kinds = [tft.nn.ConvReLU2d, nn.Conv2d, nn.ReLU, tft.nn.ConvReLU1d]
    assert [type(m) for m in model] == kinds


def test_weights_move_between_native_and_fused() -> None:
    native, fused = network(), tft.fuse(network())
    fused.load_state_dict(native.state_dict(), strict=True)
    assert_same(run(fused), run(native))


def test_compiled(launched: Launched) -> None:
    torch._dynamo.reset()
    model = network()
    expected = run(model)
    compiled = torch.compile(tft.fuse(model, inplace=True), fullgraph=True, backend="aot_eager")
    with launched(FORWARD, times=3):
        assert_same(compiled(images()), expected[0])


def test_parametrized_layers(launched: Launched) -> None:
    model = network()
    parametrizations.weight_norm(model[0])
    expected = run(model)
    tft.fuse(model, inplace=True)
    assert isinstance(model[0], tft.nn.ConvReLU2d) and parametrize.is_parametrized(model[0])
    with launched(FORWARD, times=3):
        assert_same(run(model), expected)
    assert_same(run(copy.deepcopy(model)), expected)
    assert "ParametrizedConv2d" in type(tft.unfuse(model)[0]).__name__
    parametrize.remove_parametrizations(tft.fuse(model, inplace=True)[0], "weight")
    assert type(model[0]) is tft.nn.ConvReLU2d
    tft.unfuse(model)
    assert type(model[0]) is nn.Conv2d
    assert_same(run(model)[0], expected[0])


class Subclass(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return super().forward(x) - 1


class ValueUsedTwice(OneReLU):
    def forward(self, x: Any) -> Any:
        z = self.conv(x)
        return self.fc(self.relu(z) + z)


def sequence(*layers: nn.Module) -> Any:
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


def shared() -> nn.Module:
    conv = nn.Conv2d(2, 2, 1)
    return nn.Sequential(conv, nn.ReLU(), conv)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    model[0].register_forward_hook(lambda m, i, o: None)
    return model


CONV, RELU = nn.Conv2d(2, 2, 3), nn.ReLU()
NATIVE: dict[str, tuple[Any, str, str]] = {
    "no_relu": (sequence(CONV), "0", "no ReLU follows"),
    "subclass": (sequence(Subclass(2, 2, 3), RELU), "0", "a subclass may compute"),
    "shared": (shared, "0", "the Conv2d is used in more than one place"),
    "hook": (hooked, "0", "hooks of the Conv2d"),
    "value_used_twice": (ValueUsedTwice, "conv", "is used as well"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_certain_stays_native(name: str) -> None:
    make, where, reason = NATIVE[name]
    model = make().eval()
    expected = model(images())
    report = twinfuse.explain(tft.fuse(model, inplace=True))
    (row,) = (row for row in report if row.where == where)
    assert (row.op, row.backend) == ("conv2d", "native")
    assert reason in row.reason
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)
    assert not any(isinstance(m, tft.nn.ConvReLU2d) for m in model.modules())


def test_transposed_and_3d_convolutions_are_left_alone() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.ReLU(), nn.Conv3d(2, 2, 1), nn.ReLU())
    text = repr(model)
    assert repr(tft.fuse(model, inplace=True)) == text
    assert {row.op for row in twinfuse.explain(model)} == {"relu"}


def test_explain_before_and_after() -> None:
    model = network()
    before = twinfuse.explain(model)
    ops = ["conv2d", "relu", "conv2d", "relu", "conv1d", "relu", "linear", "relu", "linear"]
    assert [row.op for row in before] == ops
    assert {row.reason for row in before[:8]} == {"can be fused: call fuse(model)"}
    after = twinfuse.explain(tft.fuse(model, inplace=True))
    fused = ["conv2d_relu", "relu", "conv2d_relu", "relu", "conv1d_relu", "relu"]
    assert [row.op for row in after][:6] == fused
    assert [row.backend for row in after] == ["cpu", "fused"] * 4 + ["native"]
    assert after[0].kernel in twinfuse.launches()


def test_fuse_trains_like_native() -> None:
    curves = []
    for prepare in (lambda m: m, tft.fuse):
        torch.manual_seed(4)
        model = prepare(network())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, target = torch.randn(16, 2, 8, 8), torch.randn(16, 3)
        losses = []
        for _ in range(20):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < 0.8 * curves[0][0]


def test_lazy_modules_wait_for_their_weights() -> None:
    model = tft.fuse(nn.Sequential(nn.LazyConv2d(2, 3), nn.ReLU()))
    row, _ = twinfuse.explain(model)
    assert "call the model once" in row.reason
    expected = model(images())
    fused = tft.fuse(model, inplace=True)
    assert isinstance(fused[0], tft.nn.ConvReLU2d)
    torch.testing.assert_close(fused(images()), expected)
