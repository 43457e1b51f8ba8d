"""`twinfuse.tune` on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require, skip

torch = require("torch")
if not torch.cuda.is_available():
    skip("gpu", "no CUDA device")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse import _tuning  # noqa: E402


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With an empty cache, and no choice left behind."""
    monkeypatch.setenv("TWINFUSE_CACHE", str(tmp_path))
    yield
    _tuning.library().twinfuse_tune_select(None)


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [tft.nn.ConvReLU2d(16, 32, 3, padding=1), torch.nn.Flatten()]
    layers += [tft.nn.LinearReLU(32 * 64, 256), tft.nn.LinearReLU(256, 64)]
    model = torch.nn.Sequential(*layers).to("cuda", torch.bfloat16)
    x = torch.randn(64, 16, 8, 8, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = model(x)
    report = twinfuse.tune(model, x)
    assert "twinfuse.tune" in capsys.readouterr().err
    assert all(parameter.grad is None for parameter in model.parameters())
    ops = {"linear_relu", "linear_relu_backward", "conv_relu", "conv_relu_backward"}
    assert {row.op for row in report} == ops
    assert all(0 < row.after < 1 and row.before > 0 for row in report)
    assert report.path is not None and report.path.parent == tmp_path
    assert {choice["problem"] for choice in _tuning.read(report.path)} == {
        row.problem for row in report
    }
    with twinfuse.strict():
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)

    # Another process takes them at its first call.
    program = textwrap.dedent("""
        import torch, twinfuse.torch as tft
        from twinfuse import _tuning
        x, w = (torch.randn(64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        b = w[:, 0].contiguous()
        tft.linear_relu(x, w, b)
        with _tuning.Session(_tuning.library()) as session, torch.no_grad():
            for problem in session.record(lambda: tft.linear_relu(x, w, b)):
                print(problem.name, problem.candidates[problem.taken].kernel, sep="|")
    """)
    environment = os.environ | {"TWINFUSE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program]
    printed = subprocess.check_output(command, env=environment, text=True)
    problem, kernel = printed.strip().split("|")
    assert kernel == {row.problem: row.kernel for row in report}[problem]


def test_what_runs_on_no_kernel() -> None:
    x = torch.randn(8, 8, device="cuda")
    with pytest.raises(RuntimeError, match="no use of fused ops"):
        twinfuse.tune(torch.relu, x)
