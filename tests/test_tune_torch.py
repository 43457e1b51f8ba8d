"""`twinfuse.tune` without a GPU: which calls it finds, and what it says. Choices: tests/gpu."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse.torch import _operators, _tune  # noqa: E402

if _operators.missing:
    pytest.skip(_operators.missing, allow_module_level=True)


def calls_of(target: Callable[[], Any]) -> list[str]:
    return [str(call) for call in _tune.calls_of(target, "cpu")]


def test_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="measures kernels on a GPU"):
        twinfuse.tune(tft.linear_relu, torch.ones(2, 3), torch.ones(4, 3))


def test_needs_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import twinfuse\n"
        "try: twinfuse.tune(print)\n"
        "except RuntimeError as error: print(error)"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed.startswith("twinfuse.tune measures with torch: ")


def test_finds_a_function() -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    assert calls_of(lambda: tft.linear_relu(x, w)) == ["linear_relu [2, 3], [4, 3] float32"]
    assert calls_of(lambda: torch.relu(x)) == []
    assert _tune.calls_of(lambda: tft.linear_relu(x, w), "cuda") == []


def model() -> Any:
    layers = [tft.nn.ConvReLU2d(3, 4, 3), torch.nn.Flatten(), tft.nn.LinearReLU(4 * 4 * 4, 8)]
    return torch.nn.Sequential(*layers, tft.nn.LinearReLU(8, 8), tft.nn.LinearReLU(8, 8))


FORWARD = [
    "conv_relu [2, 3, 6, 6], [4, 3, 3, 3], [4] float32",
    "linear_relu [2, 64], [8, 64], [8] float32",
    "linear_relu [2, 8], [8, 8], [8] float32",
]
BACKWARD = [
    "linear_relu_backward [2, 8], [2, 8], [2, 8], [8, 8] float32",
    "linear_relu_backward [2, 8], [2, 8], [2, 64], [8, 64] float32",
    "conv_relu_backward [2, 4, 4, 4], [2, 4, 4, 4], [2, 3, 6, 6], [4, 3, 3, 3] float32",
]


def test_finds_every_different_call_of_a_model() -> None:
    net, x = model(), torch.randn(2, 3, 6, 6)
    assert calls_of(lambda: net(x)) == FORWARD + BACKWARD
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():  # without a gradient, tracers see the public operators
        public = [text.replace("conv2d_relu", "conv_relu") for text in calls_of(lambda: net(x))]
    assert public == FORWARD


def test_finds_the_calls_of_a_step_of_training() -> None:
    """Which has a backward pass of its own."""
    net, x = model(), torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def step() -> Any:
        loss = (net(x) ** 2).sum()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    assert [text.split(" ")[0] for text in calls_of(step)] == [
        text.split(" ")[0] for text in FORWARD + BACKWARD
    ]


def test_calls_under_autocast_have_its_type() -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = calls_of(lambda: tft.linear_relu(x, w))
    assert call.endswith("bfloat16")


def test_calls_are_made_again_on_tensors_of_the_same_layout() -> None:
    x = torch.randn(40)[3:33].view(6, 5).t()
    w, b = torch.randn(8, 6)[::2], torch.randn(1).expand(4)
    (call,) = _tune.calls_of(lambda: tft.linear_relu(x, w, b), "cpu")
    for like, tensor in zip(call.tensors, (x, w, b)):
        made = like.make()
        assert made.shape == tensor.shape and made.stride() == tensor.stride()
        assert _tune.Like.of(made) == like == _tune.Like.of(tensor)
    output = call.make()()
    assert output.shape == (5, 4)
    assert not output.requires_grad
    empty = torch.ones(0, 6)
    (call,) = _tune.calls_of(lambda: tft.linear_relu(empty, w), "cpu")
    assert call.make()().shape == (0, 4)


@pytest.mark.parametrize("bar", [True, False])
def test_progress(bar: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if bar:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    calls = _tune.calls_of(lambda: tft.linear_relu(torch.ones(2, 3), torch.ones(4, 3)), "cpu")
    assert list(_tune._progress(calls)) == calls
    printed = capsys.readouterr().err
    assert "twinfuse.tune" in printed
    assert ("1/1: linear_relu [2, 3], [4, 3] float32" in printed) != bar
