"""The examples of data-parallel training, in processes of their own as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from examples import distributed, models

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 240  # seconds; they take ten on an idle machine


def run_together(
    folder: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]] = ({},)
) -> list[str]:
    """What processes of one command print, one for each environment; all have to succeed."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    files = [folder / f"output{number}" for number in range(len(environments))]
    command = [sys.executable, *arguments]
    processes = []
    with ExitStack() as stack:
        for path, environment in zip(files, environments, strict=True):
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=settings | dict(environment),
                stdout=stack.enter_context(path.open("w")),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            # With the processes that it has started.
            stack.callback(process.wait)
            stack.callback(end_group, process.pid)
            processes.append(process)
        end = time.monotonic() + TIMEOUT
        statuses = [process.poll() for process in processes]
        # Where one has failed, another may wait for it.
        while None in statuses and not any(statuses) and time.monotonic() < end:
            time.sleep(0.1)
            statuses = [process.poll() for process in processes]
    if any(status != 0 for status in statuses):
        printed = "\n".join(f"{path.name}:\n{path.read_text()}" for path in files)
        pytest.fail(
            f"{' '.join(command)}: expected status 0 of all within {TIMEOUT} s, got {statuses} "
            f"(None: it was still running)\n{printed}"
        )
    return [path.read_text() for path in files]


def end_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def assert_agrees(output: str, replicas_here: int = 1) -> None:
    """Fused kernels ran for all networks, and every run follows the one of one process."""
    assert "native and fused follow the same curve" in output
    for op in ("linear_relu", "conv_relu", "lstm"):
        assert f"{op}_forward" in output and f"{op}_backward" in output
    assert output.count("native from one process: losses") == len(distributed.RECIPES)
    # Steps of 32 images, two layers each, and once for the test data.
    steps = distributed.RECIPES["mlp_784"].epochs * (1437 // 32)
    assert f"x {2 * steps * replicas_here}" in output


@pytest.mark.slow
@pytest.mark.parametrize("by", ["ddp", "fsdp"])
def test_torch_in_two_processes(by: str, tmp_path: Path) -> None:
    require("torch")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    (output,) = run_together(tmp_path, (*launcher, "-m", "examples.distributed_torch", "--by", by))
    assert_agrees(output)
    assert f"{by} in 2 processes" in output


@pytest.mark.slow
def test_keras_on_two_devices(tmp_path: Path) -> None:
    require("tensorflow")
    (output,) = run_together(tmp_path, ("-m", "examples.distributed_keras"))
    assert_agrees(output, replicas_here=2)
    assert "on 2 devices" in output


@pytest.mark.slow
def test_keras_on_two_workers(tmp_path: Path) -> None:
    require("tensorflow")
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(2)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        addresses = ["{}:{}".format(*probe.getsockname()) for probe in probes]
    configs = [
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        for index in range(2)
    ]
    environments = [{"TF_CONFIG": json.dumps(config)} for config in configs]
    output, other = run_together(tmp_path, ("-m", "examples.distributed_keras"), environments)
    assert_agrees(output)
    assert "on 2 workers" in output
    assert "losses" not in other  # one of them speaks for both


def test_replicas_that_go_another_way_are_found() -> None:
    torch = require("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other take much longer

    def wrong(framework: str, network: str, sizes: Any, recipe: Any, fused: bool) -> models.Model:
        slower = replace(recipe, learning_rate=0.9 * recipe.learning_rate)
        return models.build(framework, network, sizes, slower, fused)

    console = Console(quiet=True)
    arguments = (console, "mlp_784", 1, "torch", "on 2 devices")
    found = distributed.compare(*arguments, wrong, 2)
    assert [text.split(" losses")[0] for text in found] == [
        "mlp_784: torch: fused from one process:",
        "mlp_784: torch: native from one process:",
    ]
    assert distributed.end(console, found) == 1 and not console.quiet
    assert distributed.compare(*arguments, models.build, 2) == []
    with pytest.raises(SystemExit, match="3 replicas cannot share a batch of 32"):
        distributed.compare(*arguments, models.build, 3)
    torch.set_num_threads(threads)


def test_a_start_without_torchrun_says_how() -> None:
    require("torch")
    from examples import distributed_torch

    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        distributed_torch.main([])
