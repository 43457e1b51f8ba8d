"""Train fused networks in several processes of PyTorch, and compare with native ones.

    torchrun --nproc-per-node 2 -m examples.distributed_torch --by fsdp

The order matters: first `fuse`, then `DistributedDataParallel` or `fully_shard`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from examples.distributed import chosen_networks, compare, end, parser
from examples.models import Array, TorchModel
from examples.networks import Recipe


def shard(network: Any) -> Any:
    """Each layer by itself, so that only the parameters of the one that runs are whole."""
    for layer in network.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(network, reshard_after_forward=True)


SPREAD: dict[str, Callable[[Any], Any]] = {"ddp": DistributedDataParallel, "fsdp": shard}


class SpreadModel(TorchModel):
    """Each process takes its share of a batch; what is asked for is that of the whole batch."""

    def _backward(self, inputs: Array, targets: Array) -> float:
        share = slice(distributed.get_rank(), None, distributed.get_world_size())
        loss = torch.tensor(super()._backward(inputs[share], targets[share]))
        distributed.all_reduce(loss)
        return float(loss) / distributed.get_world_size()

    def _array(self, tensor: torch.Tensor) -> Array:
        return super()._array(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def load(self, weights: Sequence[Array]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                source = torch.from_numpy(value)
                if isinstance(parameter, DTensor):
                    source = distribute_tensor(source, parameter.device_mesh, parameter.placements)
                parameter.copy_(source)


def build(
    by: str, _: str, network: str, sizes: tuple[int, ...], recipe: Recipe, fused: bool
) -> SpreadModel:
    return SpreadModel(network, sizes, recipe, fused, SPREAD[by])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser("distributed_torch", __doc__)
    options.add_argument("--by", choices=tuple(SPREAD), default="ddp")
    chosen = options.parse_args(arguments)
    if not distributed.is_torchelastic_launched():
        raise SystemExit("start it by: torchrun --nproc-per-node 2 -m examples.distributed_torch")
    distributed.init_process_group("gloo")
    console = Console(width=140, quiet=distributed.get_rank() > 0)
    # torch's advice on changing outputs in place, which nobody does here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    count = distributed.get_world_size()
    where = f"{chosen.by} in {count} processes"
    problems: list[str] = []
    for name in chosen_networks(chosen.network):
        make = partial(build, chosen.by)
        problems += compare(console, name, chosen.epochs, "torch", where, make, count)
    distributed.destroy_process_group()
    return end(console, problems)


if __name__ == "__main__":
    sys.exit(main())
