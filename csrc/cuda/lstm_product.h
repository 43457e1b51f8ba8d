// The product of every step: a block's slice of the recurrent weights, which stays in registers, by
// what all blocks left at the step before.
#pragma once

#include "cuda/lstm_exchange.h"
#include "cuda/lstm_fragments.h"

namespace twinfuse::cuda {

// A warp has `kTiles` tiles of 16 rows of weights and `kGroups` groups of the reduced dimension;
// `kParts` warps share the rows and have different groups.
template <class Format, int kTiles, int kGroups, int kParts, int kThreads>
class Product {
 public:
  using Element = typename Format::Element;
  static constexpr int kElements = kVectorElements<Element>;
  static constexpr int kDepth = kGroups * Format::kGroup;  // of a warp
  // Registers of a thread, and reads of 16 bytes at a time for which weights leave some.
  static constexpr int kRegisters = kThreads > 256 ? 65536 / kThreads : 255;
  // A product waits for the one before into the same sums: a warp has some of these, always as
  // many, whose order decides about bits.
  static constexpr int kMostChains = Format::kApart ? 1 : kGroups < 16 && kThreads <= 256 ? 4 : 2;
  static constexpr int kChains = kTiles < kMostChains ? kMostChains / kTiles : 1;
  static constexpr int kLeft = kRegisters - kTiles * kGroups * 8 - Format::kTemporaries;
  static constexpr int kInFlight = kSmaller<12, kLeft / 22>;

  static constexpr int kStaged = kTiles * 16 * 64;  // bytes for each warp while it loads

  // Of weights that can be read by 16 bytes: `line(row)` is asked for the warp's rows.
  template <class Line>
  TWINFUSE_DEVICE void load_lines(int part, int depth, const Line& line) {
    const int lane = thread_index() % 32, first = part * kDepth + lane % 4 * kElements;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      const Element* const low = line(tile * 16 + lane / 4);
      const Element* const high = line(tile * 16 + lane / 4 + 8);
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        const int k = first + g * Format::kGroup;
        interleave<Format>(weights_[tile][g], read_line<true>(low, 1, k, depth),
                           read_line<true>(high, 1, k, depth));
      }
    }
  }

  // `weight(row, k)` is asked for the warp's rows and all k of its part. The loop over groups stays
  // one, or the addresses of single elements would make most of the kernel's code.
  template <bool kRowsLieTogether, class Weight>
  TWINFUSE_DEVICE void load(int part, void* staged, const Weight& weight) {
    auto* const elements = static_cast<Element*>(staged) +
                           thread_index() / 32 * (kStaged / static_cast<int>(sizeof(Element)));
    const int lane = thread_index() % 32;
    constexpr int kRows = kTiles * 16, kGroup = Format::kGroup;
#pragma unroll 1
    for (int group = 0; group < kGroups; group++) {
#pragma unroll 8
      for (int i = lane; i < kRows * kGroup; i += 32) {
        const int row = kRowsLieTogether ? i % kRows : i / kGroup;
        const int k = kRowsLieTogether ? i / kRows : i % kGroup;
        elements[staged_at(row, k)] = weight(row, part * kDepth + group * kGroup + k);
      }
      warp_sync();
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        if (g != group) continue;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          const Element* from = elements + staged_at(tile * 16 + lane / 4, lane % 4 * kElements);
          keep(weights_[tile][g][0], *reinterpret_cast<const uint4*>(from));
          keep(weights_[tile][g][1], *reinterpret_cast<const uint4*>(from + kElements));
        }
      }
      warp_sync();
    }
  }

  // The product with `kColumns` times 8 rows of the exchange.
  template <int kColumns, class Exchange>
  TWINFUSE_DEVICE void times(float (&sums)[kTiles][kColumns][4], const Exchange& exchange, int step,
                             int first_row, int part) const {
    // Of the elements that this thread has of each group.
    const int lane = thread_index() % 32, k = part * kDepth + lane % 4 * kElements;
    const Element* from[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; column++)
      from[column] = exchange.row(step, first_row + column * 8 + lane / 4) + k;
    float chains[kChains][kTiles][kColumns][4] = {};
    add_from<0, Exchange>(chains, from);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int column = 0; column < kColumns; column++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sums[tile][column][i] = chains[0][tile][column][i];
#pragma unroll
          for (int chain = 1; chain < kChains; chain++)
            sums[tile][column][i] += chains[chain][tile][column][i];
        }
  }

 private:
  // Adds the products of the groups from kFirst on.
  template <int kFirst, class Exchange, int kChains, int kColumns>
  TWINFUSE_DEVICE void add_from(float (&chains)[kChains][kTiles][kColumns][4],
                                const Element* const (&from)[kColumns]) const {
    constexpr int kBatch = kSmaller<kInFlight / kColumns, kGroups - kFirst>;
    static_assert(kBatch > 0);
    uint4 words[kBatch][kColumns];
    Exchange::template read<kBatch, kColumns>(words, from, kFirst * Format::kGroup, Format::kGroup);
#pragma unroll
    for (int i = 0; i < kBatch; i++)
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++)
        add_group<Format>(chains[2 * (kFirst + i) % kChains][tile],
                          chains[(2 * (kFirst + i) + 1) % kChains][tile],
                          weights_[tile][kFirst + i], words[i]);
    if constexpr (kFirst + kBatch < kGroups) add_from<kFirst + kBatch, Exchange>(chains, from);
  }

  // Where an element waits to be read as tensor cores take it: two rows that are 8 apart, and of
  // each two words, which registers then hold side by side.
  TWINFUSE_DEVICE static int staged_at(int row, int k) {
    constexpr int kInWord = kElements / 4;
    const int thread = row / 16 * 32 + row % 8 * 4 + k / kElements;
    const int word = k % kElements / kInWord;
    const int place = thread * 8 + word / 2 * 4 + word % 2 * 2 + row % 16 / 8;
    return place * kInWord + k % kInWord;
  }

  TWINFUSE_DEVICE static void keep(uint32_t (&weight)[4], const uint4& words) {
    weight[0] = Format::word(words.x), weight[1] = Format::word(words.y);
    weight[2] = Format::word(words.z), weight[3] = Format::word(words.w);
  }

  uint32_t weights_[kTiles][kGroups][2][4] = {};
};

}  // namespace twinfuse::cuda
