// What a block computes: some units of a slice of the sequences; and where these lie in tensors.
#pragma once

#include "cuda/device.h"
#include "cuda/lstm_arguments.h"
#include "cuda/lstm_kernels.h"

namespace twinfuse::cuda {

// One sequence and unit, which one thread computes at every step.
struct Cell {
  int sequence, place;  // in the slice, in the block
  int b, unit;          // in tensors
  bool there;
};

template <class Element, class Shape>
class Slice {
 public:
  static constexpr int kThreads = Shape::kThreads, kUnits = Shape::kUnits, kChunk = Shape::kChunk;
  static constexpr int kMost = kSmaller<kChunk, Shape::kMostSlice>;
  static constexpr int kCells = (kMost * kUnits + kThreads - 1) / kThreads;  // of a thread

  TWINFUSE_DEVICE explicit Slice(const LstmShared& shared)
      : p(shared),
        number(block_index() / p.blocks),
        block(block_index() % p.blocks),
        unit(block * kUnits),
        begin(p.first + number * p.slice),
        count(p.slice < p.first + p.count - begin ? p.slice : p.first + p.count - begin) {}

  const LstmShared& p;
  const int number, block;
  const int unit, begin, count;  // the block's first unit, the slice's first sequence, and how many

  // Rows of an exchange: whole chunks.
  TWINFUSE_DEVICE int rows() const { return (p.slice + kChunk - 1) / kChunk * kChunk; }

  TWINFUSE_DEVICE Cell cell(int chunk, int i) const {
    const int index = i * kThreads + thread_index();
    const int sequence = chunk + index / kUnits, place = index % kUnits;
    const bool there = index < kMost * kUnits && sequence < count && unit + place < p.units;
    return {sequence, place, begin + sequence, unit + place, there};
  }
  // `body(i, cell)` for this thread's cells of a chunk that are there.
  template <class Body>
  TWINFUSE_DEVICE void for_cells(int chunk, const Body& body) const {
#pragma unroll
    for (int i = 0; i < kCells; i++)
      if (const Cell at = cell(chunk, i); at.there) body(i, at);
  }
  // `body(cell)` for all of the block's cells that are there.
  template <class Body>
  TWINFUSE_DEVICE void for_each(const Body& body) const {
    for (int chunk = 0; chunk < count; chunk += kChunk)
      for (int i = 0; i < kCells; i++)
        if (const Cell at = cell(chunk, i); at.there) body(at);
  }

  TWINFUSE_DEVICE int time(int step) const { return p.reverse ? p.steps - 1 - step : step; }
  TWINFUSE_DEVICE int64_t row(int t, int b) const {
    if (p.offsets) return int64_t{p.offsets[t]} + b;
    return p.batch_major ? int64_t{b} * p.steps + t : int64_t{t} * p.batch + b;
  }
  TWINFUSE_DEVICE bool active(int t, int b) const {
    if (p.offsets) return b < p.offsets[t + 1] - p.offsets[t];
    return !p.mask || p.mask[t * p.mask_step + b * p.mask_batch] != 0;
  }

  TWINFUSE_DEVICE Element& at(const LstmSequence& s, int t, const Cell& cell) const {
    const int64_t place =
        p.offsets ? row(t, cell.b) * s.batch : t * s.step + int64_t{cell.b} * s.batch;
    return static_cast<Element*>(s.data)[place + cell.unit * s.unit];
  }
  TWINFUSE_DEVICE Element& at(const LstmState& state, const Cell& cell) const {
    return static_cast<Element*>(state.data)[cell.b * state.batch + cell.unit * state.unit];
  }
  // What one launch leaves for the next, of this kind.
  TWINFUSE_DEVICE float& kept(int kind, const Cell& cell) const {
    return p.carried[(int64_t{kind} * p.batch + cell.b) * p.units + cell.unit];
  }
  TWINFUSE_DEVICE float state(const LstmState& state, const Cell& cell) const {
    return state.data ? to_float(at(state, cell)) : 0;
  }
};

template <class Element>
TWINFUSE_DEVICE Element rounded(float x) {
  Element element;
  convert(x, &element);
  return element;
}

}  // namespace twinfuse::cuda
