"""Deferred layers in the graph of autograd."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import twinfuse.torch as tft  # noqa: E402
from tests.deferred_models import (  # noqa: E402
    Decoder,
    Exp,
    Same,
    Straight,
    assert_same,
    inputs,
    probes,
    run,
)
from twinfuse.torch._deferred_tensor import Deferred  # noqa: E402

FORWARD = "linear_relu_forward_"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


ONE = torch.ones(1, dtype=torch.float64)


def as_array(z: Any) -> Any:
    """Zeros, if it were left a wrapper of a transform."""
    return (
        z.requires_grad * z
        + torch.from_numpy(z.detach().numpy()) * (z.data_ptr() > 0)
        + torch.tensor(z.tolist())
    )


def with_hook(z: Any) -> Any:
    z.register_hook(lambda grad: grad * 5)
    return F.relu(z)


def with_retained(z: Any) -> Any:
    z.retain_grad()
    y = F.relu(z)
    y.sum().backward(retain_graph=True)
    return y + z.grad


def with_edge(z: Any) -> Any:
    y = z * z
    (grad,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    return F.relu(z) + grad


GRAPHS = {
    "exp": lambda z: Exp.apply(z),
    "exp_and_relu": lambda z: Exp.apply(z) + F.relu(z),
    "relu_and_exp": lambda z: F.relu(z) + Exp.apply(z),
    "exp_and_plain": lambda z: Exp.apply(z) + z * z,
    "plain_and_exp": lambda z: z * z + Exp.apply(z),
    "twice": lambda z: Exp.apply(z) * Exp.apply(z),
    "same": lambda z: Same.apply(z) + z.relu(),
    "straight": lambda z: Straight.apply(z) * z,
    "straight_and_relu": lambda z: Straight.apply(z) * F.relu(z) + z,
    "straight_then_in_place": lambda z: Straight.apply(z) * F.relu_(z) + z,
    "hook": with_hook,
    "retained": with_retained,
    "edge": with_edge,
    "hook_after_relu_in_place": lambda z: with_hook(F.relu_(z)),
    "scripted": torch.jit.script(nn.Sequential(nn.ReLU(), nn.Tanh())),
    "checkpointed_value": lambda z: checkpoint(torch.tanh, z, use_reentrant=False) + z,
    "checkpointed_captured": lambda z: checkpoint(lambda: z * F.relu(z), use_reentrant=False),
    "checkpointed": lambda z: checkpoint(lambda t: F.relu(t) * t, z, use_reentrant=False),
    "detached": lambda z: F.relu(z.detach()) + z,
    "no_grad_inside": lambda z: torch.no_grad()(F.relu)(z) * z,
    "only_relu_without_grad": torch.no_grad()(F.relu),
    "in_place_without_grad": lambda z: (torch.no_grad()(F.relu_)(z), z)[1] * 2,
    "clamp_without_grad": lambda z: torch.no_grad()(torch.clamp)(z, 0) * z,
    "clamp_in_place_without_grad": lambda z: (torch.no_grad()(torch.clamp_)(z, 0), z)[1] * 2,
    "inference": lambda z: torch.inference_mode()(F.relu)(z.detach()).clone() + z,
    "in_place_in_inference": lambda z: (torch.inference_mode()(F.relu_)(z), z)[1] * 2,
    "plain_in_inference": lambda z: (torch.inference_mode()(torch.sum)(z), z)[1] * 2,
    "plain_without_grad": lambda z: (torch.no_grad()(torch.sum)(z), z)[1] * 2,
    "vmap": lambda z: torch.vmap(lambda row: row * z.sum())(z),
    "vmap_of_captured": lambda z: torch.vmap(lambda row: row + F.relu(z[0]))(
        torch.ones(3, 6).double()
    ),
    "after_vmap": lambda z: torch.vmap(lambda s: s * z)(ONE).sum() * as_array(z),
    "after_grad": lambda z: torch.func.grad(lambda s: (s * z).sum())(ONE) * as_array(z),
    "relu_in_vmap": lambda z: torch.vmap(lambda s: s * F.relu(z))(torch.ones(3).double()) + z,
    "func_grad": lambda z: torch.func.grad(lambda t: (t * z).sum())(torch.ones_like(z)) + z,
    "jvp": lambda z: torch.func.jvp(lambda t: t * F.relu(z), (z,), (torch.ones_like(z),))[1] + z,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str) -> None:
    def use(z: Any) -> Any:
        assert type(z) in (Deferred, torch.Tensor)
        return GRAPHS[name](z)

    native, ours = probes()
    x = inputs()
    expected, got = run(native, x, use), run(ours, x, use)
    assert got[0].requires_grad == expected[0].requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [F.relu, torch.sin, F.relu_, Exp.apply])
def test_autocast_that_begins_after_the_linear(function: Any, launched: Launched) -> None:
    native, ours = probes(dtype=torch.float32)
    x = inputs(dtype=torch.float32)
    use = torch.autocast("cpu", torch.bfloat16)(function)
    with launched(FORWARD, times=0):
        expected, got = run(native, x, use), run(ours, x, use)
    assert got[0].dtype == expected[0].dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["exp_and_relu", "relu_and_exp", "same", "straight_and_relu"])
def test_relus_fuse_beside_functions(name: str, launched: Launched) -> None:
    fuses = not name.startswith(("exp", "same"))  # these have read the values before
    with launched(FORWARD, times=int(fuses)):
        assert_same(GRAPHS[name])


def observers(z: Any) -> dict[str, Any]:
    return {
        "retain_grad": lambda: z.retain_grad(),
        "register_hook": lambda: z.register_hook(print),
        "grad_fn": lambda: z.grad_fn,
        "grad": lambda: torch.autograd.grad(z.sum(), [z]),
        "backward": lambda: torch.autograd.backward(z.sum(), inputs=[z]),
        "method": lambda: z.sum().backward(inputs=z),
        "edge": lambda: torch.autograd.graph.get_gradient_edge(z),
        "attribute": lambda: z.grad,
    }


FIRST = {"relu": F.relu, "exp": Exp.apply, "straight": lambda z: (Straight.apply(z), z * 1)}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", observers(torch.ones(1)))
def test_its_place_in_the_graph_is_not_given_incompletely(name: str, first: str) -> None:
    """Native counts the use before; ours has no path through the tensor for that."""
    _, ours = probes()

    def use(z: Any) -> Any:
        y = FIRST[first](z)
        with pytest.raises(RuntimeError, match="deferred Linear before it is used"):
            observers(z)[name]()
        return y[0]

    ours(inputs(), use)


def test_gradients_of_gradients() -> None:
    native, ours = probes()
    for use in (F.relu, torch.sin, Exp.apply, lambda z: F.relu(z) * Exp.apply(z)):
        for shape in ((5, 8), (2, 3, 8), (8,)):
            x = inputs(*shape)
            second = []
            for model in (native, ours):
                tensors = [x, *model.parameters()]
                y = model(x, use).pow(3).sum()
                first = torch.autograd.grad(y, tensors, create_graph=True)
                total = sum(g.pow(2).sum() for g in first)
                second.append(torch.autograd.grad(total, tensors))
            torch.testing.assert_close(second[1], second[0], rtol=1e-10, atol=1e-10)
    x = inputs(2, 8)
    assert torch.autograd.gradcheck(lambda x: ours(x, Exp.apply), x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, Exp.apply), x)


def test_grad_mode_is_that_of_the_linear() -> None:
    def constant(model: Any) -> Any:
        fc = model.fc

        class Without(type(fc)):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                with torch.no_grad():
                    return super().forward(x)

        fc.__class__ = Without
        return model

    for use in (F.relu, lambda z: z * 1, F.relu_, lambda z: z.clamp(min=0)):
        native, ours = map(constant, probes())
        x = inputs()
        expected, got = native(x, use), ours(x, use)
        assert not expected.requires_grad and not got.requires_grad
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input"])
def test_frozen_tensors(frozen: str) -> None:
    for use in (F.relu, torch.sin, Exp.apply, lambda z: F.relu(z) + z):
        gradients = []
        native, ours = probes()
        x = inputs().requires_grad_(frozen != "input")
        for model in (native, ours):
            model.fc.weight.requires_grad_(frozen not in ("weight", "both"))
            model.fc.bias.requires_grad_(frozen not in ("bias", "both"))
            wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
            gradients.append(torch.autograd.grad(model(x, use).sum(), wanted))
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """Recomputed in the same order, also where layers stop waiting in between."""
    native = nn.ModuleList([Decoder() for _ in range(2)])
    ours = tft.fuse(native, deferred=True)
    for _ in range(20):
        results = []
        for layers in (native, ours):
            native.zero_grad()
            torch.manual_seed(3)
            y = x = torch.randn(3, 8, requires_grad=True)
            for layer in layers:
                y = checkpoint(lambda y, layer=layer: layer(y)[0], y, use_reentrant=reentrant)
            y.sum().backward()
            results.append([y, x.grad, *(p.grad.clone() for p in layers.parameters())])
        torch.testing.assert_close(results[1], results[0])


def test_reentrant_checkpoint_of_an_output() -> None:
    results = []
    native, ours = probes()
    for model in (native, ours):
        torch.manual_seed(4)
        x = inputs()
        model(x, lambda z: checkpoint(torch.tanh, z, use_reentrant=True) * z).sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_saved_tensors_in_other_places() -> None:
    packed = []
    native, ours = probes()
    x = inputs()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(type(t)) or t, lambda t: t
    ):
        torch.testing.assert_close(run(ours, x, torch.sin), run(native, x, torch.sin))
    assert set(packed) <= {torch.Tensor, nn.Parameter}


def test_nothing_leaks() -> None:
    _, ours = probes()
    for use in (F.relu, torch.sin, Exp.apply, lambda z: F.relu(z) + z.exp(), Straight.apply):
        seen = []

        def watched(z: Any, use: Any = use, seen: Any = seen) -> Any:
            seen.append(weakref.ref(z))
            return use(z)

        x = inputs()
        gc.disable()  # nothing may wait for it
        try:
            reference = weakref.ref(x)
            ours(x, watched).sum().backward()
            del x
            assert seen[0]() is None and reference() is None
        finally:
            gc.enable()
