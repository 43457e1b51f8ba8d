// Products over the windows of images:
//
//   out[n, k, p, q] = epilogue(sum over c, r, s of x[n, c, y, x] * weight[k, c, r, s])
//
// with y = origin + p * step + r * dilation in the rows, and x likewise in the columns. Forward and
// the gradient of the input are such products; the latter, once for each remainder of the stride.
#pragma once

#include "gpu/product.h"

namespace twinfuse::gpu {

// The windows along one dimension. Tap i of a window meets tap `first + i * tap_step` of the
// weight.
struct Windows {
  int64_t count, step, origin, taps, dilation;
  int64_t first = 0, tap_step = 1;
};

Windows forward_windows(int64_t count, int64_t taps, int64_t stride, int64_t low, int64_t dilation);

// Of the elements phase, phase + stride, ... of the gradient of an input of `size`.
Windows transposed_windows(int64_t size, int64_t taps, int64_t stride, int64_t low,
                           int64_t dilation, int64_t phase);

// [n, channels, rows, columns], strides in elements.
struct View {
  char* data;
  int64_t size[4], stride[4];
};

View view(const Images& images);
// Channels [first, first + count) of it.
View channels(View view, int dimension, int64_t first, int64_t count, Type type);

struct WindowProduct {
  View x;
  const void* mask;  // of the strides of `x`; nullptr: none
  View weight;       // [lines, channels of x, rows, columns of taps]
  Windows rows, columns;
  View out;
  Behind behind = Behind::nothing;
  Vector bias = {};
};

// Of the first tap of the windows from the weight's first.
inline int64_t tap_offset(const WindowProduct& p) {
  return p.rows.first * p.weight.stride[2] + p.columns.first * p.weight.stride[3];
}

// The kernel for it; none where no kernel serves it.
Choice plan(const Call& call, const WindowProduct& product);
void run(const Call& call, const WindowProduct& product, const Choice& choice);

// out[k, c, r, s] = sum over n, p, q of grad[n, k, p, q] * x[n, c, y, x]
struct TapProduct {
  View grad;
  const void* mask;  // of the strides of `grad`; nullptr: none
  View x;
  Windows rows, columns;
  View out;
};

Choice plan(const Call& call, const TapProduct& product);
void run(const Call& call, const TapProduct& product, const Choice& choice);

// Of the product that a kernel computes: columns are whole tiles of the channels of one tap.
Shape tap_shape(const TapProduct& product, const Kernel& kernel);

// `mask_gradient` of images, of any strides that the pixels of an image have in common.
void mask_images(const Call& call, const View& grad, const View& output, void* written,
                 int64_t pitch, const Vector* sums);

}  // namespace twinfuse::gpu
