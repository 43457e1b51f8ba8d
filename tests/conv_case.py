"""What a case of Conv+ReLU is: its shapes, and its formulas in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tests.problem import Numbers

Padding = int | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ConvCase:
    """A cross-correlation of `input[batch, channels, *size]` with windows of `kernel`.

    One entry per spatial dimension in each tuple. `padding` counts the zeros below and above.
    """

    op: ClassVar[str] = "conv_relu"

    id: str
    batch: int
    channels: int
    size: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    input_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_output_layout: str = "contiguous"
    bias_layout: str = "contiguous"
    values: str = "normal"

    @property
    def name(self) -> str:
        """What users call the op."""
        return f"conv{len(self.size)}d_relu"

    @property
    def span(self) -> tuple[int, ...]:
        """Sizes of a window, between its taps too."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def output_size(self) -> tuple[int, ...]:
        each = zip(self.size, self.padding, self.span, self.stride, strict=True)
        return tuple((low + n + high - span) // step + 1 for n, (low, high), span, step in each)

    @property
    def symmetric(self) -> bool:
        """Whether torch's `padding` argument can say it."""
        return all(low == high for low, high in self.padding)

    @property
    def tf_padding(self) -> str:
        """The word for it in TensorFlow: "VALID", "SAME" or, if none fits, "EXPLICIT"."""
        if not any(map(any, self.padding)):
            return "VALID"
        same = []
        for n, span, step in zip(self.size, self.span, self.stride, strict=True):
            total = max((-(-n // step) - 1) * step + span - n, 0)
            same.append((total // 2, total - total // 2))
        return "SAME" if tuple(same) == self.padding else "EXPLICIT"

    @property
    def torch_arguments(self) -> tuple[Any, ...]:
        """What torch's operators take behind the tensors; `padding` doubles if not symmetric."""
        low, high = zip(*self.padding, strict=True)
        return self.stride, low if self.symmetric else low + high, self.dilation, self.groups

    def tensorflow_arguments(self, data_format: str) -> dict[str, Any]:
        """What TensorFlow's functions take besides the tensors."""
        padding: Any = self.tf_padding
        if padding == "EXPLICIT":
            outer = [(0, 0)]
            inner = list(self.padding)
            last = data_format == "channels_last"
            padding = outer + (inner + outer if last else outer + inner)
        return {
            "strides": self.stride,
            "padding": padding,
            "data_format": data_format,
            "dilations": self.dilation,
        }

    @property
    def input_sizes(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def weight_sizes(self) -> tuple[int, ...]:
        return (self.filters, self.channels // self.groups, *self.kernel)

    @property
    def output_sizes(self) -> tuple[int, ...]:
        return (self.batch, self.filters, *self.output_size)

    @property
    def terms(self) -> tuple[int, int, int]:
        taps = int(np.prod(self.kernel))
        return (
            self.channels // self.groups * taps,
            self.filters // self.groups * taps,
            self.batch * int(np.prod(self.output_size)),
        )

    def pre_activation(self, x: Numbers, w: Numbers, b: Numbers | None) -> Numbers:
        z = self._filters(w) @ self._columns(x)
        z = z.reshape(self.output_sizes)
        return z if b is None else z + b.reshape(-1, *(1 for _ in self.size))

    def gradients(self, g: Numbers, x: Numbers, w: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        pixels = int(np.prod(self.output_size))
        rows = g.reshape(self.batch, self.groups, self.filters // self.groups, pixels)
        grad_weight = (rows @ self._columns(x).swapaxes(-1, -2)).sum(axis=0)
        columns = self._filters(w).swapaxes(-1, -2) @ rows
        columns = columns.reshape(self.batch, self.channels, *self.kernel, *self.output_size)
        padded = self._padded(np.zeros(self.input_sizes, g.dtype))
        for tap, place in self._taps():
            padded[place] += columns[tap]
        inside = (slice(low, low + n) for n, (low, _) in zip(self.size, self.padding, strict=True))
        grad_input = padded[(..., *inside)]
        grad_bias = np.moveaxis(g, 1, -1).reshape(self.terms[2], self.filters).sum(axis=0)
        return grad_input, grad_weight.reshape(self.weight_sizes), grad_bias

    def _padded(self, x: Numbers) -> Numbers:
        return np.pad(x, ((0, 0), (0, 0), *self.padding))

    def _filters(self, w: Numbers) -> Numbers:
        """`[groups, filters of a group, its channels and taps]`"""
        return w.reshape(self.groups, self.filters // self.groups, self.terms[0])

    def _columns(self, x: Numbers) -> Numbers:
        """Every window as a column: `[batch, groups, channels of a group and taps, pixels]`."""
        padded = self._padded(x)
        sizes = (self.batch, self.channels, *self.kernel, *self.output_size)
        columns = np.empty(sizes, x.dtype)
        for tap, place in self._taps():
            columns[tap] = padded[place]
        pixels = int(np.prod(self.output_size))
        return columns.reshape(self.batch, self.groups, self.terms[0], pixels)

    def _taps(self) -> Iterator[tuple[tuple, tuple]]:
        """Each tap of `_columns`, and the elements of the padded image that it meets."""
        everything = (slice(None), slice(None))
        each = list(zip(self.dilation, self.stride, self.output_size, strict=True))
        for tap in itertools.product(*map(range, self.kernel)):
            starts = [t * d for t, (d, _, _) in zip(tap, each, strict=True)]
            place = (
                slice(start, start + (count - 1) * step + 1, step)
                for start, (_, step, count) in zip(starts, each, strict=True)
            )
            yield (*everything, *tap), (*everything, *place)

    def scatter_nonfinite(self, x: Numbers, w: Numbers, b: Numbers, g: Numbers) -> None:
        # Padding is not multiplied by the rules of infinity: in the weight only where there is no
        # padding on the way back either, in the gradient only where no window meets the padding.
        x[0, 0].flat[0], x[0, -1].flat[-1] = np.nan, np.inf
        x[-1, 0].flat[x[0, 0].size // 2] = -np.inf
        b[0], b[1] = np.inf, -np.inf
        if set(self.kernel) == {1}:
            w[2].flat[-1] = np.nan
        middle = tuple(n // 2 for n in self.output_size)
        # Channel 1 is masked (its outputs are zero): the ReLU rules differ on these gradients.
        g[0, 1][middle], g[-1, 1][middle], g[0, -1][middle] = np.nan, np.inf, -np.inf
