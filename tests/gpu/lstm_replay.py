"""A framework's side of a call of the LSTM on the fake driver: what it launches is run in order,
Triton's kernels in the interpreter, those of csrc/cuda by stand-ins for the GPU's instructions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

from tests.arrays import STORAGE
from tests.core_api import CContext, Lender
from tests.gpu import cuda_lstm, fake_driver
from tests.gpu.fake_driver import Launch
from tests.gpu.lstm_structs import CBackward, CForward, COffsets
from tests.gpu.replay import IEEE, NAMES, PRECISIONS, TF32, GpuLender, Ran

FORMATS = {"float16": "fp16", "bfloat16": "bf16"}
NUMBERS = {IEEE: "tf32x3", TF32: "tf32"}  # of float32
OFFSETS = "lstm_offsets"
NAN = np.array([0xFF, 0x7F], np.uint8)


@dataclass(frozen=True)
class Recurrent:
    """A launch of a kernel of csrc/cuda."""

    launch: Launch

    def __post_init__(self) -> None:
        launch = self.launch
        (argument,) = launch.arguments
        assert launch.attributes == self.waits and launch.cooperative == (
            self.waits and self.cluster == 1
        )
        assert launch.cluster == ((self.cluster, 1, 1) if self.cluster > 1 else (0, 0, 0))
        assert launch.grid[1:] == launch.block[1:] == (1, 1)
        if self.name == OFFSETS:
            assert len(argument) == ctypes.sizeof(COffsets)
            assert (launch.grid[0], launch.block[0], launch.shared) == (1, 128, 0)
            return
        kernel = cuda_lstm.kernels()[self.name]
        assert (len(argument), launch.block[0]) == (kernel.arguments, kernel.threads)
        shared = self.arguments.shared
        assert 0 < shared.units <= kernel.width and shared.first + shared.count <= shared.batch
        assert 0 < shared.slice <= kernel.slice
        assert shared.blocks == max(-(-shared.units // kernel.units), kernel.cluster)
        assert launch.grid[0] == shared.blocks * -(-shared.count // shared.slice)
        if self.of_steps:
            behind = kernel.backward and bool(self.arguments.grad_initial_h.data)
            assert 0 <= shared.step < max(shared.steps + behind, 1)
            assert shared.count == shared.batch and shared.first == 0
            assert bool(shared.carried) == (shared.steps + behind > 1)
            assert bool(shared.exchange) == (shared.steps > 1 and not kernel.backward)
        else:
            assert bool(shared.exchange) == kernel.in_memory

    @property
    def name(self) -> str:
        return self.launch.entry

    @property
    def of_steps(self) -> bool:
        return self.name.endswith("step")

    @property
    def waits(self) -> bool:
        """Its blocks do, for each other."""
        return self.name != OFFSETS and not self.of_steps

    @property
    def cluster(self) -> int:
        return 1 if self.name == OFFSETS else cuda_lstm.kernels()[self.name].cluster

    @property
    def arguments(self) -> CForward | CBackward:
        kind = CBackward if self.name.startswith("lstm_backward") else CForward
        return kind.from_buffer_copy(self.launch.arguments[0])

    @property
    def exchanged(self) -> int:
        """Bytes."""
        kernel, shared = cuda_lstm.kernels()[self.name], self.arguments.shared
        slices = self.launch.grid[0] // shared.blocks
        rows = -(-shared.slice // kernel.chunk) * kernel.chunk
        return (
            slices
            * cuda_lstm.SLOTS
            * rows
            * kernel.depth
            * np.dtype(STORAGE[kernel.dtype]).itemsize
        )

    def run(self, seed: int) -> None:
        if self.waits and (at := self.arguments.shared.exchange):
            assert ctypes.string_at(at, self.exchanged) == b"\xff" * self.exchanged
        argument = ctypes.create_string_buffer(self.launch.arguments[0])
        cuda_lstm.run(self.name, argument, self.launch.grid[0], self.cluster, seed)


@dataclass
class LstmLender(GpuLender):
    """`launched` has the launches of all its calls, in order; `sets` counts memory that was set."""

    launched: list[Ran | Recurrent] = field(default_factory=list)
    sets: int = 0
    first_set: int = 0

    def context(self) -> CContext:
        self.first_set = len(fake_driver.load().memsets)
        return super().context()

    def _allocate(self, opaque: int, size: int) -> int | None:
        """Still NaN in every dtype, but not what memory of an exchange must be set to."""
        address = super()._allocate(opaque, size)
        if address is not None:
            buffer, start, size = self.scratch[-1]
            buffer[start : start + size] = np.resize(NAN, size)
        return address

    def check(self) -> None:
        driver = fake_driver.load()
        sets = driver.memsets[self.first_set :]
        for index, launch in enumerate(driver.launches(self.first), self.first):
            assert launch.stream == self.stream
            while sets and sets[0].launch == index:
                made = sets.pop(0)
                assert (made.stream, made.value) == (self.stream, 0xFFFFFFFF)
                ctypes.memset(made.at, 0xFF, 4 * made.count)
                self.sets += 1
            self.launched.append(self._decoded(launch))
            if self.interpret:
                self._run(self.launched[-1])
        assert not sets
        Lender.check(self)

    def _decoded(self, launch: Launch) -> Ran | Recurrent:
        if launch.entry.startswith("lstm_"):
            made = Recurrent(launch)
            format = FORMATS.get(self.dtype, NUMBERS[self.precision])
            assert made.name == OFFSETS or made.name.split("_")[2] == format
            return made
        ran = Ran.decode(launch, self.dtype)
        assert ran.variant.dtype == NAMES[self.dtype], ran.name
        if ran.is_product and ran.variant.dtype == "fp32":
            # Those that read single elements have no fewer terms.
            precision = IEEE if "elements" in ran.name.split("-") else self.precision
            assert ran.variant.precision in PRECISIONS[precision], ran.name
        return ran

    def _run(self, launched: Ran | Recurrent) -> None:
        if isinstance(launched, Ran):
            launched.interpret()
        else:
            launched.run(len(self.launched))

    @property
    def recurrent(self) -> list[Recurrent]:
        return [made for made in self.launched if isinstance(made, Recurrent)]
