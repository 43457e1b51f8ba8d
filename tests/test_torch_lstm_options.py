"""Options of `twinfuse.torch.nn.LSTM` and `LSTMCell`: masks, dropout, and what torch has not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

import twinfuse.torch as tft  # noqa: E402

r = torch.randn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def pair(**options: Any) -> tuple[Any, Any]:
    """A fused layer, and a native one with the same parameters."""
    layer, native = tft.nn.LSTM(4, 6, **options), nn.LSTM(4, 6, **options)
    native.load_state_dict(layer.state_dict())
    return layer, native


def test_mask_is_packing_of_what_is_padded(launched: Launched) -> None:
    layer, native = pair(num_layers=2, batch_first=True)
    x = r(3, 5, 4)
    lengths = [5, 2, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    with launched("lstm_forward_f32", times=2):
        output, state = layer(x, mask=mask)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, last = native(packed)
    expected, _ = pad_packed_sequence(expected, batch_first=True)
    torch.testing.assert_close(output * mask.unsqueeze(-1), expected)
    torch.testing.assert_close(state, last)
    assert torch.equal(output[1, 4], output[1, 1])
    single, _ = layer(x[1], mask=mask[1])
    torch.testing.assert_close(single, output[1])


def test_dropout_between_layers() -> None:
    layer, native = pair(num_layers=3, dropout=0.25)
    x = r(40, 20, 4)
    torch.manual_seed(1)
    output = layer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], output) and not torch.equal(layer(x)[0], output)
    layer.eval()
    native.eval()
    torch.testing.assert_close(layer(x)[0], native(x)[0])

    # The rate, and that the last layer has none: by a last layer that passes on what it gets.
    seen = []

    def spy(input: Any, p: float) -> Any:
        dropped = torch.dropout(input, p, True)
        seen.append((dropped == 0).double().mean().item())
        return dropped

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(torch.nn.functional, "dropout", spy)
        layer.train()
        output, _ = layer(x)
    assert len(seen) == 2 and all(abs(rate - 0.25) < 0.02 for rate in seen)
    assert not (output == 0).any()
    assert layer.train(False)(x)[0].equal(layer(x)[0])


def test_zoneout_rate_and_mean() -> None:
    layer = tft.nn.LSTM(4, 50, zoneout_hidden=0.2, zoneout_cell=0.4)
    x, h, c = r(1, 40, 4), r(1, 40, 50), r(1, 40, 50)
    _, (last_h, last_c) = layer(x, (h, c))
    assert abs((last_h == h).double().mean() - 0.2) < 0.03
    assert abs((last_c == c).double().mean() - 0.4) < 0.03
    plain = nn.LSTM(4, 50)
    plain.load_state_dict(layer.state_dict())
    _, (next_h, next_c) = plain(x, (h, c))
    layer.eval()
    _, (last_h, last_c) = layer(x, (h, c))
    torch.testing.assert_close(last_h, 0.2 * h + 0.8 * next_h)
    torch.testing.assert_close(last_c, 0.4 * c + 0.6 * next_c)

    cell = tft.nn.LSTMCell(4, 50, zoneout_hidden=0.2, zoneout_cell=0.4)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    new_h, new_c = cell(x[0], (h[0], c[0]))
    assert abs((new_h == h[0]).double().mean() - 0.2) < 0.03
    assert abs((new_c == c[0]).double().mean() - 0.4) < 0.03
    cell.eval()
    torch.testing.assert_close(cell(x[0], (h[0], c[0])), (last_h[0], last_c[0]))


def test_peepholes_and_activations() -> None:
    layer = tft.nn.LSTM(
        4, 6, 2, bidirectional=True, peephole=True, recurrent_activation="hard_sigmoid"
    )
    names = ["peephole_l0", "peephole_l0_reverse", "peephole_l1", "peephole_l1_reverse"]
    assert [name for name, _ in layer.named_parameters()][-4:] == names
    assert all(getattr(layer, name).shape == (3, 6) for name in names)
    assert len(layer.all_weights[0]) == 4 and len(layer._flat_weights) == 16
    assert "peephole=True, recurrent_activation=hard_sigmoid" in repr(layer)
    x = r(5, 2, 4)
    layer(x)[0].sum().backward()
    assert all(getattr(layer, name).grad.abs().sum() > 0 for name in names)

    cell = tft.nn.LSTMCell(4, 6, peephole=True, recurrent_activation="hard_sigmoid")
    weights = {k.removesuffix("_l0"): v for k, v in layer.state_dict().items()}
    cell.load_state_dict({name: weights[name] for name in cell.state_dict()})
    assert repr(cell) == "LSTMCell(4, 6, peephole=True, recurrent_activation=hard_sigmoid)"
    one = tft.nn.LSTM(4, 6, peephole=True, recurrent_activation="hard_sigmoid")
    one.load_state_dict({name: layer.state_dict()[name] for name in one.state_dict()})
    output, _ = one(x)
    h, c = cell(x[0])
    torch.testing.assert_close(h, output[0])
    torch.testing.assert_close(cell(x[1], (h, c))[0], output[1])


def test_recompute_trains_alike() -> None:
    layer, native = pair(num_layers=2, bidirectional=True)
    frugal = tft.nn.LSTM(4, 6, 2, bidirectional=True, recompute=True)
    frugal.load_state_dict(layer.state_dict())
    assert "recompute=True" in repr(frugal)
    for x in (r(5, 2, 4), pack_padded_sequence(r(5, 2, 4), [5, 3])):
        gradients = []
        for module in (frugal, layer, native):
            loss = sum(state.pow(2).sum() for state in module(x)[1])
            gradients.append(torch.autograd.grad(loss, list(module.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*gradients[:2]))
        torch.testing.assert_close(gradients[0], gradients[2])
