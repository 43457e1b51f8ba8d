from __future__ import annotations

from torch import Tensor, nn

from twinfuse.torch.linear_relu import linear_relu


class LinearReLU(nn.Linear):
    """`nn.ReLU()(nn.Linear(...)(input))` in one kernel, with the parameters of `nn.Linear`.

    Constructor, parameter names, initial values and `state_dict` are those of `torch.nn.Linear`, so
    the two exchange weights both ways. Input `[..., in_features]`, output `[..., out_features]`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear_relu(input, self.weight, self.bias)
