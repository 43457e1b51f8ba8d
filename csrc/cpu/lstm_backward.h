// Backward through the steps of an LSTM, and the gradients of its weights and its input.
//
// What a step has to do is small: the gradients of the gates, and their product with W_hh for the
// step before. All that sums over steps is left for matrix products, after each block of steps:
// what these read is still in the caches, and there is never more of it than of one block.
#pragma once

#include "cpu/lstm_gradients.h"

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
        blocks_(op),
        from_steps_(op, blocks_, &kept_),
        gradients_(op, from_steps_, blocks_, context, &kept_),
        hh_{product(0), product(1), product(2), product(3)},
        hr_(op.weights.hr, true, false, op, crew_, &space_) {
    const int64_t batch = op.batch;
    offsets_ = kept_.take_of<int64_t>(Steps::offset_count(op));
    terms_ = space_.take_of<Acc>(Gates<T>::term_count(op));
    scales_ = space_.take_of<Acc>(GateNorm<T>::term_count(op));
    packed_ = space_.take_of<Packed>(packs() ? batch : 0, packed_row());
    dh_ = space_.take_of<Acc>(batch, dh_row());
    dh_of_gate_ = space_.take_of<Acc>(drops_hidden() ? batch : 0, dh_row());
    dfull_ = space_.take_of<Acc>(projects() ? batch : 0, round_up(op.units, hr_.panel_width()));
    dc_ = space_.take_of<Acc>(batch, Gates<T>::padded(op.units));
    waiting_ = space_.take_of<Acc>(op.options.mask ? batch : 0, Gates<T>::padded(op.state));
    transpose_bytes_ = max64(hh_[0].transpose_bytes(), hr_.transpose_bytes());
    transpose_ = space_.take(crew_.workers() * transpose_bytes_);
  }

  // With one block, what the steps need is no longer needed when the products begin.
  int64_t bytes() const {
    const int64_t kept = kept_.bytes() + (blocks_.single() ? 0 : space_.bytes());
    return kept + max64(blocks_.single() ? space_.bytes() : 0, gradients_.bytes());
  }

  void run(const TwinfuseContext& context, char* space) {
    DefaultFloatMode mode;
    from_steps_.place(space);
    gradients_.place(space);
    int64_t* offsets = reinterpret_cast<int64_t*>(space + offsets_);
    Steps::fill_offsets(op_, offsets);
    base_ = space + kept_.bytes();
    const Gates<T> gates(op_, at<Acc>(terms_));
    gates.fill_terms();
    const GateNorm<T> norm(op_, at<Acc>(scales_));
    norm.fill_terms();
    for (StepWeights<T>& hh : hh_) hh.prepare(context, base_, base_ + transpose_, transpose_bytes_);
    hr_.prepare(context, base_, base_ + transpose_, transpose_bytes_);
    const Steps steps{op_, offsets};
    char* free = base_ + (blocks_.single() ? 0 : space_.bytes());
    blocks_.each([&](const Block& block) {
      crew_.run(op_, block.times, context, [&](Range sequences, int64_t, const Team& team) {
        Walk(*this, steps, block, gates, norm, sequences, team).run();
      });
      gradients_.run(block, steps, gates, free);
    });
  }

 private:
  // The sequences of one thread, or all of them with a team, through a block of steps.
  class Walk {
   public:
    Walk(const LstmBackwardPlan& plan, const Steps& steps, const Block& block,
         const Gates<T>& gates, const GateNorm<T>& norm, Range sequences, const Team& team)
        : p_(plan),
          op_(plan.op_),
          steps_(steps),
          block_(block),
          gates_(gates),
          norm_(norm),
          team_(team),
          begin_(sequences.begin),
          end_(sequences.end) {}

    void run() {
      if (block_.last < op_.steps) active_ = active_at(steps_.time(block_.last));
      for (int64_t s = block_.last - 1; s >= block_.first; s--) {
        const int64_t t = steps_.time(s);
        change_active(active_at(t));
        // Nobody may ask for the gradient of the first state.
        if (active_) step(t, s > 0 || op_.grad_initial.h.data);
      }
      if (block_.first > 0) return;
      if (op_.steps == 0) change_active(end_ - begin_);
      change_active(0);
    }

   private:
    // Of the gradient of h: in the panels of the product that makes it, [panel][sequence][column].
    Acc* dh(int64_t b, int64_t k) const { return panels(p_.dh_, p_.hh_[0], op_.state, b, k); }
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

    int64_t active_at(int64_t t) const { return max64(min64(end_, steps_.active(t)) - begin_, 0); }
    // Of what the steps of the block leave.
    int64_t row(int64_t t, int64_t b) const { return steps_.row_in_time(t, b) - block_.rows.begin; }

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
      if (p_.normalizes())
        team_.each(active_, [&](int64_t i, int64_t) { grad_sums(t, begin_ + i); });
      if (!to_hidden) return;
      const T* rows = p_.from_steps_.sums(GateNorm<T>::kOfHidden, row(t, begin_));
      const int64_t gates = 4 * op_.units;
      if (!p_.drops_hidden()) return multiply(p_.hh_[0], rows, gates, gates, p_.dh_, true);
      for (int gate = 0; gate < 4; gate++) {
        multiply(p_.hh_[gate], rows + gate * op_.units, gates, op_.units, p_.dh_of_gate_, false);
        for (int64_t b = begin_; b < begin_ + active_; b++) add_dropped(gate, b);
      }
    }

    // From the gradients of the gates to those of the two products before they were normalised.
    void grad_sums(int64_t t, int64_t b) const {
      using Norm = GateNorm<T>;
      const T* saved = gates_.saved(steps_.row(t, b));
      const int64_t row = this->row(t, b);
      for (int product = 0; product < Norm::kProducts; product++) {
        T* to = p_.from_steps_.sums(product, row);
        Acc* inverse = p_.from_steps_.inverse(product, row);
        if (steps_.skips(t, b)) {
          memset(static_cast<void*>(to), 0, 4 * op_.units * sizeof(T));
          *inverse = 0;
        } else {
          *inverse = norm_.backward(product, saved, p_.from_steps_.gates(row), to);
        }
      }
    }

    void add_dropped(int gate, int64_t b) const {
      const Sequence& dropout = op_.dropout_hidden;
      const T* factors = dropout.at<T>(gate, b);
      for (int64_t k = 0; k < op_.state; k += kWidth) {
        const V factor = load_strided(factors + k * dropout.col, dropout.col, count(k, op_.state));
        const V grad = S::load(panels(p_.dh_of_gate_, p_.hh_[0], op_.state, b, k));
        S::store(dh(b, k), S::fma(factor, grad, S::load(dh(b, k))));
      }
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
        T* to = p_.from_steps_.projected(row(t, b));
        for (int64_t k = 0; k < op_.state; k += kWidth) {
          if (steps_.skips(t, b)) pass_output(t, b, k);
          store_strided(to + k, 1, steps_.skips(t, b) ? S::zero() : take_hidden(t, b, k),
                        count(k, op_.state));
        }
      }
      multiply(p_.hr_, p_.from_steps_.projected(row(t, begin_)), op_.state, op_.state, p_.dfull_,
               false);
    }

    void grad_units(int64_t t, int64_t b, int64_t unit) const {
      const Units u{unit, count(unit, op_.units)};
      const int64_t saved = steps_.row(t, b);
      T* to = p_.from_steps_.gates(row(t, b));
      if (steps_.skips(t, b)) {
        for (int gate = 0; gate < 4; gate++)
          memset(static_cast<void*>(to + gate * op_.units + unit), 0, u.n * sizeof(T));
        if (!p_.projects()) pass_output(t, b, unit);
        return;
      }
      const V d = p_.projects() ? S::load(dfull(b, unit)) : take_hidden(t, b, unit);
      gates_.backward(d, gates_.old_cell(saved, u), u, gates_.saved(saved), dc(b), to,
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
        weights.multiply({packed, bytes, 0}, active_, panel, worker,
                         p_.template at<Acc>(to) + panel * op_.batch * weights.panel_width() +
                             begin_ * weights.width(panel),
                         continued);
      });
    }

    const LstmBackwardPlan& p_;
    const LstmBackward& op_;
    const Steps& steps_;
    const Block& block_;
    const Gates<T>& gates_;
    const GateNorm<T>& norm_;
    const Team team_;
    const int64_t begin_, end_;
    int64_t active_ = 0;
  };

  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(base_ + offset);
  }
  bool projects() const { return op_.weights.hr.data != nullptr; }
  bool normalizes() const { return GateNorm<T>::wanted(op_); }
  bool drops_hidden() const { return op_.dropout_hidden.data != nullptr; }
  int64_t dh_row() const { return round_up(op_.state, hh_[0].panel_width()); }
  // That of all gates with W_hh is the first, and there are no others; with dropout, each gate has
  // its own.
  StepWeights<T> product(int gate) {
    Matrix m = gate ? Matrix{} : op_.weights.hh;
    if (drops_hidden()) m = of_gate<T>(op_.weights.hh, gate, op_.units);
    return {m, true, false, op_, crew_, &space_};
  }
  bool packs() const {
    return kPacks || op_.state % E::kGroup || (drops_hidden() && op_.units % E::kGroup);
  }
  int64_t packed_row() const { return Scratch<T>::dense_row(max64(4 * op_.units, op_.state)); }

  const LstmBackward& op_;
  const Crew crew_;
  const Blocks<T> blocks_;
  Space kept_, space_;
  StepGradients<T> from_steps_;
  LstmGradients<T> gradients_;
  StepWeights<T> hh_[4], hr_;
  int64_t offsets_, terms_, scales_, packed_, dh_, dh_of_gate_, dfull_, dc_, waiting_;
  int64_t transpose_, transpose_bytes_;
  char* base_ = nullptr;
};

template <class T>
TwinfuseStatus lstm_backward(const LstmBackward& op, const TwinfuseContext& context) {
  LstmBackwardPlan<T> plan(op, context);
  return with_scratch(context, plan.bytes(), [&](char* space) { plan.run(context, space); });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
