"""`twinfuse.torch.lstm` and `lstm_cell` inside what else torch has: transforms and modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch._dynamo.testing  # noqa: E402, F811
import torch.nn.functional as F  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import assert_same, random  # noqa: E402

Op = Callable[..., Any]


def layer_function(x: Any, h: Any, c: Any, *params: Any) -> Any:
    output, (h, c) = tft.lstm(x, (h.unsqueeze(0), c.unsqueeze(0)), params)
    return output, h.squeeze(0), c.squeeze(0)


def cell_function(x: Any, h: Any, c: Any, *weights: Any) -> Any:
    return tft.lstm_cell(x, (h, c), *weights)


def norm_function(x: Any, h: Any, c: Any, *params: Any) -> Any:
    """A layer whose scales are its bias, with dropout."""
    options = {name: value.to(x.dtype) for name, value in NOISE.items()}
    return torch.ops.twinfuse.lstm(x, h, c, *params, norm=params[2].expand(2, 20), **options)


def composed_norm_layer(x: Any, h: Any, c: Any, ih: Any, hh: Any, b: Any, d: Any) -> Any:
    return composed_layer(x, h, c, ih, hh, b, d, b)


def composed_cell(
    x: Any, h: Any, c: Any, ih: Any, hh: Any, b: Any, d: Any, norm: Any = None
) -> Any:
    """Native's own has no rule for vmap."""
    if norm is None:
        sums = x @ ih.t(), h @ hh.t()
    else:
        pairs = zip((x, h), (ih, hh), NOISE.values())
        sums = tuple(
            F.layer_norm(
                torch.cat([(v * m.to(v.dtype)) @ w.t() for m, w in zip(ms, weight.chunk(4))], -1),
                (20,),
                norm,
            )
            for v, weight, ms in pairs
        )
    i, f, g, o = (sums[0] + b + sums[1] + d).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def composed_layer(x: Any, h: Any, c: Any, *weights: Any) -> Any:
    outputs = []
    for row in x.unbind(0):
        h, c = composed_cell(row, h, c, *weights)
        outputs.append(h)
    return torch.stack(outputs), h, c


# The same for all samples.
NOISE = {
    "dropout_input": torch.linspace(0, 2, 16).view(4, 1, 4),
    "dropout_hidden": torch.linspace(2, 0, 20).view(4, 1, 5),
}
OPS: dict[str, tuple[Op, Op]] = {
    "norm_layer": (norm_function, composed_norm_layer),
    "layer_function": (layer_function, composed_layer),
    "layer_operator": (torch.ops.twinfuse.lstm, composed_layer),
    "cell_function": (cell_function, composed_cell),
    "cell_operator": (torch.ops.twinfuse.lstm_cell, composed_cell),
}
every_op = pytest.mark.parametrize("name", OPS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch._dynamo.reset()


def arguments(name: str, rows: int = 2, steps: int = 3, **options: Any) -> list[Any]:
    leading = (steps, rows) if "layer" in name else (rows,)
    shapes = (*leading, 4), (rows, 5), (rows, 5), (20, 4), (20, 5), (20,), (20,)
    return [random(*shape, **options) for shape in shapes]


def prefix(name: str, direction: str = "forward", dtype: str = "f64") -> str:
    return f"{'lstm' if 'layer' in name else 'lstm_cell'}_{direction}_{dtype}"


def transformed(kind: str, op: Op, args: list[Any]) -> Any:
    x, h, c, ih, *rest = args

    def loss(weight: Any, x: Any) -> Any:
        return sum(each.pow(2).sum() for each in op(x, h, c, weight, *rest))

    def of_weight(weight: Any) -> Any:
        return op(x, h, c, weight, *rest)[0]

    two = torch.stack([x, -x], 1)
    f, others = torch.func, (None,) * 4
    return {
        "grad": lambda: f.grad(loss)(ih, x),
        "vmap_input": lambda: f.vmap(op, (1, None, None, *others))(two, h, c, ih, *rest),
        "vmap_state": lambda: f.vmap(op, (None, 1, 0, *others))(
            x, torch.stack([h, -h], 1), torch.stack([c, -c]), ih, *rest
        ),
        "vmap_weight": lambda: f.vmap(op, (None, None, None, 0, None, None, None))(
            x, h, c, torch.stack([ih, -ih]), *rest
        ),
        "vmap_all": lambda: f.vmap(op)(*(torch.stack([t, -t]) for t in args)),
        "vmap_of_vmap": lambda: f.vmap(
            f.vmap(op, (0, None, None, *others)), (None, None, None, 0, None, None, None)
        )(two.movedim(1, 0), h, c, torch.stack([ih, -ih]), *rest),
        "per_sample_gradients": lambda: f.vmap(f.grad(loss), (None, 1))(ih, two),
        "jacrev": lambda: f.jacrev(of_weight)(ih),
        "jacfwd": lambda: f.jacfwd(of_weight)(ih),
        "hessian": lambda: f.hessian(loss)(ih, x),
        "jvp": lambda: f.jvp(of_weight, (ih,), (torch.ones_like(ih),)),
        "linearize": lambda: f.linearize(of_weight, ih)[1](torch.ones_like(ih)),
    }[kind]()


TRANSFORMS = [
    *("grad", "vmap_input", "vmap_state", "vmap_weight", "vmap_all", "vmap_of_vmap"),
    *("per_sample_gradients", "jacrev", "jacfwd", "hessian", "jvp", "linearize"),
]


@pytest.mark.allow_fallback
@every_op
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms(kind: str, name: str) -> None:
    plain = arguments(name, grad=False)
    ours, theirs = (transformed(kind, op, plain) for op in OPS[name])
    assert_same(ours, theirs)


@pytest.mark.allow_fallback
@every_op
def test_compiled_transforms(name: str) -> None:
    plain = arguments(name, grad=False)
    ours, theirs = OPS[name]
    compiled = torch.compile(
        lambda *a: transformed("per_sample_gradients", ours, list(a)),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_same(compiled(*plain), transformed("per_sample_gradients", theirs, plain))


@pytest.mark.parametrize("name", ["layer_operator", "cell_operator"])
def test_vmap_of_the_operator_stays_fused(name: str, launched: Launched) -> None:
    """Samples become rows of the batch, or one call each where weights differ."""
    plain = arguments(name, grad=False)
    for kind, times in (("vmap_input", 1), ("vmap_state", 1), ("vmap_weight", 2), ("vmap_all", 2)):
        with launched(prefix(name), times=times):
            transformed(kind, OPS[name][0], plain)


@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_with_options(batch_first: bool) -> None:
    x, h, _, *params = arguments("layer", rows=2, steps=3, grad=False)
    x = x.transpose(0, 1) if batch_first else x
    mask = torch.rand(2, *x.shape[:2]) < 0.5
    share = torch.rand(2, *x.shape[:2], 5, dtype=torch.float64)
    options = {"reverse": True, "batch_first": batch_first, "zero_masked_output": True}

    def op(x: Any, mask: Any, **noise: Any) -> Any:
        return torch.ops.twinfuse.lstm(x, h, None, *params, mask=mask, **noise, **options)

    two = torch.stack([x, -x])
    norm, kept = torch.rand(2, 2, 20).double(), torch.rand(2, 4, 2, 4).double()
    for call, args in (
        (op, (two, mask)),
        (lambda x, m, share: op(x, m, zoneout_hidden=share), (two, mask, share)),
        (lambda x, m, kept: op(x, m, dropout_input=kept), (two, mask, kept)),
        (lambda x, m, norm: op(x, m, norm=norm), (two, mask, norm)),
        (lambda x, m: op(x, m, norm=norm[0]), (two, mask)),
    ):
        expected = [call(*sample) for sample in zip(*args)]
        assert_same(torch.func.vmap(call)(*args), tuple(map(torch.stack, zip(*expected))))


def test_transforms_say_that_they_fall_back() -> None:
    for name in ("layer_function", "cell_function"):
        with pytest.raises(twinfuse.FallbackError, match=r"a torch\.func transform is active"):
            transformed("grad", OPS[name][0], arguments(name, grad=False))


@pytest.mark.allow_fallback
@every_op
def test_forward_mode_keeps_tangents(name: str) -> None:
    assert torch.autograd.gradcheck(
        OPS[name][0],
        arguments(name),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@every_op
def test_batched_gradients(name: str) -> None:
    args = arguments(name)
    got, expected = (
        torch.autograd.grad(
            results, args, [torch.stack([r, -r, 2 * r]) for r in results], is_grads_batched=True
        )
        for results in (op(*args) for op in OPS[name])
    )
    assert_same(got, expected)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(name: str, dtype: Any, compiled: bool, launched: Launched) -> None:
    args = arguments(name, dtype=torch.float32)
    ours, theirs = OPS[name]

    def call() -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return ours(*args)

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    short = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    with launched(prefix(name, dtype=short)):
        got = run()
    expected = theirs(*args)
    # As nn.LSTM, and as nn.LSTMCell, whose state keeps its dtype.
    wanted = dtype if "layer" in name else torch.float32
    assert [each.dtype for each in got] == [wanted] * len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.03)
    gradients = torch.autograd.grad(sum(each.float().sum() for each in got), args)
    for a, b in zip(gradients, torch.autograd.grad(sum(each.sum() for each in expected), args)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


def dtypes(results: Any) -> list[Any]:
    output, (h, c) = results
    return [getattr(output, "data", output).dtype, h.dtype, c.dtype]


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_gives_the_dtypes_of_native_layers(proj_size: int, packed: bool) -> None:
    native = torch.nn.LSTM(4, 5, proj_size=proj_size)
    layer = tft.nn.LSTM(4, 5, proj_size=proj_size)
    x: Any = torch.randn(6, 3, 4)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [6, 4, 1])
    for hx in (None, (torch.randn(1, 3, proj_size or 5), torch.randn(1, 3, 5))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert dtypes(layer(x, hx)) == dtypes(native(x, hx))


def test_autocast_gives_the_dtypes_of_native_cells() -> None:
    x, h, c, *weights = arguments("cell", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in ((h, c), (h.bfloat16(), c.bfloat16()), (h, c.bfloat16()), (h.bfloat16(), c)):
            ours, theirs = (op(x, (a, b), *weights) for op in (tft.lstm_cell, torch.lstm_cell))
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert tft.lstm_cell(x, (h, c), *weights)[0].dtype == torch.float32


@every_op
def test_autocast_leaves_float64_alone(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {each.dtype for each in OPS[name][0](*arguments(name))} == {torch.float64}


class Tagged(torch.Tensor):
    """A subclass that sees what is called on it."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", ["layer_function", "cell_function"])
def test_subclasses_see_the_native_calls(name: str) -> None:
    args = arguments(name, grad=False)
    Tagged.seen = []
    results = OPS[name][0](args[0].as_subclass(Tagged), *args[1:])
    assert type(results[0]) is Tagged
    assert (torch.lstm if "layer" in name else torch.lstm_cell) in Tagged.seen
    assert_same([each.as_subclass(torch.Tensor) for each in results], list(OPS[name][1](*args)))


@every_op
def test_default_device_and_other_modes(name: str, launched: Launched) -> None:
    args = arguments(name)
    with torch.device("cpu"), launched(prefix(name), times=1):
        assert_same(OPS[name][0](*args), OPS[name][1](*args))


@every_op
def test_flops_are_counted(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for op in OPS[name]:
        with FlopCounterMode(display=False) as counter:
            sum(each.sum() for each in op(*arguments(name))).backward()
        counts.append(counter.get_total_flops())
    rows = 6 if "layer" in name else 2
    assert counts[0] == counts[1] == 3 * 2 * rows * 20 * (4 + 5)


def options() -> dict[str, Any]:
    x, h, c, ih, hh, b, d = arguments("layer_operator")
    packed = random(6, 4)
    sizes = torch.tensor([3, 2, 1])
    hr, peephole, norm = random(3, 5), random(3, 5), random(2, 20)
    extras = (hr, peephole, norm, None, torch.rand(2, 3) < 0.5)
    noise = [torch.rand(shape).double() for shape in ((), (5,), (4, 2, 1), (2, 3))]
    numbers = (True, True, 2, 3, True, 0.1, True)
    states = random(3, 5), random(3, 5)
    return {
        "plain": (x, h, c, ih, hh, b, d),
        "no_state": (x, None, None, ih, hh),
        "one_bias": (x, h, None, ih, hh, b),
        "packed": (packed, *states, ih, hh, b, d, None, None, None, sizes),
        "packed_no_state": (packed, None, None, ih, hh, b, d, None, None, None, sizes),
        "extras": (
            *(x.transpose(0, 1), random(2, 3), c, ih, hh[:, :3], b, d),
            *(*extras, *noise, *numbers),
        ),
        "norm": (x, h, c, ih, hh, b, d, None, None, norm),
        "no_batch": (x[:, :0], h[:0], c[:0], ih, hh, b, d),
    }


def leaf(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_(value.requires_grad) if floating else value


@pytest.mark.parametrize("name", options())
def test_opcheck(name: str) -> None:
    args = tuple(map(leaf, options()[name]))
    torch.library.opcheck(torch.ops.twinfuse.lstm.default, args)
    # The private forms have no `recompute`.
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args[:22])
    for save in (False, True):
        torch.library.opcheck(torch.ops.twinfuse._lstm.default, (save, *args))
    output, h, c, *rows = torch.ops.twinfuse._lstm(True, *args)
    for grads, needs in (((output, h, c), 63), ((output, None, None), 8), ((None, h, c), 1 + 32)):
        needs |= {"extras": 64 + 128 + 256, "norm": 256}.get(name, 0) if needs == 63 else 0
        call = (needs, *grads, *rows, args[0], *args[3:5], *args[7:])
        torch.library.opcheck(torch.ops.twinfuse._lstm_backward.default, call)


@pytest.mark.parametrize("extras", [0, 1, 9], ids=["plain", "peephole", "all"])
def test_opcheck_of_the_cell(extras: int) -> None:
    shares = [torch.rand(shape).double() for shape in ((), (2, 1), (4, 2, 4), (4, 1, 5))]
    options = (random(3, 5), random(2, 20), *shares, 1, 2, 0.1)[:extras]
    args = [leaf(a) for a in (*arguments("cell_operator"), *options)]
    torch.library.opcheck(torch.ops.twinfuse.lstm_cell.default, args)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    for save in (False, True):
        torch.library.opcheck(torch.ops.twinfuse._lstm_cell.default, (save, *args))
    h, c, gates = torch.ops.twinfuse._lstm_cell(True, *args)
    every = {0: 63, 1: 127, 9: 255}[extras]
    for grads, needs in (((h, c), every), ((h, None), 8), ((None, c), 33)):
        call = (needs, *grads, gates, *args[:5], *args[7:])
        torch.library.opcheck(torch.ops.twinfuse._lstm_cell_backward.default, call)
