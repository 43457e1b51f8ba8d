// What the host tells the kernels of the LSTM. Equations and shapes are those of twinfuse/lstm.h.
#pragma once

#include <stdint.h>

namespace twinfuse::cuda {

// Strides are in elements; data is NULL for what is not there.
struct LstmState {  // [B, n]
  void* data;
  int64_t batch, unit;
};
struct LstmSequence {  // [T, B, n]; packed: [N, n], and `batch` is the stride of rows
  void* data;
  int64_t step, batch, unit;
};

// Sequences are cut into slices, and each slice is computed by blocks that own some units of it.
struct LstmShared {
  int32_t steps, batch, units;
  int32_t first, count;                      // sequences of this launch
  int32_t slice, blocks;                     // sequences of a slice, blocks of a slice
  int32_t cell_activation, gate_activation;  // TwinfuseActivation
  int32_t reverse, batch_major, zero_masked_output;
  const int32_t* offsets;  // [T + 1], of packed sequences: the row of the first one at each step
  const uint8_t* mask;     // [T, B], strides in bytes
  int64_t mask_step, mask_batch;
  const void* hh;  // [4H, H]
  int64_t hh_row, hh_col;
  LstmSequence zoneout_hidden, zoneout_cell;
  void* exchange;  // [slices, kExchangeSlots, slice rounded up to chunks, depth], all bits set
  // Of launches of single steps, whose `exchange` is forward [2, B, H], and not set to anything.
  int32_t step;    // 0 first; backward also as many as there are, for what lies behind them
  float* carried;  // [kKept, B, H], from launch to launch; NULL where there is one
};

struct LstmForwardArguments {
  LstmShared shared;
  const void* inputs;  // [rows, 4H]: the products of inputs; may be `gates`, or NULL
  int64_t inputs_row;
  // Of a single step: inputs [B, n] and weights [4H, n], where there are no products yet.
  LstmState x, ih;
  int32_t x_units;
  const void* bias_ih;
  const void* bias_hh;
  int64_t bias_ih_stride, bias_hh_stride;
  LstmSequence output;
  LstmState initial_h, initial_c, final_h, final_c;
  void* gates;  // [rows, 4H], saved
  void* cells;  // [rows, H], of a layer; those of a cell are its initial state
  void* hidden;
  int64_t gates_row, cells_row, hidden_row;
};

struct LstmBackwardArguments {
  LstmShared shared;
  const void* gates;
  const void* cells;
  int64_t gates_row, cells_row, cells_unit;
  LstmSequence grad_output;
  LstmState grad_final_h, grad_final_c, grad_initial_h, grad_initial_c;
  void* grad_gates;  // [rows, 4H]
  float* grad_bias;  // [B, 4H]: sums over the steps
  // Of single steps of one slice: gradients of both biases, [1, 4H].
  LstmState grad_biases[2];
};

// Numbers from the host into memory, by a launch that may be captured.
struct LstmOffsetsArguments {
  static constexpr int kMost = 512;
  int32_t* to;
  int32_t count;
  int32_t numbers[kMost];
};

}  // namespace twinfuse::cuda
