"""The LSTM in both frameworks in one process: the same inputs give the same bits."""

from __future__ import annotations

import random
import threading

import pytest

from tests.arrays import DTYPES, decode, flushed
from tests.both_lstm import TABLE, THROUGH, through_tensorflow, through_torch
from tests.conftest import Launched, require
from tests.core_api import kernel, load
from tests.core_lstm_api import both_ways
from tests.lstm_cases import CASES, LstmCase, build
from tests.rule import assert_same_bits

BY_ID = {case.id: case for case in TABLE}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module", autouse=True)
def _both_frameworks() -> None:
    load()
    require("torch")
    require("tensorflow")


@every_dtype
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_same_bits(case: LstmCase, dtype: str, launched: Launched) -> None:
    """In either framework, and those of the core itself."""
    problem = build(case, dtype)
    expected = both_ways(problem)
    op = f"lstm{'_cell' * case.cell}"
    for framework, through in THROUGH.items():
        with (
            launched(kernel(f"{op}_forward", dtype), times=1),
            launched(kernel(f"{op}_backward", dtype), times=1),
        ):
            results = through(problem)
        assert results.keys() <= expected.keys()
        assert {"h_n", "c_n", "grad_weight_ih"} <= results.keys()
        for name, got in results.items():
            assert_same_bits(got, expected[name], f"{name}: {framework}")


@every_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.lengths], ids=lambda case: case.id)
def test_packed_sequences_have_the_bits_of_the_core(case: LstmCase, dtype: str) -> None:
    problem = build(case, dtype)
    expected = both_ways(problem)
    for name, got in through_torch(problem).items():
        assert_same_bits(got, expected[name], name)


@every_dtype
@pytest.mark.parametrize("name", ["tiny", "tiny_extras", "norm_dropout_tiny", "cell_tiny"])
def test_denormals_survive_in_both(name: str, dtype: str) -> None:
    """TensorFlow runs kernels with denormals flushed, torch when told to: neither reaches ours."""
    import torch

    problem = build(BY_ID[name], dtype)
    expected = through_torch(problem)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushing = through_torch(problem)
        assert torch.tensor(1e-40) * 1.0 == 0, "the mode under test is not on"
    finally:
        torch.set_flush_denormal(False)
    assert flushed(dtype) or (decode(expected["h_n"]) != 0).any()
    for result, got in through_tensorflow(problem).items():
        assert_same_bits(got, expected[result], f"{result}: TensorFlow")
        assert_same_bits(flushing[result], expected[result], f"{result}: torch, flushing")


def test_concurrent_calls_from_both() -> None:
    """16 threads, torch and TensorFlow calls mixed."""
    names = ("above_tile", "keras", "mask_interior", "projection_9", "tiny", "cell_wide")
    names += ("norm_above_tile", "dropout_keras_tile")
    problems = [build(BY_ID[name], dtype) for name in names for dtype in DTYPES]
    expected = [through_torch(problem) for problem in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(16)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            start.wait()
            for _ in range(6):
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
