"""The LSTM on CUDA tensors: modules, layouts, streams, graphs and threads, where there is a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Launched, require, skip

torch = require("torch")
if not torch.cuda.is_available():
    skip("gpu", "no CUDA device")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_lstm_gpu import (  # noqa: E402
    SHORT,
    Tensors,
    clean,
    dtype_of,
    every_precision,
    layer,
    trained,
)
from twinfuse.torch import _lstm_ops  # noqa: E402


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(7)
    params = getattr(request.node, "callspec", None)
    with clean(params.params.get("precision", "float32") if params else "float32"):
        yield


def r(*sizes: int, **options: Any) -> Any:
    return torch.randn(sizes, device="cuda", **options)


def results(module: Any, x: Any, hx: Any = None, **options: Any) -> Tensors:
    """Outputs, and gradients of parameters and of what was given and wants one."""
    output, (h, c) = module(x, hx, **options)
    data = output.data if isinstance(output, PackedSequence) else output
    generator = torch.Generator("cuda").manual_seed(1)
    grads = [torch.randn(t.shape, device="cuda", generator=generator) for t in (data, h, c)]
    given = [x.data if isinstance(x, PackedSequence) else x, *(hx or ())]
    leaves = [*module.parameters(), *(t for t in given if t.requires_grad)]
    grads = [g.to(data.dtype) for g in grads]
    return [data, h, c, *torch.autograd.grad((data, h, c), leaves, grads)]


def assert_near(module: Any, native: Any, *args: Any) -> None:
    """Twice as far off as native at most, as seen in float64."""
    got, theirs = results(module, *args), results(native, *args)
    exact = results(native.double(), *(_double(a) for a in args))
    for k, (a, b, c) in enumerate(zip(got, theirs, exact)):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, rival = ((t.double() - c).abs().max().item() for t in (a, b))
        tiny = torch.finfo(a.dtype).eps * c.abs().max().item()
        # TF32, where native happens to compute without it, is off by this much of a sum.
        rounded = 2.0**-9 * c.abs().max().item() if torch.backends.cudnn.allow_tf32 else 0.0
        assert error <= 2 * max(rival, rounded) + tiny, f"result {k}: {error} against {rival}"


def _double(value: Any) -> Any:
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(map(_double, value))
    if not isinstance(value, PackedSequence):
        return None if value is None else value.detach().double().requires_grad_(True)
    data = value.data.detach().double().requires_grad_()
    return PackedSequence(data, *value[1:])


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "two_layers": {"num_layers": 2},
    "two_both_ways": {"num_layers": 2, "bidirectional": True},
}


def pair(precision: str, inputs: int, units: int, **options: Any) -> tuple[Any, Any]:
    dtype = getattr(torch, dtype_of(precision))
    ours, native = (
        make(inputs, units, device="cuda", dtype=dtype, **options)
        for make in (tft.nn.LSTM, nn.LSTM)
    )
    native.load_state_dict(ours.state_dict())
    return ours, native


@every_precision
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("units", [20, 128, 256])
def test_modules(name: str, units: int, precision: str, launched: Launched) -> None:
    options = MODULES[name]
    ours, native = pair(precision, 24, units, **options)
    dtype = getattr(torch, dtype_of(precision))
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = r(6, 9, 24, dtype=dtype, requires_grad=True)
    batch = 6 if options.get("batch_first") else 9
    hx = tuple(r(count, batch, units, dtype=dtype, requires_grad=True) for _ in range(2))
    with launched(f"lstm_forward_{SHORT[dtype_of(precision)]}_cuda", times=2 * count):
        results(ours, x, hx)
        results(ours, x)
    assert_near(ours, native, x, hx)


@every_precision
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_packed_sequences(options: dict[str, Any], precision: str, launched: Launched) -> None:
    ours, native = pair(precision, 24, 200, **options)
    dtype = getattr(torch, dtype_of(precision))
    padded = r(12, 24, 24, dtype=dtype)
    lengths = torch.randint(1, 13, (24,)).tolist()
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    packed = PackedSequence(packed.data.requires_grad_(), *packed[1:])
    with launched("lstm_forward_", times=4 if options else 1):
        ours(packed)
    assert_near(ours, native, packed)


def reference(*args: Any, **options: Any) -> Tensors:
    """By torch's own operators in float64."""
    args = tuple(a.double() if a is not None else a for a in args)
    names = "lstm " + "input h c weight_ih weight_hh bias_ih bias_hh"
    call = dict(zip(names.split()[1:], args)) | options
    schema = torch.ops.twinfuse.lstm.default._schema.arguments
    return list(_lstm_ops.reference(*(call.get(a.name, a.default_value) for a in schema)))


def assert_operator(tensors: Tensors, tolerance: float, **options: Any) -> None:
    """`torch.ops.twinfuse.lstm` and its gradients, against torch's operators in float64."""

    def op(*tensors: Any) -> Tensors:
        return list(torch.ops.twinfuse.lstm(*tensors, **options))

    grads = [torch.randn_like(t) for t in op(*tensors)]
    got = trained(op, tensors, grads)
    wide = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in options.items()
    }
    exact = trained(lambda *t: reference(*t, **wide), [t.double() for t in tensors], grads)
    for k, (a, b) in enumerate(zip(got, exact)):
        error, scale = (a.double() - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * max(scale, 1), f"result {k}: {error} of {scale}"


TOLERANCE = {"float32": 1e-5, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}


@every_precision
@pytest.mark.parametrize("units", [20, 128, 384])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_masks_and_zoneouts(zero: bool, reverse: bool, units: int, precision: str) -> None:
    tensors, mask = layer(precision, 11, 19, 24, units), r(11, 19) > -0.5
    options: dict[str, Any] = {"reverse": reverse, "zero_masked_output": zero}
    tolerance = TOLERANCE[precision]
    assert_operator(tensors, tolerance, mask=mask, **options)
    drawn = (r(11, 19, units) < -1).to(tensors[0].dtype)
    share = torch.full((), 0.25, dtype=tensors[0].dtype, device="cuda")
    assert_operator(tensors, tolerance, zoneout_hidden=drawn, zoneout_cell=share, **options)
    options |= {"mask": mask.t().contiguous().t(), "zoneout_cell": drawn}
    assert_operator(tensors, tolerance, **options)


# In halves, results of gates without an upper bound say little; the case table has them.
@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("activation", range(4))
def test_activations(activation: int, precision: str) -> None:
    tensors, tolerance = layer(precision, 5, 9, 24, 72), TOLERANCE[precision]
    if activation % 2:  # of the others one jumps, and derivatives with it
        assert_operator(tensors, tolerance, activation=activation, recurrent_activation=0)
    assert_operator(tensors, tolerance, activation=0, recurrent_activation=activation or 1)


@pytest.mark.parametrize("way", ["batch_first", "input", "states", "keras", "strided", "expanded"])
def test_layouts_do_not_matter(way: str) -> None:
    """Whatever strides the tensors have, and gradients have those of their leaves."""
    tensors = layer("bfloat16", 6, 10, 40, 128)
    grads = [torch.randn_like(t) for t in torch.ops.twinfuse.lstm(*tensors)]
    turned = list(tensors)
    options: dict[str, Any] = {}
    chosen = {"states": (1, 2), "keras": (3, 4), "strided": range(7), "expanded": (0,)}.get(way, ())
    for k in chosen:
        if way == "strided":
            wide = torch.stack([tensors[k], tensors[k]], -1)
            turned[k] = wide[..., 0]
        elif way == "expanded":
            tensors[k] = tensors[k][:, :1].repeat(1, 10, 1)
            turned[k] = tensors[k][:, :1].expand(-1, 10, -1)
        else:
            turned[k] = tensors[k].t().contiguous().t()
    if way == "input":  # in memory as batch-first has it
        turned[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)

    def op(x: Any, *rest: Any) -> Tensors:
        if way != "batch_first":
            return list(torch.ops.twinfuse.lstm(x, *rest, **options))
        x = x.transpose(0, 1)
        output, *state = torch.ops.twinfuse.lstm(x, *rest, batch_first=True)
        return [output.transpose(0, 1), *state]

    plain = trained(lambda *t: list(torch.ops.twinfuse.lstm(*t)), tensors, grads)
    got = trained(op, turned, grads)
    for k, (a, b) in enumerate(zip(got, plain)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item(), msg=str(k))
    for leaf, gradient in zip(turned, got[3:]):
        if way in ("input", "keras"):
            assert gradient.stride() == leaf.stride()


def test_dropout_and_other_options_take_torchs_operators() -> None:
    """With a reason that explain gives, too."""
    x = r(5, 3, 8)
    for options, name in (
        ({"proj_size": 4}, "projection"),
        ({"peephole": True}, "peepholes"),
        ({"layer_norm": True}, "norms"),
        ({"recurrent_dropout": 0.5}, "recurrent_dropout"),
        ({"dtype": torch.float64}, "float64"),
    ):
        module = tft.nn.LSTM(8, 16, **{"device": "cuda", **options})
        with pytest.raises(twinfuse.FallbackError, match=name):
            module(x.to(module.weight_ih_l0.dtype))
        with twinfuse.strict(False), pytest.warns(twinfuse.FallbackWarning, match=name):
            module(x.to(module.weight_ih_l0.dtype))


def test_explain() -> None:
    x, h, c, *weights = layer("float16", 3, 2, 8, 16)
    params = [nn.Parameter(w) for w in weights]
    for op, call in (("lstm", (tft.lstm, x, None, params)),
                     ("lstm_cell", (tft.lstm_cell, x[0], (h, c), *params))):  # fmt: skip
        rows = twinfuse.explain(*call)
        kind = "64" if op == "lstm" else "step"
        assert [row.kernel for row in rows] == [
            f"{op}_{k}_f16_cuda (lstm_{k}_fp16_{kind})" for k in ("forward", "backward")
        ]
        assert {row.backend for row in rows} == {"cuda"}


def test_autocast(launched: Launched) -> None:
    """In float16, as native; states keep native's dtype."""
    ours, native = pair("float32", 24, 64)
    x = r(5, 8, 24)
    with torch.autocast("cuda"), launched("lstm_forward_f16_cuda", times=1):
        output, (h, c) = ours(x)
    with torch.autocast("cuda"):
        wanted, (h_n, c_n) = native(x)
    for a, b in ((output, wanted), (h, h_n), (c, c_n)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


SIZES = {"alone": (9, 20, 24, 64), "shared": (9, 40, 24, 256), "float32": (9, 20, 24, 64)}
every_size = pytest.mark.parametrize("name", SIZES)


def make(name: str) -> tuple[Tensors, Tensors]:
    precision = "float32" if name == "float32" else "bfloat16"
    steps, batch, inputs, units = SIZES[name]
    tensors = layer(precision, steps, batch, inputs, units)
    sizes = ((steps, batch, units), (batch, units), (batch, units))
    return tensors, [r(*s, dtype=tensors[0].dtype) for s in sizes]


def fused(*tensors: Any) -> Tensors:
    return list(torch.ops.twinfuse.lstm(*tensors))


@every_size
def test_graph_capture(name: str) -> None:
    """Replays follow what the inputs hold, and may follow one another at once."""
    tensors, grads = make(name)
    static = [t.clone() for t in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        trained(fused, static, grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = trained(fused, static, grads)
    for _ in range(3):
        with torch.no_grad():
            for t in static:
                t.copy_(torch.randn_like(t))
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, trained(fused, static, grads)):
            assert torch.equal(a, b)


@every_size
def test_streams(name: str) -> None:
    """The op waits for its own stream, and for no other."""
    tensors, grads = make(name)
    expected = trained(fused, tensors, grads)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(tensors[0])
        torch.cuda._sleep(10_000_000)
        late += tensors[0]
        got = trained(fused, [late, *tensors[1:]], grads)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@every_size
def test_many_threads(name: str) -> None:
    tensors, grads = make(name)
    expected = trained(fused, tensors, grads)
    same: list[bool] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                got = trained(fused, tensors, grads)
            torch.cuda.current_stream().synchronize()
            same.append(all(torch.equal(a, b) for a, b in zip(got, expected)))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 8


@every_size
def test_same_bits_every_time(name: str) -> None:
    tensors, grads = make(name)
    expected = trained(fused, tensors, grads)
    for _ in range(5):
        for a, b in zip(trained(fused, tensors, grads), expected):
            assert torch.equal(a, b)


@every_size
def test_recompute(name: str, launched: Launched) -> None:
    tensors, grads = make(name)
    expected = trained(fused, tensors, grads)
    with launched("lstm_forward_", times=2), launched("lstm_backward_", times=1):
        got = trained(lambda *t: list(torch.ops.twinfuse.lstm(*t, recompute=True)), tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_compiled() -> None:
    ours, native = pair("float32", 24, 64)
    x = r(5, 8, 24)
    compiled = torch.compile(ours, fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], native(x)[0], rtol=1e-4, atol=1e-4)
