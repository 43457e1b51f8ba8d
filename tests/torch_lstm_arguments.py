"""Arguments of good calls of `twinfuse.torch.lstm` and `lstm_cell`."""

from __future__ import annotations

from typing import Any

from tests.conftest import require

torch = require("torch")

from torch.nn.utils.rnn import PackedSequence  # noqa: E402

r = torch.randn


def cell(**other: Any) -> tuple[Any, ...]:
    """Arguments of a good call, but for those that are given."""
    weights = {"weight_ih": r(20, 4), "weight_hh": r(20, 5), "bias_ih": r(20), "bias_hh": r(20)}
    arguments: dict[str, Any] = {"input": r(2, 4), "hx": (r(2, 5), r(2, 5))} | weights
    return tuple((arguments | other).values())


def layer(**other: Any) -> tuple[Any, ...]:
    """As `cell`; of a layer without options."""
    weights = {"weight_ih": r(20, 4), "weight_hh": r(20, 5), "bias_ih": r(20), "bias_hh": r(20)}
    params = [other.pop(name, weight) for name, weight in weights.items()]
    arguments = {"input": r(3, 2, 4), "hx": (r(1, 2, 5), r(1, 2, 5)), "params": params} | other
    return (*arguments.values(), *(True, 1, 0.0, False, False, False)[len(arguments) - 3 :])


def packed(sizes: list[int], rows: int) -> PackedSequence:
    return PackedSequence(r(rows, 4), torch.tensor(sizes))
