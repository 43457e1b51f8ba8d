"""Modules that are spread over processes.

`fully_shard` gives each module a class derived from its own, and keeps its parameters in parts but
for the time in which it, or a module above it, runs.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Nothing is sharded where nobody has imported this, which takes long.
_FSDP = "torch.distributed.fsdp"


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on that module itself."""
    fsdp = sys.modules.get(_FSDP)
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_wrapper(module: nn.Module) -> bool:
    fsdp = sys.modules.get(_FSDP)
    sharded = fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
    return sharded or isinstance(module, DistributedDataParallel)


def around(model: nn.Module) -> dict[int, str]:
    """What spreads modules of `model` over processes, by module id."""
    found: dict[int, str] = {}
    for module in model.modules():
        kind = "fully_shard" if is_sharded(module) else ""
        if _is_wrapper(module):
            kind = type(module).__name__
        if kind:
            found.update(dict.fromkeys(map(id, module.modules()), kind))
    return found


def whole(tensor: Tensor) -> Tensor:
    """One like what a parameter in parts is while its module runs, with other values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
