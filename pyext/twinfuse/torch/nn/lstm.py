from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from twinfuse.torch.lstm import lstm
from twinfuse.torch.lstm_cell import State, activation_numbers, check_epsilon, lstm_cell, pair


class _Options:
    """What native layers have not. Class attributes serve those whose class was changed to ours."""

    norm_epsilon: float = 1e-5
    zoneout_hidden: float = 0.0
    zoneout_cell: float = 0.0
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"

    def _set_options(self, op: str, **options: Any) -> None:
        activation_numbers(op, options["activation"], options["recurrent_activation"])
        check_epsilon(op, options["norm_epsilon"])
        for name in ("zoneout_hidden", "zoneout_cell", "recurrent_dropout"):
            if not 0 <= options.get(name, 0) <= 1:
                raise ValueError(f"{op}: {name}: expected 0 to 1, got {options[name]}")
        for name, value in options.items():
            setattr(self, name, value)

    def _describe_options(self) -> str:
        values = ((name, getattr(self, name)) for name in vars(_Options) if name in vars(self))
        given = ((name, value) for name, value in values if value != getattr(_Options, name))
        return "".join(f", {name}={value}" for name, value in given)


def _peephole(hidden_size: int, like: Tensor) -> nn.Parameter:
    bound = 1 / math.sqrt(hidden_size)
    return nn.Parameter(like.new_empty(3, hidden_size).uniform_(-bound, bound))


def _norm(hidden_size: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(like.new_ones(2, 4 * hidden_size))


class LSTMCell(_Options, nn.LSTMCell):
    """`nn.LSTMCell` in one kernel, with its parameters.

    Constructor, parameter names, initial values and `state_dict` are those of `torch.nn.LSTMCell`,
    so the two exchange weights both ways. Input `[B, I]` or `[I]`, state `[B, H]` or `[H]`;
    float32, float64, bfloat16 and float16 run fused, on the CPU.

    Args:
        peephole: the gates see the cell state through a parameter `peephole` of `[3, H]`.
        layer_norm: the products of the input and of h are normalised, with the scales `norm` of
            `[2, 4H]`, initially ones, and `norm_epsilon` as of `twinfuse.torch.lstm_cell`.
        zoneout_hidden, zoneout_cell: how often an element of the state stays what it was in
            training; in evaluation, their mean.
        activation, recurrent_activation: as of `twinfuse.torch.lstm_cell`.
    """

    _has_peephole = False
    _has_norm = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        zoneout_hidden: float = 0.0,
        zoneout_cell: float = 0.0,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self._set_options(
            "LSTMCell",
            norm_epsilon=norm_epsilon,
            zoneout_hidden=zoneout_hidden,
            zoneout_cell=zoneout_cell,
            activation=activation,
            recurrent_activation=recurrent_activation,
        )
        if peephole:
            self._has_peephole = True
            self.peephole = _peephole(hidden_size, self.weight_hh)
        if layer_norm:
            self._has_norm = True
            self.norm = _norm(hidden_size, self.weight_hh)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self._has_norm:
            nn.init.ones_(self.norm)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        batched = input.dim() == 2
        # What a call on a tiny input usually is needs no more than a look.
        if not (batched and type(hx) is tuple and len(hx) == 2 and hx[0].dim() == hx[1].dim() == 2):
            input, hx = self._batch(input, hx)
        options: dict[str, Any] = {}
        if self._has_peephole or self._has_norm or self._has_options():
            options = {
                "peephole": self.peephole if self._has_peephole else None,
                "norm": self.norm if self._has_norm else None,
                "norm_epsilon": self.norm_epsilon,
                "zoneout_hidden": self._zoneout(self.zoneout_hidden, input),
                "zoneout_cell": self._zoneout(self.zoneout_cell, input),
                "activation": self.activation,
                "recurrent_activation": self.recurrent_activation,
            }
        h, c = lstm_cell(
            *(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh), **options
        )
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def _batch(self, input: Tensor, hx: State | None) -> tuple[Tensor, State]:
        named = [("input", input)]
        if hx is not None:
            named += [(f"hx[{i}]", state) for i, state in enumerate(pair("LSTMCell", hx))]
        for name, tensor in named:
            if tensor.dim() not in (1, 2):
                shape = list(tensor.shape)
                raise ValueError(f"LSTMCell: {name}: expected 1 or 2 dimensions, got shape {shape}")
        if input.dim() == 1:
            input = input.unsqueeze(0)
            hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        if hx is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (zeros, zeros)
        return input, hx

    def _has_options(self) -> bool:
        functions = self.activation, self.recurrent_activation
        return bool(self.zoneout_hidden or self.zoneout_cell) or functions != ("tanh", "sigmoid")

    def _zoneout(self, share: float, input: Tensor) -> Tensor | None:
        if not share:
            return None
        if not self.training:
            return input.new_full((), share)
        return input.new_empty(input.shape[0], self.hidden_size).bernoulli_(share)

    def extra_repr(self) -> str:
        return (
            super().extra_repr()
            + (", peephole=True" if self._has_peephole else "")
            + (", layer_norm=True" if self._has_norm else "")
            + self._describe_options()
        )


# No subclass of nn.LSTM: torch.compile refuses those, whatever their forward method does.
class LSTM(_Options, nn.RNNBase):
    """`nn.LSTM` in one kernel for each direction of each layer, with its parameters.

    Constructor, parameter names, initial values, `state_dict` and helpers are those of
    `torch.nn.LSTM`, so the two exchange weights both ways, and the class of an existing layer may
    be changed to this one and back. It is no subclass: torch.compile refuses subclasses of
    `nn.LSTM`, and compiles this with `fullgraph=True`, for a `PackedSequence`,
    too, unless it is packed in the compiled code: torch does not trace `pack_padded_sequence`.
    float32, float64, bfloat16 and float16 run fused, on the CPU.

    Args:
        peephole: the gates see the cell state through parameters `peephole_l0`, ... of `[3, H]`.
        layer_norm: the products of the input and of h are normalised, with the scales `norm_l0`,
            ... of `[2, 4H]`, initially ones, and `norm_epsilon` as of `twinfuse.torch.lstm`.
        zoneout_hidden, zoneout_cell: how often an element of the state stays what it was in
            training; in evaluation, their mean.
        recurrent_dropout: the share of h that is zeroed in training, drawn for each gate, and for
            all steps of a call at once.
        activation, recurrent_activation: as of `twinfuse.torch.lstm`.
        recompute: keep nothing of the steps for the backward pass, which runs them again, in place
            of `5 * hidden_size + proj_size` (or six times `hidden_size`) elements a step, and
            `8 * hidden_size` more with `layer_norm`.
    """

    recurrent_dropout: float = 0.0
    recompute: bool = False
    _peephole_names: tuple[str, ...] = ()
    _norm_names: tuple[str, ...] = ()

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        zoneout_hidden: float = 0.0,
        zoneout_cell: float = 0.0,
        recurrent_dropout: float = 0.0,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        self._set_options(
            "LSTM",
            norm_epsilon=norm_epsilon,
            zoneout_hidden=zoneout_hidden,
            zoneout_cell=zoneout_cell,
            recurrent_dropout=recurrent_dropout,
            activation=activation,
            recurrent_activation=recurrent_activation,
        )
        self.recompute = recompute
        # Not among the flat weights, of which cuDNN's layout has no place for them.
        ends = ("", "_reverse") if bidirectional else ("",)
        suffixes = [f"_l{k}{end}" for k in range(num_layers) for end in ends]
        if peephole:
            self._peephole_names = tuple(f"peephole{suffix}" for suffix in suffixes)
            for name in self._peephole_names:
                setattr(self, name, _peephole(hidden_size, next(self.parameters())))
        if layer_norm:
            self._norm_names = tuple(f"norm{suffix}" for suffix in suffixes)
            for name in self._norm_names:
                setattr(self, name, _norm(hidden_size, next(self.parameters())))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._norm_names:
            nn.init.ones_(getattr(self, name))

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: State, batch_sizes: Tensor | None
    ) -> None:
        try:
            nn.LSTM.check_forward_args(self, input, hidden, batch_sizes)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"LSTM: {error}") from None

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Any, State]:
        """As `nn.LSTM`; `mask` as of `twinfuse.torch.lstm`, without a batch if input has none.

        Raises:
            ValueError: `input` has neither 2 nor 3 dimensions, or not the dtype of the weights.
            RuntimeError: other sizes, dtypes or devices do not fit together.
        """
        batched, axis = True, 0 if self.batch_first else 1
        if not isinstance(input, PackedSequence):
            if input.dim() not in (2, 3):
                shape = list(input.shape)
                raise ValueError(f"LSTM: input: expected 2 or 3 dimensions, got shape {shape}")
            batched = input.dim() == 3
            for i, state in enumerate(() if hx is None else pair("LSTM", hx)):
                if state.dim() != input.dim():
                    raise RuntimeError(
                        f"LSTM: hx[{i}]: expected {input.dim()} dimensions like input, got shape "
                        f"{list(state.shape)}"
                    )
            if not batched:
                input = input.unsqueeze(axis)
                hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
                mask = None if mask is None else mask.unsqueeze(axis)
            if hx is not None:
                self.check_forward_args(input, hx, None)
            else:
                self._check_input(input)
        output, (h, c) = lstm(
            input,
            hx,
            # As they are now: parametrizations and torch.func.functional_call replace them.
            [getattr(self, name) for name in self._flat_weights_names],
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            mask=mask,
            peepholes=[getattr(self, name) for name in self._peephole_names],
            norms=[getattr(self, name) for name in self._norm_names],
            norm_epsilon=self.norm_epsilon,
            zoneout_hidden=self.zoneout_hidden,
            zoneout_cell=self.zoneout_cell,
            recurrent_dropout=self.recurrent_dropout,
            activation=self.activation,
            recurrent_activation=self.recurrent_activation,
            recompute=self.recompute,
        )
        if batched:
            return output, (h, c)
        return output.squeeze(axis), (h.squeeze(1), c.squeeze(1))

    def _check_input(self, input: Tensor) -> None:
        try:
            self.check_input(input, None)
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"LSTM: {error}") from None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self._peephole_names:
            text += ", peephole=True"
        if self._norm_names:
            text += ", layer_norm=True"
        if self.recurrent_dropout:
            text += f", recurrent_dropout={self.recurrent_dropout}"
        if self.recompute:
            text += ", recompute=True"
        return text + self._describe_options()
