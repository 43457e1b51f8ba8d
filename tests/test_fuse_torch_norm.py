"""`twinfuse.torch.fuse` on a convolution, a BatchNorm and a ReLU: one convolution in eval mode."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.arrays import ROUNDOFF
from tests.conftest import Launched, require
from tests.rule import assert_within_twice

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
import torch.nn.utils.parametrizations as parametrizations  # noqa: E402
from torch import nn  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse.torch import _norm  # noqa: E402

FORWARD, BACKWARD = "conv_relu_forward_f32", "conv_relu_backward_f32"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


@pytest.fixture
def fold_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold small convolutions as well."""
    monkeypatch.setattr(_norm, "MIN_INPUTS", 0)
    monkeypatch.setattr(_norm, "MIN_INPUTS_A_WEIGHT", 0)


class Basic(nn.Module):
    """As in residual networks: one ReLU for all, once behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Functional(Basic):
    def forward(self, x: Any) -> Any:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(y)).relu_()


def sequence() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding="same"), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        *(nn.Conv2d(6, 4, 2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4, eps=0.1)),
        *(nn.ReLU(inplace=True), nn.Flatten(2)),
        *(nn.Conv1d(4, 4, 5, stride=2, groups=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()),
    )


def parametrized() -> nn.Module:
    model = sequence()
    parametrizations.weight_norm(model[0])
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "basic": (Basic, 1),
    "functional": (Functional, 2),
    "sequence": (sequence, 3),
    "parametrized": (parametrized, 3),
}


def images(dtype: Any = torch.float32) -> Any:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def trained(name: str) -> nn.Module:
    """A model with other statistics and scales than new ones have, in eval mode."""
    model = MODELS[name][0]()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.uniform_(module.bias, -1, 1)
    for _ in range(3):
        model(images() * 2 + 1)
    return model.eval()


def run(model: nn.Module, dtype: Any = torch.float32) -> dict[str, Any]:
    x = images(dtype).requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(y.pow(2).sum(), (x, *model.parameters()))
    names = ("input", *(name for name, _ in model.named_parameters()))
    results = {"output": y, **dict(zip(names, gradients, strict=True))}
    return {name: value.detach().numpy() for name, value in results.items()}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert all((got[key] == value).all() for key, value in expected.items())


def assert_as_good(fused: nn.Module, native: nn.Module) -> None:
    expected, reference = run(native), run(copy.deepcopy(native).double(), torch.float64)
    for name, value in run(fused).items():
        # Gradients are sums behind nine operations, whose errors may cancel in two elements.
        noise = 16 * ROUNDOFF["float32"] * abs(reference[name]).max()
        values = value, expected[name], reference[name]
        assert_within_twice(*values, name, dtype="float32", noise=noise)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("fold_all")
def test_folded_in_eval_mode(name: str, launched: Launched) -> None:
    native, count = trained(name), MODELS[name][1]
    fused = tft.fuse(native)
    with launched(FORWARD, count), launched(BACKWARD, count):
        run(fused)
    assert_as_good(fused, native)
    assert list(fused.state_dict()) == list(native.state_dict())
    pairs = zip(fused.state_dict().values(), native.state_dict().values(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("fold_all")
def test_native_in_training_mode(name: str, launched: Launched) -> None:
    native = trained(name).train()
    fused = tft.fuse(copy.deepcopy(native), inplace=True)
    with launched("conv_relu", 0):
        for _ in range(3):
            assert_same(run(fused), run(native))
    state = fused.state_dict()
    assert all(torch.equal(state[key], value) for key, value in native.state_dict().items())
    assert_as_good(fused.eval(), native.eval())


@pytest.mark.parametrize("change", ["load_state_dict", "data", "optimizer", "statistics"])
@pytest.mark.usefixtures("fold_all")
def test_changes_are_seen(change: str) -> None:
    native, other = trained("sequence"), trained("sequence")
    fused = tft.fuse(native)
    before = run(fused)["output"]
    if change == "load_state_dict":
        fused.load_state_dict(other.state_dict())
    elif change == "data":
        for ours, theirs in zip(fused.parameters(), other.parameters(), strict=True):
            ours.data = theirs.data
    elif change == "optimizer":
        fused(images()).sum().backward()
        torch.optim.SGD(fused.parameters(), lr=0.1).step()
    else:
        fused.train()(images() + 2)
        fused.eval()
    assert (run(fused)["output"] != before).any()
    assert_as_good(fused, native)


@pytest.mark.usefixtures("fold_all")
def test_frozen_norms_of_a_model_in_training(launched: Launched) -> None:
    native = trained("functional").train()
    native.bn1.eval()
    fused = tft.fuse(native)
    with launched(FORWARD, 1):
        assert run(fused)["output"] == pytest.approx(run(native)["output"], rel=1e-4, abs=1e-5)
    rows = {row.where: row for row in twinfuse.explain(fused)}
    assert (rows["conv1"].op, rows["conv1"].backend) == ("conv2d_relu", "cpu")
    assert (rows["conv2"].op, rows["conv2"].backend) == ("conv2d", "native")
    assert "in training mode" in rows["conv2"].reason


@pytest.mark.usefixtures("fold_all")
@pytest.mark.parametrize("frozen", [False, True])
def test_spectral_norm_takes_as_many_steps(frozen: bool) -> None:
    model = trained("sequence").train()
    for index in (0, 3, 7):
        parametrizations.spectral_norm(model[index])
        model[index + 1].train(not frozen)
    native, fused = copy.deepcopy(model), tft.fuse(model)
    for _ in range(3):
        twinfuse.explain(fused)
        fused(images()), native(images())
    state = fused.state_dict()
    assert all(torch.equal(state[key], value) for key, value in native.state_dict().items())
    assert not torch.equal(state["0.parametrizations.weight.0._u"], torch.zeros(6))


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_every_object(name: str) -> None:
    model = trained(name)
    text, expected = repr(model), run(model)
    before = [(n, id(m), type(m), set(vars(m))) for n, m in model.named_modules()]
    assert "FoldedNorm2d" in repr(tft.fuse(model, inplace=True))
    tft.unfuse(model)
    if name != "parametrized":
        assert [(n, id(m), type(m), set(vars(m))) for n, m in model.named_modules()] == before
    assert repr(model) == text
    assert_same(run(model), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["basic", "functional", "sequence"])
@pytest.mark.usefixtures("fold_all")
def test_copies_follow_their_own_norms(name: str, duplicate: Any, launched: Launched) -> None:
    fused = tft.fuse(trained(name))
    twin = duplicate(fused)
    fused.train()
    with launched(FORWARD, MODELS[name][1]):
        got = run(twin)
    assert_same(got, run(fused.eval()))
    assert "Folded" not in repr(tft.unfuse(twin))


def test_only_large_inputs_are_worth_folding(launched: Launched) -> None:
    wide = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
    narrow = nn.Sequential(nn.Conv2d(64, 1, 1), nn.BatchNorm2d(1), nn.ReLU()).eval()
    # Wide: 4 * 36_864 weights are 147_456 = 64 * 48 * 48. Narrow: 65_536 = 64 * 32 * 32.
    for model, size in ((wide, 48), (narrow, 32)):
        fused = tft.fuse(model)
        small, large = torch.randn(1, 64, size, size - 1), torch.randn(1, 64, size, size)
        with torch.no_grad():
            with launched("conv_relu", 0):
                assert torch.equal(fused(small), model(small))
            with launched(FORWARD, 1):
                torch.testing.assert_close(fused(large), model(large), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fold_all")
def test_weights_of_less_precision_are_not_folded(launched: Launched) -> None:
    native = trained("sequence").bfloat16()
    fused, x = tft.fuse(native), images(torch.bfloat16)
    with launched("conv_relu", 0):
        assert torch.equal(fused(x), native(x))
    assert "round weights of torch.bfloat16 twice" in twinfuse.explain(fused)[0].reason


@pytest.mark.usefixtures("fold_all")
def test_compiled(launched: Launched) -> None:
    torch._dynamo.reset()
    native = trained("basic")
    compiled = torch.compile(tft.fuse(native), fullgraph=True, backend="aot_eager")
    with launched(FORWARD, 1):
        torch.testing.assert_close(compiled(images()), native(images()), rtol=1e-4, atol=1e-5)


def small_sequence() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()).eval()


@pytest.mark.usefixtures("fold_all")
def test_inputs_without_a_batch() -> None:
    native = nn.Sequential(nn.Conv1d(4, 4, 1, stride=4), nn.BatchNorm1d(4), nn.ReLU()).train()
    native(torch.randn(8, 4, 16) * 2 + 1)
    x = torch.randn(4, 16)  # of which the BatchNorm takes the last axis for channels
    assert torch.equal(tft.fuse(native.eval())(x), native(x))
    for model in (small_sequence(), tft.fuse(small_sequence())):
        with pytest.raises(ValueError, match="expected 4D input"):
            model(torch.randn(2, 9, 9))


@pytest.mark.allow_fallback
def test_new_layers_of_the_same_classes_are_native() -> None:
    fused = tft.fuse(small_sequence())
    conv, norm, x = type(fused[0])(2, 2, 1), type(fused[1])(2).eval(), images()
    nn.init.ones_(norm.running_mean)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias))
    assert torch.equal(norm(x), F.batch_norm(x, norm.running_mean, norm.running_var))
    assert twinfuse.explain(conv)[0].backend == "native"


@pytest.mark.usefixtures("fold_all")
def test_a_part_is_unfused() -> None:
    native = trained("sequence")
    fused = tft.fuse(native)
    tft.unfuse(fused[0])
    assert_as_good(fused, native)
    assert list(fused.state_dict()) == list(native.state_dict())
    fused = tft.fuse(native)
    tft.unfuse(fused[1])
    assert torch.equal(fused[:2](images()), native[:2](images()))


@pytest.mark.usefixtures("fold_all")
def test_replicas_follow_no_norm_of_another_device() -> None:
    native = small_sequence()
    fused = tft.fuse(native)
    replicas = [module._replicate_for_data_parallel() for module in fused]
    # Their tensors are set by `torch.nn.parallel.replicate`.
    for replica, module in zip(replicas, fused, strict=True):
        vars(replica).update((k, tensor.clone()) for k, tensor in module.state_dict().items())
    assert torch.equal(replicas[1](replicas[0](images())), native(images()))
    fused[1].running_mean.fill_(torch.nan)
    assert not replicas[1](replicas[0](images())).isnan().any()


class ReadBetween(Basic):
    def forward(self, x: Any) -> Any:
        y = self.conv1(x)
        return self.relu(self.bn1(y)) + y


class NormTwice(Basic):
    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        return y + self.bn1(x)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    return nn.Sequential(
        *(nn.Conv2d(2, 2, 1), norm, nn.ReLU(), nn.Conv2d(2, 2, 1), norm, nn.ReLU())
    )


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: None)
    return model


def layers(conv: nn.Module, norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(conv, norm, nn.ReLU()))


CONV = nn.Conv2d(2, 2, 1)
NATIVE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "read_between": (ReadBetween, "conv1", "no ReLU follows"),
    "norm_twice": (NormTwice, "conv1", "no ReLU follows"),
    "behind_a_sum": (Basic, "conv2", "no ReLU follows"),
    "shared_norm": (shared_norm, "0", "BatchNorm2d behind it is used in more than one place"),
    "hooked": (hooked, "0", "BatchNorm2d behind it has hooks"),
    "no_statistics": (
        layers(CONV, nn.BatchNorm2d(2, track_running_stats=False)),
        "0",
        "BatchNorm2d behind it has no statistics",
    ),
    "synchronized": (layers(CONV, nn.SyncBatchNorm(2)), "0", "a SyncBatchNorm stands before"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_certain_stays_native(name: str) -> None:
    make, where, reason = NATIVE[name]
    native = make().eval()
    fused = tft.fuse(native)
    (row,) = (row for row in twinfuse.explain(fused) if row.where == where)
    assert (row.op, row.backend) == ("conv2d", "native") and reason in row.reason
    assert type(fused.get_submodule(where)) is nn.Conv2d
    torch.testing.assert_close(fused(images()), native(images()))


def test_linear_layers_are_not_folded() -> None:
    native = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    fused = tft.fuse(native)
    assert "a BatchNorm1d stands before the ReLU" in twinfuse.explain(fused)[0].reason
    assert torch.equal(fused(torch.ones(2, 8)), native(torch.ones(2, 8)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + x)


def test_a_large_residual_network_is_fused_within_two_seconds(launched: Launched) -> None:
    with torch.device("meta"):
        sizes = ((256, 64, 3), (512, 128, 4), (1024, 256, 6), (2048, 512, 3))
        stages = [[Bottleneck(size, inner) for _ in range(n)] for size, inner, n in sizes]
        model = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
    start = time.process_time()
    fused = tft.fuse(model.eval(), inplace=True)
    assert time.process_time() - start < 2
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count("ConvNormReLU2d") == 2 * 16
    block = fused[0][0].to_empty(device="cpu")
    for parameter in block.state_dict().values():
        parameter.fill_(0.01)
    with launched(FORWARD, 2):
        block(torch.randn(1, 256, 48, 48))
