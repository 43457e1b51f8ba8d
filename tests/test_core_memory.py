"""What the core reads and writes: guard pages, huge strides, scratch, and many callers at once."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import threading

import numpy as np
import pytest

from tests.cases import (
    CASES,
    DTYPES,
    STORAGE,
    LinearCase,
    Operand,
    Problem,
    build,
    encode,
)
from tests.conftest import skip
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
    last_error,
    load,
    operand_tensor,
    tensor,
)
from tests.rule import assert_same_bits
from twinfuse import _core

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
BY_ID = {case.id: case for case in CASES}

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def guarded(operand: Operand, at_end: bool) -> Operand:
    """A copy of `operand` whose last (or first) element touches a page that may not be accessed."""
    width = operand.base.itemsize
    reach = sum(
        (size - 1) * stride for size, stride in zip(operand.sizes, operand.strides, strict=True)
    )
    extent = reach + 1 if 0 not in operand.sizes else 0
    pages = -(-max(extent * width, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (address, address + (pages + 1) * mmap.PAGESIZE):
        result = protect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert result == 0, os.strerror(ctypes.get_errno())
    start = mmap.PAGESIZE + (pages * mmap.PAGESIZE - extent * width if at_end else 0)
    base = np.frombuffer(memory, operand.base.dtype, extent, start)
    base[...] = operand.base[operand.offset : operand.offset + extent]
    return Operand(base, operand.sizes, operand.strides, 0)


@dataclasses.dataclass
class PlainOutput(Output):
    """An output that is guarded by something else than canaries."""

    def read(self, what: str) -> np.ndarray:
        return self.operand.contiguous.copy()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_dtype
@every_case
def test_no_access_outside_any_tensor(case: LinearCase, dtype: str, at_end: bool) -> None:
    """An access one element beyond a tensor ends the process."""

    def make_output(sizes: tuple[int, ...], dtype: str, layout: str) -> Output:
        operand = Output.poisoned(sizes, dtype, layout).operand
        return PlainOutput(guarded(operand, at_end), dtype)

    problem = build(case, dtype)
    tight = dataclasses.replace(
        problem,
        input=guarded(problem.input, at_end),
        weight=guarded(problem.weight, at_end),
        bias=guarded(problem.bias, at_end) if problem.bias else None,
        grad_output=guarded(problem.grad_output, at_end),
    )
    output = forward(problem)
    assert_same_bits(forward(tight, make_output=make_output), output, "output")
    grads = backward(problem, output)
    got = backward(tight, output, make_output=make_output)
    for name in GRADIENTS:
        assert_same_bits(got[name], grads[name], name)


def sparse(size: int) -> mmap.mmap:
    """Address space without memory behind it until it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        return mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        skip("sparse memory", f"{size >> 30} GiB of address space are refused: {error}")
        raise


@every_dtype
@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "columns"])
def test_strides_beyond_32_bits(dimension: int, dtype: str) -> None:
    """Neighbours in one dimension lie 2^33 bytes apart, in inputs and outputs alike."""
    case = LinearCase("far", (5,), 4, 3) if dimension == 0 else LinearCase("far", (3,), 4, 5)
    problem = build(case, dtype)
    memory = sparse(5 << 33)
    base = np.frombuffer(memory, STORAGE[dtype])
    far = (1 << 33) // base.itemsize
    used = 0

    def spread(sizes: tuple[int, ...]) -> Operand:
        nonlocal used
        strides = (far, 1) if dimension == 0 else (1, far)
        operand = Operand(base, sizes, strides[-len(sizes) :] if len(sizes) > 1 else (far,), used)
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
    wide = Problem(
        case,
        dtype,
        moved(problem.input),
        moved(problem.weight),
        moved(problem.bias),
        moved(problem.grad_output),
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


FAILING = ("odd_everywhere", "row_keras_weight", "several_blocks", "all_transposed", "grad_of_sum")


@every_dtype
@pytest.mark.parametrize("name", FAILING)
def test_a_failing_allocator_gives_a_status(name: str, dtype: str) -> None:
    """Each allocation of the call fails once; a call that makes none succeeds."""
    problem = build(BY_ID[name], dtype)
    output = forward(problem)
    backward(problem, output)
    for role in ("forward", "backward"):
        for failing in range(16):
            lender = Lender("forward", 2, fail_allocation=failing)
            launches = _core.launches()
            try:
                if role == "forward":
                    forward(problem, lender)
                else:
                    backward(problem, output, lender=lender)
            except CallFailed as failed:
                assert failed.status == OUT_OF_MEMORY, failed
                assert last_error().startswith("linear_relu"), last_error()
                assert _core.launches() == launches, "a kernel that never ran was counted"
                lender.check()
            else:
                assert len(lender.scratch) <= failing, "an allocation failed and nobody noticed"
                break
        else:
            raise AssertionError(f"{role} makes more than 16 allocations")


@every_dtype
def test_a_packed_problem_takes_scratch_from_the_framework(dtype: str) -> None:
    """Without this, the test above could pass without one failing allocation."""
    lender = Lender("forward", 2)
    problem = build(BY_ID["odd_everywhere"], dtype)
    output = forward(problem, lender)
    backward(problem, output, lender=lender)
    assert lender.scratch


def test_16_threads_call_at_once() -> None:
    """Different cases and dtypes, good calls and bad ones, each thread with its own error text."""
    names = ("row_keras_weight", "seven_rows", "several_blocks", "weight_keras", "denormal")
    problems = [build(BY_ID[name], dtype) for name in names for dtype in DTYPES]
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


def test_bias_may_not_be_read_when_it_is_absent() -> None:
    """A NULL bias and one of zeros give the same bits."""
    problem = build(BY_ID["odd_everywhere"], "float32")
    zeros = Operand(np.zeros(problem.case.n, np.float32), (problem.case.n,), (1,), 0)
    with_zeros = dataclasses.replace(problem, bias=zeros)
    assert problem.bias is None and operand_tensor(zeros, "float32").data
    assert_same_bits(forward(problem), forward(with_zeros), "output")


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
