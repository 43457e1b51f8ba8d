"""Timing: candidates take turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import ctypes
import math
import random
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# `(call, number) -> seconds` for `number` calls in a row. timeit also keeps the collector away.
Timer = Callable[[Callable[[], Any], int], float]


def timeit_timer(call: Callable[[], Any], number: int) -> float:
    return timeit.Timer(call).timeit(number)


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op. `run` takes nothing and returns its outputs, to be checked once.

    A peer is compared with the candidates of ours (`own`) that share its framework.
    """

    name: str
    framework: str
    run: Callable[[], Any]
    own: bool = False


@dataclass(frozen=True)
class Settings:
    """How long to measure, and whether memory is kept (`keep_memory`).

    `settle` is slept before a candidate's turn: the thread pools of the other framework spin for
    some milliseconds after their last task and would steal its cores.
    """

    rounds: int = 11
    least_rounds: int = 7
    block: float = 0.02
    warm: float = 0.002
    settle: float = 0.01
    limit: float = 8.0
    keep_memory: bool = False


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry a round; each is the mean of `number` calls in a row."""

    rounds: tuple[float, ...]
    number: int

    @property
    def spread(self) -> Spread:
        return Spread.of(self.rounds)


def ratio(peer: Timing, own: Timing) -> Spread:
    """How many times as fast as `peer` `own` is: spread of the ratios within each round."""
    return Spread.of([p / o for p, o in zip(peer.rounds, own.rounds, strict=True)])


def keep_memory() -> bool:
    """Let the C library keep all memory that is freed; False if it is not glibc.

    By default it returns a large block to the system or not by what else is allocated just then. A
    result as large as that, made anew in every call, costs page faults in one process and none in
    another, which take longer than many a layer.
    """
    trim_threshold, mmap_max = -1, -4  # names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers; NaN of none."""
    if not values:
        return math.nan
    return math.exp(sum(math.log(v) for v in values) / len(values))


def calibrate(call: Callable[[], Any], block: float, timer: Timer = timeit_timer) -> float:
    """Seconds that one warmed call takes, near enough to choose the length of a block."""
    timer(call, 1)
    number = 1
    while True:
        seconds = timer(call, number)
        if seconds >= block / 4 or number >= 1 << 20:
            return seconds / number
        number *= 4


def interleave(
    candidates: Sequence[Candidate],
    settings: Settings,
    *,
    timer: Timer = timeit_timer,
    sleep: Callable[[float], object] = time.sleep,
    on_round: Callable[[int, int], object] = lambda done, rounds: None,
) -> dict[str, Timing]:
    """Time the candidates in rounds: in each, everyone runs one block of calls, in a new order.

    `on_round(done, rounds)` is called after each round. The number of rounds shrinks, down to
    `settings.least_rounds`, where the calls are so slow that all would take over `settings.limit`.
    """
    per_call = {c.name: calibrate(c.run, settings.block, timer) for c in candidates}
    number = {name: max(1, round(settings.block / t)) for name, t in per_call.items()}
    warm = {name: max(1, round(settings.warm / t)) for name, t in per_call.items()}
    cost = sum(settings.settle + t * (number[n] + warm[n]) for n, t in per_call.items())
    fitting = int(settings.limit / cost) if cost else settings.rounds
    rounds = min(settings.rounds, max(settings.least_rounds, fitting))
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    # Random orders, so that nobody always follows the same neighbour; the same ones in every run.
    shuffled = random.Random(0)
    for done in range(rounds):
        for candidate in shuffled.sample(list(candidates), len(candidates)):
            name = candidate.name
            sleep(settings.settle)
            timer(candidate.run, warm[name])
            seconds[name].append(timer(candidate.run, number[name]) / number[name])
        on_round(done + 1, rounds)
    return {name: Timing(tuple(values), number[name]) for name, values in seconds.items()}
