"""`twinfuse.explain` of torch modules: what fused layers are said to save, against what runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse.torch import _norm  # noqa: E402

# What reads a tensor and writes one as large.
PASSES = {"relu", "relu_", "clamp", "native_batch_norm", "_native_batch_norm_legit_no_training"}
VIEWS = {"t", "view", "_unsafe_view", "reshape", "detach", "empty", "new_empty", "clone"}


class Kernels(TorchDispatchMode):
    """Counts the kernels that run, and the bytes that passes over activations move."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.count += name not in VIEWS
        if name in PASSES:
            written = result if isinstance(result, Tensor) else result[0]
            self.bytes += args[0].nbytes + written.nbytes
        return result


def seen(model: Any, inputs: Any) -> Kernels:
    with torch.no_grad(), Kernels() as kernels:
        model(inputs)
    return kernels


def linears() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU())
    return model, torch.randn(5, 8)


def convolutions() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 2, stride=2))
    return model.append(nn.ReLU()).double(), torch.randn(3, 2, 8, 8).double()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.fc(torch.relu(self.fc(x))))


MODELS = {
    "linears": linears,
    "convolutions": convolutions,
    "twice": lambda: (Twice(), torch.randn(2, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_savings_are_what_native_layers_run(name: str) -> None:
    native, inputs = MODELS[name]()
    fused = tft.fuse(native)
    savings = [row.saving for row in twinfuse.explain(fused, inputs) if row.saving]
    expected, ours = seen(native, inputs), seen(fused, inputs)
    assert sum(saving.bytes for saving in savings) == expected.bytes - ours.bytes > 0
    kernels = sum(saving.kernels * saving.calls for saving in savings)
    assert kernels == expected.count - ours.count > 0


@pytest.mark.parametrize("affine", [True, False])
def test_folding_counts_against_a_norm(affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_norm, "MIN_INPUTS", 0)
    monkeypatch.setattr(_norm, "MIN_INPUTS_A_WEIGHT", 0)
    native = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=affine), nn.ReLU()).eval()
    fused, inputs = tft.fuse(native), torch.randn(3, 2, 8, 8)
    (saving,) = (row.saving for row in tft.explain(fused, inputs) if row.saving)
    expected, ours = seen(native, inputs), seen(fused, inputs)
    assert saving.kernels == expected.count - ours.count < 0
    assert saving.bytes == expected.bytes - 2 * native[0].weight.nbytes
    (unknown,) = (row.saving for row in tft.explain(fused) if row.saving)
    assert unknown.bytes is None and unknown.calls is None
    assert str(unknown) == f"16 B an element - 864 B, {saving.kernels} kernels a call"


def test_small_inputs_of_a_folded_norm() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
    fused = tft.fuse(model)
    text = f"inputs of fewer than {4 * 64 * 64 * 9} elements run natively"
    row, norm_row = tft.explain(fused)
    assert row.backend == "cpu" and text in row.reason and norm_row.backend == "fused"
    row, _ = tft.explain(fused, torch.randn(1, 64, 48, 47))
    assert (row.op, row.backend, row.saving) == ("conv2d", "native", None) and text in row.reason
    row, _ = tft.explain(fused, torch.randn(1, 64, 48, 48))
    assert (row.op, row.backend, row.reason) == ("conv2d_relu", "cpu", "")
    assert row.saving is not None and row.saving.elements == 64 * 46 * 46


def test_the_table_and_the_records() -> None:
    fused = tft.fuse(linears()[0])
    table = str(tft.explain(fused, torch.randn(1024, 8)))
    assert table.splitlines()[0].split() == [
        *("layer", "op", "backend", "kernel", "saves", "reason"),
    ]
    assert "128 KiB, 1 kernel" in table and "48 KiB, 1 kernel" in table
    assert "8 B an element, 1 kernel a call" in str(tft.explain(fused))
    records = json.loads(json.dumps(tft.explain(fused, {"input": torch.randn(2, 8)}).records()))
    assert [record["where"] for record in records] == ["0", "1", "2", "3"]
    assert records[0]["saving"]["bytes"] == 2 * 2 * 16 * 4 and records[1]["saving"] is None


def test_a_run_leaves_the_model_as_it_was() -> None:
    model, inputs = linears()
    model.append(nn.Dropout(0.5)).append(nn.BatchNorm1d(6))
    fused = tft.fuse(model).train()
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    state = torch.get_rng_state()
    tft.explain(fused, inputs)
    assert torch.equal(torch.get_rng_state(), state) and fused.training
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    assert not any(module._forward_hooks for module in fused.modules())


@pytest.mark.parametrize("given", [None, torch.randn(2, 3, 8)])
def test_of_an_lstm_nothing_is_estimated(given: Any) -> None:
    (row,) = tft.explain(tft.fuse(nn.LSTM(8, 8)), given)
    assert row.backend == "cpu" and row.saving is None
