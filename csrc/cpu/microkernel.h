// The register-tiled inner kernel: `rows` x `cols` sums over one block of the reduced dimension.
#pragma once

#include <type_traits>

#include "cpu/amx_microkernel.h"
#include "cpu/engine.h"
#include "cpu/operands.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Tile shapes: as many accumulators as the registers hold beside the operands. Four vectors wide
// where there are few rows, so that enough sums are in flight to hide the latency of one.
constexpr int kMaxVectors = 4;
#if defined(TWINFUSE_AMX)
constexpr int kMaxRows = 2 * kTileRows;
constexpr int max_rows(int vectors) { return vectors < 4 ? kMaxRows : kTileRows; }
#else
constexpr int kMaxRows = kRegisters == 32 ? 14 : 6;
constexpr int max_rows(int vectors) { return vectors < 4 ? kMaxRows : kRegisters == 32 ? 6 : 2; }
#endif
// Vectors of the narrowest panel that holds `columns` columns, or of the widest.
constexpr int vectors_for(int64_t columns, int64_t width) {
  return columns <= width ? 1 : columns <= 2 * width ? 2 : kMaxVectors;
}

// The last run of a tile, added to the runs before and finished.
template <class E, int kRows, int kVectors, class Epilogue>
__attribute__((always_inline)) inline void store_tile(const typename E::V (&sum)[kRows][kVectors],
                                                      const typename E::Acc* before,
                                                      const Direct<typename E::Acc>& to) {
  using S = typename E::S;
  using V = typename E::V;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    const int cols = to.cols - v * S::kWidth;
    const V shift = to.bias_of_rows ? S::zero() : S::load(to.bias + v * S::kWidth);
    typename E::Acc* out = to.out + v * S::kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++, out += to.out_row) {
      V x = sum[i][v];
      if (before) x = S::add(S::load(before + (i * kVectors + v) * S::kWidth), x);
      x = Epilogue::template apply<S>(x, to.bias_of_rows ? S::set(to.bias[i]) : shift);
      if (cols >= S::kWidth)
        S::store(out, x);
      else if (cols > 0)
        S::store(out, x, cols);
    }
  }
}

// sums[i][v * width + lane] = sum over the steps, run after run. The sums leave through memory so
// that what follows them is compiled once, not once per tile shape; where there are few steps that
// would take as long as they do, and with an Epilogue they go to their place from registers.
template <class E, InSlab kSlab, int kRows, int kVectors, class Epilogue = void,
          bool kAhead = false>
void microkernel(const Operands& in, typename E::Acc* sums,
                 const Direct<typename E::Acc>* direct = nullptr) {
  using S = typename E::S;
  using V = typename E::V;
  // Every seventh row has a pointer; those behind it are reached by scaled addressing.
  constexpr int kPointers = (kRows + 6) / 7;
  const char *a[kPointers], *b = in.b;
#pragma GCC unroll 16
  for (int i = 0; i < kPointers; i++) a[i] = in.a + 7 * i * in.a_row;
  const int64_t a_step = in.a_step, b_step = in.b_step;
  const int64_t row1 = in.a_row, row3 = 3 * in.a_row, row5 = 5 * in.a_row;
  const auto row = [&](int i) __attribute__((always_inline)) {
    return i == 5 ? row5 : i % 3 == 0 ? i / 3 * row3 : i * row1;
  };
  const int32_t* offset = in.offsets;
  const char* ahead = in.ahead;
  int64_t left = in.steps;
  bool first = !in.continued;
  do {
    V sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[i][v] = S::zero();
    for (int64_t k = left < in.run ? left : in.run; k > 0; k--) {
      if constexpr (kAhead) __builtin_prefetch(ahead, 0, 2), ahead += 64;
      const int64_t at = kSlab == InSlab::kNone ? 0 : *offset++;
      const char* columns = kSlab == InSlab::kB ? b + at : b;
      V right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) right[v] = E::load(columns + v * sizeof(V));
      const char* rows[kPointers];
#pragma GCC unroll 16
      for (int i = 0; i < kPointers; i++) rows[i] = kSlab == InSlab::kA ? a[i] + at : a[i];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i++) {
        V x = E::broadcast(rows[i / 7] + row(i % 7));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[i][v] = E::multiply_add(x, right[v], sum[i][v]);
      }
      if constexpr (kSlab != InSlab::kA) {
#pragma GCC unroll 16
        for (int i = 0; i < kPointers; i++) a[i] += a_step;
      }
      if constexpr (kSlab != InSlab::kB) b += b_step;
    }
    if constexpr (!std::is_void<Epilogue>::value)
      if (left <= in.run)
        return store_tile<E, kRows, kVectors, Epilogue>(sum, first ? nullptr : sums, *direct);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        typename E::Acc* out = sums + (i * kVectors + v) * S::kWidth;
        S::store(out, first ? sum[i][v] : S::add(S::load(out), sum[i][v]));
      }
    first = false;
    left -= in.run;
  } while (left > 0);
}

// The same sums with `b` as rows of packed elements, `b_row` bytes apart, transposed in registers:
// where there are few rows, each weight is used so rarely that storing it packed would cost more
// than using it. One vector of columns; `steps` must be whole runs, one at least.
template <class E, int kRows>
void streaming_microkernel(const Operands& in, int64_t b_row, typename E::Acc* sums) {
  using S = typename E::S;
  using V = typename E::V;
  constexpr int kSteps = kPieces * kPieceColumns<typename E::Acc>;
  static_assert(E::kRun % kSteps == 0, "a run must consist of whole transpositions");
  const char *a = in.a, *b = in.b;
  bool first = !in.continued;
  for (int64_t left = in.steps; left > 0; left -= in.run) {
    V sum[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) sum[i] = S::zero();
    for (int64_t k = 0; k < in.run; k += kSteps) {
      V right[kSteps];
      transpose<typename E::Acc, kPieces>(b, b_row, right);
#pragma GCC unroll 16
      for (int c = 0; c < kSteps; c++, a += in.a_step)
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
          sum[i] = E::multiply_add(E::broadcast(a + i * in.a_row), right[c], sum[i]);
      b += kSteps * sizeof(typename E::Acc);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      typename E::Acc* out = sums + i * S::kWidth;
      S::store(out, first ? sum[i] : S::add(S::load(out), sum[i]));
    }
    first = false;
  }
}

template <class E>
using Microkernel = void (*)(const Operands&, typename E::Acc*, const Direct<typename E::Acc>*);

template <class E, InSlab kSlab, class Epilogue, int kVectors, int kRows = max_rows(kVectors)>
Microkernel<E> microkernel_for(int rows) {
  if constexpr (kRows == 1)
    return microkernel<E, kSlab, 1, kVectors, Epilogue>;
  else
    return rows == kRows ? microkernel<E, kSlab, kRows, kVectors, Epilogue>
                         : microkernel_for<E, kSlab, Epilogue, kVectors, kRows - 1>(rows);
}

template <class E, InSlab kSlab, class Epilogue>
Microkernel<E> microkernel_for(int rows, int vectors) {
  if (vectors == 4) return microkernel_for<E, kSlab, Epilogue, 4>(rows);
  return vectors == 2 ? microkernel_for<E, kSlab, Epilogue, 2>(rows)
                      : microkernel_for<E, kSlab, Epilogue, 1>(rows);
}

template <class E, class Epilogue = void>
Microkernel<E> microkernel_for(InSlab slab, int rows, int vectors) {
  if (slab == InSlab::kA) return microkernel_for<E, InSlab::kA, Epilogue>(rows, vectors);
  if (slab == InSlab::kB) return microkernel_for<E, InSlab::kB, Epilogue>(rows, vectors);
  return microkernel_for<E, InSlab::kNone, Epilogue>(rows, vectors);
}

// For operands that are in no slab; asks for lines ahead.
template <class E, int kVectors, int kRows = max_rows(kVectors)>
Microkernel<E> prefetching_microkernel_for(int rows) {
  if constexpr (kRows == 1)
    return microkernel<E, InSlab::kNone, 1, kVectors, void, true>;
  else
    return rows == kRows ? microkernel<E, InSlab::kNone, kRows, kVectors, void, true>
                         : prefetching_microkernel_for<E, kVectors, kRows - 1>(rows);
}

// Rows that the streaming kernel takes at most: their sums stay in registers beside those
// transposed.
constexpr int kStreamingRows = kRegisters == 32 ? 8 : 4;

template <class E>
using StreamingMicrokernel = void (*)(const Operands&, int64_t, typename E::Acc*);

template <class E, int kRows = kStreamingRows>
StreamingMicrokernel<E> streaming_microkernel_for(int rows) {
  if constexpr (kRows == 1)
    return streaming_microkernel<E, 1>;
  else
    return rows == kRows ? streaming_microkernel<E, kRows>
                         : streaming_microkernel_for<E, kRows - 1>(rows);
}

#if defined(TWINFUSE_AMX)
// Nothing that is read in pairs has its columns in a slab.
template <>
inline Microkernel<TileBf16> microkernel_for<TileBf16>(InSlab slab, int rows, int vectors) {
  return slab == InSlab::kA ? amx_microkernel_for<InSlab::kA>(rows, vectors)
                            : amx_microkernel_for<InSlab::kNone>(rows, vectors);
}

template <>
inline Microkernel<TileBf16> prefetching_microkernel_for<TileBf16, kMaxVectors>(int rows) {
  return amx_microkernel_for<InSlab::kNone, true>(rows, kMaxVectors);
}

template <>
inline StreamingMicrokernel<TileBf16> streaming_microkernel_for<TileBf16>(int) {
  return amx_streaming_microkernel;
}
#endif

}  // namespace twinfuse::cpu::TWINFUSE_ISA
