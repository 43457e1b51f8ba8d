"""What the core reads and writes: guard pages, huge strides, scratch, and many callers at once."""

from __future__ import annotations

import dataclasses
import mmap
import re
import threading

import numpy as np
import pytest

from tests.arrays import DTYPES, STORAGE, Operand, encode, lay_out
from tests.cases import LinearCase
from tests.conftest import skip
from tests.conv_case import ConvCase
from tests.core_api import (
    GRADIENTS,
    OK,
    OUT_OF_MEMORY,
    CallFailed,
    CContext,
    Lender,
    Output,
    backward,
    forward,
    guarded,
    guarded_problem,
    last_error,
    load,
    operand_tensor,
    tensor,
)
from tests.core_cases import BY_ID, every_case, every_dtype, parametrize
from tests.problem import OPERANDS, Case, build
from tests.rule import assert_same_bits
from twinfuse import _core

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclasses.dataclass
class PlainOutput(Output):
    """An output that is guarded by something else than canaries."""

    def read(self, what: str) -> np.ndarray:
        return self.operand.contiguous.copy()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_dtype
@every_case
def test_no_access_outside_any_tensor(case: Case, layout: str, dtype: str, at_end: bool) -> None:
    """An access one element beyond a tensor ends the process."""

    def make_output(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        operand = Output.poisoned(sizes, dtype, layout).operand
        return PlainOutput(guarded(operand, at_end), dtype)

    problem = build(case, dtype)
    tight = guarded_problem(problem, at_end)
    output = forward(problem, output_layout=layout)
    got = forward(tight, output_layout=layout, make_output=make_output)
    assert_same_bits(got, output, "output")
    grads = backward(problem, output, output_layout=layout)
    tight_grads = backward(tight, output, output_layout=layout, make_output=make_output)
    for name in GRADIENTS:
        assert_same_bits(tight_grads[name], grads[name], name)


def sparse(size: int) -> mmap.mmap:
    """Address space without memory behind it until it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        return mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        skip("sparse memory", f"{size >> 30} GiB of address space are refused: {error}")
        raise


FAR = [
    (LinearCase("far", (5,), 4, 3), 0),
    (LinearCase("far", (3,), 4, 5), 1),
    *(
        (ConvCase("far", 2, 3, (4, 5), 4, (3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1)), dimension)
        for dimension in range(4)
    ),
]


@every_dtype
@pytest.mark.parametrize(("case", "dimension"), FAR, ids=[f"{c.op}-{d}" for c, d in FAR])
def test_strides_beyond_32_bits(case: Case, dimension: int, dtype: str) -> None:
    """Neighbours in one dimension lie 2^33 bytes apart, in inputs and outputs alike."""
    problem = build(case, dtype)
    memory = sparse(5 << 33)
    base = np.frombuffer(memory, STORAGE[dtype])
    far = (1 << 33) // base.itemsize
    used = 0

    def spread(sizes: tuple[int, ...]) -> Operand:
        nonlocal used
        strides = list(lay_out(np.zeros(sizes), "contiguous", dtype).strides)
        strides[dimension if len(sizes) > 1 else 0] = far
        operand = Operand(base, sizes, tuple(strides), used)
        used += 4096  # each operand in pages of its own
        return operand

    def moved(operand: Operand) -> Operand:
        copy = spread(operand.sizes)
        copy.view[...] = operand.view
        return copy

    def make_output(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        operand = spread(sizes)
        operand.view[...] = encode(np.nan, dtype)
        return PlainOutput(operand, dtype)

    assert problem.bias is not None
    wide = dataclasses.replace(
        problem, **{name: moved(getattr(problem, name)) for name in OPERANDS}
    )
    output = forward(problem)
    assert_same_bits(forward(wide, make_output=make_output), output, "output")
    grads = backward(problem, output)
    got = backward(wide, output, make_output=make_output)
    for name in GRADIENTS:
        assert_same_bits(got[name], grads[name], name)


@every_dtype
@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1 << 33, 3, 0), (0, 1 << 33, 5), (0, 3, 1 << 33)], ids=["m", "k", "n"]
)
def test_sizes_beyond_32_bits_of_an_empty_output(rows: int, k: int, n: int, dtype: str) -> None:
    library, context = load(), Lender().context()
    some = np.zeros(64, STORAGE[dtype]).ctypes.data
    status = library.twinfuse_linear_relu_forward(
        tensor(some, dtype, (rows, n), (0, 0)),
        tensor(some, dtype, (rows, k), (0, 0)),
        tensor(some, dtype, (n, k), (0, 0)),
        tensor(some, dtype, (n,), (0,)),
        context,
    )
    assert status == OK, last_error()


@every_dtype
def test_a_view_of_2_to_60_elements_with_an_empty_output(dtype: str) -> None:
    """Broadcast dimensions that no single row stride describes; their bytes overflow 64 bits."""
    some = np.zeros(64, STORAGE[dtype]).ctypes.data
    leading = (1 << 30, 3, 1 << 30)
    status = load().twinfuse_linear_relu_forward(
        tensor(some, dtype, (*leading, 0), (0, 1, 0, 1)),
        tensor(some, dtype, (*leading, 2), (0, 1, 0, 1)),
        tensor(some, dtype, (0, 2), (2, 1)),
        None,
        Lender().context(),
    )
    assert status in (OK, OUT_OF_MEMORY), last_error()


FAILING = parametrize(
    [
        *(f"linear_relu {name}" for name in ("odd_everywhere", "row_keras_weight", "grad_of_sum")),
        *(f"linear_relu {name}" for name in ("several_blocks", "all_transposed")),
        *(f"conv_relu {name}" for name in ("stem", "several_blocks", "depthwise", "1d")),
        *(f"conv_relu {name}" for name in ("many_pixels", "groups", "input_nhwc_strided")),
        *(f"conv_relu {name}" for name in ("several_blocks_of_filters", "pointwise_stride")),
    ]
)


@every_dtype
@FAILING
def test_a_failing_allocator_gives_a_status(case: Case, layout: str, dtype: str) -> None:
    """Each allocation of the call fails once; a call that makes none succeeds."""
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    backward(problem, output, output_layout=layout)
    for role in ("forward", "backward"):
        for failing in range(16):
            lender = Lender("forward", 2, fail_allocation=failing)
            launches = _core.launches()
            try:
                if role == "forward":
                    forward(problem, lender, layout)
                else:
                    backward(problem, output, lender=lender, output_layout=layout)
            except CallFailed as failed:
                assert failed.status == OUT_OF_MEMORY, failed
                assert re.match(r"(linear|conv\dd)_relu: .*memory", last_error()), last_error()
                assert _core.launches() == launches, "a kernel that never ran was counted"
                lender.check()
            else:
                assert len(lender.scratch) <= failing, "an allocation failed and nobody noticed"
                break
        else:
            raise AssertionError(f"{role} makes more than 16 allocations")


@every_dtype
@parametrize(["linear_relu odd_everywhere", "conv_relu several_blocks"])
def test_a_packed_problem_takes_scratch_from_the_framework(
    case: Case, layout: str, dtype: str
) -> None:
    """Without this, the test above could pass without one failing allocation."""
    lender = Lender("forward", 2)
    problem = build(case, dtype)
    output = forward(problem, lender, layout)
    backward(problem, output, lender=lender, output_layout=layout)
    assert lender.scratch


def test_16_threads_call_at_once() -> None:
    """Different cases and dtypes, good calls and bad ones, each thread with its own error text."""
    names = ("row_keras_weight", "seven_rows", "several_blocks", "weight_keras", "denormal")
    cases = [BY_ID[f"linear_relu {name}"] for name in names]
    cases += [BY_ID[f"conv_relu {name}"] for name in ("stem", "groups_nhwc", "1d", "denormal")]
    problems = [build(case, dtype) for case in cases for dtype in DTYPES]
    expected = []
    for problem in problems:
        output = forward(problem)
        expected.append((output, backward(problem, output)))
    before = sum(_core.launches().values())
    failures: list[BaseException] = []
    start = threading.Barrier(16)

    def work(seed: int) -> None:
        try:
            start.wait()
            for step in range(10):
                index = (seed * 7 + step) % len(problems)
                problem, (output, grads) = problems[index], expected[index]
                what = f"thread {seed}, {problem.case.id} {problem.dtype}"
                assert_same_bits(forward(problem, Lender("threads", 2)), output, what)
                refuse(width=100 + seed)
                for name, got in backward(problem, output, lender=Lender("reversed", 2)).items():
                    assert_same_bits(got, grads[name], f"{what} {name}")
                assert f"[3, {100 + seed}]" in last_error(), last_error()
        except BaseException as error:
            failures.append(error)

    def refuse(width: int) -> None:
        some = np.zeros(512, np.float32).ctypes.data
        context: CContext = Lender().context()
        status = load().twinfuse_linear_relu_forward(
            tensor(some, "float32", (1, 3), (3, 1)),
            tensor(some, "float32", (1, 7), (7, 1)),
            tensor(some, "float32", (3, width), (width, 1)),
            None,
            context,
        )
        assert status != OK

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert sum(_core.launches().values()) - before == 16 * 10 * 2


@parametrize(["linear_relu odd_everywhere", "conv_relu three_by_three_no_bias"])
def test_bias_may_not_be_read_when_it_is_absent(case: Case, layout: str) -> None:
    """A NULL bias and one of zeros give the same bits."""
    problem = build(case, "float32")
    zeros = lay_out(np.zeros(case.weight_sizes[0]), "contiguous", "float32")
    with_zeros = dataclasses.replace(problem, bias=zeros)
    assert problem.bias is None and operand_tensor(zeros, "float32").data
    without = forward(problem, output_layout=layout)
    assert_same_bits(without, forward(with_zeros, output_layout=layout), "output")


@pytest.mark.parametrize("k", [3, 4, 8])
def test_gradients_of_no_rows_are_zero_whatever_the_layout(k: int) -> None:
    n = 9600  # too many sums for the scratch on the stack
    lender = Lender()
    grad_weight, grad_bias = np.full((k, n), np.nan, "f"), np.full(n, np.nan, "f")
    no_rows = tensor(None, "float32", (0, n), (n, 1))
    status = load().twinfuse_linear_relu_backward(
        None,
        tensor(grad_weight.ctypes.data, "float32", (n, k), (1, n)),
        tensor(grad_bias.ctypes.data, "float32", (n,), (1,)),
        no_rows,
        no_rows,
        tensor(None, "float32", (0, k), (k, 1)),
        None,
        0,
        lender.context(),
    )
    assert status == OK, last_error()
    assert (grad_bias == 0).all() and (grad_weight == 0).all()
