"""The benchmark of Conv+ReLU: its shapes, its float64 reference, and that layouts are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

from benchmarks import conv_relu, page
from benchmarks.conv_relu import parse_shape
from benchmarks.conv_shapes import ConvShape, Operands
from benchmarks.report import notes
from tests.conftest import require
from tests.test_benchmark_goals import EAGER, OWN, synthetic_run

SHAPES = (
    "N2 C6 9x7 K4 3x2 s2 p1 g2 NHWC",
    "N2 C1 8x8 K5 3x3 NHWC",
    "N2 C6 9x7 K4 1x1 NCHW",
    "N3 C4 17 K6 4 s3 p2 NCW",
)


def test_shapes_are_read_as_they_are_written() -> None:
    shapes = {shape for section in conv_relu.SECTIONS for shape in section.shapes}
    assert len(shapes) > 20
    for shape in shapes:
        assert parse_shape(str(shape)) == shape
    assert parse_shape("N8 C64 56x56 K128 3x3 s2 p1 NHWC") == ConvShape(
        8, 64, (56, 56), 128, (3, 3), 2, 1, 1, True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N8 C64 56x56 K64 3x3", "expected N8"),
        ("N8 C64 56x56 K64 3x3 p1 s2 NCHW", "expected N8"),
        ("N8 C64 56x56 K64 3 NCHW", "expected 2 sizes"),
        ("N8 C64 56x56 K64 3x3 NCW", "expected 1 sizes"),
        ("N8 C64 56x56 K64 3x3 s0 NCHW", "positive sizes"),
        ("N8 C64 56x56 K64 3x3 g3 NCHW", "groups that divide"),
        ("N8 C64 5x5 K64 7x7 NCHW", "fits into the image"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


@pytest.mark.parametrize("text", SHAPES)
def test_the_reference_is_a_convolution(text: str) -> None:
    torch = require("torch")
    shape = parse_shape(text)
    own = Operands.random(shape)
    conv = torch.nn.functional.conv1d if shape.spatial == 1 else torch.nn.functional.conv2d
    x, weight, bias = (torch.from_numpy(a) for a in (own.input, own.weight, own.bias))
    expected = conv(x, weight, bias, shape.stride, shape.padding, 1, shape.groups).relu()
    np.testing.assert_allclose(own.reference("forward")[0], expected.numpy(), atol=1e-12)
    assert 0.2 < expected.std() < 2


@pytest.mark.parametrize("kind", ["forward", "training"])
@pytest.mark.parametrize("text", SHAPES)
def test_candidates_of_torch_have_the_layout_of_the_shape(text: str, kind: Any) -> None:
    torch = require("torch")
    shape = parse_shape(text)
    case = conv_relu.case(kind, shape, "float32", ["torch"])
    assert case.skipped == {} and len(case.candidates) >= 4
    last = torch.channels_last if shape.spatial == 2 else torch.contiguous_format
    layout = last if shape.channels_last else torch.contiguous_format
    for candidate in case.candidates:
        with case.context():
            result = candidate.run()
        outputs = result if isinstance(result, tuple) else (result,)
        arrays = case.outputs(candidate, result)
        assert outputs[0].is_contiguous(memory_format=layout), candidate.name
        for array, expected in zip(arrays, case.reference, strict=True):
            np.testing.assert_allclose(array, expected, atol=1e-4, err_msg=candidate.name)


def test_the_first_layer_asks_for_no_gradient_of_its_input() -> None:
    passes = {}
    for text in ("N2 C3 9x9 K4 3x3 NCHW", "N2 C6 9x9 K4 3x3 NCHW"):
        forward, training = (
            conv_relu.case(kind, parse_shape(text), "float32", []) for kind in KINDS
        )
        passes[len(training.reference)] = training.flops / forward.flops
    assert passes == {3: 2.0, 4: 3.0}


KINDS: tuple[Any, ...] = ("forward", "training")


def test_flops_and_traffic() -> None:
    shape = parse_shape("N2 C6 9x7 K4 3x2 s2 p1 g2 NHWC")
    built = conv_relu.case("forward", shape, "bfloat16", [])
    output = 2 * 4 * 5 * 4
    assert built.flops == 2 * output * 3 * 3 * 2
    assert built.traffic == 2 * (2 * 6 * 9 * 7 + 4 * 3 * 3 * 2 + 4 + output)


def test_layouts_go_where_they_exist() -> None:
    served = {text: conv_relu.frameworks_of(parse_shape(text)) for text in SHAPES}
    assert list(served.values()) == [("torch", "tensorflow")] * 2 + [("torch",)] * 2
    assert conv_relu.frameworks_of(parse_shape("N3 C4 17 K6 4 NWC")) == ("tensorflow",)


def test_many_shapes_are_drawn_in_several_charts_and_notes_are_kept() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    shapes = conv_relu.SHAPES
    run = synthetic_run({shape: {OWN: 1.0, EAGER: 2.0} for shape in shapes})
    (section,) = run.sections
    pieces = list(page.parts(section))
    assert [c.shape for piece in pieces for c in piece.cases] == list(shapes)
    assert max(len(piece.cases) for piece in pieces) <= page.SHAPES_OF_A_CHART
    assert len(page.charts(run, section)) == 2 * len(pieces)
    assert page.tick(shapes[0]).replace("\n", " ") == str(shapes[0])
    section.cases[1].notes["peer"] = "packing is not counted"
    assert notes(section) == [f"{shapes[1]}: peer: packing is not counted"]
