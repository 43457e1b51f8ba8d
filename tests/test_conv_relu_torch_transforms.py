"""torch.func transforms and forward mode over Conv+ReLU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch._dynamo.testing  # noqa: E402, F811

import twinfuse  # noqa: E402
import twinfuse.torch as tft  # noqa: E402
from tests.conv_calls import OPS, Op, every_name, make, native, with_options  # noqa: E402
from tests.torch_cases import assert_same  # noqa: E402

FORWARD, BACKWARD = "conv_relu_forward_f64", "conv_relu_backward_f64"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch._dynamo.reset()


def transformed(kind: str, op: Op, x: Any, w: Any, b: Any) -> Any:
    def loss(weight: Any, images: Any) -> Any:
        return op(images, weight, b).pow(2).sum()

    stacked, f = torch.stack([w, 2 * w]), torch.func
    return {
        "grad": lambda: f.grad(loss)(w, x),
        "vmap_input": lambda: f.vmap(op, (1, None, None))(torch.stack([x, -x], 1), w, b),
        "vmap_weight": lambda: f.vmap(op, (None, 0, None))(x, stacked, b),
        "vmap_bias": lambda: f.vmap(op, (None, None, 1))(x, w, torch.stack([b, -b], 1)),
        "vmap_all": lambda: f.vmap(op)(torch.stack([x, -x]), stacked, torch.stack([b, -b])),
        "vmap_of_vmap": lambda: f.vmap(
            f.vmap(op, (0, None, None)), (None, 0, None)
        )(torch.stack([x, -x]), stacked, b),
        "per_sample_gradients": lambda: f.vmap(f.grad(loss), (None, 0))(w, x.unsqueeze(1)),
        "jacrev": lambda: f.jacrev(lambda w: op(x, w, b))(w),
        "jacfwd": lambda: f.jacfwd(lambda w: op(x, w, b))(w),
        "hessian": lambda: f.hessian(lambda b: op(x, w, b).pow(2).sum())(b),
        "jvp": lambda: f.jvp(lambda w: op(x, w, b), (w,), (torch.ones_like(w),)),
    }[kind]()  # fmt: skip


TRANSFORMS = [
    *("grad", "vmap_input", "vmap_weight", "vmap_bias", "vmap_all", "vmap_of_vmap"),
    *("per_sample_gradients", "jacrev", "jacfwd", "hessian", "jvp"),
]


@pytest.mark.allow_fallback
@every_name
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms(kind: str, name: str) -> None:
    tensors = make(name, grad=False)
    got = transformed(kind, with_options(OPS[name]), *tensors)
    assert_same(got, transformed(kind, native, *tensors))


@pytest.mark.allow_fallback
@every_name
@pytest.mark.parametrize("kind", ["per_sample_gradients", "jacfwd"])
def test_compiled_transforms(kind: str, name: str) -> None:
    tensors = make(name, grad=False)
    op = with_options(OPS[name])
    compiled = torch.compile(
        lambda *a: transformed(kind, op, *a), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(*tensors), transformed(kind, native, *tensors))


def test_vmap_of_the_operator_is_one_fused_call(launched: Launched) -> None:
    x, w, b = make("conv2d", grad=False)
    op = with_options(torch.ops.twinfuse.conv2d_relu)
    with launched(FORWARD, times=1):
        got = torch.func.vmap(op, (0, None, None))(torch.stack([x, -x]), w, b)
    assert_same(got, torch.stack([native(x, w, b), native(-x, w, b)]))
    plain = torch.ops.twinfuse.conv2d_relu
    with launched(FORWARD, times=1):
        got = torch.func.vmap(lambda x: plain(x, w[:, :1].repeat(1, 4, 1, 1)))(x.unsqueeze(1))
    assert got.shape == (3, 1, 6, 3, 5)


def test_transforms_say_that_they_fall_back() -> None:
    x, w, b = make("conv2d", grad=False)
    with pytest.raises(twinfuse.FallbackError, match=r"a torch\.func transform is active"):
        torch.func.grad(lambda w: tft.conv2d_relu(x, w, b, groups=2).sum())(w)


@pytest.mark.allow_fallback
@every_name
def test_forward_mode_keeps_tangents(name: str) -> None:
    import torch.autograd.forward_ad as forward_ad

    x, w, b = make(name)
    op = with_options(OPS[name])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        got, expected = (forward_ad.unpack_dual(f(dual, w, b)).tangent for f in (op, native))
    assert got is not None
    assert_same(got, expected)
