"""Which convolutions on a GPU are left to torch, by shapes; `test_gpu_torch` launches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse import _core  # noqa: E402
from twinfuse.torch import _conv_choice, conv_relu  # noqa: E402


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
        _conv_choice.left_to_torch(trained, x, w, conv),
        _conv_choice.gradients_left_to_torch(x, w, conv),
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


def test_windows_of_one_pixel_train_fast() -> None:
    assert not any(reasons("float32", (64, 56, 256, 1), True, trained=True))
    assert not any(reasons("float32", (512, 28, 128, 1), True, trained=True))
    assert all(reasons("float32", (1024, 28, 256, 1), True, trained=True))


def test_what_no_kernel_serves() -> None:
    """It falls back, with a warning, however large it is."""
    assert not any(reasons("float64", (256, 56, 64, 1), False, trained=True))
    x, w = torch.empty(64, 64, 56, 56, device="meta"), torch.empty(64, 1, 3, 3, device="meta")
    conv = (1, 1, 1, 1, 1, 1, 1, 1)
    assert not _conv_choice.left_to_torch(True, x, w, (*conv, 64))
    assert _conv_choice.left_to_torch(True, x[:, :1], w, (*conv, 1))


def test_what_was_asked_for() -> None:
    """A backend that is named is taken, and float32 that is no TF32 is left to kernels."""
    layer = ("float32", (3, 224, 64, 7), True)
    assert all(reasons(*layer))
    with twinfuse.use_backend("cuda"):
        assert not any(reasons(*layer))
    torch.backends.cudnn.allow_tf32 = False
    assert not any(reasons(*layer))


CALLS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "2d": (tft.conv2d_relu, (2, 3, 6, 7), (5, 3, 3, 3), {"padding": 1}),
    "2d_strided": (tft.conv2d_relu, (2, 4, 6, 7), (6, 2, 3, 2), {"stride": (2, 1), "groups": 2}),
    "2d_without_a_batch": (tft.conv2d_relu, (3, 6, 7), (2, 3, 1, 1), {}),
    "2d_same_even": (tft.conv2d_relu, (2, 3, 6, 7), (5, 3, 2, 4), {"padding": "same"}),
    "1d": (tft.conv1d_relu, (2, 3, 9), (5, 3, 4), {"padding": "same", "dilation": 2}),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is large, and the choice is made as for tensors of a GPU."""
    monkeypatch.setattr(_conv_choice, "_LARGE", 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_as_native(
    call: str,
    whole: bool,
    as_on_a_gpu: None,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results and gradients of both orders, whatever is left to torch."""
    function, *shapes, options = CALLS[call]
    native = torch.nn.functional.conv1d if "1d" in call else torch.nn.functional.conv2d
    if not whole:
        monkeypatch.setattr(conv_relu, "_is_left_to_torch", lambda *_: "")
    draws = (torch.randint(-3, 4, shape).float() for shape in (*shapes, shapes[1][:1]))
    inputs = [t.requires_grad_() for t in draws]
    with (
        launched("conv_relu_forward_f32", times=int(not whole)),
        launched("conv_relu_backward_f32", times=0),
    ):
        got = function(*inputs, **options)
        gradients = torch.autograd.grad(got.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), inputs[1])
    wanted = native(*inputs, **options).relu()
    firsts = torch.autograd.grad(wanted.sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(firsts[0].square().sum(), inputs[1])
    torch.testing.assert_close((got, *gradients, *second), (wanted, *firsts, *expected))


def test_inference_and_named_backends(as_on_a_gpu: None, launched: Launched) -> None:
    x, w = torch.randn(2, 3, 6, 7), torch.randn(5, 3, 3, 3)
    expected = torch.nn.functional.conv2d(x, w).relu()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), launched("conv_relu_forward_f32", times=0):
            torch.testing.assert_close(tft.conv2d_relu(x, w), expected)
    trained = w.clone().requires_grad_()
    with twinfuse.use_backend("cpu"), launched("conv_relu_forward_f32", times=1):
        got = tft.conv2d_relu(x, trained)
    # What was decided holds for the backward pass.
    with launched("conv_relu_backward_f32", times=1):
        got.sum().backward()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stride": 0}, "stride: expected 1 or more, got 0"),
        ({"padding": -1}, "padding: expected 0 or more, got -1"),
        ({"dilation": 9}, "weight: expected a kernel no larger than the padded input"),
        ({"groups": 3}, "input: expected 9 channels"),
    ],
)
def test_errors(options: dict[str, Any], text: str, as_on_a_gpu: None) -> None:
    x, w = torch.randn(2, 3, 6, 7), torch.randn(6, 3, 3, 3)
    with pytest.raises(RuntimeError, match=f"conv2d_relu: {text}"):
        tft.conv2d_relu(x, w, **options)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast() -> Iterator[None]:
    """As `torch.autocast("cuda", torch.bfloat16)`, which turns itself off without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("size", [8, 224])
def test_other_ways(size: int, cast: bool) -> None:
    """What compilers, autocast and modes see: the public operator makes the same choice."""
    with FakeTensorMode(), Operators() as seen, autocast() if cast else nullcontext():
        x = torch.empty(64, 3, size, size, device="cuda")
        # No gradients: torch aborts where autograd meets a device that its build has not.
        w = torch.empty(64, 3, 7, 7, device="cuda")
        output = tft.conv2d_relu(x, w)
    assert output.dtype == (torch.bfloat16 if cast else torch.float32)
    assert any("twinfuse" in name for name in seen.names) is (size == 8), seen.names
    assert any("aten.convolution" in name for name in seen.names) is (size == 224), seen.names


def test_sizes_that_are_not_known() -> None:
    """They are not compared, so that they stay unknown."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        unknown = shapes.create_unbacked_symint()
        torch._check(unknown >= 0)
        x = torch.empty(unknown, 3, 224, 224, device="cuda")
        w = torch.empty(64, 3, 7, 7, device="cuda")
        assert not _conv_choice.left_to_torch(True, x, w, (1, 1, 1, 1, 0, 0, 0, 0, 1))


def layers() -> tuple[Any, Any, Any]:
    """Fused by themselves, with a BatchNorm, and with a clamp."""

    class Clamped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(64, 128, 3)

        def forward(self, x: Any) -> Any:
            return self.conv(x).clamp(min=0)

    conv = torch.nn.Conv2d(64, 128, 3)
    norm = torch.nn.Sequential(
        torch.nn.Conv2d(64, 128, 3), torch.nn.BatchNorm2d(128), torch.nn.ReLU()
    ).eval()
    return torch.nn.Sequential(conv, torch.nn.ReLU()), norm, Clamped()


def test_what_explain_says_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    models = [tft.fuse(model) for model in layers()]
    alone, norm, clamp = (twinfuse.explain(model)[0].reason for model in models)
    assert alone.startswith("large calls: torch's own operators are faster"), alone
    assert alone.endswith("in training"), alone
    # These are never trained by kernels, and say what matters more.
    assert "large calls" not in norm + clamp, (norm, clamp)
    assert "no gradients are asked for" in clamp, clamp
    halves = [twinfuse.explain(model.bfloat16())[0].reason for model in models]
    assert not halves[0] and "large calls" not in "".join(halves), halves


def test_what_explain_counts(as_on_a_gpu: None) -> None:
    """A call that is left to torch saves nothing."""
    model = tft.fuse(layers()[0])
    row = twinfuse.explain(model, torch.randn(2, 64, 4, 4))[0]
    assert row.saving is not None and row.saving.calls == 1
    strided = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1), torch.nn.ReLU())
    row = twinfuse.explain(tft.fuse(strided), torch.randn(2, 64, 4, 4))[0]
    assert row.saving is not None and row.saving.calls == 0


def test_what_explain_says_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "device_backend", lambda index: ("cuda", ""))
    with FakeTensorMode():
        x = torch.empty(64, 64, 56, 56, device="cuda")
        w = torch.empty(128, 64, 3, 3, device="cuda", requires_grad=True)
        rows = twinfuse.explain(tft.conv2d_relu, x, w)
        with autocast():
            cast = twinfuse.explain(tft.conv2d_relu, x, w)
    assert [row.backend for row in rows] == ["reference", "reference"], rows
    assert all("in TF32, in training" in row.reason for row in rows), rows
    assert [row.backend for row in cast] == ["cuda", "cuda"], cast
