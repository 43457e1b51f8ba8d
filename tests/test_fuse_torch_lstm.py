"""`twinfuse.torch.fuse` on recurrent layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from tests.conftest import Launched, require

torch = require("torch")

from torch import nn  # noqa: E402

import twinfuse.torch as tft  # noqa: E402


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True)
        self.cell = nn.LSTMCell(10, 4)
        self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def forward(self, x: Any) -> Any:
        y, _ = self.layers(x)
        return self.head(self.cell(y[:, -1])[0])


def test_recurrent_layers(launched: Launched) -> None:
    model, x = Tagger(), torch.randn(2, 7, 3)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    assert [row.backend for row in tft.explain(model)] == ["native"] * 4
    assert "fuse(model)" in tft.explain(model)[0].reason
    assert tft.fuse(model, inplace=True) is model
    assert type(model.layers) is tft.nn.LSTM and type(model.cell) is tft.nn.LSTMCell
    with launched("lstm_forward", times=4), launched("lstm_cell_forward", times=1):
        torch.testing.assert_close(model(x), expected)
    kernels = [row.kernel for row in tft.explain(model)]
    assert kernels[0].startswith("lstm_forward_f32") and kernels[1].startswith("lstm_cell_forward")
    model.load_state_dict(state)
    pickle.loads(pickle.dumps(model))
    tft.unfuse(model)
    assert type(model.layers) is nn.LSTM and type(model.cell) is nn.LSTMCell
    with launched("lstm", times=0):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_subclasses_of_recurrent_layers_stay_native() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.ModuleList([Own(2, 3), nn.LSTM(2, 3)])
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    tft.fuse(model, inplace=True)
    assert type(model[0]) is Own and type(model[1]) is nn.LSTM
    assert all("subclass" in row.reason for row in tft.explain(model))
