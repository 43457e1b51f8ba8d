// One step of a layer in a launch of its own, or a cell: for weights that no registers hold, or
// that nobody reads again. States wait in memory for the next launch.
#pragma once

#include "cuda/lstm_forward_cell.h"
#include "cuda/lstm_stream.h"

namespace twinfuse::cuda {

template <class Format, class Shape>
struct LstmForwardStep : LstmForwardCells<typename Format::Element, Shape> {
  using Cells = LstmForwardCells<typename Format::Element, Shape>;
  using typename Cells::Element, typename Cells::Memory;

  TWINFUSE_DEVICE static void run(const LstmForwardArguments& p) {
    LstmForwardStep(p, *static_cast<Memory*>(shared_memory())).run();
  }

 private:
  using Cells::kCells, Cells::p_, Cells::s_, Cells::memory_;
  using typename Cells::Given, typename Cells::Made;
  enum Kept { kCell, kLast };
  static_assert(Shape::kKept == kLast + 1);

  TWINFUSE_DEVICE LstmForwardStep(const LstmForwardArguments& p, Memory& memory)
      : Cells(p, memory), step_(p.shared.step), before_(states(step_)) {}

  TWINFUSE_DEVICE void run() {
    this->load_bias();
    // All of it is read before any is written: no cell waits for the one before.
    float h[kCells] = {}, c[kCells] = {}, last[kCells] = {};
    s_.for_cells(0, [&](int i, const Cell& at) {
      h[i] = s_.state(before_, at);
      c[i] = step_ ? s_.kept(kCell, at) : s_.state(p_.initial_c, at);
      last[i] = step_ ? s_.kept(kLast, at) : 0;
    });
    s_.for_cells(0, [&](int i, const Cell& at) { this->set(at, h[i], c[i], last[i]); });
    if (step_ < s_.p.steps) {
      Given given[kCells] = {};
      // Of several cells, what is read would take the product's registers.
      if constexpr (kCells == 1) this->load(step_, 0, given);
      for_columns<Shape::kColumns>(s_.count, [&](auto some) { product<decltype(some)::value>(); });
      if constexpr (kCells > 1) this->load(step_, 0, given);
      block_sync();
      s_.for_cells(0, [&](int i, const Cell& at) { advance(at, given[i]); });
    }
    s_.for_each([&](const Cell& at) {
      if (step_ + 1 >= s_.p.steps) return this->finish(at);
      s_.kept(kCell, at) = memory_.c[at.sequence][at.place];
      s_.kept(kLast, at) = memory_.last[at.sequence][at.place];
    });
  }

  TWINFUSE_DEVICE void advance(const Cell& at, const Given& given) {
    float sums[4];
    this->add_bias(given, at, sums);
    Made made;
    const Element left = this->compute(step_, at, given, sums, made);
    this->store(step_, at, given, made);
    if (step_ + 1 < s_.p.steps) s_.at(states(step_ + 1), at) = left;
  }

  // Those before a step, [B, H].
  TWINFUSE_DEVICE LstmState states(int step) const {
    if (step == 0) return p_.initial_h;
    auto* const all = static_cast<Element*>(s_.p.exchange);
    return {all + int64_t{step % 2} * s_.p.batch * s_.p.units, s_.p.units, 1};
  }

  template <int kColumns>
  TWINFUSE_DEVICE void product() {
    using Product = StreamedProduct<Format, Shape, 4, kColumns>;
    const LstmState hh{const_cast<void*>(s_.p.hh), s_.p.hh_row, s_.p.hh_col};
    const int units = before_.data ? s_.p.units : 0;
    const int inputs = p_.x.data ? p_.x_units : 0;
    const auto of_h = factors<typename Product::Pair, kColumns>(hh, before_, units);
    const auto of_x = factors<typename Product::Pair, kColumns>(p_.ih, p_.x, inputs);
    const int warp = thread_index() / 32;
    float sums[Shape::kTiles][kColumns][4] = {};
    if (fit_vectors(hh, units) && fit_vectors(before_, units) && fit_vectors(p_.ih, inputs) &&
        fit_vectors(p_.x, inputs)) {
      Product::template times<true, true>(sums, warp % Shape::kParts, of_h, of_x);
    } else {
      Product::template times<false, false>(sums, warp % Shape::kParts, of_h, of_x);
    }
    this->put(warp % Shape::kParts, first_row() / 32, sums);
  }

  TWINFUSE_DEVICE static bool fit_vectors(const LstmState& m, int depth) {
    return !depth || in_vectors<Element>(m.data, m.batch, m.unit, depth);
  }

  // Of the warp's tiles.
  TWINFUSE_DEVICE static int first_row() {
    return thread_index() / 32 / Shape::kParts * Shape::kTiles * 16;
  }

  template <class Pair, int kColumns>
  TWINFUSE_DEVICE Pair factors(const LstmState& weights, const LstmState& states, int depth) const {
    const int place = thread_index() % 32 / 4, sequence = s_.begin + place;
    const int row = first_row() + place;
    Pair pair;
    pair.depth = depth;
    pair.weights = {
        static_cast<const Element*>(weights.data) + this->weight_row(row) * weights.batch,
        s_.p.units * weights.batch, 8 * weights.batch, weights.unit, 0};
    pair.states = {static_cast<const Element*>(states.data) + sequence * states.batch, 0,
                   8 * states.batch, states.unit, 0};
#pragma unroll
    for (int i = 0; i < 2 * Shape::kTiles; i++)
      if (this->unit_of(i * 8 + row) < s_.p.units) pair.weights.there |= 1u << i;
#pragma unroll
    for (int i = 0; i < kColumns; i++)
      if (i * 8 + place < s_.count) pair.states.there |= 1u << i;
    return pair;
  }

  const int step_;
  const LstmState before_;
};

}  // namespace twinfuse::cuda
