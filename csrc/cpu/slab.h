// Slabs: a stretch of an image with its zeros around it, copied once, in which every element of
// every window is found by adding two offsets: one of the window and one of the tap. The
// microkernel reads windows from there; written out one by one they would take as many copies as a
// window has taps.
#pragma once

#include "cpu/engine.h"
#include "cpu/source.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// One spatial dimension of the windows that a convolution, or its transposed form, sees: window
// `at` and tap `tap` meet element origin + at * step + tap * dilation of the image. Taps of the
// weight are first_tap + tap * tap_step.
struct Windows {
  int64_t count, step, origin;
  int64_t taps, dilation, first_tap, tap_step;

  // Elements from the first to the last tap.
  int64_t span() const { return (taps - 1) * dilation + 1; }
  // Some window leaves an image of that size.
  bool leaves(int64_t limit) const {
    return origin < 0 || origin + (count - 1) * step + span() > limit;
  }
};

struct Slab {
  // Interleaved: [row][column][channel]. Planar: [channel][row % step][column % step][row][column],
  // so that neighbouring windows lie next to each other whatever the step.
  bool planar;
  Windows rows, columns;
  int64_t channels;
  bool channels_last;  // order of the taps
  Gather lines;        // the slab of a whole image; planar: one plane of the first column phase
  int64_t image = 0, image_mask = 0;  // from one image to the next
  int64_t column_stride = 0, column_mask = 0;
  int64_t pitch;   // columns of a row
  int64_t height;  // rows of windows in a slab, at most

  int64_t row_phases() const { return planar ? min64(rows.step, rows.span()) : 1; }
  int64_t column_phases() const { return planar ? min64(columns.step, columns.span()) : 1; }
  // Rows for `count` rows of windows.
  int64_t lines_for(int64_t count) const {
    if (planar) return count + (rows.span() - 1) / rows.step;
    return (count - 1) * rows.step + rows.span();
  }
  int64_t plane() const { return lines_for(height) * pitch; }
  // In elements.
  int64_t size() const { return plane() * channels * row_phases() * column_phases(); }
  int64_t line() const { return planar ? pitch : pitch * channels; }
  // Planar windows are counted along the rows of a plane, the last ones of which are none.
  int64_t windows_per_row() const { return planar ? pitch : columns.count; }
  // From a window to the next one in its row, and from a row of windows to the next.
  int64_t window_step() const { return planar ? 1 : columns.step * channels; }
  int64_t window_row() const { return planar ? pitch : rows.step * pitch * channels; }

  int64_t tap(int64_t channel, int64_t row, int64_t column) const {
    const int64_t y = row * rows.dilation, x = column * columns.dilation;
    if (!planar) return (y * pitch + x) * channels + channel;
    const int64_t phase = (channel * row_phases() + y % rows.step) * column_phases();
    return (phase + x % columns.step) * plane() + y / rows.step * pitch + x / columns.step;
  }

  // Offsets of all taps, in the order of the sums.
  void fill_taps(int32_t* offsets, int64_t unit) const {
    const int64_t taps = rows.taps * columns.taps;
    for (int64_t outer = 0; outer < (channels_last ? 1 : channels); outer++)
      for (int64_t t = 0; t < taps; t++)
        for (int64_t inner = 0; inner < (channels_last ? channels : 1); inner++)
          *offsets++ =
              static_cast<int32_t>(tap(outer + inner, t / columns.taps, t % columns.taps) * unit);
  }
};

// Copies the slab of `count` rows of windows from row `first` of image `image` on.
template <class T, class P>
void fill_slab(const Slab& slab, const Source<T>& source, int64_t image, int64_t first,
               int64_t count, P* out) {
  Gather gather = slab.lines;
  Source<T> s = source;
  s.gather = &gather;
  s.data += image * slab.image;
  if (s.mask) s.mask += image * slab.image_mask;
  const int64_t lines = slab.lines_for(count);
  if (!slab.planar) {
    Lines<T> line(s, first * slab.rows.step);
    for (int64_t y = 0; y < lines; y++, out += slab.line(), line.next())
      line.fetch(0, slab.line(), out);
    return;
  }
  const int64_t all_lines = gather.outer.digits[kDigits - 1].size;
  const int64_t planes = slab.channels * slab.row_phases(), phases = slab.column_phases();
  const int64_t plane = slab.plane();
  const Position origin = gather.origin;
  for (int64_t phase = 0; phase < phases; phase++) {
    gather.origin = {origin.offset + phase * slab.column_stride,
                     origin.mask + phase * slab.column_mask, origin.y,
                     origin.x + (gather.bounded ? phase : 0)};
    for (int64_t p = 0; p < planes; p++) {
      P* to = out + (p * phases + phase) * plane;
      Lines<T> line(s, p * all_lines + first);
      for (int64_t y = 0; y < lines; y++, to += slab.pitch, line.next())
        line.fetch(0, slab.pitch, to);
    }
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
