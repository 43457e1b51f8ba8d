"""`conv1d_relu` and `conv2d_relu` of `twinfuse.torch` inside transforms, modes and compilers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch._dynamo.testing  # noqa: E402, F811
import torch.nn.functional as F  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.conv_calls import OPS, Op, every_name, make, native, with_options  # noqa: E402
from tests.torch_cases import assert_same, native_conv, random  # noqa: E402

FORWARD, BACKWARD = "conv_relu_forward_f64", "conv_relu_backward_f64"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch._dynamo.reset()


@every_name
def test_batched_gradients(name: str) -> None:
    tensors = make(name)
    directions = random(7, *native(*tensors).shape, grad=False)
    got, expected = (
        torch.autograd.grad(f(*tensors), tensors, directions, is_grads_batched=True)
        for f in (with_options(OPS[name]), native)
    )
    assert_same(got, expected)


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(name: str, dtype: Any, compiled: bool, launched: Launched) -> None:
    leaves = make(name, dtype=torch.float32)

    def call(f: Op) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return f(*leaves)

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with launched("conv_relu_forward_" + {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]):
        got = run(with_options(OPS[name]))
    expected = call(native)
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(got.float().sum(), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.float().sum(), leaves)):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


@every_name
def test_autocast_leaves_float64_alone(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert with_options(OPS[name])(*make(name)).dtype == torch.float64


def compared(compiled: Any, op: Op, tensors: tuple[Any, ...]) -> None:
    """Outputs, gradients, and their strides, which compiled code relies on."""
    got, expected = compiled(*tensors), op(*tensors)
    assert_same(got, native(tensors[0] * 2, *tensors[1:]).pow(2))
    assert got.stride() == expected.stride()
    gradients = torch.autograd.grad(got.sum(), tensors)
    assert_same(gradients, torch.autograd.grad(expected.sum(), tensors))


@every_name
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_compile_with_dynamic_shapes(
    channels_last: bool, backend: str, name: str, launched: Launched
) -> None:
    call = with_options(OPS[name])

    def op(x: Any, w: Any, b: Any) -> Any:
        return call(x * 2, w, b).pow(2)

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    _, w, b = make(name)
    for batch, *size in ((5, 9, 8), (7, 11, 10), (8, 12, 13)):
        x = random(batch, 4, *size[: w.dim() - 2])
        if channels_last:
            order = (0, *range(2, x.dim()), 1)
            x = x.detach().permute(order).contiguous().movedim(-1, 1).requires_grad_()
        with launched(FORWARD, 2), launched(BACKWARD, 2):
            compared(compiled, op, (x, w, b))
        with torch.no_grad():
            assert_same(compiled(x, w, b), op(x, w, b))
    assert counter.frame_count <= 2  # with and without gradients


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("batched", [True, False])
def test_compile_with_names_and_without_batch(padding: Any, batched: bool) -> None:
    op = partial(tft.conv2d_relu, padding=padding, groups=2)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    x, w, b = make("conv2d")
    x = x if batched else x.detach()[0].requires_grad_()
    got = compiled(x, w, b)
    expected = native_conv(x, w, b, padding=padding, groups=2)
    assert_same(got, expected)
    assert_same(
        torch.autograd.grad(got.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b))
    )


def test_compile_with_a_padding_that_changes() -> None:
    x, w, b = make("conv2d", grad=False)
    compiled = torch.compile(
        lambda x, w, b, n: tft.conv2d_relu(x, w, b, padding=n, groups=2),
        fullgraph=True,
        backend="aot_eager",
    )
    for padding in (0, 1, 2, 3, 4):
        expected = native_conv(x, w, b, padding=padding, groups=2)
        assert_same(compiled(x, w, b, padding), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_computes_only_gradients_asked_for(backend: str) -> None:
    tensors = make("conv2d")
    x, w, b = tensors
    compiled = torch.compile(with_options(tft.conv2d_relu), fullgraph=True, backend=backend)
    for wanted in ((w,), (x,), (w, b), (b,)):
        leaves = [t if any(t is leaf for leaf in wanted) else t.detach() for t in tensors]
        got = torch.autograd.grad(compiled(*leaves).pow(2).sum(), wanted)
        assert_same(got, torch.autograd.grad(native(*leaves).pow(2).sum(), wanted))


def targets(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_compiled_code_follows_the_chosen_backend() -> None:
    x, w, b = make("conv2d", grad=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    op = with_options(tft.conv2d_relu)
    compiled = torch.compile(lambda: op(x, w, b), fullgraph=True, backend=counter)
    expected = native(x, w, b)
    assert_same(compiled(), expected)
    assert targets(counter.graphs[0].graph) == ["twinfuse.conv2d_relu.default"]
    with twinfuse.use_backend("reference"), twinfuse.strict():
        assert_same(compiled(), expected)
    assert not any("twinfuse" in target for target in targets(counter.graphs[1].graph))


@pytest.mark.allow_fallback
def test_compiled_code_reports_its_fallbacks() -> None:
    x, w = torch.ones(2, 3, 5, 5, dtype=torch.int64), torch.ones(4, 3, 3, 3, dtype=torch.int64)
    compiled = torch.compile(lambda: tft.conv2d_relu(x, w), fullgraph=True, backend="aot_eager")
    with pytest.warns(twinfuse.FallbackWarning, match=r"got torch\.int64"):
        assert torch.equal(compiled(), native_conv(x, w))


class Op3(torch.nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Any, w: Any, b: Any) -> Any:
        return self.op(x, w, b)


@every_name
@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_export(name: str, strict: bool) -> None:
    tensors = make(name)
    rank = tensors[1].dim() - 2
    free = {d: torch.export.Dim(f"size{d}", min=3, max=64) for d in (0, *range(2, rank + 2))}
    program = torch.export.export(
        Op3(with_options(OPS[name])), tensors, strict=strict, dynamic_shapes=(free, None, None)
    )
    for exported in (program, program.run_decompositions()):
        assert targets(exported.graph)[-1] == f"twinfuse.{name[:6]}_relu.default"
    x = random(8, 4, *(11, 7)[:rank])
    assert_same(program.module()(x, *tensors[1:]), native(x, *tensors[1:]))


@every_name
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(name: str, mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = make(name, grad=False)
    graph = make_fx(with_options(OPS[name]), tracing_mode=mode)(*tensors)
    assert targets(graph.graph)[-1] == f"twinfuse.{name[:6]}_relu.default"
    assert_same(graph(*tensors), native(*tensors))


@pytest.mark.parametrize("op", [tft.conv1d_relu, tft.conv2d_relu])
def test_symbolic_trace_keeps_the_layer(op: Op) -> None:
    tensors = make("conv1d" if op is tft.conv1d_relu else "conv2d")
    graph = torch.fx.symbolic_trace(Op3(with_options(op)))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [op]
    assert_same(graph(*tensors), native(*tensors))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@every_name
def test_jit_trace(name: str) -> None:
    tensors = make(name)
    traced = torch.jit.trace(with_options(OPS[name]), tensors)
    assert f"twinfuse::{name[:6]}_relu" in {node.kind() for node in traced.graph.nodes()}
    got, expected = traced(*tensors), native(*tensors)
    assert_same(got, expected)
    assert_same(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
    )


@every_name
def test_flops_are_counted(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w, b = make(name)
    w = (
        w.detach().repeat_interleave(2, 1).requires_grad_()
    )  # torch counts groups as if all were one
    counts = []
    for f in (OPS[name], native_conv):
        with FlopCounterMode(display=False) as counter:
            f(x, w, b, 2, 1).sum().backward()
        counts.append(counter.get_total_flops())
    pixels = native_conv(x, w, b, 2, 1).numel() // 6
    assert counts[0] == counts[1] == 3 * 2 * pixels * w.numel()


@every_name
def test_default_device_and_other_modes(name: str, launched: Launched) -> None:
    tensors = make(name)
    with torch.device("cpu"), launched(FORWARD, times=1):
        assert_same(with_options(OPS[name])(*tensors), native(*tensors))


class Tagged(torch.Tensor):
    """A subclass that sees what is called on it."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.allow_fallback
def test_subclasses_see_the_native_calls() -> None:
    x, w = torch.randn(3, 4, 5, 6).as_subclass(Tagged), torch.randn(5, 4, 2, 2)
    Tagged.seen = []
    y = tft.conv2d_relu(x, w)
    assert type(y) is Tagged and F.conv2d in Tagged.seen
    plain = x.as_subclass(torch.Tensor)
    assert torch.equal(y.as_subclass(torch.Tensor), native_conv(plain, w))


def channels_last(tensor: Any) -> Any:
    return tensor.detach().contiguous(memory_format=torch.channels_last)


ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "contiguous": lambda: (*make("conv2d"), (2, 1), (1, 0), (1, 2), 2),
    "no_bias": lambda: (random(2, 3, 6, 7), random(4, 3, 3, 3)),
    "uneven_padding": lambda: (random(2, 3, 6, 7), random(4, 3, 2, 3), None, 2, [1, 0, 2, 1]),
    "channels_last": lambda: (channels_last(random(2, 3, 6, 7)), random(4, 3, 3, 3)),
    "weight_channels_last": lambda: (
        random(2, 3, 6, 7),
        channels_last(random(4, 3, 3, 3)),
        random(4),
    ),
    "views": lambda: (random(7, 6, 3, 2).permute(3, 2, 1, 0), random(8, 3, 3, 3)[::2], random(4)),
    "empty": lambda: (random(0, 3, 6, 7), random(4, 3, 3, 3), random(4)),
    "1d": lambda: (random(2, 3, 9), random(4, 3, 3), random(4), 2, 1),
    "1d_nwc": lambda: (random(2, 9, 3).mT, random(4, 5, 3).mT, random(4), 1, [4, 0], 2),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(name: str, dtype: Any) -> None:
    def prepared(value: Any, grad: bool) -> Any:
        return value.detach().to(dtype).requires_grad_(grad) if torch.is_tensor(value) else value

    arguments = ARGUMENTS[name]()
    rank = arguments[0].dim() - 2
    public = getattr(torch.ops.twinfuse, f"conv{rank}d_relu").default
    torch.library.opcheck(public, [prepared(a, True) for a in arguments])

    x, w, b, stride, padding, dilation, groups = (
        *(prepared(a, False) for a in arguments),
        *(None, 1, 0, 1, 1)[len(arguments) - 2 :],
    )
    each = [n if isinstance(n, (list, tuple)) else [n] * rank for n in (stride, dilation, padding)]
    pads = [*each[2][:rank], *each[2][-rank:]]
    conv = [*each[0], *each[1], *pads, groups]
    torch.library.opcheck(torch.ops.twinfuse._conv_relu.default, (x, w, b, conv))
    y = torch.ops.twinfuse._conv_relu(x, w, b, conv)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(
            torch.ops.twinfuse._conv_relu_backward.default,
            (torch.ones_like(y), y, x, w, conv, *needs),
        )
