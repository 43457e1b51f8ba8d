// How the blocks of a slice hand each other what each step leaves: [sequences, depth] elements.
#pragma once

#include "cuda/lstm_slice.h"

namespace twinfuse::cuda {

// Through memory, without any barrier: readers wait for the elements themselves. A place that waits
// to be written holds a number that no step leaves, a NaN with all bits set.
//
// Step n writes slot n % 4, and each element is written by the same thread every time. That thread
// also empties the place for step n + 2. Nobody reads there any more: what it held is of the step
// two before n, and this block has seen all of the one between, which others left when they had
// read all of that. The fence behind it makes it empty for whoever has seen step n + 1 of the same
// thread, as those have who wait for step n + 2: a thread reads the same places at every step, and
// its own fence stands between what it reads of two steps.
template <class Element, int kDepth>
class GridExchange {
 public:
  TWINFUSE_DEVICE GridExchange(const LstmShared& p, int slice, int rows, void*)
      : data_(static_cast<Element*>(p.exchange) + int64_t{slice} * kSlots * rows * kDepth),
        rows_(rows) {}

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
  // Behind everything that a step puts, and before anything of it is read.
  TWINFUSE_DEVICE void leave() { fence(); }
  TWINFUSE_DEVICE void wait() { block_sync(); }

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

  union Bits {
    Element element;
    uint16_t half;
    uint32_t word;
    TWINFUSE_DEVICE explicit Bits(Element e) : element(e) {}
    TWINFUSE_DEVICE explicit Bits(uint32_t w) : word(w) {}
  };
  TWINFUSE_DEVICE static Element empty() { return Bits(0xffffffffu).element; }
  TWINFUSE_DEVICE static Element occupied(Element value) {
    Bits bits(value);
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

// Within a block, which has all units of its slice.
template <class Element, int kDepth, int kRows>
class BlockExchange {
 public:
  TWINFUSE_DEVICE BlockExchange(const LstmShared&, int, int, void* memory)
      : data_(static_cast<Element*>(memory)) {}

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
  TWINFUSE_DEVICE void wait() { block_sync(); }

  template <int kBatch, int kColumns>
  TWINFUSE_DEVICE static void read(uint4 (&words)[kBatch][kColumns],
                                   const Element* const (&from)[kColumns], int first, int step) {
#pragma unroll
    for (int i = 0; i < kBatch; i++)
#pragma unroll
      for (int column = 0; column < kColumns; column++)
        words[i][column] = *reinterpret_cast<const uint4*>(from[column] + first + i * step);
  }

 private:
  static constexpr int kPitch = alone_pitch(kDepth, sizeof(Element));

  Element* data_;
};

}  // namespace twinfuse::cuda
