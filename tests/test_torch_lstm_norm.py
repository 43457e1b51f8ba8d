"""Normalised gates and recurrent dropout of `twinfuse.torch`, beside loops of plain torch."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

r = torch.randn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def product(value: Any, weight: Any, dropout: Any, scale: Any, epsilon: float) -> Any:
    if dropout is None:
        sums = value @ weight.t()
    else:
        sums = torch.cat([(value * m) @ w.t() for m, w in zip(dropout, weight.chunk(4))], -1)
    return sums if scale is None else F.layer_norm(sums, sums.shape[-1:], scale, None, epsilon)


def composed_step(
    x: Any, h: Any, c: Any, weights: dict[str, Any], dropouts: Any = (None, None)
) -> Any:
    norm = weights.get("norm", (None, None))
    sums = sum(
        product(value, weights[f"weight_{name}"], dropout, scale, weights["epsilon"])
        + weights.get(f"bias_{name}", 0)
        for value, name, dropout, scale in zip((x, h), ("ih", "hh"), dropouts, norm)
    )
    i, f, g, o = sums.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if "weight_hr" not in weights else h @ weights["weight_hr"].t()), c


def composed(module: Any, x: Any, hx: Any = None, dropouts: Any = None) -> Any:
    """What a module of time-first sequences computes, with a pair of dropouts for each direction
    of each layer."""
    drawn = iter(dropouts or itertools.repeat((None, None)))
    last: list[Any] = []
    for k in range(module.num_layers):
        outputs = []
        for end in (f"_l{k}", f"_l{k}_reverse")[: 1 + module.bidirectional]:
            named = module.named_parameters()
            weights = {n.removesuffix(end): p for n, p in named if n.endswith(end)}
            weights["epsilon"] = module.norm_epsilon
            width = weights["weight_hh"].shape[1]
            zeros = x.new_zeros(x.shape[1], width), x.new_zeros(x.shape[1], module.hidden_size)
            h, c = zeros if hx is None else (state[len(last)] for state in hx)
            backwards, factors, steps = end.endswith("reverse"), next(drawn), []
            for row in x.flip(0) if backwards else x:
                h, c = composed_step(row, h, c, weights, factors)
                steps.append(h)
            last.append((h, c))
            outputs.append(torch.stack(steps[::-1] if backwards else steps))
        x = torch.cat(outputs, -1)
    return x, tuple(map(torch.stack, zip(*last)))


def flat(results: Any) -> list[Any]:
    output, (h, c) = results
    return [output, h, c]


def assert_same_training(module: Any, results: Any, expected: Any) -> None:
    gradients = []
    for found in (results, expected):
        weights = [torch.linspace(-1, 1, each.numel()).view(each.shape) for each in found]
        loss = sum((each * w).sum() for each, w in zip(found, weights))
        gradients.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def scaled(module: Any) -> Any:
    """With scales that differ from one another."""
    for name, parameter in module.named_parameters():
        if name.startswith("norm"):
            nn.init.uniform_(parameter, 0.5, 2)
    return module


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "deep": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "proj_size": 3},
    "epsilon": {"norm_epsilon": 0.5},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@every_variant
def test_layer_norm_trains_as_composed(options: dict[str, Any], launched: Launched) -> None:
    layer = scaled(tft.nn.LSTM(4, 6, layer_norm=True, **options))
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    x, hx = r(5, 3, 4), (r(count, 3, layer.proj_size or 6), r(count, 3, 6))
    with launched("lstm_forward_f32", times=count), launched("lstm_backward_f32", times=count):
        assert_same_training(layer, flat(layer(x, hx)), flat(composed(layer, x, hx)))
    assert_same_training(layer, flat(layer(x)), flat(composed(layer, x)))
    layer.batch_first = True
    torch.testing.assert_close(layer(x.transpose(0, 1))[0].transpose(0, 1), composed(layer, x)[0])
    with twinfuse.use_backend("reference"):
        assert_same_training(
            layer, flat(layer(x.transpose(0, 1)))[1:], flat(composed(layer, x))[1:]
        )


def test_packed_and_masked_norms(launched: Launched) -> None:
    layer = scaled(tft.nn.LSTM(4, 6, 2, bidirectional=True, layer_norm=True))
    x, lengths = r(5, 3, 4), [5, 2, 3]
    mask = torch.arange(5)[:, None] < torch.tensor(lengths)
    with launched("lstm_forward_f32", times=4):
        packed, state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    output, _ = pad_packed_sequence(packed)
    masked, last = layer(x, mask=mask)
    torch.testing.assert_close(masked * mask[..., None], output)
    torch.testing.assert_close(last, state)
    for k, length in enumerate(lengths):
        expected, _ = composed(layer, x[:length, k : k + 1])
        torch.testing.assert_close(output[:length, k : k + 1], expected)


@pytest.mark.parametrize("bias", [True, False])
def test_cell_norms(bias: bool, launched: Launched) -> None:
    cell = scaled(tft.nn.LSTMCell(4, 6, bias, layer_norm=True, norm_epsilon=0.1))
    x, hx = r(3, 4), (r(3, 6), r(3, 6))
    weights = dict(cell.named_parameters()) | {"epsilon": 0.1}
    with launched("lstm_cell_forward_f32", times=1), launched("lstm_cell_backward_f32", times=1):
        assert_same_training(cell, list(cell(x, hx)), list(composed_step(x, *hx, weights)))
    torch.testing.assert_close(cell(x[0], (hx[0][0], hx[1][0]))[0], cell(x, hx)[0][0])


def test_cell_dropouts(launched: Launched) -> None:
    x, h, c, *shapes = r(3, 4), r(3, 6), r(3, 6), (24, 4), (24, 6), (24,)
    params = [r(*shape).requires_grad_() for shape in shapes]
    weights = dict(zip(("weight_ih", "weight_hh", "bias_ih"), params)) | {"epsilon": 1e-5}
    dropouts = F.dropout(torch.ones(4, 3, 4), 0.3), F.dropout(torch.ones(4, 3, 6), 0.3)
    named = dict(zip(("dropout_input", "dropout_hidden"), dropouts))
    norm = torch.rand(2, 24)
    for scales in ({}, {"norm": norm}):
        with launched("lstm_cell_backward_f32", times=1):
            ours = tft.lstm_cell(x, (h, c), *params, **scales, **named)
            got = torch.autograd.grad(sum(s.sum() for s in ours), params)
        theirs = composed_step(x, h, c, weights | scales, dropouts)
        torch.testing.assert_close(ours, theirs)
        expected = torch.autograd.grad(sum(s.sum() for s in theirs), params)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Recorder(TorchDispatchMode):
    """The dropouts of the operator's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.twinfuse._lstm.default:
            self.seen.append(args[16])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_recurrent_dropout(layer_norm: bool) -> None:
    # In float32 two orders of summation may differ by more than is allowed.
    layer = tft.nn.LSTM(4, 50, 2, bidirectional=True, recurrent_dropout=0.2, layer_norm=layer_norm)
    layer, x = layer.double(), r(7, 40, 4).double()
    with Recorder() as recorder:
        results = flat(layer(x))
    drawn = recorder.seen
    assert len(drawn) == 4 and not torch.equal(drawn[0], drawn[1])
    for factors in drawn:
        assert factors.shape == (4, 40, 50)
        assert torch.equal(factors.unique(), torch.tensor([0, 1.25]).double())
        for gate in factors:  # independent of one another
            assert abs((gate == 0).double().mean() - 0.2) < 0.03
        assert abs((factors == 0).all(0).double().mean() - 0.2**4) < 0.005
    dropouts = [(None, factors) for factors in drawn]
    assert_same_training(layer, results, flat(composed(layer, x, dropouts=dropouts)))

    params, norms = layer._flat_weights, [getattr(layer, name) for name in layer._norm_names]
    options = {"num_layers": 2, "bidirectional": True, "norms": norms}
    given = flat(tft.lstm(x, None, params, dropouts_hidden=drawn, **options))
    torch.testing.assert_close(given, results)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    torch.testing.assert_close(flat(layer(x)), flat(composed(layer, x)))


def test_dropouts_that_are_given(launched: Launched) -> None:
    layer = tft.nn.LSTM(4, 6, 2, bidirectional=True)
    x = r(5, 3, 4)
    dropouts = [
        (F.dropout(torch.ones(4, 3, n), 0.3), F.dropout(torch.ones(4, 3, 6), 0.3))
        for n in (4, 4, 12, 12)
    ]
    names = ("dropouts_input", "dropouts_hidden")
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    options |= {name: list(tensors) for name, tensors in zip(names, zip(*dropouts))}
    with launched("lstm_forward_f32", times=4), launched("lstm_backward_f32", times=4):
        ours = flat(tft.lstm(x, None, layer._flat_weights, **options))
        assert_same_training(layer, ours, flat(composed(layer, x, dropouts=dropouts)))

    # Packed in another order than the caller's, to which the dropouts belong.
    lengths = [2, 5, 3]
    packed, state = tft.lstm(
        pack_padded_sequence(x, lengths, enforce_sorted=False), None, layer._flat_weights, **options
    )
    output, _ = pad_packed_sequence(packed)
    for k, length in enumerate(lengths):
        one = slice(k, k + 1)
        of_one = [tuple(t[:, one] for t in pair) for pair in dropouts]
        expected, last = composed(layer, x[:length, one], dropouts=of_one)
        torch.testing.assert_close(output[:length, one], expected)
        torch.testing.assert_close([s[:, one] for s in state], list(last))


def test_everything_dropped() -> None:
    layer = tft.nn.LSTM(4, 6, recurrent_dropout=1.0)
    x = r(5, 3, 4)
    results = flat(layer(x))
    nn.init.zeros_(layer.weight_hh_l0)
    torch.testing.assert_close(results, flat(layer.eval()(x)))


def test_half_precision_and_autocast(launched: Launched) -> None:
    layer = scaled(tft.nn.LSTM(4, 6, layer_norm=True, recurrent_dropout=0.5))
    x = r(5, 3, 4)
    with Recorder() as recorder:
        flat(layer(x))
    dropouts = [factors.bfloat16() for factors in recorder.seen]
    params = [*layer._flat_weights, layer.norm_l0]

    def call(x: Any, *params: Any) -> list[Any]:
        *params, norm = params
        return flat(tft.lstm(x, None, params, norms=[norm], dropouts_hidden=dropouts))

    expected = flat(composed(layer, x, dropouts=[(None, recorder.seen[0])]))
    with torch.autocast("cpu", dtype=torch.bfloat16), launched("lstm_forward_bf16", times=1):
        got = call(x, *params)
    half = call(x.bfloat16(), *(p.bfloat16() for p in params))
    for a, b, c in zip(got, half, expected):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.float(), c, rtol=0.05, atol=0.05)
    gradients = torch.autograd.grad(got[0].float().sum(), params)
    for a, b in zip(gradients, torch.autograd.grad(expected[0].sum(), params)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("factor", (3e-4, 200.0))
def test_the_reference_normalises_half_precision_in_float32(factor: float) -> None:
    """Squares of large sums overflow in float16, and small ones vanish beside no epsilon there."""
    torch.manual_seed(0)
    layer = tft.nn.LSTM(16, 8, layer_norm=True).double()
    input = factor * torch.randn(5, 3, 16, dtype=torch.float64)
    exact = input.clone().requires_grad_()
    results: dict[str | None, list[float]] = {}
    output = layer(exact)[0]
    (output * output.detach()).sum().backward()
    layer.half()
    for backend in (None, "reference"):
        half = input.half().requires_grad_()
        with twinfuse.use_backend(backend):
            got = layer(half)[0]
            (got * output.half().detach()).sum().backward()
        assert half.grad is not None and exact.grad is not None
        results[backend] = [
            ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
            for found, wanted in ((got, output), (half.grad, exact.grad))
        ]
    for kernel, reference in zip(results[None], results["reference"]):
        assert reference < 4 * kernel + 4e-3 and reference < 0.05


def test_parameters_of_layer_norm() -> None:
    layer = tft.nn.LSTM(
        4, 6, 2, bidirectional=True, peephole=True, layer_norm=True, recurrent_dropout=0.1
    )
    names = ["norm_l0", "norm_l0_reverse", "norm_l1", "norm_l1_reverse"]
    assert [name for name, _ in layer.named_parameters()][-4:] == names
    assert all(torch.equal(getattr(layer, name), torch.ones(2, 24)) for name in names)
    assert len(layer._flat_weights) == 16
    assert "peephole=True, layer_norm=True, recurrent_dropout=0.1" in repr(layer)
    cell = tft.nn.LSTMCell(4, 6, layer_norm=True, norm_epsilon=1e-3, dtype=torch.float64)
    assert repr(cell) == "LSTMCell(4, 6, layer_norm=True, norm_epsilon=0.001)"
    assert cell.norm.dtype == torch.float64
    for module in (scaled(layer), scaled(cell)):
        module.reset_parameters()
        for name, parameter in module.named_parameters():
            assert bool((parameter == 1).all()) == name.startswith("norm")
    plain = tft.nn.LSTM(4, 6)
    assert repr(plain) == repr(nn.LSTM(4, 6)) and not plain._norm_names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: Any, launched: Launched) -> None:
    layer = scaled(tft.nn.LSTM(4, 6, layer_norm=True, norm_epsilon=0.1, recurrent_dropout=0.5))
    twin, x = duplicate(layer), r(5, 3, 4)
    assert repr(twin) == repr(layer)
    assert not torch.equal(twin(x)[0], twin(x)[0])
    expected = layer.eval()(x)[0]
    assert torch.equal(twin.eval()(x)[0], expected)

    twin.__class__ = nn.LSTM  # which knows none of it
    with launched("lstm_forward", times=0):
        assert not torch.equal(twin(x)[0], expected)
    twin.__class__ = tft.nn.LSTM
    assert torch.equal(twin(x)[0], expected)
    other = tft.nn.LSTM(4, 6, layer_norm=True, norm_epsilon=0.1).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], expected)
    with pytest.raises(RuntimeError, match="norm_l0"):
        nn.LSTM(4, 6).load_state_dict(layer.state_dict())
