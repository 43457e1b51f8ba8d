// Layer normalisation of the sums of an LSTM's gates, a row at a time. Equations and names in
// twinfuse/lstm.h.
#pragma once

#include "cpu/lstm_gates.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
class GateNorm {
  using C = Convert<T>;
  using Acc = typename C::Acc;
  using S = Simd<Acc>;
  using V = typename S::V;
  static constexpr int kWidth = S::kWidth, kGates = 4;

 public:
  // What is normalised, each by itself: rows of the scales, and stretches of what is saved.
  static constexpr int kOfInput = 0, kOfHidden = 1, kProducts = 2;

  static bool wanted(const LstmCall& op) { return op.weights.norm.data != nullptr; }
  // Elements of `scales`.
  static int64_t term_count(const LstmCall& op) { return wanted(op) ? kProducts * row_of(op) : 0; }

  GateNorm(const LstmCall& op, Acc* scales)
      : op_(op), count_(static_cast<Acc>(kGates * op.units)), scales_(scales) {}

  void fill_terms() const {
    const Matrix& m = op_.weights.norm;
    for (int product = 0; product < kProducts && m.data; product++)
      for (int64_t k = 0; k < row(); k += kWidth) {
        const T* from = static_cast<const T*>(m.data) + product * m.row_stride + k * m.col_stride;
        S::store(scales_ + product * row_of(op_) + k, load_strided(from, m.col_stride, lanes(k)));
      }
  }

  // Of a row of saved gates.
  static const T* centred(int product, const T* gates, const LstmCall& op) {
    return gates + (1 + product) * kGates * op.units;
  }

  // Normalises and scales the sums of one product for one row, which are lost, to `to` or, where it
  // `adds`, on top of what is there. `gates`, if not nullptr, is a row of what is saved.
  void forward(int product, const GateSums<Acc>& sums, int64_t row, const GateSums<Acc>& to,
               int64_t to_row, bool adds, T* gates) const {
    V total[kGates] = {S::zero(), S::zero(), S::zero(), S::zero()};
    each([&](int64_t panel, int gate, Units u) {
      total[gate] = S::add(total[gate], S::load(at(sums, panel, row, gate), u.n));
    });
    const V mean = S::set(sum(total) / count_);
    V squares[kGates] = {S::zero(), S::zero(), S::zero(), S::zero()};
    T* kept = gates ? const_cast<T*>(centred(product, gates, op_)) : nullptr;
    each([&](int64_t panel, int gate, Units u) {
      Acc* p = at(sums, panel, row, gate);
      S::store(p, S::load(p) - mean, u.n);
      const V x = S::load(p, u.n);
      squares[gate] = S::fma(x, x, squares[gate]);
      if (kept) store_strided(kept + gate * op_.units + u.unit, 1, x, u.n);
    });
    const V scale = S::set(inverse(squares));
    const Acc* scales = scales_ + product * row_of(op_);
    each([&](int64_t panel, int gate, Units u) {
      const V y = S::load(at(sums, panel, row, gate)) * scale *
                  S::load(scales + gate * op_.units + u.unit, u.n);
      Acc* p = at(to, panel, to_row, gate);
      S::store(p, adds ? S::add(S::load(p), y) : y);
    });
  }

  // From the gradients of the gates [4H] of one row to those of a product before it was normalised.
  // Returns what it was multiplied by, 1 / sqrt(variance + epsilon).
  Acc backward(int product, const T* gates, const T* grad_gates, T* to) const {
    const T* from = centred(product, gates, op_);
    const Acc* scales = scales_ + product * row_of(op_);
    const auto x = [&](int64_t k) { return load_strided(from + k, 1, lanes(k)); };
    const auto grad = [&](int64_t k) {
      return load_strided(grad_gates + k, 1, lanes(k)) * S::load(scales + k);
    };
    V squares[kGates], total[kGates], products[kGates];
    for (int i = 0; i < kGates; i++) squares[i] = total[i] = products[i] = S::zero();
    for (int64_t k = 0; k < row(); k += kWidth) {
      const int i = k / kWidth % kGates;
      squares[i] = S::fma(x(k), x(k), squares[i]);
      total[i] = S::add(total[i], grad(k));
      products[i] = S::fma(grad(k), x(k), products[i]);
    }
    const Acc inverse = this->inverse(squares);
    const V scale = S::set(inverse), mean = S::set(sum(total) / count_);
    const V slope = S::set(-inverse * sum(products) / count_);
    for (int64_t k = 0; k < row(); k += kWidth)
      store_strided(to + k, 1, scale * S::fma(x(k) * scale, slope, grad(k) - mean), lanes(k));
    return inverse;
  }

 private:
  static int64_t row_of(const LstmCall& op) { return round_up(kGates * op.units, kWidth); }
  int64_t row() const { return kGates * op_.units; }
  int lanes(int64_t k) const { return static_cast<int>(min64(kWidth, row() - k)); }

  static Acc* at(const GateSums<Acc>& sums, int64_t panel, int64_t row, int gate) {
    return sums.at(panel, row) + gate * sums.gate_stride();
  }

  template <class Body>
  void each(const Body& body) const {
    for (int64_t unit = 0; unit < op_.units; unit += kWidth) {
      const Units u{unit, static_cast<int>(min64(kWidth, op_.units - unit))};
      for (int gate = 0; gate < kGates; gate++) body(unit / kWidth, gate, u);
    }
  }

  static Acc sum(const V (&parts)[kGates]) {
    Acc lanes[kWidth];
    S::store(lanes, S::add(S::add(parts[0], parts[1]), S::add(parts[2], parts[3])));
    for (int n = kWidth / 2; n > 0; n /= 2)
      for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
  }
  Acc inverse(const V (&squares)[kGates]) const {
    const Acc epsilon = static_cast<Acc>(op_.options.norm_epsilon);
    return 1 / static_cast<Acc>(__builtin_sqrt(sum(squares) / count_ + epsilon));
  }

  const LstmCall& op_;
  const Acc count_;
  Acc* scales_;  // [product][4H]
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
