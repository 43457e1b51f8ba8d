"""The LSTM on CUDA tensors, where there is a GPU: the case table, and sizes for every kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Launched, require, skip
from tests.lstm_cases import CASES, LstmCase, build

torch = require("torch")
if not torch.cuda.is_available():
    skip("gpu", "no CUDA device")

import twinfuse.torch as tft  # noqa: E402
from tests.torch_lstm_cases import fused, has_native, native, run  # noqa: E402
from tests.torch_lstm_gpu import (  # noqa: E402
    SHORT,
    Tensors,
    assert_layer,
    assert_problem,
    clean,
    dtype_of,
    every_precision,
    layer,
    skipping,
    trained,
)

TABLE = [case for case in CASES if not (case.cell and case.projection)]


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(7)
    with clean(request.node.callspec.params.get("precision", "float32")):
        yield


@every_precision
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_case(case: LstmCase, precision: str, launched: Launched) -> None:
    problem = build(case, dtype_of(precision))
    op, short = "lstm_cell" if case.cell else "lstm", SHORT[problem.dtype]
    with (
        skipping(case.projection or case.peephole or case.norm or case.dropout),
        launched(f"{op}_forward_{short}_cuda", times=1),
        launched(f"{op}_backward_{short}_cuda", times=1),
    ):
        ours = run(fused, problem, "cuda")
    rival = run(native, problem, "cuda") if has_native(case) and precision != "tf32" else None
    assert_problem(problem, precision, ours, rival)


# The last two have a launch for each step, as the three before have backward in float32.
UNITS = (5, 64, 100, 128, 200, 256, 384, 512, 640, 768, 1000, 1024, 1500, 1536)
BATCHES = (1, 3, 8, 16, 33, 64, 130)
STEPS = (1, 2, 7, 40)
# Every number of units with every number of sequences and of steps.
SIZES = [
    (STEPS[(i + k) % len(STEPS)], batch, 40 if k % 2 else 67, units)
    for i, units in enumerate(UNITS)
    for k, batch in enumerate(BATCHES)
]


def ours(*tensors: torch.Tensor) -> Tensors:
    x, h, c, *weights = tensors
    y, (h, c) = tft.lstm(x, (h.unsqueeze(0), c.unsqueeze(0)), weights)
    return [y, h.squeeze(0), c.squeeze(0)]


@every_precision
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_sizes(sizes: tuple[int, ...], precision: str, launched: Launched) -> None:
    tensors = layer(precision, *sizes)
    steps, batch, _, units = sizes
    grads = [torch.randn(s, device="cuda") for s in ((steps, batch, units), *[(batch, units)] * 2)]
    short = SHORT[dtype_of(precision)]
    with launched(f"lstm_forward_{short}_cuda", times=1), torch.no_grad():
        inference = ours(*tensors)
    with launched("lstm_forward_", times=1), launched(f"lstm_backward_{short}_cuda", times=1):
        got = trained(ours, tensors, grads)
    again = trained(ours, tensors, grads)
    for first, second in zip((*inference, *got), (*got[:3], *again)):
        assert torch.equal(first, second)
    assert_layer(precision, got, tensors, grads)


CELLS = [(batch, units) for batch in (1, 16, 64, 200) for units in (5, 128, 512, 1000, 2100)]


@every_precision
@pytest.mark.parametrize("sizes", CELLS, ids=lambda sizes: "-".join(map(str, sizes)))
def test_cells(sizes: tuple[int, int], precision: str, launched: Launched) -> None:
    """A cell is a layer of one step."""
    batch, units = sizes
    tensors = layer(precision, 1, batch, 72, units)
    grads = [torch.randn(s, device="cuda") for s in ((1, batch, units), *[(batch, units)] * 2)]

    def cell(*tensors: torch.Tensor) -> Tensors:
        x, h, c, *weights = tensors
        h, c = tft.lstm_cell(x[0], (h, c), *weights)
        return [h.unsqueeze(0), h, c]

    short = SHORT[dtype_of(precision)]
    with (
        launched(f"lstm_cell_forward_{short}_cuda", times=1),
        launched(f"lstm_cell_backward_{short}_cuda", times=1),
    ):
        got = trained(cell, tensors, grads)
    assert_layer(precision, got, tensors, grads)


@pytest.mark.parametrize("rounds", [False, True])
def test_precision_is_that_of_cudnn(rounds: bool) -> None:
    """Of layers; cells are as `nn.LSTMCell`, whose products are those of matrices."""
    x, h, c, *weights = layer("tf32", 3, 16, 64, 128)

    def results(precision: str, matrices: bool) -> Tensors:
        with clean(precision, matrices):
            step = tft.lstm_cell(x[0], (h, c), *weights)
            return [*ours(x, h, c, *weights), *step]

    full, mixed = results("float32", False), results("tf32" if rounds else "float32", not rounds)
    for k, (a, b) in enumerate(zip(full, mixed)):
        assert torch.equal(a, b) == (rounds if k > 2 else not rounds)
