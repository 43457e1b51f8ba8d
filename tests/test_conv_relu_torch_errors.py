"""`conv1d_relu` and `conv2d_relu` of `twinfuse.torch`: wrong calls, and those for native only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import native_conv  # noqa: E402

Arguments = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
r = torch.randn


def call(*tensors: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tensors, options


def images(*tensors: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (r(2, 3, 5, 6), r(4, 3, 3, 2), *tensors), options


def ones(*shape: int, dtype: Any) -> Any:
    return torch.ones(shape).to(dtype)


def expanded(*shape: int) -> Any:
    """A tensor of any size in four bytes."""
    return torch.zeros(()).expand(shape)


WRONG: dict[str, tuple[Arguments, str]] = {
    "channels": (
        lambda: call(r(2, 5, 5, 6), r(4, 3, 3, 2)),
        "input: expected [N, 3, H, W], got [2, 5, 5, 6]",
    ),
    "input_2d": (
        lambda: call(r(5, 6), r(4, 3, 3, 2)),
        "input: expected [N, C, H, W], got shape [5, 6]",
    ),
    "input_5d": (lambda: call(r(1, 2, 3, 5, 6), r(4, 3, 3, 2)), "input: expected [N, C, H, W]"),
    "weight_3d": (
        lambda: call(r(2, 3, 5, 6), r(4, 3, 3)),
        "weight: expected [K, C / groups, R, S], got shape [4, 3, 3]",
    ),
    "bias_length": (lambda: images(r(5)), "bias: expected [4], got"),
    "bias_one": (lambda: images(r(1)), "bias: expected [4], got"),
    "bias_2d": (lambda: images(r(4, 1)), "bias: expected [4], got"),
    "weight_dtype": (
        lambda: call(r(2, 3, 5, 6), r(4, 3, 3, 2).double()),
        "weight: expected float32, got float64",
    ),
    "bias_dtype": (lambda: images(r(4).half()), "bias: expected float32, got float16"),
    "kernel_too_large": (
        lambda: call(r(2, 3, 2, 6), r(4, 3, 3, 2)),
        "weight: expected a kernel no larger than the padded input, got 3",
    ),
    "kernel_empty": (lambda: call(r(2, 3, 5, 6), r(4, 3, 0, 2)), "weight: expected a kernel of 1"),
    "no_filters": (
        lambda: call(r(2, 3, 5, 6), r(0, 3, 3, 2)),
        "weight: expected [K, C / groups, R, S], got shape [0, 3, 3, 2]",
    ),
    "no_pixels": (
        lambda: ((r(2, 3, 0, 6), r(4, 3, 3, 2)), {"padding": 2}),
        "input: expected one pixel or more, got shape [2, 3, 0, 6]",
    ),
    "groups": (lambda: images(groups=2), "input: expected [N, 6, H, W], got [2, 3, 5, 6]"),
    "groups_of_filters": (
        lambda: call(r(2, 3, 5, 6), r(4, 1, 3, 2), groups=3),
        "weight: expected filters that the groups divide, got 4",
    ),
    "groups_0": (lambda: images(groups=0), "groups: expected 1 or more, got 0"),
    "groups_float": (lambda: images(groups=1.0), "groups: expected an int, got 1.0"),
    "groups_bool": (lambda: images(groups=True), "groups: expected an int, got True"),
    "stride_0": (lambda: images(stride=0), "stride: expected 1 or more, got 0"),
    "stride_negative": (lambda: images(stride=(1, -2)), "stride: expected 1 or more, got -2"),
    "stride_float": (lambda: images(stride=1.0), "stride: expected an int or 2 of them, got 1.0"),
    "stride_floats": (lambda: images(stride=(1.0, 1)), "stride: expected an int or 2 of them"),
    "stride_bool": (lambda: images(stride=True), "stride: expected an int or 2 of them, got True"),
    "stride_none": (lambda: images(stride=None), "stride: expected an int or 2 of them, got None"),
    "stride_three": (lambda: images(stride=(1, 1, 1)), "stride: expected an int or 2 of them"),
    "stride_empty": (lambda: images(stride=()), "stride: expected an int or 2 of them, got ()"),
    "dilation_0": (lambda: images(dilation=0), "dilation: expected 1 or more, got 0"),
    "dilation_negative": (lambda: images(dilation=-1), "dilation: expected 1 or more, got -1"),
    "padding_negative": (lambda: images(padding=-1), "padding: expected 0 or more, got -1"),
    "padding_four": (lambda: images(padding=(1, 1, 1, 1)), "padding: expected an int or 2 of them"),
    "padding_unknown": (lambda: images(padding="Same"), "expected 'same' or 'valid', got 'Same'"),
    "padding_same_stride": (
        lambda: images(padding="same", stride=2),
        "padding: expected numbers for stride 2, got 'same'",
    ),
    "padding_past_64_bits": (lambda: images(padding=2**63), "padding: expected"),
    "boolean": (
        lambda: call(*(ones(*s, dtype=torch.bool) for s in ((2, 3, 5, 6), (4, 3, 3, 2)))),
        "input: expected float32, float64, bfloat16, float16 for a fused kernel, got torch.bool",
    ),
    "complex": (
        lambda: call(*(r(*s, dtype=torch.cfloat) for s in ((2, 3, 5, 6), (4, 3, 3, 2)))),
        "got torch.complex64",
    ),
    "list": (lambda: call([[[1.0]]], r(1, 1, 1, 1)), "invalid combination of arguments"),
    "weight_none": (lambda: call(r(2, 3, 5, 6), None), "invalid combination of arguments"),
    "1d_input_4d": (lambda: call(r(2, 3, 5, 6), r(4, 3, 2)), "input: expected [N, C, W], got"),
    "1d_channels": (lambda: call(r(2, 5, 6), r(4, 3, 2)), "input: expected [N, 3, W], got"),
    "1d_stride_two": (lambda: call(r(2, 3, 6), r(4, 3, 2), stride=(1, 1)), "expected an int, got"),
    "1d_padding_two": (
        lambda: call(r(2, 3, 6), r(4, 3, 2), padding=[1, 1]),
        "expected an int, got",
    ),
    "output_too_large": (
        lambda: call(expanded(2**31, 1, 2**16, 2**10), expanded(2**20, 1, 1, 1)),
        "output: cannot allocate a tensor of shape [2147483648, 1048576, 65536, 1024]",
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_raise_what_native_raises(name: str, requires_grad: bool) -> None:
    make, text = WRONG[name]
    tensors, options = make()
    if requires_grad:
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t._base is None:
                t.requires_grad_()
    one = name.startswith("1d")
    op, layer = (tft.conv1d_relu, F.conv1d) if one else (tft.conv2d_relu, F.conv2d)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        F.relu(layer(*tensors, **options))
    with pytest.raises((RuntimeError, TypeError, ValueError)) as got:
        op(*tensors, **options)
    assert type(got.value) is type(expected.value)
    assert text in str(got.value)
    if "invalid combination" not in text:
        assert str(got.value).startswith("conv1d_relu: " if one else "conv2d_relu: ")
        assert str(got.value).count("d_relu") == 1


@pytest.mark.parametrize(
    "name",
    [
        *("channels", "weight_3d", "bias_length", "weight_dtype", "kernel_too_large", "no_filters"),
        *("groups_of_filters", "groups_0", "stride_0", "dilation_negative", "padding_negative"),
    ],
)
def test_operator_and_its_trace_raise(name: str) -> None:
    make, text = WRONG[name]
    tensors, options = make()
    argument = text.partition(":")[0]
    for arguments in (tensors, [t.to("meta") for t in tensors]):
        with pytest.raises(RuntimeError, match=f"conv2d_relu: {argument}: expected"):
            torch.ops.twinfuse.conv2d_relu(*arguments, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operator_counts_its_numbers(device: str) -> None:
    x, w = r(2, 3, 5, 6, device=device), r(4, 3, 3, 2, device=device)
    op = torch.ops.twinfuse.conv2d_relu
    with pytest.raises(RuntimeError, match="conv2d_relu: stride: expected 2 numbers, got 3"):
        op(x, w, None, [1, 1, 1])
    with pytest.raises(RuntimeError, match="conv2d_relu: padding: expected 4 numbers, got 3"):
        op(x, w, None, 1, [1, 1, 1])
    with pytest.raises(RuntimeError, match="conv2d_relu: input: expected"):
        op(x[0], w)


def test_private_operators_refuse_what_does_not_fit() -> None:
    x, w, y, g = r(2, 3, 5, 6), r(4, 3, 3, 2), r(2, 4, 3, 5), r(2, 4, 3, 5)
    conv = [1, 1, 1, 1, 0, 0, 0, 0, 1]
    for numbers in ([], [1], conv[:5], conv[:8], [*conv, 1], [0, *conv[1:]]):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.twinfuse._conv_relu(x, w, None, numbers)
    op = torch.ops.twinfuse._conv_relu_backward
    for tensors in (
        (r(2, 4, 3, 4), y, x, w),
        (g, r(2, 4, 3, 4), x, w),
        (g, y, r(1, 3, 5, 6), w),
        (g, y, x, r(4, 2, 3, 2)),
        (g, y, x[0], w),
        (g, y, x, w[0]),
        (g.double(), y, x, w),
        (g[0, 0, 0, 0], y, x, w),
    ):
        with pytest.raises(RuntimeError, match="conv2d_relu: "):
            op(*tensors, conv, True, True, True)


SERVED_BY_NATIVE: dict[str, tuple[Arguments, str]] = {
    "integers": (
        lambda: call(ones(2, 3, 5, 6, dtype=torch.int64), -ones(4, 3, 3, 2, dtype=torch.int64)),
        "no kernel takes this dtype",
    ),
    "mkldnn": (
        lambda: call(r(2, 3, 5, 6).to_mkldnn(), r(4, 3, 3, 2).to_mkldnn()),
        "input: expected a dense tensor",
    ),
    "stride_too_large": (lambda: images(stride=2**62), "too large"),
}


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", SERVED_BY_NATIVE)
def test_unusual_calls_take_the_native_path(name: str, launched: Launched) -> None:
    make, reason = SERVED_BY_NATIVE[name]
    tensors, options = make()
    expected = native_conv(*tensors, **options).to_dense()
    with pytest.warns(twinfuse.FallbackWarning) as warned, launched("conv_relu_", times=0):
        ours = tft.conv2d_relu(*tensors, **options)
    assert torch.equal(ours.to_dense(), expected)
    fallbacks = [w for w in warned if w.category is twinfuse.FallbackWarning]
    assert len(fallbacks) == 1 and reason in str(fallbacks[0].message)
    with twinfuse.strict(), pytest.raises(twinfuse.FallbackError, match="conv2d_relu"):
        tft.conv2d_relu(*tensors, **options)
    with twinfuse.use_backend("reference"), twinfuse.strict():
        assert torch.equal(tft.conv2d_relu(*tensors, **options).to_dense(), expected)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("pads", [[1, 0, 1, 0], [2, 0, 1, 3]], ids=["even", "uneven"])
def test_binding_has_its_own_reference(pads: list[int]) -> None:
    """Below Python, what no kernel serves runs on torch's operators too, and is reported."""
    top, left, bottom, right = pads
    x, w, b = (torch.randint(-3, 4, s) for s in ((2, 3, 5, 6), (4, 3, 3, 2), (4,)))
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    padded = F.pad(leaves[0], (left, right, top, bottom))
    expected = native_conv(padded, *leaves[1:], (2, 1), 0, (1, 2))
    conv = [2, 1, 1, 2, *pads, 1]
    with pytest.warns(twinfuse.FallbackWarning, match="no kernel takes this dtype"):
        y = torch.ops.twinfuse._conv_relu(x, w, b, conv)
    assert torch.equal(y.double(), expected)
    with twinfuse.strict(), pytest.raises(RuntimeError, match="runs on the framework's own layers"):
        torch.ops.twinfuse._conv_relu(x, w, b, conv)

    grad = torch.randint(-3, 4, y.shape)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        got = torch.ops.twinfuse._conv_relu_backward(grad, y, x, w, conv, *needs)
        for ours, theirs, wanted in zip(got, gradients, needs):
            assert torch.equal(ours.double(), theirs) if wanted else ours is None


def test_more_than_2_to_31_elements() -> None:
    assert tft.conv2d_relu(expanded(0, 2**33, 3, 3), expanded(2, 2**33, 3, 3)).shape == (0, 2, 1, 1)

    # Only a few pages of this memory are ever touched.
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = storage.as_strided((2, 1, 3, 3), (2**31, 9, 3, 1))
    far.copy_(torch.arange(18.0).reshape(2, 1, 3, 3) - 9)
    near, w = far.clone().requires_grad_(), torch.ones(2, 1, 2, 2).bfloat16().requires_grad_()
    far.requires_grad_()
    y = tft.conv2d_relu(far, w)
    assert torch.equal(y, native_conv(near, w))
    ours = torch.autograd.grad(y.sum(), (far, w))
    theirs = torch.autograd.grad(native_conv(near, w).sum(), (near, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.allow_fallback
def test_a_backend_that_cannot_serve_falls_back() -> None:
    (x, w), _ = images()
    with twinfuse.use_backend("cuda"), pytest.warns(twinfuse.FallbackWarning, match="'cuda'"):
        assert torch.equal(tft.conv2d_relu(x, w), native_conv(x, w))


def test_reference_backend_launches_nothing(launched: Launched) -> None:
    (x, w), _ = images()
    with twinfuse.use_backend("reference"), launched("conv_relu_", times=0):
        assert torch.equal(tft.conv2d_relu(x, w), native_conv(x, w))
    with twinfuse.use_backend("cpu"), launched("conv_relu_forward_f32", times=1):
        tft.conv2d_relu(x, w)


def test_meta_tensors() -> None:
    x, w = r(2, 3, 5, 6, device="meta"), r(4, 3, 3, 2, device="meta")
    y = tft.conv2d_relu(x, w, padding="same")
    assert y.device.type == "meta" and y.shape == (2, 4, 5, 6)


WITHOUT_BINDING = """
import warnings
import torch
import torch.nn.functional as F
from twinfuse import _core
_core.LIBRARY = _core.LIBRARY.with_name("absent.so")
import twinfuse, twinfuse.torch as tft
shapes = ((2, 2, 4, 3), (2, 2, 2, 2), (2,))
x, w, b = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)
expected = torch.relu(F.conv2d(x, w, b))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for op in (tft.conv2d_relu, torch.ops.twinfuse.conv2d_relu, tft.conv2d_relu):
        assert torch.equal(op(x, w, b), expected)
        assert torch.autograd.gradcheck(op, (x, w, b))
assert [w.category for w in warned] == [twinfuse.FallbackWarning], warned
assert "compiled core is missing" in str(warned[0].message), warned[0]
same = tft.conv2d_relu(x, w, b, padding="same")
torch.testing.assert_close(same, torch.relu(F.conv2d(x, w, b, padding="same")))
torch.testing.assert_close(torch.ops.twinfuse.conv2d_relu(x, w, b, 1, [0, 0, 1, 1]), same)
torch.testing.assert_close(torch.ops.twinfuse.conv1d_relu(x[:, :, 0], w[:, :, 0], None, 2, [1, 0]),
                           torch.relu(F.conv1d(F.pad(x[:, :, 0], (1, 0)), w[:, :, 0], None, 2)))
layer = tft.nn.ConvReLU2d(2, 2, 2).double()
y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
assert twinfuse.explain(tft.conv2d_relu, x, w)[0].backend == "reference"
"""


@pytest.mark.slow
def test_everything_works_without_the_compiled_core() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_BINDING], check=True)
