"""`twinfuse.torch.lstm` and `lstm_cell`: wrong calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

from torch.nn.utils.rnn import PackedSequence  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_lstm_arguments import cell, layer, packed  # noqa: E402

Call = tuple[Callable[[], tuple[Any, ...]], str]
r = torch.randn


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
    "norms": (
        lambda: tft.lstm(*layer(), norms=[r(2, 20), r(2, 20)]),
        RuntimeError,
        "lstm: norms: expected 1 tensors, got 2",
    ),
    "norm": (
        lambda: tft.lstm(*layer(), norms=[r(20)]),
        RuntimeError,
        "lstm: norms[0]: expected [2, 20], got shape [20]",
    ),
    "norm_of_cell": (
        lambda: tft.lstm_cell(*cell(), norm=r(2, 5)),
        RuntimeError,
        "lstm_cell: norm: expected [2, 20], got shape [2, 5]",
    ),
    "norm_dtype": (
        lambda: tft.lstm(*layer(), norms=[r(2, 20).double()]),
        RuntimeError,
        "lstm: norms[0]: expected torch.float32 like input, got torch.float64",
    ),
    "epsilon": (
        lambda: tft.lstm(*layer(), norms=[r(2, 20)], norm_epsilon=-1e-5),
        ValueError,
        "lstm: norm_epsilon: expected 0 or more, got -1e-05",
    ),
    "epsilon_of_cell": (
        lambda: tft.lstm_cell(*cell(), norm=r(2, 20), norm_epsilon=float("nan")),
        ValueError,
        "lstm_cell: norm_epsilon: expected 0 or more, got nan",
    ),
    "recurrent_dropout": (
        lambda: tft.lstm(*layer(), recurrent_dropout=-0.5),
        ValueError,
        "lstm: recurrent_dropout: expected a number from 0 to 1, got -0.5",
    ),
    "two_dropouts": (
        lambda: tft.lstm(*layer(), recurrent_dropout=0.5, dropouts_hidden=[r(4, 2, 5)]),
        ValueError,
        "lstm: recurrent_dropout: expected 0 with dropouts_hidden, got 0.5",
    ),
    "dropouts": (
        lambda: tft.lstm(*layer(), dropouts_input=[r(4, 2, 4)] * 2),
        RuntimeError,
        "lstm: dropouts_input: expected 1 tensors, got 2",
    ),
    "dropout": (
        lambda: tft.lstm(*layer(), dropouts_hidden=[r(4, 2, 4)]),
        RuntimeError,
        "lstm: dropouts_hidden[0]: expected what broadcasts to [4, 2, 5], got shape [4, 2, 4]",
    ),
    "dropout_of_cell": (
        lambda: tft.lstm_cell(*cell(), dropout_input=r(2, 2, 4)),
        RuntimeError,
        "lstm_cell: dropout_input: expected what broadcasts to [4, 2, 4], got shape [2, 2, 4]",
    ),
    "packed_dropout": (
        lambda: tft.lstm(packed([3, 1], 4), None, *layer()[2:], dropouts_input=[r(4, 2, 4)]),
        RuntimeError,
        "lstm: dropouts_input[0]: expected what broadcasts to [4, 3, 4], got shape [4, 2, 4]",
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
