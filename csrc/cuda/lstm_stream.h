// The product of a single step, whose weights come from memory where it needs them.
#pragma once

#include "cuda/lstm_fragments.h"

namespace twinfuse::cuda {

// Lines of a matrix that a thread reads, `kNear` that are `near` apart behind each other, and such
// sets `far` apart. Those without a bit in `there` are zeros.
template <class Element, int kLines, int kNear>
struct Lines {
  const Element* first;
  int64_t near, far, step;
  uint32_t there;

  TWINFUSE_DEVICE const Element* at(int line) const {
    return there >> line & 1 ? first + line % kNear * near + line / kNear * far : nullptr;
  }
};

// Two factors of a sum of products: lines of weights by those of states.
template <class Element, int kRows, int kNear, int kColumns>
struct Factors {
  Lines<Element, kRows, kNear> weights;
  Lines<Element, kColumns, 1> states;
  int depth;
};

// Warps take groups of the reduced dimension in turn, of the first factors and then of the second.
template <class Format, class Shape, int kNear, int kColumns>
class StreamedProduct {
 public:
  using Element = typename Format::Element;
  static constexpr int kTiles = Shape::kTiles, kParts = Shape::kParts;
  using Pair = Factors<Element, 2 * kTiles, kNear, kColumns>;

  // Whether weights and states can be read by 16 bytes.
  template <bool kWeights, bool kStates>
  TWINFUSE_DEVICE static void times(float (&sums)[kTiles][kColumns][4], int part, const Pair& a,
                                    const Pair& b) {
    constexpr int kBatch = kWeights && kStates ? kInFlight : 1;
    const int of_a = groups(a), all = of_a + groups(b);
    // Where sums are few, more of them, of which none waits for the one before.
    float odd[kOdd][kColumns][4] = {};
#pragma unroll 1
    for (int first = part; first < all; first += kParts * kBatch) {
      uint4 weights[kBatch][2 * kTiles], states[kBatch][kColumns];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int group = first + i * kParts;
        const bool is_a = group < of_a;
        const int k = (is_a ? group : group - of_a) * Format::kGroup +
                      thread_index() % 4 * kVectorElements<Element>;
        read<kWeights>(weights[i], is_a, a.weights, b.weights, k, is_a ? a.depth : b.depth);
        read<kStates>(states[i], is_a, a.states, b.states, k, is_a ? a.depth : b.depth);
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++)
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          uint32_t both[2][4];
          interleave<Format>(both, weights[i][2 * tile], weights[i][2 * tile + 1]);
          add_group<Format>(sums[tile], kIsFew ? odd[tile % kOdd] : sums[tile], both, states[i]);
        }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int column = 0; column < kColumns; column++)
#pragma unroll
        for (int i = 0; kIsFew && i < 4; i++) sums[tile][column][i] += odd[tile % kOdd][column][i];
  }

 private:
  static constexpr bool kIsFew = kTiles * kColumns < 4;
  static constexpr int kOdd = kIsFew ? kTiles : 1;
  // Groups that are on their way at a time: for their words there are registers.
  static constexpr int kWords = 4 * (2 * kTiles + kColumns);
  static constexpr int kRegisters =
      (Shape::kThreads > 256 ? 64 : 160) - 4 * kTiles * kColumns - Format::kTemporaries;
  static constexpr int kInFlight = kSmaller<8, kLarger<1, kRegisters / kWords>>;

  TWINFUSE_DEVICE static int groups(const Pair& pair) {
    return (pair.depth + Format::kGroup - 1) / Format::kGroup;
  }
  template <bool kVectors, int kLines, int kApart>
  TWINFUSE_DEVICE static void read(uint4 (&words)[kLines], bool is_a,
                                   const Lines<Element, kLines, kApart>& a,
                                   const Lines<Element, kLines, kApart>& b, int k, int depth) {
    const Lines<Element, kLines, kApart> lines = {is_a ? a.first : b.first, is_a ? a.near : b.near,
                                                  is_a ? a.far : b.far, is_a ? a.step : b.step,
                                                  is_a ? a.there : b.there};
#pragma unroll
    for (int i = 0; i < kLines; i++)
      words[i] = read_line<kVectors>(lines.at(i), lines.step, k, depth);
  }
};

}  // namespace twinfuse::cuda
