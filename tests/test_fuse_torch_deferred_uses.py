"""What can be done with the output of a deferred Linear besides a ReLU: all of native."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from tests.conftest import Launched, require

torch = require("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import twinfuse.torch as tft  # noqa: E402
from tests.arrays import DTYPES  # noqa: E402
from tests.deferred_models import Probe, assert_same, inputs, probes, run  # noqa: E402
from twinfuse.torch._deferred import _open  # noqa: E402
from twinfuse.torch._deferred_tensor import Deferred  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(6)


METADATA = {
    "shape": lambda z: (z.shape, z.size(), z.size(-1), z.dim(), z.ndim, z.ndimension(), len(z)),
    "count": lambda z: (z.numel(), z.nelement(), torch.numel(z), z.nbytes, z.itemsize),
    "element": lambda z: (z.element_size(), z.dtype, z.layout, z.device, z.get_device()),
    "memory": lambda z: (z.stride(), z.stride(0), z.storage_offset(), z.is_contiguous()),
    "graph": lambda z: (z.requires_grad, z.is_leaf, z.is_inference()),
    "kind": lambda z: (z.is_floating_point(), z.is_complex(), z.is_signed(), z.is_conj()),
    "functions": lambda z: (torch.is_floating_point(z), torch.is_complex(z), torch.is_tensor(z)),
    "device": lambda z: (z.is_cpu, z.is_cuda, z.is_meta, z.is_mps, z.is_xpu, z.is_neg()),
    "other": lambda z: (z.is_sparse, z.is_sparse_csr, z.is_quantized, z.is_nested),
    "classes": lambda z: [isinstance(z, k) for k in (torch.Tensor, torch.DoubleTensor)],
    "no_classes": lambda z: [isinstance(z, k) for k in (nn.Parameter, torch.FloatTensor)],
    "hash": lambda z: hash(z) == id(z),
}
SHAPES = [(5, 8), (8,), (2, 3, 8), (0, 8), (1, 8), (1, 1, 8), (2, 0, 8), (4, 1, 3, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_without_values(
    name: str, graded: bool, shape: tuple[int, ...], launched: Launched
) -> None:
    native, ours = probes()
    seen: list[Any] = []

    def look(z: Any) -> Any:
        try:
            seen.append(METADATA[name](z))
        except TypeError as error:  # of what native refuses
            seen.append(str(error))
        return z

    def use(z: Any) -> Any:
        assert type(look(z)) is Deferred
        return F.relu(z)

    x = inputs(*shape)
    with torch.set_grad_enabled(graded), launched("linear_relu_forward_", times=1):
        native(x, look)
        ours(x, use)
    assert seen[0] == seen[1]


def in_strides(tensor: Any) -> Any:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


INPUTS = {
    "transposed": lambda: in_strides(inputs(5, 8)),
    "batched": lambda: in_strides(inputs(2, 3, 8)),
    "expanded": lambda: inputs(1, 3, 8).expand(2, 3, 8),
    "sliced": lambda: inputs(6, 3, 16)[::2, :, ::2],
    "channels_last": lambda: inputs(2, 3, 4, 8).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata_of_strided_inputs(name: str, dtype: str, bias: bool) -> None:
    native, ours = probes(bias=bias, dtype=getattr(torch, dtype))
    x = INPUTS[name]().to(getattr(torch, dtype))
    formats = [torch.contiguous_format]
    formats += [torch.channels_last] if x.dim() == 4 else []
    seen: list[Any] = []

    def use(z: Any) -> Any:
        seen.append((z.shape, z.stride(), [z.is_contiguous(memory_format=f) for f in formats]))
        return z * 1

    torch.testing.assert_close(ours(x, use), native(x, use), rtol=0, atol=0)
    assert seen[0] == seen[1]


def forget(z: Any) -> Any:
    z.zero_()
    return z + 1


VALUES = {
    "arithmetic": lambda z: 2 * z + z / 3 - z**2,
    "index": lambda z: z[1:, ::2] + z[0, 0],
    "assign": lambda z: (z.__setitem__(0, 1.0), z)[1] * 1,
    "mask": lambda z: z.masked_fill(z > 0, 1.0),
    "method_in_place": lambda z: z.mul_(2).add_(1),
    "operator_in_place": lambda z: z.__iadd__(1),
    "zeroed": forget,
    "unsqueezed_in_place": lambda z: (z.unsqueeze_(0), z)[1] * z.shape[0] * z.dim(),
    "detached_in_place": lambda z: z.detach_() + 1,
    "view": lambda z: z.view(-1).relu(),
    "view_changed": lambda z: (z.view(-1).mul_(3), z)[1] * 1,
    "cat": lambda z: torch.cat([z, z.relu()]),
    "nested": lambda z: torch.stack((z, torch.zeros_like(z))).sum(0),
    "keyword": lambda z: torch.add(input=z, other=z),
    "keyword_relu": lambda z: torch.relu(input=z),
    "out": lambda z: torch.empty_like(z.detach()).copy_(z),
    "linear": lambda z: F.linear(z, torch.ones(2, 6, dtype=z.dtype)),
    "item": lambda z: z * z[0, 0].item(),
    "numpy": lambda z: z + torch.from_numpy(z.detach().numpy()),
    "array": lambda z: z + torch.tensor(z.tolist()),
    "iterate": lambda z: sum(row for row in z),
    "unpack": lambda z: torch.stack([*z]),
    "reversed": lambda z: torch.stack(list(reversed(z))),
    "compare": lambda z: z * (z == z) * (z > 0),
    "text": lambda z: z * len(repr(z)) * len(f"{z}") * len(str(z[0, 0].item())),
    "format": lambda z: z * len(f"{z.sum():.3f}"),
    "data": lambda z: z.data + z,
    "set_data": lambda z: (setattr(z, "data", torch.ones_like(z)), z)[1] * z,
    "to": lambda z: z.to(torch.float32).double(),
    "dlpack": lambda z: torch.from_dlpack(z.detach()) + z,
    "capsule": lambda z: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(z.data)) + z,
    "storage": lambda z: z * z.untyped_storage().nbytes() * (z.data_ptr() != 0),
    "memory": lambda z: z * z.numpy(force=True).sum(),
    "version": lambda z: z * (z._version + 1),
    "norm": lambda z: F.layer_norm(z, (6,)),
    "dropout": lambda z: F.dropout(z, 0.0),
    "batch": lambda z: F.softmax(z, -1).cumsum(0),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "nn": lambda z: nn.GELU()(nn.Identity()(z)),
    "einsum": lambda z: torch.einsum("ij,kj->ik", z, z),
    "matmul": lambda z: z @ z.T + (z.mT.t() @ z.t()),
    "type": lambda z: z * (z.type() == "torch.DoubleTensor"),
    "new": lambda z: z.new_ones(z.shape) + z,
    "random": lambda z: z + torch.zeros_like(z) + z.new_zeros(()),
    "copy": lambda z: copy.copy(z) + z,
    "complex": lambda z: torch.view_as_real(torch.complex(z, z)).sum(-1),
    "split": lambda z: torch.cat(z.chunk(2, -1)[::-1], -1),
    "requires_grad": lambda z: z.requires_grad_() * 1,
    "twice": lambda z: z.exp() * z.sin(),
    "ops": lambda z: torch.ops.aten.mul.Tensor(z, z) + torch.ops.aten.exp(z),
    "custom_op": lambda z: torch.ops.twinfuse.linear_relu(z, torch.ones(2, 6, dtype=z.dtype)),
    "our_op": lambda z: tft.linear_relu(z, torch.ones(2, 6, dtype=z.dtype)),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    assert_same(VALUES[name])
    with torch.no_grad():
        assert_same(VALUES[name])


@pytest.mark.parametrize("name", VALUES)
def test_values_after_a_fused_relu(name: str, launched: Launched) -> None:
    fuses = name not in ("view", "cat", "custom_op", "our_op", "keyword_relu")
    for graded in (True, False):
        with torch.set_grad_enabled(graded), launched("linear_relu_forward_", 1 if fuses else None):
            assert_same(lambda z: F.relu(z).sum() + VALUES[name](z))


def test_the_relu_before_and_after_the_value(launched: Launched) -> None:
    with launched("linear_relu_forward_", times=3):
        assert_same(lambda z: torch.relu(z) * 2 + z.sigmoid() + F.relu(z))
        assert_same(lambda z: z.sigmoid() + torch.relu(z) * 2)
        assert_same(lambda z: (z.relu().mul(2) * z.relu()).neg())


def test_the_object_becomes_a_plain_tensor() -> None:
    _, ours = probes()

    def use(z: Any) -> Any:
        z.note, reference, members = "kept", weakref.ref(z), {z: 1}
        assert type(z) is Deferred and members[z] == 1
        z.sum()
        assert type(z) is torch.Tensor and z.note == "kept" and reference() is z and members[z] == 1
        assert not hasattr(z, "_call") and "AddmmBackward" in type(z.grad_fn).__name__
        return z

    ours(inputs(), use)


def test_a_kept_tensor_stands_for_a_plain_one() -> None:
    _, ours = probes()

    def use(z: Any) -> Any:
        members = {z: 1}
        z.relu()
        z.sum()
        z.unsqueeze_(0)
        assert z.shape == (1, 5, 6) and z.dim() == 3 and members[z] == 1 and hash(z) == id(z)
        z += 1
        return z

    assert type(ours(inputs(), use)) is torch.Tensor


def saved_and_loaded(z: Any) -> Any:
    file = io.BytesIO()
    torch.save({"z": z}, file)
    file.seek(0)
    return torch.load(file)["z"]


COPIES = {
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "clone": lambda z: z.clone(),
    "array": lambda z: torch.from_numpy(np.array(z)),
    "asarray": lambda z: torch.from_numpy(np.asarray(z)),
    "ufunc": lambda z: np.add(z, 0),
    "dlpack": torch.from_dlpack,
    "collated": lambda z: torch.utils.data.default_collate([z, z])[1],
    "subclass": lambda z: z.as_subclass(torch.Tensor),
    "tensor": lambda z: torch.as_tensor(z) + torch.asarray(z) - z,
}


@pytest.mark.parametrize("relu_first", [True, False])
@pytest.mark.parametrize("name", COPIES)
def test_copies_are_plain(name: str, relu_first: bool) -> None:
    native, ours = probes()
    x = inputs()

    def use(z: Any) -> Any:
        if relu_first:
            F.relu(z)
        return COPIES[name](z)

    with torch.no_grad():
        expected, got = native(x, use), ours(x, use)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("relu_first", [True, False])
def test_nothing_waits_after_the_call(relu_first: bool) -> None:
    """Neither in outputs nor anywhere else: fused optimizers change weights without a version."""
    native, ours = probes()
    x = inputs()
    held: dict[str, Any] = {}

    def use(z: Any) -> Any:
        if relu_first:
            F.relu(z)
        held["z"] = z
        return {"outputs": [z, (z, None)], "other": 1}

    output = ours(x, use)
    assert type(output["outputs"][0]) is type(output["outputs"][1][0]) is torch.Tensor
    expected = native(x, lambda z: z.detach().clone())
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0, fused=True)
    output["outputs"][0].sum().backward(retain_graph=True)
    version = ours.fc.weight._version
    optimizer.step()
    assert ours.fc.weight._version == version, "this optimizer shows what it changes"
    torch.testing.assert_close(held["z"] * 1, expected)
    torch.testing.assert_close(output["outputs"][1][0], expected)
    assert not _open.calls


def test_nothing_waits_outside_of_the_call_of_its_module() -> None:
    _, ours = probes()
    assert type(ours.fc(inputs())) is torch.Tensor
    assert (
        ours.forward(inputs(), type) is torch.Tensor
    )  # without hooks, as some checkpoints call it
    assert ours(inputs(), type) is Deferred
    layer = tft.fuse(nn.Linear(8, 8), deferred=True)
    assert type(layer) is nn.Linear and not layer._forward_hooks
    layers = tft.fuse(nn.ModuleList([nn.Linear(8, 8)]), deferred=True)
    assert type(layers[0]) is nn.Linear


class Passes(nn.Module):
    """Hands its layer to another module, and itself to itself."""

    def __init__(self, inner: Probe) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 8, dtype=torch.float64), inner

    def forward(self, x: Any, depth: int = 2) -> Any:
        if depth:
            x = self(x, depth - 1)
        z = self.fc(x)
        y = self.inner(x, lambda inner: F.relu(inner))
        return self.inner(x, lambda inner: self.fc(x) + inner.sum()) + z.relu() + y.sum()


def test_modules_inside_of_modules() -> None:
    native = Passes(Probe())
    ours = tft.fuse(native, deferred=True)
    x = inputs()
    torch.testing.assert_close(ours(x), native(x), rtol=1e-12, atol=1e-12)
    assert not _open.calls


def test_an_error_in_the_module_leaves_nothing_behind() -> None:
    _, ours = probes()
    held = []

    def fail(z: Any) -> Any:
        held.append(z)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ours(inputs(), fail)
    assert not _open.calls and type(held[0]) is torch.Tensor


def test_threads_share_one_output() -> None:
    native, ours = probes()
    x = inputs(300, 8)

    def use(z: Any) -> Any:
        found: list[Any] = []
        barrier = threading.Barrier(4)

        def work() -> None:
            barrier.wait()
            found.append(z.exp().sum())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.stack(found).sum()

    for _ in range(20):
        torch.testing.assert_close(run(ours, x, use), run(native, x, use))


def test_our_layers_take_it(launched: Launched) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.lstm, self.cell = nn.LSTM(8, 8), nn.LSTMCell(8, 8)

        def forward(self, x: Any) -> Any:
            for _ in range(1):
                y = self.b(self.a(x))
                h = self.h(x)
            output, _ = self.lstm(self.a(x), (h[:1], self.h(x)[:1]))
            return output + self.cell(self.a(x)[0], (self.h(x)[0], self.h(x)[1]))[0] + y

    native = Stack()
    ours = tft.fuse(native, deferred=True)
    x = torch.randn(3, 4, 8)
    with launched("linear_relu_forward_", times=1), launched("lstm_forward_"):
        torch.testing.assert_close(ours(x), native(x))
