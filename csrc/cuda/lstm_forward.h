// All steps of a layer, forward, of the products of its inputs.
//
// What a step waits for is on its way while the step before is computed, and what nobody waits for
// is written when the results that others wait for have left.
#pragma once

#include "cuda/lstm_forward_cell.h"
#include "cuda/lstm_product.h"

namespace twinfuse::cuda {

template <class Format, class Shape>
struct LstmForward : LstmForwardCells<typename Format::Element, Shape> {
  using Cells = LstmForwardCells<typename Format::Element, Shape>;
  using Shape::kChunk, Shape::kThreads, Shape::kWidth;
  using typename Cells::Element, typename Cells::Memory;

  TWINFUSE_DEVICE static void run(const LstmForwardArguments& p) {
    LstmForward(p, *static_cast<Memory*>(shared_memory())).run();
  }

 private:
  using Cells::kCells, Cells::p_, Cells::s_, Cells::memory_;
  using typename Cells::Given, typename Cells::Made;
  static constexpr int kParts = Shape::kParts;
  static constexpr bool kTogether = Shape::kReach == kCluster;  // warps hand over as a whole
  using WeightProduct = Product<Format, Shape::kTiles, Shape::kGroups, kParts, kThreads>;

  TWINFUSE_DEVICE LstmForward(const LstmForwardArguments& p, Memory& memory)
      : Cells(p, memory), exchange_(s_, memory.exchange) {}

  TWINFUSE_DEVICE void run() {
    const int warp = thread_index() / 32, part = warp % kParts;
    const int octet = warp / kParts * Shape::kOctets;
    load_weights(part, octet);
    block_sync();
    exchange_.open();
    begin();
    block_sync();
    Given given[kCells];
    this->load(0, 0, given);
    for (int step = 0; step < s_.p.steps; step++)
      for (int chunk = 0; chunk < s_.count; chunk += kChunk) {
        const bool is_last = chunk + kChunk >= s_.count;
        float sums[kCells][4];
        s_.for_cells(chunk, [&](int i, const Cell& at) { this->add_bias(given[i], at, sums[i]); });
        Given next[kCells];
        this->load(is_last ? step + 1 : step, is_last ? 0 : chunk + kChunk, next);
        exchange_.wait(step);
        product(step, chunk, part, octet);
        if (chunk == 0) exchange_.leave();
        block_sync();
        Made made[kCells];
        Element left[kCells] = {};
        // What others wait for leaves at once.
        s_.for_cells(chunk, [&](int i, const Cell& at) {
          left[i] = this->compute(step, at, given[i], sums[i], made[i]);
          if constexpr (!kTogether) exchange_.put(step + 1, at.sequence, at.unit, left[i]);
        });
        if constexpr (kTogether) put_together(step + 1, left);
        s_.for_cells(chunk,
                     [&](int i, const Cell& at) { this->store(step, at, given[i], made[i]); });
#pragma unroll
        for (int i = 0; i < kCells; i++) given[i] = next[i];
      }
    s_.for_each([&](const Cell& at) { this->finish(at); });
    exchange_.close(s_.p.steps);
  }

  TWINFUSE_DEVICE void put_together(int step, const Element (&left)[kCells]) {
#pragma unroll
    for (int i = 0; i < kCells; i++) {
      const Cell at = s_.cell(0, i);
      exchange_.put(step, at.sequence, at.unit, left[i]);
    }
  }

  TWINFUSE_DEVICE void load_weights(int part, int octet) {
    const auto* hh = static_cast<const Element*>(s_.p.hh);
    const int first = octet * 32, units = s_.p.units;
    if (in_vectors<Element>(hh, s_.p.hh_row, s_.p.hh_col, units)) {
      const auto line = [&](int row) {
        return this->unit_of(first + row) < units ? hh + this->weight_row(first + row) * s_.p.hh_row
                                                  : nullptr;
      };
      product_.load_lines(part, units, line);
      return;
    }
    product_.template load<false>(part, &memory_, [&](int row, int k) {
      if (this->unit_of(first + row) >= units || k >= units) return rounded<Element>(0);
      return hh[this->weight_row(first + row) * s_.p.hh_row + k * s_.p.hh_col];
    });
  }

  // What is not there is zeros to all.
  TWINFUSE_DEVICE void begin() {
    this->load_bias();
    Element left[kCells] = {};
    for (int chunk = 0; chunk < s_.count; chunk += kChunk)
      s_.for_cells(chunk, [&](int i, const Cell& at) {
        const float h = s_.state(p_.initial_h, at);
        this->set(at, h, s_.state(p_.initial_c, at), 0);
        left[i] = rounded<Element>(h);
        if constexpr (!kTogether) exchange_.put(0, at.sequence, at.unit, left[i]);
      });
    if constexpr (kTogether) {
      put_together(0, left);
    } else if (!s_.block) {
      for (int i = thread_index(); i < s_.rows() * kWidth; i += kThreads)
        if (i / kWidth >= s_.count || i % kWidth >= s_.p.units)
          exchange_.put_zero(i / kWidth, i % kWidth);
    }
  }

  TWINFUSE_DEVICE void product(int step, int chunk, int part, int octet) {
    for_columns<Shape::kColumns>(s_.count - chunk, [&](auto some) {
      float sums[Shape::kTiles][decltype(some)::value][4];
      product_.times(sums, exchange_, step, chunk, part);
      this->put(part, octet, sums);
    });
  }

  Exchange<Element, Shape, kWidth> exchange_;
  WeightProduct product_;
};

}  // namespace twinfuse::cuda
