// What the api layer hands to the kernels of either device: tensors as matrices and as images.
#pragma once

#include <stdint.h>

#include "twinfuse/conv_relu.h"
#include "twinfuse/linear_relu.h"
#include "twinfuse/lstm.h"

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

struct Vector {
  void* data = nullptr;
  int64_t stride = 0;
};

// [T, B, n], or packed [N, n], where `step` is not used; strides in elements.
struct Sequence {
  void* data = nullptr;
  int64_t step = 0, row = 0, col = 0;

  template <class T>
  const T* at(int64_t t, int64_t b) const {
    return static_cast<const T*>(data) + t * step + b * row;
  }
};

struct LstmState {
  Matrix h, c;
};

struct LstmWeights {
  Matrix ih, hh, hr, peephole, norm;
  Vector bias_ih, bias_hh;
};

struct LstmSaved {
  Matrix gates, cells, hidden;
};

// What both directions are told. `rows` counts the steps of all sequences; `state` is R.
struct LstmCall {
  int64_t steps, batch, rows, inputs, units, state;
  TwinfuseLstm options;
  LstmSaved saved;
  LstmWeights weights;
  Sequence zoneout_hidden, zoneout_cell;
  Sequence dropout_input, dropout_hidden;  // `step` is from one gate to the next
};

struct LstmForward : LstmCall {
  Sequence input, output;
  LstmState initial, final;
};

struct LstmBackward : LstmCall {
  Sequence input, grad_input, grad_output;
  LstmState grad_initial, grad_final;
  LstmWeights grad_weights;
};

}  // namespace twinfuse
