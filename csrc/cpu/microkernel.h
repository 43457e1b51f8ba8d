// The register-tiled inner kernel: `rows` x `cols` sums over one block of the reduced dimension.
#pragma once

#include "cpu/engine.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Tile shapes: as many accumulators as the registers hold beside the operands. Four vectors wide
// where there are few rows, so that enough sums are in flight to hide the latency of one.
constexpr int kMaxVectors = 4;
constexpr int kMaxRows = kRegisters == 32 ? 12 : 6;
constexpr int max_rows(int vectors) { return vectors < 4 ? kMaxRows : kRegisters == 32 ? 6 : 2; }

// Operands as packed or as they lie in memory; byte strides. A unit is Engine::Unit.
struct Operands {
  int64_t steps;
  const char *a, *b;
  int64_t a_row, a_step, b_step;
};

// sums[i][v * width + lane] = sum over the steps, in order. The sums leave through memory so that
// what follows them is compiled once, not once per tile shape.
template <class E, int kRows, int kVectors>
void microkernel(const Operands& in, typename E::Acc* sums) {
  using S = typename E::S;
  using V = typename E::V;
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[i][v] = S::zero();

  // Every third row has a pointer; the two behind it are reached by scaled addressing.
  const char* a[(kRows + 2) / 3];
#pragma GCC unroll 16
  for (int i = 0; i < (kRows + 2) / 3; i++) a[i] = in.a + 3 * i * in.a_row;
  const char* b = in.b;
  const int64_t a_row = in.a_row, a_step = in.a_step, b_step = in.b_step;
  for (int64_t k = in.steps; k > 0; k--) {
    V right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) right[v] = E::load(b + v * sizeof(V));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      V left = E::broadcast(a[i / 3] + (i % 3) * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[i][v] = E::multiply_add(left, right[v], sum[i][v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < (kRows + 2) / 3; i++) a[i] += a_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) S::store(sums + (i * kVectors + v) * S::kWidth, sum[i][v]);
}

template <class E>
using Microkernel = void (*)(const Operands&, typename E::Acc*);

template <class E, int kVectors, int kRows = max_rows(kVectors)>
Microkernel<E> microkernel_for(int rows) {
  if constexpr (kRows == 1)
    return microkernel<E, 1, kVectors>;
  else
    return rows == kRows ? microkernel<E, kRows, kVectors>
                         : microkernel_for<E, kVectors, kRows - 1>(rows);
}

template <class E>
Microkernel<E> microkernel_for(int rows, int vectors) {
  if (vectors == 4) return microkernel_for<E, 4>(rows);
  return vectors == 2 ? microkernel_for<E, 2>(rows) : microkernel_for<E, 1>(rows);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
