"""Cases of the LSTM in which options meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tests.lstm_case import LstmCase

Pair = tuple[str, int, str, int]

# What options may be together with what others: every pair of values of two options is in a case.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sequence": [
        {},
        {"reverse": True, "batch_first": True},
        {"lengths": (5, 3, 3, 1)},
        {"lengths": (5, 4, 2, 2), "reverse": True},
        {"mask": "right", "batch_first": True},
        {"mask": "left", "zero_masked_output": True},
        {"mask": "interior", "reverse": True, "batch_first": True},
        {"mask": "rows"},
    ],
    "bias": [{"bias": name} for name in ("both", "one", "none")],
    "initial": [{"initial": name} for name in ("both", "hidden", "cell", "none")],
    "grads": [{"grads": name} for name in ("all", "output", "hidden", "cell")],
    "zoneout": [{"zoneout": name} for name in ("", "draws", "means", "cell", "hidden")],
    "activations": [
        {},
        {"recurrent_activation": "hard_sigmoid"},
        {"activation": "relu"},
        {"activation": "sigmoid", "recurrent_activation": "tanh"},
    ],
    "layouts": [
        {},
        {"input_layout": "padded", "grad_layout": "strided"},
        {"weight_layout": "transposed", "bias_layout": "strided"},
        {"weight_layout": "padded", "input_layout": "strided", "state_layout": "transposed"},
    ],
    "projection": [{}, {"projection": 3}, {"projection": 9}],
    "peephole": [{}, {"peephole": True}],
    "norm": [{}, {"norm": True, "norm_epsilon": 0.1}],
    "dropout": [{}, {"dropout": "both"}, {"dropout": "input"}, {"dropout": "hidden"}],
}
# Added to a table whose cases keep their numbers: no case of the others alone has them.
ADDED = ("norm", "dropout")


def pairs() -> Iterator[LstmCase]:
    """A greedy choice: each case takes as many pairs as it can that no case before has."""
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(OPTIONS, 2)
        for i in range(len(OPTIONS[a]))
        for j in range(len(OPTIONS[b]))
    }
    count = 0
    for names in ([name for name in OPTIONS if name not in ADDED], list(OPTIONS)):
        while wanted := {pair for pair in missing if {pair[0], pair[2]} <= {*names}}:
            chosen = _choose(names, wanted)
            options: dict[str, Any] = {}
            for name, k in chosen.items():
                options |= OPTIONS[name][k]
            chosen |= {name: 0 for name in ADDED if name not in chosen}
            for name in OPTIONS:
                others = {n: k for n, k in chosen.items() if n != name}
                missing -= _taken(others, name, chosen[name])
            yield LstmCase(f"pairs_{count}", 5, 4, 6, 7, **options)
            count += 1


def _choose(names: list[str], wanted: set[Pair]) -> dict[str, int]:
    a, i, b, j = min(wanted)
    chosen = {a: i, b: j}
    for name in names:
        if name not in chosen:
            chosen[name] = max(
                range(len(OPTIONS[name])), key=lambda k: len(wanted & _taken(chosen, name, k))
            )
    return chosen


def _taken(chosen: dict[str, int], name: str, k: int) -> set[Pair]:
    order = list(OPTIONS)
    return {
        (other, i, name, k) if order.index(other) < order.index(name) else (name, k, other, i)
        for other, i in chosen.items()
    }
