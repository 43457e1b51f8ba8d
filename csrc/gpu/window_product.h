// Products over the windows of images:
//
//   out[n, k, p, q] = epilogue(sum over c, r, s of x[n, c, y, x] * weight[k, c, r, s])
//
// with y = origin + p * step + r * dilation in the rows, and x likewise in the columns. Forward and
// the gradient of the input are such products; the latter, once for each remainder of the stride.
#pragma once

#include "gpu/product.h"
#include "gpu/tuning.h"

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
  View weight;  // [lines, channels of x, rows, columns of taps]
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

// Whether the kernel reads boxes of pixels (box_product.h).
bool in_boxes(const Choice& choice);

// out[k, c, r, s] = sum over n, p, q of grad[n, k, p, q] * x[n, c, y, x]
struct TapProduct {
  View grad;  // with its channels side by side, and its pixels equally far apart
  View x;
  Windows rows, columns;
  View out;
};

Choice plan(const Call& call, const TapProduct& product);
void run(const Call& call, const TapProduct& product, const Choice& choice);

// What measurements know them by.
Extents extents_of(const WindowProduct& product);
Extents extents_of(const TapProduct& product);

// Of the product that a kernel computes: columns are whole tiles of the channels of one tap.
Shape tap_shape(const TapProduct& product, const Kernel& kernel);

// How far windows reach beyond the first pixel of their image, at most.
int64_t reach(const Windows& windows);

// Whether offsets inside of one image (or of a weight: from = 0) fit into 32 bits, with so many
// rows and columns more than it has.
bool small_offsets(const View& view, int from, int64_t rows = 0, int64_t columns = 0);

// How many there are in all images, and how far apart two that follow each other lie.
int64_t pixels(const View& images);
int64_t pixel_stride(const View& images);

// Whether the pixels of all images are equally far apart.
bool dense_pixels(const View& images);

// Whether those of each image are.
bool rows_follow(const View& images);

// The images, and behind ReLU's output where there is one, as a pass reads them. Throws Unsupported
// unless rows follow each other in both.
Pixels pixels_of(const View& x, const View* output);

// A view of the same images with their channels side by side, without memory: `data` is nullptr.
View beside(const View& x);
// Its memory; then the pass that fills it.
View filled(const Call& call, const View& x, View beside);

}  // namespace twinfuse::gpu
