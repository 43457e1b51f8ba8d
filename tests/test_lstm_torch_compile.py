"""`twinfuse.torch.lstm`, `lstm_cell` and their modules under torch.compile, export and tracers."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch._dynamo.testing  # noqa: E402, F811
from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import assert_same, random  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch._dynamo.reset()


def pair(**options: Any) -> tuple[Any, Any]:
    """A fused layer in float64, and a native one with the same parameters."""
    layer = tft.nn.LSTM(4, 5, dtype=torch.float64, **options)
    native = nn.LSTM(4, 5, dtype=torch.float64, **options)
    native.load_state_dict(layer.state_dict())
    return layer, native


def data(results: Any) -> list[Any]:
    output, (h, c) = results
    return [output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output, h, c]


def trained(call: Any, parameters: list[Any], *args: Any, **options: Any) -> list[Any]:
    """The results of a call, and the gradients of a loss of all of them."""
    results = data(call(*args, **options))
    loss = sum(each.pow(2).sum() for each in results)
    return results + list(torch.autograd.grad(loss, parameters))


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "proj_size": 3},
    "deep": {"num_layers": 2, "bidirectional": True},
}


def test_native_does_not_compile() -> None:
    """Why `nn.LSTM` of ours is no subclass of torch's."""
    _, native = pair()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(native, fullgraph=True, backend="eager")(random(3, 2, 4))

    class Subclass(nn.LSTM):
        def forward(self, x: Any) -> Any:
            return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Subclass(4, 5), fullgraph=True, backend="eager")(random(3, 2, 4))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LAYERS)
def test_compile_with_dynamic_batch_and_time(name: str, backend: str, launched: Launched) -> None:
    layer, native = pair(**LAYERS[name])
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    times, compilations = 4 if name == "deep" else 1, set()
    for steps, batch in ((3, 2), (7, 5), (4, 6)):
        x = random(steps, batch, 4)
        with (
            launched("lstm_forward_f64", times=times),
            launched("lstm_backward_f64", times=times),
        ):
            got = trained(compiled, [x, *layer.parameters()], x)
        assert_same(got, trained(native, [x, *native.parameters()], x))
        with torch.no_grad():
            assert_same(data(compiled(x)), data(native(x)))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_state_dropout_and_evaluation(backend: str) -> None:
    layer, native = pair(num_layers=2, dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x, h, c = random(3, 2, 4), random(2, 2, 5), random(2, 2, 5)
    first, second = (data(compiled(x, (h, c)))[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    native.eval()
    parameters, theirs = ([x, h, c, *m.parameters()] for m in (layer, native))
    got = trained(compiled, parameters, x, (h, c))
    assert_same(got, trained(native, theirs, x, (h, c)))


PACKED = ([5, 3, 2], [2, 5, 3], [4, 4, 2])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("in_order", [False, True], ids=["unsorted", "sorted"])
def test_compile_packed(in_order: bool, state: bool, backend: str) -> None:
    """The batch sizes are data, in one graph for all; in that of training, too."""
    layer, native = pair(num_layers=2, bidirectional=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for given in PACKED:
        lengths = sorted(given, reverse=True) if in_order else given
        x = pack_padded_sequence(random(5, 3, 4, grad=False), lengths, enforce_sorted=in_order)
        hx = (random(4, 3, 5), random(4, 3, 5)) if state else None
        got = trained(compiled, [*(hx or ()), *layer.parameters()], x, hx)
        assert_same(got, trained(native, [*(hx or ()), *native.parameters()], x, hx))
        if hx:  # a loss that leaves the last state out
            (ours,), (theirs,) = (
                torch.autograd.grad(data(call(x, hx))[0].sum(), hx[:1])
                for call in (compiled, native)
            )
            assert_same(ours, theirs)


EXTRAS: dict[str, Any] = {
    "peephole": True,
    "layer_norm": True,
    "norm_epsilon": 0.1,
    "recurrent_dropout": 0.25,
    "zoneout_cell": 0.25,
    "activation": "sigmoid",
    "recurrent_activation": "hard_sigmoid",
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compile_with_options(recompute: bool, backend: str) -> None:
    layer = tft.nn.LSTM(4, 5, dtype=torch.float64, recompute=recompute, **EXTRAS).eval()
    mask = torch.rand(3, 2) < 0.6
    x = random(3, 2, 4)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    parameters = [x, *layer.parameters()]
    got = trained(compiled, parameters, x, mask=mask)
    assert_same(got, trained(layer, parameters, x, mask=mask))
    layer.train()
    assert not torch.equal(data(compiled(x))[0], data(compiled(x))[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("state", [False, True], ids=["no_state", "state"])
def test_compile_packed_with_dropout(state: bool, backend: str, launched: Launched) -> None:
    """As many masks are drawn as there are sequences, or more where that is data."""
    layer = tft.nn.LSTM(4, 5, dtype=torch.float64, recurrent_dropout=1.0, layer_norm=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in PACKED:
        x = pack_padded_sequence(random(5, 3, 4, grad=False), lengths, enforce_sorted=False)
        hx = (random(1, 3, 5), random(1, 3, 5)) if state else None
        parameters = [*(hx or ()), *layer.parameters()]
        with launched("lstm_forward_f64", times=1), launched("lstm_backward_f64", times=1):
            got = trained(compiled, parameters, x, hx)
        assert_same(got, trained(layer, parameters, x, hx))
    layer.recurrent_dropout = 0.5
    outputs = [data(compiled(x, hx))[0] for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_cells_in_a_loop(backend: str, launched: Launched) -> None:
    cell = tft.nn.LSTMCell(4, 5, dtype=torch.float64)
    native = nn.LSTMCell(4, 5, dtype=torch.float64)
    native.load_state_dict(cell.state_dict())

    def loop(module: Any, x: Any) -> Any:
        h, c = module(x[0])
        for row in x[1:]:
            h, c = module(row, (h, c))
        return h, (h, c)

    compiled = torch.compile(lambda x: loop(cell, x), fullgraph=True, backend=backend)
    x = random(3, 2, 4)
    with launched("lstm_cell_forward_f64", times=3), launched("lstm_cell_backward_f64", times=3):
        got = trained(compiled, [x, *cell.parameters()], x)
    assert_same(got, trained(loop, [x, *native.parameters()], native, x))


def test_compile_computes_only_gradients_asked_for() -> None:
    layer, native = pair()
    for module in (layer, native):
        module.weight_ih_l0.requires_grad_(False)
        module.bias_hh_l0.requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random(3, 2, 4, grad=False)
    for wanted in (["weight_hh_l0"], ["bias_ih_l0"]):
        ours, theirs = (
            trained(call, [getattr(module, n) for n in wanted], x)
            for call, module in ((compiled, layer), (native, native))
        )
        assert_same(ours, theirs)


def targets(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_compiled_code_follows_the_chosen_backend() -> None:
    layer, native = pair()
    x = random(3, 2, 4, grad=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    expected = data(native(x))
    assert_same(data(compiled(x)), expected)
    assert "twinfuse.lstm.default" in targets(counter.graphs[0].graph)
    with twinfuse.use_backend("reference"), twinfuse.strict():
        assert_same(data(compiled(x)), expected)
    assert not any("twinfuse" in target for target in targets(counter.graphs[1].graph))


class Outputs(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        output, (h, c) = self.layer(*args)
        return output, h, c


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
@pytest.mark.parametrize("name", LAYERS)
def test_export_with_dynamic_batch_and_time(name: str, strict: bool, launched: Launched) -> None:
    layer, native = pair(**LAYERS[name])
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    axes = {1: steps, 0: batch} if name == "batch_first" else {0: steps, 1: batch}
    program = torch.export.export(
        Outputs(layer), (random(3, 2, 4, grad=False),), strict=strict, dynamic_shapes=((axes,),)
    )
    count = 4 if name == "deep" else 1
    for exported in (program, program.run_decompositions()):
        assert targets(exported.graph).count("twinfuse.lstm.default") == count
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    for sizes in ((6, 3, 4), (2, 7, 4)):
        x = random(*sizes, grad=False)
        with launched("lstm_forward_f64", times=count):
            got = module(x)
        assert_same(list(got), data(native(x)))


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_export_of_the_cell(strict: bool) -> None:
    cell = tft.nn.LSTMCell(4, 5, dtype=torch.float64, layer_norm=True)
    batch = torch.export.Dim("batch")
    args = (random(3, 4, grad=False), (random(3, 5, grad=False), random(3, 5, grad=False)))
    shapes = {"input": {0: batch}, "hx": ({0: batch}, {0: batch})}
    program = torch.export.export(cell, args, strict=strict, dynamic_shapes=shapes)
    assert targets(program.graph)[0] == "twinfuse.lstm_cell.default"
    x, h, c = random(7, 4, grad=False), random(7, 5, grad=False), random(7, 5, grad=False)
    assert_same(list(program.module()(x, (h, c))), list(cell(x, (h, c))))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, native = pair()
    args = [random(3, 2, 4, grad=False), *(p.detach() for p in layer.parameters())]
    graph = make_fx(lambda x, *params: tft.lstm(x, None, params)[0], tracing_mode=mode)(*args)
    assert "twinfuse.lstm.default" in targets(graph.graph)
    assert_same(graph(*args), native(args[0])[0])


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        layer = tft.nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=3)
        output, (h, c) = layer(mode.from_tensor(torch.randn(3, 2, 4)))
    assert isinstance(output, FakeTensor) and output.shape == (3, 2, 6) and output.requires_grad
    assert h.shape == (4, 2, 3) and c.shape == (4, 2, 5)


class Functions(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        params = list(self.layer.parameters())
        output, state = tft.lstm(x, None, params)
        h, c = state[0][0], state[1][0]
        return output, tft.lstm_cell(x[0], (h, c), *params)


def test_symbolic_trace_keeps_the_calls() -> None:
    layer, _ = pair()
    x = random(3, 2, 4)
    graph = torch.fx.symbolic_trace(Functions(layer))
    calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert tft.lstm in calls and tft.lstm_cell in calls
    assert_same(graph(x), Functions(layer)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace() -> None:
    layer, native = pair(num_layers=2)
    x = random(3, 2, 4)
    traced = torch.jit.trace(Outputs(layer), (x,))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("twinfuse::lstm") == 2
    assert_same(list(traced(x)), data(native(x)))
