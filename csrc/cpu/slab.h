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
  bool flat;  // windows are counted along the pitch: behind those of a row lie some of no use
  Windows rows, columns;
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

// Zeros in whole vectors: up to one vector past the last.
template <class P>
void fill_zeros(P* out, int64_t n) {
  using C = Convert<P>;
  for (int64_t i = 0; i < n; i += C::S::kWidth) C::store(out + i, C::S::zero());
}

// One line of a slab after another. What is written behind a line is the next one, or slack.
template <class T, class P>
class SlabLines {
 public:
  SlabLines(const Slab& slab, const Source<T>& source, int64_t image)
      : slab_(slab), gather_(slab.lines), source_(source) {
    source_.gather = &gather_;
    source_.data += image * slab.image;
    if (source_.mask) source_.mask += image * slab.image_mask;
  }

  // Columns of another phase.
  void set_phase(int64_t phase) {
    const Position& origin = slab_.lines.origin;
    gather_.origin = {origin.offset + phase * slab_.column_stride,
                      origin.mask + phase * slab_.column_mask, origin.y,
                      origin.x + (gather_.bounded ? phase : 0)};
  }

  void copy(int64_t first, int64_t count, P* out) const {
    if (!gather_.inner.single()) return copy_pixels(first, count, out);
    // The columns outside of the image are the same in all lines.
    const Digit& digit = gather_.inner.digits[kDigits - 1];
    const int64_t n = digit.size;
    Range inside{0, n};
    if (gather_.bounded) inside = clip(gather_.origin.x, digit.x, gather_.x_limit, inside);
    Cursor line;
    line.start(gather_.outer, first, gather_.origin);
    for (int64_t y = 0; y < count; y++, out += n, line.advance(gather_.outer, 1)) {
      if (gather_.bounded && (line.at.y < 0 || line.at.y >= gather_.y_limit)) {
        fill_zeros(out, n);
        continue;
      }
      fill_zeros(out, inside.begin);
      if (!source_.mask && digit.stride == 1) {
        const T* from = source_.data + line.at.offset + inside.begin;
        const int64_t done = copy_run(from, inside.end - inside.begin, out + inside.begin);
        fill_zeros(out + inside.begin + done, n - inside.begin - done);
        continue;
      }
      const T* m = source_.mask ? source_.mask + line.at.mask + inside.begin * digit.mask : nullptr;
      fetch_run(source_.data + line.at.offset + inside.begin * digit.stride, digit.stride, m,
                digit.mask, source_.relu_grad, inside.end - inside.begin, out + inside.begin);
      fill_zeros(out + inside.end, n - inside.end);
    }
  }

 private:
  // Whole vectors, with zeros behind the last element; returns how many elements were written.
  static int64_t copy_run(const T* from, int64_t n, P* out) {
    constexpr int64_t kWidth = Convert<T>::S::kWidth;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) Convert<P>::store(out + i, Convert<T>::load(from + i));
    if (i == n) return n;
    Convert<P>::store(out + i, Convert<T>::load(from + i, static_cast<int>(n - i)));
    return i + kWidth;
  }

  // Channels that do not follow each other in the image, as they do in the slab.
  void copy_pixels(int64_t first, int64_t count, P* out) const {
    const Axis& inner = gather_.inner;
    const Digit &column = inner.digits[kDigits - 2], &channel = inner.digits[kDigits - 1];
    Lines<T> lines(source_, first);
    Cursor line;
    line.start(gather_.outer, first, gather_.origin);
    Range inside{0, column.size};
    if (gather_.bounded && channel.x == 0)
      inside = clip(gather_.origin.x, column.x, gather_.x_limit, inside);
    for (int64_t y = 0; y < count; y++, out += slab_.line(), line.advance(gather_.outer, 1)) {
      const bool outside = gather_.bounded && (line.at.y < 0 || line.at.y >= gather_.y_limit);
      if (sizeof(P) != sizeof(T) || source_.mask || column.stride != 1 || outside) {
        lines.fetch(0, slab_.line(), out);
      } else {
        const T* from = source_.data + line.at.offset + inside.begin;
        fill_zeros(out, inside.begin * channel.size);
        interleave_channels(from, channel.stride, channel.size, inside.end - inside.begin,
                            reinterpret_cast<T*>(out) + inside.begin * channel.size);
        fill_zeros(out + inside.end * channel.size, (column.size - inside.end) * channel.size);
      }
      lines.next();
    }
  }

  // out[i][c] = from[c * stride + i].
  static void interleave_channels(const T* from, int64_t stride, int64_t channels, int64_t n,
                                  T* out) {
    constexpr int64_t kRows = Simd<typename Convert<T>::Acc>::kWidth;
    constexpr int64_t kPiece = kPieceColumns<typename Convert<T>::Acc>;
    int64_t c = 0;
    if constexpr (sizeof(T) == sizeof(typename Convert<T>::Acc)) {
      for (; c + kRows <= channels; c += kRows) {
        const int64_t whole = n / kPiece * kPiece;
        for (int64_t i = 0; i < whole; i += kPiece) {
          typename Simd<T>::V columns[kPiece];
          transpose<T, 1>(reinterpret_cast<const char*>(from + c * stride + i), stride * sizeof(T),
                          columns);
          for (int64_t k = 0; k < kPiece; k++)
            Simd<T>::store(out + (i + k) * channels + c, columns[k]);
        }
        for (int64_t i = whole; i < n; i++)
          for (int64_t k = c; k < c + kRows; k++) out[i * channels + k] = from[k * stride + i];
      }
    }
    for (; c < channels; c++)
      for (int64_t i = 0; i < n; i++) out[i * channels + c] = from[c * stride + i];
  }

  const Slab& slab_;
  Gather gather_;
  Source<T> source_;
};

// Copies the slab of `count` rows of windows from row `first` of image `image` on, in the order of
// its addresses: a line may spill into what follows.
template <class T, class P>
void fill_slab(const Slab& slab, const Source<T>& source, int64_t image, int64_t first,
               int64_t count, P* out) {
  SlabLines<T, P> from(slab, source, image);
  const int64_t lines = slab.lines_for(count);
  if (!slab.planar) return from.copy(first * slab.rows.step, lines, out);
  const int64_t all_lines = slab.lines.outer.digits[kDigits - 1].size, plane = slab.plane();
  for (int64_t p = 0; p < slab.channels * slab.row_phases(); p++)
    for (int64_t phase = 0; phase < slab.column_phases(); phase++, out += plane) {
      from.set_phase(phase);
      from.copy(p * all_lines + first, lines, out);
    }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
