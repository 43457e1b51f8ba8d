// How the blocks of a slice hand each other what each step leaves: [sequences, depth] elements.
#pragma once

#include <type_traits>

#include "cuda/lstm_slice.h"

namespace twinfuse::cuda {

// An element in the low bits of a word, and back.
template <class Element>
union Bits {
  Element element;
  uint16_t half;
  uint32_t word;
  TWINFUSE_DEVICE explicit Bits(Element e) : element(e) {}
  TWINFUSE_DEVICE explicit Bits(uint32_t w) : word(w) {}
};
template <class Element>
TWINFUSE_DEVICE uint32_t bits(Element element) {
  const Bits<Element> both(element);
  return sizeof(Element) == 2 ? both.half : both.word;
}

// Of the memory of a block.
template <int kBatch, int kColumns, class Element>
TWINFUSE_DEVICE void read_own(uint4 (&words)[kBatch][kColumns],
                              const Element* const (&from)[kColumns], int first, int step) {
#pragma unroll
  for (int i = 0; i < kBatch; i++)
#pragma unroll
    for (int column = 0; column < kColumns; column++)
      words[i][column] = *reinterpret_cast<const uint4*>(from[column] + first + i * step);
}

// Through the device's memory, without any barrier: readers wait for the elements themselves. A
// place that waits to be written holds a number that no step leaves, a NaN with all bits set.
//
// Step n writes slot n % 4, and each element is written by the same thread every time. That thread
// also empties the place for step n + 2. Nobody reads there any more: what it held is of the step
// two before n, and this block has seen all of the one between, which others could only compute
// from all of that. A fence before it puts step n + 1 makes the place empty for whoever has seen
// that, as those have who wait for step n + 2: a thread reads the same places at every step, and
// its own fence stands between what it reads of two steps.
template <class Element, int kDepth>
class GridExchange {
 public:
  template <class Slice>
  TWINFUSE_DEVICE GridExchange(const Slice& slice, void*)
      : data_(static_cast<Element*>(slice.p.exchange) +
              int64_t{slice.number} * kSlots * slice.rows() * kDepth),
        rows_(slice.rows()) {}

  TWINFUSE_DEVICE void open() {}
  TWINFUSE_DEVICE Element* row(int step, int row) const {
    return data_ + (int64_t{step % kSlots} * rows_ + row) * kDepth;
  }
  TWINFUSE_DEVICE void put(int step, int row, int k, Element value) {
    publish(this->row(step, row) + k, occupied(value));
    publish(this->row(step + 2, row) + k, empty());
  }
  // What never changes.
  TWINFUSE_DEVICE void put_zero(int row, int k) {
    for (int slot = 0; slot < kSlots; slot++)
      publish(this->row(slot, row) + k, rounded<Element>(0));
  }
  // Between what is read of a step and what is put for the next.
  TWINFUSE_DEVICE void leave() { fence(); }
  TWINFUSE_DEVICE void wait(int) { block_sync(); }
  TWINFUSE_DEVICE void close(int) {}

  template <int kBatch, int kColumns>
  TWINFUSE_DEVICE static void read(uint4 (&words)[kBatch][kColumns],
                                   const Element* const (&from)[kColumns], int first, int step) {
    bool is_empty;
    do {
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kBatch; i++)
#pragma unroll
        for (int column = 0; column < kColumns; column++)
          words[i][column] = fetch(from[column] + first + i * step);
#pragma unroll
      for (int i = 0; i < kBatch; i++)
#pragma unroll
        for (int column = 0; column < kColumns; column++) {
          const uint4& w = words[i][column];
          largest = larger(larger(larger(w.x, w.y), larger(w.z, w.w)), largest);
        }
      is_empty = has_empty(largest);
      if (is_empty) spin();
    } while (any_of_warp(is_empty));
  }

 private:
  static constexpr int kSlots = kExchangeSlots;
  static constexpr bool kHalf = sizeof(Element) == 2;

  TWINFUSE_DEVICE static Element empty() { return Bits<Element>(0xffffffffu).element; }
  TWINFUSE_DEVICE static Element occupied(Element value) {
    Bits<Element> bits(value);
    if constexpr (kHalf) {
      if (bits.half == 0xffff) bits.half = 0x7fff;
    } else {
      if (bits.word == 0xffffffffu) bits.word = 0x7fffffffu;
    }
    return bits.element;
  }
  TWINFUSE_DEVICE static uint32_t larger(uint32_t a, uint32_t b) {
    if constexpr (kHalf) return larger_halves(a, b);
    return a > b ? a : b;
  }
  TWINFUSE_DEVICE static bool has_empty(uint32_t largest) {
    if constexpr (kHalf) return (largest & 0xffff) == 0xffff || largest >> 16 == 0xffff;
    return largest == 0xffffffffu;
  }

  Element* data_;
  int rows_;
};

// Between the blocks of a cluster, each of which has in its own memory all that a step leaves.
//
// Elements are sent with a barrier at which each block counts what has come. Step n is in slot
// n % 2: whoever sends step n + 2 has waited for all of step n + 1, which a block computes from all
// that it has read of step n. No fence orders the two: what is sent depends on what was read.
template <class Element, int kDepth, int kRows>
class ClusterExchange {
 public:
  template <class Slice>
  TWINFUSE_DEVICE ClusterExchange(const Slice& slice, void* memory)
      : data_(static_cast<Element*>(memory)),
        arrived_(reinterpret_cast<Barrier*>(data_ + kSlots * kRows * kPitch)),
        blocks_(slice.p.blocks),
        rows_((slice.count + 7) / 8 * 8) {}

  // Before anybody sends anything.
  TWINFUSE_DEVICE void open() {
    if (thread_index() == 0) {
      for (int slot = 0; slot < kSlots; slot++) begin_barrier(arrived_ + slot);
      for (int slot = 0; slot < kSlots; slot++) expect(slot);
    }
    warp_sync();  // meeting others needs whole warps
    cluster_sync();
  }
  TWINFUSE_DEVICE Element* row(int step, int row) const {
    return data_ + (step % kSlots * kRows + row) * kPitch;
  }
  // By all threads of a warp, of which those side by side have elements side by side; of rows and
  // elements that are not there, too.
  TWINFUSE_DEVICE void put(int step, int row, int k, Element value) {
    const uint4 words = side_by_side(value);
    if (row >= rows_) return;
    Element* const to = this->row(step, row) + k / kElements * kElements;
    for (int block = thread_index() % kElements; block < blocks_; block += kElements)
      send(block, to, words, arrived_ + step % kSlots);
  }
  TWINFUSE_DEVICE void leave() {}
  // Also for all threads of this block, which sent when they had read what was there before.
  TWINFUSE_DEVICE void wait(int step) {
    wait_for(step);
    if (thread_index() == 0) expect(step % kSlots);
    warp_sync();  // so do tensor cores, and each thread has waited for itself
  }
  // Others may be sending until a block ends.
  TWINFUSE_DEVICE void close(int last) { wait_for(last); }

  template <int kBatch, int kColumns>
  TWINFUSE_DEVICE static void read(uint4 (&words)[kBatch][kColumns],
                                   const Element* const (&from)[kColumns], int first, int step) {
    read_own(words, from, first, step);
  }

 private:
  static constexpr int kSlots = 2;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kPitch = exchange_pitch(kDepth, sizeof(Element));
  static constexpr int kRowBytes = kDepth * static_cast<int>(sizeof(Element));
  static_assert(kRows * kRowBytes < 1 << 20, "a barrier counts no more");

  TWINFUSE_DEVICE void expect(int slot) { expect_bytes(arrived_ + slot, rows_ * kRowBytes); }
  TWINFUSE_DEVICE void wait_for(int step) {
    wait_barrier(arrived_ + step % kSlots, step / kSlots % 2);
  }

  // 16 bytes of what as many threads have as there are elements in them.
  TWINFUSE_DEVICE static uint4 side_by_side(Element value) {
    const int lane = thread_index();
    uint32_t word = bits(value);
    constexpr bool kHalf = sizeof(Element) == 2;
    if constexpr (kHalf) {
      const uint32_t other = from_lane(word, 1);
      word = lane & 1 ? other | word << 16 : word | other << 16;
    }
    constexpr int kPair = kHalf ? 2 : 1;
    const uint32_t other = from_lane(word, kPair);
    const uint32_t low = lane & kPair ? other : word, high = lane & kPair ? word : other;
    const uint32_t other_low = from_lane(low, 2 * kPair), other_high = from_lane(high, 2 * kPair);
    if (lane & 2 * kPair) return {other_low, other_high, low, high};
    return {low, high, other_low, other_high};
  }

  Element* data_;
  Barrier* arrived_;
  int blocks_, rows_;
};

// Within a block, which has all units of its slice.
template <class Element, int kDepth, int kRows>
class BlockExchange {
 public:
  template <class Slice>
  TWINFUSE_DEVICE BlockExchange(const Slice&, void* memory)
      : data_(static_cast<Element*>(memory)) {}

  TWINFUSE_DEVICE void open() {}
  TWINFUSE_DEVICE Element* row(int step, int row) const {
    return data_ + (step % 2 * kRows + row) * kPitch;
  }
  TWINFUSE_DEVICE void put(int step, int row, int k, Element value) {
    this->row(step, row)[k] = value;
  }
  TWINFUSE_DEVICE void put_zero(int row, int k) {
    for (int slot = 0; slot < 2; slot++) this->row(slot, row)[k] = rounded<Element>(0);
  }
  TWINFUSE_DEVICE void leave() {}
  TWINFUSE_DEVICE void wait(int) { block_sync(); }
  TWINFUSE_DEVICE void close(int) {}

  template <int kBatch, int kColumns>
  TWINFUSE_DEVICE static void read(uint4 (&words)[kBatch][kColumns],
                                   const Element* const (&from)[kColumns], int first, int step) {
    read_own(words, from, first, step);
  }

 private:
  static constexpr int kPitch = exchange_pitch(kDepth, sizeof(Element));

  Element* data_;
};

template <class Element, class Shape, int kDepth>
using Exchange = std::conditional_t<
    Shape::kReach == kGrid, GridExchange<Element, kDepth>,
    std::conditional_t<Shape::kReach == kCluster, ClusterExchange<Element, kDepth, Shape::kChunk>,
                       BlockExchange<Element, kDepth, Shape::kChunk>>>;

}  // namespace twinfuse::cuda
