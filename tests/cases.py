"""The one table of Linear+ReLU cases that the core, torch and TensorFlow are all tested with.

`tests.problem` makes arrays and references of its cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tests.problem import Numbers


@dataclass(frozen=True)
class LinearCase:
    """`output[*leading, n] = relu(input[*leading, k] @ weight[n, k]^T + bias[n])`."""

    op: ClassVar[str] = "linear_relu"

    id: str
    leading: tuple[int, ...]
    k: int
    n: int
    bias: bool = True
    input_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_output_layout: str = "contiguous"
    bias_layout: str = "contiguous"
    values: str = "normal"

    @property
    def rows(self) -> int:
        return int(np.prod(self.leading, dtype=np.int64))

    @property
    def input_sizes(self) -> tuple[int, ...]:
        return (*self.leading, self.k)

    @property
    def weight_sizes(self) -> tuple[int, ...]:
        return (self.n, self.k)

    @property
    def output_sizes(self) -> tuple[int, ...]:
        return (*self.leading, self.n)

    @property
    def terms(self) -> tuple[int, int, int]:
        return self.k, self.n, self.rows

    def pre_activation(self, x: Numbers, w: Numbers, b: Numbers | None) -> Numbers:
        z = x @ w.T
        return z if b is None else z + b

    def gradients(self, g: Numbers, x: Numbers, w: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        rows = g.reshape(self.rows, self.n)
        return g @ w, rows.T @ x.reshape(self.rows, self.k), rows.sum(axis=0)

    def scatter_nonfinite(self, x: Numbers, w: Numbers, b: Numbers, g: Numbers) -> None:
        x[0, 0], x[1, -1], x[2, 1] = np.nan, np.inf, -np.inf
        b[0], b[1] = np.inf, -np.inf
        w[2, 2] = np.nan
        # Column 1 is masked (its outputs are zero): the two ReLU rules differ on these gradients.
        g[3, 1], g[4, 1], g[-1, -1] = np.nan, np.inf, -np.inf


CASES = (
    # Smallest and empty shapes; an input without leading dimensions.
    LinearCase("one_element", (1,), 1, 1),
    LinearCase("vector_input", (), 17, 31),
    LinearCase("vector_input_no_bias", (), 64, 16, bias=False),
    LinearCase("empty_batch", (0,), 17, 16),
    LinearCase("empty_middle", (2, 0, 3), 3, 15),
    LinearCase("empty_reduction", (7,), 0, 16),
    LinearCase("empty_reduction_no_bias", (2,), 0, 15, bias=False),
    LinearCase("empty_output", (7,), 17, 0),
    # Few rows: weights are streamed instead of packed.
    LinearCase("row_of_digits_network", (1,), 784, 128),
    LinearCase("row_no_bias", (1,), 257, 513, bias=False),
    LinearCase("row_keras_weight", (1,), 257, 127, weight_layout="transposed"),
    LinearCase("two_rows_wide", (2,), 64, 1030),
    LinearCase("two_rows_odd", (2,), 127, 130),
    LinearCase("seven_rows", (7,), 130, 31),
    # On and beside the multiples of vector widths, register tiles and reduction blocks.
    LinearCase("below_tile", (33,), 15, 15),
    LinearCase("at_tile", (64,), 16, 16),
    LinearCase("above_tile", (33,), 17, 17),
    LinearCase("one_column", (33,), 64, 1),
    LinearCase("outer_product", (33,), 1, 64),
    LinearCase("below_block", (7,), 255, 17),
    LinearCase("at_block", (33,), 256, 64),
    LinearCase("above_block", (7,), 257, 16),
    LinearCase("several_blocks", (33,), 1030, 31),
    LinearCase("odd_everywhere", (130,), 130, 127, bias=False),
    LinearCase("many_rows", (1030,), 17, 31),
    LinearCase("batch_of_digits_network", (64,), 784, 128),
    LinearCase("two_leading", (2, 3), 16, 31),
    LinearCase("three_leading_ones", (1, 1, 5), 31, 16),
    # Views.
    LinearCase("input_transposed", (33,), 64, 31, input_layout="transposed"),
    LinearCase("input_strided", (33,), 31, 64, input_layout="strided"),
    LinearCase("input_padded", (64,), 31, 17, input_layout="padded"),
    LinearCase("input_same_rows", (7,), 64, 17, input_layout="broadcast_rows"),
    LinearCase("input_same_columns", (33,), 17, 31, input_layout="broadcast_columns"),
    LinearCase("input_misaligned", (33,), 64, 64, input_layout="misaligned"),
    LinearCase("input_permuted", (5, 2, 3), 17, 16, input_layout="permuted"),
    LinearCase("weight_keras", (33,), 64, 127, weight_layout="transposed"),
    LinearCase("weight_strided", (33,), 31, 17, weight_layout="strided"),
    LinearCase("weight_padded", (7,), 64, 31, weight_layout="padded"),
    LinearCase("weight_same_rows", (33,), 31, 17, weight_layout="broadcast_rows"),
    LinearCase("weight_misaligned", (64,), 64, 33, weight_layout="misaligned"),
    LinearCase("bias_strided", (33,), 17, 31, bias_layout="strided"),
    LinearCase("bias_same", (7,), 17, 31, bias_layout="broadcast_columns"),
    # `output.sum()` hands down one gradient for all elements, `output.sum(0)` one per column.
    LinearCase("grad_of_sum", (33,), 17, 31, grad_output_layout="scalar", values="integers"),
    LinearCase("grad_of_row", (7,), 31, 64, grad_output_layout="broadcast_rows", values="integers"),
    LinearCase("grad_transposed", (33,), 31, 64, grad_output_layout="transposed"),
    LinearCase("grad_strided", (33,), 17, 31, grad_output_layout="strided"),
    LinearCase("grad_misaligned", (64,), 31, 17, grad_output_layout="misaligned"),
    LinearCase("all_transposed", (17,), 33, 31, True, "transposed", "transposed", "transposed"),
    # Values.
    LinearCase("zeros_at_the_kink", (33,), 15, 31, values="integers"),
    LinearCase("dead", (33,), 17, 31, values="dead"),
    LinearCase("denormal", (33,), 31, 17, values="denormal"),
    LinearCase("denormal_row", (1,), 31, 64, values="denormal"),
    LinearCase("large", (33,), 31, 17, values="large"),
    LinearCase("nonfinite", (33,), 17, 31, values="nonfinite"),
    LinearCase("nonfinite_few_rows", (7,), 64, 16, values="nonfinite"),
)  # fmt: skip
