"""The kernels of csrc/cuda/lstm.cu on the CPU (cuda_lstm.cc), and calls of them as the host makes.

    kernel = kernels()["lstm_forward_bf16_256"]
    results = forward(kernel, recurrence, Way(slice=3))    # of tests.gpu.lstm_recurrence

Results are in storage dtype, as `tests.core_lstm_api` has them.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.arrays import Array, Operand, lay_out
from tests.conftest import skip
from tests.core_api import Output
from tests.core_lstm_api import ACTIVATIONS, laid, row_count
from tests.gpu.lstm_recurrence import Recurrence
from tests.gpu.lstm_structs import (
    CBackward,
    CFacts,
    CForward,
    CSequence,
    CShared,
    CState,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "cuda_lstm"
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Kernels read elements as words of 16 bytes.
FLAGS += ["-fno-strict-aliasing", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SLOTS = 4  # kExchangeSlots
BLOCK, CLUSTER, GRID = range(3)  # LstmReach
BUGS = ("none", "no fence", "no block_sync", "no emptying", "no wait")  # as cuda_fibers.h has them
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32", "tf32x3": "float32"}


def _names() -> list[str]:
    """Of all kernels, without compiling them."""
    found = []
    text = (ROOT / "csrc" / "cuda" / "lstm_kernels.h").read_text()
    for bits, formats in ((16, ("bf16", "fp16")), (32, ("tf32", "tf32x3"))):
        steps, listed = (
            text.split(f"#define TWINFUSE_LSTM_{name}(")[1].split("#define")[0]
            for name in ("STEPS", bits)
        )
        for direction, units in re.findall(r"[FC]\(lstm_(\w+)_##format##_(\w+),", listed + steps):
            # In three products of TF32 nothing runs in clusters.
            some = [format for format in formats if "cluster" not in units or format != "tf32x3"]
            found += [f"lstm_{direction}_{format}_{units}" for format in some]
    return found


NAMES = _names()


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the numbers of its shape; `slice` is the most sequences of one, and `kept`
    what waits of a cell for the next launch."""

    name: str
    threads: int
    units: int
    width: int
    chunk: int
    slice: int
    depth: int
    reach: int
    kept: int
    arguments: int

    @property
    def format(self) -> str:
        return self.name.split("_")[2]

    @property
    def dtype(self) -> str:
        return DTYPES[self.format]

    @property
    def backward(self) -> bool:
        return self.name.startswith("lstm_backward")

    @property
    def alone(self) -> bool:
        """One block has all units of its sequences."""
        return self.reach == BLOCK

    @property
    def cluster(self) -> int:
        """Blocks that run at the same time since they write into each other's memory."""
        return self.width // self.units if self.reach == CLUSTER else 1

    @property
    def in_memory(self) -> bool:
        """Blocks hand over what steps leave by way of the device's memory."""
        return self.reach == GRID

    @property
    def of_steps(self) -> bool:
        """Launched once for each step."""
        return self.name.endswith("step")


@dataclass(frozen=True)
class Way:
    """How a call is launched: sequences of a slice (0: as many as may be), where launches begin
    besides at the first sequence, how outputs lie, and whether gates take the place of inputs."""

    slice: int = 0
    starts: tuple[int, ...] = ()
    layout: str = "contiguous"
    saved_layout: str = "contiguous"
    in_place: bool = False
    seed: int = 0


def build() -> Path:
    """The library, compiled where it is not yet."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        skip("compiler", f"there is no {compiler[0]}")
    flags = FLAGS + (SANITIZE if "ASAN_OPTIONS" in os.environ else ["-O2"])
    command = [*compiler, *flags, "-x", "c++", str(HERE / "cuda_lstm.cc")]
    key = hashlib.sha256(" ".join(command).encode())
    for source in sorted([*HERE.glob("cuda_*.[ch]*"), *(ROOT / "csrc" / "cuda").iterdir()]):
        key.update(source.read_bytes())
    path = FOLDER / f"libcuda_lstm-{key.hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        # It takes all of a core for a while.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        # The sanitizer is loaded into this process, and is not meant for the compiler.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            made = Path(temporary) / path.name
            subprocess.run([*command, "-o", str(made)], check=True, env=environment)
            made.replace(path)
    return path


@functools.cache
def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    library.lstm_facts.restype = ctypes.POINTER(CFacts)
    library.run_lstm.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_int,
        ctypes.c_char_p, ctypes.c_int,
    ]  # fmt: skip
    return library


@functools.cache
def kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    while facts := load().lstm_facts(len(found)):
        numbers = {name: getattr(facts.contents, name) for name, _ in CFacts._fields_[1:]}
        name = facts.contents.name.decode()
        found[name] = kernel = Kernel(name, **numbers)
        assert kernel.arguments == ctypes.sizeof(CBackward if kernel.backward else CForward)
    assert sorted(found) == sorted(NAMES)
    return found


def named(direction: str, format: str, units: int | str) -> Kernel:
    return kernels()[f"lstm_{direction}_{format}_{units}"]


class KernelFailed(Exception):
    """A launch did not end as it should."""


def run(
    kernel: str,
    arguments: Any,
    blocks: int = 1,
    cluster: int = 1,
    seed: int = 0,
    bug: str = "none",
) -> None:
    message = ctypes.create_string_buffer(256)
    address = ctypes.addressof(arguments)
    number, size = BUGS.index(bug), len(message)
    if load().run_lstm(kernel.encode(), address, blocks, cluster, seed, number, message, size):
        raise KernelFailed(message.value.decode())


def copied(array: Array, layout: str, dtype: str) -> Operand:
    operand = lay_out(np.zeros(array.shape), layout, dtype)
    operand.view[...] = array
    return operand


def _address(array: Array, offset: int = 0) -> int:
    return array.ctypes.data + offset * array.itemsize


def _data(operand: Operand | None) -> int | None:
    return None if operand is None else _address(operand.base, operand.offset)


def _state(operand: Operand | None) -> CState:
    return CState() if operand is None else CState(_data(operand), *operand.strides)


def _sequence(operand: Operand | None) -> CSequence:
    if operand is None:
        return CSequence()
    garbage = 1 << 40  # packed rows have no steps
    strides = operand.strides if len(operand.strides) == 3 else (garbage, *operand.strides)
    return CSequence(_data(operand), *strides)


class _Call:
    """The arguments that both passes share, and the memory that they point to."""

    def __init__(self, kernel: Kernel, problem: Recurrence, way: Way, bug: str) -> None:
        self.kernel, self.problem, self.way, self.bug = kernel, problem, way, bug
        case = problem.case
        assert case.units <= kernel.width
        self.slice = min(way.slice or kernel.slice, case.batch, kernel.slice)
        self.blocks = kernel.cluster if kernel.reach == CLUSTER else -(-case.units // kernel.units)
        assert self.blocks == 1 or not kernel.alone
        self.outputs: dict[str, Output] = {}
        hh = problem.operands["weight_hh"]
        self.shared = CShared(
            steps=case.steps, batch=case.batch, units=case.units, slice=self.slice,
            blocks=self.blocks, cell_activation=ACTIVATIONS[case.activation],
            gate_activation=ACTIVATIONS[case.recurrent_activation], reverse=case.reverse,
            batch_major=case.batch_first, hh=_data(hh), hh_row=hh.strides[0], hh_col=hh.strides[1],
            zoneout_hidden=_sequence(problem.operands.get("zoneout_hidden")),
            zoneout_cell=_sequence(problem.operands.get("zoneout_cell")),
        )  # fmt: skip
        if problem.mask is not None:
            # Whatever is not zero counts as one.
            numbers = 1 + np.arange(problem.mask.size).reshape(problem.mask.shape) % 255
            self.mask = np.where(problem.mask, numbers, 0).astype(np.uint8)
            self.shared.mask = _address(self.mask)
            self.shared.mask_step, self.shared.mask_batch = self.mask.strides
            self.shared.zero_masked_output = case.zero_masked_output
        if problem.batch_sizes is not None:
            self.offsets = np.append(0, np.cumsum(problem.batch_sizes)).astype(np.int32)
            self.shared.offsets = _address(self.offsets)

    def output(self, name: str, sizes: tuple[int, ...], layout: str) -> Operand:
        self.outputs[name] = Output.poisoned(sizes, self.problem.dtype, layout)
        return self.outputs[name].operand

    def saved(self, name: str, width: int) -> Operand:
        return self.output(name, (row_count(self.problem.case), width), self.way.saved_layout)

    def run(self, arguments: Any, slices: int) -> None:
        kernel, blocks = self.kernel, slices * self.blocks
        run(kernel.name, arguments, blocks, kernel.cluster, self.way.seed, self.bug)

    def launch_steps(self, arguments: Any) -> None:
        kernel, case = self.kernel, self.problem.case
        sizes = (case.batch, case.units)
        carried = Output.poisoned((kernel.kept, *sizes), "float32")
        exchange = Output.poisoned((2, *sizes), self.problem.dtype)
        self.shared.count, slices = case.batch, -(-case.batch // self.slice)
        self.shared.carried = _data(carried.operand)
        if not kernel.backward:
            self.shared.exchange = _data(exchange.operand)
        behind = kernel.backward and bool(arguments.grad_initial_h.data)
        for self.shared.step in range(case.steps + behind):
            arguments.shared = self.shared
            self.run(arguments, slices)
        carried.read(f"{kernel.name} carried")
        exchange.read(f"{kernel.name} exchange")

    def launch(self, arguments: Any) -> None:
        if self.kernel.of_steps:
            self.launch_steps(arguments)
            return
        kernel, batch = self.kernel, self.problem.case.batch
        starts = [0, *self.way.starts]
        for first, end in zip(starts, [*self.way.starts, batch]):
            count = end - first
            slices = -(-count // self.slice)
            rows = -(-self.slice // kernel.chunk) * kernel.chunk
            exchange = Output.poisoned((slices, SLOTS, rows, kernel.depth), self.problem.dtype)
            exchange.operand.view.view(np.uint8)[...] = 0xFF
            self.shared.first, self.shared.count = first, count
            if kernel.in_memory:
                self.shared.exchange = _data(exchange.operand)
            arguments.shared = self.shared
            self.run(arguments, slices)
            exchange.read(f"{kernel.name} exchange")

    def results(self) -> dict[str, Array]:
        name = f"{self.kernel.name} {self.problem.case.id}"
        return {key: output.read(f"{name} {key}") for key, output in self.outputs.items()}


def forward(
    kernel: Kernel,
    problem: Recurrence,
    way: Way | None = None,
    *,
    save: bool = True,
    bug: str = "none",
) -> dict[str, Array]:
    """`output`, `h_n`, `c_n`, and `gates`, `cells` and `hidden`."""
    way = way or Way()
    call, case, operands = _Call(kernel, problem, way, bug), problem.case, problem.operands
    inputs = copied(problem.inputs, way.saved_layout, problem.dtype)
    arguments = CForward(
        inputs=_data(inputs),
        inputs_row=inputs.strides[0],
        output=_sequence(
            call.output("output", case.sizes("output"), laid(case, "output", way.layout))
        ),
        initial_h=_state(operands.get("h0")),
        initial_c=_state(operands.get("c0")),
        final_h=_state(call.output("h_n", case.sizes("h_n"), way.layout)),
        final_c=_state(call.output("c_n", case.sizes("c_n"), way.layout)),
    )
    for name in ("bias_ih", "bias_hh"):
        if bias := operands.get(name):
            setattr(arguments, name, _data(bias))
            setattr(arguments, f"{name}_stride", bias.strides[0])
    if save:
        for name, width in (("gates", 4), ("cells", 1), ("hidden", 1)):
            saved = call.saved(name, width * case.units)
            setattr(arguments, name, _data(saved))
            setattr(arguments, f"{name}_row", saved.strides[0])
        if way.in_place:
            call.outputs["gates"].operand.view[...] = problem.inputs
            arguments.inputs = arguments.gates
    call.launch(arguments)
    return call.results()


def backward(
    kernel: Kernel,
    problem: Recurrence,
    saved: dict[str, Array],
    way: Way | None = None,
    *,
    bias: bool = True,
    bug: str = "none",
) -> dict[str, Array]:
    """`grad_gates`, its sums over steps as `grad_bias`, and gradients of states that there are."""
    way = way or Way()
    call, case, operands = _Call(kernel, problem, way, bug), problem.case, problem.operands
    arguments = CBackward(
        grad_output=_sequence(operands.get("grad_output")),
        grad_final_h=_state(operands.get("grad_h")),
        grad_final_c=_state(operands.get("grad_c")),
    )
    kept = {}
    for name in ("gates", "cells"):
        kept[name] = copied(saved[name], way.saved_layout, problem.dtype)
        setattr(arguments, name, _data(kept[name]))
        setattr(arguments, f"{name}_row", kept[name].strides[0])
    arguments.cells_unit = kept["cells"].strides[1]
    arguments.grad_gates = _data(call.output("grad_gates", saved["gates"].shape, "contiguous"))
    if bias:
        sums = Output.poisoned((case.batch, 4 * case.units), "float32")
        call.outputs["grad_bias"] = sums
        arguments.grad_bias = _data(sums.operand)
    for name in ("h", "c"):
        if f"{name}0" in operands:
            made = call.output(f"grad_{name}0", case.sizes(f"{name}0"), way.layout)
            setattr(arguments, f"grad_initial_{name}", _state(made))
    call.launch(arguments)
    return call.results()
