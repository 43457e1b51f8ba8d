"""The benchmark of the LSTM: its shapes, its float64 reference, and who is compared with whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from benchmarks import lstm, memory, operands
from benchmarks.__main__ import choose, parse
from benchmarks.candidates import EAGER, GRAPH, MODULE, TORCH
from benchmarks.lstm import parse_shape
from benchmarks.lstm_candidates import (
    COMPILED,
    KERAS_EAGER,
    KERAS_GRAPH,
    KERAS_XLA,
    NATIVE_KERAS_EAGER,
    NATIVE_KERAS_GRAPH,
    TORCH_CELL,
    TORCH_LAYER,
)
from benchmarks.lstm_shapes import LstmShape, Operands
from tests.conftest import require
from tests.test_benchmarks import run_cli

# One of each kind, of sizes that differ from each other.
CELL, LAYER, PACKED, PROJECTED = SHAPES = (
    "B3 I5 H6",
    "B3 T4 I5 H6",
    "B4 T7 I5 H6 packed",
    "B3 T4 I5 H6 P2",
)
KINDS: tuple[Any, ...] = ("forward", "training")
IN_TENSORFLOW = (EAGER, GRAPH, KERAS_EAGER, KERAS_GRAPH, NATIVE_KERAS_EAGER, NATIVE_KERAS_GRAPH)


def test_shapes_are_read_as_they_are_written() -> None:
    shapes = {shape for section in lstm.SECTIONS for shape in section.shapes}
    assert len(shapes) == 16
    for shape in shapes:
        assert parse_shape(str(shape)) == shape
    assert parse_shape("B32 I128 H64") == LstmShape(32, 0, 128, 64)
    assert parse_shape("B32 T9 I128 H64 P16 packed") == LstmShape(32, 9, 128, 64, 16, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32x64x128x128", "expected B32"),
        ("B32 T64 H128 I128", "expected B32"),
        ("B32 T64 I0 H128", "positive sizes"),
        ("B32 T0 I128 H128", "positive sizes"),
        ("B32 I128 H128 packed", "expected steps"),
        ("B32 I128 H128 P64", "expected steps"),
        ("B32 T64 I128 H128 P128", "projection below H"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_packed_sequences_have_lengths_from_short_to_all_steps() -> None:
    shape = parse_shape("B4 T8 I2 H3 packed")
    assert shape.batch_sizes == [4, 4, 3, 3, 2, 2, 1, 1] and shape.rows == 20
    assert parse_shape("B9 T4 I2 H3 packed").batch_sizes == [9, 5, 3, 1]
    assert parse_shape("B1 T4 I2 H3 packed").batch_sizes == [1, 1, 1, 1]
    for packed in lstm.PACKED[1:]:
        assert 0.45 < packed.rows / (packed.batch * packed.steps) < 0.6


@pytest.mark.parametrize(
    ("text", "products", "forward", "gradients"),
    [
        (CELL, 3 * 24 * 11, 3 * (5 + 24) + 24 * 11 + 48, 2 * (3 * (5 + 24) + 24 * 11 + 48)),
        (LAYER, 12 * 24 * 11, 12 * 11 + 24 * 11 + 48 + 36, 2 * (12 * 11 + 24 * 11 + 48) + 36),
        (PACKED, 16 * 24 * 11, 16 * 11 + 24 * 11 + 48 + 48, 2 * (16 * 11 + 24 * 11 + 48) + 48),
        (
            PROJECTED,
            12 * (24 * 7 + 12),
            12 * 7 + 24 * 7 + 48 + 12 + 24,
            2 * (12 * 7 + 24 * 7 + 48 + 12) + 24,
        ),
    ],
)
def test_flops_and_traffic(text: str, products: int, forward: int, gradients: int) -> None:
    shape = parse_shape(text)
    cases = [lstm.case(kind, shape, "bfloat16", []) for kind in KINDS]
    assert [case.flops for case in cases] == [2 * products, 6 * products]
    assert [case.traffic for case in cases] == [2 * forward, 2 * gradients]
    assert cases[0].steps == shape.steps


@pytest.mark.parametrize("text", SHAPES)
def test_reference_gradients_are_derivatives(text: str) -> None:
    own = Operands.random(parse_shape(text))
    cell = own.shape.cell
    names = ["input", *("h", "c")[: 2 * cell], "weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names += ["weight_hr"] if own.shape.projection else []
    gradients = own.reference("training")[2 if cell else 3 :]

    def loss(operands: Operands) -> float:
        first, second, *_ = operands.reference("forward")
        if cell:
            return float((first * own.grad_h + second * own.grad_c).sum())
        return float((first * own.rows(own.grad_output)).sum())

    step = 1e-6
    for name, gradient in zip(names, gradients, strict=True):
        value = getattr(own, name)
        # Of the input one of the first step, whose rows come first in packed ones, too.
        middle = tuple(size // 2 for size in value.shape)
        for index in ((0,) * value.ndim, (0, *middle[1:]) if name == "input" else middle):
            moved = value.copy()
            moved[index] += step
            change = (loss(Operands(**{**vars(own), name: moved})) - loss(own)) / step
            expected = gradient[index[-gradient.ndim :]]
            assert change == pytest.approx(expected, abs=1e-4), (name, index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SHAPES)
def test_candidates_of_torch_compute_the_reference(text: str, kind: Any) -> None:
    require("torch")
    native = TORCH_CELL if text == CELL else TORCH_LAYER
    check("torch", text, kind, (TORCH, MODULE, native))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [CELL, LAYER, PACKED])
def test_candidates_of_tensorflow_compute_the_reference(text: str, kind: Any) -> None:
    require("tensorflow")
    check("tensorflow", text, kind, IN_TENSORFLOW)


def check(framework: str, text: str, kind: Any, names: tuple[str, ...]) -> None:
    """Float64: of padding, biases and the order of gradients nothing may hide in roundings."""
    case = lstm.case(kind, parse_shape(text), "float64", [framework], names)
    assert {c.name for c in case.candidates} == set(names) and case.skipped == {}
    with case.context():
        for candidate in case.candidates:
            found = case.outputs(candidate, candidate.run())
            assert operands.error(found, case.reference) < 1e-12, candidate.name


def test_everybody_is_measured_where_there_is_something_to_compare() -> None:
    require("torch")
    for text, peers in {
        CELL: {TORCH_CELL, COMPILED},
        LAYER: {TORCH_LAYER, COMPILED},
        PACKED: {TORCH_LAYER},
        PROJECTED: {TORCH_LAYER},
    }.items():
        case = lstm.case("forward", parse_shape(text), "float32", ["torch"])
        assert {c.name for c in case.candidates} == {TORCH, MODULE, *peers}
    require("tensorflow")
    for text in (CELL, LAYER, PACKED):
        case = lstm.case("forward", parse_shape(text), "float32", ["tensorflow"])
        assert {c.name for c in case.candidates} == {*IN_TENSORFLOW, KERAS_XLA}
    assert lstm.frameworks_of(parse_shape(PROJECTED)) == ("torch",)


def test_shapes_asked_for_go_to_the_sections_that_are_about_them() -> None:
    chosen = parse(["lstm", "--shapes", ", ".join(SHAPES)])
    sections = {s.name: s.shapes for s in choose(lstm.SECTIONS, chosen)}
    assert sections.pop("memory") == chosen.shapes[1:]
    for name, text in {"cell": CELL, "": LAYER, "packed": PACKED, "projected": PROJECTED}.items():
        for section in (name or "forward", f"{name}_training".strip("_")):
            assert sections.pop(section) == (parse_shape(text),)
    assert not sections


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_real_run(framework: str, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    require(framework)
    data, page = tmp_path / "run.json", tmp_path / "run.html"
    done = run_cli(
        *("lstm", "--quick", "--section", "forward,training,memory", "--framework", framework),
        *("--shapes", "B2 T3 I8 H8", "--threads", "1", "--json", str(data), "--html", str(page)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "geometric mean" in done.stdout and "us/step" in done.stdout
    run = json.loads(data.read_text())
    assert run["problems"] == [] and [len(s["cases"]) for s in run["sections"]] == [1, 1, 0]
    torch_names = {TORCH, MODULE, TORCH_LAYER, COMPILED}
    names = torch_names if framework == "torch" else {*IN_TENSORFLOW, KERAS_XLA}
    for section in run["sections"][:2]:
        (case,) = section["cases"]
        assert case["steps"] == 3 and set(case["candidates"]) == names and case["skipped"] == {}
        assert set(case["notes"]) == names & {COMPILED}
        for candidate in case["candidates"].values():
            assert not candidate["own"] or sum(candidate["kernels"].values()) >= 1
    (measured,) = run["sections"][2]["memory"]
    assert set(measured["candidates"]) == set(lstm.MEMORY_PAIRS[framework])
    assert "<th>us/step</th>" in page.read_text()


@pytest.mark.slow
def test_peak_memory_of_keras_holds_at_least_the_results() -> None:
    require("tensorflow")
    shape = parse_shape("B32 T16 I64 H64")
    results = 4 * (2 * 16 * 32 * 64 + 4 * 64 * 128 + 4 * 64)
    for name in lstm.MEMORY_PAIRS["tensorflow"]:
        use = memory.measure("lstm", name, "tensorflow", shape, "float32", threads=1)
        assert use.allocator is not None, name
        assert results <= use.allocator < 20 * results, name
