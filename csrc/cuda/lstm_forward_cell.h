// A cell at a step, forward: what it reads, computes and leaves behind, whatever brings it there.
//
// A block has kUnits units: 4 kUnits rows of W_hh. A tile of 16 rows has two gates of 8 units, and
// the next one the other two, so that a thread's sums are the four gates of a unit.
#pragma once

#include "cuda/lstm_cells.h"
#include "cuda/lstm_gates.h"

namespace twinfuse::cuda {

template <class T, class Shape>
struct LstmForwardCells : LstmCells<LstmForwardArguments, T, Shape> {
  using Base = LstmCells<LstmForwardArguments, T, Shape>;
  using Base::kThreads, Base::kUnits;
  using typename Base::Element, typename Base::Memory;

 protected:
  using Base::Base, Base::kCells, Base::p_, Base::s_, Base::memory_;

  // Of a cell at a step: what is read of memory, and what is written there.
  struct Given {
    bool active;
    Element x[4];
  };
  struct Made {
    float h, c;  // before the step
    float gates[4], output;
  };

  // Where the weights of a row of the block's tiles lie.
  TWINFUSE_DEVICE int64_t weight_row(int row) const {
    return int64_t{row / 16 % 2 * 2 + row % 16 / 8} * s_.p.units + unit_of(row);
  }
  TWINFUSE_DEVICE int unit_of(int row) const { return s_.unit + row / 32 * 8 + row % 8; }

  // Sums of both biases, for all threads of the block.
  TWINFUSE_DEVICE void load_bias() {
    const auto* bias_ih = static_cast<const Element*>(p_.bias_ih);
    const auto* bias_hh = static_cast<const Element*>(p_.bias_hh);
    for (int i = thread_index(); i < 4 * kUnits; i += kThreads) {
      const int unit = s_.unit + i / 4;
      const int64_t row = int64_t{i % 4} * s_.p.units + unit;
      float sum = 0;
      if (unit < s_.p.units) {
        if (bias_ih) sum += to_float(bias_ih[row * p_.bias_ih_stride]);
        if (bias_hh) sum += to_float(bias_hh[row * p_.bias_hh_stride]);
      }
      memory_.bias[i / 4][i % 4] = sum;
    }
  }

  TWINFUSE_DEVICE void set(const Cell& at, float h, float c, float last) {
    memory_.h[at.sequence][at.place] = h;
    memory_.c[at.sequence][at.place] = c;
    memory_.last[at.sequence][at.place] = last;
  }

  TWINFUSE_DEVICE void load(int step, int chunk, Given (&given)[kCells]) const {
    if (step == s_.p.steps) return;
    const int t = s_.time(step);
    const auto* inputs = static_cast<const Element*>(p_.inputs);
    s_.for_cells(chunk, [&](int i, const Cell& at) {
      given[i].active = s_.active(t, at.b);
      if (!given[i].active) return;
      const int64_t row = s_.row(t, at.b) * p_.inputs_row + at.unit;
#pragma unroll
      for (int gate = 0; gate < 4; gate++)
        given[i].x[gate] = inputs ? inputs[row + int64_t{gate} * s_.p.units] : rounded<Element>(0);
    });
  }

  TWINFUSE_DEVICE void add_bias(const Given& given, const Cell& at, float (&sums)[4]) const {
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
      sums[gate] = to_float(given.x[gate]) + memory_.bias[at.place][gate];
  }

  // Where those who compute cells find the sums of a warp's tiles.
  template <int kTiles, int kColumns>
  TWINFUSE_DEVICE void put(int part, int octet, const float (&sums)[kTiles][kColumns][4]) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int o = 0; o < kTiles / 2; o++)
#pragma unroll
      for (int column = 0; column < kColumns; column++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
          const int sequence = column * 8 + lane % 4 * 2 + side;
          const int unit = (octet + o) * 8 + lane / 4;
          const float (&first)[4] = sums[2 * o][column], (&second)[4] = sums[2 * o + 1][column];
          *reinterpret_cast<float4*>(&memory_.sums[part][sequence][unit * 4]) = {
              first[side], first[side + 2], second[side], second[side + 2]};
        }
  }

  // One step of a cell, and the state that it leaves.
  TWINFUSE_DEVICE Element compute(int step, const Cell& at, const Given& given, float (&sums)[4],
                                  Made& made) {
    float& h = memory_.h[at.sequence][at.place];
    float& c = memory_.c[at.sequence][at.place];
    float& last = memory_.last[at.sequence][at.place];
    made.h = h, made.c = c;
    if (given.active) {
#pragma unroll
      for (int part = 0; part < Shape::kParts; part++) {
        const float4 sum = *reinterpret_cast<const float4*>(
            &memory_.sums[part][at.sequence % Shape::kChunk][at.place * 4]);
        sums[0] += sum.x, sums[1] += sum.y, sums[2] += sum.z, sums[3] += sum.w;
      }
      const int act = s_.p.cell_activation, gate = s_.p.gate_activation;
      if (act == kTanh && gate == kSigmoid) {
        advance(kTanh, kSigmoid, sums, made, h, c);
      } else {
        advance(act, gate, sums, made, h, c);
      }
      if (s_.p.zoneout_hidden.data) h = between(h, made.h, s_.p.zoneout_hidden, step, at);
      if (s_.p.zoneout_cell.data) c = between(c, made.c, s_.p.zoneout_cell, step, at);
    }
    const Element kept = rounded<Element>(h);
    if (given.active) {
      h = last = to_float(kept);
    } else if (s_.p.zero_masked_output) {
      last = 0;
    }
    made.output = last;
    return kept;
  }

  TWINFUSE_DEVICE void store(int step, const Cell& at, const Given& given, const Made& made) const {
    if (!given.active && s_.p.offsets) return;  // a packed sequence that has ended has no row
    const int t = s_.time(step);
    if (p_.output.data) convert(made.output, &s_.at(p_.output, t, at));
    if (!p_.gates) return;
    const int64_t row = s_.row(t, at.b);
    if (p_.cells) {
      convert(made.c, static_cast<Element*>(p_.cells) + row * p_.cells_row + at.unit);
      convert(made.h, static_cast<Element*>(p_.hidden) + row * p_.hidden_row + at.unit);
    }
    if (!given.active) return;
    auto* gates = static_cast<Element*>(p_.gates) + row * p_.gates_row + at.unit;
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
      convert(made.gates[gate], gates + int64_t{gate} * s_.p.units);
  }

  TWINFUSE_DEVICE void finish(const Cell& at) const {
    if (p_.final_h.data) convert(memory_.h[at.sequence][at.place], &s_.at(p_.final_h, at));
    if (p_.final_c.data) convert(memory_.c[at.sequence][at.place], &s_.at(p_.final_c, at));
  }

 private:
  TWINFUSE_DEVICE static void advance(int act, int gate, const float (&sums)[4], Made& made,
                                      float& h, float& c) {
    const float i = activate<Element>(gate, sums[0]), f = activate<Element>(gate, sums[1]);
    const float g = activate<Element>(act, sums[2]), o = activate<Element>(gate, sums[3]);
    c = f * c + i * g;
    h = o * activate<Element>(act, c);
    made.gates[0] = i, made.gates[1] = f, made.gates[2] = g, made.gates[3] = o;
  }

  // With the share of `old` that stays.
  TWINFUSE_DEVICE float between(float fresh, float old, const LstmSequence& zoneout, int step,
                                const Cell& cell) const {
    const float share = to_float(s_.at(zoneout, s_.time(step), cell));
    return share * old + (1 - share) * fresh;
  }
};

}  // namespace twinfuse::cuda
