// Sums of a packed operand over the reduced dimension: gradients of biases. Runs make up blocks,
// and these the sum, wherever the main loop cuts it: libraries that add up pairs of halves are so
// exact that two levels would not do.
#pragma once

#include "cpu/pack.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
constexpr int64_t kSummedSteps = kLeastBlock<T> / Engine<T>::kGroup;

// sums[i] (+)= the sum of packed[step][i] over the steps, for `n` elements.
template <class T>
void add_sums(const typename Engine<T>::Unit* packed, int64_t stride, int64_t steps, int64_t n,
              bool first, typename Engine<T>::Acc* sums) {
  using S = typename Engine<T>::S;
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int count = static_cast<int>(min64(n - i, S::kWidth));
    typename S::V sum = first ? S::zero() : S::load(sums + i, count);
    for (int64_t k = 0; k < steps;) {
      typename S::V block = S::zero();
      for (const int64_t block_end = min64(steps, k + kSummedSteps<T>); k < block_end;) {
        typename S::V run = S::zero();
        for (const int64_t end = min64(block_end, k + Engine<T>::kRun); k < end; k++)
          run = Engine<T>::accumulate(run, packed + k * stride + i);
        block = S::add(block, run);
      }
      sum = S::add(sum, block);
    }
    S::store(sums + i, sum, count);
  }
}

// The same for packed[i][step]. Reads whole vectors of rows, and whole pieces of them; `scratch`
// holds transpose_scratch<T>() elements.
template <class T>
void add_row_sums(const typename Engine<T>::Packed* packed, int64_t stride, int64_t steps,
                  int64_t n, bool first, typename Engine<T>::Packed* scratch,
                  typename Engine<T>::Acc* sums) {
  using E = Engine<T>;
  using S = typename E::S;
  constexpr int64_t kPiece = kPieceColumns<typename E::Acc>;
  auto* columns = reinterpret_cast<typename E::Unit*>(scratch);
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int count = static_cast<int>(min64(n - i, S::kWidth));
    typename S::V sum = first ? S::zero() : S::load(sums + i, count);
    typename S::V block = S::zero();
    for (int64_t k = 0; k < steps; k += E::kRun) {
      const int64_t run_steps = min64(E::kRun, steps - k);
      const auto* rows = packed + i * stride + k * E::kGroup;
      transpose_rows<T>(reinterpret_cast<const char*>(rows), stride * sizeof(typename E::Packed),
                        round_up(run_steps, kPiece), columns, S::kWidth);
      typename S::V run = S::zero();
      for (int64_t c = 0; c < run_steps; c++) run = E::accumulate(run, columns + c * S::kWidth);
      block = S::add(block, run);
      if ((k + E::kRun) % kSummedSteps<T> != 0 && k + E::kRun < steps) continue;
      sum = S::add(sum, block);
      block = S::zero();
    }
    S::store(sums + i, sum, count);
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
