"""The examples: they train, native and fused agree, and what is wrong is found."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("rich")

import twinfuse
from examples import comparison, digits, mnist, models, regression, training
from examples.networks import NETWORKS, Recipe
from examples.training import Curve, Data, Pair
from tests.conftest import require

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("torch", "keras")
MLP = "mlp_784"
FUSIBLE = NETWORKS[MLP].fusible["linear_relu"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other make these small networks crawl on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    require(training.FRAMEWORKS[request.param])
    name: str = request.param
    return name


def load_digits() -> Data:
    pytest.importorskip("sklearn")
    return digits.load()


def test_digits_are_split_once_for_all() -> None:
    data = load_digits()
    assert data.inputs.shape == (1437, 64) and data.test_inputs.shape == (360, 64)
    assert data.inputs.dtype == np.float32 and 0 <= data.inputs.min() < data.inputs.max() == 1
    assert set(data.test_targets) == set(range(10))
    np.testing.assert_array_equal(data.inputs, digits.load().inputs)
    batches = data.batches(3, 32)
    assert sorted(np.concatenate(batches)) == list(range(1437)) and len(batches[0]) == 32
    np.testing.assert_array_equal(batches[0], data.batches(3, 32)[0])
    assert (batches[0] != data.batches(4, 32)[0]).any()


def test_training_learns_and_fused_follows_native(framework: str) -> None:
    data, recipe = load_digits(), NETWORKS[MLP].recipe
    epochs_done: list[None] = []
    pair = training.train(framework, MLP, data, recipe, lambda: epochs_done.append(None))
    native, fused = pair.native, pair.fused
    assert len(epochs_done) == 2 * recipe.epochs == 2 * len(native.seconds)
    assert native.score > 0.9 and abs(native.score - fused.score) < 0.01
    assert native.losses[0] > 1 > 0.2 > native.losses[-1]
    assert pair.gradient_distance < comparison.GRADIENT_TOLERANCE
    assert comparison.loss_distance(pair) < comparison.LOSS_TOLERANCE
    assert list(fused.checkpoints) == list(range(recipe.epochs + 1))
    steps = recipe.epochs * len(data.batches(0, recipe.batch))
    assert comparison.disagreements(pair, recipe, steps, NETWORKS[MLP].fusible) == []
    forward = sum(n for name, n in fused.kernels.items() if "linear_relu_forward" in name)
    assert forward == FUSIBLE * (steps + 1)  # and once for the test data
    assert fused.explanation.count("linear_relu_forward") == FUSIBLE
    assert native.kernels == {}


def test_models_start_alike_and_gradients_are_those_of_the_step(framework: str) -> None:
    data, recipe = load_digits(), NETWORKS[MLP].recipe
    first, second = (models.build(framework, MLP, (64,), recipe, fused=False) for _ in range(2))
    start = first.weights()
    for mine, other in zip(start, second.weights(), strict=True):
        np.testing.assert_array_equal(mine, other)
    batch = data.batches(0, recipe.batch)[0]
    gradients = first.gradients(data.inputs[batch], data.targets[batch])
    first.step(data.inputs[batch], data.targets[batch])
    for before, after, gradient in zip(start, first.weights(), gradients, strict=True):
        # Adam's first step is the sign of the gradient times the rate.
        large = np.abs(gradient) > 1e-3  # far above Adam's epsilon
        expected = -recipe.learning_rate * np.sign(gradient)[large]
        np.testing.assert_allclose((after - before)[large], expected, rtol=2e-2)
        assert large.any()
    first.load(start)
    for mine, other in zip(first.weights(), start, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_gradient_that_lacks_a_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    require("torch")
    data, recipe = load_digits(), dataclasses.replace(NETWORKS[MLP].recipe, epochs=2)
    right = models.TorchModel.gradients

    def wrong(self: Any, inputs: Any, targets: Any) -> Any:
        rows = len(inputs) - 1 if self.explanation else len(inputs)
        found = right(self, inputs[:rows], targets[:rows])
        return [g * rows / len(inputs) for g in found]

    monkeypatch.setattr(models.TorchModel, "gradients", wrong)
    pair = training.train("torch", MLP, data, recipe)
    assert pair.gradient_distance > 100 * comparison.GRADIENT_TOLERANCE


def test_a_fused_run_without_kernels_is_found(framework: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    with twinfuse.use_backend("reference"):
        status = digits.main(
            [
                *("--network", MLP, "--framework", framework),
                *("--epochs", "1", "--output", str(tmp_path)),
            ]
        )
    assert status == 1


def pair_of(fused: list[float], kernels: dict[str, int], apart: float = 1e-7) -> Pair:
    native = Curve([2.0, 1.0, 0.5])
    return Pair("net", "torch", native, Curve(fused, kernels=kernels), apart)


RAN = {"linear_relu_forward_f32": 11, "linear_relu_backward_f32": 10}
RECIPE = Recipe(3, 32, "adam", 1e-3, "cross_entropy")


@pytest.mark.parametrize(
    ("fused", "kernels", "fusible", "expected"),
    [
        ([2.0, 1.0, 0.5], RAN, 1, None),
        ([2.0, 1.01, 0.5], RAN, 1, None),
        ([2.0, 1.06, 0.5], RAN, 1, "the losses are 3.0e-02 apart"),
        ([2.0, float("nan"), 0.5], RAN, 1, "the losses are inf apart"),
        ([2.0, 1.0, 0.5], RAN, 2, "11 kernels linear_relu_forward ran, expected 20"),
        ([2.0, 1.0, 0.5], {"linear_relu_forward_f32": 11}, 1, "0 kernels linear_relu_backward ran"),
        ([2.0, 1.0, 0.5], RAN, 0, "11 kernels linear_relu_forward ran, expected 0"),
        ([2.0, 1.0, 2.5], RAN, 1, "the fused loss did not fall"),
    ],
)
def test_disagreements(
    fused: list[float], kernels: dict[str, int], fusible: int, expected: str | None
) -> None:
    found = comparison.disagreements(
        pair_of(fused, kernels), RECIPE, 10, {"linear_relu": fusible, "conv_relu": 0}
    )
    assert bool(found) == (expected is not None)
    assert expected is None or any(expected in text for text in found)


@pytest.mark.parametrize("apart", [2e-5, float("nan")])
def test_other_gradients_and_native_kernels_are_found(apart: float) -> None:
    pair = pair_of([2.0, 1.0, 0.5], RAN, apart)
    pair.native.kernels = {"linear_relu_forward_f32": 1}
    found = comparison.disagreements(pair, RECIPE, 10, {"linear_relu": 1})
    assert len(found) == 2
    assert "gradients from the same weights" in found[0]
    assert "native run launched fused kernels" in found[1]


@pytest.mark.slow
def test_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    present = training.available("both")
    if not present:
        pytest.skip("neither torch nor tensorflow is installed")
    plots = tmp_path / "new"
    done = subprocess.run(
        [sys.executable, "-m", "examples.digits", "--output", str(plots)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("loss, epoch 10", "test accuracy", "ms per epoch", "follow the same curve"):
        assert text in done.stdout
    for name in present:
        assert f"{name} native" in done.stdout and f"{name} fused" in done.stdout
    assert "conv_relu_backward" in done.stdout
    for network in digits.EPOCHS:
        plot = plots / f"{network}.png"
        assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000


def test_a_missing_framework_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    require("torch")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )
    arguments = ["--network", MLP, "--epochs", "2", "--output", str(tmp_path)]
    assert digits.main(arguments) == 0
    output = capsys.readouterr().out
    assert "left out: keras (tensorflow is not installed)" in output
    assert "torch fused" in output and "keras native" not in output
    with pytest.raises(SystemExit, match="nothing to train"):
        digits.main(["--framework", "keras"])


def test_linear_regression_stays_native_and_says_so(
    framework: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    status = regression.main(
        [
            *("--network", "linear_regression", "--framework", framework),
            *("--epochs", "20", "--output", str(tmp_path)),
        ]
    )
    output = capsys.readouterr().out
    assert status == 0 and "fused kernels" in output and "none" in output
    assert ("no ReLU follows" if framework == "torch" else "its activation is linear") in output


def test_mlp_regression_runs_fused(
    framework: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    status = regression.main(
        [
            *("--network", "mlp_regression", "--framework", framework),
            *("--epochs", "4", "--output", str(tmp_path)),
        ]
    )
    assert status == 0
    output = capsys.readouterr().out
    assert "linear_relu_backward" in output and "x 400" in output and "x 401" in output


def test_linear_regression_finds_the_line() -> None:
    require("torch")
    name = "linear_regression"
    pair = training.train("torch", name, regression.load(), NETWORKS[name].recipe)
    for curve in (pair.native, pair.fused):
        assert curve.score < 1e-3 and curve.losses[-1] < 0.02
    assert len(pair.fused.checkpoints) == 11


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(s.to_bytes(4, "big") for s in array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """Real digits, enlarged to 28x28, in files of MNIST's format; one of them gzipped."""
    data = load_digits()
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, name in mnist.FILES.items():
        values: Any = getattr(data, part)
        if "inputs" in part:
            values = 255 * digits.enlarged(values, (1, 28, 28))[:, 0]
        ending = ".gz" if part == "inputs" else ""
        write_idx(folder / f"{name}{ending}", values.astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize(("network", "epochs"), [(MLP, "3"), ("cnn_mnist_keras", "2")])
def test_mnist_from_files(
    mnist_folder: Path,
    framework: str,
    network: str,
    epochs: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    status = mnist.main(
        [
            *("--data", str(mnist_folder), "--framework", framework, "--network", network),
            *("--epochs", epochs, "--output", str(mnist_folder)),
        ]
    )
    assert status == 0 and (mnist_folder / f"{network}.png").exists()
    output = capsys.readouterr().out
    accuracy = output.split("test accuracy")[1].split("%")[0].split("│")[-1]
    assert float(accuracy) > 85


def test_idx_files_are_read_as_written_or_refused(mnist_folder: Path) -> None:
    data = mnist.from_idx(mnist_folder)
    assert data.inputs.shape == (1437, 1, 28, 28) and data.inputs.max() == 1
    np.testing.assert_array_equal(data.test_targets, load_digits().test_targets)
    raw = mnist_folder / "MNIST" / "raw"
    labels = raw / mnist.FILES["test_targets"]
    whole = labels.read_bytes()
    for broken, message in (
        (whole[:-1], r"expected \[360\] bytes of data, got 359"),
        (b"\0\0\x0d" + whole[3:], "expected an IDX file"),
        (b"PK\3\4", "expected an IDX file"),
        (whole[:6], "expected a header of 8 bytes, got 6"),
    ):
        labels.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            mnist.from_idx(mnist_folder)
    write_idx(labels, np.zeros(10, np.uint8))
    with pytest.raises(ValueError, match="as many labels as images"):
        mnist.from_idx(mnist_folder)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="no t10k-labels-idx1-ubyte"):
        mnist.from_idx(mnist_folder)
    with pytest.raises(SystemExit):
        mnist.main([])


@pytest.mark.slow
def test_quickstart(framework: str) -> None:
    path = ROOT / "examples" / f"quickstart_{framework}.py"
    assert sum(1 for line in path.read_text().splitlines() if line.strip()) <= 8
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "linear_relu_forward" in done.stdout
