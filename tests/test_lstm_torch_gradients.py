"""`twinfuse.torch.lstm` and `lstm_cell` in eager code: gradients to any order, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import assert_same, random  # noqa: E402
from twinfuse import _core  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def arguments() -> tuple[Any, ...]:
    """input, h, c and weights of a layer in float64."""
    shapes = (3, 2, 4), (1, 2, 3), (1, 2, 3), (12, 4), (12, 3), (12,), (12,)
    return tuple(random(*shape) for shape in shapes)


def layer(x: Any, h: Any, c: Any, *params: Any, **options: Any) -> tuple[Any, ...]:
    output, (h, c) = tft.lstm(x, (h, c), params, **options)
    return output, h, c


def native_layer(x: Any, h: Any, c: Any, *params: Any) -> tuple[Any, ...]:
    return torch.lstm(x, (h, c), params, True, 1, 0.0, False, False, False)


def cell(x: Any, h: Any, c: Any, *weights: Any, **options: Any) -> tuple[Any, ...]:
    return tft.lstm_cell(x, (h, c), *weights, **options)


def native_cell(x: Any, h: Any, c: Any, *weights: Any) -> tuple[Any, ...]:
    return torch.lstm_cell(x, (h, c), *weights)


def one_step(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((t[0] if i < 3 else t).detach().requires_grad_() for i, t in enumerate(tensors))


PAIRS = {
    "layer": (layer, native_layer, arguments),
    "cell": (cell, native_cell, lambda: one_step(arguments())),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


@every_pair
def test_gradients_of_gradients(name: str) -> None:
    ours, _, make = PAIRS[name]
    tensors = make()
    assert torch.autograd.gradcheck(ours, tensors)
    assert torch.autograd.gradgradcheck(ours, tensors)


@every_pair
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 5, 6])
def test_gradients_of_one_gradient(name: str, wanted: int) -> None:
    ours, _, make = PAIRS[name]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(make())]
    assert torch.autograd.gradgradcheck(ours, leaves)


def test_gradients_of_gradients_of_the_options() -> None:
    tensors = (*arguments(), random(3, 3))
    mask = torch.tensor([[True, True], [True, False], [False, True]])

    def op(*tensors: Any) -> Any:
        *rest, peephole = tensors
        return layer(
            *rest, peepholes=[peephole], mask=mask, zoneout_hidden=0.2, zoneout_cell=0.3,
            activation="sigmoid", recurrent_activation="tanh", recompute=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)

    def step(*tensors: Any) -> Any:
        *rest, peephole = tensors
        share = torch.full((), 0.25, dtype=torch.float64)
        return cell(*rest, peephole=peephole, zoneout_hidden=share, zoneout_cell=share)

    tensors = (*one_step(tensors[:-1]), tensors[-1])
    assert torch.autograd.gradcheck(step, tensors)
    assert torch.autograd.gradgradcheck(step, tensors)


def options_of(name: str, kind: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Keywords with norms, dropouts or both; the norm is behind the other leaves."""
    leaves, (x, *_) = PAIRS[name][2](), arguments()
    kept = torch.rand(4, 2, x.shape[-1]).double(), torch.rand(4, 1, 3).double()
    dropouts = {"dropouts_input": [kept[0]], "dropouts_hidden": [kept[1]]}
    if name == "cell":
        dropouts = dict(zip(("dropout_input", "dropout_hidden"), kept))
    options: dict[str, Any] = dropouts if "dropout" in kind else {}
    return options | {"norm_epsilon": 0.1}, (*leaves, *([random(2, 12)] if "norm" in kind else ()))


@every_pair
@pytest.mark.parametrize("kind", ["norm", "dropout", "norm_dropout"])
def test_gradients_of_gradients_of_norm_and_dropout(name: str, kind: str) -> None:
    ours, (options, tensors) = PAIRS[name][0], options_of(name, kind)

    def op(*tensors: Any) -> Any:
        if name == "cell":
            return ours(*tensors[:7], norm=tensors[7] if "norm" in kind else None, **options)
        return ours(*tensors[:7], norms=tensors[7:], **options)

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)
    if "norm" in kind:
        only = (*(t.detach() for t in tensors[:7]), tensors[7])
        assert torch.autograd.gradgradcheck(op, only)


def test_gradients_of_norms_with_other_options() -> None:
    tensors = (*arguments(), random(3, 3), random(2, 12))
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    kept = torch.rand(4, 2, 3).double()
    sizes = torch.tensor([3, 2, 1])

    def masked(*tensors: Any) -> Any:
        *rest, peephole, norm = tensors
        return layer(
            *rest, peepholes=[peephole], norms=[norm], mask=mask, zoneout_hidden=0.2,
            zoneout_cell=0.3, dropouts_hidden=[kept], activation="sigmoid", recompute=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(masked, tensors)
    assert torch.autograd.gradgradcheck(masked, tensors, fast_mode=True)

    def packed(x: Any, h: Any, c: Any, hr: Any, norm: Any, *weights: Any) -> Any:
        return torch.ops.twinfuse.lstm(
            x, h, c, *weights, hr, norm=norm, batch_sizes=sizes, reverse=True,
            dropout_input=kept[:, [0, 1, 0], :1], dropout_hidden=kept[:, [1, 0, 1], :2],
        )  # fmt: skip

    shapes = (6, 4), (3, 2), (3, 3), (2, 3), (2, 12), (12, 4), (12, 2), (12,), (12,)
    tensors = tuple(random(*shape) for shape in shapes)
    assert torch.autograd.gradcheck(packed, tensors)
    assert torch.autograd.gradgradcheck(packed, tensors, fast_mode=True)


@every_pair
def test_third_order(name: str) -> None:
    ours, theirs, make = PAIRS[name]
    tensors = make()

    def third(op: Any) -> Any:
        value = sum(each.pow(3).sum() for each in op(*tensors))
        for _ in range(2):
            gradients = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(g.pow(2).sum() for g in gradients)
        return torch.autograd.grad(value, tensors)

    torch.testing.assert_close(third(ours), third(theirs), rtol=1e-8, atol=1e-8)


@every_pair
def test_states_that_depend_on_the_input(name: str) -> None:
    """Second order takes the graph of each argument, and not that between them."""
    ours, theirs, make = PAIRS[name]
    x, h, *rest = make()

    def second(op: Any) -> Any:
        values = op(x, h, x.sum() * h, *rest[1:])
        (gradient,) = torch.autograd.grad(sum(v.pow(2).sum() for v in values), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), (x, h, *rest[1:]))

    torch.testing.assert_close(second(ours), second(theirs), rtol=1e-9, atol=1e-9)


@every_pair
def test_double_backward_uses_the_fused_backward(name: str, launched: Launched) -> None:
    ours, _, make = PAIRS[name]
    x, *rest = make()
    prefix = "lstm_backward_f64" if name == "layer" else "lstm_cell_backward_f64"
    with launched(prefix, times=1):
        (gradient,) = torch.autograd.grad(ours(x, *rest)[0].sum(), x, create_graph=True)
        gradient.sum().backward()


@every_pair
@pytest.mark.parametrize("wanted", range(7))
def test_only_the_gradients_asked_for(name: str, wanted: int) -> None:
    ours, theirs, make = PAIRS[name]
    tensors = make()
    expected = torch.autograd.grad(sum(v.pow(2).sum() for v in theirs(*tensors)), tensors)
    leaves = [t.detach().requires_grad_(i != wanted) for i, t in enumerate(tensors)]
    sum(v.pow(2).sum() for v in ours(*leaves)).backward()
    for i, (leaf, gradient) in enumerate(zip(leaves, expected)):
        assert (leaf.grad is not None) == (i != wanted)
        if i != wanted:
            assert_same(leaf.grad, gradient)


@every_pair
def test_biases_do_not_share_a_gradient(name: str) -> None:
    ours, _, make = PAIRS[name]
    tensors = make()
    first, second = torch.autograd.grad(ours(*tensors)[0].sum(), tensors[5:])
    assert torch.equal(first, second)
    first.zero_()
    assert bool(second.any())


@every_pair
def test_gradients_fit_their_leaves(name: str) -> None:
    ours, _, make = PAIRS[name]
    tensors = list(make())
    for i in (0, 3, 4):  # in memory the other way round
        turned = tensors[i].detach().transpose(0, 1).contiguous().transpose(0, 1)
        tensors[i] = turned.requires_grad_()
    outputs = ours(*tensors)
    assert all(each.is_contiguous() for each in outputs)
    gradients = torch.autograd.grad(outputs[0].sum(), tensors)
    assert [g.stride() for g in gradients] == [t.stride() for t in tensors]


def test_what_is_kept_for_backward() -> None:
    x, h, c, *params = arguments()

    own = {t.untyped_storage().data_ptr() for t in (x, h, c, *params)}

    def kept(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x, h, c, *params, **options)
        return sum(sizes.values())

    assert kept() == 3 * 2 * (5 * 3 + 3)  # rows of 5H + R
    assert kept(recompute=True) == 0
    norms = [random(2, 12)]
    own.add(norms[0].untyped_storage().data_ptr())
    assert kept(norms=norms) == 3 * 2 * (13 * 3 + 3)
    assert kept(norms=norms, recompute=True) == 0


def test_recompute_gives_the_same_bits(launched: Launched) -> None:
    tensors = arguments()
    expected = torch.autograd.grad(layer(*tensors)[0].pow(2).sum(), tensors)
    with launched("lstm_forward_f64", times=2), launched("lstm_backward_f64", times=1):
        got = torch.autograd.grad(layer(*tensors, recompute=True)[0].pow(2).sum(), tensors)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@every_pair
def test_inference_mode(name: str) -> None:
    ours, _, make = PAIRS[name]
    tensors = make()
    with torch.inference_mode():
        results = ours(*tensors)
    assert all(each.is_inference() for each in results)
    for a, b in zip(results, ours(*tensors)):
        assert torch.equal(a, b.detach())


@every_pair
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(name: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    ours, theirs, make = PAIRS[name]
    tensors = make()
    checkpoint(ours, *tensors, use_reentrant=reentrant)[0].pow(2).sum().backward()
    expected = torch.autograd.grad(theirs(*tensors)[0].pow(2).sum(), tensors)
    assert_same([t.grad for t in tensors], list(expected))


def test_explain() -> None:
    x, h, c, *params = arguments()
    for op, call in (
        ("lstm", (tft.lstm, x, (h, c), params)),
        ("lstm", (tft.lstm, x, None, params)),
        ("lstm_cell", (tft.lstm_cell, x[0], (h[0], c[0]), *params)),
    ):
        forward, backward = twinfuse.explain(*call)
        assert (forward.op, forward.backend) == (op, "cpu")
        assert (backward.op, backward.backend) == (f"{op}_backward", "cpu")
        for row, kind in ((forward, "forward"), (backward, "backward")):
            assert row.kernel in twinfuse.launches()
            assert row.kernel.startswith(f"{op}_{kind}_f64")
    with torch.no_grad():
        assert len(twinfuse.explain(tft.lstm, x, None, params)) == 1
    (row,) = twinfuse.explain(tft.lstm, x.detach().to("meta"), None, [p.detach() for p in params])
    assert row.backend == "reference" and "meta" in row.reason


def test_explain_names_what_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where kernels differ by size."""
    asked: list[Any] = []

    def kernel(*args: Any, **sizes: int) -> str:
        asked.append((*args[:2], sizes))
        return "the_kernel"

    monkeypatch.setattr(_core, "lstm_gpu_kernel", kernel)
    monkeypatch.setattr(_core, "reported", lambda name, *_: ("cuda", name, ""))
    x, h, c, *params = arguments()
    _, batch, units = h.shape
    for call, steps in (
        ((tft.lstm, x, (h, c), params), x.shape[0]),
        ((tft.lstm_cell, x[0], (h[0], c[0]), *params), 1),
    ):
        rows = twinfuse.explain(*call)
        assert all(row.kernel.endswith(" (the_kernel)") for row in rows)
        sizes = {"steps": steps, "batch": batch, "units": units}
        assert asked == [(backward, "float64", sizes) for backward in (False, True)]
        asked.clear()
