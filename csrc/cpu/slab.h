// Slabs: a stretch of an image with its zeros around it, copied once, in which every element of
// every window is found by adding two offsets: one of the window and one of the tap. The
// microkernel reads windows from there; written out one by one they would take as many copies as a
// window has taps.
#pragma once

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

// A slab of the image takes less than its windows.
inline bool copies_less(const Windows& rows, const Windows& columns) {
  return rows.taps * columns.taps >= 2 * rows.step * columns.step;
}

struct Slab {
  // Interleaved: [row][column][channel]. Planar: [channel][row % step][column % step][row][column],
  // so that neighbouring windows lie next to each other whatever the step.
  bool planar;
  bool flat;  // windows are counted along the pitch: behind those of a row lie some of no use
  Windows rows, columns;
  int64_t image_rows, image_columns;  // what lies outside is zero
  int64_t channels;
  bool channels_last, backwards;  // order of the taps
  Gather lines;  // the slab of a whole image; planar: one plane of the first column phase
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
  int64_t windows_per_row() const { return flat ? pitch : columns.count; }
  // Elements per window.
  double copies() const {
    return static_cast<double>(size()) / static_cast<double>(height * windows_per_row());
  }
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
      for (int64_t i = 0; i < taps; i++) {
        const int64_t t = backwards ? taps - 1 - i : i;
        for (int64_t inner = 0; inner < (channels_last ? channels : 1); inner++)
          *offsets++ =
              static_cast<int32_t>(tap(outer + inner, t / columns.taps, t % columns.taps) * unit);
      }
  }
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
