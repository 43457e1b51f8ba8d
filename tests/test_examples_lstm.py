"""The examples on sequences: rows of digits and text, one start for both frameworks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

from examples import comparison, digits, exchange, models, sequences, training
from examples.networks import NETWORKS, SYMBOLS, TEXT_STEPS
from examples.training import Curve, Pair
from tests.conftest import Launched, require

# Fixtures of the tests of the other examples.
from tests.test_examples import ROOT, _one_thread, framework  # noqa: F401


@pytest.fixture(autouse=True)
def _data() -> None:
    pytest.importorskip("sklearn")


def test_rows_are_the_digits() -> None:
    rows, flat = sequences.load_rows(), digits.load()
    assert rows.inputs.shape == (1437, 8, 8) and rows.test_inputs.shape == (360, 8, 8)
    np.testing.assert_array_equal(rows.inputs[:, 3], flat.inputs[:, 24:32])
    np.testing.assert_array_equal(rows.targets, flat.targets)


def test_text_is_cut_into_pieces_with_what_follows() -> None:
    text = sequences.read_text()
    assert len(text) > 20_000 and text.isascii() and "Iris" in text
    data = sequences.load_text()
    pieces = (len(text) - 1) // TEXT_STEPS
    assert len(data.inputs) + len(data.test_inputs) == pieces
    assert len(data.test_inputs) == pieces // 10 and data.inputs.shape[1:] == (TEXT_STEPS,)
    for inputs, targets in ((data.inputs, data.targets), (data.test_inputs, data.test_targets)):
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        assert inputs.dtype == targets.dtype == np.int64
    symbols = "\n" + "".join(map(chr, range(32, 127)))
    assert len(symbols) == SYMBOLS
    for piece in data.inputs[:20]:
        assert "".join(symbols[s] for s in piece) in text


def test_encoding() -> None:
    assert sequences.encode("\n ~A").tolist() == [0, 1, 95, 34]
    assert sequences.encode("").tolist() == []


@pytest.mark.parametrize("name", ["lstm", "char_lstm"])
def test_all_four_runs_follow_one_curve(name: str) -> None:
    """Native and fused, torch and Keras, from the same weights."""
    require("torch")
    require("tensorflow")
    data, recipe = sequences.load_for(name), NETWORKS[name].recipe
    start = exchange.starts(name, data.sizes, ("torch", "keras"))
    pairs = [
        training.train(one, name, data, recipe, weights=weights) for one, weights in start.items()
    ]
    assert [pair.framework for pair in pairs] == ["torch", "keras"]
    steps = recipe.epochs * len(data.batches(0, recipe.batch))
    for pair in pairs:
        assert comparison.disagreements(pair, recipe, steps, NETWORKS[name].fusible) == []
        forward = sum(n for kernel, n in pair.fused.kernels.items() if "lstm_forward" in kernel)
        assert forward == steps + 1  # and once for the test data
        assert pair.fused.explanation.count("lstm_forward") == 1
        for curve in (pair.native, pair.fused):
            assert curve.losses[-1] < 0.7 * curve.losses[0]
            assert curve.score > (0.9 if name == "lstm" else 0.4)
    assert comparison.framework_distance(pairs) < comparison.FRAMEWORK_TOLERANCE / 10
    scores = [curve.score for pair in pairs for curve in (pair.native, pair.fused)]
    assert max(scores) - min(scores) < 0.01


def test_both_frameworks_start_alike() -> None:
    """The first outputs are the same, and torch's are those of its own network."""
    require("torch")
    require("tensorflow")
    for name in ("lstm", "char_lstm"):
        data, recipe = sequences.load_for(name), NETWORKS[name].recipe
        start = exchange.starts(name, data.sizes, ("torch", "keras"))
        found = []
        for one, weights in start.items():
            model = models.build(one, name, data.sizes, recipe, fused=False)
            if one == "torch":
                assert all(map(np.array_equal, model.weights(), weights))
            model.load(weights)
            found.append(model.predict(data.test_inputs[:9]))
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)
        assert found[0].std() > 1e-3
    assert exchange.starts("rnn", (8, 8), ("torch", "keras")) == {}
    assert exchange.starts("lstm", (8, 8), ("torch",)) == {}


def test_second_bias_of_torch_stays_zero() -> None:
    require("torch")
    data, recipe = sequences.load_rows(), NETWORKS["lstm"].recipe
    model: Any = models.build("torch", "lstm", data.sizes, recipe, fused=True)
    model.step(data.inputs[:32], data.targets[:32])
    named = dict(model.model.named_parameters())
    assert not named["0.layer.bias_hh_l0"].any() and named["0.layer.bias_ih_l0"].any()


def test_rnn_stays_native(
    framework: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    launched: Launched,
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--network", "rnn", "--framework", framework, "--epochs", "2"]
    with launched("", times=0):
        assert sequences.main([*arguments, "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "fused kernels" in output and "none" in output
    assert "rnn: no fused kernel computes a layer of it, so it stays native" in output


def pair_of(framework: str, native: list[float], fused: list[float]) -> Pair:  # noqa: F811
    return Pair("net", framework, Curve(native), Curve(fused), 0.0)


@pytest.mark.parametrize("which", ["native", "fused"])
@pytest.mark.parametrize(("last", "apart"), [(0.5, 0.0), (0.6, 0.05), (float("nan"), np.inf)])
def test_frameworks_that_part_are_found(which: str, last: float, apart: float) -> None:
    curve, other = [2.0, 0.5], [2.0, last]
    runs = (other, curve) if which == "native" else (curve, other)
    pairs = [pair_of("torch", curve, curve), pair_of("keras", *runs)]
    assert comparison.framework_distance(pairs) == pytest.approx(apart)


def test_other_weights_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An exchange that mistakes the order of the gates."""
    pytest.importorskip("matplotlib")
    require("torch")
    require("tensorflow")
    right = exchange.starts

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        found["keras"][0] = np.roll(found["keras"][0], 64, axis=1)
        return found

    monkeypatch.setattr(comparison, "starts", wrong)
    arguments = ["--network", "lstm", "--epochs", "2", "--output", str(tmp_path)]
    assert sequences.main(arguments) == 1
    assert "lstm: torch from keras: losses from the same weights" in capsys.readouterr().out


def test_a_fused_lstm_without_kernels_is_found(framework: str) -> None:  # noqa: F811
    import twinfuse

    data = sequences.load_rows()
    recipe = dataclasses.replace(NETWORKS["lstm"].recipe, epochs=1)
    with twinfuse.use_backend("reference"):
        pair = training.train(framework, "lstm", data, recipe)
    found = comparison.disagreements(pair, recipe, 45, NETWORKS["lstm"].fusible)
    assert [text.split(": ", 1)[1] for text in found] == [
        f"0 kernels lstm_{role} ran, expected 45" for role in ("forward", "backward")
    ]


@pytest.mark.slow
def test_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    present = training.available("both")
    if not present:
        pytest.skip("neither torch nor tensorflow is installed")
    done = subprocess.run(
        [sys.executable, "-m", "examples.sequences", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("loss, epoch 6", "test accuracy", "lstm_backward", "follow the same curve"):
        assert text in done.stdout
    if len(present) == 2:
        assert done.stdout.count("torch from keras: losses from the same weights") == 2
    for network in sequences.NETWORKS:
        assert (tmp_path / f"{network}.png").stat().st_size > 20_000
