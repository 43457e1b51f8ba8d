"""`twinfuse.torch.fuse(deferred=True)`: what fuses while a model runs."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest

from tests.cases import CASES
from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.arrays import DTYPES  # noqa: E402
from tests.deferred_models import Decoder, Probe, assert_same, inputs, probes, run  # noqa: E402
from tests.torch_cases import check  # noqa: E402
from twinfuse.torch._deferred import PATIENCE, DeferredLinear, _open  # noqa: E402
from twinfuse.torch._deferred_tensor import Deferred  # noqa: E402

FORWARD, BACKWARD = "linear_relu_forward_", "linear_relu_backward_"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_rule_for_every_case(case: Any, dtype: str, launched: Launched) -> None:
    probe = tft.fuse(Probe(bias=case.bias), deferred=True)

    def op(x: Any, weight: Any, bias: Any = None) -> Any:
        tensors = {"fc.weight": weight} | ({} if bias is None else {"fc.bias": bias})
        return torch.func.functional_call(probe, tensors, (x, F.relu))

    with launched(FORWARD, times=1), launched(BACKWARD, times=1):
        check(op, case, dtype)


RELUS = {
    "F.relu": F.relu,
    "F.relu_inplace": lambda z: F.relu(z, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda z: z.relu(),
    "method_in_place": lambda z: z.relu_(),
    "module": nn.ReLU(),
    "module_in_place": nn.ReLU(inplace=True),
    "module_by_name": nn.ModuleDict({"relu": nn.ReLU()})["relu"],
    "result_unused": lambda z: (F.relu_(z), z)[1],
}
CLAMPS = {
    "clamp": lambda z: z.clamp(min=0),
    "clamp_0": lambda z: torch.clamp(z, 0),
    "clamp_float": lambda z: z.clamp(min=0.0, max=None),
    "clamp_in_place": lambda z: torch.clamp_(z, min=0),
    "clamp_min": lambda z: z.clamp_min(0),
    "clamp_min_in_place": lambda z: z.clamp_min_(0),
}


@pytest.mark.parametrize("name", RELUS)
def test_every_form_of_relu(name: str, launched: Launched) -> None:
    with launched(FORWARD, times=1), launched(BACKWARD, times=1):
        assert_same(RELUS[name])


@pytest.mark.parametrize("name", RELUS | CLAMPS)
def test_every_form_of_relu_without_gradients(name: str, launched: Launched) -> None:
    with torch.no_grad(), launched(FORWARD, times=1):
        assert_same((RELUS | CLAMPS)[name])


OTHERS = {
    **CLAMPS,  # whose gradient at 0 is another
    "clamp_to_1": lambda z: z.clamp(0, 1),
    "clamp_above": lambda z: z.clamp(max=0),
    "clamp_at_1": lambda z: z.clamp(min=1),
    "clamp_tensor": lambda z: z.clamp(min=torch.zeros(6, dtype=z.dtype)),
    "relu6": F.relu6,
    "leaky": F.leaky_relu,
    "threshold": lambda z: F.threshold(z, 0, 0),
    "gelu": F.gelu,
    "view_first": lambda z: F.relu(z.view(-1)),
    "aten": torch.ops.aten.relu,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_get_the_plain_tensor(name: str, launched: Launched) -> None:
    with launched(FORWARD, times=0):
        assert_same(OTHERS[name])


def test_clamp_has_its_own_gradient_at_zero() -> None:
    native, ours = probes()
    for model in (native, ours):
        nn.init.zeros_(model.fc.weight)
        nn.init.zeros_(model.fc.bias)
    x = inputs()
    for use in (F.relu, lambda z: z.clamp(min=0)):
        torch.testing.assert_close(run(ours, x, use), run(native, x, use))


def test_clamp_into_another_tensor(launched: Launched) -> None:
    out = torch.full((5, 6), torch.nan, dtype=torch.float64)
    native, ours = probes()
    x = inputs()
    with torch.no_grad(), launched(FORWARD, times=0):
        assert ours(x, lambda z: torch.clamp(z, 0, out=out)) is out
        torch.testing.assert_close(out, native(x, F.relu))


ACTIVATIONS = {
    "module": nn.ReLU,
    "in_place": lambda: nn.ReLU(inplace=True),
    "function": lambda: F.relu,
    "builtin": lambda: torch.relu,
}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_decoder_layers(name: str, norm_first: bool, launched: Launched) -> None:
    native = nn.ModuleList(Decoder(ACTIVATIONS[name](), norm_first) for _ in range(3))
    ours = tft.fuse(native, deferred=True)
    keys = list(native.state_dict())
    assert list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(native.parameters(), ours.parameters(), strict=True))
    results = []
    for layers, times in ((native, 0), (ours, 3)):
        native.zero_grad()
        torch.manual_seed(1)
        x = y = torch.randn(2, 3, 8, requires_grad=True)
        with launched(FORWARD, times=times), launched(BACKWARD, times=times):
            for layer in layers:
                y = layer(y, 0.5)[0]
            y.pow(2).sum().backward()
        assert type(y) is torch.Tensor
        results.append([y, x.grad, *(p.grad.clone() for p in layers.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_transformer_layers_of_torch(launched: Launched) -> None:
    native = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, activation="relu")
    ours = tft.fuse(native, deferred=True)
    x, memory = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    with launched(FORWARD, times=1):
        torch.testing.assert_close(ours(x, memory), native(x, memory))
    # This one has a kernel for all of it, which hooks would keep it from.
    layer = tft.fuse(nn.TransformerEncoderLayer(8, 2, 16), deferred=True)
    assert type(layer.linear1) is nn.Linear and not layer._forward_hooks


class Loop(nn.Module):
    """Layers in a list and a dictionary, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(8, 8)]), "b": self.layers[0]})

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = F.relu(layer(x))
        for layer in (self.named["a"][0], self.named["b"]):
            x = layer(x).relu()
        return x


def test_layers_in_lists(launched: Launched) -> None:
    native = Loop()
    ours = tft.fuse(native, deferred=True)
    x = torch.randn(4, 8)
    with launched(FORWARD, times=5):
        torch.testing.assert_close(ours(x), native(x))


def test_pairs_that_are_certain_are_fused_as_without_deferred(launched: Launched) -> None:
    native = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "b": Decoder()})
    ours = tft.fuse(native, deferred=True)
    assert type(ours["a"][0]) is tft.nn.LinearReLU and type(ours["b"].fc1) is DeferredLinear
    x = torch.randn(4, 8)
    with launched(FORWARD, times=2):
        torch.testing.assert_close(ours["b"](ours["a"](x)), native["b"](native["a"](x)))


def test_parametrized_layers(launched: Launched) -> None:
    native = Probe()
    parametrizations.weight_norm(native.fc)
    ours = tft.fuse(native, deferred=True)
    x = inputs()
    with launched(FORWARD, times=1), launched(BACKWARD, times=1):
        got = run(ours, x, F.relu)
    torch.testing.assert_close(got, run(native, x, F.relu), rtol=1e-12, atol=1e-12)
    assert type(tft.unfuse(ours).fc).__bases__ == (nn.Linear,)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_of_models(duplicate: Any, launched: Launched) -> None:
    model = Decoder()
    twin = duplicate(tft.fuse(model, deferred=True))
    twin.register_forward_pre_hook(lambda module, args: None)
    x = torch.randn(4, 8)
    with launched(FORWARD, times=2):
        for _ in range(2):
            torch.testing.assert_close(twin(x), model(x))
    assert not _open.calls
    tft.unfuse(twin)
    assert type(twin.fc1) is nn.Linear and len(twin._forward_pre_hooks) == 1


def test_unfuse_restores_every_object() -> None:
    model = Decoder()
    text, before = repr(model), [(n, id(m), type(m)) for n, m in model.named_modules()]
    state = {id(m): set(vars(m)) for m in model.modules()}
    assert tft.fuse(model, inplace=True, deferred=True) is model
    assert "DeferredLinear" in repr(model)
    tft.fuse(model, inplace=True, deferred=True)
    tft.unfuse(model)
    assert repr(model) == text
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
    assert {id(m): set(vars(m)) for m in model.modules()} == state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_hooks_always_called for m in model.modules())


def test_one_layer_can_be_unfused(launched: Launched) -> None:
    model = tft.fuse(Decoder(), deferred=True)
    tft.unfuse(model.fc1)
    x = torch.randn(4, 8)
    with launched(FORWARD, times=0):
        torch.testing.assert_close(model(x), tft.unfuse(copy.deepcopy(model))(x))


def test_fusing_without_deferred_undoes_it() -> None:
    model = tft.fuse(Decoder(), deferred=True)
    assert type(tft.fuse(model).fc1) is nn.Linear


def test_explain() -> None:
    model = tft.fuse(Decoder(), example_inputs=torch.randn(2, 8), deferred=True)
    rows = {row.where: row for row in twinfuse.explain(model)}
    assert rows["fc1"].backend == rows["fc2"].backend == "deferred"
    assert rows["fc1"].kernel in twinfuse.launches()
    assert "1 of 1 outputs" in rows["fc1"].reason
    assert "first to use its 1 outputs" in rows["fc2"].reason
    assert "deferred" in rows["activation_fn"].reason
    for _ in range(PATIENCE):
        model(torch.randn(2, 8))
    rows = {row.where: row for row in twinfuse.explain(model)}
    assert f"{PATIENCE + 1} of {PATIENCE + 1}" in rows["fc1"].reason
    assert "native" in rows["fc2"].reason
    fresh = tft.fuse(model, deferred=True)
    assert "fuses with a ReLU" in twinfuse.explain(fresh)[0].reason
    with twinfuse.use_backend("reference"):
        assert twinfuse.explain(model)[0].backend == "reference"


def test_layers_without_a_relu_stop_waiting() -> None:
    _, ours = probes()
    kinds = []
    for _ in range(PATIENCE + 2):
        ours(inputs(), lambda z: kinds.append(type(z)) or z + 1)
    assert kinds == [Deferred] * PATIENCE + [torch.Tensor] * 2
    _, ours = probes()
    ours(inputs(), F.relu)
    for _ in range(PATIENCE + 1):
        ours(inputs(), lambda z: kinds.append(type(z)) or z + 1)
    assert kinds[-1] is Deferred


def test_two_threads_through_one_model(launched: Launched) -> None:
    model = Decoder()
    ours = tft.fuse(model, deferred=True)
    batches = [torch.randn(17, 8, requires_grad=True) for _ in range(60)]
    expected = [torch.autograd.grad(model(x)[0].sum(), x) for x in batches]
    got: dict[int, Any] = {}

    def work(start: int) -> None:
        for index in range(start, len(batches), 2):
            x = batches[index]
            got[index] = torch.autograd.grad(ours(x)[0].sum(), x)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    with launched(FORWARD, times=60), launched(BACKWARD, times=60):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close([got[i] for i in range(60)], expected)


def test_trains_like_native(launched: Launched) -> None:
    curves = []
    for prepare in (lambda m: m, lambda m: tft.fuse(m, deferred=True)):
        torch.manual_seed(4)
        model = prepare(Decoder())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        x, target = torch.randn(64, 8), torch.randn(64, 8)
        losses = []
        for _ in range(30):
            loss = F.mse_loss(model(x)[0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < 0.8 * curves[0][0]
