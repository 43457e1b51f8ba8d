// A convolution as a matrix product: which element of the image, and which of the weight, each
// index means. Nothing is copied here; the main loop gathers as it packs.
#pragma once

#include "cpu/kernels.h"
#include "cpu/slab_reader.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Dimensions of Images.
enum { kBatch = 0, kChannel = 1, kRow = 2, kColumn = 3 };

// Which index runs over what. `channels_last`: over (row, column, channel), else over (channel,
// row, column). A kernel is summed, and a gradient laid out, in such an order.
inline Axis tap_axis(bool channels_last, const Digit& channel, const Digit& row,
                     const Digit& column) {
  if (channels_last) return {{row, column, channel}};
  return {{channel, row, column}};
}

inline Windows forward_windows(int64_t outputs, int64_t kernel, const TwinfuseConv& conv, int d) {
  return {outputs, conv.stride[d], -conv.padding_low[d], kernel, conv.dilation[d], 0, 1};
}

// For elements phase, phase + stride, ... of the input's gradient: the windows of the output's
// gradient whose taps met them. As the taps of the window run forwards, those of the weight run
// backwards.
inline Windows transposed_windows(int64_t inputs, int64_t kernel, const TwinfuseConv& conv, int d,
                                  int64_t phase) {
  const int64_t stride = conv.stride[d], dilation = conv.dilation[d];
  const int64_t at = phase + conv.padding_low[d];
  int64_t common = stride, rest = dilation % stride;
  while (rest) {
    const int64_t next = common % rest;
    common = rest, rest = next;
  }
  const int64_t tap_step = stride / common;
  Windows w{ceil_div(inputs - phase, stride), 1, 0, 0, tap_step * dilation / stride, 0, -tap_step};
  int64_t tap = 0;
  while (tap < kernel && tap < tap_step && (at - tap * dilation) % stride != 0) tap++;
  if (tap >= kernel || tap >= tap_step) return w;
  w.taps = (kernel - 1 - tap) / tap_step + 1;
  w.first_tap = tap + (w.taps - 1) * tap_step;
  w.origin = (at - w.first_tap * dilation) / stride;
  return w;
}

// The image as the windows see it: one axis of pixels (n, p, q) and one of taps.
struct Windowed {
  Axis pixels, taps;
  Gather gather;  // without its axes

  // `mask` has the sizes of `image`. Channels are those of one group. `backwards`: the order of the
  // taps, which is that of the sums.
  Windowed(const Images& image, const Images* mask, int64_t channels, const Windows& rows,
           const Windows& columns, bool channels_last, bool backwards = false) {
    const int64_t* s = image.stride;
    const int64_t nothing[4] = {};
    const int64_t* m = mask ? mask->stride : nothing;
    gather.bounded = rows.leaves(image.size[kRow]) || columns.leaves(image.size[kColumn]);
    // Where channels lie next to each other, columns are counted in elements: the taps of one row
    // of a window are then one run.
    const bool runs = channels_last && s[kChannel] == 1;
    const int64_t x = !gather.bounded ? 0 : runs ? channels : 1, y = gather.bounded;
    const int64_t dy = backwards ? -rows.dilation : rows.dilation;
    const int64_t dx = backwards ? -columns.dilation : columns.dilation;
    const Digit channel{channels, s[kChannel], m[kChannel], 0, runs && gather.bounded};
    const Digit row{rows.taps, dy * s[kRow], dy * m[kRow], dy * y, 0};
    const Digit column{columns.taps, dx * s[kColumn], dx * m[kColumn], 0, dx * x};
    taps = tap_axis(channels_last, channel, row, column);
    pixels = {{{image.size[kBatch], s[kBatch], m[kBatch], 0, 0},
               {rows.count, rows.step * s[kRow], rows.step * m[kRow], rows.step * y, 0},
               {columns.count, columns.step * s[kColumn], columns.step * m[kColumn], 0,
                columns.step * x}}};
    taps.simplify();
    pixels.simplify();
    const int64_t top = rows.origin + (backwards ? rows.span() - 1 : 0);
    const int64_t left = columns.origin + (backwards ? columns.span() - 1 : 0);
    gather.origin = {top * s[kRow] + left * s[kColumn], top * m[kRow] + left * m[kColumn], top * y,
                     left * x};
    gather.y_limit = gather.bounded ? image.size[kRow] : 1;
    gather.x_limit = gather.bounded ? image.size[kColumn] * x : 1;
  }
};

// The image itself, for what has its own way to read it.
template <class T>
Source<T> image_source(const Images& image, const Images* mask, int32_t relu_grad) {
  Source<T> s{};
  s.data = static_cast<const T*>(image.data);
  s.mask = mask ? static_cast<const T*>(mask->data) : nullptr;
  s.relu_grad = relu_grad;
  return s;
}

// A source over two axes; dense where both are strides. `gather` must outlive it.
template <class T>
Source<T> source_of(const Images& image, const Images* mask, int32_t relu_grad, const Axis& outer,
                    const Axis& inner, Gather* gather) {
  Source<T> s = image_source<T>(image, mask, relu_grad);
  if (outer.single() && inner.single() && !gather->bounded) {
    s.outer = outer.stride(), s.inner = inner.stride();
    s.mask_outer = outer.digits[kDigits - 1].mask, s.mask_inner = inner.digits[kDigits - 1].mask;
    s.data += gather->origin.offset;
    if (s.mask) s.mask += gather->origin.mask;
    return s;
  }
  gather->outer = outer, gather->inner = inner;
  s.gather = gather;
  return s;
}

// The slab of an image; its height is still to be chosen.
inline Slab slab_of(const Images& image, const Images* mask, int64_t channels, const Windows& rows,
                    const Windows& columns, bool channels_last, bool backwards, bool planar,
                    bool flat) {
  const int64_t* s = image.stride;
  const int64_t nothing[4] = {};
  const int64_t* m = mask ? mask->stride : nothing;
  Slab slab{};
  slab.planar = planar, slab.flat = flat;
  slab.rows = rows, slab.columns = columns;
  slab.image_rows = image.size[kRow], slab.image_columns = image.size[kColumn];
  slab.channels = channels;
  slab.channels_last = channels_last, slab.backwards = backwards;
  slab.image = s[kBatch], slab.image_mask = m[kBatch];
  slab.column_stride = s[kColumn], slab.column_mask = m[kColumn];
  slab.pitch = planar ? columns.count + (columns.span() - 1) / columns.step
                      : (columns.count - 1) * columns.step + columns.span();
  Gather& g = slab.lines;
  // The phases of a planar slab are equally long: of some, the last elements are no part of a
  // window.
  auto leaves = [&](const Windows& w, int64_t phases, int64_t length, int64_t limit) {
    return w.leaves(limit) || (planar && w.origin + phases + (length - 1) * w.step > limit);
  };
  g.bounded = leaves(rows, slab.row_phases(), slab.lines_for(rows.count), image.size[kRow]) ||
              leaves(columns, slab.column_phases(), slab.pitch, image.size[kColumn]);
  const bool runs = !planar && s[kChannel] == 1;
  const int64_t y = g.bounded, x = !g.bounded ? 0 : runs ? channels : 1;
  const int64_t lines = slab.lines_for(rows.count);
  if (planar) {
    g.outer = {{{channels, s[kChannel], m[kChannel]},
                {slab.row_phases(), s[kRow], m[kRow], y},
                {lines, s[kRow] * rows.step, m[kRow] * rows.step, y * rows.step}}};
    g.inner = {
        {{},
         {},
         {slab.pitch, s[kColumn] * columns.step, m[kColumn] * columns.step, 0, x * columns.step}}};
  } else {
    g.outer = {{{}, {}, {lines, s[kRow], m[kRow], y}}};
    g.inner = {{{},
                {slab.pitch, s[kColumn], m[kColumn], 0, x},
                {channels, s[kChannel], m[kChannel], 0, runs && g.bounded}}};
    g.inner.simplify();
  }
  g.origin = {rows.origin * s[kRow] + columns.origin * s[kColumn],
              rows.origin * m[kRow] + columns.origin * m[kColumn], rows.origin * y,
              columns.origin * x};
  g.y_limit = g.bounded ? image.size[kRow] : 1;
  g.x_limit = g.bounded ? image.size[kColumn] * x : 1;
  return slab;
}

// Chooses how many rows of windows a slab holds: of `width` windows each, about `windows` in all.
// False where one row would already be too large.
template <class T>
bool choose_height(Slab* slab, int64_t width, int64_t windows) {
  constexpr int64_t kUnit = sizeof(typename Engine<T>::Packed);
  slab->height = 1;
  if (slab->size() > kSlabBytes / kUnit) return false;
  const int64_t row =
      slab->planar ? slab->pitch * slab->channels * slab->row_phases() * slab->column_phases()
                   : slab->line() * slab->rows.step;
  const int64_t room = (kSlabBytes / kUnit - slab->size()) / row + 1;
  const int64_t most = max64(1, min64(room, windows / width));
  slab->height = ceil_div(slab->rows.count, ceil_div(slab->rows.count, most));
  return true;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
