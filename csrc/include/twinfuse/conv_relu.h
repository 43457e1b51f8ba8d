// Convolution + ReLU, in one or two spatial dimensions.
//
//   output[n, k, p, q] = relu(bias[k] + sum over c, r, s of
//                             padded[n, c, p * stride + r * dilation, q * stride + s * dilation]
//                             * weight[k, c, r, s])
//
// with relu(x) = where(x <= 0, 0, x) (NaN passes through) and `padded` the input between zeros. As
// in the frameworks, this is a cross-correlation. With groups, output channel k sees the input
// channels of its group only.
//
//   g           = grad_output masked by output (see TwinfuseReluGrad)
//   grad_input  = the transposed convolution of g with weight
//   grad_weight = for each weight, the sum over n, p, q of g times the input that it met
//   grad_bias   = sum of g over n, p, q
//
//   input, grad_input    [N, C, H, W]             any strides, so NCHW and NHWC alike
//   weight, grad_weight  [K, C / groups, R, S]    any strides: OIHW, HWIO and what lies between
//   bias, grad_bias      [K]                      optional; any stride
//   output, grad_output  [N, K, P, Q]             any strides
//
// In one dimension the tensors are [N, C, W], [K, C / groups, S] and [N, K, Q]. The spatial sizes
// of the output are P = (padding_low + H + padding_high - dilation * (R - 1) - 1) / stride + 1,
// rounded down, at least 1.
//
// Dtypes, aliasing and alignment are those of linear_relu.h. Zeros of the padding are not
// multiplied but skipped or multiplied at the kernel's choice, so an infinite weight may or may not
// turn them into NaN; the frameworks do not define it either. (The choice may follow strides and
// the size of the batch.)
//
// On a CPU, bits depend on the instruction set, the dtype and the layout of `output` alone: not on
// other strides, alignment or threads. The reduced dimension of output and grad_input runs over (r,
// s, channel) where the channels of `output` lie next to each other, or where they do not, but the
// shapes let it pay (in bfloat16 for pairs of channels, in float32 and float64 for taps in the
// padding that can be left out: cpu/window_product.h); else over (channel, r, s). In the former, r
// and s run backwards for grad_input. That of the gradients of weight and bias runs over (n, p, q).
// Sums run along it as linear_relu.h says; those over (n, p, q) are cut at places that depend on
// the shapes alone. With one filter per channel (depthwise) the gradient of the weight is summed
// along stretches of a row, then over rows, then over images.
//
// In float32, windows of 3x3 taps without stride, dilation or groups (for grad_input also those
// with a dilation that is the stride) are made in tiles of 2x2 outputs, by Winograd's minimal
// filtering F(2x2, 3x3), where the shapes let it pay (cpu/tile_plan.h): products of sums of pixels
// and of sums of taps, summed over the channels. An error is about as large as that of one sum over
// all taps, relative to the largest pixels of the window and to the largest taps, while plain sums
// are accurate term by term. Each output is made of the pixels of its own window alone, and images
// in which something overflows or is not finite are computed again without tiles: infinities stay
// infinities, and the bits of an image do not depend on others.
#pragma once

#include "twinfuse/core.h"
#include "twinfuse/linear_relu.h"

#ifdef __cplusplus
extern "C" {
#endif

// One entry per spatial dimension, in the order of the sizes: height and width, or width alone.
typedef struct TwinfuseConv {
  int64_t stride[2];        // at least 1
  int64_t dilation[2];      // at least 1
  int64_t padding_low[2];   // zeros before the first element, at least 0
  int64_t padding_high[2];  // zeros behind the last one, at least 0
  int64_t groups;           // divides C and K
} TwinfuseConv;

// `bias` may be NULL.
TWINFUSE_API TwinfuseStatus twinfuse_conv_relu_forward(
    const TwinfuseTensor* output, const TwinfuseTensor* input, const TwinfuseTensor* weight,
    const TwinfuseTensor* bias, const TwinfuseConv* conv, const TwinfuseContext* context);

// Each of `grad_input`, `grad_weight` and `grad_bias` may be NULL: it is then not computed.
// `input` is read for grad_weight only and `weight` for grad_input only; either may be NULL when
// its gradient is not asked for. `relu_grad` is a TwinfuseReluGrad.
TWINFUSE_API TwinfuseStatus twinfuse_conv_relu_backward(
    const TwinfuseTensor* grad_input, const TwinfuseTensor* grad_weight,
    const TwinfuseTensor* grad_bias, const TwinfuseTensor* grad_output,
    const TwinfuseTensor* output, const TwinfuseTensor* input, const TwinfuseTensor* weight,
    const TwinfuseConv* conv, int32_t relu_grad, const TwinfuseContext* context);

// Spatial size of the output along one dimension, 0 or less where the kernel does not fit in.
TWINFUSE_API int64_t twinfuse_conv_output_size(int64_t size, int64_t kernel, int64_t stride,
                                               int64_t dilation, int64_t padding_low,
                                               int64_t padding_high);

#ifdef __cplusplus
}  // extern "C"
#endif
