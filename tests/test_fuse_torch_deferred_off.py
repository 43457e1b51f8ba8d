"""Where deferred layers are native: what traces, transforms, watches or distributes the model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.modules import module as hooked  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.deferred_models import Decoder, Probe, inputs, probes, run  # noqa: E402
from twinfuse.torch._deferred import Uses, _open  # noqa: E402
from twinfuse.torch._deferred_tensor import Deferred  # noqa: E402

FORWARD = "linear_relu_forward_"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(8)


class Kinds:
    """Notes what the Linear returned."""

    def __init__(self) -> None:
        self.seen: list[type] = []

    def __call__(self, z: Any) -> Any:
        self.seen.append(type(z))
        return F.relu(z)


class Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "reference": lambda: twinfuse.use_backend("reference"),
    "function_mode": Calls,
    "default_device": lambda: torch.device("cpu"),
    "dispatch_mode": lambda: FlopCounterMode(display=False),
    "saved_tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "dual_level": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str, launched: Launched) -> None:
    native, ours = probes(dtype=torch.float32)
    x, kinds = inputs(dtype=torch.float32), Kinds()
    with CONTEXTS[name](), launched(FORWARD, times=0):
        expected = native(x, F.relu)
        got = ours(x, kinds)
    assert kinds.seen == [torch.Tensor] and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with launched(FORWARD, times=1):
        ours(x, kinds)
    assert kinds.seen[1] is Deferred


def test_transforms(launched: Launched) -> None:
    native, ours = probes()
    x, kinds = inputs(), Kinds()
    with launched(FORWARD, times=0):
        for apply in (
            lambda model, use: torch.vmap(lambda row: model(row, use))(x),
            lambda model, use: torch.func.grad(lambda x: model(x, use).sum())(x),
            lambda model, use: torch.func.jvp(lambda x: model(x, use), (x,), (x,)),
            lambda model, use: torch.func.jacrev(lambda x: model(x, use))(x),
        ):
            torch.testing.assert_close(apply(ours, kinds), apply(native, F.relu))
    assert set(kinds.seen) == {torch.Tensor}


def test_inputs_that_have_no_versions() -> None:
    _, ours = probes()
    kinds = Kinds()
    with torch.inference_mode():
        x = inputs()
    with torch.no_grad():
        ours(x, kinds)
    assert kinds.seen == [torch.Tensor]


class Wrapper(torch.Tensor):
    pass


INPUTS = {
    "subclass": lambda: inputs().as_subclass(Wrapper),
    "sparse": lambda: torch.eye(8, dtype=torch.float64).to_sparse(),
    "other_dtype": lambda: inputs(dtype=torch.float32),
    "other_width": lambda: inputs(5, 7),
    "scalar": lambda: torch.ones((), dtype=torch.float64),
    "meta": lambda: inputs().to("meta"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_no_kernel_takes(name: str) -> None:
    """The same results and errors, and those where the Linear is called."""
    native, ours = probes()
    results: list[Any] = []
    for model in (native, ours):
        kinds = Kinds()
        try:
            results.append(model(INPUTS[name](), kinds).shape)
        except (RuntimeError, NotImplementedError) as error:
            results.append((type(error), str(error)))
        results.append([kind for kind in kinds.seen if kind is Deferred])
    assert results[:2] == results[2:]


def noted(*args: Any) -> None:
    pass


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_hooks_of_the_layer(register: str) -> None:
    _, ours = probes()
    seen: list[Any] = []
    handle = getattr(ours.fc, register)(lambda *args: seen.append(args))
    kinds = Kinds()
    ours(inputs(), kinds).sum().backward()
    assert kinds.seen == [torch.Tensor] and len(seen) == 1 and ours.fc.uses == Uses()
    handle.remove()
    ours(inputs(), kinds)
    assert kinds.seen[1] is Deferred


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    ],
)
def test_hooks_of_all_modules(register: str) -> None:
    _, ours = probes()
    kinds = Kinds()
    handle = getattr(hooked, register)(noted)
    try:
        ours(inputs(), kinds).sum().backward()
    finally:
        handle.remove()
    assert kinds.seen == [torch.Tensor] and ours.fc.uses == Uses()


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_the_relu_and_of_modules_around(register: str) -> None:
    """See the values and gradients that they see natively."""
    results = []
    for model in probes():
        seen: list[Any] = []

        def hook(module: Any, *args: Any, seen: list[Any] = seen) -> None:
            leaves = torch.utils._pytree.tree_leaves(args)
            seen.extend(t.detach().clone() for t in leaves if isinstance(t, torch.Tensor))

        getattr(model.relu, register)(hook)
        getattr(model, register)(hook)
        torch.manual_seed(9)
        output, gradients = run(model, inputs(), model.relu)
        results.append([output, *gradients, *seen])
        assert len(seen) >= 2
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "twinfuse"])
def test_compiled_models(backend: str, launched: Launched) -> None:
    torch._dynamo.reset()
    native = Decoder()
    ours = tft.fuse(native, deferred=True)
    x = torch.randn(6, 8, requires_grad=True)
    expected = torch.autograd.grad(native(x)[0].sum(), x)
    with launched(FORWARD, times=0):
        compiled = torch.compile(ours, fullgraph=True, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(compiled(x)[0].sum(), x), expected)
    with launched(FORWARD, times=1):  # the same model, eagerly
        torch.testing.assert_close(torch.autograd.grad(ours(x)[0].sum(), x), expected)
    assert not _open.calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_parts_take_the_output(backend: str) -> None:
    torch._dynamo.reset()
    native, ours = probes()
    part = torch.compile(lambda z: F.relu(z) * 2 + z.shape[0], backend=backend)
    for shape in ((5, 8), (5, 8), (7, 8)):
        x = inputs(*shape)
        torch.testing.assert_close(run(ours, x, part), run(native, x, part))
        twice = lambda z: part(z) + F.relu(z) + part(z)  # noqa: E731
        torch.testing.assert_close(run(ours, x, twice), run(native, x, twice))


def test_whole_graphs_refuse_the_output() -> None:
    torch._dynamo.reset()
    _, ours = probes()
    part = torch.compile(lambda z: F.relu(z) * 2, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="deferred Linear"):
        ours(inputs(), part)


def test_graph_breaks() -> None:
    torch._dynamo.reset()

    class Breaks(Decoder):
        def forward(self, x: Any) -> Any:
            y = self.fc1(x)
            torch._dynamo.graph_break()
            y = self.activation_fn(y)
            print(end="")
            return self.fc2(y)

    native = Breaks()
    ours = tft.fuse(native, deferred=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(ours, backend="eager")(x), native(x))
    assert not _open.calls


def test_exports_and_traces(launched: Launched) -> None:
    native = Decoder().eval()
    ours = tft.fuse(native, deferred=True)
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    expected = native(other)[0]
    with launched(FORWARD, times=0):
        for strict in (True, False):
            exported = torch.export.export(ours, (x,), strict=strict).module()
            torch.testing.assert_close(exported(other)[0], expected)
        traced = torch.jit.trace(ours, x, check_trace=False)
        torch.testing.assert_close(traced(other)[0], expected)
        probe = Probe(dtype=torch.float32)
        fused = tft.fuse(probe, deferred=True)

        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.probe = fused

            def forward(self, x: Any) -> Any:
                return self.probe(x, F.relu)

        graph = torch.fx.symbolic_trace(Root())
        torch.testing.assert_close(graph(other), probe(other, F.relu))
    assert not _open.calls


def test_a_trace_that_takes_the_output_is_an_error() -> None:
    """The output would be a constant in it, not an input."""
    _, ours = probes()
    act = nn.Sequential(nn.ReLU(), nn.Tanh())
    with torch.no_grad():
        for use in (torch.neg, lambda z: z):
            with pytest.raises(RuntimeError, match="a trace that takes it"):
                ours(inputs(), lambda z, use=use: (F.relu(z), use(z), torch.jit.trace(act, z)))
        with pytest.raises(RuntimeError, match="a trace that takes it"):
            ours(inputs(), lambda z: torch.jit.trace(act, z))
        function = ours(inputs(), lambda z: torch.jit.trace(act, z * 1))
        other = inputs(5, 6)
        torch.testing.assert_close(function(other), act(other))


def test_memory_is_not_given_to_c() -> None:
    """C++ that skips both protocols of torch gets an error, not a null pointer."""
    _, ours = probes()

    def use(z: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            with pytest.raises(RuntimeError, match="data pointer"):
                z.data_ptr()
            with pytest.raises(RuntimeError, match="data pointer"):
                torch.utils.dlpack.to_dlpack(z)
            with pytest.raises(RuntimeError, match="by C\\+\\+"):
                z.detach_().add_(1)
        return F.relu(z)

    with torch.no_grad():
        ours(inputs(), use)


@pytest.fixture
def _one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp(options: dict[str, Any], launched: Launched) -> None:
    results = []
    native = Decoder()
    for model, times in ((native, 0), (tft.fuse(native, deferred=True), 3)):
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        torch.manual_seed(2)
        with launched(FORWARD, times=times):
            for _ in range(3):
                native.zero_grad()
                x = torch.randn(4, 8)
                parallel(x)[0].sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("whole", [True, False])
def test_fsdp(whole: bool) -> None:
    """Weights are freed where the call of a module ends."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            for _ in range(1):
                x = self.b(F.relu(self.a(x)))
            return {"x": x}

    mesh = init_device_mesh("cpu", (1,))
    results = []
    torch.manual_seed(3)
    native = nn.ModuleList([Ends(), Ends()])
    for prepare in (lambda m: m, lambda m: tft.fuse(m, deferred=True)):
        model = prepare(native)
        x = torch.linspace(-1, 1, 32).view(4, 8).requires_grad_()
        if model is not native:
            model = tft.fuse(nn.ModuleList([Ends(), Ends()]), inplace=True, deferred=True)
            model.load_state_dict(native.state_dict())
            for part in model if whole else [p for end in model for p in (end.a, end.b)]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        y = x
        for end in model:
            y = end(y)["x"]
        y.sum().backward()
        results.append([y, x.grad])
    torch.testing.assert_close(results[1], results[0])


def test_saved_and_loaded_models() -> None:
    native = Decoder()
    ours = tft.fuse(native, deferred=True)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 8)
    torch.testing.assert_close(loaded(x), native(x))
