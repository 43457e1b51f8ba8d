"""`twinfuse.torch.fuse` on models of `transformers` and MONAI, as they are."""

from __future__ import annotations

import copy
import io
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")
pytest.importorskip("transformers")
pytest.importorskip("monai")

import twinfuse.torch as tft  # noqa: E402
from tests.zoo import (  # noqa: E402
    Case,
    Seen,
    assert_as_good,
    described,
    fold_all,  # noqa: F401
    outputs,
    randomized,
)
from tests.zoo_models import CASES  # noqa: E402

# All whose fused layers have a BatchNorm.
NORMS = ["ResNet basic", "ResNet bottleneck", "ResNet", "DenseNet"]


def made(name: str) -> tuple[Case, Any]:
    torch.manual_seed(0)
    return CASES[name], randomized(CASES[name].make())


def assert_same(case: Case, one: Any, other: Any) -> None:
    with torch.no_grad():
        values = zip(outputs(case, one), outputs(case, other), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in values)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("fold_all")
def test_outputs_and_gradients(name: str, launched: Launched) -> None:
    case, native = made(name)
    with Seen() as seen, launched("", times=0):
        outputs(case, native)
    assert seen.counts == case.runs
    fused = tft.fuse(native)
    with ExitStack() as stack:
        for op in ("linear_relu", "conv_relu", "lstm"):
            count = case.fused.get(op, 0)
            stack.enter_context(launched(f"{op}_forward_", times=count))
        outputs(case, fused)
    assert_as_good(case, fused, native)


@pytest.mark.parametrize("name", ["OPT", "T5"])
def test_deferred(name: str, launched: Launched) -> None:
    """All that the architecture has, though its forward methods do not trace; and undone."""
    case, native = made(name)
    fused = tft.fuse(native, deferred=True)
    assert list(fused.state_dict()) == list(native.state_dict())
    with launched("linear_relu_forward_", times=case.runs["linear_relu"]):
        outputs(case, fused)
    assert_as_good(case, fused, native)
    # One run above, one for the gradients.
    reason = "a ReLU was the first to use 2 of 2 outputs, and fused"
    rows = [row for row in tft.explain(fused) if row.reason == reason]
    assert len(rows) == case.runs["linear_relu"]
    assert {row.backend for row in rows} == {"deferred"}
    assert_same(case, tft.unfuse(fused), native)


@pytest.mark.parametrize("name", CASES)
def test_explain_says_what_runs(name: str) -> None:
    case, native = made(name)
    rows = tft.explain(tft.fuse(native))
    fused = [row for row in rows if row.backend == "cpu"]
    assert bool(fused) == bool(case.fused) and all(row.kernel for row in fused)
    assert not case.reason or any(case.reason in row.reason for row in rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("fold_all")
def test_nothing_else_changes(name: str) -> None:
    case, native = made(name)
    fused = tft.fuse(native)
    for ours, theirs in (
        (fused.named_parameters(), native.named_parameters()),
        (fused.named_buffers(), native.named_buffers()),
    ):
        pairs = list(zip(ours, theirs, strict=True))
        assert all(a == b and x is y for (a, x), (b, y) in pairs)
    assert list(fused.state_dict()) == list(native.state_dict())
    assert_same(case, tft.unfuse(fused), native)

    model = copy.deepcopy(native)
    before = described(model)
    assert tft.fuse(model, inplace=True) is model
    assert (described(model) != before) == bool(case.fused)
    assert described(tft.unfuse(model)) == before
    assert_same(case, model, native)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("fold_all")
def test_saved_and_loaded(name: str) -> None:
    case, native = made(name)
    fused = tft.fuse(native)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = tft.fuse(case.make().eval())
    other.load_state_dict(torch.load(file))
    assert_same(case, other, fused)
    assert_same(case, copy.deepcopy(fused), fused)

    file = io.BytesIO()
    try:
        torch.save(native, file)
    except Exception as error:  # as parametrized modules
        with pytest.raises(type(error)):
            torch.save(fused, io.BytesIO())
        return
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(case, loaded, fused)
    assert_same(case, tft.unfuse(loaded), native)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.usefixtures("fold_all")
def test_statistics_in_training_mode(name: str) -> None:
    case, native = made(name)
    native.train()
    fused = tft.fuse(copy.deepcopy(native), inplace=True)
    assert_same(case, fused, native)
    state = fused.state_dict()
    assert all(torch.equal(state[key], value) for key, value in native.state_dict().items())


def test_a_fused_model_is_saved_as_its_library_does(tmp_path: Path) -> None:
    case, native = made("ResNet bottleneck")
    tft.fuse(native).save_pretrained(tmp_path)
    assert_same(case, type(native).from_pretrained(tmp_path).eval(), native)


def test_small_images_are_not_worth_folding(launched: Launched) -> None:
    case, native = made("ResNet basic")
    with launched("conv_relu", times=0):
        assert_same(case, tft.fuse(native), native)


def test_a_large_network_is_fused_within_two_seconds() -> None:
    import transformers as t

    with torch.device("meta"):
        model = t.ResNetForImageClassification(t.ResNetConfig()).eval()  # a ResNet-50
    start = time.process_time()
    fused = tft.fuse(model)
    assert time.process_time() - start < 2
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count("ConvNormReLU2d") == 1 + 2 * 16
