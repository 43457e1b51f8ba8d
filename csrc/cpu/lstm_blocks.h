// Blocks of steps: what going backward keeps for the sums over steps, it keeps for one block.
#pragma once

#include "cpu/lstm_norm.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Steps [first, last) as they are taken forward, and their rows in the order of time.
struct Block {
  int64_t first, last;
  Range times, rows;
};

// All steps, from the last ones to the first. By the shape alone, since sums depend on it.
template <class T>
class Blocks {
  using Acc = typename Convert<T>::Acc;

 public:
  // Gradients of weights are of another type than their sums, which wait somewhere else.
  static constexpr bool kWaits = sizeof(T) != sizeof(Acc);

  explicit Blocks(const LstmBackward& op) : op_(op) {
    // Deep enough for products to be fast, and few enough for the caches to hold them; where
    // weights are small, no more than a few times as many as they have.
    constexpr int64_t kFewest = 128, kMost = 1024;
    const int64_t depth = op.inputs + op.state, rows = max64(kFewest, min64(kMost, 2 * depth));
    // As many rows of gradients take as much as the sums of the weights that wait between blocks.
    const int64_t waiting = kWaits ? depth * sizeof(Acc) / sizeof(T) : 0;
    if (op.rows > rows + waiting) count_ = min64(ceil_div(op.rows, rows), op.steps);
  }

  bool single() const { return count_ == 1; }

  // Calls body(block): at least once.
  template <class Body>
  void each(const Body& body) const {
    const int64_t least = max64(ceil_div(op_.rows, count_), 1), steps = op_.steps;
    const Steps order{op_, nullptr};
    const bool reverse = op_.options.reverse;
    Block block{steps, steps, {}, {op_.rows, op_.rows}};
    if (reverse) block.rows = {0, 0};
    do {
      int64_t height = 0;
      for (block.last = block.first; block.first > 0 && height < least; block.first--)
        height += order.active(order.time(block.first - 1));
      block.rows.begin = reverse ? block.rows.end : block.rows.begin - height;
      block.rows.end = block.rows.begin + height;
      block.times = {block.first, block.last};
      if (reverse) block.times = {steps - block.last, steps - block.first};
      body(block);
    } while (block.first > 0);
  }

 private:
  const LstmBackward& op_;
  int64_t count_ = 1;
};

// What the steps of a block leave for products and sums, in dense rows in the order of time,
// counted from the block's first one.
template <class T>
class StepGradients {
  using Acc = typename Convert<T>::Acc;

 public:
  StepGradients(const LstmBackward& op, const Blocks<T>& blocks, Space* space)
      : units_(op.units), state_(op.state), normalizes_(GateNorm<T>::wanted(op)) {
    int64_t rows = 0;
    blocks.each([&](const Block& block) { rows = max64(rows, block.rows.end - block.rows.begin); });
    const int64_t normalized = normalizes_ ? rows : 0;
    gates_ = space->take_of<T>(rows, 4 * units_);
    for (int64_t& sums : sums_) sums = space->take_of<T>(normalized, 4 * units_);
    inverse_ = space->take_of<Acc>(normalized, GateNorm<T>::kProducts);
    projected_ = space->take_of<T>(op.weights.hr.data ? rows : 0, state_);
  }

  void place(char* space) { space_ = space; }

  // Of the gates [4H].
  T* gates(int64_t row) const { return at<T>(gates_) + row * 4 * units_; }
  // Of a product [4H] before it was normalised, and what it was multiplied by for that.
  T* sums(int product, int64_t row) const {
    return normalizes_ ? at<T>(sums_[product]) + row * 4 * units_ : gates(row);
  }
  Acc* inverse(int product, int64_t row) const {
    return at<Acc>(inverse_) + row * GateNorm<T>::kProducts + product;
  }
  // Of what the projection makes [R].
  T* projected(int64_t row) const { return at<T>(projected_) + row * state_; }
  // What it makes it of [H], in the place of the gates: they must have been used before.
  T* full(int64_t row) const { return at<T>(gates_) + row * units_; }

 private:
  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(space_ + offset);
  }

  const int64_t units_, state_;
  const bool normalizes_;
  int64_t gates_, sums_[GateNorm<T>::kProducts], inverse_, projected_;
  char* space_ = nullptr;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
