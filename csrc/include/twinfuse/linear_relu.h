// Linear + ReLU.
//
//   output = relu(input @ weight^T + bias),      relu(x) = where(x <= 0, 0, x)   (NaN passes
//   through)
//
//   g           = grad_output masked by output (see TwinfuseReluGrad)
//   grad_input  = g @ weight
//   grad_weight = g^T @ input
//   grad_bias   = sum of g over the rows
//
// M is the product of the leading sizes of `input`; there may be any number of them, or none.
//
//   input, grad_input    [..., K]   any strides
//   weight, grad_weight  [N, K]     any strides: torch's weight is (K, 1), a Keras kernel stored as
//                                   [K, N] is passed as [N, K] with strides (1, N)
//   bias, grad_bias      [N]        optional; any stride
//   output, grad_output  [..., N]   any strides
//
// All tensors of a call share one dtype: float32, float64, bfloat16 or float16. Sums run in float32
// (float64 for float64). Tensors that the call writes must not overlap each other or anything it
// reads, and must not overlap themselves. Pointers need only the alignment of their element.
//
// On a CPU, bits depend on the instruction set and the dtype alone: not on strides, alignment or
// threads. Each sum runs in stretches along its reduced dimension, of a length that follows from
// the depth: one multiply-add after another within a stretch (fused, except in the portable
// kernels), then the stretches in order; with "amx_bf16", stretches are 32 products long, and even
// and odd ones are summed apart. Sums over rows are cut into up to 16 pieces by the shapes
// alone, and the gradient of a bias is summed on one level more. Denormals are kept, whatever the
// calling thread's mode, with one exception: the bfloat16 dot instructions ("avx512_bf16",
// "amx_bf16") take denormal operands and sums as zero.
#pragma once

#include "twinfuse/core.h"

#ifdef __cplusplus
extern "C" {
#endif

// How the gradient passes where `output` is zero or NaN: each framework has its own rule.
typedef enum TwinfuseReluGrad {
  TWINFUSE_RELU_GRAD_SELECT = 0,    // output <= 0 ? 0 : grad      (PyTorch: NaN outputs pass grad)
  TWINFUSE_RELU_GRAD_MULTIPLY = 1,  // grad * (output > 0 ? 1 : 0) (TensorFlow: inf * 0 is NaN)
} TwinfuseReluGrad;

// `bias` may be NULL. K == 0 gives relu(bias).
TWINFUSE_API TwinfuseStatus twinfuse_linear_relu_forward(const TwinfuseTensor* output,
                                                         const TwinfuseTensor* input,
                                                         const TwinfuseTensor* weight,
                                                         const TwinfuseTensor* bias,
                                                         const TwinfuseContext* context);

// Each of `grad_input`, `grad_weight` and `grad_bias` may be NULL: it is then not computed.
// `input` is read for grad_weight only and `weight` for grad_input only; either may be NULL when
// its gradient is not asked for. `relu_grad` is a TwinfuseReluGrad.
TWINFUSE_API TwinfuseStatus twinfuse_linear_relu_backward(
    const TwinfuseTensor* grad_input, const TwinfuseTensor* grad_weight,
    const TwinfuseTensor* grad_bias, const TwinfuseTensor* grad_output,
    const TwinfuseTensor* output, const TwinfuseTensor* input, const TwinfuseTensor* weight,
    int32_t relu_grad, const TwinfuseContext* context);

#ifdef __cplusplus
}  // extern "C"
#endif
