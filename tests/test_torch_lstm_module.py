"""`twinfuse.torch.nn.LSTM` and `LSTMCell`: used wherever those of torch were."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.utils.parametrizations as parametrizations  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.nn.utils.rnn import (  # noqa: E402
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

import twinfuse.torch as tft  # noqa: E402

r = torch.randn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "two_layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "all": {
        "num_layers": 3,
        "bidirectional": True,
        "proj_size": 2,
        "batch_first": True,
        "bias": False,
        "dtype": torch.float64,
    },
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def pair(**options: Any) -> tuple[Any, Any]:
    """A fused layer, and a native one with the same parameters."""
    layer, native = tft.nn.LSTM(4, 6, **options), nn.LSTM(4, 6, **options)
    native.load_state_dict(layer.state_dict())
    return layer, native


def flat(results: Any) -> list[Any]:
    output, (h, c) = results
    return [output.data if isinstance(output, PackedSequence) else output, h, c]


def assert_same_training(layer: Any, native: Any, *args: Any) -> None:
    grads = []
    for module in (layer, native):
        results = flat(module(*args))
        weights = [torch.linspace(-1, 1, each.numel()).view(each.shape) for each in results]
        loss = sum((each * w).sum() for each, w in zip(results, weights))
        grads.append((results, torch.autograd.grad(loss, list(module.parameters()))))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def inputs(options: dict[str, Any]) -> tuple[Any, Any]:
    """A batch of two sequences of five steps, and a state."""
    dtype = options.get("dtype")
    x = r(2, 5, 4, dtype=dtype) if options.get("batch_first") else r(5, 2, 4, dtype=dtype)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    width = options.get("proj_size", 0) or 6
    return x, (r(layers, 2, width, dtype=dtype), r(layers, 2, 6, dtype=dtype))


@every_variant
def test_trains_as_native(options: dict[str, Any], launched: Launched) -> None:
    layer, native = pair(**options)
    x, hx = inputs(options)
    count = hx[0].shape[0]
    with launched("lstm_forward_", times=count), launched("lstm_backward_", times=count):
        assert_same_training(layer, native, x)
    assert_same_training(layer, native, x, hx)
    assert_same_training(layer, native, x, list(hx))


@every_variant
def test_unbatched(options: dict[str, Any]) -> None:
    layer, native = pair(**options)
    x, (h, c) = inputs(options)
    x = x[0] if options.get("batch_first") else x[:, 0]
    assert_same_training(layer, native, x)
    assert_same_training(layer, native, x, (h[:, 0], c[:, 0]))
    assert layer(x)[0].shape == native(x)[0].shape


@every_variant
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(enforce_sorted: bool, options: dict[str, Any]) -> None:
    layer, native = pair(**options)
    x, hx = inputs(options)
    lengths = [5, 3] if enforce_sorted else [3, 5]
    first = options.get("batch_first", False)
    packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=enforce_sorted)
    assert_same_training(layer, native, packed)
    assert_same_training(layer, native, packed, hx)
    ours, theirs = layer(packed, hx)[0], native(packed, hx)[0]
    assert isinstance(ours, PackedSequence) and ours.batch_sizes is packed.batch_sizes
    torch.testing.assert_close(pad_packed_sequence(ours, first), pad_packed_sequence(theirs, first))


@every_variant
def test_output_is_contiguous_and_states_are_too(options: dict[str, Any]) -> None:
    layer, _ = pair(**options)
    assert all(each.is_contiguous() for each in flat(layer(inputs(options)[0])))


@pytest.mark.parametrize("bias", [True, False])
def test_cell_trains_as_native(bias: bool, launched: Launched) -> None:
    cell, native = tft.nn.LSTMCell(4, 6, bias=bias), nn.LSTMCell(4, 6, bias=bias)
    assert isinstance(cell, nn.LSTMCell)
    native.load_state_dict(cell.state_dict())
    x, hx = r(3, 4), (r(3, 6), r(3, 6))
    for args in ((x,), (x, hx), (x[0],), (x[0], (hx[0][0], hx[1][0])), (x, list(hx))):
        with launched("lstm_cell_forward_f32", times=1):
            ours = cell(*args)
        theirs = native(*args)
        torch.testing.assert_close(ours, theirs)
        got, expected = (
            torch.autograd.grad(h.sum() + c.pow(2).sum(), list(module.parameters()))
            for module, (h, c) in ((cell, ours), (native, theirs))
        )
        torch.testing.assert_close(got, expected)


@every_variant
def test_is_built_as_native(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    layer = tft.nn.LSTM(4, 6, **options)
    torch.manual_seed(5)
    native = nn.LSTM(4, 6, **options)
    assert list(layer.state_dict()) == list(native.state_dict())
    for name, value in native.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    assert repr(layer) == repr(native)
    assert [[w.shape for w in ws] for ws in layer.all_weights] == [
        [w.shape for w in ws] for ws in native.all_weights
    ]
    layer.flatten_parameters()
    layer.load_state_dict(nn.LSTM(4, 6, **options).state_dict(), strict=True)
    native.load_state_dict(layer.state_dict(), strict=True)
    x, hx = inputs(options)
    layer.check_forward_args(x, hx, None)
    assert layer.permute_hidden(hx, None) is hx
    order = torch.tensor([1, 0])
    assert torch.equal(layer.permute_hidden(hx, order)[0], hx[0][:, order])
    assert layer.get_expected_hidden_size(x, None) == native.get_expected_hidden_size(x, None)
    assert layer.get_expected_cell_size(x, None) == native.get_expected_cell_size(x, None)


def test_cell_is_built_as_native() -> None:
    torch.manual_seed(5)
    cell = tft.nn.LSTMCell(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    native = nn.LSTMCell(4, 6, dtype=torch.float64)
    for name, value in native.state_dict().items():
        assert torch.equal(cell.state_dict()[name], value)
    assert repr(cell) == repr(native) and "peephole" not in dict(cell.named_parameters())


@every_variant
def test_class_of_an_existing_layer(options: dict[str, Any], launched: Launched) -> None:
    _, native = pair(**options)
    x, hx = inputs(options)
    expected = flat(native(x, hx))
    native.__class__ = tft.nn.LSTM
    with launched("lstm_forward_"):
        torch.testing.assert_close(flat(native(x, hx)), expected)
    assert repr(native).startswith("LSTM(4, 6")
    twin = pickle.loads(pickle.dumps(native))
    assert type(twin) is tft.nn.LSTM and torch.equal(flat(twin(x))[0], flat(native(x))[0])
    native.__class__ = nn.LSTM
    with launched("lstm_forward_", times=0):
        assert torch.equal(flat(native(x, hx))[0], expected[0])

    cell = nn.LSTMCell(4, 6)
    step = cell(r(2, 4))
    cell.__class__ = tft.nn.LSTMCell
    with launched("lstm_cell_forward_f32", times=1):
        cell(r(2, 4))
    assert step[0].shape == (2, 6) and repr(cell) == "LSTMCell(4, 6)"


def saved_and_loaded(layer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies(duplicate: Any) -> None:
    for layer, x in (
        (tft.nn.LSTM(4, 6, 2, peephole=True, zoneout_cell=0.5).eval(), r(5, 2, 4)),
        (tft.nn.LSTMCell(4, 6, peephole=True, activation="relu"), r(2, 4)),
    ):
        twin = duplicate(layer)
        assert type(twin) is type(layer) and repr(twin) == repr(layer)
        assert torch.equal(twin(x)[0], layer(x)[0])
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin(x)[0], layer(x)[0])


def test_parameters_that_are_replaced() -> None:
    layer, native = pair()
    x = r(5, 2, 4)
    for module in (layer, native):
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)
    assert_same_training(layer, native, x)
    for module in (layer, native):
        module.double()
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters()))
    torch.testing.assert_close(flat(layer(x.double())), flat(native(x.double())))

    layer, native = pair()
    other = {name: 2 * value for name, value in layer.state_dict().items()}
    ours, theirs = (flat(torch.func.functional_call(m, other, (x,))) for m in (layer, native))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(flat(layer(x)), flat(native(x)))


def test_weight_norm_and_pruning() -> None:
    x = r(5, 2, 4)
    cell, native = tft.nn.LSTMCell(4, 6), nn.LSTMCell(4, 6)
    native.load_state_dict(cell.state_dict())
    for module in (cell, native):
        parametrizations.weight_norm(module, "weight_hh")
        prune.l1_unstructured(module, "weight_ih", 0.5)
    torch.testing.assert_close(cell(x[0]), native(x[0]))
    parametrize.remove_parametrizations(cell, "weight_hh")
    assert type(cell) is tft.nn.LSTMCell

    layer, _ = pair()
    before = flat(layer(x))
    parametrizations.weight_norm(layer, "weight_hh_l0")
    torch.testing.assert_close(flat(layer(x)), before)
    layer(x)[0].sum().backward()
    originals = layer.parametrizations.weight_hh_l0
    assert originals.original0.grad is not None and originals.original1.grad is not None


def test_hooks_run() -> None:
    layer, _ = pair()
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    layer.register_forward_hook(lambda m, args, out: seen.append("after"))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer(r(5, 2, 4).requires_grad_())[0].sum().backward()
    assert seen == ["before", "after", "backward"]


def test_mixed_precision_training_step(launched: Launched) -> None:
    layer, native = pair(num_layers=2)
    x = r(5, 3, 4)
    for module in (layer, native):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(x)[0].float().pow(2).sum()
        loss.backward()
    for ours, theirs in zip(layer.parameters(), native.parameters()):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: Any, launched: Launched) -> None:
    layer, native = (module.to(dtype) for module in pair())
    x = r(5, 2, 4, dtype=dtype)
    with launched("lstm_forward_"):
        ours = flat(layer(x))
    torch.testing.assert_close(ours, flat(native(x)), rtol=0.02, atol=0.01)


MODULES: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "dtype": (torch.nn.LSTM, (r(3, 2, 4).double(),), "LSTM: RNN input dtype (torch.float64)"),
    "columns": (torch.nn.LSTM, (r(3, 2, 3),), "LSTM: input.size(-1) must be equal to input_size"),
    "dims": (torch.nn.LSTM, (r(1, 3, 2, 4),), "LSTM: input: expected 2 or 3 dimensions, got"),
    "h": (
        torch.nn.LSTM,
        (r(3, 2, 4), (r(1, 1, 5), r(1, 2, 5))),
        "LSTM: Expected hidden[0] size (1, 2, 5), got [1, 1, 5]",
    ),
    "c": (torch.nn.LSTM, (r(3, 2, 4), (r(1, 2, 5), r(2, 2, 5))), "LSTM: Expected hidden[1] size"),
    "batched": (torch.nn.LSTM, (r(3, 2, 4), (r(1, 5), r(1, 5))), "hx[0]: expected 3 dimensions"),
    "unbatched": (torch.nn.LSTM, (r(3, 4), (r(1, 1, 5),) * 2), "hx[0]: expected 2 dimensions"),
    "cell": (torch.nn.LSTMCell, (r(2, 3),), "lstm_cell: weight_ih: expected [20, 3], got"),
    "cell_dims": (torch.nn.LSTMCell, (r(1, 2, 4),), "input: expected 1 or 2 dimensions, got"),
    "cell_state": (
        torch.nn.LSTMCell,
        (r(2, 4), (r(2, 5), r(1, 2, 5))),
        "LSTMCell: hx[1]: expected 1 or 2 dimensions, got",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_raise_what_native_ones_raise(name: str) -> None:
    kind, arguments, text = MODULES[name]
    with pytest.raises(Exception) as expected:
        kind(4, 5)(*arguments)
    with pytest.raises(Exception) as got:
        getattr(tft.nn, kind.__name__)(4, 5)(*arguments)
    assert type(got.value) is type(expected.value)
    assert text in str(got.value)


def test_wrong_options_of_modules() -> None:
    for kind in (tft.nn.LSTM, tft.nn.LSTMCell):
        with pytest.raises(ValueError, match="activation: expected one of"):
            kind(4, 5, activation="gelu")
        with pytest.raises(ValueError, match="zoneout_cell: expected 0 to 1, got -1"):
            kind(4, 5, zoneout_cell=-1)
        with pytest.raises(ValueError, match="norm_epsilon: expected 0 or more, got -1"):
            kind(4, 5, norm_epsilon=-1)
        with pytest.raises(TypeError):
            kind(4, 5, mode="GRU")
    with pytest.raises(ValueError, match=r"recurrent_dropout: expected 0 to 1, got 1\.5"):
        tft.nn.LSTM(4, 5, recurrent_dropout=1.5)
