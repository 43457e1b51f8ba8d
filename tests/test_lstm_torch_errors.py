"""`twinfuse.torch.lstm` and `lstm_cell`: wrong calls, and calls that only torch itself serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

from torch.nn.utils.rnn import PackedSequence  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

Call = tuple[Callable[[], tuple[Any, ...]], str]
r = torch.randn


def cell(**other: Any) -> tuple[Any, ...]:
    """Arguments of a good call, but for those that are given."""
    weights = {"weight_ih": r(20, 4), "weight_hh": r(20, 5), "bias_ih": r(20), "bias_hh": r(20)}
    arguments: dict[str, Any] = {"input": r(2, 4), "hx": (r(2, 5), r(2, 5))} | weights
    return tuple((arguments | other).values())


WRONG_CELLS: dict[str, Call] = {
    "input_columns": (lambda: cell(input=r(2, 3)), "weight_ih: expected [20, 3], got"),
    "input_3d": (lambda: cell(input=r(1, 2, 4)), "input: expected [B, I], got"),
    "input_1d": (lambda: cell(input=r(4)), "input: expected [B, I], got"),
    "h_columns": (lambda: cell(hx=(r(2, 6), r(2, 5))), "hx[0]: expected [2, 5], got"),
    "h_rows": (lambda: cell(hx=(r(1, 5), r(2, 5))), "hx[0]: expected [2, 5], got"),
    "c_columns": (lambda: cell(hx=(r(2, 5), r(2, 6))), "hx[1]: expected [2, 5], got"),
    "c_rows": (lambda: cell(hx=(r(2, 5), r(3, 5))), "hx[1]: expected [2, 5], got"),
    "weight_rows": (lambda: cell(weight_hh=r(16, 5)), "weight_hh: expected [20, 5], got"),
    "weight_gates": (lambda: cell(weight_ih=r(18, 4)), "weight_ih: expected [4H, I], got"),
    "bias_length": (lambda: cell(bias_ih=r(16)), "bias_ih: expected [20], got"),
    "dtype": (lambda: cell(input=r(2, 4).double()), "hx[0]: expected torch.float64 like input"),
    "h_dtype": (
        lambda: cell(hx=(r(2, 5).half(), r(2, 5))),
        "hx[0]: expected torch.float32 like input, got torch.float16",
    ),
    "integers": (lambda: tuple(map(as_int, cell())), "got torch.int32"),
    "device": (
        lambda: cell(input=r(2, 4, device="meta")),
        "hx[0]: expected device meta like input, got cpu",
    ),
    "hx_tensor": (lambda: cell(hx=r(2, 2, 5)), "hx: expected a pair of tensors, got Tensor"),
    "hx_three": (lambda: cell(hx=(r(2, 5),) * 3), "hx: expected two tensors, got 3"),
    "weight_none": (lambda: cell(weight_hh=None), "weight_hh: expected a plain tensor"),
    "list": (lambda: cell(input=[[1.0]]), "must be Tensor, not list"),
}


def as_int(value: Any) -> Any:
    return tuple(map(as_int, value)) if isinstance(value, tuple) else value.int()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", WRONG_CELLS)
def test_wrong_cells_raise_what_native_raises(name: str, requires_grad: bool) -> None:
    make, text = WRONG_CELLS[name]
    arguments = make()
    if requires_grad and isinstance(arguments[2], torch.Tensor) and name != "integers":
        arguments[2].requires_grad_()
    with pytest.raises(Exception) as expected:
        torch.lstm_cell(*arguments)
    with pytest.raises(Exception) as got:
        tft.lstm_cell(*arguments)
    assert type(got.value) is type(expected.value)
    assert str(got.value).startswith("lstm_cell: ") or name == "list"
    assert text in str(got.value)


def layer(**other: Any) -> tuple[Any, ...]:
    """As `cell`; of a layer without options."""
    weights = {"weight_ih": r(20, 4), "weight_hh": r(20, 5), "bias_ih": r(20), "bias_hh": r(20)}
    params = [other.pop(name, weight) for name, weight in weights.items()]
    arguments = {"input": r(3, 2, 4), "hx": (r(1, 2, 5), r(1, 2, 5)), "params": params} | other
    return (*arguments.values(), *(True, 1, 0.0, False, False, False)[len(arguments) - 3 :])


WRONG_LAYERS: dict[str, Call] = {
    "steps": (lambda: layer(input=r(0, 2, 4)), "input: expected one step or more, got"),
    "input_2d": (lambda: layer(input=r(3, 4)), "input: expected [T, B, I], got"),
    "dtype": (lambda: layer(input=r(3, 2, 4).double()), "hx[0]: expected torch.float64 like"),
    "h_dtype": (
        lambda: layer(hx=(r(1, 2, 5).double(), r(1, 2, 5))),
        "hx[0]: expected torch.float32 like input, got torch.float64",
    ),
    "bias": (lambda: layer(bias_ih=r(16)), "params[2]: expected [20], got"),
    "params": (lambda: layer(params=[r(20, 4), r(20, 5)]), "params: expected 4 tensors, or 5"),
    "layers": (lambda: layer(has_biases=True, num_layers=2), "params: expected 8 tensors, or 10"),
    "hx_tensor": (lambda: layer(hx=r(2, 1, 2, 5)), "hx: expected a pair of tensors, got Tensor"),
    "hx_one": (lambda: layer(hx=(r(1, 2, 5),)), "hx: expected two tensors, got 1"),
    "weight_none": (lambda: layer(weight_hh=None), "params[1]: expected a plain tensor"),
}


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_wrong_layers_raise_what_native_raises(name: str) -> None:
    make, text = WRONG_LAYERS[name]
    arguments = make()
    with pytest.raises(Exception) as expected:
        torch.lstm(*arguments)
    with pytest.raises(Exception) as got:
        tft.lstm(*arguments)
    wanted = RuntimeError if name == "input_2d" else type(expected.value)  # native: IndexError
    assert type(got.value) is wanted
    assert str(got.value).startswith("lstm: ")
    assert text in str(got.value)


# Native computes with what lies behind these in memory.
UNCHECKED: dict[str, Call] = {
    "h_batch": (lambda: layer(hx=(r(1, 3, 5), r(1, 2, 5))), "hx[0]: expected [1, 2, 5], got"),
    "c_batch": (lambda: layer(hx=(r(1, 2, 5), r(1, 1, 5))), "hx[1]: expected [1, 2, 5], got"),
    "h_layers": (lambda: layer(hx=(r(2, 2, 5), r(1, 2, 5))), "hx[0]: expected [1, B, n], got"),
    "h_columns": (lambda: layer(hx=(r(1, 2, 6), r(1, 2, 5))), "hx[0]: expected [1, 2, 5], got"),
    "inputs": (lambda: layer(input=r(3, 2, 3)), "params[0]: expected [20, 3], got"),
    "weight": (lambda: layer(weight_ih=r(20, 7)), "params[0]: expected [20, 4], got"),
    "gates": (lambda: layer(weight_hh=r(16, 5)), "params[1]: expected [20, 5], got"),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_wrong_sizes_never_reach_native(name: str) -> None:
    make, text = UNCHECKED[name]
    with pytest.raises(RuntimeError) as got:
        tft.lstm(*make())
    assert str(got.value).startswith("lstm: ") and text in str(got.value)
    with twinfuse.use_backend("reference"), pytest.raises(RuntimeError) as got:
        tft.lstm(*make())
    assert text in str(got.value)


def packed(sizes: list[int], rows: int) -> PackedSequence:
    return PackedSequence(r(rows, 4), torch.tensor(sizes))


OPTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "activation": (
        lambda: tft.lstm(*layer(), activation="swish"),
        ValueError,
        "lstm: activation: expected one of 'tanh', 'sigmoid', 'relu', 'hard_sigmoid', got 'swish'",
    ),
    "recurrent_activation": (
        lambda: tft.lstm_cell(*cell(), recurrent_activation="linear"),
        ValueError,
        "lstm_cell: recurrent_activation: expected one of",
    ),
    "zoneout": (
        lambda: tft.lstm(*layer(), zoneout_cell=1.5),
        ValueError,
        "lstm: zoneout_cell: expected a number from 0 to 1, got 1.5",
    ),
    "zoneout_of_cell": (
        lambda: tft.lstm_cell(*cell(), zoneout_hidden=r(3, 5)),
        RuntimeError,
        "lstm_cell: zoneout_hidden: expected what broadcasts to [2, 5], got shape [3, 5]",
    ),
    "mask": (
        lambda: tft.lstm(*layer(), mask=torch.ones(2, 3, dtype=torch.bool)),
        RuntimeError,
        "lstm: mask: expected [3, 2], got shape [2, 3]",
    ),
    "mask_dtype": (
        lambda: tft.lstm(*layer(), mask=torch.ones(3, 2)),
        RuntimeError,
        "lstm: mask: expected bool, got torch.float32",
    ),
    "mask_packed": (
        lambda: tft.lstm(packed([2, 1], 3), *layer()[1:], mask=torch.ones(2, 2) > 0),
        RuntimeError,
        "lstm: mask: expected None with a PackedSequence",
    ),
    "peepholes": (
        lambda: tft.lstm(*layer(), peepholes=[r(3, 5), r(3, 5)]),
        RuntimeError,
        "lstm: peepholes: expected 1 tensors, got 2",
    ),
    "peephole": (
        lambda: tft.lstm(*layer(), peepholes=[r(3, 4)]),
        RuntimeError,
        "lstm: peepholes[0]: expected [3, 5], got shape [3, 4]",
    ),
    "packed_state": (
        lambda: tft.lstm(packed([3, 1], 4), *layer()[1:]),
        RuntimeError,
        "lstm: hx[0]: expected [1, 3, 5], got shape [1, 2, 5]",
    ),
    "packed_rows": (
        lambda: tft.lstm(packed([2, 1], 7), None, *layer()[2:]),
        RuntimeError,
        "lstm: batch_sizes: expected",
    ),
    "packed_increasing": (
        lambda: tft.lstm(packed([1, 2], 3), None, *layer()[2:]),
        RuntimeError,
        "lstm: batch_sizes: expected",
    ),
    "packed_dtype": (
        lambda: tft.lstm(PackedSequence(r(3, 4), torch.tensor([2.0, 1.0])), None, *layer()[2:]),
        RuntimeError,
        "lstm: batch_sizes: expected int64",
    ),
}


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name: str) -> None:
    call, kind, text = OPTIONS[name]
    with pytest.raises(kind) as got:
        call()
    assert text in str(got.value)


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
def test_gradients_of_zoneouts() -> None:
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
        assert torch.autograd.gradcheck(lambda share: op(x, h, c, *weights, None, share), (share,))
    sequence = x.unsqueeze(0)
    with pytest.warns(twinfuse.FallbackWarning, match="zoneout_hidden: no kernel computes its"):
        assert torch.autograd.gradcheck(
            lambda share: torch.ops.twinfuse.lstm(
                sequence, h, c, *weights, None, None, None, None, share
            ),
            (share,),
        )


def test_operators_and_their_traces_raise() -> None:
    x, (h, c), *weights = cell()
    for arguments in (
        (r(2, 3), h, c, *weights),
        (x, r(3, 5), c, *weights),
        (x, h, c, weights[0], r(16, 5), *weights[2:]),
        (x, h, c.double(), *weights),
    ):
        for device in ("cpu", "meta"):
            moved = [a.to(device) for a in arguments]
            with pytest.raises(RuntimeError, match=r"lstm_cell: [a-z_]+: expected"):
                torch.ops.twinfuse.lstm_cell(*moved)
            moved[0] = moved[0].unsqueeze(0)
            with pytest.raises(RuntimeError, match=r"lstm: [a-z_]+: expected"):
                torch.ops.twinfuse.lstm(*moved)


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
        options: tuple[Any, ...] = (*(None,) * 3, 0, 1)
    else:
        forward, backward = ops._lstm, ops._lstm_backward
        x, options = x.unsqueeze(0), (*(None,) * 6, 0, 1, False, False, False)

    def wide(tensors: Any) -> list[Any]:
        return [tensor.to(torch.complex64) for tensor in tensors]

    call = (x, h, c, *weights)
    expected = forward(*call, *options, True)
    with pytest.warns(twinfuse.FallbackWarning, match="no kernel takes this dtype"):
        got = forward(*wide(call), *options, True)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.real, b)

    state = (h, c) if name == "lstm_cell" else ()
    call = (*expected, x, *state, *weights[:2])
    got = backward(*wide(call), *options, 63)
    for a, b in zip(got[:6], backward(*call, *options, 63)):
        torch.testing.assert_close(a.real, b)
    assert all(each is None for each in got[6:])
    with twinfuse.strict(), pytest.raises(RuntimeError, match="runs on the framework's own layers"):
        backward(*wide(call), *options, 63)


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
