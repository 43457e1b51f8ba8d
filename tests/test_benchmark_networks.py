"""The benchmark of whole networks: what is built, how it is compared, and a real short run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

from benchmarks import memory, networks, operands
from benchmarks.__main__ import choose, parse
from benchmarks.candidates import NATIVE, TORCH
from benchmarks.goals import judge
from benchmarks.harness import Candidate
from benchmarks.networks import parse_shape
from benchmarks.networks_candidates import (
    COMPILED,
    KERAS_EAGER,
    KERAS_GRAPH,
    NATIVE_COMPILED,
    NATIVE_KERAS_EAGER,
    NATIVE_KERAS_GRAPH,
    keras_model,
    torch_model,
)
from benchmarks.networks_shapes import INPUTS, NOTHING, OPS, VGG16, NetworkShape, random_batch
from benchmarks.operands import Case
from benchmarks.runner import check
from tests.conftest import require
from tests.test_benchmark_goals import EAGER, OWN, synthetic_run
from tests.test_benchmarks import run_cli

IN_KERAS = (KERAS_EAGER, KERAS_GRAPH, NATIVE_KERAS_EAGER, NATIVE_KERAS_GRAPH)
KINDS: tuple[Any, ...] = ("forward", "training")
# Linear layers, convolutions, dropped elements, sparse gradients, values as targets, and nothing.
SMALL = ("mlp_784", "lenet_cifar", "cnn2_mnist", "char_lstm", "mlp_regression", NOTHING)


def test_shapes_are_read_as_they_are_written() -> None:
    assert {shape.name for shape in networks.SHAPES} == set(INPUTS)
    for shape in (*networks.SHAPES, *networks.COMPILED):
        assert parse_shape(str(shape)) == shape
    assert parse_shape("lstm B3 compiled") == NetworkShape("lstm", 3, True)
    assert networks.UNFUSED and {s.name for s in networks.UNFUSED} >= {NOTHING, "rnn"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody B32", "expected one of mlp_784"),
        ("mlp_784", "expected name B<batch>"),
        ("mlp_784 32", "positive size"),
        ("mlp_784 B0", "positive size"),
        ("mlp_784 B8 packed", "expected name B<batch>"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_shapes_asked_for_go_to_the_sections_that_are_about_them() -> None:
    names = {}
    for text in ("lstm B2", "lstm B2 compiled"):
        arguments = ["networks", "--shapes", text, "--section", ",".join(SECTION_NAMES)]
        names[text] = [s.name for s in choose(networks.SECTIONS, parse(arguments))]
    assert names["lstm B2"] == ["forward", "training", "memory"]
    assert names["lstm B2 compiled"] == ["compiled", "compiled_training"]


SECTION_NAMES = [section.name for section in networks.SECTIONS]


@pytest.mark.parametrize("name", INPUTS)
def test_flops_and_traffic_are_those_of_the_weights(name: str) -> None:
    torch = require("torch")
    from torch.utils.flop_counter import FlopCounterMode

    model = torch_model(name)
    elements = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    inputs, _ = random_batch(NetworkShape(name, 2))
    samples = torch.from_numpy(inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = model(samples.float() if samples.is_floating_point() else samples)
    case = networks.case("forward", NetworkShape(name, 2), "float32", [])
    assert case.traffic == 4 * (inputs.size + outputs.numel() + elements)
    if name not in ("lstm", "rnn", "char_lstm"):  # which torch does not count
        assert case.flops == counter.get_total_flops()
    training = networks.case("training", NetworkShape(name, 2), "float32", [])
    assert training.flops == 3 * case.flops
    assert training.traffic == case.traffic + 4 * elements


def test_a_step_of_an_lstm_multiplies_by_all_of_its_weights() -> None:
    case = networks.case("forward", parse_shape("lstm B2"), "float32", [])
    assert case.flops == 2 * 2 * (8 * 4 * 64 * (8 + 64) + 64 * 10)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_torch_compute_the_same(name: str, kind: Any) -> None:
    require("torch")
    check_network("torch", NetworkShape(name, 2), kind, (TORCH, NATIVE))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_keras_compute_the_same(name: str, kind: Any) -> None:
    require("tensorflow")
    check_network("tensorflow", NetworkShape(name, 2), kind, IN_KERAS)


def check_network(framework: str, shape: NetworkShape, kind: Any, names: tuple[str, ...]) -> None:
    """Float64, as roundings would hide little things. Ours launches kernels of all its ops."""
    case = networks.case(kind, shape, "float64", [framework])
    assert {c.name for c in case.candidates} == set(names) and case.skipped == {}
    with case.context():
        sound, kernels = check(case, "float64", networks.OP)
        assert {c.name for c in sound} == set(names)
        if shape.name != "cnn2_mnist":  # whose Keras layers drop other elements in each step
            for candidate in case.candidates:  # the second run computes what the first has
                found = case.outputs(candidate, candidate.run())
                expected = case.references[candidate.framework]
                assert operands.error(found, expected) < 1e-10, candidate.name
    for launches in kernels.values():
        for op in OPS[shape.name]:
            for direction in ("forward", "backward")[: 1 + (kind == "training")]:
                assert any(f"{op}_{direction}" in kernel for kernel in launches), (op, launches)
        assert OPS[shape.name] or not launches


def test_a_network_that_a_framework_cannot_build_is_left_out() -> None:
    require("tensorflow")
    # Keras draws the recurrent weights by an operation that has no bfloat16.
    case = networks.case("forward", parse_shape("lstm B2"), "bfloat16", ["tensorflow"])
    assert case.candidates == [] and "bfloat16" in case.skipped["all of tensorflow"]


@pytest.mark.slow
def test_vgg16_is_one_network_in_both_frameworks() -> None:
    require("torch")
    require("tensorflow")
    native = [p.numel() for p in torch_model(VGG16).parameters()]
    assert native == [math.prod(v.shape) for v in keras_model(VGG16).trainable_variables]
    for framework, names in (("torch", (TORCH, NATIVE)), ("tensorflow", IN_KERAS)):
        check_network(framework, NetworkShape(VGG16, 1), "forward", names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_are_compiled(kind: Any) -> None:
    require("torch")
    shape = parse_shape("mlp_784 B2 compiled")
    check_network("torch", shape, kind, (COMPILED, NATIVE_COMPILED))
    assert networks.frameworks_of(shape) == ("torch",)


def test_each_framework_is_held_to_its_own_reference() -> None:
    ones, twos = np.ones(3), np.full(3, 2.0)
    case = Case(
        reference=[],
        flops=1.0,
        traffic=1,
        candidates=[
            Candidate("right", "PyTorch", lambda: [ones]),
            Candidate("wrong", "TensorFlow graph", lambda: [ones]),
        ],
        references={"PyTorch": [ones], "TensorFlow graph": [twos]},
    )
    sound, _ = check(case, "float32", networks.OP)
    assert [c.name for c in sound] == ["right"] and "wrong result" in case.skipped["wrong"]


def test_no_kernel_is_missed_where_nothing_is_fused() -> None:
    run = synthetic_run({networks.UNFUSED[0]: {OWN: 1.0, EAGER: 1.0}}, kernels=False)
    (case,) = run.sections[0].cases
    assert len(run.problems()) == 1
    case.fused = False
    assert run.problems() == []


@pytest.mark.parametrize(("own", "reached"), [(0.99, (True, True)), (1.01, (False, True))])
def test_goals_of_networks_are_judged(own: float, reached: tuple[bool, bool]) -> None:
    times = {shape: {OWN: own, EAGER: 1.0} for shape in networks.SHAPES}
    goals = [g for g in networks.GOALS if g.section == "forward" and g.own == TORCH]
    verdicts = [judge(goal, synthetic_run(times), networks.SHAPES) for goal in goals]
    assert tuple(verdict.reached for verdict in verdicts) == reached
    assert [goal.limit for goal in goals] == [1.0, 0.98]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_real_run(framework: str, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    require(framework)
    data, page = tmp_path / "run.json", tmp_path / "run.html"
    done = run_cli(
        *("networks", "--quick", "--section", "forward,training,memory", "--threads", "1"),
        *("--framework", framework, "--json", str(data), "--html", str(page)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "geometric mean" in done.stdout and "Goals" in done.stdout
    run = json.loads(data.read_text())
    assert run["op"] == "networks" and run["problems"] == []
    assert [len(s["cases"]) for s in run["sections"]] == [3, 1, 0]
    names = {TORCH, NATIVE} if framework == "torch" else set(IN_KERAS)
    for section in run["sections"][:2]:
        for case in section["cases"]:
            assert set(case["candidates"]) == names and case["skipped"] == {}
            for candidate in case["candidates"].values():
                launches = bool(candidate["kernels"])
                assert launches == (candidate["own"] and NOTHING not in case["name"])
    (measured,) = run["sections"][2]["memory"]
    assert set(measured["candidates"]) == set(networks.MEMORY_PAIRS[framework])
    assert len(run["goals"]) == len(networks.GOALS)
    figures = [g for g in run["goals"] if g["own"] in names and g["measured"] is not None]
    # Inference of what is fused and what is not, training of what is, and memory.
    assert len(figures) == (4 if framework == "torch" else 7)
    assert "<svg" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_peak_memory_of_a_step_holds_at_least_the_gradients(framework: str) -> None:
    require(framework)
    shape = parse_shape("cnn_mnist_keras B8")
    for name in networks.MEMORY_PAIRS[framework]:
        use = memory.measure("networks", name, framework, shape, "float32", threads=1)
        # The largest layer's alone; the activations of a batch are about as much.
        gradients = 4 * 32 * 13 * 13 * 128
        assert use.allocator is not None and 0.9 * gradients < use.allocator < 10 * gradients
