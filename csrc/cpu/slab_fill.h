// Filling a slab: a stretch of an image is copied, masked and widened on the way, with zeros where
// windows leave the image.
#pragma once

#include "cpu/pack.h"
#include "cpu/slab.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Zeros in whole vectors: up to one vector past the last.
template <class P>
void fill_zeros(P* out, int64_t n) {
  using C = Convert<P>;
  for (int64_t i = 0; i < n; i += C::S::kWidth) C::store(out + i, C::S::zero());
}

template <class T, class P>
class SlabFiller {
  using C = Convert<T>;
  using S = typename C::S;
  using V = typename S::V;
  static constexpr int64_t kWidth = S::kWidth, kPiece = kPieceColumns<typename C::Acc>;
  static constexpr bool kKeepsType = sizeof(T) == sizeof(P) && sizeof(T) == sizeof(typename C::Acc);
  static constexpr bool kPairs = Engine<T>::kGroup == 2 && sizeof(T) == sizeof(P);

 public:
  SlabFiller(const Slab& slab, const Source<T>& source, int64_t image)
      : slab_(slab), lines_(slab.lines), source_(source) {
    source_.data += image * slab.image;
    if (source_.mask) source_.mask += image * slab.image_mask;
  }

  // `count` rows of windows from row `first` on, in the order of their addresses: a line may spill
  // into what follows.
  void fill(int64_t first, int64_t count, P* out) {
    const Digit &column = lines_.inner.digits[kDigits - 2], &last = lines_.inner.digits[2];
    const int64_t n = slab_.lines_for(count);
    if (slab_.planar) return fill_planes(first, n, out);
    first *= slab_.rows.step;
    if (lines_.inner.single())
      return copy_plane(lines_.origin, lines_.outer.digits[2], last, first, n, out);
    // Channels follow each other in the slab, but not in the image.
    const bool by_pixel = (kKeepsType || (kPairs && last.size % 2 == 0)) && column.stride == 1 &&
                          (!source_.mask || column.mask == 1) && column.x <= 1 && last.x == 0;
    by_pixel ? interleave(column, last, first, n, out) : copy_lines(first, n, out);
  }

 private:
  struct Inside {
    Range lines, columns;
  };
  Inside inside_of(const Position& from, const Digit& line, const Digit& column, int64_t first,
                   int64_t count) const {
    Inside inside{{first, first + count}, {0, column.size}};
    if (!lines_.bounded) return inside;
    inside.lines = clip(from.y, line.y, lines_.y_limit, inside.lines);
    inside.columns = clip(from.x, column.x, lines_.x_limit, inside.columns);
    return inside;
  }

  void fill_planes(int64_t first, int64_t count, P* out) {
    const Digit *outer = lines_.outer.digits, &column = lines_.inner.digits[2];
    const bool channels_run = outer[0].stride == 1 && (!source_.mask || outer[0].mask == 1);
    const int64_t phases = slab_.column_phases(), plane = slab_.plane();
    const bool transposes = kKeepsType && channels_run && outer[0].size >= kPiece;
    // Planes that are filled side by side cannot leave their edges to each other.
    if (transposes && lines_.bounded) memset(static_cast<void*>(out), 0, slab_.size() * sizeof(P));
    for (int64_t c = 0; c < (transposes ? 1 : outer[0].size); c++)
      for (int64_t row = 0; row < outer[1].size; row++)
        for (int64_t phase = 0; phase < phases; phase++, out += plane) {
          const Position& origin = lines_.origin;
          const Position from{
              origin.offset + c * outer[0].stride + row * outer[1].stride +
                  phase * slab_.column_stride,
              origin.mask + c * outer[0].mask + row * outer[1].mask + phase * slab_.column_mask,
              origin.y + row * outer[1].y, origin.x + (lines_.bounded ? phase : 0)};
          if (transposes)
            separate(from, outer[2], column, first, count, out);
          else
            copy_plane(from, outer[2], column, first, count, out);
        }
  }

  // Lines of one stride, the same columns of which lie outside of the image.
  void copy_plane(const Position& from, const Digit& line, const Digit& column, int64_t first,
                  int64_t count, P* out) const {
    const Inside inside = inside_of(from, line, column, first, count);
    const int64_t n = column.size, rows = inside.lines.end - inside.lines.begin;
    fill_zeros(out, (inside.lines.begin - first) * n);
    out += (inside.lines.begin - first) * n;
    const int64_t begin = inside.columns.begin, used = inside.columns.end - begin;
    const T* p = source_.data + from.offset + inside.lines.begin * line.stride;
    const T* m = source_.mask ? source_.mask + from.mask + inside.lines.begin * line.mask : nullptr;
    with_mask(m, source_.relu_grad, [&](auto kind) {
      for (int64_t y = 0; y < rows; y++, out += n) {
        fill_zeros(out, begin);
        const int64_t done = copy_run<decltype(kind)::value>(
            p + y * line.stride + begin * column.stride, column.stride,
            m ? m + y * line.mask + begin * column.mask : nullptr, column.mask, used, out + begin);
        fill_zeros(out + begin + done, n - begin - done);
      }
    });
    fill_zeros(out, (first + count - inside.lines.end) * n);
  }

  // Whole vectors, with zeros behind the last element; returns how many elements were written.
  template <Mask kMask>
  static int64_t copy_run(const T* p, int64_t stride, const T* m, int64_t mask_stride, int64_t n,
                          P* out) {
    int64_t i = 0;
    if (stride == 1 && (kMask == Mask::kNone || mask_stride == 1)) {
      for (; i + kWidth <= n; i += kWidth)
        Convert<P>::store(out + i, load_masked<kMask>(p + i, m + i, kWidth));
      if (i < n) Convert<P>::store(out + i, load_masked<kMask>(p + i, m + i, n - i));
      return round_up(n, kWidth);
    }
    for (; i < n; i += kWidth) {
      V x = load(p + i * stride, stride, n - i);
      if constexpr (kMask != Mask::kNone)
        x = masked<kMask, S>(x, load(m + i * mask_stride, mask_stride, n - i));
      Convert<P>::store(out + i, x);
    }
    return round_up(n, kWidth);
  }

  // Up to a vector of elements, `left` of them; the rest is zero.
  static V load(const T* p, int64_t stride, int64_t left) {
    const bool whole = left >= kWidth;
    if (stride == 1) return whole ? C::load(p) : C::load(p, static_cast<int>(left));
    if constexpr (sizeof(T) == sizeof(typename C::Acc)) {
      if (stride == 2 && whole) return S::load_even(p);
      if (stride == 3 && whole) return load_third<S>(p);
    }
    T piece[kWidth] = {};
    for (int64_t k = 0; k < (whole ? kWidth : left); k++) piece[k] = p[k * stride];
    return C::load(piece);
  }

  // Lines of any kind of pixels.
  void copy_lines(int64_t first, int64_t count, P* out) {
    source_.gather = &lines_;
    Lines<T> lines(source_, first);
    for (int64_t y = 0; y < count; y++, out += slab_.line(), lines.next())
      lines.fetch(0, slab_.line(), out);
  }

  // From pixels side by side to channels side by side.
  void interleave(const Digit& column, const Digit& channel, int64_t first, int64_t count,
                  P* out) const {
    const Digit& line = lines_.outer.digits[2];
    const Inside inside = inside_of(lines_.origin, line, column, first, count);
    const int64_t n = slab_.line(), begin = inside.columns.begin;
    const int64_t used = inside.columns.end - begin;
    for (int64_t y = first; y < first + count; y++, out += n) {
      if (y < inside.lines.begin || y >= inside.lines.end) {
        fill_zeros(out, n);
        continue;
      }
      fill_zeros(out, begin * channel.size);
      transpose_run(lines_.origin.offset + y * line.stride + begin, channel.stride,
                    lines_.origin.mask + y * line.mask + begin, channel.mask, channel.size, used,
                    out + begin * channel.size, channel.size);
      fill_zeros(out + inside.columns.end * channel.size,
                 (column.size - inside.columns.end) * channel.size);
    }
  }

  // The same lines of all planes of a phase, from channels side by side.
  void separate(const Position& from, const Digit& line, const Digit& column, int64_t first,
                int64_t count, P* out) const {
    const Inside inside = inside_of(from, line, column, first, count);
    const int64_t begin = inside.columns.begin;
    for (int64_t y = inside.lines.begin; y < inside.lines.end; y++)
      transpose_run(from.offset + y * line.stride + begin * column.stride, column.stride,
                    from.mask + y * line.mask + begin * column.mask, column.mask,
                    inside.columns.end - begin, lines_.outer.digits[0].size,
                    out + (y - first) * slab_.pitch + begin,
                    slab_.plane() * slab_.row_phases() * slab_.column_phases());
  }

  // out[f * out_stride + s] = element s * stride + f behind `offset`, for `slow` times `fast`; of
  // pairs, an even number is `slow`.
  void transpose_run(int64_t offset, int64_t stride, int64_t mask_offset, int64_t mask_stride,
                     int64_t slow, int64_t fast, P* out, int64_t out_stride) const {
    const T* p = source_.data + offset;
    const T* m = source_.mask ? source_.mask + mask_offset : nullptr;
    if constexpr (kPairs) {
      transpose_pairs(p, stride, m, mask_stride, slow, fast, out, out_stride);
      return;
    }
    if constexpr (kKeepsType) {
      if (fast >= kPiece)
        return with_mask(m, source_.relu_grad, [&](auto kind) {
          for (int64_t s = 0; s < slow; s += kWidth)
            transpose_rows<decltype(kind)::value>(p + s * stride, stride,
                                                  m ? m + s * mask_stride : nullptr, mask_stride,
                                                  slow - s, fast, out + s, out_stride);
        });
    }
    for (int64_t f = 0; f < fast; f++)
      for (int64_t s = 0; s < slow; s += kWidth) {
        const int64_t n = min64(kWidth, slow - s);
        fetch_run(p + s * stride + f, stride, m ? m + s * mask_stride + f : nullptr, mask_stride,
                  source_.relu_grad, n, out + f * out_stride + s);
      }
  }

  // Two rows become one of pairs, which are transposed as if they were floats.
  void transpose_pairs(const T* p, int64_t stride, const T* m, int64_t mask_stride, int64_t slow,
                       int64_t fast, P* out, int64_t out_stride) const {
    constexpr int64_t kColumns = 32;
    alignas(64) uint32_t pairs[kWidth][kColumns] = {};
    T row[2][kColumns];
    for (int64_t s = 0; s < slow; s += 2 * kWidth)
      for (int64_t f = 0; f < fast; f += kColumns) {
        const int64_t n = min64(kColumns, fast - f), rows = min64(kWidth, (slow - s) / 2);
        for (int64_t i = 0; i < rows; i++) {
          for (int64_t h = 0; h < 2; h++) {
            const int64_t at = s + 2 * i + h;
            fetch_run(p + at * stride + f, 1, m ? m + at * mask_stride + f : nullptr, 1,
                      source_.relu_grad, n, row[h]);
          }
          cpu::TWINFUSE_ISA::interleave(row[0], row[1], n, pairs[i]);
        }
        for (int64_t j = 0; j < n; j += kPiece) {
          V x[kPiece];
          transpose<typename C::Acc, 1>(reinterpret_cast<const char*>(&pairs[0][j]),
                                        sizeof(pairs[0]), x);
          for (int64_t k = 0; k < min64(kPiece, n - j); k++)
            S::store(reinterpret_cast<typename C::Acc*>(out + (f + j + k) * out_stride + s), x[k],
                     static_cast<int>(rows));
        }
      }
  }

  // Up to a vector of rows, `left` of them. The last piece goes over some columns a second time.
  template <Mask kMask>
  static void transpose_rows(const T* p, int64_t stride, const T* m, int64_t mask_stride,
                             int64_t left, int64_t fast, P* out, int64_t out_stride) {
    const int rows = static_cast<int>(min64(left, kWidth));
    for (int64_t i = 0; i < fast; i += kPiece) {
      const int64_t f = min64(i, fast - kPiece);
      V x[kPiece], y[kPiece];
      columns(p + f, stride, rows, x);
      if constexpr (kMask != Mask::kNone) columns(m + f, mask_stride, rows, y);
#pragma GCC unroll 4
      for (int64_t k = 0; k < kPiece; k++) {
        const V value = kMask == Mask::kNone ? x[k] : masked<kMask, S>(x[k], y[k]);
        P* to = out + (f + k) * out_stride;
        if (rows == kWidth)
          Convert<P>::store(to, value);
        else
          Convert<P>::store(to, value, rows);
      }
    }
  }

  // A piece of the columns of `rows` rows; what is behind them repeats the last.
  static void columns(const T* p, int64_t stride, int rows, V* out) {
    using Acc = typename C::Acc;
    const char* bytes = reinterpret_cast<const char*>(p);
    const int64_t row_bytes = stride * sizeof(T);
    if (rows == kWidth) return transpose<Acc, 1>(bytes, row_bytes, out);
    alignas(16) char copy[kWidth * 16];
    for (int i = 0; i < kWidth; i++)
      memcpy(copy + 16 * i, bytes + (i < rows ? i : rows - 1) * row_bytes, 16);
    transpose<Acc, 1>(copy, 16, out);
  }

  const Slab& slab_;
  const Gather& lines_;
  Source<T> source_;
};

// Copies the slab of `count` rows of windows from row `first` of image `image` on.
template <class T, class P>
void fill_slab(const Slab& slab, const Source<T>& source, int64_t image, int64_t first,
               int64_t count, P* out) {
  SlabFiller<T, P>(slab, source, image).fill(first, count, out);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
