"""Which convolutions on a GPU are left to torch, by shapes; `test_gpu_torch` launches them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import require

torch = require("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import twinfuse  # noqa: E402
from twinfuse.torch import _conv_choice  # noqa: E402


@pytest.fixture(autouse=True)
def _as_torch_has_it() -> Iterator[None]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def reasons(
    dtype: str,
    layer: tuple[int, ...],
    last: bool,
    *,
    stride: int = 1,
    batch: int = 64,
    trained: bool = False,
) -> tuple[str, str]:
    """Of the whole call, and of its gradients; `layer`: channels, size, filters, taps."""
    c, size, k, taps = layer
    form = torch.channels_last if last else torch.contiguous_format
    kind = {"dtype": getattr(torch, dtype), "device": "meta"}
    x = torch.empty(batch, c, size, size, **kind).contiguous(memory_format=form)
    w = torch.empty(k, c, taps, taps, **kind).contiguous(memory_format=form)
    pad = taps // 2
    conv = (stride, stride, 1, 1, pad, pad, pad, pad, 1)
    return (
        _conv_choice.why_native(trained, x, w, conv),
        _conv_choice.why_native_gradients(x, w, conv),
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "layer", "whole"),
    [
        ("float32", (64, 56, 128, 3), False),
        ("float32", (64, 56, 64, 3), True),
        ("float32", (256, 56, 64, 1), False),
        ("float32", (3, 64, 128, 3), True),
        ("bfloat16", (3, 224, 64, 7), True),
        ("bfloat16", (3, 64, 64, 3), False),
        ("float16", (64, 56, 64, 3), False),
    ],
)
def test_whole_calls(dtype: str, layer: tuple[int, ...], whole: bool, last: bool) -> None:
    expected = whole or (layer[3] == 1 and not last)
    reason, _ = reasons(dtype, layer, last)
    assert bool(reason) is expected, reason
    assert not reason or reason.startswith("torch's own operators are faster on a GPU")


def test_windows_of_one_pixel() -> None:
    assert reasons("bfloat16", (256, 56, 64, 1), False)[0]
    assert not reasons("bfloat16", (64, 56, 256, 1), False)[0]


def test_training() -> None:
    layer = (64, 56, 128, 3)
    assert all(reasons("float32", layer, True, trained=True))
    assert not any(reasons("bfloat16", layer, True, trained=True))
    assert not any(reasons("bfloat16", layer, True, trained=True, stride=2))
    whole, gradients = reasons("bfloat16", layer, False, trained=True, stride=2)
    assert gradients and not whole


def test_small_layers() -> None:
    """There launches count, of which a fused layer has fewer."""
    assert not any(reasons("float32", (3, 32, 6, 5), False, trained=True))
    assert all(reasons("float32", (3, 224, 64, 7), False, trained=True))
    assert not any(reasons("float32", (3, 224, 64, 7), False, trained=True, batch=1))
    assert not any(reasons("float32", (3, 8, 6, 5), False, trained=True, batch=0))


def test_what_explain_says_of_a_layer() -> None:
    conv = (1, 1, 1, 1, 0, 0, 0, 0, 1)
    assert not _conv_choice.of_large_calls(torch.empty(128, 64, 3, 3), conv)
    with FakeTensorMode():
        weight = torch.empty(128, 64, 3, 3, device="cuda")
        said = _conv_choice.of_large_calls(weight, conv)
        assert said.startswith("large calls: torch's own operators are faster"), said
        assert said.endswith("in training"), said
        assert not _conv_choice.of_large_calls(weight.bfloat16(), conv)
        strided = _conv_choice.of_large_calls(weight.bfloat16(), (2, 2, *conv[2:]))
        assert "with a stride" in strided, strided


def test_what_was_asked_for() -> None:
    """A backend that is named is taken, and float32 that is no TF32 is left to kernels."""
    layer = ("float32", (3, 224, 64, 7), True)
    assert all(reasons(*layer))
    with twinfuse.use_backend("cuda"):
        assert not any(reasons(*layer))
    torch.backends.cudnn.allow_tf32 = False
    assert not any(reasons(*layer))
