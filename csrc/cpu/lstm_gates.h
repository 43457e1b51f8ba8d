// What happens to the sums of an LSTM's gates, a vector of units at a time. Equations and names in
// twinfuse/lstm.h.
#pragma once

#include "cpu/functions.h"
#include "cpu/lstm_steps.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Units [unit, unit + n) of one row.
struct Units {
  int64_t unit;
  int n;
};

// A share of the old state for one row, or nothing.
template <class T>
struct Share {
  const T* data = nullptr;
  int64_t stride = 0;

  typename Convert<T>::V load(Units u) const {
    return load_strided(data + u.unit * stride, stride, u.n);
  }
};

template <class T>
class Gates {
  using C = Convert<T>;
  using Acc = typename C::Acc;
  using S = Simd<Acc>;
  using V = typename S::V;
  static constexpr int kWidth = S::kWidth;

 public:
  static int64_t padded(int64_t units) { return round_up(units, kWidth); }
  // Elements of `terms`: biases as panels have them, then peepholes.
  static int64_t term_count(const LstmCall& op) {
    return padded(op.units) * (4 + (op.weights.peephole.data ? 3 : 0));
  }

  Gates(const LstmCall& op, Acc* terms)
      : op_(op),
        plain_(op.options.cell_activation == TWINFUSE_TANH &&
               op.options.gate_activation == TWINFUSE_SIGMOID && !op.weights.peephole.data &&
               !op.zoneout_cell.data),
        bias_(terms),
        peephole_(op.weights.peephole.data ? terms + 4 * padded(op.units) : nullptr) {}

  void fill_terms() const {
    for (int64_t unit = 0; unit < op_.units; unit += kWidth) {
      const int n = static_cast<int>(min64(kWidth, op_.units - unit));
      for (int gate = 0; gate < 4; gate++) {
        V sum = S::zero();
        const Vector biases[] = {op_.weights.bias_ih, op_.weights.bias_hh};
        for (const Vector& bias : biases) {
          if (!bias.data) continue;
          const T* from =
              static_cast<const T*>(bias.data) + (gate * op_.units + unit) * bias.stride;
          sum = S::add(sum, load_strided(from, bias.stride, n));
        }
        S::store(bias_ + 4 * unit + gate * kWidth, sum);
      }
      const Matrix& p = op_.weights.peephole;
      for (int gate = 0; gate < 3 && peephole_; gate++)
        S::store(
            peephole_ + gate * padded(op_.units) + unit,
            load_strided(static_cast<const T*>(p.data) + gate * p.row_stride + unit * p.col_stride,
                         p.col_stride, n));
    }
  }

  // From the sums of the gates, one vector of each and `stride` from one to the next, to h~ before
  // a projection. `c` is replaced by c', and what is not nullptr of `gates` and `cells` (rows)
  // receives i, f, g, o and the old c.
  V forward(const Acc* sums, int64_t stride, Units u, Acc* c, T* gates, T* cells,
            const Share<T>& zoneout) const {
    return plain_ ? forward<true>(sums, stride, u, c, gates, cells, zoneout)
                  : forward<false>(sums, stride, u, c, gates, cells, zoneout);
  }

  // From the gradient of h~ (before a projection) and the old c to the gradients of the sums of the
  // gates, in the row `grad_gates`. `dc` is replaced by the gradient of the old c.
  void backward(V dh, V old, Units u, const T* gates, Acc* dc, T* grad_gates,
                const Share<T>& zoneout) const {
    plain_ ? backward<true>(dh, old, u, gates, dc, grad_gates, zoneout)
           : backward<false>(dh, old, u, gates, dc, grad_gates, zoneout);
  }

  // What forward saved: the gates of a row, and the old c of some units.
  const T* saved(int64_t row) const {
    return static_cast<const T*>(op_.saved.gates.data) + row * op_.saved.gates.row_stride;
  }
  V old_cell(int64_t row, Units u) const {
    const Matrix& m = op_.saved.cells;
    const T* from = static_cast<const T*>(m.data) + row * m.row_stride + u.unit * m.col_stride;
    return load_strided(from, m.col_stride, u.n);
  }
  // h~ before a projection, once more.
  V hidden(V old, Units u, const T* gates) const {
    const V next = S::fma(load(gates, u, 1), old, load(gates, u, 0) * load(gates, u, 2));
    return load(gates, u, 3) * activate<Acc>(op_.options.cell_activation, next);
  }

  // The gradients of the peepholes that one row adds to: p_i, p_f, p_o.
  void peephole_terms(V c, Units u, const T* gates, const T* grad_gates, V terms[3]) const {
    const V new_c = S::fma(load(gates, u, 1), c, load(gates, u, 0) * load(gates, u, 2));
    terms[0] = load(grad_gates, u, 0) * c;
    terms[1] = load(grad_gates, u, 1) * c;
    terms[2] = load(grad_gates, u, 3) * new_c;
  }

 private:
  V load(const T* row, Units u, int gate) const {
    return load_strided(row + gate * op_.units + u.unit, 1, u.n);
  }
  void store(T* row, Units u, int gate, V x) const {
    store_strided(row + gate * op_.units + u.unit, 1, x, u.n);
  }
  V peephole(int which, Units u) const {
    return S::load(peephole_ + which * padded(op_.units) + u.unit);
  }
  template <bool kPlain>
  V gate(V x) const {
    return kPlain ? sigmoid<Acc>(x) : activate<Acc>(op_.options.gate_activation, x);
  }
  template <bool kPlain>
  V cell(V x) const {
    return kPlain ? tanh<Acc>(x) : activate<Acc>(op_.options.cell_activation, x);
  }

  template <bool kPlain>
  V forward(const Acc* sums, int64_t stride, Units u, Acc* c, T* gates, T* cells,
            const Share<T>& zoneout) const {
    const Acc* bias = bias_ + 4 * u.unit;
    const auto sum = [&](int gate) {
      return S::add(S::load(sums + gate * stride), S::load(bias + gate * kWidth));
    };
    const V old = S::load(c + u.unit);
    V a[4] = {sum(0), sum(1), sum(2), sum(3)};
    if (!kPlain && peephole_) {
      a[0] = S::fma(peephole(0, u), old, a[0]);
      a[1] = S::fma(peephole(1, u), old, a[1]);
    }
    const V i = gate<kPlain>(a[0]), f = gate<kPlain>(a[1]), g = cell<kPlain>(a[2]);
    V next = S::fma(f, old, i * g);
    if (!kPlain && peephole_) a[3] = S::fma(peephole(2, u), next, a[3]);
    const V o = gate<kPlain>(a[3]);
    const V h = o * cell<kPlain>(next);
    if (!kPlain && zoneout.data) {
      const V z = zoneout.load(u);
      next = S::fma(z, old, (S::set(1) - z) * next);
    }
    S::store(c + u.unit, next);
    if (gates) {
      store(gates, u, 0, i), store(gates, u, 1, f), store(gates, u, 2, g), store(gates, u, 3, o);
    }
    if (cells) store(cells, u, 0, old);
    return h;
  }

  template <bool kPlain>
  void backward(V dh, V old, Units u, const T* gates, Acc* dc, T* grad_gates,
                const Share<T>& zoneout) const {
    const int32_t gate_kind = kPlain ? TWINFUSE_SIGMOID : op_.options.gate_activation;
    const int32_t cell_kind = kPlain ? TWINFUSE_TANH : op_.options.cell_activation;
    const auto gate_slope = [&](V y) { return activation_slope<Acc>(gate_kind, y); };
    const auto cell_slope = [&](V y) { return activation_slope<Acc>(cell_kind, y); };
    const V i = load(gates, u, 0), f = load(gates, u, 1), g = load(gates, u, 2);
    const V o = load(gates, u, 3);
    const V next = S::fma(f, old, i * g), t = cell<kPlain>(next);
    V d = S::load(dc + u.unit), kept = S::zero();
    if (!kPlain && zoneout.data) {
      const V z = zoneout.load(u);
      kept = z * d;
      d = (S::set(1) - z) * d;
    }
    const V grad_o = dh * t * gate_slope(o);
    d = S::fma(dh * o, cell_slope(t), d);
    if (!kPlain && peephole_) d = S::fma(grad_o, peephole(2, u), d);
    const V grad_i = d * g * gate_slope(i), grad_f = d * old * gate_slope(f);
    kept = S::fma(d, f, kept);
    if (!kPlain && peephole_) {
      kept = S::fma(grad_i, peephole(0, u), kept);
      kept = S::fma(grad_f, peephole(1, u), kept);
    }
    S::store(dc + u.unit, kept);
    store(grad_gates, u, 0, grad_i);
    store(grad_gates, u, 1, grad_f);
    store(grad_gates, u, 2, d * i * cell_slope(g));
    store(grad_gates, u, 3, grad_o);
  }

  const LstmCall& op_;
  const bool plain_;
  Acc* bias_;      // [panel][gate][lane]
  Acc* peephole_;  // [3][padded]
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
