"""The reference networks at their printed sizes, fused and native in both frameworks."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("rich")

from examples import cifar, digits, mnist, models, training
from examples.models import Model
from examples.networks import NETWORKS, keras_network, torch_network
from examples.training import Data
from tests.conftest import Launched, require
from tests.rule import assert_within_twice

BATCH, STEPS, DRAWS = 4, 3, 3

# Sizes of the weights in the order of torch; convolutions [K, C, R, S], products [N, K].
PRINTED = {
    "mlp_784": [(128, 784), (64, 128), (10, 64)],
    "mlp_784_keras": [(128, 784), (64, 128), (10, 64)],
    "mlp_regression": [(10, 1), (1, 10)],
    "linear_regression": [(1, 1)],
    "lenet_cifar": [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)],
    "convnet_mnist": [(32, 1, 3, 3), (128, 21632), (10, 128)],
    "small_cnn_mnist": [(6, 1, 3, 3), (120, 294), (84, 120), (10, 84)],
    "cnn_mnist_keras": [(32, 1, 3, 3), (128, 32 * 13 * 13), (10, 128)],
    "cnn2_mnist_keras": [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64 * 5 * 5), (10, 128)],
    "cnn2_mnist": [(32, 1, 3, 3), (64, 32, 3, 3), (128, 9216), (10, 128)],
}
# Of the sizes that nothing prints: four gates of 64, one of 64.
RECURRENT = {
    "lstm": [(256, 8), (256, 64), (256,), (10, 64), (10,)],
    "rnn": [(64, 8), (64, 64), (64,), (10, 64), (10,)],
    "char_lstm": [(96, 16), (256, 16), (256, 64), (256,), (96, 64), (96,)],
}


@pytest.fixture(params=("torch", "keras"))
def framework(request: pytest.FixtureRequest) -> str:
    require(training.FRAMEWORKS[request.param])
    name: str = request.param
    return name


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_printed_sizes(name: str, framework: str) -> None:
    if framework == "torch":
        parameters = (p for p in torch_network(name).parameters() if p.requires_grad)
        found = [tuple(p.shape) for p in parameters]
    elif name in RECURRENT:
        weights = keras_network(name).get_weights()
        embedding = name == "char_lstm"
        found = [w.shape if i < embedding else w.T.shape for i, w in enumerate(weights)]
    else:
        order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
        weights = keras_network(name).get_weights()
        found = [tuple(w.shape[i] for i in order[w.ndim]) for w in weights]
    if name in RECURRENT:
        assert found == RECURRENT[name]
    else:
        assert found == [sizes for weight in PRINTED[name] for sizes in (weight, weight[:1])]


def test_training_is_as_printed() -> None:
    lenet = NETWORKS["lenet_cifar"].recipe
    assert (lenet.optimizer, lenet.learning_rate, lenet.momentum) == ("sgd", 1e-3, 0.9)
    assert (lenet.batch, lenet.epochs) == (4, 10)
    for name in ("mlp_784", "cnn_mnist_keras", "cnn2_mnist_keras", "cnn2_mnist"):
        recipe = NETWORKS[name].recipe
        assert (recipe.optimizer, recipe.learning_rate, recipe.epochs) == ("adam", 1e-3, 10)


def test_momentum_is_used(framework: str) -> None:
    data = random_data("small_cnn_mnist")
    recipe = NETWORKS["small_cnn_mnist"].recipe
    after = []
    for momentum in (recipe.momentum, 0.0):
        changed = dataclasses.replace(recipe, momentum=momentum)
        model = models.build(framework, "small_cnn_mnist", data.sizes, changed, fused=False)
        for _ in range(2):
            model.step(data.inputs[:BATCH], data.targets[:BATCH])
        after.append(np.concatenate([w.ravel() for w in model.weights()]))
    assert np.abs(after[0] - after[1]).max() > 1e-6


def random_data(name: str, draw: int = 0) -> Data:
    """Random inputs of the printed sizes, with labels: a batch for each step and one more."""
    random = np.random.default_rng(draw)
    count = BATCH * (STEPS + 1)
    sizes = (count, *NETWORKS[name].inputs)
    if name == "char_lstm":
        inputs, targets = random.integers(0, 96, (2, *sizes))
        return Data(inputs, targets, inputs, targets)
    inputs = random.standard_normal(sizes, np.float32)
    if NETWORKS[name].recipe.loss == "mse":
        targets = random.standard_normal((count, 1), np.float32)
    else:
        targets = random.integers(0, 10, count)
    return Data(inputs, targets, inputs, targets)


@contextmanager
def float64(framework: str) -> Iterator[None]:
    """Models built inside compute in float64."""
    if framework == "torch":
        import torch

        set_to: Callable[[Any], None] = torch.set_default_dtype
        old, new = torch.get_default_dtype(), torch.float64
    else:
        import keras

        set_to = keras.config.set_dtype_policy
        old, new = keras.config.dtype_policy(), "float64"
    set_to(new)
    try:
        yield
    finally:
        set_to(old)


@dataclasses.dataclass
class Trio:
    """The same network three times, with the same weights; nothing is dropped in any."""

    reference: Model
    native: Model
    fused: Model

    @classmethod
    def build(cls, framework: str, name: str) -> Trio:
        network = NETWORKS[name]

        def make(fused: bool) -> Model:
            return models.build(framework, name, network.inputs, network.recipe, fused)

        with float64(framework):
            reference = make(False)
        trio = cls(reference, make(False), make(True))
        weights = trio.native.weights()
        for model in (trio.reference, trio.native, trio.fused):
            model.load([w.astype(model.weights()[0].dtype) for w in weights])
            whole(model)  # random numbers for float32 and float64 are not the same
        return trio

    def each(self, call: Callable[[Model, Any], Any], inputs: NDArray[Any]) -> list[Any]:
        wide = inputs.astype(np.float64) if inputs.dtype == np.float32 else inputs
        return [call(self.reference, wide), call(self.native, inputs), call(self.fused, inputs)]


def whole(model: Any) -> Model:
    """The model, which drops nothing from now on."""
    for layer in model.model.layers if isinstance(model, models.KerasModel) else model.model:
        if type(layer).__name__ == "Dropout":
            layer.p = layer.rate = 0.0
    found: Model = model
    return found


@contextmanager
def all_fusible(network: str, direction: str, launched: Launched) -> Iterator[None]:
    """Every layer that an op computes runs fused once, and nothing else does."""
    with ExitStack() as stack:
        for op, layers in NETWORKS[network].fusible.items():
            stack.enter_context(launched(f"{op}_{direction}_", layers))
        yield


def errors(trio: Trio, data: Data, network: str, launched: Launched) -> Iterator[str]:
    """What breaks the rule: outputs, gradients, or outputs after some steps of training."""
    inputs, targets = data.inputs[:BATCH], data.targets[:BATCH]
    with all_fusible(network, "forward", launched):
        outputs = trio.each(lambda model, x: model.predict(x), inputs)
    yield from broken(outputs, "outputs")
    with all_fusible(network, "backward", launched):
        gradients = trio.each(lambda model, x: model.gradients(x, targets), inputs)
    for number, found in enumerate(zip(*gradients, strict=True)):
        yield from broken(found, f"gradient {number}")
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        trio.each(lambda model, x, b=batch: model.step(x, data.targets[b]), data.inputs[batch])  # type: ignore[misc]
    outputs = trio.each(lambda model, x: model.predict(x), data.inputs[-BATCH:])
    yield from broken(outputs, f"outputs after {STEPS} steps")


def broken(found: Sequence[Any], what: str) -> Iterator[str]:
    reference, native, fused = (np.asarray(f) for f in found)
    try:
        assert_within_twice(fused, native, reference.astype(np.float64), what, dtype="float32")
    except AssertionError as error:
        yield str(error)


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_compute_what_native_ones_do(
    name: str, framework: str, launched: Launched
) -> None:
    """By the rule, with the native network in float64 as the reference."""
    found = []
    for draw in range(DRAWS):
        trio, data = Trio.build(framework, name), random_data(name, draw)
        found += list(errors(trio, data, name, launched))[:1]
    # Rounding may switch a ReLU or a maximum for one draw; an error shows in all.
    assert len(found) <= DRAWS // 2, found


@pytest.mark.parametrize("name", NETWORKS)
def test_unfused_networks_are_native_again(name: str, framework: str, launched: Launched) -> None:
    """Outputs and gradients, in every bit; and what `explain` says before and after."""
    network, data = NETWORKS[name], random_data(name)

    def results(model: Model) -> list[NDArray[Any]]:
        outputs = model.predict(data.inputs[:BATCH])
        return [outputs, *model.gradients(data.inputs[:BATCH], data.targets[:BATCH])]

    native, fused = (
        whole(models.build(framework, name, network.inputs, network.recipe, fused))
        for fused in (False, True)
    )
    side: Any = importlib.import_module(f"twinfuse.{framework}")
    inner: Any = fused
    computed = sum(row.backend == "cpu" for row in side.explain(inner.model))
    assert computed == sum(network.fusible.values())
    side.unfuse(inner.model)
    rows = side.explain(inner.model)
    assert rows and {row.backend for row in rows} == {"native"}
    with launched("", times=0):
        for ours, theirs in zip(results(fused), results(native), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_linear_regression_is_reported_as_native(framework: str) -> None:
    network = NETWORKS["linear_regression"]
    model = models.build(framework, "linear_regression", network.inputs, network.recipe, True)
    reason = "no ReLU follows" if framework == "torch" else "its activation is linear"
    assert "native" in model.explanation and reason in model.explanation


def test_what_is_dropped_is_dropped_in_both(framework: str) -> None:
    """Native and fused draw the same random numbers, and none when they predict."""
    data = random_data("cnn2_mnist")
    network = NETWORKS["cnn2_mnist"]
    native, fused = (
        models.build(framework, "cnn2_mnist", network.inputs, network.recipe, fused)
        for fused in (False, True)
    )
    mine, theirs = (model.gradients(data.inputs, data.targets)[0] for model in (fused, native))
    kept = whole(native).gradients(data.inputs, data.targets)[0]
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(kept - theirs).max() > 0.1 * np.abs(theirs).max()
    np.testing.assert_array_equal(fused.predict(data.inputs), fused.predict(data.inputs))


def test_digits_are_enlarged_without_loss() -> None:
    pytest.importorskip("sklearn")
    data = digits.load()
    for name, side, first in (("lenet_cifar", 32, 0), ("cnn_mnist_keras", 28, 2)):
        larger = digits.load_for(name)
        assert larger.inputs.shape == (1437, *NETWORKS[name].inputs)
        times = side // 8
        inside = larger.inputs[:, -1, first::times, first::times][:, :8, :8]
        np.testing.assert_array_equal(inside.reshape(-1, 64), data.inputs)
        total = data.inputs.sum(dtype=np.float64) * times**2
        assert larger.inputs[:, 0].sum(dtype=np.float64) == pytest.approx(total)
    assert digits.load_for("mlp_784").sizes == (64,)


@pytest.mark.parametrize("source", ["torchvision", "keras"])
def test_cifar_and_mnist_from_the_frameworks_own_loaders(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loaders' results have the shapes and types of the real ones; nothing is fetched."""
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (5, 32, 32, 3), np.uint8)
    grey = random.integers(0, 256, (5, 28, 28), np.uint8)
    labels = np.array([3, 1, 4, 1, 5])
    if source == "torchvision":
        torch = require("torch")

        def loader(data: Any, targets: Any) -> Any:
            return lambda root, train: types.SimpleNamespace(data=data, targets=targets)

        module = types.ModuleType("torchvision.datasets")
        module.CIFAR10 = loader(colour, labels.tolist())  # type: ignore[attr-defined]
        module.MNIST = loader(torch.from_numpy(grey), torch.from_numpy(labels))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    else:
        keras = require("keras")
        column = labels[:, None].astype(np.uint8)
        for name, parts in (("cifar10", (colour, column)), ("mnist", (grey, labels))):
            package = getattr(keras.datasets, name)
            monkeypatch.setattr(package, "load_data", lambda parts=parts: (parts, parts))
    data = cifar.SOURCES[source](tmp_path)
    assert data.inputs.shape == (5, 3, 32, 32) and data.inputs.dtype == np.float32
    np.testing.assert_allclose(data.inputs[1, 2], colour[1, :, :, 2] / 127.5 - 1, atol=1e-6)
    for found in (data, mnist.SOURCES[source](tmp_path)):
        np.testing.assert_array_equal(found.test_targets, labels)
        assert found.targets.dtype == np.int64
    np.testing.assert_allclose(mnist.SOURCES[source](tmp_path).inputs[:, 0], grey / 255, atol=1e-6)


def test_lenet_trains_as_printed_on_images_in_the_layout_of_cifar(
    framework: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On digits, through the command line: batch 4, and the article's variant with 100."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    data = digits.load_for("lenet_cifar")
    images = np.moveaxis(255 * data.inputs, 1, -1).astype(np.uint8)
    few = (images[:200], data.targets[:200])
    monkeypatch.setitem(cifar.SOURCES, "torchvision", lambda folder: cifar.prepare(few, few))
    common = ["--data", str(tmp_path), "--framework", framework, "--output", str(tmp_path)]
    for arguments, steps in (([], 100), (["--batch", "100"], 4)):
        assert cifar.main([*common, "--epochs", "2", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        (backward,) = (line for line in lines if line.startswith("│ conv_relu_backward"))
        assert f"x {2 * steps} " in backward


def test_cifar_needs_a_folder_or_keras(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cifar.main([])
    assert "--data is needed with --source torchvision" in capsys.readouterr().err
