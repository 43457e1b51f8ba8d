"""`model.compile(backend="twinfuse")` on models of `transformers` that `fuse` leaves native."""

from __future__ import annotations

import copy

import pytest

from tests.conftest import Launched, require

torch = require("torch")
pytest.importorskip("transformers")

from tests.zoo import assert_as_good, outputs, randomized  # noqa: E402
from tests.zoo_models import CASES  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["OPT", "T5"])
def test_outputs_and_gradients(name: str, launched: Launched) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    native = randomized(case.make())
    compiled = copy.deepcopy(native)
    compiled.compile(backend="twinfuse")
    assert_as_good(case, compiled, native)
    for op, count in case.runs.items():
        with launched(f"{op}_forward_", times=count):
            outputs(case, compiled)
