"""Cases for kernels that the tables of the ops hardly meet: they want sizes of whole vectors."""

from __future__ import annotations

from typing import Any

from tests.cases import LinearCase
from tests.conv_case import ConvCase
from tests.problem import Case

KERAS = {"weight_layout": "transposed"}
NHWC = {f"{name}_layout": "channels_last" for name in ("input", "weight", "grad_output")}
NCHW = dict.fromkeys(NHWC, "contiguous")
HWIO = NHWC | {"weight_layout": "hwio"}


def _conv(
    id: str,
    input: tuple[int, int, int, int],
    filters: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    **options: Any,
) -> ConvCase:
    batch, channels, *size = input
    twice = ((kernel, kernel), (stride, stride), ((padding, padding),) * 2, (dilation, dilation))
    return ConvCase(id, batch, channels, tuple(size), filters, *twice, **NHWC | options)


CASES: tuple[Case, ...] = (
    LinearCase("vectors", (80,), 96, 64),
    LinearCase("vectors_keras", (80,), 96, 64, **KERAS),
    LinearCase("vectors_no_bias", (64,), 64, 80, bias=False),
    LinearCase("vectors_few_rows", (16,), 192, 128),
    LinearCase("vectors_few_rows_keras", (8,), 192, 128, **KERAS),
    LinearCase("vectors_deep", (48,), 2048, 64),
    LinearCase("vectors_deep_keras", (48,), 2048, 64, **KERAS),
    LinearCase("vectors_wide", (48,), 64, 2048),
    LinearCase("vectors_many_rows", (2048,), 64, 48),
    LinearCase("vectors_many_rows_keras", (2048,), 48, 64, **KERAS),
    LinearCase("vectors_many_rows_no_bias", (2048,), 48, 64, bias=False),
    LinearCase("vectors_squares", (272,), 256, 288),
    LinearCase("vectors_squares_keras", (272,), 256, 288, **KERAS),
    LinearCase("vectors_misaligned_bias", (64,), 64, 64, bias_layout="misaligned"),
    LinearCase("vectors_strided_bias", (64,), 64, 64, bias_layout="strided"),
    LinearCase("vectors_grad_misaligned", (64,), 64, 64, grad_output_layout="misaligned"),
    LinearCase("vectors_grad_of_sum", (64,), 64, 64, grad_output_layout="scalar",
               values="integers"),
    LinearCase("vectors_eights", (40,), 72, 24),
    LinearCase("vectors_eights_keras", (40,), 72, 24, **KERAS),
    LinearCase("vectors_integers", (64,), 48, 96, values="integers"),
    LinearCase("vectors_nonfinite", (64,), 48, 96, values="nonfinite"),
    LinearCase("vectors_nonfinite_keras", (64,), 48, 96, values="nonfinite", **KERAS),
    _conv("vectors", (2, 32, 9, 8), 48, 3, padding=1),
    _conv("vectors_hwio", (2, 32, 9, 8), 48, 3, padding=1, **HWIO),
    _conv("vectors_valid", (1, 64, 10, 12), 64, 3),
    _conv("vectors_stride", (2, 32, 11, 12), 64, 3, 2, padding=1),
    _conv("vectors_stride_hwio", (2, 32, 11, 12), 64, 3, 2, padding=1, **HWIO),
    _conv("vectors_stride_three", (1, 16, 13, 16), 32, 5, 3, padding=2),
    _conv("vectors_dilation", (2, 16, 12, 9), 32, 3, padding=2, dilation=2),
    _conv("vectors_dilation_stride", (1, 32, 14, 13), 16, 3, 2, padding=2, dilation=3),
    _conv("planes", (2, 32, 8, 8), 48, 3, padding=1, **NCHW),
    _conv("planes_uneven", (2, 32, 7, 5), 24, 3, padding=1, **NCHW),
    _conv("planes_stride", (2, 16, 8, 8), 32, 3, 2, padding=1, **NCHW),
    _conv("planes_pointwise", (2, 64, 4, 8), 32, 1, **NCHW),
    _conv("planes_few_channels", (2, 3, 16, 16), 32, 5, 2, padding=2, **NCHW),
    _conv("planes_hwio", (2, 32, 8, 8), 16, 3, padding=1, **NCHW | {"weight_layout": "hwio"}),
    _conv("vectors_pointwise", (2, 64, 8, 8), 32, 1),
    _conv("vectors_pointwise_hwio", (2, 64, 8, 8), 32, 1, **HWIO),
    _conv("vectors_pointwise_stride", (2, 64, 9, 8), 32, 1, 2),
    _conv("vectors_pointwise_stride_hwio", (2, 64, 9, 8), 32, 1, 2, **HWIO),
    _conv("vectors_pointwise_deep", (1, 512, 4, 4), 64, 1),
    _conv("vectors_deep", (1, 160, 6, 6), 32, 3, padding=1),
    _conv("vectors_filters", (1, 16, 6, 7), 144, 3, padding=1),
    _conv("vectors_pixels", (2, 16, 16, 16), 16, 3, padding=1),
    _conv("vectors_small_images", (24, 16, 4, 4), 32, 3, padding=1),
    _conv("vectors_no_bias", (2, 32, 8, 8), 32, 3, padding=1, bias=False),
    _conv("vectors_groups", (2, 64, 6, 7), 96, 3, padding=1, groups=2),
    _conv("vectors_groups_hwio", (2, 64, 6, 7), 96, 3, padding=1, groups=2, **HWIO),
    _conv("vectors_grad_alone", (2, 32, 8, 7), 32, 3, padding=1,
          grad_output_layout="contiguous"),
    _conv("vectors_misaligned_bias", (1, 32, 8, 7), 32, 3, padding=1, bias_layout="misaligned"),
    _conv("vectors_eights", (2, 24, 8, 7), 40, 3, padding=1),
    _conv("vectors_eights_hwio", (2, 24, 8, 7), 40, 3, padding=1, **HWIO),
    _conv("vectors_integers", (2, 16, 8, 8), 32, 3, padding=1, values="integers"),
    _conv("vectors_nonfinite", (2, 32, 8, 8), 48, 3, padding=1, values="nonfinite"),
    _conv("vectors_nonfinite_stride", (2, 32, 9, 9), 48, 3, 2, padding=1, values="nonfinite"),
)  # fmt: skip
