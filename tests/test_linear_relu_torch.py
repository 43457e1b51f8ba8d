"""`twinfuse.torch.linear_relu`: numbers and gradients in eager code."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory
from tests import core_api
from tests.arrays import DTYPES
from tests.cases import CASES, LinearCase
from tests.conftest import Launched, require
from tests.core_api import Lender
from tests.problem import build
from tests.rule import assert_same_bits

torch = require("torch")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests import torch_cases  # noqa: E402
from tests.torch_cases import assert_same, native, random  # noqa: E402

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
BY_ID = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_poison_is_seen() -> None:
    sizes = (1, 16, 1000, 100_000)
    with torch_cases.poisoned_memory():
        # glibc may serve a small block from a list of freed ones without filling it, but not two in
        # a row of one size.
        fresh = {n: [torch.empty(3, n, dtype=torch.float32) for _ in range(4)] for n in sizes}
    seen = {n: [bool((t.abs() > 1e38).any()) for t in each] for n, each in fresh.items()}
    assert all(map(any, seen.values())), f"unwritten memory would look written: {seen}"


@pytest.mark.parametrize(("rows", "units", "kept"), [(64, 256, True), (512, 1024, False)])
@pytest.mark.usefixtures("threads")
def test_a_thread_keeps_a_little_scratch(rows: int, units: int, kept: bool) -> None:
    """Torch's allocator is asked for the output alone, if not for much more."""
    problem = build(LinearCase("scratch", (rows,), units, units), "float32")
    lender = Lender()
    core_api.forward(problem, lender)
    needed = sum(size for *_, size in lender.scratch)
    assert needed > 0 and kept == (needed <= 256 << 10)

    torch.set_num_threads(1)
    input, weight = torch.randn(rows, units), torch.randn(units, units)
    tft.linear_relu(input, weight)
    peak = memory.torch_peak(lambda: tft.linear_relu(input, weight))
    assert peak == 4 * rows * units + (0 if kept else needed)


@every_dtype
@every_case
def test_matches_native(case: LinearCase, dtype: str, launched: Launched) -> None:
    forward, backward = (f"linear_relu_{r}_{SHORT[dtype]}" for r in ("forward", "backward"))
    with launched(forward, times=1), launched(backward, times=1):
        torch_cases.check(tft.linear_relu, case, dtype)


def test_backward_runs_fused(launched: Launched) -> None:
    x, w, b = random(3, 4), random(5, 4), random(5)
    with (
        launched("linear_relu_forward_f64", times=1),
        launched("linear_relu_backward_f64", times=1),
    ):
        tft.linear_relu(x, w, b).sum().backward()


@every_dtype
def test_operator_gives_the_same_bits(dtype: str) -> None:
    problem = build(BY_ID["several_blocks"], dtype)
    ours = torch_cases.run(tft.linear_relu, problem)
    public = torch_cases.run(torch.ops.twinfuse.linear_relu, problem)
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        assert_same_bits(getattr(public, name), getattr(ours, name), name)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_the_gradients_asked_for(wanted: int) -> None:
    flags = [bool(wanted & bit) for bit in (1, 2, 4)]
    tensors = [random(3, 4), random(5, 4), random(5)]
    expected = torch.autograd.grad(native(*tensors).pow(2).sum(), tensors)
    leaves = [t.detach().requires_grad_(flag) for t, flag in zip(tensors, flags)]
    tft.linear_relu(*leaves).pow(2).sum().backward()
    for leaf, flag, gradient in zip(leaves, flags, expected):
        assert (leaf.grad is not None) == flag
        if flag:
            assert_same(leaf.grad, gradient)


def test_output_is_contiguous_and_gradients_fit_their_leaves() -> None:
    x, w = random(6, 4).detach().t().requires_grad_(), random(6, 8).detach().t().requires_grad_()
    y = tft.linear_relu(x, w)
    assert y.is_contiguous()
    _, grad_weight = torch.autograd.grad(y.sum(), (x, w))
    assert grad_weight.stride() == w.stride()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradients_of_gradients(leading: tuple[int, ...], bias: bool) -> None:
    tensors = (random(*leading, 4), random(5, 4), *((random(5),) if bias else ()))
    assert torch.autograd.gradcheck(tft.linear_relu, tensors)
    assert torch.autograd.gradgradcheck(tft.linear_relu, tensors)


@pytest.mark.parametrize("wanted", [1, 2, 4, 3, 5, 6])
def test_gradients_of_some_gradients(wanted: int) -> None:
    tensors = [random(3, 4), random(5, 4), random(5)]
    leaves = [t.detach().requires_grad_(bool(wanted & 1 << i)) for i, t in enumerate(tensors)]
    assert torch.autograd.gradgradcheck(tft.linear_relu, leaves)


def test_third_order() -> None:
    tensors = (random(3, 4), random(5, 4), random(5))

    def third(op: Any) -> Any:
        value = op(*tensors).pow(4).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(g.pow(2).sum() for g in gradients)
        return torch.autograd.grad(value, tensors)

    torch.testing.assert_close(third(tft.linear_relu), third(native), rtol=1e-9, atol=1e-9)


def test_double_backward_uses_the_fused_backward(launched: Launched) -> None:
    x, w = random(3, 4), random(5, 4)
    with launched("linear_relu_backward_f64", times=1):
        (gradient,) = torch.autograd.grad(tft.linear_relu(x, w).sum(), x, create_graph=True)
        gradient.sum().backward()


def test_relu_passes_nan_and_its_gradient() -> None:
    x = torch.tensor([[float("nan")], [-1.0], [0.0], [2.0]], requires_grad=True)
    w = torch.ones(1, 1)
    y = tft.linear_relu(x, w)
    (gradient,) = torch.autograd.grad(y, x, torch.full((4, 1), 3.0))
    assert y.isnan().flatten().tolist() == [True, False, False, False]
    assert gradient.flatten().tolist() == [3.0, 0.0, 0.0, 3.0]


@every_dtype
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads(dtype: str) -> None:
    problem = build(BY_ID["batch_of_digits_network"], dtype)
    torch.set_num_threads(1)
    expected = torch_cases.run(tft.linear_relu, problem)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        got = torch_cases.run(tft.linear_relu, problem)
        for name in ("output", "grad_input", "grad_weight", "grad_bias"):
            assert_same_bits(
                getattr(got, name), getattr(expected, name), f"{name}, {count} threads"
            )


def test_sixteen_threads_at_once() -> None:
    problems = [build(case, "float32") for case in CASES[9:25]]
    expected = [torch_cases.run(tft.linear_relu, problem) for problem in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(16)

    def work(first: int) -> None:
        try:
            start.wait()
            for i in range(first, first + 2 * len(problems)):
                got = torch_cases.run(tft.linear_relu, problems[i % 16])
                assert_same_bits(got.output, expected[i % 16].output, "output")
                assert_same_bits(got.grad_weight, expected[i % 16].grad_weight, "grad_weight")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def test_views_that_are_resolved_lazily() -> None:
    z = torch.randn(3, 4, dtype=torch.complex128)
    x, w = z.conj().imag, random(5, 4, grad=False)
    assert x.is_neg()
    assert_same(tft.linear_relu(x, w), native(-z.imag, w))
    lazy = torch._lazy_clone(w)
    assert_same(tft.linear_relu(z.real, lazy), native(z.real, w))


def test_inference_mode() -> None:
    x, w = random(3, 4), random(5, 4)
    with torch.inference_mode():
        y = tft.linear_relu(x, w)
    assert y.is_inference() and torch.equal(y, tft.linear_relu(x, w).detach())


@pytest.mark.parametrize("op", [tft.linear_relu, native], ids=["ours", "native"])
def test_changing_the_output_in_place_is_an_error(op: Any) -> None:
    x, w = random(3, 4), random(5, 4)
    y = op(x, w)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", [tft.linear_relu, native], ids=["ours", "native"])
def test_changing_an_unneeded_input_in_place_is_none(op: Any) -> None:
    x, w = random(3, 4, grad=False), random(5, 4)
    y = op(x, w)
    with torch.no_grad():
        w.add_(1)
    y.sum().backward()
    assert w.grad is not None


def test_only_what_backward_needs_is_saved() -> None:
    x, w, b = random(3, 4), random(5, 4), random(5)

    def saved(op: Any, *tensors: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Any) -> Any:
            shapes.append(tuple(sorted(tensor.shape)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            op(*tensors)
        return sorted(shapes)

    for tensors in ((x, w, b), (x.detach(), w, b), (x, w.detach(), b), (x.detach(), w.detach(), b)):
        assert saved(tft.linear_relu, *tensors) == saved(native, *tensors)


def test_errors_of_hooks_pass_through() -> None:
    def refuse(tensor: Any) -> Any:
        raise RuntimeError("no memory for saved tensors")

    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        pytest.raises(RuntimeError, match=r"^no memory for saved tensors$"),
    ):
        tft.linear_relu(random(3, 4), random(5, 4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = (random(3, 4), random(5, 4), random(5))
    y = checkpoint(tft.linear_relu, *tensors, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    expected = torch.autograd.grad(native(*tensors).pow(2).sum(), tensors)
    assert_same([t.grad for t in tensors], list(expected))


def test_deterministic_mode() -> None:
    x, w = random(3, 4), random(5, 4)
    expected = tft.linear_relu(x, w)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(tft.linear_relu(x, w), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_explain() -> None:
    x, w = random(3, 4), random(5, 4)
    forward, backward = twinfuse.explain(tft.linear_relu, x, w)
    assert (forward.op, forward.backend) == ("linear_relu", "cpu")
    assert forward.kernel in twinfuse.launches() and "forward" in forward.kernel
    assert (backward.op, backward.backend) == ("linear_relu_backward", "cpu")
    assert backward.kernel in twinfuse.launches() and "backward" in backward.kernel
    with torch.no_grad():
        assert len(twinfuse.explain(tft.linear_relu, x, w)) == 1
    (row,) = twinfuse.explain(tft.linear_relu, x.detach().int(), w.detach().int())
    assert row.backend == "reference" and "int32" in row.reason


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 4, 0), (0, 4, 5)], ids=str)
def test_double_backward_of_empty_sizes(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    tensors = [torch.randn(s, requires_grad=True) for s in ((m, k), (n, k), (n,))]

    def second(op: Any) -> list[Any]:
        first = torch.autograd.grad(op(*tensors).sum(), tensors, create_graph=True)
        total = sum((g * g).sum() for g in first)
        return [*first, *torch.autograd.grad(total, tensors, allow_unused=True)]

    # A gradient that does not depend on a tensor may come as None or as zeros.
    likes = tensors * 2
    for ours, theirs, like in zip(second(tft.linear_relu), second(native), likes):
        zeros = torch.zeros_like(like)
        torch.testing.assert_close(
            zeros if ours is None else ours, zeros if theirs is None else theirs
        )


def test_large_outputs_lie_on_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        pytest.skip("this system has no huge pages")
    output = tft.linear_relu(torch.randn(8192, 1), torch.randn(1024, 1))
    middle = output.data_ptr() + output.nbytes // 2
    flags: list[str] = []
    # Mappings begin with their addresses; their flags come last. "hg" is MADV_HUGEPAGE.
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            holds = int(found[1], 16) <= middle < int(found[2], 16)
        elif line.startswith("VmFlags:") and holds:
            flags = line.split()[1:]
    assert "hg" in flags, flags
