"""Fused ops in compiled models."""

from __future__ import annotations

from typing import Any

__all__ = ["compile_pass"]

# Multiply-adds of a call. Inductor fuses nothing with an operator that it does not know: smaller
# layers gain less than their neighbours lose.
MIN_SIZE = 2**16


def compile_pass(min_size: int = MIN_SIZE) -> Any:
    """A pass for Inductor that puts fused ops in the place of Linear or Conv with ReLU.

    For `torch._inductor.config.pre_grad_custom_pass`, or as an option of `torch.compile`:
    `torch.compile(model, options={"pre_grad_custom_pass": compile_pass()})`. Any forward method
    that `torch.compile` takes is served, with branches and loops too; the model stays as it is.
    `torch.compile(model, backend="twinfuse")` is the same in short.

    Args:
        min_size: multiply-adds of a layer from which on it is fused; a layer whose sizes are not
            known when it is compiled always is. 0 fuses all.
    """
    from twinfuse.torch._compile import FusePass  # imports Inductor, which takes a second

    return FusePass(min_size)
