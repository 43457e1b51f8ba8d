"""Deferred layers where inputs, weights or outputs change in place, or in memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from tests.deferred_models import Dirty, Exp, Same, Straight, inputs, probes, run  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(10)


def add(tensor: Any) -> None:
    with torch.no_grad():
        tensor.add_(1)


def other_memory(tensor: Any) -> None:
    tensor.data = tensor.data + 1


CHANGES = {
    "in_place": add,
    "by_a_view": lambda t: add(t.view(-1)[:2]),
    "detached": lambda t: t.detach().mul_(2),
    "memory": other_memory,
    "frozen": lambda t: t.requires_grad_(False),
    "freed": lambda t: t.untyped_storage().resize_(0),
}
LATER = {"relu": F.relu, "value": lambda z: z * 1, "output": lambda z: z, "exp": Exp.apply}


@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True``")
@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_changes_before_the_use_are_errors(which: str, name: str, later: str) -> None:
    _, ours = probes()
    x = inputs()

    def use(z: Any) -> Any:
        CHANGES[name]({"input": x, "weight": ours.fc.weight, "bias": ours.fc.bias}[which])
        return LATER[later](z)

    with pytest.raises(RuntimeError, match=f"deferred Linear: {which}: expected version"):
        ours(x, use)


@pytest.mark.parametrize("later", LATER)
def test_changes_after_the_use_are_not_seen(later: str) -> None:
    native, ours = probes()
    x = inputs()

    def use(model: Any) -> Any:
        def used(z: Any) -> Any:
            y = LATER[later](z) * 2
            model.fc = nn.Linear(8, 6)  # not the layer of the call
            return y

        return used

    torch.testing.assert_close(ours(x, use(ours)), native(x, use(native)))


def test_changes_before_backward_are_natives_errors() -> None:
    for use in (F.relu, torch.sin, Exp.apply):
        for model in probes():
            y = model(inputs(), use)
            add(model.fc.weight)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


# torch warns where a hook finds the same error as the forward method.
@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True``")
def test_functions_that_change_the_output_are_errors() -> None:
    _, ours = probes()
    with pytest.raises(RuntimeError, match="deferred Linear"):
        ours(inputs(), lambda z: Dirty.apply(z) * 1).sum().backward()
    _, ours = probes()
    with pytest.raises(RuntimeError, match="deferred Linear"):
        ours(inputs(), lambda z: (Dirty.apply(z), z)[1] * 1).sum().backward()


def test_changes_between_saving_and_backward_are_errors() -> None:
    """As natively, where the version of what was saved tells."""

    def after(z: Any) -> Any:
        y = Exp.apply(z)
        z.add_(1)
        return y

    def view_after(z: Any) -> Any:
        y = Exp.apply(z)
        z.view(-1).add_(1)
        return y

    def before_straight(z: Any) -> Any:
        F.relu(z)
        z.mul_(2)
        return Straight.apply(z)

    for use in (after, view_after):
        native, _ = probes()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            native(inputs(), use).sum().backward()

    def same_then_in_place(z: Any) -> Any:
        return Same.apply(z).exp() + F.relu_(z)  # of which native makes no error

    for use in (after, view_after, before_straight, same_then_in_place):
        _, ours = probes()
        with pytest.raises(RuntimeError, match="deferred Linear"):
            ours(inputs(), use).sum().backward()


def test_saved_values_of_constants_are_guarded() -> None:
    """Without a gradient of its own there is no node that would notice."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Any, v: Any) -> Any:
            ctx.save_for_backward(z)
            return z * v

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return None, grad * ctx.saved_tensors[0]

    for model in probes():
        model.requires_grad_(False)
        v = torch.ones(5, 6, dtype=torch.float64, requires_grad=True)

        def use(z: Any, v: Any = v) -> Any:
            y = Times.apply(z, v)
            z.add_(1)
            return y

        with pytest.raises(RuntimeError, match=r"modified by an inplace|deferred Linear"):
            model(inputs().detach(), use).sum().backward()


def test_values_that_cpp_changes_are_changed_for_python() -> None:
    """As collectives do, called below `torch.distributed`."""

    def use(z: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            z.detach().add_(1)
        y = z * 2
        with torch._C.DisableTorchFunctionSubclass():
            z.detach().add_(1)
        return y + z

    native, ours = probes()
    x = inputs()
    torch.testing.assert_close(run(ours, x, use), run(native, x, use))


def test_other_tensors_may_change_by_it() -> None:
    def use(z: Any) -> Any:
        total = torch.zeros(5, 6, dtype=z.dtype)
        with torch._C.DisableTorchFunctionSubclass():
            total.add_(z)
        return total * F.relu(z)

    native, ours = probes()
    x = inputs()
    torch.testing.assert_close(run(ours, x, use), run(native, x, use))
