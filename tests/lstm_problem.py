"""A case of the LSTM as arrays, and what the op must make of them.

    problem = build(case, dtype)      # operands by name, laid out in storage of their own
    exact = reference(problem)        # float64 (extended for float64): results by name, not rounded
    other = rival(problem)            # the same loop in the dtype, every operation rounded
    assert_close(problem, ours, native)    # the rule for all results of `ours`

Operands (`problem.operands`, and `problem[name]`, None where the case has none) are indexed
[T, B, ...] whatever the layout; those of a packed case are [N, ...] as torch packs them, those of a
cell [B, ...]. Results are `output` (not of a cell), `h_n`, `c_n`, and `grad_` of every operand in
LEAVES that the case has.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.arrays import LARGEST, ROUNDOFF, SMALLEST, Operand, decode, encode, flushed, lay_out
from tests.lstm_case import GIVEN, LEAVES, NOISE, ROWS, WEIGHTS, LstmCase
from tests.lstm_reference import KINKS, Bools, Lstm, Numbers
from tests.rule import assert_within_twice


@dataclass(frozen=True)
class LstmProblem:
    """The arrays of one case in one dtype."""

    case: LstmCase
    dtype: str
    operands: dict[str, Operand]
    mask: Bools | None  # [T, B]

    def __getitem__(self, name: str) -> Operand | None:
        return self.operands.get(name)

    @property
    def batch_sizes(self) -> npt.NDArray[np.int64] | None:
        return self.case.live_steps.sum(axis=1) if self.case.lengths else None

    @property
    def leaves(self) -> list[str]:
        """The operands that get gradients."""
        return [name for name in LEAVES if name in self.operands]


def build(case: LstmCase, dtype: str) -> LstmProblem:
    """Fresh arrays, with the same values in every process."""
    values, mask = _values(case, dtype)
    named = {name: lay_out(a, case.layout(name), dtype) for name, a in values.items()}
    return LstmProblem(case, dtype, named, mask)


def relaid(problem: LstmProblem, layout: str) -> LstmProblem:
    """The same values in another layout."""
    named = {name: lay_out(a.values, layout, problem.dtype) for name, a in problem.operands.items()}
    return LstmProblem(problem.case, problem.dtype, named, problem.mask)


MASKS = {
    "kept": lambda length, random: np.ones_like(random, bool),
    "right": lambda length, random: np.arange(len(random))[:, None] < length,
    "left": lambda length, random: np.arange(len(random))[::-1, None] < length,
    "interior": lambda length, random: random < 0.6,
    # Whole sequences masked, whole sequences kept, and others.
    "rows": lambda length, random: np.where(
        np.arange(random.shape[1]) % 3 < 2, np.arange(random.shape[1]) % 3 == 1, random < 0.5
    ),
    "none": lambda length, random: np.zeros_like(random, bool),
}


@functools.lru_cache(maxsize=1024)
def _values(case: LstmCase, dtype: str) -> tuple[dict[str, Numbers], Bools | None]:
    """Derivatives jump at the kinks of piecewise linear activations: no argument is close to one,
    so that rounding never decides a gradient."""
    for attempt in range(1000):
        random = np.random.default_rng(zlib.crc32(case.id.encode()) + attempt)
        values, mask = _draw(case, dtype, random), None
        if case.mask:
            shape = (case.steps, case.batch)
            length = random.integers(1, max(case.steps, 1) + 1, case.batch)
            mask = MASKS[case.mask](length, random.random(shape))
        named = {name: lay_out(a, case.layout(name), dtype) for name, a in values.items()}
        if not _close_to_kink(LstmProblem(case, dtype, named, mask)):
            return values, mask
    raise AssertionError(f"{case.id} {dtype}: every draw comes close to a kink")


def _draw(case: LstmCase, dtype: str, random: np.random.Generator) -> dict[str, Numbers]:
    names = (*LEAVES, *GIVEN, *NOISE)
    values = {name: random.standard_normal(case.sizes(name)) for name in names if case.has(name)}
    for name in WEIGHTS:
        if name in values:
            # Uneven operands make a swapped pair or a lost bias visible.
            fan = values[name].shape[1] if name.startswith("weight") else 4
            mean = {"b": 0.1, "n": 1.0}.get(name[0], 0.0)
            values[name] = values[name] / np.sqrt(max(fan, 1)) + mean
    for name, mean in NOISE.items():
        if name in values:
            drawn = random.random(values[name].shape) < mean
            means = case.zoneout == "means" and name.startswith("zoneout")
            values[name] = np.where(means, mean, drawn)
            if name.startswith("dropout"):
                values[name] = (1 - values[name]) / (1 - mean)
    x = values["input"]
    if case.values == "wide":
        values["weight_ih"] *= 12
    elif case.values == "tiny":
        # States and pre-activations lie around the smallest normal number, the outputs below.
        small = SMALLEST[dtype] / ROUNDOFF[dtype] / 8
        scales = {"input": np.sqrt(small), "weight_ih": np.sqrt(small), "weight_hh": 1.0}
        scales |= dict.fromkeys(("peephole", "norm", "weight_hr", *GIVEN, *NOISE), 1.0)
        values = {name: a * scales.get(name, small) for name, a in values.items()}
    elif case.values == "saturated":
        # One input decides about every gate: pre-activations of 2e3 to 2e4.
        w = values["weight_ih"]
        x[..., 0] = np.copysign(0.5 + np.abs(x[..., 0]) % 1, x[..., 0])
        w[:, 0] = np.copysign(4000 + np.abs(w[:, 0] * 1e4) % 9000, w[:, 0])
        if case.norm:
            n = values["norm"][0]
            n[...] = np.copysign(9000 + np.abs(n * 1e4) % 9000, n)
    elif case.values == "large":
        # Cells close to overflow, and so are the gradients of gates that multiply them.
        values["c0"] = LARGEST[dtype] / 64 * np.sign(values["c0"])
        values |= {name: values[name] / 16 for name in GIVEN if name in values}
    elif case.values == "nonfinite":
        x[1, 0, 0], x[2, 1, -1], x[0, 2, 1] = np.nan, np.inf, -np.inf
        values["c0"][3, 0], values["h0"][4, 1] = np.inf, np.nan
    return values


def _live(problem: LstmProblem) -> Bools:
    return problem.case.live_steps if problem.mask is None else problem.mask


def computed(
    problem: LstmProblem,
    kind: type[np.floating] = np.float64,
    rounded: Callable[[Numbers], Numbers] = lambda x: x,
    product: Callable[[Numbers, Numbers], Numbers] = np.matmul,
    inner: Callable[[Numbers], Numbers] = lambda x: x,
) -> tuple[Lstm, dict[str, Numbers]]:
    """The equations in `kind`, with `rounded` after every operation; and what they gave."""
    case, arrays = problem.case, {}
    for name, operand in problem.operands.items():
        values = operand.values.astype(kind)
        arrays[name] = case.unrow(values) if name in ROWS else values
    lstm = Lstm(
        arrays,
        _live(problem),
        case.activation,
        case.recurrent_activation,
        case.reverse,
        case.zero_masked_output,
        case.norm_epsilon,
        rounded,
        product,
        inner,
    )
    with np.errstate(all="ignore"):
        results = lstm.forward()
        if case.cell:
            del results["output"]
        results |= lstm.backward()
    return lstm, {
        name: case.row(array) if name in ROWS else array for name, array in results.items()
    }


def _wide(dtype: str) -> type[np.floating]:
    return np.longdouble if dtype == "float64" else np.float64


def reference(problem: LstmProblem) -> dict[str, Numbers]:
    """On the rounded inputs of `problem`, in float64 (extended for float64), not rounded."""
    return computed(problem, _wide(problem.dtype))[1]


def rival(problem: LstmProblem) -> dict[str, Numbers]:
    """A composed loop in the dtype of `problem`; every operation sums in float32 (float64)."""
    kind = np.float64 if problem.dtype == "float64" else np.float32
    if problem.dtype in ("float32", "float64"):
        return computed(problem, kind)[1]
    return computed(problem, kind, lambda x: decode(encode(x, problem.dtype)).astype(kind))[1]


@functools.lru_cache(maxsize=4096)
def noise(case: LstmCase, dtype: str) -> dict[str, float]:
    """The largest error of each result when every operation of the loop is rounded at random.

    What the error of one composed loop is about, unless its roundings happen to cancel.
    """
    problem, kind = build(case, dtype), _wide(dtype)
    random = np.random.default_rng(0)
    sums = "float64" if dtype == "float64" else "float32"

    def moved(values: Numbers, by: Numbers) -> Numbers:
        return values + random.uniform(-1, 1, values.shape).astype(kind) * by

    def rounded(values: Numbers) -> Numbers:
        return moved(values, ROUNDOFF[dtype] * np.abs(values) + SMALLEST[dtype] / 2)

    def product(a: Numbers, b: Numbers) -> Numbers:
        return moved(a @ b, ROUNDOFF[sums] * (np.abs(a) @ np.abs(b)))

    def inner(values: Numbers) -> Numbers:
        return moved(values, ROUNDOFF[sums] * np.abs(values))

    exact, largest = reference(problem), {}
    with np.errstate(invalid="ignore"):
        for _ in range(5):
            for name, array in computed(problem, kind, rounded, product, inner)[1].items():
                error = np.abs(array - exact[name])
                error = error[np.isfinite(error)].max(initial=0)
                largest[name] = max(float(error), largest.get(name, 0.0))
    return largest


def assert_close(
    problem: LstmProblem,
    ours: Mapping[str, npt.ArrayLike],
    native: Mapping[str, npt.ArrayLike] | None = None,
    flushed_below: float = 0.0,
) -> None:
    """The rule of `tests.rule` for every result in `ours`; without `native`, against `rival`."""
    case, dtype = problem.case, problem.dtype
    exact, native = reference(problem), rival(problem) if native is None else native
    # A product with one takes a whole state for zero, and there are some in a sum.
    few = 16 * flushed(dtype) if case.values == "tiny" else 0.0
    few = max(few, flushed_below)
    for name, array in ours.items():
        results, what = (array, native[name], exact[name]), f"{case.id} {name}"
        try:
            assert_within_twice(*results, what, dtype=dtype, flushed_below=few)
        except AssertionError:
            # It takes long, and is seldom needed.
            usual = noise(case, dtype)[name]
            assert_within_twice(*results, what, dtype=dtype, flushed_below=few, noise=usual)


def _close_to_kink(problem: LstmProblem) -> bool:
    case = problem.case
    kinks = {name: KINKS.get(name, ()) for name in (case.activation, case.recurrent_activation)}
    if not any(kinks.values()) or not case.steps:
        return False
    lstm, _ = computed(problem)
    pre = np.split(np.stack(lstm.steps["pre"]), 4, axis=-1)
    new_c = np.stack(lstm.steps["new_cells"])
    pairs = [(a, case.recurrent_activation) for a in (pre[0], pre[1], pre[3])]
    # A cell that is exactly zero is so in every precision: its gates are shut.
    pairs += [(pre[2], case.activation), (np.where(new_c == 0, 9, new_c), case.activation)]
    live = _live(problem)
    return any(
        (np.abs(a[live] - kink) < 4 * ROUNDOFF[problem.dtype] * (1 + np.abs(a[live]))).any()
        for a, name in pairs
        for kink in kinks[name]
    )
