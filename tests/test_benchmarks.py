"""The benchmark: statistics on known timings, limits of this machine, and real short runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

from benchmarks import conv_relu, linear_relu, memory, operands
from benchmarks.candidates import NATIVE
from benchmarks.goals import MEMORY_RESOLUTION
from benchmarks.harness import (
    Candidate,
    Settings,
    Spread,
    Timing,
    calibrate,
    geometric_mean,
    interleave,
    ratio,
)
from benchmarks.limits import Limits, LimitsError, load
from benchmarks.operands import Case
from benchmarks.report import busy_text
from benchmarks.results import rate
from benchmarks.runner import check
from tests.test_benchmark_goals import OWN, TIMES, machine_limits, synthetic_run

ROOT = Path(__file__).resolve().parent.parent


class Machine:
    """A timer whose candidates take known seconds, on a machine whose speed changes with time."""

    def __init__(self, seconds: dict[str, float], slowdown: Callable[[float], float]) -> None:
        self.seconds, self.slowdown, self.now = seconds, slowdown, 0.0
        self.turns: list[str] = []

    def candidate(self, name: str, own: bool = False) -> Candidate:
        return Candidate(name, "PyTorch", lambda: name, own)

    def timer(self, call: Callable[[], Any], number: int) -> float:
        self.turns.append(call())
        taken = self.seconds[call()] * number * self.slowdown(self.now)
        self.now += taken
        return taken


def test_memory_is_kept() -> None:
    """Large blocks that come and go cost page faults once."""
    program = """if True:
        import resource
        import numpy as np
        from benchmarks.harness import keep_memory
        kept = keep_memory()
        faults = []
        for megabytes in (48, 48, 24, 48):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.empty(megabytes << 20, np.uint8).fill(1)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(int(kept), *faults)
    """
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    kept, first, *later = map(int, printed.split())
    if not kept:
        pytest.skip("no glibc")
    assert first > 20 and max(later) < first / 10, (first, later)


def test_ratio_survives_a_machine_that_slows_down() -> None:
    # Three times as slow after 0.5 s, and 30 % of drift: means over the run would be off.
    machine = Machine(
        {"a": 1e-3, "b": 2e-3}, lambda now: (3.0 if now > 0.5 else 1.0) * (1 + 0.3 * now)
    )
    candidates = [machine.candidate("a", own=True), machine.candidate("b")]
    timings = interleave(
        candidates, Settings(rounds=21), timer=machine.timer, sleep=lambda seconds: None
    )
    assert len(timings["a"].rounds) == len(timings["b"].rounds) == 21
    assert max(timings["a"].rounds) > 2.5 * min(timings["a"].rounds)
    assert ratio(timings["b"], timings["a"]).median == pytest.approx(2.0, rel=0.05)


def test_every_round_runs_every_candidate_once_in_changing_order() -> None:
    names = ["a", "b", "c"]
    machine = Machine(dict.fromkeys(names, 1e-3), lambda now: 1.0)
    settings = Settings(rounds=12, block=0.01, warm=0.002)
    rounds_seen: list[tuple[int, int]] = []
    marks: list[int] = []

    def on_round(done: int, rounds: int) -> None:
        rounds_seen.append((done, rounds))
        marks.append(len(machine.turns))

    interleave(
        [machine.candidate(n) for n in names],
        settings,
        timer=machine.timer,
        sleep=lambda seconds: None,
        on_round=on_round,
    )
    assert rounds_seen == [(i, 12) for i in range(1, 13)]
    width = 2 * len(names)  # a warm-up and a timed block each
    orders = [machine.turns[end - width : end : 2] for end in marks]
    assert all(sorted(order) == names for order in orders)
    assert len({tuple(order) for order in orders}) > 2


def test_slow_calls_get_fewer_rounds_but_never_too_few() -> None:
    machine = Machine({"a": 0.5}, lambda now: 1.0)
    settings = Settings(rounds=15, least_rounds=7, limit=10.0)
    timings = interleave(
        [machine.candidate("a")], settings, timer=machine.timer, sleep=lambda seconds: None
    )
    assert (len(timings["a"].rounds), timings["a"].number) == (9, 1)
    tight = Settings(rounds=15, least_rounds=7, limit=1.0)
    timings = interleave(
        [machine.candidate("a")], tight, timer=machine.timer, sleep=lambda seconds: None
    )
    assert len(timings["a"].rounds) == 7


def test_calibrate_finds_the_time_of_a_call() -> None:
    machine = Machine({"a": 3e-6}, lambda now: 1.0)
    call = machine.candidate("a").run
    assert calibrate(call, 0.02, machine.timer) == pytest.approx(3e-6)


def test_statistics() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert geometric_mean([1.0, 4.0, 0.5]) == pytest.approx(2 ** (1 / 3))
    assert math.isnan(geometric_mean([]))
    with pytest.raises(ValueError):
        ratio(Timing((1.0, 2.0), 1), Timing((1.0,), 1))


def test_bound_is_the_slower_of_arithmetic_and_memory() -> None:
    limits = machine_limits()
    assert limits.bound(1e9, 1 << 20, "float32") == ("FMA", pytest.approx(1e-2))
    level, seconds = limits.bound(1e3, 12 << 20, "float32") or ("", 0.0)
    assert (level, seconds) == ("L3", pytest.approx((12 << 20) / 1.2e11))
    assert [limits.level(s) for s in (2 << 20, (2 << 20) + 1, 33 << 20)] == ["L2", "L3", "DRAM"]
    # Half precision without an instruction of its own is held to float32's rate.
    assert limits.peak_flops("bfloat16") == limits.peak_flops("float16") == 1e11
    assert Limits(2).bound(1.0, 1, "float32") is None


def test_limits_of_this_machine() -> None:
    try:
        load()
    except LimitsError as error:
        pytest.skip(str(error))
    limits = Limits(threads=1)
    for _ in range(40):  # the best of all probes counts: a busy machine only takes longer
        limits.probe(seconds=0.01, repeats=1)
        best = {level: max(rates.values()) for level, rates in limits.bytes.items()}
        # The same vectors hold half as many doubles.
        halved = 1.8 < limits.flops["float32"] / limits.flops["float64"] < 2.2
        if halved and best["L2"] > best["DRAM"]:
            break
    else:
        pytest.fail(f"{limits}")
    assert 1e9 < limits.flops["float32"] < 1e12 and best["DRAM"] > 1e8
    before = dict(limits.flops)
    limits.probe(seconds=0.001, repeats=1)
    assert all(limits.flops[name] >= rate for name, rate in before.items())


def test_no_compiler_is_said_and_gives_no_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load.cache_clear()
    limits = Limits(threads=1)
    limits.probe()
    load.cache_clear()
    assert "no-such-compiler" in limits.error
    run = synthetic_run({linear_relu.LinearShape(4, 4, 4): {OWN: 1.0}}, limits)
    value, unit, bound, share = rate(run.sections[0].cases[0], OWN, limits, "float32")
    assert (unit, bound) == ("GFLOP/s", "") and math.isnan(share) and value > 0


def test_check_drops_what_fails_or_is_wrong_and_reports_missing_kernels() -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    right = np.full((2, 2), 3.0)
    case = Case(
        reference=[right],
        flops=1.0,
        traffic=1,
        candidates=[
            Candidate("right", "PyTorch", lambda: [right]),
            Candidate("wrong", "PyTorch", lambda: [right + 1]),
            Candidate("NaN", "PyTorch", lambda: [right * np.nan]),
            Candidate("shape", "PyTorch", lambda: [right[0]]),
            Candidate("fails", "PyTorch", fail),
            Candidate(OWN, "PyTorch", lambda: [right], own=True),
        ],
    )
    sound, kernels = check(case, "float32", "linear_relu")
    assert [c.name for c in sound] == ["right", OWN]
    assert set(case.skipped) == {"wrong", "NaN", "shape", "fails"}
    assert "boom" in case.skipped["fails"] and "wrong result" in case.skipped["wrong"]
    assert kernels == {OWN: {}}
    assert any("no fused kernel ran" in p for p in synthetic_run(TIMES, kernels=False).problems())
    assert synthetic_run(TIMES).problems() == []


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (linear_relu, "3x5x4"),
        (conv_relu, "N2 C6 7x5 K4 3x2 s2 p1 g2 NCHW"),
        (conv_relu, "N2 C4 9 K3 4 NWC"),
        (conv_relu, "N2 C3 5x5 K4 3x3 NHWC"),
    ],
)
def test_reference_gradients_are_derivatives(op: Any, text: str) -> None:
    own = op.Operands.random(op.parse_shape(text))
    _, *grads = own.reference("training")
    names = ("input", "weight", "bias")[-len(grads) :]
    assert names == (("weight", "bias") if "C3" in text else ("input", "weight", "bias"))
    step = 1e-6
    for name, grad in zip(names, grads, strict=True):
        value = getattr(own, name)
        assert grad.shape == value.shape
        for index in [(0,) * value.ndim, tuple(s // 2 for s in value.shape)]:
            moved = {**vars(own), name: value.copy()}
            moved[name][index] += step
            after = op.Operands(**moved).reference("forward")[0]
            change = ((after - own.reference("forward")[0]) * own.grad_output).sum() / step
            assert change == pytest.approx(grad[index], abs=1e-4)


def test_resident_peak_sees_what_is_held_for_a_moment() -> None:
    def run() -> None:
        held = np.ones(16 << 20, np.float32)
        del held

    peak = memory.resident_peak(run)
    assert 60 << 20 < peak < 72 << 20


class Page(HTMLParser):
    """Counts elements, and the paths inside each <svg>."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "framework", "peers"),
    [
        (linear_relu, "torch", {"torch eager", "oneDNN fused"}),
        (linear_relu, "tensorflow", {"TF eager", "tf.function", "XLA", "Keras Dense eager"}),
        (conv_relu, "torch", {"torch eager", "oneDNN fused", "oneDNN prepacked"}),
        (conv_relu, "tensorflow", {"TF eager", "tf.function", "XLA", "Keras Conv graph"}),
    ],
)
def test_a_real_run(op: Any, framework: str, peers: set[str], tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    if not operands.installed([framework]):
        pytest.skip(f"{framework} is not installed")
    data, page = tmp_path / "run.json", tmp_path / "run.html"
    done = run_cli(
        *(op.OP, "--quick", "--section", "tiny,tiny_training", "--framework", framework),
        *("--threads", "1", "--json", str(data), "--html", str(page)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("geometric mean", "Goals", "x best of all peers", "limits: float32"):
        assert word in done.stdout

    run = json.loads(data.read_text())
    assert run["schema"] == 1 and run["op"] == op.OP and run["problems"] == []
    environment = run["environment"]
    assert environment["threads"] == 1 and environment["versions"]["twinfuse"]
    assert {"cpu", "isa", "cpu_flags", "commit", "date", "python"} <= set(environment)
    assert run["limits"]["flops"]["float32"] > 1e9
    assert [s["name"] for s in run["sections"]] == ["tiny", "tiny_training"]
    for section in run["sections"]:
        (case,) = section["cases"]
        names = set(case["candidates"])
        missing = peers - names - set(case["skipped"])
        forward_only = {peer for peer in peers if peer.startswith("oneDNN")}
        assert missing == (forward_only if section["kind"] == "training" else set())
        assert set(case["notes"]) == {peer for peer in names if peer.endswith("prepacked")}
        own = {n: c for n, c in case["candidates"].items() if c["own"]}
        assert own
        for candidate in case["candidates"].values():
            assert len(candidate["seconds"]) == 5
            assert candidate["low"] <= candidate["median"] <= candidate["high"]
            assert candidate["median"] == pytest.approx(np.median(candidate["seconds"]))
        for candidate in own.values():
            assert sum(candidate["kernels"].values()) >= 1
            assert set(candidate["ratios"]) == {n for n in names if n not in own}
        assert set(section["geometric_means"]) == set(own)
    assert len(run["goals"]) == len(op.GOALS)
    assert {g["reached"] for g in run["goals"]} <= {True, False, None}

    parsed = Page()
    parsed.feed(page.read_text())
    assert parsed.counts["svg"] >= 4 and parsed.counts["path"] > 40
    assert "Goals" in page.read_text() and "http" not in page.read_text().split("<svg")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "text", "elements"),
    [
        (linear_relu, "2048x256x256", 2048 * 256 + 2048 * 256 + 256 * 256 + 256),
        (conv_relu, "N8 C64 28x28 K64 1x1 NCHW", 2 * 8 * 64 * 28 * 28 + 64 * 64 + 64),
    ],
)
def test_peak_memory_of_torch_holds_at_least_the_results(op: Any, text: str, elements: int) -> None:
    pytest.importorskip("torch")
    shape = op.parse_shape(text)
    use = memory.measure(op.OP, NATIVE, "torch", shape, "float32", threads=1)
    results = 4 * elements
    assert use.allocator is not None and results <= use.allocator <= 4 * results
    assert use.resident is not None and use.resident <= 6 * results
    assert use.resident >= results - MEMORY_RESOLUTION
    with pytest.raises(RuntimeError, match="no candidate 'nobody'"):
        memory.measure(op.OP, "nobody", "torch", shape, "float32", threads=1)


def test_a_busy_machine_is_named() -> None:
    run = synthetic_run(TIMES)
    run.environment = {"cores": 4, "load_average": [3.2, 1.0, 1.0]}
    assert "load 3.2 on 4 cores" in busy_text(run)
    run.environment["load_average"][0] = 1.5
    assert busy_text(run) == ""


def test_command_line_refuses_what_it_does_not_know() -> None:
    listed = run_cli("--list").stdout
    assert "Sections of linear_relu" in listed and "Sections of conv_relu" in listed
    assert "[s<stride>]" in listed
    for arguments, message in (
        (["--section", "nothing"], "expected some of forward"),
        (["linear_relu", "--shapes", "64x784"], "expected MxKxN"),
        (["conv_relu", "--shapes", "N8 C64 56x56 K64 3x3"], "expected N8 C64 56x56 K64 3x3 [s"),
        (["--shapes", "64x784x128"], "expected an op"),
    ):
        refused = run_cli(*arguments)
        assert refused.returncode and message in refused.stderr, arguments
