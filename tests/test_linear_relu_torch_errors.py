"""`twinfuse.torch.linear_relu`: wrong calls, and calls that only the native layer serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import native  # noqa: E402

Call = tuple[Callable[[], tuple[Any, ...]], str]
r = torch.randn


def ones(*shape: int, dtype: Any) -> Any:
    return torch.ones(shape).to(dtype)


def expanded(*shape: int) -> Any:
    """A tensor of any size in four bytes."""
    return torch.zeros(()).expand(shape)


WRONG: dict[str, Call] = {
    "sizes": (lambda: (r(3, 4), r(6, 5)), "weight: expected [N, 4], got"),
    "sizes_no_rows": (lambda: (r(0, 4), r(6, 5)), "weight: expected [N, 4], got"),
    "weight_3d": (lambda: (r(3, 4), r(2, 5, 4)), "weight: expected [N, K], got"),
    "weight_0d": (lambda: (r(3, 4), r(())), "weight: expected [N, K], got"),
    "input_0d": (lambda: (r(()), r(5, 4)), "input: expected [..., K], got"),
    "bias_length": (lambda: (r(3, 4), r(5, 4), r(6)), "bias: expected [5], got"),
    "bias_2d": (lambda: (r(3, 4), r(5, 4), r(2, 5)), "bias: expected [5], got"),
    "weight_dtype": (lambda: (r(3, 4), r(5, 4).double()), "weight: expected float32, got float64"),
    "bias_dtype": (lambda: (r(3, 4), r(5, 4), r(5).half()), "bias: expected float32, got float16"),
    "integer_input": (
        lambda: (ones(3, 4, dtype=torch.int64), r(5, 4)),
        "weight: expected torch.int64 like input, got torch.float32",
    ),
    "boolean": (
        lambda: (ones(3, 4, dtype=torch.bool), ones(5, 4, dtype=torch.bool)),
        "input: expected float32, float64, bfloat16, float16 for a fused kernel, got torch.bool",
    ),
    "complex": (
        lambda: (r(3, 4, dtype=torch.cfloat), r(5, 4, dtype=torch.cfloat)),
        "got torch.complex64",
    ),
    "bias_device": (
        lambda: (r(3, 4), r(5, 4), r(5, device="meta")),
        "bias: expected torch.float32 on cpu like input, got torch.float32 on meta",
    ),
    "list": (lambda: ([[1.0]], r(1, 1)), "'input' (position 1) must be Tensor, not list"),
    "weight_none": (lambda: (r(3, 4), None), "'weight' (position 2) must be Tensor"),
    "output_too_large": (
        lambda: (expanded(2**40, 1), expanded(2**40, 1)),
        "output: cannot allocate a tensor of shape [1099511627776, 1099511627776]",
    ),
    "output_too_large_no_reduction": (
        lambda: (expanded(2**20, 0), expanded(2**45, 0)),
        "output: cannot allocate",
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_raise_what_native_raises(name: str, requires_grad: bool) -> None:
    make, text = WRONG[name]
    arguments = make()
    if requires_grad:
        for a in arguments:
            if isinstance(a, torch.Tensor) and a.is_floating_point() and a._base is None:
                a.requires_grad_()
    with pytest.raises((RuntimeError, TypeError)) as expected:
        native(*arguments)
    with pytest.raises((RuntimeError, TypeError)) as got:
        tft.linear_relu(*arguments)
    assert type(got.value) is type(expected.value)
    assert text in str(got.value)
    if not isinstance(got.value, TypeError):
        assert str(got.value).startswith("linear_relu: ")


@pytest.mark.parametrize("name", ["sizes", "weight_3d", "bias_length", "weight_dtype"])
def test_operator_and_its_trace_raise(name: str) -> None:
    make, text = WRONG[name]
    argument = text.partition(":")[0]
    with pytest.raises(RuntimeError, match=f"linear_relu: {argument}: expected"):
        torch.ops.twinfuse.linear_relu(*make())
    meta = [a.to("meta") for a in make()]
    with pytest.raises(RuntimeError, match=f"linear_relu: {argument}: expected"):
        torch.ops.twinfuse.linear_relu(*meta)


SERVED_BY_NATIVE: dict[str, Call] = {
    "weight_vector": (lambda: (r(3, 4), r(4)), "weight: expected [N, 4]"),
    "bias_one": (lambda: (r(3, 4), r(5, 4), r(1)), "bias: expected [5]"),
    "bias_scalar": (lambda: (r(3, 4), r(5, 4), r(())), "bias: expected [5]"),
    "bias_full": (lambda: (r(3, 4), r(5, 4), r(3, 5)), "bias: expected [5]"),
    "bias_one_batched": (lambda: (r(2, 3, 4), r(5, 4), r(1)), "bias: expected [5]"),
    "integers": (
        lambda: (ones(3, 4, dtype=torch.int64), -ones(5, 4, dtype=torch.int64)),
        "no kernel takes this dtype",
    ),
    "sparse_weight": (lambda: (r(3, 4), r(5, 4).to_sparse()), "weight: expected a dense tensor"),
    "sparse_input": (lambda: (r(3, 4).to_sparse(), r(5, 4)), "input: expected a dense tensor"),
}


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", SERVED_BY_NATIVE)
def test_unusual_calls_take_the_native_path(name: str, launched: Launched) -> None:
    make, reason = SERVED_BY_NATIVE[name]
    arguments = make()
    with pytest.warns(twinfuse.FallbackWarning) as warned, launched("linear_relu_", times=0):
        ours = tft.linear_relu(*arguments)
    assert torch.equal(ours, native(*arguments))
    fallbacks = [w for w in warned if w.category is twinfuse.FallbackWarning]
    assert len(fallbacks) == 1 and reason in str(fallbacks[0].message)
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="linear_relu"):
        tft.linear_relu(*arguments)
    with twinfuse.use_backend("reference"), twinfuse.strict():
        assert torch.equal(tft.linear_relu(*arguments), native(*arguments))


@pytest.mark.allow_fallback
def test_unusual_shapes_differentiate() -> None:
    x, w, b = r(3, 4).requires_grad_(), r(5, 4).requires_grad_(), r(1).requires_grad_()
    with pytest.warns(twinfuse.FallbackWarning):
        ours = torch.autograd.grad(tft.linear_relu(x, w, b).pow(2).sum(), (x, w, b))
    theirs = torch.autograd.grad(native(x, w, b).pow(2).sum(), (x, w, b))
    assert all(torch.equal(a, c) for a, c in zip(ours, theirs))


@pytest.mark.allow_fallback
def test_binding_has_its_own_reference() -> None:
    """Below Python, an unserved dtype runs on torch's operators too, and is reported."""
    x, w = torch.arange(-6, 6).reshape(3, 4), torch.arange(-10, 10).reshape(5, 4)
    b = torch.arange(5)
    grad = torch.arange(15).reshape(3, 5) - 7
    with pytest.warns(twinfuse.FallbackWarning, match="no kernel takes this dtype"):
        y = torch.ops.twinfuse._linear_relu(x, w, b)
    assert torch.equal(y, native(x, w, b))
    got = torch.ops.twinfuse._linear_relu_backward(grad, y, x, w, True, True, True)
    masked = grad * (y > 0)
    for result, expected in zip(got, (masked @ w, masked.t() @ x, masked.sum(0))):
        assert torch.equal(result, expected)
    vector = torch.ops.twinfuse._linear_relu_backward(grad[0], y[0], x[0], w, True, True, False)
    assert torch.equal(vector[0], masked[0] @ w)
    assert torch.equal(vector[1], torch.outer(masked[0], x[0])) and vector[2] is None
    with twinfuse.strict(), pytest.raises(RuntimeError, match="runs on the framework's own layers"):
        torch.ops.twinfuse._linear_relu(x, w, b)


def test_backward_operator_refuses_what_does_not_fit() -> None:
    op = torch.ops.twinfuse._linear_relu_backward
    x, w, y, g = r(3, 4), r(5, 4), r(3, 5), r(3, 5)
    for arguments in ((g, y, None, w), (g, y, x, None), (g, y, r(2, 4), w), (g, r(3, 4), x, w)):
        with pytest.raises(RuntimeError, match="linear_relu: "):
            op(*arguments, True, True, True)


def test_more_than_2_to_31_elements() -> None:
    rows, columns = expanded(0, 2**33), expanded(3, 2**33)
    assert tft.linear_relu(rows, columns).shape == (0, 3)
    assert tft.linear_relu(expanded(0, 1), expanded(2**33, 1)).shape == (0, 2**33)

    # Only two pages of this memory are ever touched.
    storage = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    far = storage.as_strided((2, 4), (2**31, 1))
    far.copy_(torch.arange(8.0).reshape(2, 4) - 3)
    near, w = far.clone().requires_grad_(), torch.ones(3, 4).bfloat16().requires_grad_()
    far.requires_grad_()
    y = tft.linear_relu(far, w)
    assert torch.equal(y, native(near, w))
    ours = torch.autograd.grad(y.sum(), (far, w))
    theirs = torch.autograd.grad(native(near, w).sum(), (near, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.allow_fallback
def test_a_backend_that_cannot_serve_falls_back() -> None:
    x, w = r(3, 4), r(5, 4)
    with twinfuse.use_backend("cuda"), pytest.warns(twinfuse.FallbackWarning, match="'cuda'"):
        assert torch.equal(tft.linear_relu(x, w), native(x, w))


def test_reference_backend_launches_nothing(launched: Launched) -> None:
    x, w = r(3, 4), r(5, 4)
    with twinfuse.use_backend("reference"), launched("linear_relu_", times=0):
        assert torch.equal(tft.linear_relu(x, w), native(x, w))
    with twinfuse.use_backend("cpu"), launched("linear_relu_forward_f32", times=1):
        tft.linear_relu(x, w)


def test_meta_tensors() -> None:
    x, w = r(3, 4, device="meta"), r(5, 4, device="meta")
    y = tft.linear_relu(x, w)
    assert y.device.type == "meta" and y.shape == (3, 5)


WITHOUT_BINDING = """
import warnings
import torch
from twinfuse import _core
_core.LIBRARY = _core.LIBRARY.with_name("absent.so")
import twinfuse, twinfuse.torch as tft
x, w, b = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
expected = torch.relu(torch.nn.functional.linear(x, w, b))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for op in (tft.linear_relu, torch.ops.twinfuse.linear_relu, tft.linear_relu):
        assert torch.equal(op(x, w, b), expected)
        assert torch.autograd.gradcheck(op, (x, w, b))
assert [w.category for w in warned] == [twinfuse.FallbackWarning], warned
assert "compiled core is missing" in str(warned[0].message), warned[0]
y = torch.compile(tft.nn.LinearReLU(4, 5).double(), fullgraph=True, backend="aot_eager")(x)
assert twinfuse.explain(tft.linear_relu, x, w)[0].backend == "reference"
"""


@pytest.mark.slow
def test_everything_works_without_the_compiled_core() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_BINDING], check=True)
