// The transforms of Winograd's F(2x2, 3x3): Lavin & Gray, "Fast algorithms for convolutional neural
// networks" (2016), equations 12 and 13. A tile of 2x2 outputs is A^T [(G g G^T) * (B^T d B)] A,
// where d are the 4x4 pixels that its windows meet and g the 3x3 taps: 16 products for 36.
//
// Each output adds up products of pixels of its own window alone: where those are zero it is zero,
// and its error is as small as they are. Taps are added up before: errors are those of the largest.
#pragma once

#include "cpu/source.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

constexpr int kTilePixels = 4, kTileTaps = 3, kTileOutputs = 2, kProducts = 16;

// B^T d, for one column of pixels or (transposed) one row of columns.
template <class V>
__attribute__((always_inline)) inline void transform_pixels(V d0, V d1, V d2, V d3, V* out) {
  out[0] = d0 - d2, out[1] = d1 + d2, out[2] = d2 - d1, out[3] = d1 - d3;
}

// G g. `half` is one half in every lane.
template <class V>
__attribute__((always_inline)) inline void transform_taps(V g0, V g1, V g2, V half, V* out) {
  const V outer = g0 + g2;
  out[0] = g0, out[1] = (outer + g1) * half, out[2] = (outer - g1) * half;
  out[3] = g2;
}

// A^T m.
template <class V>
__attribute__((always_inline)) inline void transform_sums(V m0, V m1, V m2, V m3, V* out) {
  out[0] = m0 + m1 + m2, out[1] = m1 - m2 - m3;
}

// Where tile, channel and product lie: data[product * plane + tile * row + channel].
template <class Acc>
struct TransformedTiles {
  Acc* data;
  int64_t row, plane;
};

// A row of tiles of the image: pixel by pixel, with the next row `line` further. Reads and writes
// whole vectors.
template <class Acc>
void transform_image(const Acc* from, int64_t line, int64_t channels, int64_t tiles,
                     const TransformedTiles<Acc>& to) {
  using S = Simd<Acc>;
  using V = typename S::V;
  for (int64_t c = 0; c < channels; c += S::kWidth) {
    V columns[kTilePixels][kTilePixels];
    const auto load = [&](int64_t x, V* column) __attribute__((always_inline)) {
      const Acc* p = from + x * channels + c;
      transform_pixels(S::load(p), S::load(p + line), S::load(p + 2 * line), S::load(p + 3 * line),
                       column);
    };
    load(0, columns[2]);
    load(1, columns[3]);
    for (int64_t x = 0; x < tiles; x++) {
      Acc* out = to.data + x * to.row + c;
#pragma GCC unroll 4
      for (int i = 0; i < kTilePixels; i++) {
        columns[0][i] = columns[2][i], columns[1][i] = columns[3][i];
      }
      load(2 * x + 2, columns[2]);
      load(2 * x + 3, columns[3]);
#pragma GCC unroll 4
      for (int i = 0; i < kTilePixels; i++) {
        V row[kTilePixels];
        transform_pixels(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
#pragma GCC unroll 4
        for (int j = 0; j < kTilePixels; j++)
          S::store(out + (i * kTilePixels + j) * to.plane, row[j]);
      }
    }
  }
}

// Strides of a weight seen from the first tap of a window; `out` and `in` are its channels.
template <class T>
struct WeightTaps {
  const T* data;
  int64_t out, in, row, column;
};

// out[product * plane] = G g G^T, for one channel in and a vector of channels out; the taps are
// `g` and what follows `step` further each.
template <class S, class Acc>
__attribute__((always_inline)) inline void transform_filter(const typename S::V* g, int step,
                                                            typename S::V half, Acc* out,
                                                            int64_t plane) {
  typename S::V columns[kTileTaps][kTilePixels];
#pragma GCC unroll 3
  for (int x = 0; x < kTileTaps; x++)
    transform_taps(g[x * step], g[(kTileTaps + x) * step], g[(2 * kTileTaps + x) * step], half,
                   columns[x]);
#pragma GCC unroll 4
  for (int i = 0; i < kTilePixels; i++) {
    typename S::V row[kTilePixels];
    transform_taps(columns[0][i], columns[1][i], columns[2][i], half, row);
#pragma GCC unroll 4
    for (int j = 0; j < kTilePixels; j++) S::store(out + (i * kTilePixels + j) * plane, row[j]);
  }
}

// Reads the taps of vectors of channels out, and transforms them.
template <class T>
class WeightTransform {
  using C = Convert<T>;
  using Acc = typename C::Acc;
  using S = typename C::S;
  using V = typename S::V;
  static constexpr int kTaps = kTileTaps * kTileTaps;
  // Channels in that are read at once: as many as give each line of a transposition whole.
  static constexpr int kChannels = kPieces * kPieceColumns<Acc>;

 public:
  explicit WeightTransform(const WeightTaps<T>& weight) : w_(weight), half_(S::set(0.5f)) {
    const bool dense = abs64(w_.column) == 1 && w_.row == w_.column * kTileTaps;
    flipped_ = dense && w_.column < 0;
    dense_taps_ = dense;
    dense_channels_ = w_.in == 1;
  }

  // Channels out lie side by side: channels in had better be the outer loop.
  bool reads_vectors() const { return w_.out == 1; }

  // out[product * plane + channel * width] = a vector of channels out from `column` on, `n` of them
  // and then zeros, for channels [first, first + count) in.
  void run(int64_t column, int n, int64_t first, int64_t count, Acc* out, int64_t width,
           int64_t plane) const {
    const T* p = w_.data + column * w_.out + first * w_.in;
    if (reads_vectors() && n == S::kWidth) {
      constexpr int64_t kAhead = 2;
      for (int64_t c = 0; c < count; c++, p += w_.in, out += width) {
        V taps[kTaps];
#pragma GCC unroll 9
        for (int tap = 0; tap < kTaps; tap++) {
          __builtin_prefetch(p + offset(tap) + kAhead * w_.in);
          taps[tap] = C::load(p + offset(tap));
        }
        transform_filter<S>(taps, 1, half_, out, plane);
      }
      return;
    }
    V taps[kChannels * kTaps];
    for (int64_t c = 0; c < count; c += kChannels, p += kChannels * w_.in) {
      const int channels = static_cast<int>(min64(count - c, kChannels));
      load(p, n, channels, taps);
      for (int k = 0; k < channels; k++, out += width)
        transform_filter<S>(taps + k * kTaps + (flipped_ ? kTaps - 1 : 0), flipped_ ? -1 : 1, half_,
                            out, plane);
    }
  }

  // out[product * plane + i * row + channel], where channels in lie side by side, for `columns`
  // channels out from `column` on.
  void run_rows(int64_t column, int64_t columns, int64_t first, int64_t count, Acc* out,
                int64_t row, int64_t plane) const {
    const T* p = w_.data + column * w_.out + first;
    for (int64_t i = 0; i < columns; i++, p += w_.out, out += row)
      for (int64_t c = 0; c < count; c += S::kWidth) {
        const int n = static_cast<int>(min64(count - c, S::kWidth));
        V taps[kTaps];
#pragma GCC unroll 9
        for (int tap = 0; tap < kTaps; tap++) {
          const T* from = p + offset(tap) + c;
          taps[tap] = n == S::kWidth ? C::load(from) : C::load(from, n);
        }
        transform_filter<S>(taps, 1, half_, out + c, plane);
      }
  }

 private:
  // taps[channel][tap], those of a channel in the order of their addresses if they are flipped.
  void load(const T* p, int n, int channels, V* taps) const {
    const int64_t row = w_.out * static_cast<int64_t>(sizeof(T));
    const bool whole = n == S::kWidth && w_.out != 1;
    const T* dense = flipped_ ? p - (kTaps - 1) : p;
    if (whole && dense_taps_ && w_.in == kTaps && channels == kChannels) {
      for (int i = 0; i < kChannels * kTaps; i += kChannels)
        transpose<T, kPieces>(reinterpret_cast<const char*>(dense + i), row, taps + i);
      return;
    }
    if (whole && dense_taps_) {
      constexpr int kPiece = kPieceColumns<T>;
      for (int c = 0; c < channels; c++, dense += w_.in, taps += kTaps)
        for (int t = 0; t < kTaps; t += kPiece) {
          const int at = t + kPiece <= kTaps ? t : kTaps - kPiece;
          transpose<T, 1>(reinterpret_cast<const char*>(dense + at), row, taps + at);
        }
      return;
    }
    if (whole && dense_channels_ && channels == kChannels) {
      V columns[kChannels];
      for (int tap = 0; tap < kTaps; tap++) {
        transpose<T, kPieces>(reinterpret_cast<const char*>(p + offset(tap)), row, columns);
        for (int k = 0; k < kChannels; k++) taps[k * kTaps + tap] = columns[k];
      }
      return;
    }
    for (int c = 0; c < channels; c++, p += w_.in, taps += kTaps)
#pragma GCC unroll 9
      for (int tap = 0; tap < kTaps; tap++)
        taps[flipped_ ? kTaps - 1 - tap : tap] = vector(p + offset(tap), n);
  }

  int64_t offset(int tap) const { return tap / kTileTaps * w_.row + tap % kTileTaps * w_.column; }
  V vector(const T* p, int n) const {
    if (w_.out == 1) return n == S::kWidth ? C::load(p) : C::load(p, n);
    T lanes[S::kWidth] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i * w_.out];
    return C::load(lanes);
  }

  const WeightTaps<T>& w_;
  const V half_;
  bool flipped_, dense_taps_, dense_channels_;
};

// outputs[row][column] of one tile, a vector of channels; product p lies at sums + p * plane.
template <class Acc>
__attribute__((always_inline)) inline void transform_products(
    const Acc* sums, int64_t plane, typename Simd<Acc>::V (&outputs)[kTileOutputs][kTileOutputs]) {
  using S = Simd<Acc>;
  typename S::V columns[kTilePixels][kTileOutputs];
#pragma GCC unroll 4
  for (int x = 0; x < kTilePixels; x++) {
    const Acc* p = sums + x * plane;
    transform_sums(S::load(p), S::load(p + 4 * plane), S::load(p + 8 * plane),
                   S::load(p + 12 * plane), columns[x]);
  }
#pragma GCC unroll 2
  for (int y = 0; y < kTileOutputs; y++)
    transform_sums(columns[0][y], columns[1][y], columns[2][y], columns[3][y], outputs[y]);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
