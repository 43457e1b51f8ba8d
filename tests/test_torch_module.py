"""`twinfuse.torch.nn.LinearReLU`: it is used wherever an `nn.Linear` and an `nn.ReLU` were."""

from __future__ import annotations

import copy
import io
import pickle
import socket
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.utils.parametrizations as parametrizations  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

FORWARD = "linear_relu_forward_f32"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)
    torch._dynamo.reset()


def pair(bias: bool = True) -> tuple[Any, Any]:
    """A fused layer, and the native layers with the same parameters."""
    layer = tft.nn.LinearReLU(16, 8, bias=bias)
    linear = nn.Linear(16, 8, bias=bias)
    linear.load_state_dict(layer.state_dict())
    return layer, nn.Sequential(linear, nn.ReLU())


def assert_same_training(layer: Any, native: Any, x: Any) -> None:
    ours, theirs = layer(x), native(x)
    torch.testing.assert_close(ours, theirs)
    ours.pow(2).sum().backward()
    theirs.pow(2).sum().backward()
    theirs_by_name = {n.removeprefix("0."): p.grad for n, p in native.named_parameters()}
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_by_name[name], msg=name)
    assert len(theirs_by_name) == len(list(layer.parameters()))


@pytest.mark.parametrize("bias", [True, False])
def test_is_a_linear_and_a_relu(bias: bool, launched: Launched) -> None:
    layer, native = pair(bias)
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == f"LinearReLU(in_features=16, out_features=8, bias={bias})"
    with launched(FORWARD, times=1):
        assert_same_training(layer, native, torch.randn(4, 16))


def test_initial_values_are_those_of_linear() -> None:
    torch.manual_seed(5)
    layer = tft.nn.LinearReLU(16, 8, dtype=torch.float64)
    torch.manual_seed(5)
    linear = nn.Linear(16, 8, dtype=torch.float64)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


def test_state_dict_goes_both_ways() -> None:
    layer, linear = tft.nn.LinearReLU(16, 8), nn.Linear(16, 8)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)
    linear.load_state_dict(tft.nn.LinearReLU(16, 8).state_dict(), strict=True)


def saved_and_loaded(layer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies(duplicate: Any, launched: Launched) -> None:
    layer, _ = pair()
    twin = duplicate(layer)
    x = torch.randn(4, 16)
    with launched(FORWARD, times=2):
        assert torch.equal(twin(x), layer(x))
    assert type(twin) is tft.nn.LinearReLU
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


def test_weight_norm_and_its_removal(launched: Launched) -> None:
    layer, native = pair()
    parametrizations.weight_norm(layer)
    parametrizations.weight_norm(native[0])
    with launched(FORWARD, times=1):
        assert_same_training(layer, native, torch.randn(4, 16))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is tft.nn.LinearReLU


def test_pruning(launched: Launched) -> None:
    layer, native = pair()
    for module in (layer, native[0]):
        prune.l1_unstructured(module, "weight", 0.5)
    with launched(FORWARD, times=1):
        assert_same_training(layer, native, torch.randn(4, 16))


def test_hooks_run() -> None:
    layer, _ = pair()
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    layer.register_forward_hook(lambda m, args, out: seen.append(bool((out >= 0).all())))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer(torch.randn(4, 16)).sum().backward()
    assert seen == ["before", True, "backward"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, launched: Launched) -> None:
    layer, native = pair()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(4, 16)
    with launched(FORWARD, times=1), launched("linear_relu_backward_f32", times=1):
        y = compiled(x)
        y.pow(2).sum().backward()
    native(x).pow(2).sum().backward()
    torch.testing.assert_close(y, native(x))
    torch.testing.assert_close(layer.weight.grad, native[0].weight.grad)
    torch.testing.assert_close(layer.bias.grad, native[0].bias.grad)


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_exported_and_saved(strict: bool, launched: Launched) -> None:
    layer, native = pair()
    x = torch.randn(4, 16)
    program = torch.export.export(layer, (x,), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with launched(FORWARD, times=1):
        torch.testing.assert_close(torch.export.load(buffer).module()(x), native(x))


def test_mixed_precision_training_step(launched: Launched) -> None:
    layer, native = pair()
    x = torch.randn(4, 16)
    for module in (layer, native):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(x).float().pow(2).sum()
        loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, native[0].weight.grad, rtol=0.05, atol=0.05)


def test_half_and_double() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer, native = (m.to(dtype) for m in pair())
        x = torch.randn(4, 16, dtype=dtype)
        torch.testing.assert_close(layer(x), native(x))


def test_explain_lists_it() -> None:
    model = nn.Sequential(tft.nn.LinearReLU(4, 4), nn.Linear(4, 1))
    fused, plain = twinfuse.explain(model)
    assert (fused.where, fused.op, fused.backend) == ("0", "linear_relu", "cpu")
    assert fused.kernel.startswith(FORWARD)
    assert (plain.where, plain.backend, plain.reason) == ("1", "native", "no ReLU follows")


def train(replicate: Any, fused: bool, rank: int) -> tuple[list[Any], int]:
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)),
    )
    replica = replicate(tft.fuse(model) if fused else model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(2 + rank)
    before = sum(twinfuse.launches().values())
    for _ in range(4):
        optimizer.zero_grad()
        replica(torch.randn(32, 16)).pow(2).mean().backward()
        optimizer.step()
    parameters = [p.detach().clone() for p in model.parameters()]
    return parameters, sum(twinfuse.launches().values()) - before


def train_in_process(rank: int, port: int, results: Any) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with twinfuse.strict():
        for fused in (True, False):
            results[rank, fused] = train(DistributedDataParallel, fused, rank)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_alike() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(train_in_process, (port, results), nprocs=2)
        trained = dict(results)
    for fused, launches in ((True, 16), (False, 0)):
        (first, ran), (second, _) = trained[0, fused], trained[1, fused]
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert ran == launches
    for ours, native in zip(trained[0, True][0], trained[0, False][0]):
        torch.testing.assert_close(ours, native)
