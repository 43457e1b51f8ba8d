// The gradients of an LSTM that are sums over its steps, and that of its input: matrix products
// over the rows of a block of steps, each of which goes on with the sums of the one before.
#pragma once

#include "cpu/linear_relu.h"
#include "cpu/lstm_blocks.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
class LstmGradients {
  using Norm = GateNorm<T>;
  using C = Convert<T>;
  using Acc = typename C::Acc;
  using S = typename C::S;
  using V = typename C::V;
  static constexpr int64_t kWidth = S::kWidth;
  static constexpr int kGates = 4;
  // Rows whose gradients of the input wait, a gate each, to be added.
  static constexpr int64_t kWaiting = 256;

 public:
  // What lasts from block to block is taken from `kept`.
  LstmGradients(const LstmBackward& op, const StepGradients<T>& from, const Blocks<T>& blocks,
                const TwinfuseContext& context, Space* kept)
      : op_(op), from_(from), context_(context), single_(blocks.single()), hidden_(hidden_of(op)) {
    const LstmWeights& to = op.grad_weights;
    const int64_t gates = kGates * op.units;
    const auto take = [&](int64_t rows, int64_t cols) {
      return kept->take_of<Acc>(single_ ? 0 : rows, cols);
    };
    bias_ = take(1, gates);
    peephole_ = take(to.peephole.data ? 3 : 0, op.units);
    norm_ = take(to.norm.data ? Norm::kProducts : 0, gates);
    ih_ = take(drops_input() ? kGates : 1, waiting_size(slice(to.ih, 0, drops_input())));
    hh_ = take(drops_hidden() ? kGates : 1, waiting_size(slice(to.hh, 0, drops_hidden())));
    hr_ = take(1, waiting_size(to.hr));
    int64_t most = 0;
    const auto plan = [&](const Product& p) { most = max64(most, of(p).bytes()); };
    blocks.each([&](const Block& block) {
      block_ = block;
      each_product(plan);
      if (to.hr.data) plan(of_projection());
      if (!op.grad_input.data) return;
      if (!drops_input()) return plan(of_input());
      // The last of them is another product.
      const int64_t heights[] = {min64(rows(), kWaiting), rows() % kWaiting};
      waiting_inputs_ = max64(waiting_inputs_, heights[0]);
      for (const int64_t height : heights)
        if (height) plan(of_dropped_input(0, height, 0, &planned_));
    });
    copies_ = space_.take_of<T>(copied_);
    by_gate_ = space_.take_of<T>(kGates * waiting_inputs_, op.inputs);
    products_ = space_.take(most);
  }

  int64_t bytes() const { return space_.bytes(); }
  void place(char* kept) { kept_ = kept; }

  // `space` holds bytes() and starts on a cache line. Of `gates` only what was saved is used: their
  // biases and peepholes may be gone.
  void run(const Block& block, const Steps& steps, const Gates<T>& gates, char* space) {
    block_ = block, base_ = space;
    if (op_.grad_input.data) drops_input() ? grad_dropped_input(steps) : grad_input(steps);
    each_product([&](const Product& product) {
      if (product.copied) copy_rows(product, steps);
      multiply(product);
    });
    if (ends()) copy_bias();
    if (op_.grad_weights.peephole.data) sum_peepholes(steps, gates);
    if (op_.grad_weights.norm.data) sum_norms(steps, gates);
    // Last: it takes the place of the gradients of the gates.
    if (op_.grad_weights.hr.data) project_again(steps, gates);
  }

 private:
  struct Product {
    LinearReluBackward call{};
    int gate = 0;
    // Between blocks: the sums of its weight and of its bias.
    Acc *weight = nullptr, *bias = nullptr;
    // Rows that are first copied to `call.input`, multiplied by a dropout if there is one.
    const Sequence *copied = nullptr, *dropout = nullptr;
  };

  bool drops_input() const { return op_.dropout_input.data; }
  bool drops_hidden() const { return op_.dropout_hidden.data; }
  int64_t rows() const { return block_.rows.end - block_.rows.begin; }
  bool starts() const { return block_.last == op_.steps; }
  bool ends() const { return block_.first == 0; }

  static Sequence hidden_of(const LstmBackward& op) {
    const Matrix& m = op.saved.hidden;
    const bool batch_major = op.options.batch_major && !op.options.batch_sizes;
    return batch_major ? Sequence{m.data, m.row_stride, op.steps * m.row_stride, m.col_stride}
                       : Sequence{m.data, op.batch * m.row_stride, m.row_stride, m.col_stride};
  }

  // Nothing where one block has all rows. A stand-in while planning.
  Acc* kept(int64_t at, int64_t element = 0) {
    if (single_) return nullptr;
    return kept_ ? reinterpret_cast<Acc*>(kept_ + at) + element : &planned_sum_;
  }
  // Of sums that are of another type than the gradient. Its dense dimension is that of their rows.
  static int64_t waiting_size(const Matrix& w) {
    if (!Blocks<T>::kWaits || !w.data) return 0;
    return w.col_stride == 1 ? w.rows * Scratch<T>::partial_stride(w.cols)
                             : w.cols * Scratch<T>::partial_stride(w.rows);
  }

  // Calls body(product) for those that make gradients of W_ih, W_hh and the biases.
  template <class Body>
  void each_product(const Body& body) {
    const LstmWeights& to = op_.grad_weights;
    const bool normalizes = Norm::wanted(op_);
    for (int gate = 0; gate < (drops_input() ? kGates : 1); gate++) {
      Product product = of_gates(from_.sums(Norm::kOfInput, 0), gate, drops_input());
      if (to.ih.data) set_weight(op_.input, op_.inputs, op_.dropout_input, to.ih, ih_, &product);
      if (!normalizes) set_bias(drops_input(), &product);
      body(product);
    }
    if (normalizes) {
      Product product = of_gates(from_.gates(0), 0, false);
      set_bias(false, &product);
      body(product);
    }
    for (int gate = 0; to.hh.data && gate < (drops_hidden() ? kGates : 1); gate++) {
      Product product = of_gates(from_.sums(Norm::kOfHidden, 0), gate, drops_hidden());
      set_weight(hidden_, op_.state, op_.dropout_hidden, to.hh, hh_, &product);
      body(product);
    }
  }

  // The gradients of all gates, or of one, in the place of a layer's grad_output.
  Product of_gates(T* grads, int gate, bool by_gate) const {
    Product product;
    product.gate = gate;
    product.call.grad_output = {grads + gate * op_.units, rows(),
                                (by_gate ? 1 : kGates) * op_.units, kGates * op_.units, 1};
    return product;
  }
  Matrix slice(const Matrix& weights, int gate, bool by_gate) const {
    return by_gate && weights.data ? of_gate<T>(weights, gate, op_.units) : weights;
  }
  void set_weight(const Sequence& rows, int64_t cols, const Sequence& dropout, const Matrix& to,
                  int64_t sums, Product* product) {
    const bool in_place = lies_dense(rows) && !dropout.data;
    product->call.input = in_place ? where_it_lies(rows, cols) : copy(cols);
    if (!in_place) product->copied = &rows;
    if (dropout.data) product->dropout = &dropout;
    const Matrix weight = product->call.grad_weight = slice(to, product->gate, dropout.data);
    if (Blocks<T>::kWaits) product->weight = kept(sums, product->gate * waiting_size(weight));
  }
  void set_bias(bool by_gate, Product* product) {
    const LstmWeights& to = op_.grad_weights;
    const Vector& bias = to.bias_ih.data ? to.bias_ih : to.bias_hh;
    if (!bias.data) return;
    const int64_t first = by_gate * product->gate * op_.units;
    product->call.grad_bias = static_cast<T*>(bias.data) + first * bias.stride;
    product->call.grad_bias_stride = bias.stride;
    product->bias = kept(bias_, first);
  }
  void copy_bias() const {
    const Vector &from = op_.grad_weights.bias_ih, &to = op_.grad_weights.bias_hh;
    if (from.data && to.data)
      copy_strided(static_cast<const T*>(from.data), from.stride, static_cast<T*>(to.data),
                   to.stride, kGates * op_.units);
  }

  LinearBackward<T> of(const Product& p) const {
    if (single_) return {p.call, context_};
    return {p.call, context_, {op_.rows, starts(), ends(), p.weight}, p.bias};
  }
  void multiply(const Product& product) const { of(product).run(context_, base_ + products_); }

  // One stride describes the rows of the block, in the order of time.
  bool lies_dense(const Sequence& s) const {
    return op_.options.batch_sizes || op_.batch == 1 || block_.last - block_.first <= 1 ||
           s.step == op_.batch * s.row;
  }
  Matrix where_it_lies(const Sequence& s, int64_t cols) const {
    const bool packed = op_.options.batch_sizes;
    const int64_t first = packed ? block_.rows.begin * s.row : block_.times.begin * s.step;
    return {static_cast<T*>(s.data) + first, rows(), cols,
            !packed && op_.batch == 1 ? s.step : s.row, cols == 1 ? 1 : s.col};
  }
  // Room for the rows of the block; a stand-in while planning.
  Matrix copy(int64_t cols) {
    copied_ = max64(copied_, rows() * cols);
    return {base_ ? reinterpret_cast<T*>(base_ + copies_) : &planned_, rows(), cols, cols, 1};
  }

  // Calls body(i) for all of `count`, each of so many elements.
  template <class Body>
  void each(int64_t count, int64_t elements, const Body& body) const {
    const double work = kElementWork * static_cast<double>(count) * static_cast<double>(elements);
    const int64_t all = worth_waking(context_, work);
    parallel_for(context_, all, [&](int64_t worker) {
      const Range part = part_of(count, 1, all, worker);
      for (int64_t i = part.begin; i < part.end; i++) body(i);
    });
  }

  // What forward multiplied, for one gate if there is a dropout.
  void copy_rows(const Product& product, const Steps& steps) const {
    const Sequence &from = *product.copied, *dropout = product.dropout;
    const Matrix& m = product.call.input;
    each(m.rows, m.cols, [&](int64_t row) {
      const auto [t, b] = steps.place(block_.rows.begin + row);
      const T* x = steps.at<T>(from, t, b);
      T* to = static_cast<T*>(m.data) + row * m.cols;
      if (dropout)
        multiply_row(x, from.col, dropout->at<T>(product.gate, b), dropout->col, m.cols, to);
      else
        copy_strided(x, from.col, to, 1, m.cols);
    });
  }

  Product of_projection() {
    Product product;
    product.call.grad_output = {from_.projected(0), rows(), op_.state, op_.state, 1};
    product.call.input = {from_.full(0), rows(), op_.units, op_.units, 1};
    product.call.grad_weight = op_.grad_weights.hr;
    if (Blocks<T>::kWaits) product.weight = kept(hr_);
    return product;
  }

  void project_again(const Steps& steps, const Gates<T>& gates) {
    each(rows(), op_.units, [&](int64_t i) {
      const int64_t row = steps.saved_row(block_.rows.begin + i);
      for (int64_t unit = 0; unit < op_.units; unit += kWidth) {
        const Units u{unit, static_cast<int>(min64(kWidth, op_.units - unit))};
        const V hidden = gates.hidden(gates.old_cell(row, u), u, gates.saved(row));
        store_strided(from_.full(i) + unit, 1, hidden, u.n);
      }
    });
    multiply(of_projection());
  }

  bool writes_in_place() const {
    return lies_dense(op_.grad_input) && (op_.grad_input.col == 1 || op_.inputs == 1);
  }
  Product of_input() {
    Product product = of_gates(from_.sums(Norm::kOfInput, 0), 0, false);
    product.call.weight = op_.weights.ih;
    product.call.grad_input =
        writes_in_place() ? where_it_lies(op_.grad_input, op_.inputs) : copy(op_.inputs);
    return product;
  }
  void grad_input(const Steps& steps) {
    const Product product = of_input();
    multiply(product);
    if (writes_in_place()) return;
    const Matrix& m = product.call.grad_input;
    each(m.rows, m.cols, [&](int64_t row) {
      const auto [t, b] = steps.place(block_.rows.begin + row);
      copy_strided(static_cast<const T*>(m.data) + row * m.cols, 1,
                   steps.at<T>(op_.grad_input, t, b), op_.grad_input.col, m.cols);
    });
  }

  Product of_dropped_input(int64_t first, int64_t height, int gate, T* to) const {
    Product product = of_gates(from_.sums(Norm::kOfInput, first), gate, true);
    product.call.grad_output.rows = height;
    product.call.weight = slice(op_.weights.ih, gate, true);
    product.call.grad_input = {to, height, op_.inputs, op_.inputs, 1};
    return product;
  }
  // Each gate has a product, of the dtype of the input, and factors for it.
  void grad_dropped_input(const Steps& steps) const {
    const Sequence &to = op_.grad_input, &dropout = op_.dropout_input;
    const int64_t inputs = op_.inputs;
    T* by_gate = reinterpret_cast<T*>(base_ + by_gate_);
    for (int64_t first = 0; first < rows(); first += kWaiting) {
      const int64_t height = min64(kWaiting, rows() - first);
      for (int gate = 0; gate < kGates; gate++)
        multiply(of_dropped_input(first, height, gate, by_gate + gate * height * inputs));
      each(height, kGates * inputs, [&](int64_t row) {
        const auto [t, b] = steps.place(block_.rows.begin + first + row);
        T* out = steps.at<T>(to, t, b);
        for (int64_t k = 0; k < inputs; k += kWidth) {
          const int n = static_cast<int>(min64(kWidth, inputs - k));
          V sum = S::zero();
          for (int gate = 0; gate < kGates; gate++) {
            const T* factor = dropout.at<T>(gate, b) + k * dropout.col;
            const T* grad = by_gate + (gate * height + row) * inputs + k;
            sum = S::fma(load_strided(factor, dropout.col, n), load_strided(grad, 1, n), sum);
          }
          store_strided(out + k * to.col, to.col, sum, n);
        }
      });
    }
  }

  // Sums kCount terms of every row, a vector of columns at a time: body(row, k, lanes, terms).
  // Between blocks the sums are kept at `at`.
  template <int kCount, class Body>
  void sum_rows(const Matrix& to, int64_t cols, int64_t at, const Body& body) {
    each(ceil_div(cols, kWidth), kWidth * rows(), [&](int64_t panel) {
      const int64_t k = panel * kWidth;
      const int n = static_cast<int>(min64(kWidth, cols - k));
      const auto start = [&](int i) {
        const bool goes_on = i < kCount && !starts();
        return LevelSum<T>(goes_on ? S::load(kept(at, i * cols + k), n) : S::zero());
      };
      LevelSum<T> sums[] = {start(0), start(1), start(2)};
      static_assert(kCount <= 3, "as many sums as there are");
      for (int64_t row = 0; row < rows();) {
        V run[kCount], terms[kCount];
        for (V& sum : run) sum = S::zero();
        for (const int64_t end = min64(rows(), row + kSummedRun); row < end; row++) {
          body(row, k, n, terms);
          for (int i = 0; i < kCount; i++) run[i] = S::add(run[i], terms[i]);
        }
        for (int i = 0; i < kCount; i++) sums[i].add(run[i]);
      }
      for (int i = 0; i < kCount; i++) {
        if (ends())
          store_strided(static_cast<T*>(to.data) + i * to.row_stride + k * to.col_stride,
                        to.col_stride, sums[i].value(), n);
        else
          S::store(kept(at, i * cols + k), sums[i].value(), n);
      }
    });
  }

  void sum_peepholes(const Steps& steps, const Gates<T>& gates) {
    sum_rows<3>(op_.grad_weights.peephole, op_.units, peephole_,
                [&](int64_t i, int64_t unit, int n, V* terms) {
                  const Units u{unit, n};
                  const int64_t row = steps.saved_row(block_.rows.begin + i);
                  gates.peephole_terms(gates.old_cell(row, u), u, gates.saved(row), from_.gates(i),
                                       terms);
                });
  }

  void sum_norms(const Steps& steps, const Gates<T>& gates) {
    const int64_t cols = kGates * op_.units;
    sum_rows<Norm::kProducts>(
        op_.grad_weights.norm, cols, norm_, [&](int64_t i, int64_t k, int n, V* terms) {
          const T* saved = gates.saved(steps.saved_row(block_.rows.begin + i));
          const V grad = load_strided(from_.gates(i) + k, 1, n);
          for (int product = 0; product < Norm::kProducts; product++) {
            const V centred = load_strided(Norm::centred(product, saved, op_) + k, 1, n);
            terms[product] = grad * (centred * S::set(*from_.inverse(product, i)));
          }
        });
  }

  const LstmBackward& op_;
  const StepGradients<T>& from_;
  const TwinfuseContext& context_;
  const bool single_;
  const Sequence hidden_;
  Block block_{};  // at hand
  Space space_;
  int64_t bias_, peephole_, norm_, ih_, hh_, hr_;  // kept from block to block
  int64_t copies_, by_gate_, products_;
  int64_t copied_ = 0, waiting_inputs_ = 0;  // at most
  T planned_{};
  Acc planned_sum_ = 0;
  char *kept_ = nullptr, *base_ = nullptr;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
