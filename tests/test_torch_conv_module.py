"""`ConvReLU1d` and `ConvReLU2d` of `twinfuse.torch.nn`: in place of a convolution and a ReLU."""

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

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

FORWARD, BACKWARD = "conv_relu_forward_f32", "conv_relu_backward_f32"
KINDS = {
    "1d": (tft.nn.ConvReLU1d, nn.Conv1d, (2, 4, 15)),
    "2d": (tft.nn.ConvReLU2d, nn.Conv2d, (2, 4, 9, 8)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)
    torch._dynamo.reset()


def pair(kind: str, *args: Any, **options: Any) -> tuple[Any, Any, Any]:
    """A fused layer, the native layers with the same parameters, and an input."""
    fused, native, shape = KINDS[kind]
    layer, conv = (k(4, 6, *(args or (3,)), **options) for k in (fused, native))
    conv.load_state_dict(layer.state_dict())
    return layer, nn.Sequential(conv, nn.ReLU()), torch.randn(shape)


def assert_same_training(layer: Any, native: Any, x: Any) -> None:
    ours, theirs = layer(x), native(x)
    torch.testing.assert_close(ours, theirs)
    ours.pow(2).sum().backward()
    theirs.pow(2).sum().backward()
    theirs_by_name = {n.removeprefix("0."): p.grad for n, p in native.named_parameters()}
    assert list(theirs_by_name) == [name for name, _ in layer.named_parameters()]
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_by_name[name], rtol=1e-4, atol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "all": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "stride": 2, "padding_mode": "replicate"},
    "circular_same": {"padding": "same", "padding_mode": "circular"},
}


@every_kind
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_is_a_convolution_and_a_relu(
    kind: str, name: str, batched: bool, launched: Launched
) -> None:
    layer, native, x = pair(kind, **OPTIONS[name])
    assert isinstance(layer, KINDS[kind][1])
    assert repr(layer) == repr(native[0]).replace("Conv", "ConvReLU")
    with launched(FORWARD, times=1), launched(BACKWARD, times=1):
        assert_same_training(layer, native, x if batched else x[0])


@every_kind
def test_even_kernels_keep_the_size(kind: str) -> None:
    layer, native, x = pair(kind, 4, padding="same")
    assert layer(x).shape[2:] == x.shape[2:]
    assert_same_training(layer, native, x)


def test_rectangles() -> None:
    layer, native, x = pair("2d", (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
    assert_same_training(layer, native, x)


@every_kind
def test_initial_values_are_those_of_the_convolution(kind: str) -> None:
    layers = []
    for make in KINDS[kind][:2]:
        torch.manual_seed(5)
        layers.append(make(4, 6, 3, dtype=torch.float64))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)


@every_kind
def test_state_dict_goes_both_ways(kind: str) -> None:
    fused, native, _ = KINDS[kind]
    layer, conv = fused(4, 6, 3), native(4, 6, 3)
    assert list(layer.state_dict()) == list(conv.state_dict())
    layer.load_state_dict(conv.state_dict(), strict=True)
    assert torch.equal(layer.weight, conv.weight)
    conv.load_state_dict(fused(4, 6, 3).state_dict(), strict=True)


def saved_and_loaded(layer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_kind
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies(kind: str, duplicate: Any, launched: Launched) -> None:
    layer, _, x = pair(kind)
    twin = duplicate(layer)
    with launched(FORWARD, times=2):
        assert torch.equal(twin(x), layer(x))
    assert type(twin) is type(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


@every_kind
def test_weight_norm_and_its_removal(kind: str, launched: Launched) -> None:
    layer, native, x = pair(kind)
    parametrizations.weight_norm(layer)
    parametrizations.weight_norm(native[0])
    with launched(FORWARD, times=1):
        assert_same_training(layer, native, x)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is KINDS[kind][0]


@every_kind
def test_pruning(kind: str, launched: Launched) -> None:
    layer, native, x = pair(kind)
    for module in (layer, native[0]):
        prune.l1_unstructured(module, "weight", 0.5)
    with launched(FORWARD, times=1):
        assert_same_training(layer, native, x)


@every_kind
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["same", "all", "reflect"])
def test_compiled(kind: str, backend: str, name: str, launched: Launched) -> None:
    layer, native, x = pair(kind, **OPTIONS[name])
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with launched(FORWARD, times=1), launched(BACKWARD, times=1):
        y = compiled(x)
        y.pow(2).sum().backward()
    native(x).pow(2).sum().backward()
    torch.testing.assert_close(y, native(x))
    torch.testing.assert_close(layer.weight.grad, native[0].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, native[0].bias.grad, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_exported_and_saved(kind: str, strict: bool, launched: Launched) -> None:
    layer, native, x = pair(kind, padding="same")
    program = torch.export.export(layer, (x,), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with launched(FORWARD, times=1):
        torch.testing.assert_close(torch.export.load(buffer).module()(x), native(x))


@every_kind
def test_half_and_double(kind: str) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer, native, x = (m.to(dtype) for m in pair(kind))
        torch.testing.assert_close(layer(x), native(x))


def test_explain_lists_it() -> None:
    model = nn.Sequential(
        tft.nn.ConvReLU2d(4, 8, (5, 3), dilation=2, groups=2),
        nn.Flatten(2),
        tft.nn.ConvReLU1d(8, 4, 3, padding="same", padding_mode="circular"),
        nn.Conv1d(4, 1, 1),
    )
    first, second, plain = twinfuse.explain(model)
    assert (first.where, first.op, first.backend) == ("0", "conv2d_relu", "cpu")
    assert (second.where, second.op, second.backend) == ("2", "conv1d_relu", "cpu")
    assert first.kernel.startswith(FORWARD) and second.kernel.startswith(FORWARD)
    assert (plain.where, plain.backend, plain.reason) == ("3", "native", "no ReLU follows")
