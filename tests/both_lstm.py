"""The LSTM through `twinfuse.torch` and `twinfuse.tensorflow`: what `tests.both` is for other ops.

TensorFlow knows one bias, no packed sequences, and cells without a projection. No framework is
imported before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

from tests.arrays import DTYPES, Array
from tests.lstm_cases import ONE_BIAS, LstmProblem, build
from tests.rule import bits

Arrays = dict[str, Array]
TABLE = [case for case in ONE_BIAS if not case.lengths and not (case.cell and case.projection)]


def through_torch(problem: LstmProblem) -> Arrays:
    """All results by name, from the views themselves."""
    from tests.test_lstm_torch import fused, run

    return run(fused, problem)


def through_tensorflow(problem: LstmProblem) -> Arrays:
    """All results by name, from contiguous copies in the layout of Keras."""
    from tests.test_lstm_tensorflow import arrays, gradients, tensors

    return arrays(problem, gradients(problem, tensors(problem)))


THROUGH: dict[str, Callable[[LstmProblem], Arrays]] = {
    "torch": through_torch,
    "tensorflow": through_tensorflow,
}


def digests(framework: str) -> dict[str, str]:
    """One digest of all bits per case and dtype."""
    result = {}
    for case, dtype in itertools.product(TABLE, DTYPES):
        problem = build(case, dtype)
        digest = hashlib.sha256()
        for name, array in sorted(THROUGH[framework](problem).items()):
            digest.update(f"{name}{array.shape}{array.dtype}".encode() + bits(array).tobytes())
        result[f"{case.op} {case.id} {dtype}"] = digest.hexdigest()
    return result
