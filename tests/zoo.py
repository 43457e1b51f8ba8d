"""Models that others wrote, and what a run of them shows, seen without this package."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.rule import assert_within_twice

Inputs = dict[str, Any]
Results = dict[str, np.ndarray]

_LAYERS = {
    torch._C._nn.linear: "linear_relu",
    torch.conv1d: "conv_relu",
    torch.conv2d: "conv_relu",
}


@dataclass
class Case:
    """A model, and how many of its calls are fused.

    `runs` are the calls of a native run, by op, of which only a ReLU reads the value (maybe behind
    a BatchNorm), and those of LSTMs: known from the architecture. `fused` are the launches of a
    model that `fuse` made, and `reason` is why they are fewer.
    """

    make: Callable[[], Any]
    inputs: Callable[[], Inputs]
    runs: dict[str, int]
    fused: dict[str, int]
    reason: str = ""
    call: Callable[[Any, Inputs], Any] = lambda model, inputs: model(**inputs)


class Seen(TorchFunctionMode):
    """Counts the layers of a native model whose value only a ReLU reads, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[Any] = []  # so that no two tensors have one id
        self._layer: dict[int, int] = {}  # by the id of a value: the call that it comes from
        self._ops: list[str] = []
        self._followed: dict[int, bool] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        calls = [self._layer[id(x)] for x in read if id(x) in self._layer]
        result = function(*args, **kwargs)
        self._alive.append((read, result))
        if function.__name__ in ("__get__", "size", "dim"):
            return result
        is_relu = function in (F.relu, torch.relu, torch.relu_)
        for call in calls:
            # A second reader sees the value before the ReLU, or what a ReLU has put there.
            if function is not F.batch_norm:
                self._followed[call] = is_relu and call not in self._followed
        if function in _LAYERS:
            self._layer[id(result)] = len(self._ops)
            self._ops.append(_LAYERS[function])
        elif function is F.batch_norm and calls and self._ops[calls[0]] == "conv_relu":
            self._layer[id(result)] = calls[0]
        elif is_relu and result is read[0]:
            self._layer.pop(id(result), None)
        elif function is torch.lstm:
            self._followed[len(self._ops)] = True
            self._ops.append("lstm")
        return result

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(self._ops[call] for call, is_so in self._followed.items() if is_so))


def randomized(model: Any) -> Any:
    """`model` in eval mode: values neither vanish nor explode, and no statistic is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
            else:
                center = float(name.endswith(("weight", "running_var")))
                tensor.uniform_(center - 0.3, center + 0.3, generator=generator)
    return model.eval()


def outputs(case: Case, model: Any) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    inputs = tree_map_only(Tensor, lambda t: _like(t, dtype), case.inputs())
    leaves = tree_leaves(case.call(model, inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def results(case: Case, model: Any) -> Results:
    """Outputs, and gradients of a sum that weighs each of their elements differently."""
    found = outputs(case, model)
    ramps = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in found]
    loss = sum((y * ramp).sum() for y, ramp in zip(found, ramps, strict=True))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    values = {f"output {i}": y for i, y in enumerate(found)}
    values |= {n: g for n, g in zip(named, gradients, strict=True) if g is not None}
    return {name: value.detach().numpy() for name, value in values.items()}


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def assert_as_good(case: Case, fused: Any, native: Any) -> None:
    """By the rule, with the native model in float64 as the reference."""
    ours, theirs = results(case, fused), results(case, native)
    exact = results(case, copy.deepcopy(native).double())
    assert ours.keys() == theirs.keys() == exact.keys() and len(exact) > 2
    errors = list(_relative_errors(theirs, exact))
    for name, reference in exact.items():
        # Of many gradients behind many operations some are nearly exact by chance.
        noise = max(errors) * np.abs(reference).max()
        assert_within_twice(ours[name], theirs[name], reference, name, dtype="float32", noise=noise)
    assert np.median(list(_relative_errors(ours, exact))) <= 1.5 * np.median(errors)


def _relative_errors(found: Results, exact: Results) -> Iterator[float]:
    for name, reference in exact.items():
        yield np.abs(found[name] - reference).max() / max(np.abs(reference).max(), 1e-30)


def described(model: nn.Module) -> list[tuple[str, int, type]]:
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


@pytest.fixture
def fold_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold BatchNorms for inputs that are as small as these, too."""
    from twinfuse.torch import _norm

    monkeypatch.setattr(_norm, "MIN_INPUTS", 0)
    monkeypatch.setattr(_norm, "MIN_INPUTS_A_WEIGHT", 0)
