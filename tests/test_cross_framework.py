"""Both frameworks in one process: the same inputs give the same bits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import twinfuse
from tests.arrays import DTYPES, decode
from tests.both import (
    TABLES,
    THROUGH,
    Arrays,
    comparable,
    output_layout,
    problem_in,
    through_tensorflow,
    through_torch,
)
from tests.cases import CASES
from tests.conftest import Launched, require
from tests.conv_case import ConvCase
from tests.conv_cases import CASES as CONV
from tests.core_api import backward, forward, kernel, load
from tests.problem import Case, build
from tests.rule import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent
LINEAR = {case.id: case for case in CASES}
CONVOLUTIONS = {case.id: case for case in CONV}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module", autouse=True)
def _both_frameworks() -> None:
    load()
    require("torch")
    require("tensorflow")


def run_process(*arguments: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout.splitlines()[-1]


@every_dtype
@pytest.mark.parametrize(
    ("case", "layout"), TABLES, ids=[f"{c.op}-{c.id}-{layout}".strip("-") for c, layout in TABLES]
)
def test_same_bits(case: Case, layout: str, dtype: str, launched: Launched) -> None:
    problem = problem_in(case, dtype, layout)
    results: dict[str, Arrays] = {}
    for framework, through in THROUGH.items():
        with (
            launched(kernel(f"{case.op}_forward", dtype), times=1),
            launched(kernel(f"{case.op}_backward", dtype), times=1),
        ):
            # torch decides about the layout of the output, TensorFlow does as it is told.
            layout = output_layout(problem, results["torch"]) if results else ""
            results[framework] = comparable(problem, through(problem, layout))
    assert results["torch"].keys() == results["tensorflow"].keys()
    for name, expected in results["torch"].items():
        assert_same_bits(results["tensorflow"][name], expected, f"{name}: TensorFlow")


@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CONV, ids=lambda case: case.id)
def test_tensorflow_has_the_bits_of_the_core(case: ConvCase, layout: str, dtype: str) -> None:
    """In the layouts, too, that torch gives no output: all of one dimension and of float64."""
    problem = build(case, dtype)
    output = forward(problem, output_layout=layout)
    grads = backward(problem, output, "multiply", output_layout=layout)
    for name, got in through_tensorflow(problem, layout).items():
        assert_same_bits(got, {"output": output, **grads}[name], name)


@every_dtype
@pytest.mark.parametrize("case", [LINEAR["denormal"], CONVOLUTIONS["denormal"]], ids=lambda c: c.op)
def test_denormals_survive_in_both(case: Case, dtype: str) -> None:
    """TensorFlow runs kernels with denormals flushed, torch when told to: neither reaches ours."""
    import torch

    problem = build(case, dtype)
    expected = through_torch(problem)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed = through_torch(problem)
        assert torch.tensor(1e-40) * 1.0 == 0, "the mode under test is not on"
    finally:
        torch.set_flush_denormal(False)
    assert (decode(expected["output"]) > 0).any()
    for name, got in through_tensorflow(problem).items():
        assert_same_bits(got, expected[name], f"{name}: TensorFlow")
        assert_same_bits(flushed[name], expected[name], f"{name}: torch with denormals flushed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "threads"), [("torch,tensorflow", "1"), ("tensorflow,torch", "2")]
)
def test_import_order_and_threads_do_not_change_bits(order: str, threads: str) -> None:
    found = json.loads(run_process("-m", "tests.both", order, threads, TWINFUSE_STRICT="1"))
    assert list(found) == order.split(",")
    # TensorFlow's hold layouts of outputs that torch never gives.
    different = [
        name for name in found["torch"] if found["torch"][name] != found["tensorflow"][name]
    ]
    assert not different, f"the frameworks differ in {different}"

    from tests.both import digests

    here = digests("torch")
    assert here.keys() == found["torch"].keys()
    different = [name for name in here if here[name] != found["torch"][name]]
    assert not different, f"{threads} threads change {different}"


def test_concurrent_calls_from_both() -> None:
    """16 threads, torch and TensorFlow calls mixed."""
    names = ("seven_rows", "several_blocks", "weight_keras", "denormal", "row_keras_weight")
    cases = [LINEAR[name] for name in names]
    cases += [CONVOLUTIONS[name] for name in ("stem", "groups", "1d", "denormal")]
    problems = [build(case, dtype) for case in cases for dtype in DTYPES]
    expected = [through_torch(problem) for problem in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(16)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            start.wait()
            for _ in range(8):
                index = choose.randrange(len(problems))
                framework = choose.choice(list(THROUGH))
                for name, got in THROUGH[framework](problems[index]).items():
                    case = problems[index].case.id
                    assert_same_bits(got, expected[index][name], f"{framework} {case} {name}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_one_copy_of_the_core() -> None:
    """Both bindings found the library that Python reads its counters from."""
    problem = build(LINEAR["seven_rows"], "float32")
    before = sum(twinfuse.launches().values())
    through_torch(problem)
    through_tensorflow(problem)
    assert sum(twinfuse.launches().values()) - before == 4
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = (line.split() for line in maps.read_text().splitlines())
        copies = {line[-1] for line in lines if line[-1].endswith("libtwinfuse.so")}
        assert len(copies) == 1, copies


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("twinfuse", ("torch", "tensorflow", "keras")),
        ("twinfuse.torch", ("tensorflow", "keras")),
        ("twinfuse.tensorflow", ("torch",)),
    ],
)
def test_no_side_imports_the_other(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[m for m in {absent} if m in sys.modules], '.')"
    assert run_process("-c", code) == "."


def test_importing_leaves_tensorflow_to_be_configured() -> None:
    """Devices and threads can be set until TensorFlow runs its first op: ours must not be that."""
    code = """
        import tensorflow as tf, twinfuse.tensorflow
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
        tf.config.threading.set_intra_op_parallelism_threads(1)
        print(len(tf.config.list_logical_devices("CPU")))
    """
    assert run_process("-c", textwrap.dedent(code)) == "2"
