// All steps of a layer, backward: the gradients of the gates' sums, from the last step to the
// first. Products with them give all other gradients.
//
// As forward, nobody waits for what could have been read or computed earlier.
#pragma once

#include "cuda/lstm_backward_cell.h"
#include "cuda/lstm_product.h"

namespace twinfuse::cuda {

template <class Format, class Shape>
struct LstmBackward : LstmBackwardCells<typename Format::Element, Shape> {
  using Cells = LstmBackwardCells<typename Format::Element, Shape>;
  using Shape::kChunk, Shape::kThreads;
  using typename Cells::Element, typename Cells::Memory;

  TWINFUSE_DEVICE static void run(const LstmBackwardArguments& p) {
    LstmBackward(p, *static_cast<Memory*>(shared_memory())).run();
  }

 private:
  using Cells::kCells, Cells::p_, Cells::s_, Cells::memory_;
  using typename Cells::Given, typename Cells::Factors;
  static constexpr int kParts = Shape::kParts;
  static constexpr int kGate = Shape::kWidth;  // gates of the exchange lie so far apart
  using WeightProduct = Product<Format, Shape::kTiles, Shape::kGroups, kParts, kThreads>;

  TWINFUSE_DEVICE LstmBackward(const LstmBackwardArguments& p, Memory& memory)
      : Cells(p, memory), exchange_(s_, memory.exchange) {}

  TWINFUSE_DEVICE void run() {
    const int warp = thread_index() / 32, part = warp % kParts, row = warp / kParts * 16;
    load_weights(row, part);
    block_sync();
    begin();
    Given given[kCells];
    this->load(0, 0, given);
    for (int step = 0; step < s_.p.steps; step++)
      for (int chunk = 0; chunk < s_.count; chunk += kChunk) {
        const bool is_last = chunk + kChunk >= s_.count;
        Factors factors[kCells];
        s_.for_cells(chunk, [&](int i, const Cell&) { this->prepare(given[i], factors[i]); });
        Given next[kCells];
        this->load(is_last ? step + 1 : step, is_last ? 0 : chunk + kChunk, next);
        exchange_.wait(step - 1);
        if (step) product(step - 1, chunk, row, part);
        if (chunk == 0) exchange_.leave();
        block_sync();
        float grads[kCells][4];
        // What others wait for leaves at once.
        s_.for_cells(chunk, [&](int i, const Cell& at) {
          this->compute(step, at, given[i], factors[i], grads[i]);
          put_grads(step, at, grads[i]);
        });
        s_.for_cells(chunk,
                     [&](int i, const Cell& at) { this->store(step, at, given[i], grads[i]); });
#pragma unroll
        for (int i = 0; i < kCells; i++) given[i] = next[i];
      }
    finish(row, part);
  }

  TWINFUSE_DEVICE void put_grads(int step, const Cell& at, const float (&grads)[4]) {
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
      exchange_.put(step, at.sequence, gate * kGate + at.unit, rounded<Element>(grads[gate]));
  }

  TWINFUSE_DEVICE void load_weights(int first, int part) {
    const auto* hh = static_cast<const Element*>(s_.p.hh);
    product_.template load<true>(part, &memory_, [&](int row, int k) {
      const int unit = s_.unit + first + row, gate = k / kGate, from = k % kGate;
      if (unit >= s_.p.units || from >= s_.p.units) return rounded<Element>(0);
      return hh[(int64_t{gate} * s_.p.units + from) * s_.p.hh_row + unit * s_.p.hh_col];
    });
  }

  // What is not there is zeros to all.
  TWINFUSE_DEVICE void begin() {
    s_.for_each([&](const Cell& at) { Cells::begin(at); });
    for (int i = thread_index(); !s_.block && i < s_.rows() * 4 * kGate; i += kThreads) {
      const int row = i / (4 * kGate), k = i % (4 * kGate);
      if (row >= s_.count || k % kGate >= s_.p.units) exchange_.put_zero(row, k);
    }
  }

  TWINFUSE_DEVICE void product(int step, int chunk, int row, int part) {
    for_columns<Shape::kColumns>(s_.count - chunk, [&](auto some) {
      float sums[1][decltype(some)::value][4];
      product_.times(sums, exchange_, step, chunk, part);
      this->put(part, row, sums);
    });
  }

  TWINFUSE_DEVICE void finish(int row, int part) {
    for (int chunk = 0; p_.grad_initial_h.data && chunk < s_.count; chunk += kChunk) {
      exchange_.wait(s_.p.steps - 1);
      if (s_.p.steps) product(s_.p.steps - 1, chunk, row, part);
      block_sync();
      s_.for_cells(
          chunk, [&](int, const Cell& at) { this->finish_h(at, s_.p.steps ? this->sum(at) : 0); });
    }
    s_.for_each([&](const Cell& at) { this->finish_c_and_bias(at); });
  }

  Exchange<Element, Shape, 4 * kGate> exchange_;
  WeightProduct product_;
};

}  // namespace twinfuse::cuda
