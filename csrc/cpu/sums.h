// Sums of a packed operand over the reduced dimension: gradients of biases, in an order that does
// not depend on where the main loop cuts it. Libraries that add up pairs of halves are so exact
// that it takes several levels to keep up with them.
#pragma once

#include "cpu/pack.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

constexpr int64_t kSummedRun = 8, kSummedRuns = 8;
template <class T>
constexpr int64_t kSummedSteps = kLeastBlock<T> / Engine<T>::kGroup;

// Runs of kSummedRun steps make up groups, groups the blocks of kSummedSteps, and blocks the sum.
// It can be interrupted between blocks.
template <class T>
class LevelSum {
  using S = typename Engine<T>::S;
  using V = typename S::V;

 public:
  explicit LevelSum(V start) : sum_(start), block_(S::zero()), group_(S::zero()) {}

  void add(V run) {
    group_ = S::add(group_, run);
    runs_++;
    if (runs_ % kSummedRuns == 0) end_group();
    if (runs_ % (kSummedSteps<T> / kSummedRun) == 0) end_block();
  }
  V value() {
    end_group();
    end_block();
    return sum_;
  }

 private:
  void end_group() { block_ = S::add(block_, group_), group_ = S::zero(); }
  void end_block() { sum_ = S::add(sum_, block_), block_ = S::zero(); }

  V sum_, block_, group_;
  int64_t runs_ = 0;
};

// Adds up the splits of a sum. They are few and large, so that rounding would show: what each
// addition loses is added in the end.
template <class Acc>
struct SplitSum {
  Acc sum = 0, lost = 0;

  void add(Acc x) {
    const Acc total = sum + x, back = total - sum;
    lost += (sum - (total - back)) + (x - back);
    sum = total;
  }
  Acc value() const {
    const Acc all = sum + lost;
    return all == all ? all : sum;  // nothing is lost of infinity
  }
};

// sums[i] (+)= the sum of units[step][i] over the steps, for `n` elements.
template <class T>
void add_sums(const typename Engine<T>::Unit* units, int64_t stride, int64_t steps, int64_t n,
              bool first, typename Engine<T>::Acc* sums) {
  using E = Engine<T>;
  using S = typename E::S;
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int count = static_cast<int>(min64(n - i, S::kWidth));
    LevelSum<T> sum(first ? S::zero() : S::load(sums + i, count));
    for (int64_t k = 0; k < steps;) {
      typename S::V run = S::zero();
      for (const int64_t end = min64(steps, k + kSummedRun); k < end; k++)
        run = count == S::kWidth ? E::accumulate(run, units + k * stride + i)
                                 : E::accumulate(run, units + k * stride + i, count);
      sum.add(run);
    }
    S::store(sums + i, sum.value(), count);
  }
}

// The same for packed[i][step]. Reads whole vectors of rows, and whole pieces of them; `scratch`
// holds transpose_scratch<T>(0) elements.
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
    LevelSum<T> sum(first ? S::zero() : S::load(sums + i, count));
    for (int64_t k = 0; k < steps; k += kSummedRun) {
      const int64_t run_steps = min64(kSummedRun, steps - k);
      const auto* rows = packed + i * stride + k * E::kGroup;
      transpose_rows<T>(reinterpret_cast<const char*>(rows), stride * sizeof(typename E::Packed),
                        round_up(run_steps, kPiece), columns, S::kWidth);
      typename S::V run = S::zero();
      for (int64_t c = 0; c < run_steps; c++) run = E::accumulate(run, columns + c * S::kWidth);
      sum.add(run);
    }
    S::store(sums + i, sum.value(), count);
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
