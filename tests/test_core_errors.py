"""Calls that the core must refuse: the status, and a text that says which argument and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.cases import LinearCase
from tests.conv_case import ConvCase
from tests.core_api import (
    INVALID_ARGUMENT,
    OK,
    SETTINGS,
    UNSUPPORTED,
    CTensor,
    Lender,
    Output,
    last_error,
    load,
    settings,
    tensor,
)
from tests.problem import Case
from twinfuse import _core

FORWARD = ("output", "input", "weight", "bias")
BACKWARD = ("grad_input", "grad_weight", "grad_bias", "grad_output", "output", "input", "weight")
READ = np.ones(1 << 12, np.float64)


@dataclass(frozen=True)
class Op:
    """Sizes of a right call, and whether it goes forward."""

    case: Case
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.case.name if isinstance(self.case, ConvCase) else self.case.op

    @property
    def function(self) -> Callable[..., int]:
        direction = "forward" if self.names is FORWARD else "backward"
        return getattr(load(), f"twinfuse_{self.case.op}_{direction}")

    @property
    def writes(self) -> tuple[str, ...]:
        return FORWARD[:1] if self.names is FORWARD else BACKWARD[:3]

    def sizes(self, tensor: str) -> tuple[int, ...]:
        tensor = tensor.removeprefix("grad_")
        if tensor == "bias":
            return self.case.weight_sizes[:1]
        return getattr(self.case, f"{tensor}_sizes")


# input [2, 3, 7], weight [5, 7], output [2, 3, 5]
LINEAR = [Op(LinearCase("right", (2, 3), 7, 5), names) for names in (FORWARD, BACKWARD)]
# input [2, 4, 9], weight [6, 2, 3], output [2, 6, 9]
CONV1D = [
    Op(ConvCase("right", 2, 4, (9,), 6, (3,), (1,), ((1, 1),), (1,), 2), names)
    for names in (FORWARD, BACKWARD)
]
# input [2, 4, 7, 9], weight [6, 2, 3, 2], output [2, 6, 7, 8]
PLANE = ConvCase("right", 2, 4, (7, 9), 6, (3, 2), (1, 1), ((1, 1), (0, 0)), (1, 1), 2)
CONV2D = [Op(PLANE, names) for names in (FORWARD, BACKWARD)]
OPS = [*LINEAR, *CONV1D, *CONV2D]


def dense(sizes: tuple[int, ...], dtype: str | int = "float32", null: bool = False) -> CTensor:
    strides = [0] * len(sizes)
    step = 1
    for i in reversed(range(len(sizes))):
        strides[i], step = step, step * max(sizes[i], 1)
    strides = [min(stride, 1 << 40) for stride in strides]
    return tensor(None if null else READ.ctypes.data, dtype, sizes, strides)


def call(op: Op, changes: dict[str, CTensor | None], **given: Any) -> int:
    """One call with `changes` to otherwise right arguments; outputs must stay as they are."""
    outputs = {name: Output.poisoned(op.sizes(name), "float32") for name in op.writes}
    before = {name: output.operand.base.copy() for name, output in outputs.items()}
    arguments = {
        name: outputs[name].tensor if name in outputs else dense(op.sizes(name))
        for name in op.names
    }
    arguments.update(changes)
    rest = given.pop("settings", settings(op.case))
    rest += [given.pop("relu_grad", 0)] if op.names is BACKWARD else []
    context = None if given.pop("no_context", False) else Lender(**given).context()
    launches = _core.launches()
    status = op.function(*(arguments[name] for name in op.names), *rest, context)
    if status != OK:
        for name, output in outputs.items():
            same = output.operand.base.view(np.uint8) == before[name].view(np.uint8)
            assert same.all(), f"a refused call wrote {name}"
        assert _core.launches() == launches, "a refused call was counted"
    return status


def refused(op: Op, changes: dict[str, CTensor | None], text: str, **given: Any) -> None:
    assert call(op, changes, **given) == INVALID_ARGUMENT, "the call was taken"
    assert re.search(rf"^{op.name}: {text}", last_error()), last_error()


def ids(op: Op) -> str:
    return f"{op.name}-{'forward' if op.names is FORWARD else 'backward'}"


every_op = pytest.mark.parametrize("op", OPS, ids=ids)
BOTH = [(op, name) for op in OPS for name in op.names]
both = pytest.mark.parametrize(("op", "name"), BOTH, ids=[f"{ids(op)}-{name}" for op, name in BOTH])
backward = pytest.mark.parametrize("op", [op for op in OPS if op.names is BACKWARD], ids=ids)
OPTIONAL = ("bias", "grad_input", "grad_weight", "grad_bias")


@every_op
def test_right_arguments_are_taken(op: Op) -> None:
    """What the other tests change one thing of."""
    assert call(op, {}) == OK, last_error()
    assert call(op, {name: None for name in OPTIONAL if name in op.names}) == OK, last_error()


@pytest.mark.parametrize(("op", "name"), [pair for pair in BOTH if pair[1] not in OPTIONAL])
def test_missing_tensor(op: Op, name: str) -> None:
    assert call(op, {name: None}) == INVALID_ARGUMENT, "the call was taken"
    # The rank of a missing tensor cannot tell one dimension from two.
    assert re.search(rf"_relu: {name}: expected a tensor, got NULL", last_error()), last_error()


@every_op
def test_missing_context(op: Op) -> None:
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
        sizes = tuple(size + (i == dim) for i, size in enumerate(right))
        assert call(op, {name: dense(sizes)}) == INVALID_ARGUMENT, f"{name} {sizes} was taken"
        text = last_error()
        # Two tensors disagree; which of them is wrong is for the core to say.
        got = re.search(rf"^{op.name}: (\w+): expected (.*), got (.*)$", text)
        assert got, text
        assert got[1] in op.names and got[2] != got[3], text


@pytest.mark.parametrize(
    ("op", "name", "sizes", "text"),
    [
        (LINEAR[0], "weight", (5, 6), r"weight: expected \[.*, 7\], got \[5, 6\]"),
        (LINEAR[0], "bias", (6,), r"bias: expected \[5\], got \[6\]"),
        (LINEAR[0], "bias", (1,), r"bias: expected \[5\], got \[1\]"),
        (LINEAR[0], "output", (2, 3, 6), r"output: expected \[2, 3, 5\], got \[2, 3, 6\]"),
        (LINEAR[0], "output", (6, 5), r"output: expected \[2, 3, 5\], got \[6, 5\]"),
        (LINEAR[1], "output", (2, 4, 5), r"output: expected \[2, 3, 5\], got \[2, 4, 5\]"),
        (LINEAR[1], "grad_weight", (7, 5), r"grad_weight: expected \[5, 7\], got \[7, 5\]"),
        (LINEAR[1], "grad_bias", (7,), r"grad_bias: expected \[5\], got \[7\]"),
        (LINEAR[1], "grad_input", (2, 3, 5),
         r"grad_input: expected \[2, 3, 7\], got \[2, 3, 5\]"),
        (CONV1D[0], "output", (2, 6, 8), r"output: expected \[2, 6, 9\], got \[2, 6, 8\]"),
        (CONV2D[0], "input", (2, 3, 7, 9), r"input: expected \[N, 4, H, W\], got \[2, 3, 7, 9\]"),
        (CONV2D[0], "output", (2, 7, 8, 6), r"output: expected \[2, 6, 7, 8\], got \[2, 7, 8, 6\]"),
        (CONV2D[0], "bias", (4,), r"bias: expected \[6\], got \[4\]"),
        (CONV2D[0], "weight", (5, 2, 3, 2), r"weight: expected .*groups.*, got .*5"),
        (CONV2D[1], "output", (2, 6, 7, 9), r"output: expected \[2, 6, 7, 8\], got \[2, 6, 7, 9\]"),
        (CONV2D[1], "grad_bias", (4,), r"grad_bias: expected \[6\], got \[4\]"),
    ],
)  # fmt: skip
def test_text_names_both_shapes(op: Op, name: str, sizes: tuple[int, ...], text: str) -> None:
    refused(op, {name: dense(sizes)}, text)


@both
def test_wrong_rank(op: Op, name: str) -> None:
    sizes = op.sizes(name)
    for wrong in ((), (1, *sizes), (1, 1, 1, *sizes), sizes[:-1]):
        changed = {name: dense(wrong)}
        assert call(op, changed) == INVALID_ARGUMENT, f"{name} of {wrong} was taken"
        assert re.search(r"^(linear|conv\dd)_relu: \w+: expected .*, got ", last_error())


@both
def test_negative_rank_and_size(op: Op, name: str) -> None:
    negative_rank = dense(op.sizes(name))
    negative_rank.ndim = -1
    assert call(op, {name: negative_rank}) == INVALID_ARGUMENT
    assert re.search(rf"_relu: {name}: expected .*, got ", last_error()), last_error()
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


def test_more_elements_than_63_bits_count() -> None:
    """Strides of zero make such a view; products of its sizes must not wrap around."""
    huge = (1 << 32, 1 << 31)
    for k, n in ((2, 5), (0, 5)):
        changes = {
            "input": tensor(READ.ctypes.data, "float32", (*huge, k), (0, 0, 1)),
            "weight": dense((n, k)),
            "output": tensor(READ.ctypes.data, "float32", (*huge, n), (0, 0, 1)),
        }
        refused(LINEAR[0], changes, r"(input|output): expected .*, got .*4294967296, 2147483648")


@pytest.mark.parametrize("missing", ["input", "weight"])
@backward
def test_backward_without_what_a_gradient_reads(op: Op, missing: str) -> None:
    refused(op, {missing: None}, rf"{missing}: expected .*")
    other = {"input": "grad_weight", "weight": "grad_input"}[missing]
    assert call(op, {missing: None, other: None}) == OK, last_error()


@pytest.mark.parametrize("value", [2, -1])
@backward
def test_unknown_relu_grad(op: Op, value: int) -> None:
    refused(op, {}, rf"relu_grad: expected .*, got {value}", relu_grad=value)


@every_op
def test_cuda_is_unsupported_with_a_reason(op: Op) -> None:
    assert call(op, {}, device=_core.DEVICES["cuda"]) == UNSUPPORTED
    assert re.search(f"^{op.name}: .*(CUDA|GPU)", last_error()), last_error()
    assert call(op, {}, device=7) in (INVALID_ARGUMENT, UNSUPPORTED)


@pytest.mark.parametrize("name", SETTINGS)
def test_find_kernel_gives_a_reason(name: str) -> None:
    find = load().twinfuse_find_kernel
    for role, dtype, device, text in (
        ("sideways", 0, 0, f"{name}_sideways"),
        ("forward", 9, 0, "9"),
        ("forward", 1, 1, "GPU"),
        ("forward", 0, 9, f"{name}_forward"),
    ):
        assert find(f"{name}_{role}".encode(), dtype, device) is None
        assert text in last_error(), last_error()


def test_kernel_table() -> None:
    library = load()
    count = library.twinfuse_kernel_count()
    names = [library.twinfuse_kernel_name(i).decode() for i in range(count)]
    assert len(set(names)) == count > 0
    for role in (f"{op}_{way}" for op in SETTINGS for way in ("forward", "backward")):
        for number in _core.DTYPES.values():
            found = library.twinfuse_find_kernel(role.encode(), number, 0)
            assert found.decode() in names and found.decode().startswith(f"{role}_")
    for index in (-1, count):
        assert library.twinfuse_kernel_name(index) is None
        assert library.twinfuse_kernel_launches(index) == -1
