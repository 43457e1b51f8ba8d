"""Memory formats of `twinfuse.torch.conv1d_relu` and `conv2d_relu`: those of the native layers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import native_conv, random  # noqa: E402

FORMATS = ["contiguous", "channels_last", "strided", "sliced", "hwio", "reversed"]
# input, weight, padding: ordinary, one channel, one pixel, one filter, and so on.
SHAPES = {
    "ordinary": ((2, 3, 5, 6), (4, 3, 3, 3), 1),
    "pointwise": ((2, 3, 5, 6), (4, 3, 1, 1), 0),
    "one_sample": ((1, 3, 5, 6), (4, 3, 3, 3), 1),
    "one_channel": ((2, 1, 5, 6), (4, 1, 3, 3), 1),
    "one_filter": ((2, 3, 5, 6), (1, 3, 3, 3), 0),
    "one_pixel": ((2, 3, 1, 1), (4, 3, 1, 1), 0),
    "one_output": ((2, 3, 3, 3), (4, 3, 3, 3), 0),
    "one_row": ((2, 3, 1, 7), (4, 3, 1, 3), 0),
    "one_element": ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    "1d": ((2, 3, 7), (4, 3, 3), 1),
    "1d_pointwise": ((2, 3, 7), (4, 3, 1), 0),
    "1d_one_output": ((2, 3, 3), (4, 3, 3), 0),
}


def stored(shape: tuple[int, ...], way: str, dtype: Any) -> Any:
    """Random numbers with the strides that an order of dimensions, or a slice, leads to."""
    ndim = len(shape)
    order = {
        "channels_last": [0, *range(2, ndim), 1],
        "sliced": [0, *range(2, ndim), 1],
        "hwio": [*range(2, ndim), 1, 0],
        "reversed": [*reversed(range(ndim))],
    }.get(way, [*range(ndim)])
    sizes = [shape[d] for d in order]
    values = random(*(n + 1 for n in sizes) if way in ("strided", "sliced") else sizes, dtype=dtype)
    values = values.detach()[tuple(slice(n) for n in sizes)]
    return values.permute([order.index(d) for d in range(ndim)]).requires_grad_()


def formats(tensor: Any) -> list[bool]:
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(2)
    return [
        tensor.is_contiguous(memory_format=f)
        for f in (torch.contiguous_format, torch.channels_last)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_formats_are_native(name: str, input_format: str, weight_format: str, dtype: str) -> None:
    input_shape, weight_shape, padding = SHAPES[name]
    op = tft.conv1d_relu if len(input_shape) == 3 else tft.conv2d_relu
    kind = getattr(torch, dtype)
    x, w = stored(input_shape, input_format, kind), stored(weight_shape, weight_format, kind)
    ours, theirs = op(x, w, padding=padding), native_conv(x, w, padding=padding)
    assert formats(ours) == formats(theirs), (ours.stride(), theirs.stride())
    grad = torch.ones_like(theirs)
    gx, gw = torch.autograd.grad(ours, (x, w), grad)
    (native_gx,) = torch.autograd.grad(theirs, x, grad)
    assert formats(gx) == formats(native_gx), (gx.stride(), native_gx.stride())
    if weight_format in ("channels_last", "hwio", "reversed"):
        assert all(a == b for a, b, n in zip(gw.stride(), w.stride(), w.shape) if n > 1)
    else:
        assert gw.is_contiguous()

    with FakeTensorMode() as mode:
        fake_x, fake_w = (mode.from_tensor(t) for t in (x, w))
        fake = op(fake_x, fake_w, padding=padding)
        fakes = torch.autograd.grad(fake, (fake_x, fake_w), torch.ones_like(fake))
    assert [t.stride() for t in (fake, *fakes)] == [t.stride() for t in (ours, gx, gw)]


@pytest.mark.parametrize("input_format", FORMATS)
def test_an_image_without_batch(input_format: str) -> None:
    x = stored((2, 3, 5, 6), input_format, torch.float32)[1]
    w = random(4, 3, 3, 3, dtype=torch.float32)
    ours, theirs = tft.conv2d_relu(x, w), native_conv(x, w)
    assert ours.is_contiguous() == theirs.is_contiguous()
    assert ours.shape == theirs.shape


def test_a_network_stays_channels_last() -> None:
    model = torch.nn.Sequential(tft.nn.ConvReLU2d(3, 8, 3), tft.nn.ConvReLU2d(8, 4, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
