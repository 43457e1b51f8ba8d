"""`torch.compile` with fused ops: the pass for Inductor, and the backend named twinfuse."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launched, require
from tests.rule import assert_within_twice

torch = require("torch")

import torch._inductor.config as inductor  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LINEAR, CONV = "linear_relu_forward_f32", "conv_relu_forward_f32"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(11)


class Network(nn.Module):
    """All forms of ReLU, behind a forward method that fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding="same", padding_mode="zeros")
        self.conv2 = nn.Conv1d(6, 4, 5, stride=2, groups=2, bias=False)
        self.fc1, self.fc2, self.fc3 = nn.Linear(120, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.activation = nn.ReLU(inplace=True)
        self.cached: dict[str, Any] = {}

    def forward(self, x: Any) -> Any:
        if x.dim() != 4:
            raise ValueError
        x = self.conv2(self.activation(self.conv1(x)).flatten(2)).relu()
        for layer in (self.fc1, self.fc2):
            x = torch.relu(layer(x.flatten(1)))
        return self.fc3(x).relu_() + F.relu(x).sum()


def images(dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    return torch.randn(3, 2, 8, 8).to(dtype)


def run(model: Any, parameters: Any, dtype: Any = torch.float32) -> list[Any]:
    x = images(dtype).requires_grad_()
    y = model(x)
    results = (y, *torch.autograd.grad(y.pow(2).sum(), (x, *parameters)))
    return [result.detach().numpy() for result in results]


def compiled(model: Any, min_size: int = 0, **options: Any) -> Any:
    settings = {"pre_grad_custom_pass": tft.compile_pass(min_size)}
    return torch.compile(model, fullgraph=True, options=settings, **options)


def test_outputs_and_gradients(launched: Launched) -> None:
    model = Network()
    double = copy.deepcopy(model).double()
    reference = run(double, list(double.parameters()), torch.float64)
    native = run(model, list(model.parameters()))
    fused = compiled(model)
    with launched(LINEAR, 3), launched(CONV, 2), launched("linear_relu_backward_f32", 3):
        got = run(fused, list(model.parameters()))
    names = ("output", "input", *(name for name, _ in model.named_parameters()))
    for values in zip(got, native, reference, names, strict=True):
        assert_within_twice(*values, dtype="float32")


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        return y.relu() + y


def graph_of(model: Any, *inputs: Any) -> Any:
    """As the pass gets it."""
    graphs = []

    def keep(module: Any, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    return graphs[0]


def count_of_fused(graph: Any, min_size: int = 0) -> int:
    tft.compile_pass(min_size)(graph)
    graph.lint()
    return sum("twinfuse" in str(node.target) for node in graph.nodes)


def test_small_layers_are_left_to_inductor() -> None:
    # Multiply-adds: 3*6*64*2*9 + 3*4*30*3*5 in the convolutions, 3*16*(120 + 16 + 4) after them.
    for limit, count in ((0, 5), (500, 4), (5_400, 3), (5_401, 2), (20_736, 1), (20_737, 0)):
        assert count_of_fused(graph_of(Network(), images()), limit) == count
        torch._dynamo.reset()


@pytest.mark.allow_fallback
def test_what_no_kernel_serves_is_left_to_inductor() -> None:
    assert count_of_fused(graph_of(UsedTwice(), torch.randn(2, 8))) == 0
    function = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert count_of_fused(graph_of(function, torch.randn(2, 8))) == 1
    with twinfuse.use_backend("reference"):
        assert count_of_fused(graph_of(function, torch.randn(2, 8))) == 0
    torch._dynamo.reset()
    numbers = torch.arange(6).reshape(2, 3)
    assert count_of_fused(graph_of(lambda x: F.linear(x, x).relu(), numbers)) == 0


FC = nn.Linear(8, 8)


def writes_to_input(x: Any) -> Any:
    x = x.clone()
    h = F.linear(x, FC.weight.detach(), FC.bias)
    x.mul_(0)
    return F.relu(h) + x


def writes_to_weight(x: Any) -> Any:
    weight = FC.weight.detach().clone()
    h = F.linear(x, weight)
    weight.mul_(0.5)
    return h.relu_()


def without_gradients(x: Any) -> Any:
    with torch.no_grad():
        h = FC(x)
    return F.relu(h)


def relu_without_gradients(x: Any) -> Any:
    h = FC(x)
    with torch.no_grad():
        return F.relu(h)


def in_inference_mode(x: Any) -> Any:
    with torch.inference_mode():
        h = FC(x)
    return F.relu(h)


def in_autocast(x: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = FC(x)
    return F.relu(h)


BETWEEN = {
    writes_to_input: 1,
    writes_to_weight: 1,
    without_gradients: 0,
    relu_without_gradients: 0,
    in_inference_mode: 0,
    in_autocast: 0,
}


@pytest.mark.parametrize("function", BETWEEN)
def test_what_stands_between_layer_and_relu(function: Any, launched: Launched) -> None:
    x = torch.randn(4, 8)
    assert count_of_fused(graph_of(function, x)) == BETWEEN[function]
    torch._dynamo.reset()
    expected = function(x)
    with launched(LINEAR, BETWEEN[function]):
        got = compiled(function)(x)
    assert (got.dtype, got.requires_grad) == (expected.dtype, expected.requires_grad)
    tolerance = torch.finfo(got.dtype).eps * 10
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_dynamic_shapes(launched: Launched) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fused = compiled(model, 2**16, dynamic=True)
    for rows in (3, 5, 2000):
        x = torch.randn(rows, 8)
        with launched(LINEAR, 1):
            torch.testing.assert_close(fused(x), model(x))


def normed() -> Any:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
    model(images() * 2 + 1)
    return model.eval()


def test_exported_with_a_size_that_is_not_known() -> None:
    native, x = normed(), torch.randn(2, 2, 16, 16)
    sizes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    fused = torch.export.export(tft.fuse(native), (x,), dynamic_shapes=sizes).module()
    for count in (1, 5, 300):  # 65_536 elements are 128 images
        x = torch.randn(count, 2, 16, 16)
        torch.testing.assert_close(fused(x), native(x))


def test_traced_symbolically() -> None:
    native = normed()
    traced = torch.fx.symbolic_trace(tft.fuse(native))
    assert torch.equal(traced(images()), native(images()))


def test_passes_are_told_apart() -> None:
    assert tft.compile_pass().uuid() == tft.compile_pass().uuid()
    assert tft.compile_pass(0).uuid() != tft.compile_pass(1).uuid()
    assert twinfuse.__version__ in tft.compile_pass().uuid()
    native = tft.compile_pass().uuid()
    with twinfuse.use_backend("reference"):
        assert tft.compile_pass().uuid() != native


def entry_point() -> EntryPoint:
    tomllib = pytest.importorskip("tomllib")
    group = "torch_dynamo_backends"
    (item,) = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][group].items()
    return EntryPoint(*item, group)


def test_backend(launched: Launched) -> None:
    model, x = nn.Sequential(nn.Linear(256, 64), nn.ReLU()), torch.randn(4, 256)
    seen: list[Any] = []
    others = (seen.append,)
    fused = torch.compile(
        model,
        backend=entry_point().load(),
        options={"pre_grad_custom_pass": others, "pre_grad_pass_timing": "early"},
    )
    with launched(LINEAR, 1):
        torch.testing.assert_close(fused(x), model(x))
    assert seen and inductor.pre_grad_custom_pass is None


@pytest.mark.slow
def test_backend_by_its_name(tmp_path: Path) -> None:
    info = tmp_path / "backend-1.dist-info"
    info.mkdir()
    point = entry_point()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{point.group}]\n{point.name} = {point.value}\n")
    program = """
import sys, torch, twinfuse
assert "twinfuse" in torch.compiler.list_backends()
model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU())
model, x = torch.compile(model, backend="twinfuse"), torch.randn(4, 256)
model(x).sum().backward()
print(sum(twinfuse.launches().values()))
"""
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    output = subprocess.check_output(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, text=True
    )
    assert output == "2\n"


def test_importing_the_package_imports_no_compiler() -> None:
    program = "import sys, twinfuse.torch; print('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
