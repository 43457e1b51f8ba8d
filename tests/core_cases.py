"""Both tables as the tests of the core take them: a convolution once for each order of its sums."""

from __future__ import annotations

import pytest

from tests.arrays import DTYPES
from tests.cases import CASES as LINEAR
from tests.conv_cases import CASES as CONV
from tests.problem import Case

BY_ID: dict[str, Case] = {f"{case.op} {case.id}": case for case in (*LINEAR, *CONV)}


def output_layouts(case: Case) -> tuple[str, ...]:
    """One layout of the output for each order in which the op may sum."""
    return ("contiguous", "channels_last") if case.op == "conv_relu" else ("contiguous",)


def parametrize(names: list[str]) -> pytest.MarkDecorator:
    """Arguments `case` and `layout` (of the output)."""
    pairs = [(BY_ID[name], layout) for name in names for layout in output_layouts(BY_ID[name])]
    ids = [f"{case.op}-{case.id}-{layout}" for case, layout in pairs]
    return pytest.mark.parametrize(("case", "layout"), pairs, ids=ids)


every_case = parametrize(list(BY_ID))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
# One case for each path: packed and not, several reduction blocks, tails, all layouts of weights.
PATHS = [
    *(
        f"linear_relu {name}"
        for name in (
            "row_of_digits_network",
            "row_keras_weight",
            "seven_rows",
            "several_blocks",
            "odd_everywhere",
            "many_rows",
            "weight_keras",
            "all_transposed",
            "denormal",
        )
    ),
    *(
        f"conv_relu {name}"
        for name in (
            "pointwise_stride",
            "stem",
            "three_by_three_stride_nhwc",
            "pairs_of_channels",
            "border",
            "border_nhwc",
            "border_of_five",
            "tiles_several_blocks",
            "tiles_uneven_nhwc",
            "tiles_in_long_rows",
            "tiles_of_one_image_nhwc",
            "tiles_large",
            "depthwise_vectors_nhwc",
            "several_blocks",
            "several_blocks_of_filters",
            "several_blocks_of_pixels",
            "many_pixels",
            "stride_beyond_kernel_nhwc",
            "dilation_and_stride",
            "uneven_padding",
            "groups",
            "depthwise_twice_nhwc",
            "1d_causal_dilation",
            "input_transposed",
            "weight_hwio",
            "denormal_nhwc",
        )
    ),
]
every_path = parametrize(PATHS)
