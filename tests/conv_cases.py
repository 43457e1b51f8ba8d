"""The one table of Conv+ReLU cases that the core, torch and TensorFlow are all tested with.

`tests.problem` makes arrays and references of its cases, in torch's order of dimensions.
"""

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


def _case(
    id: str,
    input: tuple[int, ...],
    filters: int,
    kernel: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    bias: bool = True,
    **layouts: str,
) -> ConvCase:
    """A number stands for all spatial dimensions; in `padding`, for both ends of one."""
    batch, channels, *size = input

    def each(value: int | Sequence) -> tuple:
        return (value,) * len(size) if isinstance(value, int) else tuple(value)

    pairs = tuple((p, p) if isinstance(p, int) else p for p in each(padding))
    return ConvCase(
        id,
        batch,
        channels,
        tuple(size),
        filters,
        each(kernel),
        each(stride),
        pairs,
        each(dilation),
        groups,
        bias,
        **layouts,
    )


def _views(layout: str) -> dict[str, str]:
    return {f"{name}_layout": layout for name in ("input", "weight", "grad_output")}


NHWC = _views("channels_last")

CASES = (
    # Smallest and empty shapes.
    _case("one_element", (1, 1, 1, 1), 1, 1),
    _case("one_pixel", (2, 17, 1, 1), 15, 1),
    _case("one_pixel_among_zeros", (2, 5, 1, 1), 9, 3, padding=1),
    _case("one_output", (3, 7, 4, 5), 16, (4, 5)),
    _case("one_row", (2, 3, 1, 33), 17, (1, 3)),
    _case("one_column", (2, 3, 33, 1), 17, (3, 1), padding=(1, 0), **NHWC),
    _case("empty_batch", (0, 3, 5, 5), 4, 3),
    _case("empty_channels", (2, 0, 5, 5), 4, 3, padding=1),
    _case("empty_channels_no_bias", (2, 0, 4, 4), 3, 2, bias=False),
    _case("empty_filters", (2, 3, 5, 5), 0, 3),
    _case("empty_1d_batch", (0, 3, 5), 4, 3, padding=1),
    # Kernels of one pixel are matrix products.
    _case("pointwise", (2, 31, 7, 6), 33, 1),
    _case("pointwise_nhwc", (2, 31, 7, 6), 33, 1, **NHWC),
    _case("pointwise_no_bias", (1, 130, 4, 4), 64, 1, bias=False),
    _case("pointwise_stride", (2, 17, 7, 8), 31, 1, stride=2),
    _case("pointwise_stride_nhwc", (2, 17, 7, 8), 31, 1, stride=2, **NHWC),
    _case("pointwise_padding", (2, 3, 4, 5), 17, 1, padding=1),
    _case("pointwise_groups", (2, 12, 5, 5), 8, 1, groups=4, **NHWC),
    # The shapes of networks.
    _case("stem", (1, 3, 23, 22), 17, 7, stride=2, padding=3),
    _case("stem_nhwc", (1, 3, 23, 22), 17, 7, stride=2, padding=3, **NHWC),
    _case("stem_valid", (1, 3, 29, 28), 17, 7, stride=2),
    _case("digits", (4, 1, 12, 12), 33, 3),
    _case("three_by_three", (2, 17, 9, 8), 31, 3, padding=1),
    _case("three_by_three_nhwc", (2, 17, 9, 8), 31, 3, padding=1, **NHWC),
    _case("three_by_three_no_bias", (2, 33, 8, 7), 16, 3, padding=1, bias=False),
    _case("three_by_three_stride", (2, 16, 9, 8), 32, 3, stride=2, padding=1),
    _case("three_by_three_stride_nhwc", (2, 16, 9, 8), 32, 3, stride=2, padding=1, **NHWC),
    _case("five_by_five", (3, 6, 9, 9), 15, 5, padding=2),
    _case("even_kernel", (2, 5, 7, 8), 5, 2),
    # Large enough for bfloat16 to be multiplied in pairs of channels, or of pixels.
    _case("pairs_of_channels", (2, 18, 13, 12), 34, 3, padding=1),
    _case("pairs_of_pixels", (3, 16, 20, 18), 160, 3, padding=1),
    _case("pairs_in_long_rows", (1, 8, 9, 130), 17, 3, padding=1),
    # Enough channels for taps to be left out that meet nothing but the border.
    _case("border", (2, 128, 5, 8), 33, 3, padding=1),
    _case("border_nhwc", (2, 128, 5, 8), 33, 3, padding=1, **NHWC),
    _case("border_of_small_image", (3, 128, 2, 2), 18, 3, padding=1),
    _case("border_beyond_kernel", (1, 128, 3, 4), 33, (2, 3), padding=((3, 0), (1, 4)), **NHWC),
    _case("border_stride", (1, 128, 9, 11), 17, 5, stride=2, padding=3),
    _case("border_dilation", (1, 128, 6, 9), 33, 3, padding=2, dilation=2,
          **{**NHWC, "weight_layout": "hwio"}),
    _case("border_several_blocks", (1, 576, 2, 4), 17, 3, padding=1,
          **{**NHWC, "weight_layout": "hwio"}),
    _case("border_of_five", (2, 64, 6, 9), 33, 5, padding=2),
    _case("border_of_five_nhwc", (2, 64, 6, 9), 33, 5, padding=2, **NHWC),
    _case("border_of_five_several_blocks", (1, 256, 3, 5), 17, 5, padding=2,
          **{**NHWC, "weight_layout": "hwio"}),
    _case("three_columns_nhwc", (6, 17, 3, 3), 33, 3, padding=1, **NHWC),
    # Enough channels and pixels for tiles of 2x2 outputs.
    _case("tiles", (2, 17, 7, 9), 35, 3, padding=1),
    _case("tiles_nhwc", (2, 17, 7, 9), 35, 3, padding=1, **NHWC),
    _case("tiles_valid", (2, 16, 9, 8), 32, 3),
    _case("tiles_full_nhwc", (1, 20, 6, 7), 18, 3, padding=2, **NHWC),
    _case("tiles_uneven", (1, 16, 8, 6), 33, 3, padding=((0, 3), (2, 1))),
    _case("tiles_uneven_nhwc", (1, 16, 8, 6), 33, 3, padding=((0, 3), (2, 1)),
          **{**NHWC, "weight_layout": "hwio"}),
    _case("tiles_of_a_gradient", (2, 16, 11, 12), 18, 3, stride=2, padding=2, dilation=2),
    _case("tiles_of_a_gradient_nhwc", (1, 33, 9, 13), 17, 3, 2, padding=1, dilation=2, **NHWC),
    _case("tiles_of_70_filters", (1, 128, 6, 6), 70, 3, padding=1, **NHWC),
    _case("tiles_no_bias", (1, 32, 6, 6), 16, 3, padding=1, bias=False),
    _case("tiles_of_small_images", (19, 32, 4, 4), 48, 3, padding=1),
    _case("tiles_of_small_images_nhwc", (19, 32, 4, 4), 48, 3, padding=1, **NHWC),
    _case("tiles_several_blocks", (2, 150, 17, 18), 140, 3, padding=1),
    _case("tiles_several_blocks_nhwc", (2, 150, 17, 18), 140, 3, padding=1, **NHWC),
    _case("tiles_several_blocks_hwio", (1, 270, 5, 6), 150, 3, padding=1,
          **{**NHWC, "weight_layout": "hwio"}),
    _case("tiles_of_one_image_nhwc", (1, 150, 7, 7), 45, 3, padding=1, **NHWC),
    _case("tiles_of_two_images_nhwc", (2, 18, 7, 7), 33, 3, padding=1, **NHWC),
    _case("tiles_of_one_image_hwio", (1, 130, 5, 6), 40, 3, padding=1,
          **{**NHWC, "weight_layout": "hwio"}),
    _case("tiles_in_long_rows", (2, 16, 4, 271), 17, 3, padding=1),
    _case("tiles_in_long_rows_nhwc", (2, 16, 4, 271), 17, 3, padding=1, **NHWC),
    _case("tiles_weight_nhwc_alone", (1, 64, 6, 7), 64, 3, padding=1,
          weight_layout="channels_last"),
    _case("tiles_weight_oihw_alone", (1, 64, 6, 7), 64, 3, padding=1,
          **{**NHWC, "weight_layout": "contiguous"}),
    _case("tiles_weight_strided", (1, 32, 6, 7), 32, 3, padding=1, weight_layout="strided"),
    _case("tiles_views", (2, 32, 6, 7), 32, 3, padding=1, **_views("transposed")),
    _case("tiles_views_nhwc", (2, 32, 6, 7), 32, 3, padding=1, **_views("channels_last strided")),
    _case("tiles_overlapping", (2, 32, 6, 7), 17, 3, padding=1, input_layout="overlapping"),
    # On and beside the multiples of vector widths, register tiles and reduction blocks.
    _case("one_channel", (2, 1, 8, 9), 1, 3, padding=1),
    _case("one_channel_nhwc", (2, 1, 8, 9), 1, 3, padding=1, **NHWC),
    _case("one_filter", (1, 31, 4, 5), 1, 3, padding=1, values="integers", **NHWC),
    _case("many_filters", (1, 3, 5, 6), 130, 3, padding=1),
    _case("many_channels", (1, 130, 4, 5), 17, 3, padding=1),
    _case("many_channels_nhwc", (1, 130, 4, 5), 17, 3, padding=1, **NHWC),
    _case("several_blocks", (1, 257, 4, 4), 33, (3, 2), padding=(1, 0), **NHWC),
    _case("several_blocks_of_filters", (1, 9, 4, 4), 260, 3, padding=1),
    _case("several_blocks_of_pixels", (3, 3, 29, 31), 9, 3, padding=1),
    _case("several_blocks_of_pixels_nhwc", (3, 3, 29, 31), 9, 3, padding=1, **NHWC),
    _case("many_pixels", (2, 1, 150, 151), 2, 2),
    _case("many_pixels_nhwc", (2, 2, 150, 151), 1, 2, bias=False, **NHWC),
    _case("long_signal", (1, 2, 45000), 3, 3, padding=1),
    # Windows that leave something out, or lie outside.
    _case("stride_beyond_kernel", (2, 5, 11, 13), 9, 2, stride=3),
    _case("stride_beyond_kernel_nhwc", (2, 5, 11, 13), 9, 2, stride=3, **NHWC),
    _case("stride_beyond_image", (2, 5, 6, 4), 9, 3, stride=7, padding=1),
    _case("stride_valid", (2, 7, 13, 14), 9, 3, stride=2),
    _case("stride_remainder", (2, 5, 12, 11), 9, 3, stride=4, padding=1),
    _case("padding_beyond_kernel", (2, 3, 4, 5), 17, 2, padding=4),
    _case("padding_beyond_kernel_nhwc", (2, 3, 4, 5), 9, 2, padding=4, **NHWC),
    _case("padding_no_bias", (2, 3, 3, 4), 5, 3, padding=4, bias=False),
    _case("padding_beyond_vector", (1, 2, 3, 3), 3, 3, stride=5, padding=19),
    _case("dilation", (2, 7, 12, 11), 9, 3, padding=2, dilation=2),
    _case("dilation_nhwc", (2, 7, 12, 11), 9, 3, padding=2, dilation=2, **NHWC),
    _case("dilation_and_stride", (2, 7, 13, 12), 9, 3, stride=2, padding=3, dilation=3),
    _case("dilation_and_stride_valid", (2, 7, 16, 15), 9, 3, stride=2, dilation=3),
    _case("dilation_of_one_tap", (2, 5, 4, 3), 9, 3, padding=6, dilation=6),
    _case("dilation_of_one_tap_nhwc", (2, 5, 4, 3), 9, 3, padding=6, dilation=6, **NHWC),
    _case("dilation_common_factor", (1, 3, 14, 15), 5, 3, stride=4, padding=5, dilation=6),
    _case("rectangles", (2, 5, 13, 9), 7, (3, 2), (2, 3), (2, 1), (1, 4)),
    _case("rectangles_nhwc", (2, 5, 9, 13), 7, (1, 5), (3, 1), (0, 3), (2, 2), **NHWC),
    # Padding that differs between the two ends, as TensorFlow's "SAME" has it.
    _case("same_stride", (2, 5, 8, 10), 9, 3, stride=2, padding=((0, 1), (0, 1))),
    _case("same_stride_nhwc", (2, 5, 8, 10), 9, 3, 2, padding=((0, 1), (0, 1)), **NHWC),
    _case("same_even_kernel", (2, 5, 7, 6), 9, (4, 2), padding=((1, 2), (0, 1))),
    _case("uneven_padding", (2, 3, 6, 5), 9, 3, 2, padding=((3, 0), (1, 4)), **NHWC),
    # Groups.
    _case("groups", (2, 12, 6, 7), 18, 3, padding=1, groups=3),
    _case("groups_nhwc", (2, 12, 6, 7), 18, 3, padding=1, groups=3, **NHWC),
    _case("groups_of_vectors", (2, 64, 4, 5), 32, 3, 2, padding=1, groups=2, **NHWC),
    _case("depthwise", (2, 33, 7, 6), 33, 3, padding=1, groups=33),
    _case("depthwise_nhwc", (2, 33, 7, 6), 33, 3, padding=1, groups=33, **NHWC),
    # Read where it lies: the channels fill vectors.
    _case("depthwise_vectors_nhwc", (2, 32, 7, 19), 32, 3, padding=1, groups=32, **NHWC),
    _case("depthwise_vectors_stride", (1, 48, 9, 8), 48, 3, 2, padding=2, groups=48, **NHWC),
    _case("depthwise_vectors_dilation", (1, 16, 9, 9), 16, (6, 7), 1, 3, 2, groups=16, **NHWC),
    _case("depthwise_twice", (2, 17, 7, 8), 34, 3, stride=2, padding=1, groups=17),
    _case("depthwise_twice_nhwc", (2, 17, 7, 8), 34, 3, 2, padding=1, groups=17, **NHWC),
    _case("depthwise_no_bias", (1, 5, 9, 9), 5, 5, padding=4, dilation=2, groups=5, bias=False),
    # One dimension.
    _case("1d_pointwise", (3, 17, 15), 31, 1),
    _case("1d", (3, 17, 15), 31, 3, padding=1),
    _case("1d_nwc", (3, 17, 15), 31, 3, padding=1, **NHWC),
    _case("1d_no_bias", (2, 64, 16), 33, 3, bias=False),
    _case("1d_stride", (2, 5, 40), 9, 4, stride=3, padding=2, **NHWC),
    _case("1d_causal", (2, 7, 17), 9, 3, padding=((2, 0),)),
    _case("1d_causal_dilation", (2, 7, 17), 9, 2, padding=((8, 0),), dilation=8, **NHWC),
    _case("1d_one_element", (1, 1, 1), 1, 1),
    _case("1d_groups", (2, 6, 19), 4, 5, padding=2, groups=2),
    _case("1d_depthwise", (2, 31, 19), 31, 3, padding=1, groups=31, **NHWC),
    # Channels that lie side by side in the input alone.
    _case("1d_nwc_alone", (1, 4, 40), 17, 3, stride=2, padding=1, input_layout="channels_last"),
    _case("1d_nwc_alone_long", (2, 8, 300), 17, 3, stride=2, padding=1,
          input_layout="channels_last"),
    _case("1d_several_blocks", (1, 400, 9), 17, 3, padding=1),
    # Views.
    _case("input_strided", (2, 5, 6, 7), 9, 3, padding=1, input_layout="strided"),
    _case("input_nhwc_strided", (2, 5, 6, 7), 9, 3, padding=1, **_views("channels_last strided")),
    _case("input_padded", (2, 5, 6, 7), 9, 3, padding=1, input_layout="padded"),
    _case("input_nhwc_padded", (2, 5, 6, 7), 17, 3, input_layout="channels_last padded"),
    _case("input_misaligned", (2, 16, 6, 8), 16, 3, padding=1, **_views("misaligned")),
    _case("input_nhwc_misaligned", (2, 16, 6, 8), 16, 3, **_views("channels_last misaligned")),
    _case("input_transposed", (2, 5, 6, 7), 9, 3, padding=1, input_layout="transposed"),
    _case("input_permuted", (2, 5, 6, 7), 9, 3, padding=1, input_layout="permuted"),
    _case("input_batch_last", (5, 3, 6, 7), 9, 3, stride=2, input_layout="hwio"),
    _case("input_same_batch", (3, 5, 6, 7), 9, 3, input_layout="broadcast_batch"),
    _case("input_same_rows", (2, 5, 6, 7), 9, 3, padding=1, input_layout="broadcast_rows"),
    _case("input_same_channels", (2, 5, 6, 7), 9, 3,
          input_layout="channels_last broadcast_columns"),
    _case("input_overlapping", (2, 5, 6, 7), 9, 3, padding=1, input_layout="overlapping"),
    _case("input_nhwc_overlapping", (2, 9, 6, 7), 9, 3,
          input_layout="channels_last overlapping"),
    _case("1d_overlapping", (3, 5, 16), 9, 3, padding=1, input_layout="overlapping"),
    _case("weight_hwio", (2, 17, 6, 7), 31, 3, padding=1, weight_layout="hwio"),
    _case("weight_hwio_nhwc", (2, 17, 6, 7), 31, 3, padding=1, **{**NHWC, "weight_layout": "hwio"}),
    _case("weight_nhwc_alone", (2, 5, 6, 7), 9, 3, padding=1, weight_layout="channels_last"),
    _case("weight_oihw_alone", (2, 5, 6, 7), 9, 3, padding=1,
          **{**NHWC, "weight_layout": "contiguous"}),
    _case("weight_strided", (2, 5, 6, 7), 9, 3, padding=1, weight_layout="strided"),
    _case("weight_hwio_groups", (2, 6, 6, 7), 9, 3, groups=3, weight_layout="hwio"),
    _case("weight_same_filters", (2, 5, 6, 7), 9, 3, weight_layout="broadcast_batch"),
    _case("weight_misaligned", (2, 5, 6, 7), 33, 3, weight_layout="misaligned"),
    _case("1d_weight_hwio", (2, 7, 17), 9, 3, weight_layout="hwio"),
    _case("bias_strided", (2, 5, 6, 7), 31, 3, bias_layout="strided"),
    _case("bias_same", (2, 5, 6, 7), 31, 3, bias_layout="broadcast_columns"),
    _case("grad_nhwc_alone", (2, 5, 6, 7), 9, 3, grad_output_layout="channels_last"),
    _case("grad_contiguous_alone", (2, 5, 6, 7), 9, 3,
          **{**NHWC, "grad_output_layout": "contiguous"}),
    _case("grad_strided", (2, 5, 6, 7), 9, 3, grad_output_layout="strided"),
    # `output.sum()` hands down one gradient for all elements.
    _case("grad_of_sum", (2, 3, 6, 7), 9, 3, padding=1,
          grad_output_layout="scalar", values="integers"),
    _case("grad_of_batch", (3, 3, 6, 7), 9, 3, padding=1,
          grad_output_layout="broadcast_batch", values="integers"),
    # Values.
    _case("zeros_at_the_kink", (2, 3, 7, 6), 9, 3, padding=1, values="integers"),
    _case("zeros_at_the_kink_nhwc", (2, 3, 7, 6), 9, 3, 2, padding=1, values="integers", **NHWC),
    _case("zeros_of_padding", (2, 3, 4, 5), 9, 3, padding=4, bias=False, values="integers"),
    _case("depthwise_integers", (2, 17, 5, 5), 17, 3, padding=1, groups=17, values="integers"),
    _case("1d_integers", (2, 5, 17), 9, 3, padding=((2, 0),), values="integers"),
    _case("dead", (2, 5, 6, 7), 9, 3, padding=1, values="dead"),
    _case("denormal", (2, 5, 6, 7), 9, 3, padding=1, values="denormal"),
    _case("denormal_nhwc", (2, 5, 6, 7), 33, 3, padding=1, values="denormal", **NHWC),
    _case("large", (2, 5, 6, 7), 9, 3, padding=1, values="large"),
    _case("large_pointwise", (2, 31, 5, 5), 17, 1, values="large", **NHWC),
    _case("nonfinite", (2, 3, 8, 9), 7, 3, padding=1, values="nonfinite"),
    _case("nonfinite_nhwc", (2, 3, 8, 9), 7, 3, padding=1, values="nonfinite", **NHWC),
    _case("nonfinite_pointwise", (2, 3, 5, 6), 17, 1, values="nonfinite", **NHWC),
    _case("nonfinite_border", (2, 64, 3, 5), 17, 3, padding=1, values="nonfinite"),
    _case("tiles_at_the_kink", (2, 20, 7, 6), 33, 3, padding=1, values="integers"),
    _case("tiles_of_zeros", (2, 16, 4, 5), 17, 3, padding=4, bias=False, values="integers"),
    _case("tiles_denormal", (2, 17, 6, 7), 33, 3, padding=1, values="denormal"),
    _case("tiles_large", (2, 33, 6, 7), 17, 3, padding=1, values="large"),
    _case("tiles_nonfinite", (2, 32, 8, 9), 18, 3, padding=1, values="nonfinite"),
    _case("tiles_nonfinite_nhwc", (2, 32, 8, 9), 18, 3, padding=1, values="nonfinite", **NHWC),
    _case("nonfinite_1d", (2, 3, 15), 17, 3, values="nonfinite"),
)  # fmt: skip
