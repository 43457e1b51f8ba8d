"""What the benchmark of Conv+ReLU is measured at: shapes, and operands with their results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.operands import Array, Kind

SHAPE_FORM = "N8 C64 56x56 K64 3x3 [s<stride>] [p<padding>] [g<groups>] NCHW|NHWC, or NCW|NWC"
FORM = re.compile(
    r"N(\d+) C(\d+) (\d+(?:x\d+)?) K(\d+) (\d+(?:x\d+)?)"
    r"(?: s(\d+))?(?: p(\d+))?(?: g(\d+))? (NCH?W|NH?WC)"
)
# Below this many channels the input is the data, and nobody asks for its gradient.
LEAST_LEARNT_CHANNELS = 4


class ConvShape(NamedTuple):
    """N images (or signals) of C channels and `size` to K channels, by windows of `kernel`."""

    batch: int
    channels: int
    size: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...]
    stride: int
    padding: int
    groups: int
    channels_last: bool

    def __str__(self) -> str:
        numbers = (("s", self.stride, 1), ("p", self.padding, 0), ("g", self.groups, 1))
        return " ".join(
            [
                f"N{self.batch}",
                f"C{self.channels}",
                "x".join(map(str, self.size)),
                f"K{self.filters}",
                "x".join(map(str, self.kernel)),
                *(f"{letter}{value}" for letter, value, usual in numbers if value != usual),
                self.layout,
            ]
        )

    @property
    def spatial(self) -> int:
        return len(self.size)

    @property
    def layout(self) -> str:
        sizes = "HW"[-self.spatial :]
        return f"N{sizes}C" if self.channels_last else f"NC{sizes}"

    @property
    def output_size(self) -> tuple[int, ...]:
        each = zip(self.size, self.kernel, strict=True)
        return tuple((n + 2 * self.padding - k) // self.stride + 1 for n, k in each)

    @property
    def input_gradient(self) -> bool:
        return self.channels >= LEAST_LEARNT_CHANNELS

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels == self.filters > 1


def parse_shape(text: str) -> ConvShape:
    """The shape that `str` has written. Raises ValueError."""
    found = FORM.fullmatch(text)
    if not found:
        raise ValueError(f"expected {SHAPE_FORM}, got {text!r}")
    batch, channels, size, filters, kernel, stride, padding, groups, layout = found.groups()
    sizes, kernels = (tuple(map(int, t.split("x"))) for t in (size, kernel))
    shape = ConvShape(
        int(batch),
        int(channels),
        sizes,
        int(filters),
        kernels,
        int(stride or 1),
        int(padding or 0),
        int(groups or 1),
        layout.endswith("C"),
    )
    dimensions = len(layout) - 2
    if not len(sizes) == len(kernels) == dimensions:
        raise ValueError(f"expected {dimensions} sizes of image and window, got {text!r}")
    positive = (shape.batch, shape.channels, shape.filters, shape.stride, shape.groups, *kernels)
    if min(positive) < 1 or shape.channels % shape.groups or shape.filters % shape.groups:
        raise ValueError(f"expected positive sizes, and groups that divide C and K, got {text!r}")
    if min(shape.output_size) < 1:
        raise ValueError(f"expected a window that fits into the image, got {text!r}")
    return shape


def frameworks_of(shape: ConvShape) -> Sequence[str]:
    """The frameworks that are measured at `shape`.

    TensorFlow has channels last on CPUs; torch has one layout of signals, channels first.
    """
    if not shape.channels_last:
        return ("torch",)
    return ("torch", "tensorflow") if shape.spatial == 2 else ("tensorflow",)


@dataclass(frozen=True)
class Operands:
    """input [N, C, *size], weight [K, C / groups, *kernel], bias [K], grad_output [N, K, *output],
    all normal; outputs about 1.
    """

    shape: ConvShape
    input: Array
    weight: Array
    bias: Array
    grad_output: Array

    @classmethod
    def random(cls, shape: ConvShape) -> Operands:
        draw = np.random.default_rng(0).standard_normal
        weight = draw((shape.filters, shape.channels // shape.groups, *shape.kernel))
        return cls(
            shape,
            draw((shape.batch, shape.channels, *shape.size)),
            weight / np.sqrt(weight[0].size),
            draw(shape.filters),
            draw((shape.batch, shape.filters, *shape.output_size)),
        )

    def reference(self, kind: Kind) -> list[Array]:
        """The output; for training also the gradients of input (if wanted), weight and bias."""
        shape = self.shape
        groups, taps = shape.groups, self.weight[0].size
        filters = self.weight.reshape(groups, -1, taps)
        padded = np.pad(self.input, [(0, 0)] * 2 + [(shape.padding,) * 2] * shape.spatial)
        # [N, C, *output, *kernel] to [N, groups, C / groups * taps, pixels]
        order = (0, 1, *range(2 + shape.spatial, 2 + 2 * shape.spatial))
        columns = self._windows(padded).transpose(*order, *range(2, 2 + shape.spatial))
        columns = columns.reshape(shape.batch, groups, taps, -1)
        output = (filters @ columns).reshape(self.grad_output.shape)
        output = np.maximum(output + self.bias.reshape(-1, *(1 for _ in shape.size)), 0)
        if kind == "forward":
            return [output]
        grad = self.grad_output * (output > 0)
        rows = grad.reshape(shape.batch, groups, shape.filters // groups, -1)
        grad_weight = (rows @ columns.swapaxes(-1, -2)).sum(0).reshape(self.weight.shape)
        gradients = [grad_weight, rows.sum((0, -1)).reshape(-1)]
        if shape.input_gradient:
            gradients.insert(0, self._scatter(filters.swapaxes(-1, -2) @ rows, padded.shape))
        return [output, *gradients]

    def _windows(self, padded: Array) -> Array:
        """A view of every window: `[N, C, *output, *kernel]`."""
        axes = tuple(range(2, 2 + self.shape.spatial))
        windows = sliding_window_view(padded, self.shape.kernel, axes, writeable=True)
        steps = [slice(None, None, self.shape.stride)] * self.shape.spatial
        return windows[(slice(None), slice(None), *steps)]

    def _scatter(self, columns: Array, padded: tuple[int, ...]) -> Array:
        """Add up what each window adds to the input."""
        shape, total = self.shape, np.zeros(padded)
        columns = columns.reshape(shape.batch, shape.channels, *shape.kernel, *shape.output_size)
        windows = self._windows(total)
        for tap in np.ndindex(*shape.kernel):
            windows[(..., *tap)] += columns[(slice(None), slice(None), *tap)]
        inside = [slice(shape.padding, shape.padding + n) for n in shape.size]
        return total[(slice(None), slice(None), *inside)]
