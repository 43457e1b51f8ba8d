// All steps of a layer, forward, of the products of its inputs.
//
// A block has kUnits units: 4 kUnits rows of W_hh. A tile of 16 rows has two gates of 8 units, and
// the next one the other two, so that a thread's sums are the four gates of a unit.
//
// What a step waits for is on its way while the step before is computed, and what nobody waits for
// is written when the results that others wait for have left.
#pragma once

#include "cuda/lstm_product.h"

namespace twinfuse::cuda {

template <class Format, class Shape>
struct LstmForward : Shape {
  using Arguments = LstmForwardArguments;
  using Memory = typename Shape::Memory;
  using Element = typename Format::Element;
  using Shape::kChunk, Shape::kThreads, Shape::kUnits, Shape::kWidth;

  TWINFUSE_DEVICE static void run(const LstmForwardArguments& p) {
    LstmForward(p, *static_cast<Memory*>(shared_memory())).run();
  }

 private:
  static constexpr int kParts = Shape::kParts, kOctets = Shape::kOctets;
  static constexpr int kColumns = Shape::kColumns;
  using Exchange = std::conditional_t<Shape::kAlone, BlockExchange<Element, kWidth, kChunk>,
                                      GridExchange<Element, kWidth>>;
  using WeightProduct = Product<Format, Shape::kTiles, Shape::kGroups, kParts, kThreads>;
  static constexpr int kCells = Slice<Element, Shape>::kCells;

  // Of a cell at a step: what is read of memory, and what is written there.
  struct Given {
    bool active;
    Element x[4];
  };
  struct Made {
    float h, c;  // before the step
    float gates[4], output;
  };

  TWINFUSE_DEVICE LstmForward(const LstmForwardArguments& p, Memory& memory)
      : p_(p),
        s_(p.shared),
        memory_(memory),
        exchange_(p.shared, s_.number, s_.rows(), memory.exchange) {}

  TWINFUSE_DEVICE void run() {
    const int warp = thread_index() / 32, part = warp % kParts;
    const int octet = warp / kParts * kOctets;
    load_weights(part, octet);
    block_sync();
    begin();
    exchange_.leave();
    block_sync();
    Given given[kCells];
    load(0, 0, given);
    for (int step = 0; step < s_.p.steps; step++)
      for (int chunk = 0; chunk < s_.count; chunk += kChunk) {
        const bool is_last = chunk + kChunk >= s_.count;
        float sums[kCells][4];
        s_.for_cells(chunk, [&](int i, const Cell& at) { add_bias(given[i], at, sums[i]); });
        Given next[kCells];
        load(is_last ? step + 1 : step, is_last ? 0 : chunk + kChunk, next);
        exchange_.wait();
        product(step, chunk, part, octet);
        block_sync();
        Made made[kCells];
        s_.for_cells(chunk,
                     [&](int i, const Cell& at) { compute(step, at, given[i], sums[i], made[i]); });
        if (is_last) exchange_.leave();
        s_.for_cells(chunk, [&](int i, const Cell& at) { store(step, at, given[i], made[i]); });
#pragma unroll
        for (int i = 0; i < kCells; i++) given[i] = next[i];
      }
    s_.for_each([&](const Cell& at) {
      if (p_.final_h.data) convert(memory_.h[at.sequence][at.place], &s_.at(p_.final_h, at));
      if (p_.final_c.data) convert(memory_.c[at.sequence][at.place], &s_.at(p_.final_c, at));
    });
  }

  TWINFUSE_DEVICE void load_weights(int part, int octet) {
    const auto* hh = static_cast<const Element*>(s_.p.hh);
    product_.template load<false>(part, &memory_, [&](int row, int k) {
      const int gate = row / 16 % 2 * 2 + row % 16 / 8;
      const int unit = s_.unit + (octet + row / 32) * 8 + row % 8;
      if (unit >= s_.p.units || k >= s_.p.units) return rounded<Element>(0);
      return hh[(int64_t{gate} * s_.p.units + unit) * s_.p.hh_row + k * s_.p.hh_col];
    });
  }

  // Biases, and the states before the first step. What is not there is zeros to all.
  TWINFUSE_DEVICE void begin() {
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
    s_.for_each([&](const Cell& at) {
      const float h = s_.state(p_.initial_h, at);
      memory_.h[at.sequence][at.place] = h;
      memory_.c[at.sequence][at.place] = s_.state(p_.initial_c, at);
      memory_.last[at.sequence][at.place] = 0;
      exchange_.put(0, at.sequence, at.unit, rounded<Element>(h));
    });
    if (s_.block) return;
    for (int i = thread_index(); i < s_.rows() * kWidth; i += kThreads)
      if (i / kWidth >= s_.count || i % kWidth >= s_.p.units)
        exchange_.put_zero(i / kWidth, i % kWidth);
  }

  TWINFUSE_DEVICE void load(int step, int chunk, Given (&given)[kCells]) const {
    if (step == s_.p.steps) return;
    const int t = s_.time(step);
    const auto* inputs = static_cast<const Element*>(p_.inputs);
    s_.for_cells(chunk, [&](int i, const Cell& at) {
      given[i].active = s_.active(t, at.b);
      if (!given[i].active) return;
      const Element* row = inputs + s_.row(t, at.b) * p_.inputs_row + at.unit;
#pragma unroll
      for (int gate = 0; gate < 4; gate++) given[i].x[gate] = row[int64_t{gate} * s_.p.units];
    });
  }

  TWINFUSE_DEVICE void add_bias(const Given& given, const Cell& at, float (&sums)[4]) const {
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
      sums[gate] = to_float(given.x[gate]) + memory_.bias[at.place][gate];
  }

  TWINFUSE_DEVICE void product(int step, int chunk, int part, int octet) {
    for_columns<kColumns>(s_.count - chunk, [&](auto some) {
      product<decltype(some)::value>(step, chunk, part, octet);
    });
  }

  template <int kSome>
  TWINFUSE_DEVICE void product(int step, int chunk, int part, int octet) {
    float sums[2 * kOctets][kSome][4];
    product_.times(sums, exchange_, step, chunk, part);
    const int lane = thread_index() % 32;
#pragma unroll
    for (int o = 0; o < kOctets; o++)
#pragma unroll
      for (int column = 0; column < kSome; column++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
          const int sequence = column * 8 + lane % 4 * 2 + side;
          const int unit = (octet + o) * 8 + lane / 4;
          const float (&first)[4] = sums[2 * o][column], (&second)[4] = sums[2 * o + 1][column];
          *reinterpret_cast<float4*>(&memory_.sums[part][sequence][unit * 4]) = {
              first[side], first[side + 2], second[side], second[side + 2]};
        }
  }

  // One step of a cell. What others wait for leaves at once.
  TWINFUSE_DEVICE void compute(int step, const Cell& at, const Given& given, float (&sums)[4],
                               Made& made) {
    float& h = memory_.h[at.sequence][at.place];
    float& c = memory_.c[at.sequence][at.place];
    float& last = memory_.last[at.sequence][at.place];
    made.h = h, made.c = c;
    if (given.active) {
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        const float4 sum = *reinterpret_cast<const float4*>(
            &memory_.sums[part][at.sequence % kChunk][at.place * 4]);
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
    exchange_.put(step + 1, at.sequence, at.unit, kept);
    if (given.active) {
      h = last = to_float(kept);
    } else if (s_.p.zero_masked_output) {
      last = 0;
    }
    made.output = last;
  }

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

  const LstmForwardArguments& p_;
  const Slice<Element, Shape> s_;
  Memory& memory_;
  Exchange exchange_;
  WeightProduct product_;
};

}  // namespace twinfuse::cuda
