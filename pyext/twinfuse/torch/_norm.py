"""Convolution, BatchNorm and ReLU as one convolution, in eval mode.

Three modules stay three: in eval mode the convolution computes all, and the BatchNorm passes it on.
In training mode the convolution is native, and the BatchNorm applies the ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from twinfuse.torch._spread import is_sharded
from twinfuse.torch.conv_relu import conv1d_relu, conv2d_relu
from twinfuse.torch.nn.conv_relu import padded

# Where each of the two has the other.
NORM = "_twinfuse_partner"
# What `fuse` sets on a module when it has changed its class.
_MARK = "_twinfuse_fused"
# Elements; measured on blocks of a ResNet-50.
MIN_INPUTS = 2**16
MIN_INPUTS_A_WEIGHT = 4


class _ConvNormReLU(nn.Module):
    """What both kinds of convolutions share; a native one if `fuse` has not made it."""

    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[..., Tensor]
    _op: Callable[..., Tensor]
    # The BatchNorm behind it; in a tuple, so that it is no submodule.
    _twinfuse_partner: tuple[Any, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _MARK:  # which comes last, so that the BatchNorm can tell who computes it
            for norm in self._twinfuse_partner:
                norm._twinfuse_partner = (self,)

    @property
    def norm(self) -> Any:
        """The BatchNorm that relies on this convolution; None if there is none any more."""
        norm = self._twinfuse_partner[0] if self._twinfuse_partner else None
        return norm if isinstance(norm, _FoldedNorm) else None

    def why_native(self, weight: Tensor) -> str:
        """Why convolution and BatchNorm are computed one after the other; empty if they are not."""
        if self.norm is None:
            return "no BatchNorm relies on it"
        if is_sharded(self.norm):
            return f"its {type(self.norm).__name__} is sharded by itself"
        if _takes_batches(self.norm):
            return f"its {type(self.norm).__name__} is in training mode, which is not folded"
        dtype = weight.dtype
        if dtype != self.norm.running_var.dtype or dtype not in (torch.float32, torch.float64):
            return f"folding would round weights of {dtype} twice"
        return ""

    def forward(self, input: Tensor) -> Tensor:
        norm, weight, bias = self.norm, self.weight, self.bias
        if norm is None or _stands_alone(norm):
            return self._conv_forward(input, weight, bias)
        mean, var = norm.running_mean, norm.running_var
        # Parameters may change in ways that nothing reports, so they are folded in every call,
        # where that costs less than another pass over the output.
        is_proxy = isinstance(input, fx.Proxy)  # of symbolic tracing, which knows no sizes at all
        if is_proxy or not self.pays(input, weight) or self.why_native(weight):
            output = self._conv_forward(input, weight, bias)
            if not is_proxy:
                norm._check_input_dim(output)
            return F.relu(F.batch_norm(output, mean, var, norm.weight, norm.bias, eps=norm.eps))
        scale = torch.rsqrt(var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -mean if bias is None else bias - mean
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        weight = weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        return padded(self._op, self, input, weight, shift)

    def why_small(self, weight: Tensor) -> str:
        """Which inputs are computed natively because to fold the BatchNorm would not pay."""
        least = max(MIN_INPUTS, MIN_INPUTS_A_WEIGHT * weight.numel())
        return f"inputs of fewer than {least} elements run natively, where folding costs more"

    def pays(self, input: Tensor, weight: Tensor) -> bool:
        """Whether folding costs less than it saves."""
        if input.dim() != weight.dim():  # without a batch, whose BatchNorm has another axis or none
            return False
        count, least = input.numel(), MIN_INPUTS_A_WEIGHT * weight.numel()
        if torch.compiler.is_compiling() or isinstance(count, torch.SymInt):
            # A size that is not known yet counts as large: to compare it would make it known.
            from torch.fx.experimental.symbolic_shapes import statically_known_true as known

            return not (known(count < MIN_INPUTS) or known(count < least))
        return count >= MIN_INPUTS and count >= least

    def _replicate_for_data_parallel(self) -> Any:
        # A replica would follow the BatchNorm of the first device.
        replica = super()._replicate_for_data_parallel()
        replica._twinfuse_partner = ()
        return replica


def folding_kernels(norm: Any) -> int:
    """How many small kernels compute the folded weights."""
    return 5 + (norm.weight is not None) + (norm.bias is not None)


class ConvNormReLU1d(_ConvNormReLU, nn.Conv1d):
    """A Conv1d that knows the BatchNorm1d behind it."""

    _op = staticmethod(conv1d_relu)


class ConvNormReLU2d(_ConvNormReLU, nn.Conv2d):
    """A Conv2d that knows the BatchNorm2d behind it."""

    _op = staticmethod(conv2d_relu)


class _FoldedNorm(nn.Module):
    """What both kinds of BatchNorms share; a native one if `fuse` has not made it."""

    # The convolution before it; None as long as there has been none.
    _twinfuse_partner: tuple[Any, ...] | None = None

    def forward(self, input: Tensor) -> Tensor:
        conv = self._twinfuse_partner
        if conv is None:
            return super().forward(input)
        if conv and isinstance(conv[0], _ConvNormReLU) and not _stands_alone(self):
            return input
        return F.relu(super().forward(input))

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        if self._twinfuse_partner is not None:
            replica._twinfuse_partner = ()
        return replica


class FoldedNorm1d(_FoldedNorm, nn.BatchNorm1d):
    """A BatchNorm1d with the ReLU behind it, which the convolution before it computes in eval."""


class FoldedNorm2d(_FoldedNorm, nn.BatchNorm2d):
    """A BatchNorm2d with the ReLU behind it, which the convolution before it computes in eval."""


def _takes_batches(norm: Any) -> bool:
    """Whether the statistics are those of a batch, which come after the convolution."""
    return norm.training or norm.running_mean is None


def _stands_alone(norm: Any) -> bool:
    """Whether a BatchNorm is computed by itself; sharded, its parameters are not there before."""
    return _takes_batches(norm) or is_sharded(norm)


# What a convolution and a BatchNorm become.
CONVS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvNormReLU1d,
    nn.Conv2d: ConvNormReLU2d,
}
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FoldedNorm1d,
    nn.BatchNorm2d: FoldedNorm2d,
}
# Which BatchNorm can be folded into which convolution.
BEHIND: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
}
