// The gradients of an LSTM that are sums over its steps, and that of its input: matrix products
// over all rows, in the order in which rows are saved.
#pragma once

#include "cpu/linear_relu.h"
#include "cpu/lstm_norm.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// What the steps leave for these products, in dense rows.
template <class T>
class StepGradients {
  using Acc = typename Convert<T>::Acc;

 public:
  StepGradients(const LstmBackward& op, Space* space)
      : units_(op.units), state_(op.state), normalizes_(GateNorm<T>::wanted(op)) {
    const int64_t normalized = normalizes_ ? op.rows : 0;
    const int64_t projected = op.weights.hr.data ? op.rows : 0;
    gates_ = space->take_of<T>(op.rows, 4 * units_);
    for (int64_t& sums : sums_) sums = space->take_of<T>(normalized, 4 * units_);
    inverse_ = space->take_of<Acc>(normalized, GateNorm<T>::kProducts);
    projected_ = space->take_of<T>(projected, state_);
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

template <class T>
class LstmGradients {
  using Norm = GateNorm<T>;
  using C = Convert<T>;
  using S = typename C::S;
  using V = typename C::V;
  static constexpr int64_t kWidth = S::kWidth;
  static constexpr int kGates = 4;
  // Rows whose gradients of the input wait, a gate each, to be added.
  static constexpr int64_t kBlock = 256;

 public:
  LstmGradients(const LstmBackward& op, const StepGradients<T>& from,
                const TwinfuseContext& context)
      : op_(op), from_(from) {
    const LstmWeights& to = op.grad_weights;
    const bool inputs = drops_input() && to.ih.data, hidden = drops_hidden() && to.hh.data;
    dropped_ = space_.take_of<T>(op.rows, max64(inputs * op.inputs, hidden * op.state));
    const bool waits = drops_input() && op.grad_input_rows.data;
    by_gate_ = space_.take_of<T>(waits * kGates * min64(op.rows, kBlock), op.inputs);
    int64_t most = 0;
    each_product([&](LinearReluBackward product, const Sequence* dropout, int) {
      if (dropout) product.input = dense(product.input, nullptr);
      most = max64(most, LinearBackward<T>(product, context).bytes());
    });
    if (to.hr.data) most = max64(most, LinearBackward<T>(of_projection(), context).bytes());
    // The last block is another product. What they are written to does not matter yet, but that it
    // is.
    T* to_plan = waits ? static_cast<T*>(op.grad_input_rows.data) : nullptr;
    const int64_t heights[] = {min64(op.rows, kBlock), op.rows % kBlock};
    for (const int64_t rows : heights)
      if (waits && rows)
        most = max64(most,
                     LinearBackward<T>(grad_dropped_block(0, rows, 0, to_plan), context).bytes());
    products_ = space_.take(most);
  }

  int64_t bytes() const { return space_.bytes(); }

  // `space` holds bytes() and starts on a cache line. Of `gates` only what was saved is used: their
  // biases and peepholes may be gone.
  void run(const Steps& steps, const Gates<T>& gates, const TwinfuseContext& context, char* space) {
    base_ = space;
    each_product([&](LinearReluBackward product, const Sequence* dropout, int gate) {
      if (dropout) drop(steps, *dropout, gate, context, &product.input);
      multiply(product, context);
    });
    if (drops_input() && op_.grad_input_rows.data) grad_dropped_input(steps, context);
    const LstmWeights& to = op_.grad_weights;
    for (int64_t k = 0; to.bias_ih.data && to.bias_hh.data && k < kGates * op_.units; k++)
      static_cast<T*>(to.bias_hh.data)[k * to.bias_hh.stride] =
          static_cast<const T*>(to.bias_ih.data)[k * to.bias_ih.stride];
    if (to.peephole.data) sum_peepholes(gates, context);
    if (to.norm.data) sum_norms(gates, context);
    // Last: it takes the place of the gradients of the gates.
    if (to.hr.data) project_again(gates, context);
  }

 private:
  bool drops_input() const { return op_.dropout_input.data; }
  bool drops_hidden() const { return op_.dropout_hidden.data; }

  // Calls body(product, dropout of its input or nullptr, gate). The gradient of an input that is
  // dropped is another matter.
  template <class Body>
  void each_product(const Body& body) const {
    const LstmWeights& to = op_.grad_weights;
    const bool normalizes = Norm::wanted(op_);
    const Vector& bias = to.bias_ih.data ? to.bias_ih : to.bias_hh;
    for (int gate = 0; gate < (drops_input() ? kGates : 1); gate++) {
      LinearReluBackward product = of_gates(from_.sums(Norm::kOfInput, 0), gate, drops_input());
      product.input = op_.input_rows;
      product.grad_weight = slice(to.ih, gate, drops_input());
      if (!drops_input()) product.weight = op_.weights.ih, product.grad_input = op_.grad_input_rows;
      if (!normalizes) set_bias(bias, gate, drops_input(), &product);
      body(product, drops_input() && to.ih.data ? &op_.dropout_input : nullptr, gate);
    }
    if (normalizes && bias.data) {
      LinearReluBackward product = of_gates(from_.gates(0), 0, false);
      set_bias(bias, 0, false, &product);
      body(product, nullptr, 0);
    }
    for (int gate = 0; to.hh.data && gate < (drops_hidden() ? kGates : 1); gate++) {
      LinearReluBackward product = of_gates(from_.sums(Norm::kOfHidden, 0), gate, drops_hidden());
      product.input = op_.saved.hidden;
      product.grad_weight = slice(to.hh, gate, drops_hidden());
      body(product, drops_hidden() ? &op_.dropout_hidden : nullptr, gate);
    }
  }

  LinearReluBackward of_projection() const {
    LinearReluBackward product{};
    product.grad_output = {from_.projected(0), op_.rows, op_.state, op_.state, 1};
    product.input = {from_.full(0), op_.rows, op_.units, op_.units, 1};
    product.grad_weight = op_.grad_weights.hr;
    return product;
  }

  void project_again(const Gates<T>& gates, const TwinfuseContext& context) const {
    each(op_.rows, op_.units, context, [&](int64_t row) {
      for (int64_t unit = 0; unit < op_.units; unit += kWidth) {
        const Units u{unit, static_cast<int>(min64(kWidth, op_.units - unit))};
        const V hidden = gates.hidden(gates.old_cell(row, u), u, gates.saved(row));
        store_strided(from_.full(row) + unit, 1, hidden, u.n);
      }
    });
    multiply(of_projection(), context);
  }

  void multiply(const LinearReluBackward& product, const TwinfuseContext& context) const {
    LinearBackward<T>(product, context).run(context, base_ + products_);
  }

  // The gradients of all gates, or of one, in the place of a layer's grad_output.
  LinearReluBackward of_gates(T* grads, int gate, bool by_gate) const {
    LinearReluBackward product{};
    product.grad_output = {grads + gate * op_.units, op_.rows, (by_gate ? 1 : kGates) * op_.units,
                           kGates * op_.units, 1};
    return product;
  }
  Matrix slice(const Matrix& weights, int gate, bool by_gate) const {
    return by_gate && weights.data ? of_gate<T>(weights, gate, op_.units) : weights;
  }
  void set_bias(const Vector& bias, int gate, bool by_gate, LinearReluBackward* product) const {
    if (!bias.data) return;
    product->grad_bias = static_cast<T*>(bias.data) + by_gate * gate * op_.units * bias.stride;
    product->grad_bias_stride = bias.stride;
  }

  // Calls body(i) for all of `count`, each of so many elements.
  template <class Body>
  static void each(int64_t count, int64_t elements, const TwinfuseContext& context,
                   const Body& body) {
    constexpr double kWorthAThread = 1e5;
    const double work = static_cast<double>(count) * static_cast<double>(elements);
    const int64_t all = worth_waking(context.num_threads, work, kWorthAThread);
    parallel_for(context, all, [&](int64_t worker) {
      const Range part = part_of(count, 1, all, worker);
      for (int64_t i = part.begin; i < part.end; i++) body(i);
    });
  }

  static Matrix dense(const Matrix& m, T* to) { return {to, m.rows, m.cols, m.cols, 1}; }

  // Replaces all rows by what forward multiplied for one gate.
  void drop(const Steps& steps, const Sequence& dropout, int gate, const TwinfuseContext& context,
            Matrix* rows) const {
    T* to = reinterpret_cast<T*>(base_ + dropped_);
    const Matrix from = *rows;
    each(from.rows, from.cols, context, [&](int64_t row) {
      multiply_row(static_cast<const T*>(from.data) + row * from.row_stride, from.col_stride,
                   dropout.template at<T>(gate, steps.sequence(row)), dropout.col, from.cols,
                   to + row * from.cols);
    });
    *rows = dense(from, to);
  }

  LinearReluBackward grad_dropped_block(int64_t first, int64_t rows, int gate, T* to) const {
    LinearReluBackward product = of_gates(from_.sums(Norm::kOfInput, first), gate, true);
    product.grad_output.rows = rows;
    product.weight = slice(op_.weights.ih, gate, true);
    product.grad_input = {to, rows, op_.inputs, op_.inputs, 1};
    return product;
  }

  // Each gate has a product, of the dtype of the input, and factors for it.
  void grad_dropped_input(const Steps& steps, const TwinfuseContext& context) const {
    const Matrix& to = op_.grad_input_rows;
    const int64_t inputs = op_.inputs;
    T* by_gate = reinterpret_cast<T*>(base_ + by_gate_);
    for (int64_t first = 0; first < op_.rows; first += kBlock) {
      const int64_t rows = min64(kBlock, op_.rows - first);
      for (int gate = 0; gate < kGates; gate++)
        multiply(grad_dropped_block(first, rows, gate, by_gate + gate * rows * inputs), context);
      each(rows, kGates * inputs, context, [&](int64_t row) {
        const int64_t b = steps.sequence(first + row);
        T* out = static_cast<T*>(to.data) + (first + row) * to.row_stride;
        for (int64_t k = 0; k < inputs; k += kWidth) {
          const int n = static_cast<int>(min64(kWidth, inputs - k));
          V sum = S::zero();
          for (int gate = 0; gate < kGates; gate++) {
            const int64_t col = op_.dropout_input.col;
            const T* factor = op_.dropout_input.template at<T>(gate, b) + k * col;
            const T* grad = by_gate + (gate * rows + row) * inputs + k;
            sum = S::fma(load_strided(factor, col, n), load_strided(grad, 1, n), sum);
          }
          store_strided(out + k * to.col_stride, to.col_stride, sum, n);
        }
      });
    }
  }

  // Sums kCount terms of every row, a vector of columns at a time: body(row, k, lanes, terms).
  template <int kCount, class Body>
  void sum_rows(const Matrix& to, int64_t cols, const TwinfuseContext& context,
                const Body& body) const {
    each(ceil_div(cols, kWidth), kWidth * op_.rows, context, [&](int64_t panel) {
      const int64_t k = panel * kWidth;
      const int n = static_cast<int>(min64(kWidth, cols - k));
      LevelSum<T> sums[] = {LevelSum<T>(S::zero()), LevelSum<T>(S::zero()), LevelSum<T>(S::zero())};
      static_assert(kCount <= 3, "as many sums as there are");
      for (int64_t row = 0; row < op_.rows;) {
        V run[kCount], terms[kCount];
        for (V& sum : run) sum = S::zero();
        for (const int64_t end = min64(op_.rows, row + kSummedRun); row < end; row++) {
          body(row, k, n, terms);
          for (int i = 0; i < kCount; i++) run[i] = S::add(run[i], terms[i]);
        }
        for (int i = 0; i < kCount; i++) sums[i].add(run[i]);
      }
      for (int i = 0; i < kCount; i++)
        store_strided(static_cast<T*>(to.data) + i * to.row_stride + k * to.col_stride,
                      to.col_stride, sums[i].value(), n);
    });
  }

  void sum_peepholes(const Gates<T>& gates, const TwinfuseContext& context) const {
    sum_rows<3>(op_.grad_weights.peephole, op_.units, context,
                [&](int64_t row, int64_t unit, int n, V* terms) {
                  const Units u{unit, n};
                  gates.peephole_terms(gates.old_cell(row, u), u, gates.saved(row),
                                       from_.gates(row), terms);
                });
  }

  void sum_norms(const Gates<T>& gates, const TwinfuseContext& context) const {
    const int64_t cols = kGates * op_.units;
    sum_rows<2>(op_.grad_weights.norm, cols, context, [&](int64_t row, int64_t k, int n, V* terms) {
      const V grad = load_strided(from_.gates(row) + k, 1, n);
      for (int product = 0; product < Norm::kProducts; product++) {
        const T* centred = Norm::centred(product, gates.saved(row), op_) + k;
        const V inverse = S::set(*from_.inverse(product, row));
        terms[product] = grad * (load_strided(centred, 1, n) * inverse);
      }
    });
  }

  const LstmBackward& op_;
  const StepGradients<T>& from_;
  Space space_;
  int64_t dropped_, by_gate_, products_;
  char* base_ = nullptr;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
