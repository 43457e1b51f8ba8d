// What the api layer hands to the kernels of either device: tensors as matrices and as images.
#pragma once

#include <stdint.h>

#include "twinfuse/conv_relu.h"
#include "twinfuse/linear_relu.h"

namespace twinfuse {

// A 2-d view, strides in elements. `data == nullptr` stands for an argument that was not given.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;
};

struct LinearReluForward {
  Matrix output, input, weight;
  const void* bias;
  int64_t bias_stride;
};

struct LinearReluBackward {
  Matrix grad_input, grad_weight;
  void* grad_bias;
  int64_t grad_bias_stride;
  Matrix grad_output, output, input, weight;
  int32_t relu_grad;
};

// [N, C, H, W], [K, C / groups, R, S] or [N, K, P, Q]; strides in elements. One spatial dimension
// is taken for the columns of an image of one row. `data == nullptr`: not given.
struct Images {
  void* data = nullptr;
  int64_t size[4] = {}, stride[4] = {};
};

struct ConvReluForward {
  Images output, input, weight;
  const void* bias;
  int64_t bias_stride;
  TwinfuseConv conv;
};

struct ConvReluBackward {
  Images grad_input, grad_weight;
  void* grad_bias;
  int64_t grad_bias_stride;
  Images grad_output, output, input, weight;
  TwinfuseConv conv;
  int32_t relu_grad;
};

}  // namespace twinfuse
