"""`twinfuse.tune`: finds the calls of fused ops, and measures their kernels on the GPU."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from twinfuse import _backend, _core, _tuning
from twinfuse._tuning import Run, Tuned, TuneReport

ROUNDS = 5
CLOCKS_OF_LAUNCH = 100_000  # of the device, more than a call from Python takes
MOST_COPIES = 16  # of a call's arguments, so that they are not in the cache when a call begins
HOPELESS = 1.5  # times the fastest: measured no further after the first round


@dataclass(frozen=True)
class Like:
    """A tensor to make: what decides about kernels, and not what it holds."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int  # elements from an address that vectors may have

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        offset = tensor.data_ptr() % 16 // tensor.element_size()
        sizes, strides = tuple(tensor.shape), tensor.stride()
        return cls(sizes, strides, tensor.dtype, tensor.device, offset)

    @property
    def elements(self) -> int:
        spans = ((size - 1) * stride for size, stride in zip(self.sizes, self.strides))
        return self.offset + (1 + sum(spans) if 0 not in self.sizes else 0)

    def make(self) -> Tensor:
        # Random numbers: zeros take less power, and with that less time.
        base = torch.randn(self.elements, dtype=self.dtype, device=self.device)
        return base.as_strided(self.sizes, self.strides, self.offset)


@dataclass
class Call:
    """A call of an operator of ours, its tensors replaced by `Like`s."""

    operator: Callable[..., Any]
    arguments: Any

    @property
    def name(self) -> str:
        return str(self.operator).removeprefix("twinfuse.").split(".")[0].lstrip("_")

    @property
    def tensors(self) -> list[Like]:
        return [leaf for leaf in _pytree.tree_leaves(self.arguments) if isinstance(leaf, Like)]

    def __str__(self) -> str:
        shapes = ", ".join(str(list(like.sizes)) for like in self.tensors)
        return f"{self.name} {shapes} {str(self.tensors[0].dtype).removeprefix('torch.')}"

    def make(self) -> Run:
        """The call, on new tensors."""
        arguments, options = _pytree.tree_map(
            lambda leaf: leaf.make() if isinstance(leaf, Like) else leaf, self.arguments
        )
        return lambda: self.operator(*arguments, **options)


class _Calls(TorchDispatchMode):
    """Notes every different call of our operators on a device of this type."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, dict[str, Call]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func.namespace == "twinfuse":
            likes = _pytree.tree_map_only(Tensor, Like.of, (args, options))
            call = Call(func, likes)
            if call.tensors[0].device.type == self.device:
                self.found.setdefault(repr(call), call)
        return func(*args, **options)


def calls_of(target: Callable[[], Any], device: str) -> list[Call]:
    """The calls that `target()` makes on such a device, those of its backward pass included."""
    with _Calls(device) as calls:
        output = target()
        outputs = [
            leaf
            for leaf in _pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        # By `grad`, since `backward` would change what the leaves have. A step of training has had
        # its backward pass.
        leaves = list(_leaves(outputs))
        if leaves and not any(call.name.endswith("backward") for call in calls.found.values()):
            grads = [torch.randn_like(tensor) for tensor in outputs]
            torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return list(calls.found.values())


def _leaves(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the outputs can be differentiated by."""
    yield from (tensor for tensor in outputs if tensor.is_leaf)
    seen: set[Any] = set()
    nodes = [tensor.grad_fn for tensor in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def rotating(call: Call) -> tuple[Run, int]:
    """The call over several copies of its arguments in turn, and how many these are."""
    size = max(sum(like.elements * like.dtype.itemsize for like in call.tensors), 1)
    device = call.tensors[0].device
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    copies = max(1, min(MOST_COPIES, math.ceil(2 * cache / size), free // (4 * size)))
    turn = itertools.cycle([call.make() for _ in range(copies)])
    return (lambda: next(turn)()), copies


class Stopwatch:
    """Seconds of calls on the current stream of the current device. The device is kept asleep until
    all calls of a sample are waiting for it, so that launches cost nothing."""

    def __init__(self, copies: int) -> None:
        self.count = max(copies, 4)  # calls in a sample

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        """Medians; what fails or is not served takes for ever."""
        first = {i: seconds for i, run in enumerate(runs) if (seconds := self._first(run))}
        fastest = min(first.values(), default=0.0)
        samples = {i: [seconds] for i, seconds in first.items()}
        hopeful = [i for i, seconds in first.items() if seconds <= HOPELESS * fastest]
        for _ in range(ROUNDS):
            for i in hopeful:
                samples[i].append(self._sample(runs[i]))
        return [
            statistics.median(samples[i][1:] or samples[i]) if i in samples else math.inf
            for i in range(len(runs))
        ]

    def _first(self, run: Run) -> float | None:
        try:
            run()  # loads kernels
            return self._sample(run)
        except RuntimeError:  # that memory is lacking is one, too
            return None

    def _sample(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.count * CLOCKS_OF_LAUNCH)
        start.record()
        for _ in range(self.count):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.count


def _progress(calls: list[Call]) -> Iterator[Call]:
    """A bar where tqdm is installed, else a line for each call."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        for i, call in enumerate(calls, 1):
            print(f"twinfuse.tune {i}/{len(calls)}: {call}", file=sys.stderr, flush=True)
            yield call
        return
    with tqdm(calls, desc="twinfuse.tune", unit="call") as bar:
        for call in bar:
            bar.set_postfix_str(str(call))
            yield call


def tune(target: Callable[..., Any], *args: Any, **kwargs: Any) -> TuneReport:
    """See `twinfuse.tune`."""
    if not torch.cuda.is_available():
        raise RuntimeError("twinfuse.tune measures kernels on a GPU, and torch has no CUDA device")
    _, reason = _core.find_kernel("linear_relu_forward", "float32", "cuda")
    if reason:
        raise RuntimeError(f"twinfuse.tune: {reason}")
    core = _tuning.library()
    calls = calls_of(lambda: target(*args, **kwargs), "cuda")
    if not calls:
        raise RuntimeError(
            "twinfuse.tune: the call made no use of fused ops on a GPU; twinfuse.explain says why"
        )
    report, kept = TuneReport(), dict[str, list[Tuned]]()
    for call in _progress(calls):
        device = call.tensors[0].device
        # Strict, or a kernel that serves no call would be timed as torch's own layers.
        serving = (torch.cuda.device(device), torch.no_grad(), _backend.strict())
        with serving[0], serving[1], serving[2], _tuning.Session(core) as session:
            run, copies = rotating(call)
            rows = _tuning.decide(session, call.name, run, Stopwatch(copies))
        report += rows
        kept.setdefault(torch.cuda.get_device_name(device), []).extend(rows)
    _tuning.select(core, (vars(row) for row in report))
    for gpu, rows in kept.items():
        try:
            report.path = _tuning.keep(gpu, rows)
        except OSError as error:
            warnings.warn(f"twinfuse.tune: the choices are not kept: {error}", stacklevel=3)
    return report
