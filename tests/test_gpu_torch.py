"""The ops on CUDA tensors, where there is a GPU: the case tables, streams, graphs, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.cases import CASES as LINEAR
from tests.cases import LinearCase
from tests.conftest import Launched, require, skip
from tests.conv_case import ConvCase
from tests.conv_cases import CASES as CONV
from tests.problem import build, relaid

torch = require("torch")
if not torch.cuda.is_available():
    skip("gpu", "no CUDA device")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import compare, conv_calls, native, native_conv, run  # noqa: E402
from twinfuse._core import device_backend  # noqa: E402

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", list(SHORT))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """New memory is NaN, float32 is not multiplied in TF32, and nothing falls back."""
    torch.manual_seed(7)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    with twinfuse.strict():
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def kernels() -> Any:
    """Also where torch's own operators are faster."""
    return twinfuse.use_backend(device_backend(torch.cuda.current_device())[0])


def check(op: Any, rival: Any, problem: Any, launched: Launched, stem: str) -> None:
    short = SHORT[problem.dtype]
    names = [f"{stem}_{role}_{short}_cuda" for role in ("forward", "backward")]
    with kernels(), launched(names[0], times=1), launched(names[1], times=1):
        ours = run(op, problem, "cuda")
    compare(problem, ours, rival, "cuda")


@every_dtype
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_linear_relu(case: LinearCase, dtype: str, launched: Launched) -> None:
    problem = build(case, dtype)
    try:
        check(tft.linear_relu, native, problem, launched, "linear_relu")
    except twinfuse.FallbackError as error:
        assert "leading dimensions" in str(error)
        pytest.skip(str(error))


NATIVE = [case for case in CONV if case.channels and case.filters]


@every_dtype
@pytest.mark.parametrize("layout", ["own", "channels_last"])
@pytest.mark.parametrize("case", NATIVE, ids=lambda case: case.id)
def test_conv_relu(case: ConvCase, layout: str, dtype: str, launched: Launched) -> None:
    problem = build(case, dtype)
    if layout != "own":
        problem = relaid(problem, layout)
    ours, rival = conv_calls(case)
    try:
        check(ours, rival, problem, launched, "conv_relu")
    except twinfuse.FallbackError as error:
        assert "groups" in str(error) or "rows do not follow" in str(error)
        pytest.skip(str(error))


# Every way through the choice of kernels: large and small tiles, few rows, splits, no vectors.
LARGE = (
    LinearCase("wide_tiles", (2048,), 1024, 3072),
    LinearCase("ragged", (1000,), 776, 1304),
    LinearCase("not_aligned", (333,), 517, 259),
    LinearCase("few_rows", (5,), 1024, 4096),
    LinearCase("deep_gradient", (20000,), 64, 128),
    LinearCase("keras", (1024,), 768, 1024, weight_layout="transposed"),
)


@every_dtype
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_large_products(case: LinearCase, dtype: str, launched: Launched) -> None:
    check(tft.linear_relu, native, build(case, dtype), launched, "linear_relu")


@pytest.mark.parametrize("case", LARGE[:3], ids=lambda case: case.id)
def test_tf32_is_rounded(case: LinearCase, launched: Launched) -> None:
    """Truncated operands would be off by more than twice what torch is."""
    torch.backends.cuda.matmul.allow_tf32 = True
    check(tft.linear_relu, native, build(case, "float32"), launched, "linear_relu")


CONVOLUTIONS = (
    (8, 64, 56, 64, 3, 1, 1),
    (16, 256, 14, 128, 3, 1, 1),
    (4, 512, 7, 512, 3, 1, 1),
    (8, 128, 28, 128, 3, 2, 1),
    (8, 256, 28, 64, 1, 1, 0),
    (4, 3, 224, 64, 7, 2, 3),
)


@every_dtype
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=lambda s: "-".join(map(str, s)))
def test_large_convolutions(sizes: tuple[int, ...], layout: str, dtype: str) -> None:
    n, c, size, k, taps, stride, padding = sizes
    form = {"device": "cuda", "dtype": torch.float64}

    def near(*shape: int, scale: float = 1) -> Any:
        t = (torch.randn(*shape, **form) * scale).to(TYPES[dtype])
        if t.dim() == 4:
            t = t.contiguous(memory_format=getattr(torch, layout))
        return t.requires_grad_()

    inputs = [near(n, c, size, size), near(k, c, taps, taps, scale=(c * taps * taps) ** -0.5)]
    inputs.append(near(k))
    with kernels():
        ours = tft.conv2d_relu(*inputs, stride, padding)
    grad = torch.randn(ours.shape, **form).to(ours.dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = native_conv(*wide, stride, padding)
    # The masks of all three are ours: a sum near zero may round to either side of it.
    mask = (ours > 0).double()
    exact_pre = torch.nn.functional.conv2d(*wide, stride, padding)
    wanted = [exact, *torch.autograd.grad(exact_pre, wide, grad.double() * mask)]
    pre = torch.nn.functional.conv2d(*inputs, stride, padding)
    theirs = [pre.relu(), *torch.autograd.grad(pre, inputs, grad * mask.to(grad.dtype))]
    with kernels():
        ours = [ours, *torch.autograd.grad(ours, inputs, grad)]
    for name, a, b, c_ in zip(("output", "input", "weight", "bias"), ours, theirs, wanted):
        error, rival = ((t.double() - c_).abs().max().item() for t in (a, b))
        tiny = torch.finfo(TYPES[dtype]).eps * c_.abs().max().item()
        assert error <= 2 * rival + tiny, f"{name}: {error} against {rival}"


@pytest.mark.parametrize("size", [8, 128])
@pytest.mark.parametrize("trained", [False, True])
def test_faster_ones(size: int, trained: bool, launched: Launched) -> None:
    """Where torch's operators are faster they are called, and `explain` says so."""
    torch.backends.cudnn.allow_tf32 = True
    shapes = (2, 64, size, size), (128, 64, 3, 3), (128,)
    # TF32 is exact for small integers, so that no ReLU depends on rounding.
    inputs = [torch.randint(-2, 3, shape, device="cuda").float() for shape in shapes]
    inputs = [t.requires_grad_(trained) for t in inputs]
    natively = trained and size == 128
    rows = twinfuse.explain(tft.conv2d_relu, *inputs)
    assert len(rows) == 1 + trained
    assert all((row.backend == "reference") is natively for row in rows), rows
    assert all(("faster on a GPU" in row.reason) is natively for row in rows), rows
    times = int(not natively)
    with launched("conv_relu_forward_f32_cuda", times=times):
        got = tft.conv2d_relu(*inputs)
    torch.testing.assert_close(got, native_conv(*inputs), rtol=0, atol=0)
    if trained:
        with launched("conv_relu_backward_f32_cuda", times=times):
            gradients = torch.autograd.grad(got.sum(), inputs)
        wanted = torch.autograd.grad(native_conv(*inputs).sum(), inputs)
        for ours, theirs in zip(gradients, wanted, strict=True):
            # cuDNN may sum gradients of weights in tiles.
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-3)


def test_faster_gradients(launched: Launched) -> None:
    """The backward pass alone; it has gradients itself."""
    shapes = (16, 64, 128, 128), (64, 64, 3, 3), (64,)
    inputs = [torch.randint(-2, 3, shape, device="cuda").bfloat16() for shape in shapes]
    inputs = [t.requires_grad_() for t in inputs]
    forward, backward = twinfuse.explain(tft.conv2d_relu, *inputs, stride=2)
    assert (forward.backend, backward.backend) == ("cuda", "reference")
    with (
        launched("conv_relu_forward_bf16_cuda", times=1),
        launched("conv_relu_backward_bf16_cuda", times=0),
    ):
        got = tft.conv2d_relu(*inputs, stride=2)
        grad = torch.ones_like(got)
        gradients = torch.autograd.grad(got, inputs, grad, create_graph=True)
    wanted = torch.autograd.grad(native_conv(*inputs, 2), inputs, grad, create_graph=True)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    second, second_wanted = (
        torch.autograd.grad(first.sum(), inputs[1]) for first in (gradients[0], wanted[0])
    )
    torch.testing.assert_close(second, second_wanted, rtol=1e-2, atol=0)


def test_streams() -> None:
    """The op waits for its own stream, and for no other."""
    x, w, b = (torch.randn(*s, device="cuda") for s in ((4096, 1024), (1024, 1024), (1024,)))
    expected = native(x, w, b)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x * 0
        torch.cuda._sleep(10_000_000)
        late += x
        got = tft.linear_relu(late, w, b)
    stream.synchronize()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op", ["linear", "conv"])
def test_graph_capture(op: str) -> None:
    """Kernels that were never loaded may be captured; replays follow what the inputs hold."""
    dtype = torch.float16 if op == "linear" else torch.bfloat16
    if op == "linear":
        shapes: tuple[tuple[int, ...], ...] = ((96, 80), (112, 80), (112,))
        ours, rival = tft.linear_relu, native
    else:
        shapes = ((2, 16, 9, 9), (32, 16, 3, 3), (32,))
        ours, rival = tft.conv2d_relu, native_conv
    tensors = [torch.randn(*s, device="cuda").to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn_like(rival(*tensors))

    def step() -> list[Any]:
        output = ours(*tensors)
        return [output, *torch.autograd.grad(output, tensors, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.randn(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = step()
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    torch.cuda.synchronize()
    for captured, direct in zip(results, step()):
        assert torch.equal(captured, direct)


def test_many_threads() -> None:
    x, w, b = (torch.randn(*s, device="cuda") for s in ((200, 136), (72, 136), (72,)))
    expected = tft.linear_relu(x, w, b)
    results: list[Any] = []

    def work() -> None:
        with twinfuse.strict(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                result = tft.linear_relu(x, w, b)
            torch.cuda.current_stream().synchronize()
            results.append(result)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


@every_dtype
def test_same_bits_every_time(dtype: str) -> None:
    problem = build(replace(LARGE[4], id="again"), dtype)
    first, second = (run(tft.linear_relu, problem, "cuda") for _ in range(2))
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        assert (getattr(first, name) == getattr(second, name)).all(), name


def test_compiled() -> None:
    x, w, b = (torch.randn(*s, device="cuda") for s in ((64, 32), (48, 32), (48,)))
    compiled = torch.compile(lambda *t: tft.linear_relu(*t) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x, w, b), tft.linear_relu(x, w, b) * 2)


def test_float64_takes_reference() -> None:
    x, w = (torch.randn(4, 8, device="cuda", dtype=torch.float64) for _ in range(2))
    with pytest.raises(twinfuse.FallbackError, match="float64"):
        tft.linear_relu(x, w)
    with twinfuse.strict(False), pytest.warns(twinfuse.FallbackWarning, match="float64"):
        torch.testing.assert_close(tft.linear_relu(x, w), native(x, w))
