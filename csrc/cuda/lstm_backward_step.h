// As lstm_forward_step.h, backward. The gradients of the step after are where its launch left them
// for the products behind all steps; one more launch gives the gradient of the initial state.
#pragma once

#include "cuda/lstm_backward_cell.h"
#include "cuda/lstm_stream.h"

namespace twinfuse::cuda {

template <class Format, class Shape>
struct LstmBackwardStep : LstmBackwardCells<typename Format::Element, Shape> {
  using Cells = LstmBackwardCells<typename Format::Element, Shape>;
  using typename Cells::Element, typename Cells::Memory;

  TWINFUSE_DEVICE static void run(const LstmBackwardArguments& p) {
    LstmBackwardStep(p, *static_cast<Memory*>(shared_memory())).run();
  }

 private:
  using Cells::kCells, Cells::p_, Cells::s_, Cells::memory_;
  using typename Cells::Given;
  enum Kept { kHidden, kCell, kLast, kBias };  // kBias of four gates
  static_assert(Shape::kKept == kBias + 4);

  TWINFUSE_DEVICE LstmBackwardStep(const LstmBackwardArguments& p, Memory& memory)
      : Cells(p, memory), step_(p.shared.step) {}

  TWINFUSE_DEVICE void run() {
    const bool is_behind = step_ == s_.p.steps;
    if (step_ == 0) {
      s_.for_each([&](const Cell& at) { this->begin(at); });
    } else {
      resume();
    }
    Given given[kCells] = {};
    // Of several cells, what is read would take the product's registers.
    if (kCells == 1 && !is_behind) this->load(step_, 0, given);
    if (step_)
      for_columns<Shape::kColumns>(s_.count, [&](auto some) { product<decltype(some)::value>(); });
    if (kCells > 1 && !is_behind) this->load(step_, 0, given);
    block_sync();
    s_.for_cells(0, [&](int i, const Cell& at) {
      if (is_behind) {
        if (p_.grad_initial_h.data) this->finish_h(at, step_ ? this->sum(at) : 0);
        return;
      }
      typename Cells::Factors factors;
      float grads[4];
      this->prepare(given[i], factors);
      this->compute(step_, at, given[i], factors, grads);
      this->store(step_, at, given[i], grads);
      keep(at);
    });
    if (step_ + 1 != s_.p.steps && s_.p.steps != 0) return;
    s_.for_each([&](const Cell& at) { this->finish_c_and_bias(at); });
    block_sync();
    for (auto& bias : p_.grad_biases)
      if (bias.data) add_up(static_cast<Element*>(bias.data), bias.unit);
  }

  // The gradient of a bias, over all sequences, which are of one slice.
  TWINFUSE_DEVICE void add_up(Element* bias, int64_t stride) const {
    for (int i = thread_index(); i < 4 * Shape::kUnits; i += Shape::kThreads) {
      const int gate = i / Shape::kUnits, place = i % Shape::kUnits;
      if (s_.unit + place >= s_.p.units) continue;
      float sum = 0;
      for (int b = 0; b < s_.count; b++) sum += memory_.bias[b][place][gate];
      convert(sum, bias + (int64_t{gate} * s_.p.units + s_.unit + place) * stride);
    }
  }

  // All of it is read before any is written: no cell waits for the one before.
  TWINFUSE_DEVICE void resume() {
    float kept[kCells][Shape::kKept] = {};
    s_.for_cells(0, [&](int i, const Cell& at) {
#pragma unroll
      for (int kind = 0; kind < Shape::kKept; kind++) kept[i][kind] = s_.kept(kind, at);
    });
    s_.for_cells(0, [&](int i, const Cell& at) {
      memory_.h[at.sequence][at.place] = kept[i][kHidden];
      memory_.c[at.sequence][at.place] = kept[i][kCell];
      memory_.last[at.sequence][at.place] = kept[i][kLast];
#pragma unroll
      for (int gate = 0; gate < 4; gate++)
        memory_.bias[at.sequence][at.place][gate] = kept[i][kBias + gate];
    });
  }
  TWINFUSE_DEVICE void keep(const Cell& at) const {
    if (!s_.p.carried) return;
    s_.kept(kHidden, at) = memory_.h[at.sequence][at.place];
    s_.kept(kCell, at) = memory_.c[at.sequence][at.place];
    s_.kept(kLast, at) = memory_.last[at.sequence][at.place];
    for (int gate = 0; gate < 4; gate++)
      s_.kept(kBias + gate, at) = memory_.bias[at.sequence][at.place][gate];
  }

  template <int kColumns>
  TWINFUSE_DEVICE void product() {
    using Product = StreamedProduct<Format, Shape, 1, kColumns>;
    typename Product::Pair pair;
    pair.depth = 4 * s_.p.units;
    const int warp = thread_index() / 32, part = warp % Shape::kParts;
    const int row = warp / Shape::kParts * Shape::kTiles * 16;
    const int place = thread_index() % 32 / 4, unit = s_.unit + row + place, b = s_.begin + place;
    const int t = s_.time(s_.p.steps - step_);
    const auto* hh = static_cast<const Element*>(s_.p.hh);
    const auto* grads = static_cast<const Element*>(p_.grad_gates);
    pair.weights = {hh + unit * s_.p.hh_col, 0, 8 * s_.p.hh_col, s_.p.hh_row, 0};
    pair.states = {grads + s_.row(t, b) * pair.depth, 0,
                   (s_.row(t, b + 8) - s_.row(t, b)) * pair.depth, 1, 0};
#pragma unroll
    for (int i = 0; i < 2 * Shape::kTiles; i++)
      if (unit + i * 8 < s_.p.units) pair.weights.there |= 1u << i;
#pragma unroll
    for (int i = 0; i < kColumns; i++)
      // Packed sequences have no rows for steps behind their ends.
      if (i * 8 + place < s_.count && (!s_.p.offsets || s_.active(t, b + i * 8)))
        pair.states.there |= 1u << i;
    float sums[Shape::kTiles][kColumns][4] = {};
    const typename Product::Pair none = {};
    const bool whole = pair.depth % kVectorElements<Element> == 0;
    if (in_vectors<Element>(hh, s_.p.hh_col, s_.p.hh_row, pair.depth)) {
      Product::template times<true, true>(sums, part, pair, none);
    } else if (whole) {
      Product::template times<false, true>(sums, part, pair, none);
    } else {
      Product::template times<false, false>(sums, part, pair, none);
    }
    this->put(part, row, sums);
  }

  const int step_;
};

}  // namespace twinfuse::cuda
