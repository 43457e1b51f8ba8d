// Packing: operands laid out so that the microkernel reads them in order.
//
// A step of the main loop takes one unit (Engine::Unit) per row or column. `steps` layouts hold the
// units of one step side by side; `rows` layouts hold the steps of one row side by side.
#pragma once

#include "cpu/engine.h"
#include "cpu/source.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
constexpr int64_t steps_of(int64_t depth) {
  return (depth + Engine<T>::kGroup - 1) / Engine<T>::kGroup;
}

// Two rows of halves into one row of pairs.
inline void interleave(const Bf16* even, const Bf16* odd, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; i++) out[i] = even[i].bits | static_cast<uint32_t>(odd[i].bits) << 16;
}

// out[step][i] for `n` elements from `inner` on, and zeros up to `width`; the source's outer
// dimension is the reduced one. `lines` moves on behind the last step. `stride` counts units.
template <class T>
void pack_steps(Lines<T>& lines, int64_t depth, int64_t inner, int64_t n, int64_t width,
                typename Engine<T>::Unit* out, int64_t stride) {
  using E = Engine<T>;
  constexpr int64_t kPiece = 64;
  for (int64_t r = 0; r < depth; r += E::kGroup, out += stride) {
    if constexpr (E::kGroup == 1) {
      lines.prefetch(inner, n);
      lines.fetch(inner, n, out);
      lines.next();
    } else {
      const bool pair = r + 1 < depth;
      Lines<T> second = lines;
      if (pair) second.next();
      typename E::Packed even[kPiece], odd[kPiece] = {};
      for (int64_t i = 0; i < n; i += kPiece) {
        int64_t count = n - i < kPiece ? n - i : kPiece;
        lines.fetch(inner + i, count, even);
        if (pair) second.fetch(inner + i, count, odd);
        interleave(even, odd, count, out + i);
      }
      lines.next();
      if (pair) lines.next();
    }
    for (int64_t i = n; i < width; i++) out[i] = 0;
  }
}

// Weights whose channels lie far apart: stretches of one vector at most.
template <class T>
bool has_short_runs(const Source<T>& s) {
  if (!s.gather || s.gather->bounded || s.mask || !s.gather->outer.single()) return false;
  const Digit& run = s.gather->inner.digits[kDigits - 1];
  return run.stride == 1 && run.size <= Convert<T>::S::kWidth;
}

// Packs the same stretch of all rows before the next one: rows are neighbours in memory.
template <class T, class P>
void pack_short_runs(const Source<T>& s, int64_t r0, int64_t depth, int64_t row, int64_t n, P* out,
                     int64_t stride) {
  const Gather& g = *s.gather;
  const int64_t row_stride = g.outer.stride();
  Cursor run;
  run.start(g.inner, r0, g.origin);
  for (int64_t r = 0; r < depth;) {
    const int count = static_cast<int>(min64(depth - r, run.left(g.inner)));
    const T* from = s.data + run.at.offset + row * row_stride;
    for (int64_t i = 0; i < n; i++)
      Convert<P>::store(out + i * stride + r, Convert<T>::load(from + i * row_stride, count),
                        count);
    r += count;
    run.advance(g.inner, count);
  }
}

// out[row][step] for `n` rows; the source's inner dimension is the reduced one. `stride` counts
// packed elements. The last unit of a row is padded with zero.
template <class T>
void pack_rows(const Source<T>& s, int64_t r0, int64_t depth, int64_t row, int64_t n,
               typename Engine<T>::Packed* out, int64_t stride) {
  using E = Engine<T>;
  if (has_short_runs(s)) {
    pack_short_runs(s, r0, depth, row, n, out, stride);
    for (int64_t i = 0; E::kGroup == 2 && depth % 2 && i < n; i++)
      memset(static_cast<void*>(out + i * stride + depth), 0, sizeof(*out));
    return;
  }
  Lines<T> lines(s, row);
  for (int64_t i = 0; i < n; i++, out += stride, lines.next()) {
    lines.fetch(r0, depth, out);
    if (E::kGroup == 2 && depth % 2) memset(static_cast<void*>(out + depth), 0, sizeof(*out));
  }
}

template <class Lane, int kCount>
__attribute__((always_inline)) inline void transpose_pieces(const char* rows, int64_t row_bytes,
                                                            Lane* out, int64_t stride) {
  using S = Simd<Lane>;
  constexpr int kColumns = kCount * kPieceColumns<Lane>;
  constexpr int64_t kAhead = 512;
  // Too many rows at once for the processor's own prefetcher to follow.
#pragma GCC unroll 16
  for (int i = 0; i < S::kWidth; i++) __builtin_prefetch(rows + i * row_bytes + kAhead);
  typename S::V columns[kColumns];
  transpose<Lane, kCount>(rows, row_bytes, columns);
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; c++) S::store(out + c * stride, columns[c]);
}

// out[step][row] from kWidth rows of packed elements at `rows`, `row_bytes` apart; whole pieces
// only.
template <class T>
void transpose_rows(const char* rows, int64_t row_bytes, int64_t steps,
                    typename Engine<T>::Unit* out, int64_t stride) {
  using Lane = typename Engine<T>::Acc;
  constexpr int64_t kPiece = kPieceColumns<Lane>, kLine = kPieces * kPiece;
  Lane* to = reinterpret_cast<Lane*>(out);
  int64_t k = 0;
  for (; k + kLine <= steps; k += kLine)
    transpose_pieces<Lane, kPieces>(rows + k * sizeof(Lane), row_bytes, to + k * stride, stride);
  for (; k < steps; k += kPiece)
    transpose_pieces<Lane, 1>(rows + k * sizeof(Lane), row_bytes, to + k * stride, stride);
}

// An axis of channels along which the taps of each lie side by side, in either direction, but are
// read tap after tap: that of a weight's rows.
template <class T>
bool has_dense_taps(const Axis& inner) {
  const Digit* digits = inner.digits;
  return kUnitsAsStored<T> && digits[0].size == 1 && abs64(digits[1].stride) == 1 &&
         digits[1].size >= kPieceColumns<T>;
}

// All steps of kWidth such rows; see pack_transposed. Each piece goes over some taps a second time.
template <class T>
void transpose_taps(const Source<T>& s, int64_t row, T* out, int64_t stride) {
  using S = typename Engine<T>::S;
  constexpr int64_t kPiece = kPieceColumns<T>;
  const Digit &tap = s.gather->inner.digits[1], &channel = s.gather->inner.digits[2];
  const int64_t outer = s.gather->outer.stride(), first = tap.stride < 0 ? 1 - tap.size : 0;
  const T* p = s.data + s.gather->origin.offset + row * outer + first;
  for (int64_t c = 0; c < channel.size; c++, p += channel.stride)
    for (int64_t t = 0; t < tap.size; t += kPiece) {
      const int64_t at = min64(t, tap.size - kPiece);
      typename S::V columns[kPiece];
      transpose<T, 1>(reinterpret_cast<const char*>(p + at), outer * sizeof(T), columns);
      for (int64_t k = 0; k < kPiece; k++) {
        const int64_t step = tap.stride < 0 ? tap.size - 1 - at - k : at + k;
        S::store(out + (step * channel.size + c) * stride, columns[k]);
      }
    }
}

// out[step][j] for `n` rows and zeros up to `width` (a multiple of the vector width), where the
// source's inner dimension is the reduced one: the transposing form of pack_steps. `scratch` holds
// transpose_scratch<T>(depth) elements. Writes whole groups of steps: up to three past the last
// one.
template <class T>
void pack_transposed(const Source<T>& s, int64_t r0, int64_t depth, int64_t row, int64_t n,
                     int64_t width, typename Engine<T>::Unit* out, int64_t stride,
                     typename Engine<T>::Packed* scratch) {
  using E = Engine<T>;
  using Packed = typename E::Packed;
  constexpr int kWidth = E::S::kWidth;
  constexpr int64_t kGroupOfSteps = kPieceColumns<typename E::Acc> * E::kGroup;
  for (int64_t j = 0; j < width; j += kWidth) {
    int64_t rows = n - j < 0 ? 0 : (n - j < kWidth ? n - j : kWidth);
    int64_t done = 0;
    if constexpr (kUnitsAsStored<T>) {
      const Gather* g = s.gather;
      if (rows == kWidth && g && !g->bounded && !s.mask && g->outer.single() &&
          depth == g->inner.size() && has_dense_taps<T>(g->inner)) {
        transpose_taps(s, row + j, out + j, stride);
        continue;
      }
    }
    if constexpr (sizeof(Packed) == sizeof(T)) {
      if (rows == kWidth && s.plain()) {
        done = depth / kGroupOfSteps * kGroupOfSteps;
        const T* p = s.data + (row + j) * s.outer + r0;
        transpose_rows<T>(reinterpret_cast<const char*>(p), s.outer * sizeof(T), done / E::kGroup,
                          out + j, stride);
      }
    }
    for (; done < depth; done += E::kBlock) {
      const int64_t count = min64(depth - done, E::kBlock);
      const int64_t padded = round_up(count, kGroupOfSteps);
      pack_rows(s, r0 + done, count, row + j, rows, scratch, padded);
      for (int64_t i = 0; i < kWidth; i++) {
        const int64_t filled = i < rows ? count : 0;
        memset(static_cast<void*>(scratch + i * padded + filled), 0,
               (padded - filled) * sizeof(Packed));
      }
      transpose_rows<T>(reinterpret_cast<const char*>(scratch), padded * sizeof(Packed),
                        padded / E::kGroup, out + done / E::kGroup * stride + j, stride);
    }
  }
}

// out[row][step] for `n` rows from `inner` on, where the source's outer dimension is the reduced
// one. Writes whole vectors of steps, and whole vectors of rows.
template <class T>
void pack_turned(const Source<T>& s, int64_t r0, int64_t depth, int64_t inner, int64_t n,
                 typename Engine<T>::Packed* out, int64_t stride) {
  using E = Engine<T>;
  using Unit = typename E::Unit;
  constexpr int64_t kSteps = E::S::kWidth, kRows = 128;
  alignas(64) Unit units[kSteps][kRows];
  for (int64_t i = 0; i < n; i += kRows) {
    const int64_t rows = min64(kRows, n - i), width = round_up(rows, E::S::kWidth);
    Lines<T> lines(s, r0);
    for (int64_t k = 0; k < depth; k += kSteps * E::kGroup) {
      const int64_t count = min64(depth - k, kSteps * E::kGroup);
      pack_steps(lines, count, inner + i, rows, width, units[0], kRows);
      for (int64_t step = steps_of<T>(count); step < kSteps; step++)
        memset(units[step], 0, width * sizeof(Unit));
      transpose_rows<T>(reinterpret_cast<const char*>(units), sizeof(units[0]), width,
                        reinterpret_cast<Unit*>(out + i * stride + k), stride / E::kGroup);
    }
  }
}

template <class T>
int64_t transpose_scratch(int64_t depth) {
  return Engine<T>::S::kWidth * (min64(depth, Engine<T>::kBlock) + 16);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
