"""Calls of the LSTM that the core must refuse: the status, and a text that says what and why."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import pytest

from tests.core_api import INVALID_ARGUMENT, OK, UNSUPPORTED, CTensor, last_error, load, tensor
from tests.core_lstm_api import CLstm
from tests.core_lstm_arguments import GATES, OPS, SAVED, WIDTHS, B, H, N, Op, call, settings
from tests.test_core_errors import dense
from twinfuse import _core

every_op = pytest.mark.parametrize("op", OPS, ids=str)
BOTH = [(op, name) for op in OPS for name in op.names]
both = pytest.mark.parametrize(("op", "name"), BOTH, ids=[f"{op}-{name}" for op, name in BOTH])


def refused(op: Op, changes: dict[str, CTensor | None], text: str, **given: Any) -> None:
    assert call(op, changes, **given) == INVALID_ARGUMENT, "the call was taken"
    assert re.search(rf"^{op.name}: {text}", last_error()), last_error()


@every_op
def test_right_arguments_are_taken(op: Op) -> None:
    """What the other tests change one thing of."""
    assert call(op, {}) == OK, last_error()
    assert call(op, dict.fromkeys(op.optional)) == OK, last_error()
    for name in op.optional:
        assert call(op, {name: None}) == OK, f"{name}: {last_error()}"


@every_op
def test_missing_tensor(op: Op) -> None:
    required = set(op.reads) - set(op.optional) - {"weight_hr", "peephole", "norm"}
    assert {"input", "weight_ih", "weight_hh"} <= required
    for name in required:
        wanted = "cells|hidden|saved" if name in SAVED and op.backward else name
        refused(op, {name: None}, rf"({name}|{wanted}): expected .*, got ")


@every_op
def test_missing_structs(op: Op) -> None:
    refused(op, {}, "weights: expected .*, got NULL", no_weights=True)
    refused(op, {}, "lstm: expected .*, got NULL", settings=None)
    assert call(op, {}, no_context=True) == INVALID_ARGUMENT
    assert "context" in last_error()


@both
def test_data_that_is_null(op: Op, name: str) -> None:
    refused(op, {name: dense(op.sizes(name), null=True)}, f"{name}: expected .*, got NULL")


@both
def test_wrong_size(op: Op, name: str) -> None:
    """One size off, in each dimension."""
    right = op.sizes(name)
    for dim in range(len(right)):
        for off in (1, -1):
            sizes = tuple(size + off * (i == dim) for i, size in enumerate(right))
            assert call(op, {name: dense(sizes)}) == INVALID_ARGUMENT, f"{name} {sizes} was taken"
            text = last_error()
            # Two tensors disagree; which of them is wrong is for the core to say.
            got = re.search(rf"^{op.name}: (\w+): expected (.*), got (.*)$", text)
            assert got, text
            assert got[1] in op.names and got[2] != got[3], text


@pytest.mark.parametrize(
    ("op", "name", "sizes", "text"),
    [
        (OPS[0], "weight_hh", (28, 3), r"weight_h[hr]: expected \[.*\], got \[.*\]"),
        (OPS[0], "bias_ih", (7,), r"bias_ih: expected \[28\], got \[7\]"),
        (OPS[0], "initial_h", (3, 7), r"initial_h: expected \[3, 2\], got \[3, 7\]"),
        (OPS[0], "initial_c", (1, 3, 7), r"initial_c: expected \[3, 7\], got \[1, 3, 7\]"),
        (OPS[0], "output", (4, 3, 7), r"output: expected \[4, 3, 2\], got \[4, 3, 7\]"),
        (OPS[0], "peephole", (21,), r"peephole: expected \[3, 7\], got \[21\]"),
        (OPS[0], "norm", (2, 2, 14), r"norm: expected \[2, 28\], got \[2, 2, 14\]"),
        (OPS[0], "zoneout_cell", (12, 7), r"zoneout_cell: expected \[4, 3, 7\], got \[12, 7\]"),
        (OPS[0], "dropout_input", (3, 5), r"dropout_input: expected \[4, 3, 5\], got \[3, 5\]"),
        (OPS[0], "gates", (12, 28), r"gates: expected \[12, 84\], got \[12, 28\]"),
        (OPS[0], "gates", (4, 3, 84), r"gates: expected \[12, 84\], got \[4, 3, 84\]"),
        (OPS[0], "weight_ih", (27, 5), r"weight_ih: expected .*4.*, got 27"),
        (OPS[1], "grad_weight_hr", (7, 2), r"grad_weight_hr: expected \[2, 7\], got \[7, 2\]"),
        (OPS[1], "grad_norm", (56,), r"grad_norm: expected \[2, 28\], got \[56\]"),
        (OPS[1], "gates", (12, 28), r"gates: expected \[12, 84\], got \[12, 28\]"),
        (OPS[1], "dropout_hidden", (4, 4, 3, 2),
         r"dropout_hidden: expected \[4, 3, 2\], got \[4, 4, 3, 2\]"),
        (OPS[1], "grad_output", (3, 4, 2), r"grad_output: expected \[4, 3, 2\], got \[3, 4, 2\]"),
        (OPS[1], "grad_initial_c", (3, 2), r"grad_initial_c: expected \[3, 7\], got \[3, 2\]"),
        (OPS[2], "input", (4, 3, 5), r"input: expected \[B, .*\], got \[4, 3, 5\]"),
        (OPS[2], "final_c", (3, 2), r"final_c: expected \[3, 7\], got \[3, 2\]"),
        (OPS[2], "dropout_hidden", (4, 3, 7),
         r"dropout_hidden: expected \[4, 3, 2\], got \[4, 3, 7\]"),
        (OPS[3], "gates", (3, 28), r"gates: expected \[3, 84\], got \[3, 28\]"),
        (OPS[3], "gates", (3, 83), r"gates: expected \[3, 84\], got \[3, 83\]"),
        (OPS[3], "initial_h", (3, 7), r"initial_h: expected \[3, 2\], got \[3, 7\]"),
    ],
)  # fmt: skip
def test_text_names_both_shapes(op: Op, name: str, sizes: tuple[int, ...], text: str) -> None:
    refused(op, {name: dense(sizes)}, text)


@both
def test_wrong_rank(op: Op, name: str) -> None:
    sizes = op.sizes(name)
    for wrong in ((), (1, *sizes), (1, 1, 1, *sizes), sizes[:-1]):
        assert call(op, {name: dense(wrong)}) == INVALID_ARGUMENT, f"{name} of {wrong} was taken"
        assert re.search(rf"^{op.name}: \w+: expected .*, got ", last_error()), last_error()


@both
def test_negative_rank_and_size(op: Op, name: str) -> None:
    negative_rank = dense(op.sizes(name))
    negative_rank.ndim = -1
    refused(op, {name: negative_rank}, rf"{name}: expected .*, got ")
    negative_size = dense((*op.sizes(name)[:-1], -1))
    refused(op, {name: negative_size}, rf"{name}: expected .*, got .*-1")


@both
def test_mixed_dtypes(op: Op, name: str) -> None:
    for dtype in ("float64", "bfloat16", "float16"):
        assert call(op, {name: dense(op.sizes(name), dtype)}) == INVALID_ARGUMENT
        text = last_error()
        assert re.search(rf"^{op.name}: \w+: expected \w+, got \w+$", text), text
        assert dtype in text and "float32" in text, text


@both
@pytest.mark.parametrize("number", [4, -1, 1 << 30])
def test_unknown_dtype(op: Op, name: str, number: int) -> None:
    refused(op, {name: dense(op.sizes(name), number)}, r"\w+: expected .*, got ")


@pytest.mark.parametrize("number", [4, -1])
@every_op
def test_unknown_dtype_of_all(op: Op, number: int) -> None:
    changes = {name: dense(op.sizes(name), number) for name in op.names}
    refused(op, changes, rf".*expected .*float32.*, got .*{number}")


@pytest.mark.parametrize("name", ["cell_activation", "gate_activation"])
@pytest.mark.parametrize("value", [4, -1, 1 << 30])
@every_op
def test_unknown_activation(op: Op, value: int, name: str) -> None:
    refused(op, {}, f"{name}: expected .*, got {value}", settings=settings(**{name: value}))


@pytest.mark.parametrize(("value", "got"), [(-1e-3, "-0.001"), (-np.inf, "-inf"), (np.nan, "nan")])
@every_op
def test_a_bad_epsilon_of_the_norm(op: Op, value: float, got: str) -> None:
    lstm = settings(norm_epsilon=value)
    refused(op, {}, f"norm_epsilon: expected .*not negative.*, got {got}", settings=lstm)


@every_op
def test_without_a_norm_fewer_gates_are_saved(op: Op) -> None:
    rows = op.sizes("gates")[0] if "gates" in op.names else 0
    changes: dict[str, CTensor | None] = {"norm": None, "grad_norm": None}
    assert call(op, changes | {"gates": dense((rows, 4 * H))}) == OK, last_error()
    text = rf"gates: expected \[{rows}, {4 * H}\], got \[{rows}, {GATES}\]"
    refused(op, changes, text)


def packed(sizes: list[int], steps: int | None = None, **changes: Any) -> CLstm:
    lstm = settings(batch_sizes=(ctypes.c_int64 * max(len(sizes), 1))(*sizes), **changes)
    lstm.steps = len(sizes) if steps is None else steps
    return lstm


# Eight rows in three steps of at most three sequences.
PACKED = {
    **{name: dense((8, width)) for name, width in WIDTHS.items()},
    **{f"grad_{name}": dense((8, WIDTHS[name])) for name in ("output",)},
    **{name: dense((8, sizes[1])) for name, sizes in SAVED.items()},
}


def packed_call(op: Op) -> dict[str, CTensor | None]:
    changes = {name: a for name, a in PACKED.items() if name in op.reads}
    return changes | {name: None for name in op.writes if name in (*WIDTHS, *SAVED, "grad_input")}


@pytest.mark.parametrize("op", OPS[:2], ids=str)
def test_batch_sizes(op: Op) -> None:
    changes = packed_call(op)
    assert call(op, changes, settings=packed([3, 3, 2])) == OK, last_error()
    for sizes, got in (
        ([3, 3, 3], ".*"),
        ([3, 3, 1], ".*"),
        ([3, 2, 3], "3"),
        ([3, 3, 2, 0], "0"),
        ([3, 3, 3, -1], "-1"),
        ([0, 3, 5], "0"),
        ([9, -1], "9|.*"),
        ([1 << 62, 1 << 62, 8], ".*"),
    ):
        refused(op, changes, f"batch_sizes: expected .*, got {got}", settings=packed(sizes))
    for steps in (0, -1):
        lstm = packed([3, 3, 2], steps)
        refused(op, changes, f"batch_sizes: expected .*, got {steps}", settings=lstm)
    # Two sequences at first, and states of three.
    refused(op, changes, r"\w+: expected \[2, \d\], got \[3, \d\]", settings=packed([2, 2, 2, 2]))


@pytest.mark.parametrize("op", OPS[:2], ids=str)
def test_a_mask_of_packed_sequences(op: Op) -> None:
    mask = np.ones((3, 3), np.uint8)
    lstm = packed([3, 3, 2], mask=mask.ctypes.data)
    refused(op, packed_call(op), "mask: expected .*batch_sizes", settings=lstm)


def test_what_is_saved_comes_whole() -> None:
    for name in SAVED:
        refused(OPS[0], {name: None}, "saved|gates|cells|hidden")
        refused(OPS[1], {name: None}, "saved|gates|cells|hidden")
    assert call(OPS[0], dict.fromkeys(SAVED)) == OK, last_error()
    for op in (OPS[0], OPS[1]):
        for name, sizes in SAVED.items():
            rows = tensor(dense(sizes).data, "float32", sizes, (2 * sizes[1], 2))
            refused(op, {name: rows}, f"{name}: expected .*stride.*, got")


def test_backward_without_what_a_gradient_reads() -> None:
    for op in OPS:
        if op.backward:
            refused(op, {"input": None}, "input: expected .*weight_ih")
            assert call(op, {"input": None, "grad_weight_ih": None}) == OK, last_error()


def test_a_gradient_of_what_is_absent() -> None:
    """Nobody would write it."""
    for op in OPS:
        if op.backward:
            refused(op, {"peephole": None}, "(grad_)?peephole: expected ")
            gates = dense((op.sizes("gates")[0], 4 * H))
            refused(op, {"norm": None, "gates": gates}, "(grad_)?norm: expected ")
    # Without a projection the state is as wide as the units.
    wide = {"weight_hh": (4 * H, H), "grad_weight_hh": (4 * H, H), "grad_weight_hr": (H, H)}
    wide |= {"grad_final_h": (B, H), "grad_initial_h": (B, H), "initial_h": (B, H)}
    changes: dict[str, CTensor | None] = {name: dense(sizes) for name, sizes in wide.items()}
    changes |= {"weight_hr": None, "zoneout_hidden": None, "dropout_hidden": None}
    refused(OPS[3], changes, "(grad_)?weight_hr: expected ")


def test_more_elements_than_63_bits_count() -> None:
    """Strides of zero make such a view; products of its sizes must not wrap around."""
    huge = 1 << 32
    one = dense((1,)).data
    changes: dict[str, CTensor | None] = dict.fromkeys(OPS[0].optional)
    changes |= dict.fromkeys(SAVED) | {
        "norm": None,
        "weight_hr": None,
        "weight_hh": dense((4 * H, H)),
    }
    changes["input"] = tensor(one, "float32", (huge, huge, N), (0, 0, 1))
    assert call(OPS[0], changes) == INVALID_ARGUMENT, "the call was taken"
    assert re.search(r"^lstm: input: expected .*, got .*4294967296", last_error()), last_error()


@every_op
def test_cuda_is_unsupported_with_a_reason(op: Op) -> None:
    assert call(op, {}, device=_core.DEVICES["cuda"]) == UNSUPPORTED
    assert re.search(f"^{op.name}: .*(CUDA|GPU)", last_error()), last_error()
    assert call(op, {}, device=7) in (INVALID_ARGUMENT, UNSUPPORTED)


@pytest.mark.parametrize("name", ["lstm", "lstm_cell"])
def test_find_kernel_gives_names_and_reasons(name: str) -> None:
    find = load().twinfuse_find_kernel
    for way in ("forward", "backward"):
        for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
            found = find(f"{name}_{way}".encode(), _core.DTYPES[dtype], 0)
            assert found is not None, last_error()
            assert found.decode().startswith(f"{name}_{way}_") and short in found.decode()
    for role, dtype, device, text in (
        ("sideways", 0, 0, f"{name}_sideways"),
        ("forward", 9, 0, "9"),
        ("forward", 1, 1, "GPU"),
        ("backward", 0, 9, f"{name}_backward"),
    ):
        assert find(f"{name}_{role}".encode(), dtype, device) is None
        assert text in last_error(), last_error()
