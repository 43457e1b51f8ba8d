"""`twinfuse.torch.conv1d_relu` and `conv2d_relu`: numbers and gradients in eager code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.arrays import DTYPES
from tests.conftest import Launched, require
from tests.conv_case import ConvCase
from tests.conv_cases import CASES
from tests.problem import build
from tests.rule import assert_same_bits

torch = require("torch")

import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests import torch_cases  # noqa: E402
from tests.torch_cases import assert_same, conv_calls, native_conv, random  # noqa: E402

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
BY_ID = {case.id: case for case in CASES}
# What torch's own layers get wrong: a batch without channels has no filters in their output.
NOT_NATIVE = {case.id for case in CASES if case.channels == 0 or case.filters == 0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_float32(op: Any) -> Any:
    def call(*tensors: Any) -> Any:
        return op(*(t.float() for t in tensors)).to(tensors[0].dtype)

    return call


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_native(case: ConvCase, dtype: str, launched: Launched) -> None:
    if case.id in NOT_NATIVE:
        pytest.skip("torch has no right answer: see the tests of empty channels and filters")
    ours, rival = conv_calls(case)
    if case.values == "nonfinite" and dtype == "bfloat16":
        rival = in_float32(rival)  # torch makes NaN of infinities in bfloat16
    forward, backward = (f"conv_relu_{r}_{SHORT[dtype]}" for r in ("forward", "backward"))
    with launched(forward, times=1), launched(backward, times=1):
        torch_cases.check(ours, case, dtype, rival)


@every_dtype
@pytest.mark.parametrize("name", ["empty_channels", "empty_channels_no_bias"])
def test_without_channels_the_bias_is_left(name: str, dtype: str) -> None:
    problem = build(BY_ID[name], dtype)
    tensors = torch_cases.arguments(problem)
    with torch_cases.poisoned_memory():
        y = conv_calls(problem.case)[0](*tensors)
        g = torch_cases.tensor(problem.grad_output, dtype)
        grad_input, grad_weight, *grad_bias = torch.autograd.grad(y, tensors, g)
    bias = tensors[2].detach() if problem.bias else torch.zeros(y.shape[1], dtype=y.dtype)
    assert torch.equal(y, bias.relu().view(-1, 1, 1).expand(problem.case.output_sizes))
    assert grad_input.shape == tensors[0].shape and grad_weight.shape == tensors[1].shape
    for gradient in grad_bias:
        torch.testing.assert_close(gradient, (g * (y > 0)).sum((0, 2, 3)))


@every_dtype
@pytest.mark.parametrize("name", ["three_by_three_nhwc", "same_even_kernel", "1d_stride"])
def test_operator_gives_the_same_bits(name: str, dtype: str) -> None:
    case = BY_ID[name]
    low, high = map(list, zip(*case.padding))
    public = getattr(torch.ops.twinfuse, case.name)

    def operator(x: Any, w: Any, b: Any) -> Any:
        return public(x, w, b, case.stride, low + high, case.dilation, case.groups)

    def function(x: Any, w: Any, b: Any) -> Any:
        if case.symmetric:
            return conv_calls(case)[0](x, w, b)
        return getattr(tft, case.name)(x, w, b, padding="same")

    problem = build(case, dtype)
    got, expected = (torch_cases.run(op, problem) for op in (operator, function))
    for part in ("output", "grad_input", "grad_weight", "grad_bias"):
        assert_same_bits(getattr(got, part), getattr(expected, part), part)


def tensors_2d(**options: Any) -> list[Any]:
    groups = options.get("groups", 1)
    return [random(2, 4, 5, 6), random(6, 4 // groups, 3, 2), random(6)]


def tensors_1d(**options: Any) -> list[Any]:
    return [random(2, 4, 9), random(6, 4 // options.get("groups", 1), 4), random(6)]


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_the_gradients_asked_for(wanted: int, launched: Launched) -> None:
    flags = [bool(wanted & bit) for bit in (1, 2, 4)]
    tensors = tensors_2d()
    expected = torch.autograd.grad(native_conv(*tensors).pow(2).sum(), tensors)
    leaves = [t.detach().requires_grad_(flag) for t, flag in zip(tensors, flags)]
    with launched("conv_relu_backward_f64", times=1):
        tft.conv2d_relu(*leaves).pow(2).sum().backward()
    for leaf, flag, gradient in zip(leaves, flags, expected):
        assert (leaf.grad is not None) == flag
        if flag:
            assert_same(leaf.grad, gradient)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "valid": {"padding": "valid", "stride": 2},
    "same": {"padding": "same"},
    "same_dilation": {"padding": "same", "dilation": 2},
    "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
RANKS = {"1d": (tft.conv1d_relu, tensors_1d), "2d": (tft.conv2d_relu, tensors_2d)}
every_rank = pytest.mark.parametrize("rank", RANKS)


@every_rank
@every_option
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_options(rank: str, options: dict[str, Any], batched: bool, launched: Launched) -> None:
    op, make = RANKS[rank]
    tensors = make(**options)
    if not batched:
        tensors[0] = tensors[0].detach()[1].requires_grad_()
    with launched("conv_relu_forward_f64", times=1), launched("conv_relu_backward_f64", times=1):
        got = op(*tensors, **options)
        gradients = torch.autograd.grad(got.pow(2).sum(), tensors)
    expected = native_conv(*tensors, **options)
    assert_same(got, expected)
    assert_same(gradients, torch.autograd.grad(expected.pow(2).sum(), tensors))
    assert_same(op(*tensors[:2], **options), native_conv(*tensors[:2], **options))


@pytest.mark.parametrize(
    "pair", [(2, 1), [2, 1], torch.Size((2, 1)), (np.int64(2), np.int32(1)), (2,), np.int64(2)]
)
def test_numbers_of_any_kind(pair: Any) -> None:
    tensors = [random(2, 3, 9, 9, grad=False), random(4, 3, 2, 3, grad=False)]
    options = {"stride": pair, "padding": pair, "dilation": pair}
    assert_same(tft.conv2d_relu(*tensors, **options), native_conv(*tensors, **options))


@every_rank
@every_option
def test_gradients_of_gradients(rank: str, options: dict[str, Any]) -> None:
    size = (5,) if rank == "1d" else (4, 3)
    channels = 2 // options.get("groups", 1)
    tensors = [random(2, 2, *size), random(2, channels, *(2 for _ in size)), random(2)]
    call = partial(RANKS[rank][0], **options)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors[:2])


@pytest.mark.parametrize("wanted", range(1, 7))
@pytest.mark.parametrize("options", [{}, OPTIONS["same"]], ids=["plain", "same"])
def test_gradients_of_some_gradients(wanted: int, options: dict[str, Any]) -> None:
    tensors = [random(1, 2, 4, 3), random(2, 2, 2, 2), random(2)]
    leaves = [t.detach().requires_grad_(bool(wanted & 1 << i)) for i, t in enumerate(tensors)]
    assert torch.autograd.gradgradcheck(partial(tft.conv2d_relu, **options), leaves)


def test_third_order() -> None:
    tensors = tensors_2d()

    def third(op: Any) -> Any:
        value = op(*tensors, padding=1).pow(4).mean()
        for _ in range(2):
            gradients = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(g.pow(2).mean() for g in gradients)
        return torch.autograd.grad(value, tensors)

    torch.testing.assert_close(third(tft.conv2d_relu), third(native_conv), rtol=1e-9, atol=1e-9)


def test_double_backward_uses_the_fused_backward(launched: Launched) -> None:
    x, w, _ = tensors_2d()
    with launched("conv_relu_backward_f64", times=1):
        (gradient,) = torch.autograd.grad(tft.conv2d_relu(x, w).sum(), x, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (0, 4, 3, 2)], ids=str)
def test_double_backward_of_an_empty_batch(shape: tuple[int, ...]) -> None:
    tensors = [random(*shape), *tensors_2d()[1:]]
    assert torch.autograd.gradcheck(tft.conv2d_relu, tensors)
    assert torch.autograd.gradgradcheck(tft.conv2d_relu, tensors)


def test_relu_passes_nan_and_its_gradient() -> None:
    x = torch.tensor([[[float("nan"), -1.0, 0.0, 2.0]]], requires_grad=True)
    y = tft.conv1d_relu(x, torch.ones(1, 1, 1))
    (gradient,) = torch.autograd.grad(y, x, torch.full((1, 1, 4), 3.0))
    assert y.isnan().flatten().tolist() == [True, False, False, False]
    assert gradient.flatten().tolist() == [3.0, 0.0, 0.0, 3.0]


@every_dtype
@pytest.mark.parametrize("name", ["several_blocks_of_pixels", "three_by_three_nhwc", "1d_stride"])
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads(name: str, dtype: str) -> None:
    problem = build(BY_ID[name], dtype)
    ours = conv_calls(problem.case)[0]
    torch.set_num_threads(1)
    expected = torch_cases.run(ours, problem)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        got = torch_cases.run(ours, problem)
        for part in ("output", "grad_input", "grad_weight", "grad_bias"):
            what = f"{part}, {count} threads"
            assert_same_bits(getattr(got, part), getattr(expected, part), what)


def test_sixteen_threads_at_once() -> None:
    cases = [case for case in CASES if case.id not in NOT_NATIVE][9:25]
    problems = [build(case, "float32") for case in cases]
    expected = [torch_cases.run(conv_calls(p.case)[0], p) for p in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(16)

    def work(first: int) -> None:
        try:
            start.wait()
            for i in range(first, first + 2 * len(problems)):
                problem = problems[i % 16]
                got = torch_cases.run(conv_calls(problem.case)[0], problem)
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
    z = torch.randn(2, 4, 5, 6, dtype=torch.complex128)
    x, w = z.conj().imag, random(3, 4, 3, 2, grad=False)
    assert x.is_neg()
    assert_same(tft.conv2d_relu(x, w), native_conv(-z.imag, w))
    assert_same(tft.conv2d_relu(z.real, torch._lazy_clone(w)), native_conv(z.real, w))


def test_inference_mode() -> None:
    tensors = tensors_2d()
    with torch.inference_mode():
        y = tft.conv2d_relu(*tensors)
        single = tft.conv2d_relu(tensors[0][0], *tensors[1:])
    assert y.is_inference() and torch.equal(y, tft.conv2d_relu(*tensors).detach())
    assert torch.equal(single, y[0])


OURS_AND_NATIVE = pytest.mark.parametrize(
    "op", [tft.conv2d_relu, native_conv], ids=["ours", "native"]
)


@OURS_AND_NATIVE
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("changed", ["output", "input", "weight"])
def test_changing_what_backward_needs_is_an_error(op: Any, changed: str, batched: bool) -> None:
    x, w, b = tensors_2d()
    x = x if batched else x.detach()[0].requires_grad_()
    y = op(x, w, b)
    with torch.no_grad():
        {"output": y, "input": x, "weight": w}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@OURS_AND_NATIVE
def test_a_changed_bias_is_none(op: Any) -> None:
    x, w, b = tensors_2d()
    y = op(x, w, b)
    with torch.no_grad():
        b.add_(1)
    y.sum().backward()
    assert b.grad is not None


def test_only_what_backward_needs_is_saved() -> None:
    def saved(op: Any, *tensors: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Any) -> Any:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            op(*tensors)
        return sorted(shapes)

    x, w, b = tensors_2d()
    for tensors in ((x, w, b), (x.detach(), w, b), (x, w.detach(), b)):
        assert saved(tft.conv2d_relu, *tensors) == saved(native_conv, *tensors)


def test_errors_of_hooks_pass_through() -> None:
    def refuse(tensor: Any) -> Any:
        raise RuntimeError("no memory for saved tensors")

    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        pytest.raises(RuntimeError, match=r"^no memory for saved tensors$"),
    ):
        tft.conv2d_relu(*tensors_2d())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = tensors_2d()
    y = checkpoint(tft.conv2d_relu, *tensors, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    expected = torch.autograd.grad(native_conv(*tensors).pow(2).sum(), tensors)
    assert_same([t.grad for t in tensors], list(expected))


def test_explain() -> None:
    x, w, b = tensors_2d()
    forward, backward = twinfuse.explain(tft.conv2d_relu, x, w, bias=b, padding="same")
    assert (forward.op, forward.backend) == ("conv2d_relu", "cpu")
    assert forward.kernel in twinfuse.launches() and "conv_relu_forward" in forward.kernel
    assert (backward.op, backward.backend) == ("conv2d_relu_backward", "cpu")
    assert backward.kernel in twinfuse.launches() and "conv_relu_backward" in backward.kernel
    with torch.no_grad():
        assert len(twinfuse.explain(tft.conv2d_relu, x, w)) == 1
    (row,) = twinfuse.explain(tft.conv1d_relu, x[0].detach().int(), w[0].detach().int())
    assert row.op == "conv1d_relu" and row.backend == "reference" and "int32" in row.reason
    (row,) = twinfuse.explain(tft.conv2d_relu, x.detach(), w.detach(), groups=2)
    assert "channels" in row.reason


def test_padding_of_the_operator() -> None:
    """One number, one per dimension, or first all below and then all above."""
    x, w = random(2, 3, 5, 6), random(4, 3, 3, 2)
    op = torch.ops.twinfuse.conv2d_relu
    assert_same(op(x, w, None, 1, 1), native_conv(x, w, padding=1))
    assert_same(op(x, w, None, [1], [2, 1]), native_conv(x, w, padding=(2, 1)))
    assert_same(op(x, w, None, 1, [2, 0, 1, 3]), native_conv(F.pad(x, (0, 3, 2, 1)), w))
    signal, filters = random(2, 3, 9), random(4, 3, 4)
    got = torch.ops.twinfuse.conv1d_relu(signal, filters, None, 1, [3, 0])
    assert_same(got, native_conv(F.pad(signal, (3, 0)), filters))
