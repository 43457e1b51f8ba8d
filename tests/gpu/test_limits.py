"""Sizes that no memory here could hold: what is launched for them, and what is not."""

from __future__ import annotations

import ctypes

import pytest

from tests.core_api import OK, UNSUPPORTED, CConv, CTensor, last_error, load, tensor
from tests.gpu import fake_driver, launcher
from tests.gpu.fake_driver import Driver, driver_fixture  # noqa: F401
from tests.gpu.replay import GpuLender


def call_on_nothing(rows: int, cols: int, depth: int, lender: GpuLender, dtype: str) -> int:
    """The forward pass on addresses behind which there is no memory: what is launched is decoded
    and not run."""
    address = 1 << 44
    sizes = {"out": (rows, cols), "input": (rows, depth), "weight": (cols, depth), "bias": (cols,)}
    tensors = [
        tensor(address + (i << 40), dtype, size, (*size[1:], 1))
        for i, size in enumerate(sizes.values())
    ]
    status = load().twinfuse_linear_relu_forward(*tensors, lender.context())
    if status == OK:
        lender.check()
    return status


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_products_go_through_descriptors(driver: Driver, dtype: str) -> None:
    lender, size = GpuLender(interpret=False, dtype=dtype, index=fake_driver.LARGE), 4096
    assert call_on_nothing(size, size, size, lender, dtype) == OK, last_error()
    (ran,) = lender.ran
    assert ran.variant.a.startswith("tensor_") and ran.variant.persistent
    tile = ran.variant.tile
    tiles = launcher.divide(size, tile.m) * launcher.divide(size, tile.n)
    assert ran.launch.grid == (min(tiles, 132), 1, 1)
    assert ran.launch.shared > 48 << 10


def test_what_cannot_be_counted_is_not_served(driver: Driver) -> None:
    lender = GpuLender(interpret=False)
    assert call_on_nothing(1 << 33, 16, 16, lender, "float16") == UNSUPPORTED
    assert last_error().startswith("linear_relu: ")
    assert driver.launch_count == 0


def convolution(dilation: int) -> CConv:
    """Of 3x3 taps, as far apart in the columns, and padded so that the output is as large as the
    input."""
    both = ctypes.c_int64 * 2
    return CConv(both(1, 1), both(1, dilation), both(1, dilation), both(1, dilation), 1)


def images_on_nothing(sizes: tuple[int, ...], at: int) -> CTensor:
    """Channels last, float16."""
    n, c, h, w = sizes
    return tensor((1 << 44) + (at << 40), "float16", (n, c, h, w), (h * w * c, 1, w * c, c))


def conv_on_nothing(
    input: tuple[int, ...], filters: int, dilation: int, bias: int, lender: GpuLender
) -> int:
    """A 3x3 convolution; `bias`: bytes that it lies away from an address that vectors may have."""
    n, c, h, w = input
    status = load().twinfuse_conv_relu_forward(
        images_on_nothing((n, filters, h, w), 0),
        images_on_nothing(input, 1),
        images_on_nothing((filters, c, 3, 3), 2),
        tensor((1 << 44) + (3 << 40) + bias, "float16", (filters,), (1,)),
        convolution(dilation),
        lender.context(),
    )
    if status == OK:
        lender.check()
    return status


def test_large_images_are_written_by_boxes_alone(driver: Driver) -> None:
    """A result of 2^32 elements may be copied in boxes, but not written element by element."""
    image = (1, 16, 8192, 8192)
    lender = GpuLender(interpret=False, dtype="float16", index=fake_driver.LARGE)
    assert conv_on_nothing(image, 64, 1, 0, lender) == OK, last_error()
    assert [ran.variant.store for ran in lender.ran] == ["tensor_windows"]
    driver.clear()
    assert conv_on_nothing(image, 64, 1, 2, lender) == UNSUPPORTED
    assert "32 bits" in last_error() and driver.launch_count == 0


def test_windows_beyond_32_bits_are_not_served(driver: Driver) -> None:
    lender = GpuLender(interpret=False, dtype="float16")
    assert conv_on_nothing((1, 16, 8, 8), 16, 1 << 32, 0, lender) == UNSUPPORTED
    assert "32 bits" in last_error() and driver.launch_count == 0


def backward_on_nothing(filters: int, wanted: str, lender: GpuLender) -> int:
    """Of 3x3 windows over [16, 16384, 8, 8]; `wanted`: a gradient, or none."""
    c = 16384
    weight = images_on_nothing((filters, c, 3, 3), 4)
    grad, output = (images_on_nothing((16, filters, 8, 8), at) for at in (1, 2))
    return load().twinfuse_conv_relu_backward(
        None,
        weight if wanted == "grad_weight" else None,
        None,
        grad,
        output,
        images_on_nothing((16, c, 8, 8), 3),
        None,
        convolution(1),
        0,
        lender.context(),
    )


def test_large_gradients_of_weights_are_not_served(driver: Driver) -> None:
    """Parts are added up into 2^31 elements and more, found by offsets of 32 bits."""
    lender = GpuLender(interpret=False, dtype="float16", index=fake_driver.LARGE)
    assert backward_on_nothing(16384, "grad_weight", lender) == UNSUPPORTED
    assert "32 bits" in last_error()


def test_no_gradient_asked_for_launches_nothing(driver: Driver) -> None:
    lender = GpuLender(interpret=False, dtype="float16")
    assert backward_on_nothing(16, "", lender) == OK, last_error()
    assert driver.launch_count == 0
