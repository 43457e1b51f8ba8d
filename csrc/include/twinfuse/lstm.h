// LSTM: one cell step, and one layer over a whole sequence in one direction.
//
// For every step of every sequence, from the state (h, c) before it:
//
//   a  = W_ih x + b_ih + W_hh h + b_hh                       [4H]: i, f, g, o
//   i  = s(a_i + p_i * c)      f = s(a_f + p_f * c)      g = t(a_g)
//   c~ = f * c + i * g
//   o  = s(a_o + p_o * c~)
//   h~ = o * t(c~)                                           or W_hr (o * t(c~)) with a projection
//   h' = z_h * h + (1 - z_h) * h~        c' = z_c * c + (1 - z_c) * c~
//
// s is `gate_activation` and t is `cell_activation`. p are peepholes (Gers and Schmidhuber 2000),
// W_hr is a projection (Sak et al. 2014), z are zoneouts (Krueger et al. 2017); each of them is
// left out where its tensor is NULL. The order of the gates is that of PyTorch and of Keras.
//
// With dropout the sums of gate k are those of m_x[k] * x and m_h[k] * h, with the same factors at
// every step (Gal and Ghahramani 2016, as Keras has it). With a norm n (Ba et al. 2016, of the
// gates) W_ih x becomes n[0] * (W_ih x - mean) / sqrt(variance + epsilon), over all 4H of a row,
// and W_hh h likewise with n[1]; the biases are added after that.
//
// T steps, B sequences, I inputs, H units, R = H, or the size of the projection:
//
//   input, grad_input               [T, B, I]   packed: [N, I]
//   output, grad_output             [T, B, R]   packed: [N, R]
//   h, c of a state                 [B, R], [B, H]
//   ih, hh                          [4H, I], [4H, R]
//   bias_ih, bias_hh                [4H]
//   hr                              [R, H]
//   peephole                        [3, H]      of i, f, o
//   norm                            [2, 4H]     of ih, hh
//   zoneout hidden, cell            [T, B, R], [T, B, H]   packed: [N, R], [N, H]
//   dropout input, hidden           [4, B, I], [4, B, R]   of i, f, g, o
//   gates, cells, hidden (saved)    [rows, 4H], [rows, H], [rows, R]
//     with a norm, gates            [rows, 12H]  i, f, g, o, W_ih x - mean and W_hh h - mean
//
// Any of them may have any strides, but for what is saved: its rows are dense (torch's weights are
// contiguous, Keras's [I, 4H] are passed transposed; a batch-first sequence is passed permuted).
// Dtypes, aliasing and alignment are those of linear_relu.h; sums, states within a call and gates
// are computed in float32 (float64 for float64). Between steps h is rounded to the dtype and c is
// not.
//
// On a CPU, bits depend on the instruction set and the dtype alone: not on strides, layout,
// packing, alignment or threads. Every sum runs over x and then over h (with a norm, they are two),
// in runs as linear_relu.h says. Gradients of weights, biases, peepholes and the norm are sums over
// blocks of steps, each of about min(1024, max(128, 2(I + R))) rows by the shape and the dtype
// alone, from the block that was taken last to the first; within a block over its steps in the
// order of the tensors, and over the sequences of each, whatever the order of what is saved. A
// single block is summed as linear_relu.h says, several one after another, without pieces. Factors
// of a dropout times x or h are rounded to the dtype, and so is what is saved of sums: in float16
// those of a norm that leave its range have no finite gradients.
//
// A GPU takes float32, bfloat16 and float16, and no hr, peephole, norm or dropout. Rows of `input`
// and `grad_input` lie there at one distance in the order of what is saved; `mask` is on the
// device, `batch_sizes` is not. Saved gates of skipped steps are whatever they are. Scratch:
// forward without `saved` 4H elements a row; backward as much, and 4H numbers of float32 a
// sequence; and what blocks exchange or, where each step is a launch, 7H numbers of float32 a
// sequence and a copy of W_hh.
#pragma once

#include "twinfuse/core.h"
#include "twinfuse/linear_relu.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum TwinfuseActivation {
  TWINFUSE_TANH = 0,
  TWINFUSE_SIGMOID = 1,
  TWINFUSE_RELU = 2,
  TWINFUSE_HARD_SIGMOID = 3,  // min(max(x / 6 + 1/2, 0), 1)
} TwinfuseActivation;
#define TWINFUSE_ACTIVATION_COUNT 4

typedef struct TwinfuseLstm {
  int32_t cell_activation, gate_activation;  // TwinfuseActivation
  // From the last step to the first. Tensors are indexed by time all the same.
  int32_t reverse;
  // The row of step t of sequence b in what is saved: b * T + t, or without it t * B + b. Set it
  // where the input lies so; packed tensors have their own order.
  int32_t batch_major;

  // Packed sequences, longest first: step t has the first batch_sizes[t] of them (at least 1, never
  // more than the step before), and N rows in all. NULL: every step has all. `steps` is the length.
  const int64_t* batch_sizes;
  int64_t steps;

  // [T, B], strides in bytes: where it is 0 a sequence skips the step. Its state stays; its output
  // is that of the last step that it did not skip (0 if there is none), or 0 with
  // `zero_masked_output`. NULL: none skips. Not with batch_sizes. The input of a step that is
  // skipped is not looked at, but for the gradient of `ih`, which multiplies it by zero.
  const uint8_t* mask;
  int64_t mask_stride[2];
  int32_t zero_masked_output;

  // Looked at with a norm; not negative. With 0, equal sums (a state of zeros) have no finite norm.
  double norm_epsilon;
} TwinfuseLstm;

// NULL for zeros, or for what is not wanted.
typedef struct TwinfuseLstmState {
  const TwinfuseTensor *h, *c;
} TwinfuseLstmState;

// All but `ih` and `hh` may be NULL. Of gradients: any that are not wanted. With both biases their
// gradients are equal, and either may be asked for.
typedef struct TwinfuseLstmWeights {
  const TwinfuseTensor *ih, *hh, *bias_ih, *bias_hh, *hr, *peephole, *norm;
} TwinfuseLstmWeights;

// What is drawn at random when training; it has no gradients. NULL: none.
// Zoneout: the share of the old state that stays, 0 or 1, and their mean (all strides zero) in
// inference. Dropout: factors, 0 or 1 / (1 - rate).
typedef struct TwinfuseLstmNoise {
  const TwinfuseTensor *zoneout_hidden, *zoneout_cell, *dropout_input, *dropout_hidden;
} TwinfuseLstmNoise;

// What backward needs of forward: the gates i, f, g, o, and the state before each step. All NULL in
// inference. 5H + R elements a row, 13H + R with a norm; a caller that rather computes twice
// keeps nothing, calls forward again with these, and then backward.
typedef struct TwinfuseLstmSaved {
  const TwinfuseTensor *gates, *cells, *hidden;
} TwinfuseLstmSaved;

// `output` may be NULL; so may the parts of `final`, the state after the last step.
TWINFUSE_API TwinfuseStatus twinfuse_lstm_forward(
    const TwinfuseTensor* output, const TwinfuseLstmState* final, const TwinfuseLstmSaved* saved,
    const TwinfuseTensor* input, const TwinfuseLstmState* initial,
    const TwinfuseLstmWeights* weights, const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm,
    const TwinfuseContext* context);

// Gradients that are NULL are not computed. `grad_output` and the parts of `grad_final` may be NULL
// for zeros. `input` may be NULL without the gradient of `ih`. Scratch, for the rows of one block
// of steps: 4H elements a row, with a projection R more, with a norm 8H more, and with dropout or
// batch-major tensors I or R more, whichever is larger; 4I for up to 256 rows for the gradient of a
// dropped input. With several blocks of halves, also the gradients of the weights in float32.
// Without AVX-512, products pack I + R elements of a row, too.
TWINFUSE_API TwinfuseStatus twinfuse_lstm_backward(
    const TwinfuseTensor* grad_input, const TwinfuseLstmState* grad_initial,
    const TwinfuseLstmWeights* grad_weights, const TwinfuseTensor* grad_output,
    const TwinfuseLstmState* grad_final, const TwinfuseLstmSaved* saved,
    const TwinfuseTensor* input, const TwinfuseLstmWeights* weights, const TwinfuseLstmNoise* noise,
    const TwinfuseLstm* lstm, const TwinfuseContext* context);

// One step: input [B, I], zoneout [B, ...]. Of `lstm` the two activations and the epsilon are
// looked at. Only `gates` [B, 4H or 12H] is saved (NULL in inference); backward takes the state
// before the step, both parts of it, from `initial`.
TWINFUSE_API TwinfuseStatus twinfuse_lstm_cell_forward(
    const TwinfuseLstmState* final, const TwinfuseTensor* gates, const TwinfuseTensor* input,
    const TwinfuseLstmState* initial, const TwinfuseLstmWeights* weights,
    const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm, const TwinfuseContext* context);

TWINFUSE_API TwinfuseStatus twinfuse_lstm_cell_backward(
    const TwinfuseTensor* grad_input, const TwinfuseLstmState* grad_initial,
    const TwinfuseLstmWeights* grad_weights, const TwinfuseLstmState* grad_final,
    const TwinfuseTensor* gates, const TwinfuseTensor* input, const TwinfuseLstmState* initial,
    const TwinfuseLstmWeights* weights, const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm,
    const TwinfuseContext* context);

// Name of the GPU kernel (csrc/cuda/lstm_kernels.h) that takes the steps of such calls, all in one
// launch or, if it ends with "step", one in each; cells are one step. NULL with the reason in
// `twinfuse_last_error()`. Loads the kernel.
TWINFUSE_API const char* twinfuse_lstm_gpu_kernel(int32_t backward, int32_t dtype,
                                                  int32_t precision, int32_t device_index,
                                                  int64_t steps, int64_t batch, int64_t units);

#ifdef __cplusplus
}  // extern "C"
#endif
