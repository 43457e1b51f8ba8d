"""LSTMs that nobody thought of, through the C API: shapes, options, layouts and threads."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.arrays import DTYPES, LARGEST, ROUNDOFF, decode, flushed
from tests.core_api import Lender
from tests.core_lstm_api import SAVED, both_ways, guarded_problem, in_order, without_saved
from tests.lstm_cases import LstmCase, LstmProblem, build, reference, relaid
from tests.lstm_problem import noise
from tests.lstm_reference import ACTIVATIONS
from tests.rule import assert_same_bits
from tests.test_properties import EXAMPLES, threads

sizes = st.one_of(st.integers(1, 12), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64, 65]))
read_layouts = st.sampled_from(
    ["contiguous", "transposed", "strided", "padded", "misaligned", "broadcast_rows"]
)
written_layouts = st.sampled_from(["contiguous", "transposed", "strided", "padded", "misaligned"])
smooth = st.sampled_from(["tanh", "sigmoid"])


@st.composite
def lstm_cases(draw: st.DrawFn) -> LstmCase:
    cell = draw(st.integers(0, 3)) == 0
    steps = 1 if cell else draw(st.one_of(st.integers(0, 4), st.integers(1, 20)))
    batch = draw(st.one_of(st.integers(0, 5), st.sampled_from([8, 9, 16, 17])))
    kind = "" if cell else draw(st.sampled_from(["", "", "packed", "mask"]))
    lengths: tuple[int, ...] = ()
    if kind == "packed" and steps and batch:
        others = draw(st.lists(st.integers(1, steps), min_size=batch - 1, max_size=batch - 1))
        lengths = tuple(sorted([steps, *others], reverse=True))
    units = draw(sizes)
    norm, dropout = draw(st.booleans()), draw(st.sampled_from(["", "", "both", "input", "hidden"]))
    # Derivatives of the others jump, close to which many numbers are likely to come, and all where
    # nothing is left of a product.
    small = steps * batch * units < 100 and not norm and not dropout
    functions = st.sampled_from(list(ACTIVATIONS)) if small else smooth
    inputs, projection = draw(sizes), draw(st.one_of(st.just(0), sizes))
    return LstmCase(
        f"property_{draw(st.integers(0, 3))}",
        steps,
        batch,
        inputs,
        units,
        projection=projection,
        bias=draw(st.sampled_from(["both", "one", "none"])),
        initial="both" if cell else draw(st.sampled_from(["both", "hidden", "cell", "none"])),
        peephole=draw(st.booleans()),
        zoneout=draw(st.sampled_from(["", "", "draws", "means", "hidden", "cell"])),
        norm=norm,
        # A small one makes much of errors where a row has little variance.
        norm_epsilon=draw(st.sampled_from([0.1, 1.0])),
        dropout=dropout,
        mask=draw(st.sampled_from(["right", "left", "interior", "rows"])) * (kind == "mask"),
        zero_masked_output=draw(st.booleans()),
        lengths=lengths,
        reverse=not cell and draw(st.booleans()),
        activation=draw(functions),
        recurrent_activation=draw(functions),
        grads=draw(st.sampled_from(["all", "hidden", "cell"])),
        batch_first=not lengths and not cell and draw(st.booleans()),
        input_layout=draw(read_layouts),
        state_layout=draw(read_layouts),
        # Equal rows of weights leave nothing to a norm but errors.
        weight_layout=draw(read_layouts.filter(lambda way: not norm or way != "broadcast_rows")),
        bias_layout=draw(st.sampled_from(["contiguous", "strided", "broadcast_columns"])),
        dropout_layout=draw(read_layouts),
        grad_layout=draw(read_layouts),
        cell=cell,
    )


@settings(EXAMPLES, max_examples=300)
@given(
    case=lstm_cases(),
    dtype=st.sampled_from(DTYPES),
    layout=written_layouts,
    batch_major=st.booleans(),
    **threads,
)
def test_any_lstm(
    case: LstmCase, dtype: str, layout: str, batch_major: bool, order: str, threads: int
) -> None:
    """Numbers about as good as those of a composed loop, and the bits of dense copies."""
    problem = build(case, dtype)
    guarded = guarded_problem(problem, at_end=case.id != "property_0")
    options = {"batch_major": batch_major, "lender": Lender(order, threads)}
    results = both_ways(guarded, layout=layout, **options)
    check_numbers(problem, results)
    again = both_ways(relaid(problem, "contiguous"), batch_major=batch_major)
    for name, array in results.items():
        assert_same_bits(again[name], array, f"{name} of contiguous copies")
    other = both_ways(problem, batch_major=not batch_major)
    for name, array in results.items():
        if name in SAVED:
            array = in_order(problem, array, batch_major)
            other[name] = in_order(problem, other[name], not batch_major)
        assert_same_bits(other[name], array, f"{name} in the other order")


def check_numbers(problem: LstmProblem, results: dict[str, np.ndarray]) -> None:
    case, dtype = problem.case, problem.dtype
    exact, usual = reference(problem), noise(problem.case, dtype)
    # Gates without a bound grow from step to step, until they overflow in every library.
    largest = max(np.abs(array).max(initial=0) for array in exact.values())
    assume(largest < LARGEST[dtype] / 1024)
    for name, array in without_saved(results).items():
        expected = exact[name]
        error = np.abs(decode(array) - expected).max(initial=0)
        size = np.abs(expected).max(initial=0)
        # One rival that is lucky would say too little, and so may five.
        bound = 6 * usual[name] + 16 * ROUNDOFF[dtype] * size + 16 * flushed(dtype)
        assert error <= bound, f"{name} of {case} in {dtype}: {error} beyond {bound}"
