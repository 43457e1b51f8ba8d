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
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tests.arrays import LARGEST, ROUNDOFF, SMALLEST, Operand, decode, encode, flushed, lay_out
from tests.lstm_reference import KINKS, Bools, Lstm, Numbers
from tests.rule import assert_within_twice

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "peephole")
LEAVES = ("input", "h0", "c0", *WEIGHTS)
GIVEN = ("grad_output", "grad_h", "grad_c")
# What has a row for every step of every sequence.
ROWS = ("input", "zoneout_hidden", "zoneout_cell", "grad_output", "output", "grad_input")


@dataclass(frozen=True)
class LstmCase:
    """`steps` x `batch` vectors of `inputs` through `units`; 0 for `projection` is none.

    `bias` is "both", "one" (bias_ih) or "none"; `initial` and `grads` say which of two or three are
    given: "both", "hidden", "cell" or "none", and "all", "output", "final", "hidden" or "cell".
    `zoneout` is "", "draws" (zeros and ones), "means" (one number for all) or "hidden", "cell"
    (draws for this one). `mask` is "" or a key of MASKS; `lengths`, longest first, makes it packed.
    """

    op: ClassVar[str] = "lstm"

    id: str
    steps: int
    batch: int
    inputs: int
    units: int
    projection: int = 0
    bias: str = "both"
    initial: str = "both"
    peephole: bool = False
    zoneout: str = ""
    mask: str = ""
    zero_masked_output: bool = False
    lengths: tuple[int, ...] = ()
    reverse: bool = False
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    grads: str = "all"
    batch_first: bool = False
    input_layout: str = "contiguous"
    state_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    bias_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    values: str = "normal"
    cell: bool = False

    @property
    def outputs(self) -> int:
        return self.projection or self.units

    @property
    def in_torch(self) -> bool:
        """Whether nn.LSTM (nn.LSTMCell) computes it, given both biases or none."""
        usual = (self.activation, self.recurrent_activation) == ("tanh", "sigmoid")
        extras = self.mask or self.peephole or self.zoneout or self.bias == "one"
        projected = self.projection and (self.cell or self.projection >= self.units)
        given = self.initial in ("both", "none")
        return usual and given and not extras and not projected

    @property
    def in_keras(self) -> bool:
        """Whether a Keras layer computes it (or LSTMCell), given one bias or none."""
        extras = self.projection or self.peephole or self.zoneout or self.lengths
        return not extras and self.bias != "both"

    def sizes(self, name: str) -> tuple[int, ...]:
        """Of an operand, a result or a gradient, by name."""
        if name in ROWS or name == "mask":
            last = {"input": self.inputs, "grad_input": self.inputs, "zoneout_cell": self.units}
            rows = (self.batch,) if self.cell else (self.steps, self.batch)
            rows = (sum(self.lengths),) if self.lengths else rows
            return rows if name == "mask" else (*rows, last.get(name, self.outputs))
        name, gates = name.removeprefix("grad_"), 4 * self.units
        return {
            "weight_ih": (gates, self.inputs),
            "weight_hh": (gates, self.outputs),
            "bias_ih": (gates,),
            "bias_hh": (gates,),
            "weight_hr": (self.projection, self.units),
            "peephole": (3, self.units),
        }.get(name) or (self.batch, self.units if name[0] == "c" else self.outputs)

    def has(self, name: str) -> bool:
        """Whether the operand is there."""
        states, final = ("both", "hidden"), ("all", "final", "hidden")
        return {
            "h0": self.initial in states,
            "c0": self.initial in ("both", "cell"),
            "bias_ih": self.bias != "none",
            "bias_hh": self.bias == "both",
            "weight_hr": self.projection > 0,
            "peephole": self.peephole,
            "zoneout_hidden": self.zoneout not in ("", "cell"),
            "zoneout_cell": self.zoneout not in ("", "hidden"),
            "grad_output": self.grads in ("all", "output") and not self.cell,
            "grad_h": self.grads in final,
            "grad_c": self.grads in ("all", "final", "cell"),
        }.get(name, True)

    def layout(self, name: str) -> str:
        if name.startswith("zoneout"):
            way = "scalar" if self.zoneout == "means" else "contiguous"
        elif name == "input":
            way = self.input_layout
        elif name in GIVEN:
            way = self.grad_layout
        elif name in ("h0", "c0"):
            way = self.state_layout
        else:
            way = self.weight_layout if name.startswith("weight") else self.bias_layout
        return f"permuted {way}" if self.batch_first and name in ROWS else way

    def row(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[T, B, ...] as operands of this case have it."""
        if self.lengths:
            return values[self.live_steps]
        return values[0] if self.cell else values

    def unrow(self, values: Numbers) -> Numbers:
        """[T, B, ...], with zeros where a packed sequence has ended."""
        if not self.lengths:
            return values[None] if self.cell else values
        padded = np.zeros((self.steps, self.batch, *values.shape[1:]), values.dtype)
        padded[self.live_steps] = values
        return padded

    @property
    def live_steps(self) -> Bools:
        """[T, B]: steps that the sequences have; masks are another matter."""
        lengths = np.array(self.lengths or [self.steps] * self.batch, np.int64)
        return np.arange(self.steps)[:, None] < lengths


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
    names = (*LEAVES, *GIVEN, "zoneout_hidden", "zoneout_cell")
    values = {name: random.standard_normal(case.sizes(name)) for name in names if case.has(name)}
    for name in WEIGHTS:
        if name in values:
            # Uneven operands make a swapped pair or a lost bias visible.
            fan = values[name].shape[1] if name.startswith("weight") else 4
            values[name] = values[name] / np.sqrt(max(fan, 1)) + 0.1 * (name[0] == "b")
    for name in ("zoneout_hidden", "zoneout_cell"):
        if name in values:
            mean = {"zoneout_hidden": 0.15, "zoneout_cell": 0.4}[name]
            drawn = random.random(values[name].shape) < mean
            values[name] = np.where(case.zoneout == "means", mean, drawn)
    x, kept = values["input"], ("zoneout_hidden", "zoneout_cell")
    if case.values == "wide":
        values["weight_ih"] *= 12
    elif case.values == "tiny":
        # States and pre-activations lie around the smallest normal number, the outputs below.
        small = SMALLEST[dtype] / ROUNDOFF[dtype] / 8
        scales = {"input": np.sqrt(small), "weight_ih": np.sqrt(small), "weight_hh": 1.0}
        scales |= dict.fromkeys(("peephole", "weight_hr", *GIVEN, *kept), 1.0)
        values = {name: a * scales.get(name, small) for name, a in values.items()}
    elif case.values == "saturated":
        # One input decides about every gate: pre-activations of 2e3 to 2e4.
        w = values["weight_ih"]
        x[..., 0] = np.copysign(0.5 + np.abs(x[..., 0]) % 1, x[..., 0])
        w[:, 0] = np.copysign(4000 + np.abs(w[:, 0] * 1e4) % 9000, w[:, 0])
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
        rounded,
        product,
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

    exact, largest = reference(problem), {}
    with np.errstate(invalid="ignore"):
        for _ in range(5):
            for name, array in computed(problem, kind, rounded, product)[1].items():
                error = np.abs(array - exact[name])
                error = error[np.isfinite(error)].max(initial=0)
                largest[name] = max(float(error), largest.get(name, 0.0))
    return largest


def assert_close(
    problem: LstmProblem,
    ours: Mapping[str, npt.ArrayLike],
    native: Mapping[str, npt.ArrayLike] | None = None,
) -> None:
    """The rule of `tests.rule` for every result in `ours`; without `native`, against `rival`."""
    case, dtype = problem.case, problem.dtype
    exact, native = reference(problem), rival(problem) if native is None else native
    # A product with one takes a whole state for zero, and there are some in a sum.
    few = 16 * flushed(dtype) if case.values == "tiny" else 0.0
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
