"""`twinfuse.torch.lstm` and `lstm_cell`: calls that only torch itself serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_lstm_arguments import cell, layer  # noqa: E402
from twinfuse.torch import _binding  # noqa: E402

r = torch.randn


SERVED_BY_NATIVE: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], str]] = {
    "wide_cell_state": (
        "lstm_cell",
        lambda: cell(hx=(r(2, 5), r(2, 5).double())),
        "hx[1]: expected torch.float32 like input, got torch.float64",
    ),
    "bias_of_one": ("lstm_cell", lambda: cell(bias_ih=r(1)), "bias_ih: expected [20], got"),
    "sparse": ("lstm_cell", lambda: cell(input=r(2, 4).to_sparse()), "input: expected a dense"),
}


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", SERVED_BY_NATIVE)
def test_unusual_calls_take_the_native_path(name: str, launched: Launched) -> None:
    op, make, reason = SERVED_BY_NATIVE[name]
    ours, native, arguments = getattr(tft, op), getattr(torch, op), make()
    with pytest.warns(twinfuse.FallbackWarning) as warned, launched(op, times=0):
        got = ours(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, native(*arguments)))
    fallbacks = [w for w in warned if w.category is twinfuse.FallbackWarning]
    assert len(fallbacks) == 1 and reason in str(fallbacks[0].message)
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match=op):
        ours(*arguments)


@pytest.mark.allow_fallback
def test_gradients_of_noise() -> None:
    share = torch.full((5,), 0.25, dtype=torch.float64, requires_grad=True)
    arguments = tuple(
        tuple(t.double() for t in a) if isinstance(a, tuple) else a.double() for a in cell()
    )
    with pytest.warns(twinfuse.FallbackWarning, match="zoneout_cell: no kernel computes its"):
        assert torch.autograd.gradcheck(
            lambda share: tft.lstm_cell(*arguments, zoneout_cell=share), (share,)
        )
    x, (h, c), *weights = arguments
    op = torch.ops.twinfuse.lstm_cell
    with pytest.warns(twinfuse.FallbackWarning, match="zoneout_hidden: no kernel computes its"):
        assert torch.autograd.gradcheck(
            lambda share: op(x, h, c, *weights, None, None, share), (share,)
        )
    sequence = x.unsqueeze(0)
    with pytest.warns(twinfuse.FallbackWarning, match="zoneout_hidden: no kernel computes its"):
        assert torch.autograd.gradcheck(
            lambda share: torch.ops.twinfuse.lstm(sequence, h, c, *weights, zoneout_hidden=share),
            (share,),
        )
    factors = torch.rand(4, 2, 5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(twinfuse.FallbackWarning, match="dropout_hidden: no kernel computes its"):
        assert torch.autograd.gradcheck(
            lambda factors: tft.lstm_cell(*arguments, dropout_hidden=factors), (factors,)
        )
    state = (h.unsqueeze(0), c.unsqueeze(0))
    with pytest.warns(twinfuse.FallbackWarning, match="dropout_input: no kernel computes its"):
        assert torch.autograd.gradcheck(
            lambda factors: tft.lstm(sequence, state, weights, dropouts_input=[factors])[0],
            (factors[..., :4].detach().requires_grad_(),),
        )


def test_reference_backend_launches_nothing(launched: Launched) -> None:
    arguments, one = layer(), cell()
    with twinfuse.use_backend("reference"), launched("lstm", times=0):
        output, (h, c) = tft.lstm(*arguments)
        step = tft.lstm_cell(*one)
    for got, expected in zip((output, h, c), torch.lstm(*arguments)):
        assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(step, torch.lstm_cell(*one)))
    with twinfuse.use_backend("cpu"), launched("lstm_forward_f32", times=1):
        tft.lstm(*arguments)


def test_meta_tensors() -> None:
    layer = tft.nn.LSTM(4, 5, num_layers=2, bidirectional=True, device="meta")
    output, (h, c) = layer(r(3, 2, 4, device="meta"))
    assert output.device.type == "meta" and output.shape == (3, 2, 10)
    assert h.shape == c.shape == (4, 2, 5)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", ["lstm_cell", "lstm"])
def test_binding_has_its_own_reference(name: str) -> None:
    """Below Python, what no kernel takes runs on torch's operators too, and is reported."""
    x, (h, c), *weights = cell()
    ops = torch.ops.twinfuse
    if name == "lstm_cell":
        forward, backward = ops._lstm_cell, ops._lstm_cell_backward
    else:
        forward, backward = ops._lstm, ops._lstm_backward
        x = x.unsqueeze(0)
    norm, share = r(2, 20), torch.rand(4, 1, 5)
    options = {"norm": norm, "dropout_hidden": share, "norm_epsilon": 0.5}

    def wide(tensors: Any) -> list[Any]:
        return [tensor.to(torch.complex64) for tensor in tensors]

    wider = options | {"norm": norm.to(torch.complex64), "dropout_hidden": share + 0j}
    call = (x, h, c, *weights)
    expected = forward(True, *call, **options)
    with pytest.warns(twinfuse.FallbackWarning, match="no kernel takes this dtype"):
        got = forward(True, *wide(call), **wider)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.real, b)

    state = (h, c) if name == "lstm_cell" else ()
    call = (*expected, x, *state, *weights[:2])
    needs = 63 + (128 if name == "lstm_cell" else 256)
    got = backward(needs, *wide(call), **wider)
    for a, b in zip(got, backward(needs, *call, **options)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.real, b)
    assert [each is None for each in got] == [False] * 6 + [True] * (len(got) - 7) + [False]
    with twinfuse.strict(), pytest.raises(RuntimeError, match="runs on the framework's own layers"):
        backward(needs, *wide(call), **wider)


@pytest.mark.parametrize("name", ["lstm_cell", "lstm"])
def test_binding_may_leave_it_to_native_layers(name: str) -> None:
    """As calls from Python ask of it for tensors on a GPU: native has kernels there."""
    x, (h, c), *weights = (
        tuple(t + 0j for t in a) if isinstance(a, tuple) else a + 0j for a in cell()
    )
    op = getattr(torch.ops.twinfuse, f"_{name}")
    x = x if name == "lstm_cell" else x.unsqueeze(0)
    with _binding.raising, pytest.raises(RuntimeError, match=f"^{name}: no kernel takes this"):
        op(False, x, h, c, *weights)
    with twinfuse.strict(False), pytest.warns(twinfuse.FallbackWarning):
        op(False, x, h, c, *weights)


WITHOUT_BINDING = """
import warnings
import torch
from twinfuse import _core
_core.LIBRARY = _core.LIBRARY.with_name("absent.so")
import twinfuse, twinfuse.torch as tft
layer = tft.nn.LSTM(4, 5, dtype=torch.double)
native = torch.nn.LSTM(4, 5, dtype=torch.double)
native.load_state_dict(layer.state_dict())
x = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)
params = list(layer.parameters())
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    assert torch.equal(layer(x)[0], native(x)[0])
    output, h, c = torch.ops.twinfuse.lstm(x, None, None, *params)
    torch.testing.assert_close(output, native(x)[0])
    op = lambda *a: torch.ops.twinfuse.lstm(a[0], None, None, *a[1:])
    assert torch.autograd.gradcheck(op, (x, *params), fast_mode=True)
    assert torch.equal(tft.lstm_cell(x[0], (h, c), *params)[0],
                       torch.lstm_cell(x[0], (h, c), *params)[0])
messages = [str(w.message) for w in warned if w.category is twinfuse.FallbackWarning]
assert len(messages) == 2 and all("compiled core is missing" in m for m in messages), messages
output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
torch.testing.assert_close(output, native(x)[0])
assert twinfuse.explain(tft.lstm, x, None, params)[0].backend == "reference"
"""


@pytest.mark.slow
def test_everything_works_without_the_compiled_core() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_BINDING], check=True)
