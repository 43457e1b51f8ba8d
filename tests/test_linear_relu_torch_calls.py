"""`twinfuse.torch.linear_relu` inside what else torch has: transforms, modes, compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch._dynamo.testing  # noqa: E402, F811

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import assert_same, native, random  # noqa: E402

OPS = {"function": tft.linear_relu, "operator": torch.ops.twinfuse.linear_relu}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
Op = Callable[..., Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch._dynamo.reset()


@pytest.fixture
def tensors() -> tuple[Any, Any, Any]:
    return random(3, 4), random(5, 4), random(5)


def transformed(name: str, op: Op, x: Any, w: Any, b: Any) -> Any:
    def loss(weight: Any, row: Any) -> Any:
        return op(row, weight, b).pow(2).sum()

    stacked = torch.stack([w, 2 * w])
    f = torch.func
    return {
        "grad": lambda: f.grad(loss)(w, x),
        "vmap_input": lambda: f.vmap(op, (1, None, None))(torch.stack([x, -x], 1), w, b),
        "vmap_weight": lambda: f.vmap(op, (None, 0, None))(x, stacked, b),
        "vmap_bias": lambda: f.vmap(op, (None, None, 1))(x, w, torch.stack([b, -b], 1)),
        "vmap_all": lambda: f.vmap(op)(torch.stack([x, -x]), stacked, torch.stack([b, -b])),
        "vmap_of_vmap": lambda: f.vmap(f.vmap(op, (0, None, None)), (None, 0, None))(x, stacked, b),
        "per_sample_gradients": lambda: f.vmap(f.grad(loss), (None, 0))(w, x),
        "jacrev": lambda: f.jacrev(lambda w: op(x, w, b))(w),
        "jacfwd": lambda: f.jacfwd(lambda w: op(x, w, b))(w),
        "hessian": lambda: f.hessian(loss)(w, x),
        "jvp": lambda: f.jvp(lambda w: op(x, w, b), (w,), (torch.ones_like(w),)),
        "linearize": lambda: f.linearize(lambda w: op(x, w, b), w)[1](torch.ones_like(w)),
    }[name]()


TRANSFORMS = [
    *("grad", "vmap_input", "vmap_weight", "vmap_bias", "vmap_all", "vmap_of_vmap"),
    *("per_sample_gradients", "jacrev", "jacfwd", "hessian", "jvp", "linearize"),
]


@pytest.mark.allow_fallback
@every_op
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, op: Op, tensors: Any) -> None:
    plain = [t.detach() for t in tensors]
    assert_same(transformed(name, op, *plain), transformed(name, native, *plain))


@pytest.mark.allow_fallback
@every_op
@pytest.mark.parametrize("name", ["per_sample_gradients", "jacfwd", "hessian"])
def test_compiled_transforms(name: str, op: Op, tensors: Any) -> None:
    plain = [t.detach() for t in tensors]
    compiled = torch.compile(
        lambda *a: transformed(name, op, *a), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(*plain), transformed(name, native, *plain))


@pytest.mark.allow_fallback
@every_op
def test_autograd_through_vmap(op: Op, tensors: Any) -> None:
    x, w, b = tensors
    got = torch.autograd.grad(torch.func.vmap(op, (0, None, None))(x, w, b).pow(2).sum(), tensors)
    assert_same(got, torch.autograd.grad(native(x, w, b).pow(2).sum(), tensors))


def test_transforms_say_that_they_fall_back(tensors: Any) -> None:
    x, w, b = (t.detach() for t in tensors)
    with pytest.raises(twinfuse.FallbackError, match=r"a torch\.func transform is active"):
        torch.func.grad(lambda w: tft.linear_relu(x, w, b).sum())(w)


@pytest.mark.allow_fallback
@every_op
def test_forward_mode_keeps_tangents(op: Op, tensors: Any) -> None:
    import torch.autograd.forward_ad as forward_ad

    x, w, b = tensors
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        got, expected = (forward_ad.unpack_dual(f(dual, w, b)).tangent for f in (op, native))
    assert got is not None
    assert_same(got, expected)
    assert torch.autograd.gradcheck(
        op, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@every_op
def test_batched_gradients(op: Op, tensors: Any) -> None:
    directions = random(7, 3, 5, grad=False)
    got, expected = (
        torch.autograd.grad(f(*tensors), tensors, directions, is_grads_batched=True)
        for f in (op, native)
    )
    assert_same(got, expected)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(op: Op, dtype: Any, compiled: bool, launched: Launched) -> None:
    leaves = [random(*s, dtype=torch.float32) for s in ((3, 16), (5, 16), (5,))]

    def call(f: Op) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return f(*leaves)

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with launched("linear_relu_forward_" + {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]):
        got = run(op)
    expected = call(native)
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got.float().sum(), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.float().sum(), leaves)):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@every_op
def test_autocast_leaves_float64_alone(op: Op, tensors: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(*tensors).dtype == native(*tensors).dtype == torch.float64


@every_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_dynamic_shapes(backend: str, op: Op, launched: Launched) -> None:
    _, w, b = random(1, 4), random(5, 4), random(5)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda x, w, b: op(x * 2, w, b).pow(2), fullgraph=True, dynamic=True, backend=counter
    )
    for rows in (3, 7, 12):
        x = random(rows, 4)
        with launched("linear_relu_forward_f64", 1), launched("linear_relu_backward_f64", 1):
            got = torch.autograd.grad(compiled(x, w, b).sum(), (x, w, b))
        assert_same(got, torch.autograd.grad(native(x * 2, w, b).pow(2).sum(), (x, w, b)))
        with torch.no_grad():
            assert_same(compiled(x, w, b), native(x * 2, w, b).pow(2))
    assert counter.frame_count <= 2  # with and without gradients


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_computes_only_gradients_asked_for(backend: str, tensors: Any) -> None:
    x, w, b = tensors
    compiled = torch.compile(tft.linear_relu, fullgraph=True, backend=backend)
    for wanted in ((w,), (x,), (w, b), (b,)):
        leaves = [t if any(t is leaf for leaf in wanted) else t.detach() for t in tensors]
        got = torch.autograd.grad(compiled(*leaves).pow(2).sum(), wanted)
        assert_same(got, torch.autograd.grad(native(*leaves).pow(2).sum(), wanted))


def targets(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_compiled_code_follows_the_chosen_backend(tensors: Any) -> None:
    x, w, b = (t.detach() for t in tensors)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda: tft.linear_relu(x, w, b), fullgraph=True, backend=counter)
    expected = native(x, w, b)
    assert_same(compiled(), expected)
    assert targets(counter.graphs[0].graph) == ["twinfuse.linear_relu.default"]
    with twinfuse.use_backend("reference"), twinfuse.strict():
        assert_same(compiled(), expected)
    assert not any("twinfuse" in target for target in targets(counter.graphs[1].graph))
    assert_same(compiled(), expected)
    assert counter.frame_count == 2


def test_backend_is_chosen_inside_compiled_code(tensors: Any) -> None:
    x, w, b = (t.detach() for t in tensors)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def twice() -> Any:
        with twinfuse.use_backend("reference"):
            y = tft.linear_relu(x, w, b)
        return y + tft.linear_relu(x, w, b)

    assert_same(twice(), 2 * native(x, w, b))
    names = targets(counter.graphs[0].graph)
    assert names.count("twinfuse.linear_relu.default") == 1 and len(names) == 4


@pytest.mark.allow_fallback
def test_compiled_code_reports_its_fallbacks() -> None:
    x, w = torch.ones(3, 4, dtype=torch.int64), torch.ones(5, 4, dtype=torch.int64)
    compiled = torch.compile(lambda: tft.linear_relu(x, w), fullgraph=True, backend="aot_eager")
    with pytest.warns(twinfuse.FallbackWarning, match=r"got torch\.int64"):
        assert torch.equal(compiled(), native(x, w))
    torch._dynamo.reset()
    with twinfuse.strict(), pytest.raises(Exception, match=r"got torch\.int64"):
        compiled()


class Op3(torch.nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Any, w: Any, b: Any) -> Any:
        return self.op(x, w, b)


@every_op
@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_export(op: Op, strict: bool, tensors: Any) -> None:
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        Op3(op), tensors, strict=strict, dynamic_shapes=({0: rows}, None, None)
    )
    for exported in (program, program.run_decompositions()):
        assert targets(exported.graph) == ["twinfuse.linear_relu.default"]
    x = random(8, 4)
    assert_same(program.module()(x, *tensors[1:]), native(x, *tensors[1:]))


@every_op
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(op: Op, mode: str, tensors: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(op, tracing_mode=mode)(*(t.detach() for t in tensors))
    assert targets(graph.graph) == ["twinfuse.linear_relu.default"]
    assert_same(graph(*tensors), native(*tensors))


@every_op
def test_fake_tensors(op: Op, tensors: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        y = op(*(mode.from_tensor(t) for t in tensors))
    assert isinstance(y, FakeTensor) and y.shape == (3, 5) and y.requires_grad


def test_symbolic_trace_keeps_the_layer(tensors: Any) -> None:
    graph = torch.fx.symbolic_trace(Op3(tft.linear_relu))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [tft.linear_relu]
    assert_same(graph(*tensors), native(*tensors))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@every_op
def test_jit_trace(op: Op, tensors: Any) -> None:
    traced = torch.jit.trace(op, tensors)
    assert "twinfuse::linear_relu" in {node.kind() for node in traced.graph.nodes()}
    got, expected = traced(*tensors), native(*tensors)
    assert_same(got, expected)
    assert_same(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
    )


@every_op
def test_flops_are_counted(op: Op, tensors: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for f in (op, native):
        with FlopCounterMode(display=False) as counter:
            f(*tensors).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 3 * 4 * 5


@every_op
def test_default_device_and_other_modes(op: Op, tensors: Any, launched: Launched) -> None:
    with torch.device("cpu"), launched("linear_relu_forward_f64", times=1):
        assert_same(op(*tensors), native(*tensors))


class Tagged(torch.Tensor):
    """A subclass that sees what is called on it."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.allow_fallback
def test_subclasses_see_the_native_calls() -> None:
    x, w = torch.randn(3, 4).as_subclass(Tagged), torch.randn(5, 4)
    Tagged.seen = []
    y = tft.linear_relu(x, w)
    assert type(y) is Tagged and torch.nn.functional.linear in Tagged.seen
    plain = x.as_subclass(torch.Tensor)
    assert torch.equal(y.as_subclass(torch.Tensor), native(plain, w))


ARGUMENTS = {
    "contiguous": lambda: (random(3, 4), random(5, 4), random(5)),
    "no_bias": lambda: (random(2, 3, 4), random(5, 4)),
    "views": lambda: (random(4, 3).t(), random(4, 5).t(), random(10)[::2]),
    "vector": lambda: (random(4), random(5, 4), random(5)),
    "empty": lambda: (random(0, 4), random(5, 4), random(5)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str) -> None:
    arguments = [t.detach().requires_grad_() for t in ARGUMENTS[name]()]
    torch.library.opcheck(torch.ops.twinfuse.linear_relu.default, arguments)
    plain = [t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.twinfuse._linear_relu.default, plain)
    y = native(*plain)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        x, w = (t if need else None for t, need in zip(plain, (needs[1], needs[0])))
        torch.library.opcheck(
            torch.ops.twinfuse._linear_relu_backward.default, (torch.ones_like(y), y, x, w, *needs)
        )


@pytest.mark.allow_fallback
def test_vmap_of_the_operator_without_bias(tensors: tuple[Any, Any, Any]) -> None:
    x, w, _ = tensors
    weights = torch.stack([w, -w])
    ours = torch.vmap(lambda weight: torch.ops.twinfuse.linear_relu(x, weight))(weights)
    torch.testing.assert_close(ours, torch.stack([native(x, weight) for weight in weights]))
    ours = torch.vmap(lambda row: torch.ops.twinfuse.linear_relu(row, w))(x)
    torch.testing.assert_close(ours, native(x, w))


def test_settings_do_not_undo_each_other() -> None:
    with twinfuse.strict(False):
        with twinfuse.use_backend("reference"):
            twinfuse.strict()
        assert twinfuse._backend.strict_mode and twinfuse._backend.requested is None
    assert twinfuse._backend.strict_mode  # as the tests run
