"""Conv+ReLU for PyTorch as tests call it: every form of the op, with one set of options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import require

require("torch")

import torch  # noqa: E402

import twinfuse.torch as tft  # noqa: E402
from tests.torch_cases import native_conv, random  # noqa: E402

Op = Callable[..., Any]
OPS = {
    "conv1d_function": tft.conv1d_relu,
    "conv1d_operator": torch.ops.twinfuse.conv1d_relu,
    "conv2d_function": tft.conv2d_relu,
    "conv2d_operator": torch.ops.twinfuse.conv2d_relu,
}
every_name = pytest.mark.parametrize("name", OPS)
OPTIONS = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}


def make(name: str, **options: Any) -> tuple[Any, Any, Any]:
    size, kernel = ((9,), (3,)) if name.startswith("conv1d") else ((5, 6), (3, 2))
    return random(3, 4, *size, **options), random(6, 2, *kernel, **options), random(6, **options)


def with_options(op: Op) -> Op:
    """Named ones are not for `torch.func.vmap` and `torch.jit.trace`, which split what they get."""

    def call(x: Any, w: Any, b: Any = None) -> Any:
        return op(x, w, b, **OPTIONS)

    return call


native = with_options(native_conv)
