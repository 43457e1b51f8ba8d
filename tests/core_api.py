"""The core's C API as tests call it: through ctypes, on numpy arrays, without a framework.

Everything a binding lends is made hostile here: outputs start as NaN between canaries, scratch is
misaligned and dirty, and tasks run in any order on any number of threads.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from tests.arrays import STORAGE, Array, Operand, encode, lay_out
from tests.conftest import skip
from tests.conv_case import ConvCase
from tests.mxcsr import mxcsr
from tests.problem import OPERANDS, Case, Problem
from twinfuse import _core

OK, INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY = range(4)
RELU_GRADS = {"select": 0, "multiply": 1}
GUARD = 64  # canary elements on each side of an output
SCRATCH_GUARD = 1 << 17  # bytes on each side of scratch: what is too small is so by rows
CANARY = 0xA5
OPAQUE = 0x0DD

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class CTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    ]


class CContext(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("precision", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("thread_work", ctypes.c_int64),
        ("parallel_for", PARALLEL_FOR),
        ("allocate", ALLOCATE),
        ("opaque", ctypes.c_void_p),
    ]


class CConv(ctypes.Structure):
    _fields_ = [
        ("stride", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        ("padding_low", ctypes.c_int64 * 2),
        ("padding_high", ctypes.c_int64 * 2),
        ("groups", ctypes.c_int64),
    ]


# What each op takes between its tensors and the rest.
SETTINGS: dict[str, list[type]] = {"linear_relu": [], "conv_relu": [ctypes.POINTER(CConv)]}


def load() -> ctypes.CDLL:
    library, reason = _core.load()
    if library is None:
        skip("core", reason)
    tensor, context = ctypes.POINTER(CTensor), ctypes.POINTER(CContext)
    for op, settings in SETTINGS.items():
        getattr(library, f"twinfuse_{op}_forward").argtypes = [tensor] * 4 + settings + [context]
        backward = getattr(library, f"twinfuse_{op}_backward")
        backward.argtypes = [tensor] * 7 + settings + [ctypes.c_int32, context]
    library.twinfuse_conv_output_size.argtypes = [ctypes.c_int64] * 6
    library.twinfuse_conv_output_size.restype = ctypes.c_int64
    return library


def settings(case: Case) -> list[CConv]:
    """The arguments of `SETTINGS` for a case; what is behind the last dimension is garbage."""
    if not isinstance(case, ConvCase):
        return []

    def each(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * 2)(*[*values, -(1 << 62)][:2])

    low, high = zip(*case.padding, strict=True)
    return [CConv(each(case.stride), each(case.dilation), each(low), each(high), case.groups)]


def last_error() -> str:
    return load().twinfuse_last_error().decode()


def tensor(
    address: int | None, dtype: str | int, sizes: Iterable[int], strides: Iterable[int]
) -> CTensor:
    sizes, strides = list(sizes), list(strides)
    number = _core.DTYPES[dtype] if isinstance(dtype, str) else dtype
    longs = ctypes.c_int64 * len(sizes)
    return CTensor(address, number, len(sizes), longs(*sizes), longs(*strides))


def operand_tensor(operand: Operand, dtype: str) -> CTensor:
    address = operand.base.ctypes.data + operand.offset * operand.base.itemsize
    return tensor(address, dtype, operand.sizes, operand.strides)


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


def guarded_problem(problem: Problem, at_end: bool) -> Problem:
    """`problem` with all its operands guarded."""
    named = {name: getattr(problem, name) for name in OPERANDS}
    return replace(problem, **{name: guarded(a, at_end) for name, a in named.items() if a})


@dataclass
class Lender:
    """A framework's side of one call.

    `order` is how `parallel_for` runs the tasks: "serial" (no callback at all), "forward",
    "reversed", "random", or "threads" (`num_threads` of them, started for the call).
    """

    order: str = "serial"
    num_threads: int = 1
    thread_work: int = 0
    device: int = 0
    fail_allocation: int = -1  # index of the allocation that returns NULL
    mxcsr: int | None = None  # set in every worker thread before its tasks
    scratch: list[tuple[Array, int, int]] = field(default_factory=list)  # buffer, start, size
    tasks: int = 0
    errors: list[str] = field(default_factory=list)

    def context(self) -> CContext:
        run = PARALLEL_FOR() if self.order == "serial" else PARALLEL_FOR(self._parallel_for)
        return CContext(
            self.device,
            *(0, None, 0),  # all of a GPU
            self.num_threads,
            self.thread_work,
            run,
            ALLOCATE(self._allocate),
            OPAQUE,
        )

    def _allocate(self, opaque: int, size: int) -> int | None:
        if opaque != OPAQUE:
            self.errors.append(f"allocate: opaque is {opaque:#x}")
        if len(self.scratch) == self.fail_allocation or size > 1 << 33:
            return None
        # 0xFF bytes are NaN in every dtype: scratch that is read before it is written shows.
        buffer = np.full(size + 2 * SCRATCH_GUARD + 8, 0xFF, np.uint8)
        start = SCRATCH_GUARD + 1 + (-(buffer.ctypes.data + SCRATCH_GUARD) % 8)
        buffer[:start] = CANARY
        buffer[start + size :] = CANARY
        self.scratch.append((buffer, start, size))
        return buffer.ctypes.data + start

    def _parallel_for(self, opaque: int, count: int, task: int, argument: int) -> None:
        if opaque != OPAQUE or count < 0:
            self.errors.append(f"parallel_for: opaque {opaque:#x}, count {count}")
        function = TASK(task)
        indices = list(range(count))
        if self.order == "reversed":
            indices.reverse()
        elif self.order == "random":
            random.Random(count).shuffle(indices)
        self.tasks += count
        if self.order != "threads":
            for index in indices:
                function(argument, index)
            return

        def work(share: list[int]) -> None:
            if self.mxcsr is None:
                for index in share:
                    function(argument, index)
                return
            with mxcsr(self.mxcsr) as left:
                for index in share:
                    function(argument, index)
            if left() != self.mxcsr:
                self.errors.append(f"MXCSR of a worker: {left():#x} after, {self.mxcsr:#x} before")

        shares = [indices[i :: self.num_threads] for i in range(self.num_threads)]
        workers = [threading.Thread(target=work, args=(share,)) for share in shares]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def check(self) -> None:
        """Assert that scratch was kept to and nothing went wrong inside a callback."""
        assert not self.errors, self.errors
        for buffer, start, size in self.scratch:
            outside = np.concatenate([buffer[:start], buffer[start + size :]])
            assert (outside == CANARY).all(), f"a write outside the scratch of {size} bytes"


@dataclass
class Output:
    """A NaN-poisoned output between canaries; gaps between strided elements are canaries too."""

    operand: Operand
    dtype: str

    @classmethod
    def poisoned(cls, sizes: tuple[int, ...], dtype: str, layout: str = "contiguous") -> Output:
        laid = lay_out(np.full(sizes, np.nan), layout, dtype)
        base = np.full(laid.base.nbytes + 2 * GUARD * laid.base.itemsize, CANARY, np.uint8)
        operand = Operand(base.view(STORAGE[dtype]), sizes, laid.strides, laid.offset + GUARD)
        operand.view[...] = encode(np.nan, dtype)
        return cls(operand, dtype)

    @property
    def tensor(self) -> CTensor:
        return operand_tensor(self.operand, self.dtype)

    def read(self, what: str) -> Array:
        """The result, after checking that nothing around it was written."""
        result = self.operand.contiguous.copy()
        kept = self.operand.base.copy()
        width = kept.itemsize
        Operand(kept, self.operand.sizes, self.operand.strides, self.operand.offset).view[...] = (
            np.frombuffer(bytes([CANARY] * width), kept.dtype)[0]
        )
        assert (kept.view(np.uint8) == CANARY).all(), f"{what}: a write outside the output"
        return result


class CallFailed(AssertionError):
    """A call that a test expects to succeed gave another status."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"{what}: status {status}, {last_error()}")
        self.status = status


MakeOutput = Callable[[tuple[int, ...], str, str], Output]


def forward(
    problem: Problem,
    lender: Lender | None = None,
    output_layout: str = "contiguous",
    make_output: MakeOutput = Output.poisoned,
) -> Array:
    """Output of the core for `problem`, in storage dtype."""
    lender = lender or Lender()
    case, dtype = problem.case, problem.dtype
    output = make_output(case.output_sizes, dtype, output_layout)
    bias = None if problem.bias is None else operand_tensor(problem.bias, dtype)
    status = getattr(load(), f"twinfuse_{case.op}_forward")(
        output.tensor,
        operand_tensor(problem.input, dtype),
        operand_tensor(problem.weight, dtype),
        bias,
        *settings(case),
        lender.context(),
    )
    if status != OK:
        raise CallFailed(status, f"{case.id} {dtype}")
    lender.check()
    return output.read(f"{case.id} {dtype} output")


GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


def backward(
    problem: Problem,
    output: Array,
    relu_grad: str = "select",
    lender: Lender | None = None,
    output_layout: str = "contiguous",
    wanted: tuple[str, ...] = GRADIENTS,
    make_output: MakeOutput = Output.poisoned,
    grad_layout: str | None = None,
) -> dict[str, Array]:
    """Gradients of the core, by name; `output` and, if not told else, they have `output_layout`."""
    lender = lender or Lender()
    case, dtype = problem.case, problem.dtype
    sizes = (case.input_sizes, case.weight_sizes, case.weight_sizes[:1])
    grads = {
        name: make_output(size, dtype, grad_layout or output_layout)
        for name, size in zip(GRADIENTS, sizes, strict=True)
        if name in wanted
    }
    saved = make_output(case.output_sizes, dtype, output_layout)
    saved.operand.view[...] = output
    status = getattr(load(), f"twinfuse_{case.op}_backward")(
        *(grads[name].tensor if name in grads else None for name in GRADIENTS),
        operand_tensor(problem.grad_output, dtype),
        saved.tensor,
        # What no gradient asked for reads is not lent.
        operand_tensor(problem.input, dtype) if "grad_weight" in wanted else None,
        operand_tensor(problem.weight, dtype) if "grad_input" in wanted else None,
        *settings(case),
        RELU_GRADS[relu_grad],
        lender.context(),
    )
    if status != OK:
        raise CallFailed(status, f"{case.id} {dtype}")
    lender.check()
    return {name: grad.read(f"{case.id} {dtype} {name}") for name, grad in grads.items()}


def kernel(role: str, dtype: str) -> str:
    """Name of the CPU kernel that `role` takes for `dtype`."""
    name = load().twinfuse_find_kernel(role.encode(), _core.DTYPES[dtype], 0)
    assert name is not None, last_error()
    return name.decode()
