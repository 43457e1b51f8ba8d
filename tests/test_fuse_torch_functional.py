"""`twinfuse.torch.fuse` where ReLU is a function, a method, or a module called for other values."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require
from tests.rule import assert_within_twice

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import relu  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from twinfuse.torch import _rewrite  # noqa: E402

FORWARD, BACKWARD = "linear_relu_forward_f32", "linear_relu_backward_f32"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.relu = nn.ReLU()
        self.scale, self.rate = 1.0, 0.0


class Functions(Layers):
    def forward(self, x: Any) -> Any:
        return self.fc3(F.relu(self.fc2(torch.relu(self.fc1(x)))))


class Imported(Layers):
    def forward(self, x: Any) -> Any:
        x = relu(input=self.fc1(x), inplace=True)
        return self.fc3(nn.functional.relu(self.fc2(x), True))


class Methods(Layers):
    def forward(self, x: Any) -> Any:
        hidden = self.fc1(x).relu()
        return self.fc3(self.fc2(hidden).relu_())


class Statements(Layers):
    def forward(self, x: Any) -> Any:
        x = self.fc1(x)
        x.relu_()
        x = self.fc2(x * self.scale)
        torch.relu_(x)
        return self.fc3(x) + x.sum(1, keepdim=True)


class ManyCalls(Layers):
    def forward(self, x: Any) -> Any:
        twice = self.fc2(F.relu(self.fc1(x))).relu() + self.fc2(torch.relu(self.fc1(-x))).relu()
        return self.fc3(F.dropout(twice, self.rate, self.training)) * self.scale


class OneReLUForAll(Layers):
    """As in residual networks: a ReLU behind a layer, and behind a sum."""

    def forward(self, x: Any) -> Any:
        y = self.relu(self.fc1(x))
        y = self.relu(self.fc2(y) + y)
        return self.fc3(self.relu(y - 1)) + self.relu(input=self.fc1(-x)).sum()


class Private(Layers):
    half = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.__twice = 2

    def forward(self, x: Any, *, shift: float = 0.5) -> Any:
        return self.fc3(F.relu(self.fc1(x + shift))) * self.__twice * __class__.half


def closure() -> nn.Module:
    factor = 2.0

    class Closes(Layers):
        def forward(self, x: Any) -> Any:
            return self.fc3(torch.relu(self.fc1(x))) * factor

    return Closes()


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "functions": (Functions, 2),
    "imported": (Imported, 2),
    "methods": (Methods, 2),
    "statements": (Statements, 2),
    "many_calls": (ManyCalls, 4),
    "one_relu": (OneReLUForAll, 2),
    "private": (Private, 1),
    "closure": (closure, 1),
}


def run(model: nn.Module, dtype: Any = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(y.pow(2).sum(), (x, *model.parameters()), allow_unused=True)
    names = ("input", *(name for name, _ in model.named_parameters()))
    results = {"output": y, **dict(zip(names, gradients, strict=True))}
    return {name: value.detach().numpy() for name, value in results.items() if value is not None}


def assert_as_good(model: nn.Module, native: nn.Module) -> None:
    expected, reference = run(native), run(copy.deepcopy(native).double(), torch.float64)
    for name, value in run(model).items():
        assert_within_twice(value, expected[name], reference[name], name, dtype="float32")


@pytest.mark.parametrize("name", MODELS)
def test_same_model_on_fused_kernels(name: str, launched: Launched) -> None:
    make, count = MODELS[name]
    native = make()
    fused = tft.fuse(native)
    with launched(FORWARD, count), launched(BACKWARD, count):
        run(fused)
    assert_as_good(fused, native)
    assert isinstance(fused, type(native)) and repr(type(fused)) == repr(type(native))
    assert list(fused.state_dict()) == list(native.state_dict())
    pairs = zip(fused.parameters(), native.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_the_class(name: str) -> None:
    model = MODELS[name][0]()
    kind, expected, text = type(model), run(model), repr(model)
    assert type(tft.fuse(model, inplace=True)) is not kind
    assert type(tft.unfuse(model)) is kind and repr(model) == text
    got = run(model)
    assert all((got[key] == value).all() for key, value in expected.items())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "closure"])
def test_copies_of_fused_models(name: str, launched: Launched) -> None:
    make, count = MODELS[name]
    model = tft.fuse(make())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with launched(FORWARD, count):
            got = run(twin)
        assert all((got[key] == value).all() for key, value in run(model).items())
        assert type(tft.unfuse(twin)) is make


def test_saved_and_loaded(launched: Launched) -> None:
    model, other, file = tft.fuse(Functions()), tft.fuse(Functions()), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file), strict=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (other, torch.load(file, weights_only=False)):
        with launched(FORWARD, 2):
            got = run(twin)
        assert all((got[key] == value).all() for key, value in run(model).items())


def test_a_forward_method_that_has_changed_is_not_rewritten() -> None:
    calls = type(tft.fuse(Functions())).calls
    with pytest.raises(RuntimeError, match=r"Imported is not what it was.*torch\.relu\(self\.fc1"):
        _rewrite.rewritten(Imported, calls)


def test_a_class_may_get_another_forward_method(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Functions(), torch.randn(5, 8)
    tft.fuse(model)
    monkeypatch.setattr(Functions, "forward", Methods.forward)
    model.fc1.bias.data += 1
    fused = tft.fuse(model)
    assert type(fused) is Functions
    torch.testing.assert_close(fused(x), model(x))


def test_spectral_norm_takes_as_many_steps(launched: Launched) -> None:
    native = Functions()
    nn.utils.parametrizations.spectral_norm(native.fc1)
    fused = tft.fuse(copy.deepcopy(native), inplace=True)
    for _ in range(3):
        with launched(FORWARD, 2):
            torch.testing.assert_close(fused(torch.ones(5, 8)), native(torch.ones(5, 8)))
        twinfuse.explain(fused)
    state = fused.state_dict()
    assert all(torch.equal(state[key], value) for key, value in native.state_dict().items())


class OwnWeight(Functions):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))


def test_parents_that_are_parametrized_after_fusing(launched: Launched) -> None:
    model, x = OwnWeight(), torch.randn(5, 8)
    expected = model(x)
    parametrize.register_parametrization(tft.fuse(model, inplace=True), "weight", nn.Identity())
    with launched(FORWARD, 2):
        torch.testing.assert_close(model(x), expected)
    assert parametrize.is_parametrized(tft.unfuse(model), "weight")
    assert torch.equal(model(x), expected)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is OwnWeight


def test_attributes_are_read_when_the_model_runs() -> None:
    native = ManyCalls()
    fused = tft.fuse(native)
    for model in (native, fused):
        model.scale, model.rate = 3.0, 1.0
    x = torch.randn(5, 8)
    torch.testing.assert_close(fused(x), 3 * native.fc3.bias.expand(5, 8))
    torch.testing.assert_close(fused.eval()(x), native.eval()(x))
    assert fused(x).std() != 0


def test_a_copy_shares_its_parameters() -> None:
    native = Functions()
    fused = tft.fuse(native)
    assert type(native) is Functions and type(native.fc1) is nn.Linear
    optimizer = torch.optim.SGD(native.parameters(), lr=0.1)
    before = run(native)["output"]
    fused(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    assert (run(native)["output"] != before).any()
    torch.testing.assert_close(run(fused)["output"], run(native)["output"])


@pytest.mark.parametrize("kind", [Functions, OneReLUForAll])
def test_compiled(kind: Any, launched: Launched) -> None:
    torch._dynamo.reset()
    model, x = kind(), torch.randn(5, 8)
    compiled = torch.compile(tft.fuse(model), fullgraph=True, backend="aot_eager")
    with launched(FORWARD, 2):
        torch.testing.assert_close(compiled(x), model(x))


class UsedBefore(Layers):
    def forward(self, x: Any) -> Any:
        x = self.fc1(x)
        y = x * 2
        return self.fc3(x.relu_()) + y.sum()


class NamedInPlace(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relu_ = nn.ReLU()

    def forward(self, x: Any) -> Any:
        x = self.fc1(x)
        return self.fc3(self.relu_(x)) + x.sum()


class UsedTwice(Layers):
    def forward(self, x: Any) -> Any:
        x = self.fc1(x)
        return self.fc3(F.relu(x)) + x.sum()


class NotEveryCall(Layers):
    def forward(self, x: Any) -> Any:
        return F.relu(self.fc1(x)) + self.fc1(-x)


class OtherFunction(Layers):
    def forward(self, x: Any) -> Any:
        return self.fc3(F.relu6(self.fc1(x)))


class Unpacked(Layers):
    def forward(self, x: Any) -> Any:
        return self.fc3(F.relu(*(self.fc1(x),)))


class Registers(Layers):
    kinds: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        cls.kinds.append(cls)

    def forward(self, x: Any) -> Any:
        return self.fc3(F.relu(self.fc1(x)))


class Meta(type):
    pass


class HasMetaclass(Layers, metaclass=Meta):
    def forward(self, x: Any) -> Any:
        return self.fc3(F.relu(self.fc1(x)))


def without_source() -> nn.Module:
    scope = {"Layers": Layers, "F": F}
    exec("class NoSource(Layers):\n def forward(s, x): return s.fc3(F.relu(s.fc1(x)))", scope)
    return scope["NoSource"]()


def replaced() -> nn.Module:
    return type("Functions", (Functions,), {"forward": lambda self, x: F.relu(self.fc1(x))})()


NATIVE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "used_before": (UsedBefore, "is used as well"),
    "named_in_place": (NamedInPlace, "is used as well"),
    "used_twice": (UsedTwice, "is used as well"),
    "not_every_call": (NotEveryCall, "no ReLU follows"),
    "other_function": (OtherFunction, "no ReLU follows"),
    "unpacked": (Unpacked, "not clear where"),
    "registers": (Registers, "registers its subclasses"),
    "metaclass": (HasMetaclass, "has the metaclass Meta"),
    "no_source": (without_source, "is not available"),
    "replaced": (replaced, "is not available"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_certain_stays_native(name: str) -> None:
    make, reason = NATIVE[name]
    native = make()
    fused = tft.fuse(native)
    (row,) = (row for row in twinfuse.explain(fused) if row.where == "fc1")
    assert row.backend == "native" and reason in row.reason
    assert type(fused) is type(native) and type(fused.fc1) is nn.Linear
    got = run(fused)
    assert all((got[key] == value).all() for key, value in run(native).items())
    assert not Registers.kinds


def test_explain() -> None:
    model = OneReLUForAll()
    before = {row.where: row.reason for row in twinfuse.explain(model)}
    assert before["fc1"] == "can be fused: call fuse(model)"
    assert before["relu"] == "it is called on other values as well"
    after = {row.where: row.backend for row in twinfuse.explain(tft.fuse(model))}
    assert after == {"fc1": "cpu", "fc2": "native", "fc3": "native", "relu": "native"}


def test_example_inputs_give_lazy_layers_their_weights(launched: Launched) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Dropout(0.5))
    fused = tft.fuse(model, torch.randn(2, 3))
    assert fused.training and fused[2].training
    with launched(FORWARD, 1):
        fused(torch.randn(2, 3))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 0

    def forward(self, x: Any, y: Any) -> Any:
        self.calls += 1
        return {"sum": self.net(x) + y, "calls": torch.tensor(self.calls)}


def test_example_inputs_whose_outputs_differ() -> None:
    model = Counts()
    with pytest.raises(RuntimeError, match="example_inputs: expected outputs equal"):
        tft.fuse(model, (torch.randn(2, 3), torch.randn(2, 3)), inplace=True)
    assert type(model.net[0]) is nn.Linear
