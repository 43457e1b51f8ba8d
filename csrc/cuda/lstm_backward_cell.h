// A cell at a step, backward: what it reads, computes and leaves behind, whatever brings it there.
//
// A block has kUnits units: as many columns of W_hh. What it needs of all others are the gradients
// of the step after, of all four gates, one gate behind the other.
#pragma once

#include "cuda/lstm_cells.h"
#include "cuda/lstm_gates.h"

namespace twinfuse::cuda {

template <class T, class Shape>
struct LstmBackwardCells : LstmCells<LstmBackwardArguments, T, Shape> {
  using Base = LstmCells<LstmBackwardArguments, T, Shape>;
  using Base::kThreads, Base::kUnits;
  using typename Base::Element, typename Base::Memory;

 protected:
  using Base::Base, Base::kCells, Base::p_, Base::s_, Base::memory_;

  // Of a cell at a step: what is read of memory, and by what gradients of the output and of c~ are
  // multiplied.
  struct Given {
    bool active;
    Element gates[4], c, grad_output;
  };
  struct Factors {
    float c_of_h, gates[4], f;
  };

  // Before any step.
  TWINFUSE_DEVICE void begin(const Cell& at) {
    memory_.h[at.sequence][at.place] = s_.state(p_.grad_final_h, at);
    memory_.c[at.sequence][at.place] = s_.state(p_.grad_final_c, at);
    memory_.last[at.sequence][at.place] = 0;
    for (float& bias : memory_.bias[at.sequence][at.place]) bias = 0;
  }

  TWINFUSE_DEVICE void load(int step, int chunk, Given (&given)[kCells]) const {
    if (step == s_.p.steps) return;
    const int t = s_.time(s_.p.steps - 1 - step);
    s_.for_cells(chunk, [&](int i, const Cell& at) {
      given[i].active = s_.active(t, at.b);
      given[i].grad_output = rounded<Element>(0);
      if (p_.grad_output.data && (given[i].active || !s_.p.offsets))
        given[i].grad_output = s_.at(p_.grad_output, t, at);
      if (!given[i].active) return;
      const int64_t row = s_.row(t, at.b);
      const auto* gates = static_cast<const Element*>(p_.gates) + row * p_.gates_row + at.unit;
#pragma unroll
      for (int gate = 0; gate < 4; gate++) given[i].gates[gate] = gates[int64_t{gate} * s_.p.units];
      given[i].c =
          static_cast<const Element*>(p_.cells)[row * p_.cells_row + at.unit * p_.cells_unit];
    });
  }

  TWINFUSE_DEVICE void prepare(const Given& given, Factors& factors) const {
    if (!given.active) return;
    const int act = s_.p.cell_activation, gate = s_.p.gate_activation;
    if (act == kTanh && gate == kSigmoid) {
      prepare(kTanh, kSigmoid, given, factors);
    } else {
      prepare(act, gate, given, factors);
    }
  }
  TWINFUSE_DEVICE static void prepare(int act, int gate, const Given& given, Factors& factors) {
    const float i = to_float(given.gates[0]), f = to_float(given.gates[1]);
    const float g = to_float(given.gates[2]), o = to_float(given.gates[3]);
    const float c = to_float(given.c), shown = activate<Element>(act, f * c + i * g);
    factors.c_of_h = o * slope(act, shown);
    factors.gates[0] = g * slope(gate, i);
    factors.gates[1] = c * slope(gate, f);
    factors.gates[2] = i * slope(act, g);
    factors.gates[3] = shown * slope(gate, o);
    factors.f = f;
  }

  // Where those who compute cells find the sums of a warp's tiles.
  template <int kTiles, int kColumns>
  TWINFUSE_DEVICE void put(int part, int row, const float (&sums)[kTiles][kColumns][4]) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int column = 0; column < kColumns; column++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int sequence = column * 8 + lane % 4 * 2 + i % 2;
          const int unit = row + tile * 16 + lane / 4 + i / 2 * 8;
          memory_.sums[part][sequence][unit] = sums[tile][column][i];
        }
  }

  // What the step after gave by its products.
  TWINFUSE_DEVICE float sum(const Cell& at) const {
    float total = 0;
#pragma unroll
    for (int part = 0; part < Shape::kParts; part++)
      total += memory_.sums[part][at.sequence % Shape::kChunk][at.place];
    return total;
  }

  // One step of a cell.
  TWINFUSE_DEVICE void compute(int step, const Cell& at, const Given& given, const Factors& factors,
                               float (&grads)[4]) {
    float& h = memory_.h[at.sequence][at.place];
    float& c = memory_.c[at.sequence][at.place];
    float& last = memory_.last[at.sequence][at.place];
    const int t = s_.time(s_.p.steps - 1 - step);
    const float grad_output = to_float(given.grad_output);
    float grad_h = h;
    if (step) grad_h += sum(at);
    grads[0] = grads[1] = grads[2] = grads[3] = 0;
    if (given.active) {
      grad_h += grad_output + last;
      last = h = 0;
      float grad_c = c, passed = 0;
      if (s_.p.zoneout_hidden.data) {
        const float share = to_float(s_.at(s_.p.zoneout_hidden, t, at));
        h = share * grad_h;
        grad_h *= 1 - share;
      }
      if (s_.p.zoneout_cell.data) {
        const float share = to_float(s_.at(s_.p.zoneout_cell, t, at));
        passed = share * grad_c;
        grad_c *= 1 - share;
      }
      grad_c += grad_h * factors.c_of_h;
      grads[0] = grad_c * factors.gates[0];
      grads[1] = grad_c * factors.gates[1];
      grads[2] = grad_c * factors.gates[2];
      grads[3] = grad_h * factors.gates[3];
      c = grad_c * factors.f + passed;
    } else {
      h = grad_h;
      if (!s_.p.zero_masked_output) last += grad_output;
    }
  }

  TWINFUSE_DEVICE void store(int step, const Cell& at, const Given& given,
                             const float (&grads)[4]) {
    if (!given.active && s_.p.offsets) return;  // a packed sequence that has ended has no row
    auto& bias = *reinterpret_cast<float4*>(memory_.bias[at.sequence][at.place]);
    bias = {bias.x + grads[0], bias.y + grads[1], bias.z + grads[2], bias.w + grads[3]};
    const int64_t row = s_.row(s_.time(s_.p.steps - 1 - step), at.b);
    auto* to = static_cast<Element*>(p_.grad_gates) + row * 4 * s_.p.units + at.unit;
#pragma unroll
    for (int gate = 0; gate < 4; gate++) convert(grads[gate], to + int64_t{gate} * s_.p.units);
  }

  // Behind all steps: `of_products` is what the first one gave.
  TWINFUSE_DEVICE void finish_h(const Cell& at, float of_products) const {
    convert(memory_.h[at.sequence][at.place] + of_products, &s_.at(p_.grad_initial_h, at));
  }
  TWINFUSE_DEVICE void finish_c_and_bias(const Cell& at) const {
    if (p_.grad_initial_c.data)
      convert(memory_.c[at.sequence][at.place], &s_.at(p_.grad_initial_c, at));
    if (!p_.grad_bias) return;
    float* to = p_.grad_bias + int64_t{at.b} * 4 * s_.p.units + at.unit;
    for (int gate = 0; gate < 4; gate++)
      to[int64_t{gate} * s_.p.units] = memory_.bias[at.sequence][at.place][gate];
  }
};

}  // namespace twinfuse::cuda
