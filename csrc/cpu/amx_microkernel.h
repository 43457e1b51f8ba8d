// The inner kernel on tile registers: up to two tiles of rows times up to four vectors of columns.
#pragma once

#include "cpu/amx.h"
#include "cpu/operands.h"
#include "cpu/pack.h"

#if defined(TWINFUSE_AMX)
#include <utility>

namespace twinfuse::cpu::TWINFUSE_ISA {

// Calls `body` with 0, 1, ... as constants: registers have numbers, not addresses.
template <class Body, int... kIndex>
__attribute__((always_inline)) inline void unroll(std::integer_sequence<int, kIndex...>,
                                                  const Body& body) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount, class Body>
__attribute__((always_inline)) inline void unroll(const Body& body) {
  unroll(std::make_integer_sequence<int, kCount>(), body);
}

// A tile's worth of memory: for what does not lie as a register wants it.
struct TileSpace {
  alignas(64) char bytes[kTileRows * kTileBytes];
};

// `steps` units of each of `rows` rows, and zeros: what is behind them may be no memory of ours,
// or no number.
template <bool kOffsets>
inline void copy_rows(const char* p, int64_t row, const int32_t* offsets, int rows, int steps,
                      TileSpace* to) {
  const __mmask16 used = static_cast<__mmask16>((1u << steps) - 1);
  const __m512i at = kOffsets ? _mm512_maskz_loadu_epi32(used, offsets) : _mm512_setzero_si512();
  for (int i = 0; i < kTileRows; i++, p += row) {
    __m512i x = _mm512_setzero_si512();
    if (i < rows)
      x = kOffsets ? _mm512_mask_i32gather_epi32(x, used, at, p, 1)
                   : _mm512_maskz_loadu_epi32(used, p);
    _mm512_store_si512(to->bytes + i * kTileBytes, x);
  }
}

// sums[i][v * 16 + lane] = sum over the steps, sixteen after sixteen: each sixteen are summed for
// themselves, those of the first of a pair and those of the second, and then added to what is
// there.
template <InSlab kSlab, int kGroups, int kVectors, bool kAhead>
void amx_microkernel(const Operands& in, float* sums, const Direct<float>*) {
  static_assert(kGroups * kVectors <= 4, "of eight tiles, two are rows, and two columns");
  constexpr int64_t kRow = kVectors * kTileBytes;  // of sums
  TileSpace space;
  const auto sum_at = [&](int g, int v) {
    return reinterpret_cast<char*>(sums) + g * kTileRows * kRow + v * kTileBytes;
  };
  const auto rows_of = [&](int g) {
    const int left = in.rows - g * kTileRows;
    return left < kTileRows ? left : kTileRows;
  };
  unroll<kGroups>([&](auto g) {
    unroll<kVectors>([&](auto v) {
      constexpr int kSum = g * kVectors + v;
      if (!in.continued) return amx_zero<kSum>();
      if (rows_of(g) == kTileRows) return amx_load<kSum>(sum_at(g, v), kRow);
      for (int i = 0; i < rows_of(g); i++)
        memcpy(space.bytes + i * kTileBytes, sum_at(g, v) + i * kRow, kTileBytes);
      amx_load<kSum>(space.bytes, kTileBytes);
    });
  });

  const char *a = in.a, *b = in.b, *ahead = in.ahead;
  const int32_t* offsets = in.offsets;
  for (int64_t left = in.steps; left > 0; left -= kTileSteps) {
    const int steps = left < kTileSteps ? static_cast<int>(left) : kTileSteps;
    if constexpr (kAhead)
      for (int i = 0; i < kTileSteps; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    bool in_line = true;
    const char* rows = a;
    if constexpr (kSlab == InSlab::kA) {
      // Between stretches all offsets jump the same way, so that the ends tell.
      in_line = offsets[steps - 1] - offsets[0] == (steps - 1) * in.a_step;
      if (in_line) rows += offsets[0];
    }
    unroll<kGroups>([&](auto g) {
      const char* p = rows + g * kTileRows * in.a_row;
      if (in_line && steps == kTileSteps && rows_of(g) == kTileRows)
        return amx_load<4 + g>(p, in.a_row);
      if (in_line)
        copy_rows<false>(p, in.a_row, nullptr, rows_of(g), steps, &space);
      else
        copy_rows<true>(p, in.a_row, offsets, rows_of(g), steps, &space);
      amx_load<4 + g>(space.bytes, kTileBytes);
    });
    unroll<kVectors>([&](auto v) {
      const char* p = b + v * kTileBytes;
      if (steps == kTileSteps) {
        amx_load<6 + v % 2>(p, in.b_step);
      } else {
        copy_rows<false>(p, in.b_step, nullptr, steps, kTileSteps, &space);
        amx_load<6 + v % 2>(space.bytes, kTileBytes);
      }
      unroll<kGroups>([&](auto g) { amx_multiply<g * kVectors + v, 4 + g, 6 + v % 2>(); });
    });
    if constexpr (kSlab == InSlab::kA)
      offsets += kTileSteps;
    else
      a += kTileSteps * in.a_step;
    b += kTileSteps * in.b_step;
  }

  unroll<kGroups>([&](auto g) {
    unroll<kVectors>([&](auto v) {
      constexpr int kSum = g * kVectors + v;
      if (rows_of(g) == kTileRows) return amx_store<kSum>(sum_at(g, v), kRow);
      amx_store<kSum>(space.bytes, kTileBytes);
      for (int i = 0; i < rows_of(g); i++)
        memcpy(sum_at(g, v) + i * kRow, space.bytes + i * kTileBytes, kTileBytes);
    });
  });
}

template <InSlab kSlab, bool kAhead = false>
auto amx_microkernel_for(int rows, int vectors) {
  const bool tall = rows > kTileRows;
  if (vectors == 4) return amx_microkernel<kSlab, 1, 4, kAhead>;
  if (vectors == 2)
    return tall ? amx_microkernel<kSlab, 2, 2, kAhead> : amx_microkernel<kSlab, 1, 2, kAhead>;
  return tall ? amx_microkernel<kSlab, 2, 1, kAhead> : amx_microkernel<kSlab, 1, 1, kAhead>;
}

// The same sums with `b` as rows of packed elements, `b_row` bytes apart; see
// streaming_microkernel.
inline void amx_streaming_microkernel(const Operands& in, int64_t b_row, float* sums) {
  static_assert(kPieces * kPieceColumns<float> == kTileSteps, "a line of a row is a run");
  TileSpace columns;
  Operands sixteen = in;
  sixteen.steps = kTileSteps, sixteen.b = columns.bytes, sixteen.b_step = kTileBytes;
  for (int64_t k = 0; k < in.steps; k += kTileSteps) {
    transpose_pieces<float, kPieces>(in.b + k * sizeof(float), b_row,
                                     reinterpret_cast<float*>(columns.bytes), kTileSteps);
    sixteen.a = in.a + k * in.a_step;
    amx_microkernel<InSlab::kNone, 1, 1, false>(sixteen, sums, nullptr);
    sixteen.continued = true;
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
#endif
