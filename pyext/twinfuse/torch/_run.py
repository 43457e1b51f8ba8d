"""Runs of a model on example inputs, which leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that the model returns for example inputs, as `fuse` takes them."""
    arguments, keywords = inputs if isinstance(inputs, tuple) else (inputs,), {}
    if isinstance(inputs, Mapping):
        arguments, keywords = (), dict(inputs)
    with torch.no_grad(), torch.random.fork_rng(), eval_mode(model), _same_buffers(model):
        # The model may change them.
        arguments, keywords = tree_map_only(Tensor, torch.clone, (arguments, keywords))
        found = model(*arguments, **keywords)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode of all modules, for a while."""
    # Not by `eval`, which may do more: layers of LoRA merge weights in their `train` methods.
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what a model does to its buffers, which may count calls in eval mode, too."""
    buffers = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items()]
    # The first run gives lazy ones a shape.
    saved = [(b, b.clone(), _version(b)) for *_, b in buffers if b is not None and not is_lazy(b)]
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for buffer, values, version in saved:
            if _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(values)


def _version(buffer: Tensor) -> object:
    # Those of inference mode have none, and count as changed.
    return object() if buffer.is_inference() else buffer._version
