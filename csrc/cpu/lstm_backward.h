// Backward through the steps of an LSTM, and then the gradients of its weights and its input.
//
// What the steps have in common is small: the gradients of the gates, and their product with W_hh
// for the step before. All that sums over steps is left for matrix products over all of them.
#pragma once

#include "cpu/linear_relu.h"
#include "cpu/lstm_gates.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
class LstmBackwardPlan {
  using E = Engine<T>;
  using Acc = typename E::Acc;
  using S = typename E::S;
  using V = typename S::V;
  using Packed = typename E::Packed;
  static constexpr int64_t kWidth = S::kWidth;
  static constexpr bool kPacks = sizeof(T) != sizeof(Packed);  // gradients as stored are no operand

 public:
  LstmBackwardPlan(const LstmBackward& op, const TwinfuseContext& context)
      : op_(op),
        crew_(op, context),
        hh_(op.weights.hh, true, false, op, crew_, &space_),
        hr_(op.weights.hr, true, false, op, crew_, &space_) {
    const int64_t batch = op.batch;
    offsets_ = space_.take_of<int64_t>(Steps::offset_count(op));
    terms_ = space_.take_of<Acc>(Gates<T>::term_count(op));
    grad_gates_ = space_.take_of<T>(op.rows, 4 * op.units);
    projected_ = space_.take_of<T>(projects() ? op.rows : 0, op.state);
    full_ = space_.take_of<T>(projects() ? op.rows : 0, op.units);
    packed_ = space_.take_of<Packed>(packs() ? batch : 0, packed_row());
    dh_ = space_.take_of<Acc>(batch, round_up(op.state, hh_.panel_width()));
    dfull_ = space_.take_of<Acc>(projects() ? batch : 0, round_up(op.units, hr_.panel_width()));
    dc_ = space_.take_of<Acc>(batch, Gates<T>::padded(op.units));
    waiting_ = space_.take_of<Acc>(op.options.mask ? batch : 0, Gates<T>::padded(op.state));
  }

  int64_t bytes() const { return space_.bytes(); }

  void run(const TwinfuseContext& context, char* space) {
    DefaultFloatMode mode;
    base_ = space;
    int64_t* offsets = at<int64_t>(offsets_);
    Steps::fill_offsets(op_, offsets);
    const Gates<T> gates(op_, at<Acc>(terms_));
    gates.fill_terms();
    hh_.prepare(context, space), hr_.prepare(context, space);
    const Steps steps{op_, offsets};
    crew_.run(op_, context, [&](Range rows, int64_t, const Team& team) {
      Walk(*this, steps, gates, rows, team).run();
    });
  }

  // What is summed over all steps. Returns the status of the products.
  TwinfuseStatus finish(const TwinfuseContext& context) const {
    const LstmWeights& to = op_.grad_weights;
    LinearReluBackward product{};
    product.grad_output = {at<T>(grad_gates_), op_.rows, 4 * op_.units, 4 * op_.units, 1};
    product.weight = op_.weights.ih;
    product.input = op_.input_rows;
    product.grad_input = op_.grad_input_rows;
    product.grad_weight = to.ih;
    const Vector &first = to.bias_ih.data ? to.bias_ih : to.bias_hh, &second = to.bias_hh;
    product.grad_bias = first.data, product.grad_bias_stride = first.stride;
    TwinfuseStatus status = linear_relu_backward<T>(product, context);
    for (int64_t k = 0; to.bias_ih.data && second.data && k < 4 * op_.units; k++)
      static_cast<T*>(second.data)[k * second.stride] =
          static_cast<const T*>(first.data)[k * first.stride];
    if (to.hh.data && status == TWINFUSE_OK) {
      product = {};
      product.grad_output = {at<T>(grad_gates_), op_.rows, 4 * op_.units, 4 * op_.units, 1};
      product.input = op_.saved.hidden;
      product.grad_weight = to.hh;
      status = linear_relu_backward<T>(product, context);
    }
    if (to.hr.data && status == TWINFUSE_OK) {
      product = {};
      product.grad_output = {at<T>(projected_), op_.rows, op_.state, op_.state, 1};
      product.input = {at<T>(full_), op_.rows, op_.units, op_.units, 1};
      product.grad_weight = to.hr;
      status = linear_relu_backward<T>(product, context);
    }
    if (to.peephole.data && status == TWINFUSE_OK) sum_peepholes(context);
    return status;
  }

 private:
  // The sequences of one thread, or all of them with a team, from the last step to the first.
  class Walk {
   public:
    Walk(const LstmBackwardPlan& plan, const Steps& steps, const Gates<T>& gates, Range rows,
         const Team& team)
        : p_(plan),
          op_(plan.op_),
          steps_(steps),
          gates_(gates),
          team_(team),
          begin_(rows.begin),
          end_(rows.end) {}

    void run() {
      for (int64_t s = op_.steps - 1; s >= 0; s--) {
        const int64_t t = steps_.time(s);
        change_active(max64(min64(end_, steps_.active(t)) - begin_, 0));
        // Nobody may ask for the gradient of the first state.
        if (active_) step(t, s > 0 || op_.grad_initial.h.data);
      }
      if (op_.steps == 0) change_active(end_ - begin_);
      change_active(0);
    }

   private:
    // Of the gradient of h: in the panels of the product that makes it, [panel][sequence][column].
    Acc* dh(int64_t b, int64_t k) const { return panels(p_.dh_, p_.hh_, op_.state, b, k); }
    Acc* dfull(int64_t b, int64_t k) const { return panels(p_.dfull_, p_.hr_, op_.units, b, k); }
    Acc* panels(int64_t space, const Resident<T>& product, int64_t cols, int64_t b,
                int64_t k) const {
      if (cols == 0) return nullptr;
      const int64_t wide = product.panel_width(), panel = k / wide;
      return p_.template at<Acc>(space) + panel * op_.batch * wide + b * product.width(panel) +
             k % wide;
    }
    Acc* dc(int64_t b) const {
      return p_.template at<Acc>(p_.dc_) + b * Gates<T>::padded(op_.units);
    }
    Acc* waiting(int64_t b) const {
      return p_.template at<Acc>(p_.waiting_) + b * Gates<T>::padded(op_.state);
    }
    T* grad_gates(int64_t row) const {
      return p_.template at<T>(p_.grad_gates_) + row * 4 * op_.units;
    }
    T* projected(int64_t row) const { return p_.template at<T>(p_.projected_) + row * op_.state; }

    static int count(int64_t k, int64_t end) { return static_cast<int>(min64(kWidth, end - k)); }

    void change_active(int64_t active) {
      for (int64_t b = begin_ + active; b < begin_ + active_; b++) leave(b);
      for (int64_t b = begin_ + active_; b < begin_ + active; b++) join(b);
      active_ = active;
    }

    void join(int64_t b) {
      const Matrix &h = op_.grad_final.h, &c = op_.grad_final.c;
      for (int64_t k = 0; k < op_.state; k += kWidth) {
        S::store(dh(b, k), load_state(h, b, k, op_.state));
        if (op_.options.mask) S::store(waiting(b) + k, S::zero());
      }
      for (int64_t k = 0; k < op_.units; k += kWidth) {
        S::store(dc(b) + k, load_state(c, b, k, op_.units));
      }
    }

    static V load_state(const Matrix& m, int64_t b, int64_t k, int64_t end) {
      if (!m.data) return S::zero();
      const T* from = static_cast<const T*>(m.data) + b * m.row_stride + k * m.col_stride;
      return load_strided(from, m.col_stride, count(k, end));
    }

    void leave(int64_t b) {
      const Matrix &h = op_.grad_initial.h, &c = op_.grad_initial.c;
      for (int64_t k = 0; h.data && k < op_.state; k += kWidth)
        store_strided(static_cast<T*>(h.data) + b * h.row_stride + k * h.col_stride, h.col_stride,
                      S::load(dh(b, k)), count(k, op_.state));
      for (int64_t k = 0; c.data && k < op_.units; k += kWidth)
        store_strided(static_cast<T*>(c.data) + b * c.row_stride + k * c.col_stride, c.col_stride,
                      S::load(dc(b) + k), count(k, op_.units));
    }

    void step(int64_t t, bool to_hidden) {
      if (p_.projects()) unproject(t);
      // Row by row: what is saved comes from far away, and in the order in which it lies.
      team_.split(ceil_div(op_.units, kWidth), [&](Range part, int64_t) {
        for (int64_t b = begin_; b < begin_ + active_; b++)
          for (int64_t p = part.begin; p < part.end; p++) grad_units(t, b, p * kWidth);
      });
      if (!to_hidden) return;
      const T* rows = grad_gates(steps_.row(t, begin_));
      const int64_t apart = steps_.rows_apart() * 4 * op_.units;
      multiply(p_.hh_, rows, apart, 4 * op_.units, p_.dh_, true);
    }

    // The gradient of the output and of the state, together that of h'. What passes a zoneout or a
    // skipped step stays in dh.
    V take_hidden(int64_t t, int64_t b, int64_t k) const {
      const int n = count(k, op_.state);
      Acc* at = dh(b, k);
      V d = S::load(at), kept = S::zero();
      if (const T* grad = steps_.at<T>(op_.grad_output, t, b)) {
        const int64_t col = op_.grad_output.col;
        d = S::add(d, load_strided(grad + k * col, col, n));
      }
      if (op_.options.mask) {
        d = S::add(d, S::load(waiting(b) + k));
        S::store(waiting(b) + k, S::zero());
      }
      if (const T* zoneout = steps_.at<T>(op_.zoneout_hidden, t, b)) {
        const int64_t col = op_.zoneout_hidden.col;
        const V z = load_strided(zoneout + k * col, col, n);
        kept = z * d;
        d = (S::set(1) - z) * d;
      }
      S::store(at, kept);
      return d;
    }

    // The output of a skipped step is that of the step before.
    void pass_output(int64_t t, int64_t b, int64_t k) const {
      const T* grad = steps_.at<T>(op_.grad_output, t, b);
      if (!grad || op_.options.zero_masked_output) return;
      const int64_t col = op_.grad_output.col;
      Acc* at = waiting(b) + k;
      S::store(at, S::add(S::load(at), load_strided(grad + k * col, col, count(k, op_.state))));
    }

    // Through the projection: from the gradients of h~ [R] to those of what it projects [H].
    void unproject(int64_t t) {
      for (int64_t b = begin_; b < begin_ + active_; b++) {
        T* to = projected(steps_.row(t, b));
        for (int64_t k = 0; k < op_.state; k += kWidth) {
          if (steps_.skips(t, b)) pass_output(t, b, k);
          store_strided(to + k, 1, steps_.skips(t, b) ? S::zero() : take_hidden(t, b, k),
                        count(k, op_.state));
        }
      }
      multiply(p_.hr_, projected(steps_.row(t, begin_)), steps_.rows_apart() * op_.state, op_.state,
               p_.dfull_, false);
    }

    void grad_units(int64_t t, int64_t b, int64_t unit) const {
      const Units u{unit, count(unit, op_.units)};
      const int64_t row = steps_.row(t, b);
      T* to = grad_gates(row);
      T* full = p_.projects() ? p_.template at<T>(p_.full_) + row * op_.units : nullptr;
      if (steps_.skips(t, b)) {
        for (int gate = 0; gate < 4; gate++)
          memset(static_cast<void*>(to + gate * op_.units + unit), 0, u.n * sizeof(T));
        if (full)
          memset(static_cast<void*>(full + unit), 0, u.n * sizeof(T));
        else
          pass_output(t, b, unit);
        return;
      }
      const V d = full ? S::load(dfull(b, unit)) : take_hidden(t, b, unit);
      gates_.backward(d, p_.old_cell(row, u), u, p_.gates(row), dc(b), to, full,
                      {steps_.at<T>(op_.zoneout_cell, t, b), op_.zoneout_cell.col});
    }

    // The rows of this step, `apart` elements from each other, times `weights`.
    void multiply(const StepWeights<T>& weights, const T* rows, int64_t apart, int64_t depth,
                  int64_t to, bool continued) const {
      const void* packed = rows;
      int64_t bytes = apart * sizeof(T);
      if (kPacks || depth % E::kGroup) {
        Packed* at = p_.template at<Packed>(p_.packed_) + begin_ * p_.packed_row();
        packed = at, bytes = p_.packed_row() * sizeof(Packed);
        for (int64_t i = 0; i < active_; i++, at += p_.packed_row()) {
          fetch_run(rows + i * apart, 1, static_cast<const T*>(nullptr), 0, 0, depth, at);
          if (E::kGroup == 2 && depth % 2) memset(static_cast<void*>(at + depth), 0, sizeof(*at));
        }
      }
      team_.each(weights.panels(), [&](int64_t panel, int64_t worker) {
        weights.multiply(packed, bytes, active_, panel, worker,
                         p_.template at<Acc>(to) + panel * op_.batch * weights.panel_width() +
                             begin_ * weights.width(panel),
                         continued);
      });
    }

    const LstmBackwardPlan& p_;
    const LstmBackward& op_;
    const Steps& steps_;
    const Gates<T>& gates_;
    const Team team_;
    const int64_t begin_, end_;
    int64_t active_ = 0;
  };

  void sum_peepholes(const TwinfuseContext& context) const {
    const Gates<T> gates(op_, at<Acc>(terms_));
    const Matrix& to = op_.grad_weights.peephole;
    parallel_for(context, ceil_div(op_.units, kWidth), [&](int64_t panel) {
      const Units u{panel * kWidth, static_cast<int>(min64(kWidth, op_.units - panel * kWidth))};
      LevelSum<T> sums[] = {LevelSum<T>(S::zero()), LevelSum<T>(S::zero()), LevelSum<T>(S::zero())};
      for (int64_t row = 0; row < op_.rows;) {
        V run[] = {S::zero(), S::zero(), S::zero()};
        for (const int64_t end = min64(op_.rows, row + kSummedRun); row < end; row++) {
          V terms[3];
          gates.peephole_terms(old_cell(row, u), u, this->gates(row),
                               at<T>(grad_gates_) + row * 4 * op_.units, terms);
          for (int k = 0; k < 3; k++) run[k] = S::add(run[k], terms[k]);
        }
        for (int k = 0; k < 3; k++) sums[k].add(run[k]);
      }
      for (int k = 0; k < 3; k++)
        store_strided(static_cast<T*>(to.data) + k * to.row_stride + u.unit * to.col_stride,
                      to.col_stride, sums[k].value(), u.n);
    });
  }

  const T* gates(int64_t row) const {
    return static_cast<const T*>(op_.saved.gates.data) + row * op_.saved.gates.row_stride;
  }
  V old_cell(int64_t row, Units u) const {
    const Matrix& m = op_.saved.cells;
    const T* from = static_cast<const T*>(m.data) + row * m.row_stride + u.unit * m.col_stride;
    return load_strided(from, m.col_stride, u.n);
  }
  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(base_ + offset);
  }
  bool projects() const { return op_.weights.hr.data != nullptr; }
  bool packs() const { return kPacks || op_.state % E::kGroup; }
  int64_t packed_row() const {
    return Scratch<T>::row_stride(round_up(max64(4 * op_.units, max64(op_.state, 1)), 2));
  }

  const LstmBackward& op_;
  const Crew crew_;
  Space space_;
  StepWeights<T> hh_, hr_;
  int64_t offsets_, terms_, grad_gates_, projected_, full_;
  int64_t packed_, dh_, dfull_, dc_, waiting_;
  char* base_ = nullptr;
};

template <class T>
TwinfuseStatus lstm_backward(const LstmBackward& op, const TwinfuseContext& context) {
  LstmBackwardPlan<T> plan(op, context);
  TwinfuseStatus status = TWINFUSE_OK;
  const TwinfuseStatus scratch = with_scratch(context, plan.bytes(), [&](char* space) {
    plan.run(context, space);
    status = plan.finish(context);
  });
  return scratch == TWINFUSE_OK ? status : scratch;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
