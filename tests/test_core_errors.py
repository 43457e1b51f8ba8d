"""Calls that the core must refuse: the status, and a text that says which argument and why."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.core_api import (
    INVALID_ARGUMENT,
    OK,
    UNSUPPORTED,
    CTensor,
    Lender,
    Output,
    last_error,
    load,
    tensor,
)
from twinfuse import _core

# input [2, 3, 7], weight [5, 7], bias [5], output [2, 3, 5]
SIZES = {
    "input": (2, 3, 7),
    "weight": (5, 7),
    "bias": (5,),
    "output": (2, 3, 5),
    "grad_output": (2, 3, 5),
    "grad_input": (2, 3, 7),
    "grad_weight": (5, 7),
    "grad_bias": (5,),
}
FORWARD = ("output", "input", "weight", "bias")
BACKWARD = ("grad_input", "grad_weight", "grad_bias", "grad_output", "output", "input", "weight")
READ = np.ones(1 << 12, np.float64)


def dense(sizes: tuple[int, ...], dtype: str | int = "float32", null: bool = False) -> CTensor:
    strides = [0] * len(sizes)
    step = 1
    for i in reversed(range(len(sizes))):
        strides[i], step = step, step * max(sizes[i], 1)
    strides = [min(stride, 1 << 40) for stride in strides]
    return tensor(None if null else READ.ctypes.data, dtype, sizes, strides)


def call(names: tuple[str, ...], changes: dict[str, CTensor | None], **settings: Any) -> int:
    """One call with `changes` to otherwise right arguments; outputs must stay as they are."""
    writes = {"output"} if names is FORWARD else {"grad_input", "grad_weight", "grad_bias"}
    outputs = {name: Output.poisoned(SIZES[name], "float32") for name in writes}
    before = {name: output.operand.base.copy() for name, output in outputs.items()}
    arguments = {
        name: outputs[name].tensor if name in writes else dense(SIZES[name]) for name in names
    }
    arguments.update(changes)
    relu_grad = settings.pop("relu_grad", 0)
    context = None if settings.pop("no_context", False) else Lender(**settings).context()
    ordered = [arguments[name] for name in names]
    launches = _core.launches()
    if names is FORWARD:
        status = load().twinfuse_linear_relu_forward(*ordered, context)
    else:
        status = load().twinfuse_linear_relu_backward(*ordered, relu_grad, context)
    if status != OK:
        for name, output in outputs.items():
            same = output.operand.base.view(np.uint8) == before[name].view(np.uint8)
            assert same.all(), f"a refused call wrote {name}"
        assert _core.launches() == launches, "a refused call was counted"
    return status


def refused(names: tuple[str, ...], changes: dict[str, CTensor | None], text: str) -> None:
    assert call(names, changes) == INVALID_ARGUMENT, "the call was taken"
    assert re.search(rf"^linear_relu(_forward|_backward)?: {text}", last_error()), last_error()


def test_right_arguments_are_taken() -> None:
    """What the other tests change one thing of."""
    assert call(FORWARD, {}) == OK, last_error()
    assert call(BACKWARD, {}) == OK, last_error()
    assert call(FORWARD, {"bias": None}) == OK, last_error()


BOTH = [(FORWARD, name) for name in FORWARD] + [(BACKWARD, name) for name in BACKWARD]
both = pytest.mark.parametrize(
    ("names", "name"), BOTH, ids=[f"{'fb'[len(n) > 4]}-{name}" for n, name in BOTH]
)
OPTIONAL = ("bias", "grad_input", "grad_weight", "grad_bias")


@pytest.mark.parametrize(("names", "name"), [pair for pair in BOTH if pair[1] not in OPTIONAL])
def test_missing_tensor(names: tuple[str, ...], name: str) -> None:
    refused(names, {name: None}, rf"{name}: expected .*, got (NULL|none|nothing)")


@pytest.mark.parametrize("names", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_missing_context(names: tuple[str, ...]) -> None:
    assert call(names, {}, no_context=True) == INVALID_ARGUMENT
    assert "context" in last_error()


@both
def test_data_that_is_null(names: tuple[str, ...], name: str) -> None:
    refused(names, {name: dense(SIZES[name], null=True)}, f"{name}: expected .*, got NULL")


@both
def test_wrong_size(names: tuple[str, ...], name: str) -> None:
    """One size off, in the last dimension and in the first."""
    right = SIZES[name]
    for dim in {0, len(right) - 1}:
        sizes = tuple(size + (i == dim) for i, size in enumerate(right))
        assert call(names, {name: dense(sizes)}) == INVALID_ARGUMENT, f"{name} {sizes} was taken"
        text = last_error()
        # Two tensors disagree; which of them is wrong is for the core to say.
        got = re.search(r"^linear_relu\w*: (\w+): expected (\[.*\]), got (\[.*\])$", text)
        assert got, text
        assert got[1] in names and got[2] != got[3], text


@pytest.mark.parametrize(
    ("names", "name", "sizes", "text"),
    [
        (FORWARD, "weight", (5, 6), r"weight: expected \[.*, 7\], got \[5, 6\]"),
        (FORWARD, "bias", (6,), r"bias: expected \[5\], got \[6\]"),
        (FORWARD, "bias", (1,), r"bias: expected \[5\], got \[1\]"),
        (FORWARD, "output", (2, 3, 6), r"output: expected \[2, 3, 5\], got \[2, 3, 6\]"),
        (FORWARD, "output", (6, 5), r"output: expected \[2, 3, 5\], got \[6, 5\]"),
        (BACKWARD, "output", (2, 4, 5), r"output: expected \[2, 3, 5\], got \[2, 4, 5\]"),
        (BACKWARD, "grad_weight", (7, 5), r"grad_weight: expected \[5, 7\], got \[7, 5\]"),
        (BACKWARD, "grad_bias", (7,), r"grad_bias: expected \[5\], got \[7\]"),
        (BACKWARD, "grad_input", (2, 3, 5), r"grad_input: expected \[2, 3, 7\], got \[2, 3, 5\]"),
    ],
)
def test_text_names_both_shapes(
    names: tuple[str, ...], name: str, sizes: tuple[int, ...], text: str
) -> None:
    refused(names, {name: dense(sizes)}, text)


@both
def test_wrong_rank(names: tuple[str, ...], name: str) -> None:
    sizes = SIZES[name]
    for wrong in ((), (1, *sizes), sizes[:-1]):
        changed = {name: dense(wrong)}
        assert call(names, changed) == INVALID_ARGUMENT, f"{name} of {wrong} was taken"
        assert last_error().startswith("linear_relu"), last_error()


@both
def test_negative_rank_and_size(names: tuple[str, ...], name: str) -> None:
    negative_rank = dense(SIZES[name])
    negative_rank.ndim = -1
    refused(names, {name: negative_rank}, f"{name}: expected .*, got ")
    negative_size = dense((*SIZES[name][:-1], -1))
    refused(names, {name: negative_size}, rf"{name}: expected .*, got .*-1")


@both
def test_mixed_dtypes(names: tuple[str, ...], name: str) -> None:
    for dtype in ("float64", "bfloat16", "float16"):
        assert call(names, {name: dense(SIZES[name], dtype)}) == INVALID_ARGUMENT
        text = last_error()
        assert re.search(r"^linear_relu\w*: \w+: expected \w+, got \w+$", text), text
        assert dtype in text and "float32" in text, text


@both
@pytest.mark.parametrize("number", [4, -1, 1 << 30])
def test_unknown_dtype(names: tuple[str, ...], name: str, number: int) -> None:
    assert call(names, {name: dense(SIZES[name], number)}) == INVALID_ARGUMENT
    assert re.search(r"^linear_relu\w*: \w+: expected .*, got ", last_error()), last_error()


@pytest.mark.parametrize("number", [4, -1])
def test_unknown_dtype_of_all(number: int) -> None:
    for names in (FORWARD, BACKWARD):
        changes = {name: dense(SIZES[name], number) for name in names}
        assert call(names, changes) == INVALID_ARGUMENT
        assert re.search(rf"expected .*float32.*, got .*{number}", last_error()), last_error()


def test_more_elements_than_63_bits_count() -> None:
    """Strides of zero make such a view; products of its sizes must not wrap around."""
    huge = (1 << 32, 1 << 31)
    for k, n in ((2, 5), (0, 5)):
        changes = {
            "input": tensor(READ.ctypes.data, "float32", (*huge, k), (0, 0, 1)),
            "weight": dense((n, k)),
            "output": tensor(READ.ctypes.data, "float32", (*huge, n), (0, 0, 1)),
        }
        refused(FORWARD, changes, r"(input|output): expected .*, got .*4294967296, 2147483648")


@pytest.mark.parametrize("missing", ["input", "weight"])
def test_backward_without_what_a_gradient_reads(missing: str) -> None:
    refused(BACKWARD, {missing: None}, rf"{missing}: expected .*")
    other = {"input": "grad_weight", "weight": "grad_input"}[missing]
    assert call(BACKWARD, {missing: None, other: None}) == OK, last_error()


@pytest.mark.parametrize("value", [2, -1])
def test_unknown_relu_grad(value: int) -> None:
    assert call(BACKWARD, {}, relu_grad=value) == INVALID_ARGUMENT
    assert re.search(rf"^linear_relu\w*: relu_grad: expected .*, got {value}", last_error())


@pytest.mark.parametrize("names", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_cuda_is_unsupported_with_a_reason(names: tuple[str, ...]) -> None:
    assert call(names, {}, device=_core.DEVICES["cuda"]) == UNSUPPORTED
    assert re.search("^linear_relu: .*(CUDA|GPU)", last_error()), last_error()
    assert call(names, {}, device=7) in (INVALID_ARGUMENT, UNSUPPORTED)


def test_find_kernel_gives_a_reason() -> None:
    find = load().twinfuse_find_kernel
    for role, dtype, device, text in (
        (b"linear_relu_sideways", 0, 0, "linear_relu_sideways"),
        (b"linear_relu_forward", 9, 0, "9"),
        (b"linear_relu_forward", 0, 1, "GPU"),
        (b"linear_relu_forward", 0, 9, "linear_relu_forward"),
    ):
        assert find(role, dtype, device) is None
        assert text in last_error(), last_error()


def test_kernel_table() -> None:
    library = load()
    count = library.twinfuse_kernel_count()
    names = [library.twinfuse_kernel_name(i).decode() for i in range(count)]
    assert len(set(names)) == count > 0
    for role in ("forward", "backward"):
        for number in _core.DTYPES.values():
            found = library.twinfuse_find_kernel(f"linear_relu_{role}".encode(), number, 0)
            assert found.decode() in names and found.decode().startswith(f"linear_relu_{role}_")
    for index in (-1, count):
        assert library.twinfuse_kernel_name(index) is None
        assert library.twinfuse_kernel_launches(index) == -1
