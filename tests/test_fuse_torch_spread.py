"""Fused models whose parameters are spread over processes: sharded, or DTensors.

One process is enough for that; `test_examples_distributed.py` trains in two.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import (  # noqa: E402
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

Wrap = Callable[[Any], Any]
LATE = "fuse looks at models before {} only"


class Block(nn.Module):
    """Its forward method is rewritten when it is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 8)

    def forward(self, input: Any) -> Any:
        return torch.relu(self.fc(input))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, input: Any) -> Any:
        return self.lstm(input)[0][:, -1]


def linears() -> Any:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), Block(), nn.Linear(8, 1))


def convolutions() -> Any:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)),
    )


def recurrent() -> Any:
    return nn.Sequential(nn.Unflatten(1, (4, 4)), Last(), nn.Linear(8, 1))


def shard_all(model: Any) -> Any:
    for module in reversed(list(model.modules())):
        fully_shard(module)
    return model


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(model: Any, prepared: Wrap = lambda inputs: inputs) -> list[float]:
    """Losses of four steps, and what the model then gives in eval mode."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(prepared(torch.randn(32, 16))).pow(2).mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    with torch.no_grad():
        found.append(model.eval()(prepared(torch.ones(2, 16))).sum())
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()  # a root stays as it ran, and its parameters are then others
    return [float(getattr(value, "full_tensor", lambda v=value: v)()) for value in found]


@pytest.mark.parametrize("shard", [fully_shard, shard_all])
@pytest.mark.parametrize(
    ("make", "fused"), [(linears, "linear_relu"), (convolutions, "conv_relu"), (recurrent, "lstm")]
)
def test_a_fused_model_trains_sharded(
    make: Any, fused: str, shard: Wrap, launched: Launched
) -> None:
    torch.manual_seed(1)
    native = make()
    model = shard(tft.fuse(copy.deepcopy(native)))
    expected = trained(native)
    with launched(f"{fused}_forward"), launched(f"{fused}_backward"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        assert trained(model) == pytest.approx(expected, rel=1e-5)
        # As the layers run: with all of their parameters.
        kernels = {row.backend: row.kernel for row in tft.explain(model)}
        assert kernels["cpu"].startswith(f"{fused}_forward") and "reference" not in kernels
        tft.unfuse(model)
        with launched("", times=0):
            assert trained(model) == pytest.approx(trained(native), rel=1e-5)
    names = {type(m).__name__.removeprefix("FSDP") for m in model.modules()}
    assert names == {type(m).__name__ for m in native.modules()}
    assert isinstance(model, FSDPModule)


def flat(model: Any, use_orig_params: bool = False) -> Any:
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=use_orig_params)


def flat_with_names(model: Any) -> Any:
    return flat(model, use_orig_params=True)


@pytest.mark.filterwarnings("ignore:FSDP will not all-gather")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.* is deprecated")
@pytest.mark.parametrize("make", [linears, convolutions, recurrent])
@pytest.mark.parametrize(
    ("wrap", "backend"),
    [(nn.parallel.DistributedDataParallel, "cpu"), (flat, "unknown"), (flat_with_names, "unknown")],
)
def test_a_fused_model_trains_wrapped(
    make: Any, wrap: Wrap, backend: str, launched: Launched
) -> None:
    torch.manual_seed(1)
    native = make()
    model = wrap(tft.fuse(copy.deepcopy(native)))
    expected = trained(native)
    with launched(""):
        assert trained(model) == pytest.approx(expected, rel=1e-5)
    assert backend in {row.backend for row in tft.explain(model)}
    with launched("", times=0):
        assert trained(tft.unfuse(model)) == pytest.approx(trained(native), rel=1e-5)
    late = tft.explain(tft.fuse(wrap(make()), inplace=True))
    assert {row.reason for row in late} == {LATE.format(type(model).__name__)}


def test_a_sharded_batch_norm_is_computed_by_itself() -> None:
    torch.manual_seed(1)
    native = convolutions().eval()
    model = tft.fuse(copy.deepcopy(native)).eval()
    fully_shard(model[2])
    fully_shard(model)
    inputs = torch.randn(2048, 16)  # so many that it would be folded
    torch.testing.assert_close(model(inputs), native(inputs))
    (row,) = (row for row in tft.explain(model) if row.where == "1")
    assert row.reason == "its FSDPFoldedNorm2d is sharded by itself"


@pytest.mark.parametrize("shard", [fully_shard, shard_all])
@pytest.mark.parametrize("make", [linears, convolutions, recurrent])
def test_sharded_modules_are_left_alone(make: Any, shard: Wrap) -> None:
    model = shard(make())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"got a FSDP\w+ at '': fuse the model, then shard it"):
        tft.fuse(model)
    assert [type(m) for m in tft.fuse(model, inplace=True).modules()] == kinds
    reasons = {row.reason for row in tft.explain(model)}
    assert reasons == {LATE.format("fully_shard")}


def test_what_is_not_sharded_is_fused() -> None:
    model = nn.Sequential(fully_shard(linears()), linears())
    tft.fuse(model, inplace=True)
    assert [row.where for row in tft.explain(model) if row.backend == "cpu"] == ["1.0", "1.2.fc"]


def test_fuse_leaves_what_was_fused_and_wrapped(launched: Launched) -> None:
    model = fully_shard(tft.fuse(linears()))
    wrapped = nn.parallel.DistributedDataParallel(tft.fuse(recurrent()))
    for whole in (model, wrapped):
        before = [type(module) for module in whole.modules()]
        assert [type(module) for module in tft.fuse(whole, inplace=True).modules()] == before
    with launched("linear_relu_forward", times=2):
        model(torch.randn(2, 16))


def test_a_sharded_model_keeps_its_state_dict() -> None:
    native = convolutions()
    model = shard_all(tft.fuse(copy.deepcopy(native)))
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in model.state_dict().items()}
    assert list(state) == list(native.state_dict())
    for name, value in native.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


@pytest.mark.allow_fallback
def test_parameters_that_are_dtensors_take_the_reference() -> None:
    mesh = init_device_mesh("cpu", (1,))
    torch.manual_seed(1)
    for make in (linears, convolutions):
        native = make()
        model = distribute_module(tft.fuse(copy.deepcopy(native)), mesh)
        expected = trained(native)
        with pytest.warns(twinfuse.FallbackWarning, match="expected a plain tensor, got a DTensor"):
            got = trained(model, lambda inputs: distribute_tensor(inputs, mesh, [Replicate()]))
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("sharded", [False, True])
def test_a_tensor_parallel_layer_takes_the_reference(sharded: bool) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "parts"))
    torch.manual_seed(1)
    native = linears()
    plan = {"0": ColwiseParallel(), "2.fc": ColwiseParallel()}
    model = parallelize_module(tft.fuse(copy.deepcopy(native)), mesh["parts"], plan)
    if sharded:
        fully_shard(model, mesh=mesh["replicas"])
    expected = trained(native)
    with pytest.warns(twinfuse.FallbackWarning, match="got a DTensor"):
        assert trained(model) == pytest.approx(expected, rel=1e-5)
    backends = {row.where: row.backend for row in tft.explain(model)}
    assert backends["0"] == backends["2.fc"] == "reference"


def test_a_folded_norm_compiles_where_sharding_is_known() -> None:
    model = tft.fuse(convolutions()).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = torch.randn(2048, 16)
    torch.testing.assert_close(compiled(inputs), model(inputs))
