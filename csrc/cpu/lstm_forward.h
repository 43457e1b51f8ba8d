// Forward through the steps of an LSTM.
//
// A block of steps at a time: the products of its inputs with W_ih, for all its rows at once, then
// step by step those of h with W_hh, whose sums go on where the former stopped, and the gates.
#pragma once

#include "cpu/lstm_norm.h"
#include "cpu/lstm_states.h"
#include "cpu/weight_rows.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
class LstmForwardPlan {
  using E = Engine<T>;
  using C = Convert<T>;
  using Acc = typename E::Acc;
  using Packed = typename E::Packed;
  using V = typename C::V;
  static constexpr int64_t kWidth = E::S::kWidth;
  static constexpr bool kPacks = sizeof(T) != sizeof(Packed);  // h as it is stored is no operand
  template <class P>
  static constexpr int64_t kSize = sizeof(P);

 public:
  LstmForwardPlan(const LstmForward& op, const TwinfuseContext& context)
      : op_(op),
        crew_(op, context),
        in_place_(WeightRows<T>::serves(op)),
        rows_(op, crew_.workers(), &space_),
        states_(op, &space_),
        ih_(in_place_ ? Matrix{} : op.weights.ih, false, true, op, crew_, &space_),
        hh_(in_place_ ? Matrix{} : op.weights.hh, false, true, op, crew_, &space_),
        hr_(op.weights.hr, false, false, op, crew_, &space_),
        block_rows_(in_place_ ? WeightRows<T>::rows_of_sums(op)
                              : rows_of_block(op.steps, crew_.height)) {
    offsets_ = space_.take_of<int64_t>(Steps::offset_count(op));
    terms_ = space_.take_of<Acc>(Gates<T>::term_count(op));
    scales_ = space_.take_of<Acc>(GateNorm<T>::term_count(op));
    packed_h_ = space_.take_of<Packed>(packs_h() ? hidden_copies() * op.batch : 0,
                                       StateSpace<T>::h_row(op));
    full_ = space_.take_of<Packed>(projects() ? op.batch : 0, full_row());
    transpose_bytes_ =
        max64(max64(ih_.transpose_bytes(), hh_.transpose_bytes()), hr_.transpose_bytes());
    transpose_ = space_.take(crew_.workers() * transpose_bytes_);
    const int64_t inputs = in_place_ ? 0 : input_copies() * block_rows_;
    x_ = space_.take_of<Packed>(crew_.chunks * inputs, x_row());
    sums_ = space_.take_of<Acc>(crew_.chunks * block_rows_, sums_row());
    hidden_sums_ = space_.take_of<Acc>(normalizes() ? crew_.chunks * crew_.height : 0, sums_row());
    projected_ = space_.take_of<Acc>(projects() ? crew_.workers() : 0, projected_size());
  }

  int64_t bytes() const { return space_.bytes(); }

  void run(const TwinfuseContext& context, char* space) {
    DefaultFloatMode mode;
    base_ = space;
    int64_t* offsets = at<int64_t>(offsets_);
    Steps::fill_offsets(op_, offsets);
    const Gates<T> gates(op_, at<Acc>(terms_));
    gates.fill_terms();
    const GateNorm<T> norm(op_, at<Acc>(scales_));
    norm.fill_terms();
    StepWeights<T>* const all[] = {&ih_, &hh_, &hr_};
    for (StepWeights<T>* weights : all)
      weights->prepare(context, space, space + transpose_, transpose_bytes_);
    const Steps steps{op_, offsets};
    crew_.run(op_, {0, op_.steps}, context, [&](Range rows, int64_t chunk, const Team& team) {
      Walk(*this, steps, gates, norm, rows, chunk, team).run();
    });
  }

 private:
  // The sequences of one thread, or all of them with a team.
  class Walk {
   public:
    Walk(LstmForwardPlan& plan, const Steps& steps, const Gates<T>& gates, const GateNorm<T>& norm,
         Range rows, int64_t chunk, const Team& team)
        : p_(plan),
          op_(plan.op_),
          steps_(steps),
          gates_(gates),
          norm_(norm),
          team_(team),
          begin_(rows.begin),
          end_(rows.end),
          block_steps_(steps_of_block(op_.steps, end_ - begin_)),
          x_(p_.template at<Packed>(p_.x_) +
             chunk * p_.input_copies() * p_.block_rows_ * p_.x_row()),
          sums_{p_.template at<Acc>(p_.sums_) + chunk * p_.block_rows_ * p_.sums_row(),
                p_.block_rows_, p_.by_gate()},
          hidden_sums_{
              p_.template at<Acc>(p_.hidden_sums_) + chunk * p_.crew_.height * p_.sums_row(),
              p_.crew_.height, p_.by_gate()},
          projected_(p_.template at<Acc>(p_.projected_) + chunk * p_.projected_size()),
          states_(op_, steps, p_.states_, p_.base_, rows) {
      // The last unit of a row is read whole.
      if (E::kGroup > 1 && p_.projects()) clear(full(), p_.full_row());
    }

    void run() {
      if (p_.in_place_) return single_step();
      for (int64_t first = 0; first < op_.steps; first += block_steps_) {
        const int64_t last = min64(op_.steps, first + block_steps_);
        multiply_inputs(first, last);
        int64_t row = 0;
        for (int64_t s = first; s < last; s++) {
          const int64_t t = steps_.time(s);
          states_.change_active(rows_at(t));
          if (active()) step(t, row);
          row += active();
        }
      }
      if (op_.steps == 0) states_.change_active(end_ - begin_);
      states_.change_active(0);
    }

   private:
    template <class P>
    void clear(P* rows, int64_t row) {
      memset(static_cast<void*>(rows + begin_ * row), 0, (end_ - begin_) * row * sizeof(P));
    }
    Packed* packed_h() const { return p_.template at<Packed>(p_.packed_h_); }
    Packed* full() const { return p_.template at<Packed>(p_.full_); }
    int64_t active() const { return states_.active(); }
    int64_t rows_at(int64_t t) const { return max64(min64(end_, steps_.active(t)) - begin_, 0); }
    // Where blocks are single steps, they are multiplied in these, so that a team meets once.
    void multiply_inputs(int64_t first, int64_t last) {
      const int64_t t = steps_.time(first);
      if (!kPacks && last - first == 1 && op_.input.col == 1 && op_.inputs % E::kGroup == 0 &&
          !op_.dropout_input.data) {
        inputs_ = {steps_.at<T>(op_.input, t, begin_), op_.input.row * kSize<T>, 0};
        input_rows_ = rows_at(t);
      } else {
        const int64_t copies = p_.input_copies(), apart = p_.x_row() * kSize<Packed>;
        for (int64_t gate = 0; gate < copies; gate++) input_rows_ = fetch_inputs(first, last, gate);
        inputs_ = {x_, apart, copies > 1 ? p_.block_rows_ * apart : 0};
      }
      if (block_steps_ > 1)
        team_.each(p_.gate_panels(),
                   [&](int64_t panel, int64_t worker) { multiply_inputs_of(panel, worker); });
    }

    void multiply_inputs_of(int64_t panel, int64_t worker) const {
      p_.ih_.multiply(inputs_, input_rows_, panel, worker, sums_, 0, false);
    }

    int64_t fetch_inputs(int64_t first, int64_t last, int64_t gate) {
      const T* none = nullptr;
      const Sequence& dropout = op_.dropout_input;
      Packed* to = x_ + gate * p_.block_rows_ * p_.x_row();
      int64_t rows = 0;
      for (int64_t s = first; s < last; s++) {
        const int64_t t = steps_.time(s), n = rows_at(t);
        for (int64_t b = begin_; b < begin_ + n; b++, rows++, to += p_.x_row()) {
          const T* x = steps_.at<T>(op_.input, t, b);
          if (dropout.data)
            multiply_row(x, op_.input.col, dropout.at<T>(gate, b), dropout.col, op_.inputs, to);
          else
            fetch_run(x, op_.input.col, none, 0, 0, op_.inputs, to);
          if (E::kGroup == 2 && op_.inputs % 2)
            memset(static_cast<void*>(to + op_.inputs), 0, sizeof(*to));
        }
      }
      return rows;
    }

    StepRows fetch_hidden() const {
      const int64_t row = states_.h_row(), copies = p_.hidden_copies();
      if (!p_.packs_h()) return {states_.h(begin_), row * kSize<T>, 0};
      const Sequence& dropout = op_.dropout_hidden;
      Packed* packed = packed_h() + begin_ * copies * row;
      for (int64_t gate = 0; gate < copies; gate++)
        for (int64_t i = 0, b = begin_; i < active(); i++, b++) {
          Packed* to = packed + (gate * (end_ - begin_) + i) * row;
          if (dropout.data)
            multiply_row(states_.h(b), 1, dropout.at<T>(gate, b), dropout.col, op_.state, to);
          else
            fetch_run(states_.h(b), 1, static_cast<const T*>(nullptr), 0, 0, op_.state, to);
          if (E::kGroup == 2 && op_.state % 2) to[op_.state] = {};
        }
      const int64_t apart = row * kSize<Packed>;
      return {packed, apart, copies > 1 ? (end_ - begin_) * apart : 0};
    }

    void single_step() {
      p_.rows_.place(p_.base_);
      states_.begin_single(end_);
      team_.each(ceil_div(end_, kWidth), [&](int64_t group, int64_t worker) {
        const Range sequences{group * kWidth, min64(end_, (group + 1) * kWidth)};
        states_.begin_single(sequences);
        p_.rows_.pack(states_.h(0), states_.h_row(), sequences, worker);
      });
      const bool projects = p_.projects();
      team_.each(p_.gate_panels(), [&](int64_t panel, int64_t worker) {
        p_.rows_.multiply(units(panel), worker, sums_);
        finish_panel(0, panel, 0);
        if (!projects) states_.end_single(units(panel));
      });
      if (!projects) return;
      finish_step(0);
      states_.change_active(0);
    }

    void step(int64_t t, int64_t row) {
      const StepRows h = fetch_hidden();
      const bool normalizes = p_.normalizes();
      const int64_t panels = p_.gate_panels();
      team_.each(panels, [&](int64_t panel, int64_t worker) {
        if (block_steps_ == 1) multiply_inputs_of(panel, worker);
        if (normalizes) return p_.hh_.multiply(h, active(), panel, worker, hidden_sums_, 0, false);
        p_.hh_.multiply(h, active(), panel, worker, sums_, row, true);
        finish_panel(t, panel, row);
      });
      if (normalizes) {
        team_.each(active(), [&](int64_t i, int64_t) { normalize(t, row, i); });
        team_.each(panels, [&](int64_t panel, int64_t) { finish_panel(t, panel, row); });
      }
      finish_step(t);
    }

    void finish_step(int64_t t) {
      if (p_.projects())
        team_.each(p_.hr_.panels(), [&](int64_t panel, int64_t worker) {
          Acc* sums = projected_ + worker * p_.projected_size();
          const int64_t row = p_.full_row();
          p_.hr_.multiply({full() + begin_ * row, row * kSize<Packed>, 0}, active(), panel, worker,
                          sums, false);
          finish_projection(t, panel, sums);
        });
      states_.end_step(t);
    }

    // The sums of sequence i: those of h are added to those of x.
    void normalize(int64_t t, int64_t row, int64_t i) const {
      using Norm = GateNorm<T>;
      T* gates = saved_row<T>(op_.saved.gates, steps_.row(t, begin_ + i));
      if (!steps_.skips(t, begin_ + i)) {
        norm_.forward(Norm::kOfInput, sums_, row + i, sums_, row + i, false, gates);
        norm_.forward(Norm::kOfHidden, hidden_sums_, i, sums_, row + i, true, gates);
      } else if (gates) {
        memset(static_cast<void*>(gates + 4 * op_.units), 0, 8 * op_.units * sizeof(T));
      }
    }

    Units units(int64_t panel) const {
      return {panel * kWidth, static_cast<int>(min64(kWidth, op_.units - panel * kWidth))};
    }

    void finish_panel(int64_t t, int64_t panel, int64_t first_row) {
      const Units u = units(panel);
      const int64_t row_stride = sums_.row_stride(), gate_stride = sums_.gate_stride();
      const Acc* sums = sums_.at(panel, first_row);
      for (int64_t i = 0; i < active(); i++, sums += row_stride) {
        const int64_t b = begin_ + i, row = steps_.row(t, b);
        T* gates = saved_row<T>(op_.saved.gates, row);
        T* cells = saved_row<T>(op_.saved.cells, row);
        if (steps_.skips(t, b)) {
          for (int gate = 0; gates && gate < 4; gate++)
            memset(static_cast<void*>(gates + gate * op_.units + u.unit), 0, u.n * sizeof(T));
          if (cells) memset(static_cast<void*>(cells + u.unit), 0, u.n * sizeof(T));
          if (!p_.projects()) states_.skip(t, b, row, u);
          continue;
        }
        const V h = gates_.forward(sums, gate_stride, u, states_.c(b), gates, cells,
                                   share(op_.zoneout_cell, t, b));
        if (p_.projects())
          store_packed(full() + b * p_.full_row() + u.unit, h, u.n);
        else
          states_.finish(t, b, row, u, h);
      }
    }

    void finish_projection(int64_t t, int64_t panel, const Acc* sums) {
      const int64_t width = p_.hr_.width(panel), first = panel * p_.hr_.panel_width();
      for (int64_t i = 0; i < active(); i++)
        for (int64_t k = 0; k < width && first + k < op_.state; k += kWidth) {
          const int64_t b = begin_ + i, row = steps_.row(t, b);
          const Units u{first + k, static_cast<int>(min64(kWidth, op_.state - first - k))};
          if (steps_.skips(t, b))
            states_.skip(t, b, row, u);
          else
            states_.finish(t, b, row, u, E::S::load(sums + i * width + k));
        }
    }

    Share<T> share(const Sequence& sequence, int64_t t, int64_t b) const {
      return {steps_.at<T>(sequence, t, b), sequence.col};
    }
    static void store_packed(Packed* p, V x, int n) {
      n == kWidth ? Convert<Packed>::store(p, x) : Convert<Packed>::store(p, x, n);
    }

    LstmForwardPlan& p_;
    const LstmForward& op_;
    const Steps& steps_;
    const Gates<T>& gates_;
    const GateNorm<T>& norm_;
    const Team team_;
    const int64_t begin_, end_, block_steps_;
    Packed* x_;
    const GateSums<Acc> sums_, hidden_sums_;
    Acc* projected_;
    States<T> states_;
    StepRows inputs_{};  // of a block of steps
    int64_t input_rows_ = 0;
  };

  // Rows of inputs that are multiplied at once: each panel of the weights is read once for them.
  static constexpr int64_t kBlockRows = 72;
  static int64_t steps_of_block(int64_t steps, int64_t sequences) {
    return max64(min64(kBlockRows / max64(sequences, 1), steps), 1);
  }
  // The most that a chunk of up to so many sequences has.
  static int64_t rows_of_block(int64_t steps, int64_t sequences) {
    const int64_t most = max64(kBlockRows, sequences);
    return steps < kBlockRows ? min64(most, max64(steps, 1) * sequences) : most;
  }

  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(base_ + offset);
  }
  bool projects() const { return op_.weights.hr.data != nullptr; }
  bool normalizes() const { return GateNorm<T>::wanted(op_); }
  // Where one of the two products is split, the other's sums must lie as its.
  bool by_gate() const { return op_.dropout_input.data || op_.dropout_hidden.data; }
  bool packs_h() const { return kPacks || op_.dropout_hidden.data; }
  int64_t input_copies() const { return op_.dropout_input.data ? 4 : 1; }
  int64_t hidden_copies() const { return op_.dropout_hidden.data ? 4 : 1; }
  int64_t x_row() const { return Scratch<T>::dense_row(op_.inputs); }
  int64_t full_row() const { return Scratch<T>::dense_row(op_.units); }
  int64_t gate_panels() const { return ceil_div(op_.units, kWidth); }
  int64_t sums_row() const { return gate_panels() * 4 * kWidth; }
  int64_t projected_size() const { return crew_.height * hr_.panel_width(); }

  const LstmForward& op_;
  const Crew crew_;
  Space space_;
  const bool in_place_;  // the products of a single step
  WeightRows<T> rows_;
  const StateSpace<T> states_;
  StepWeights<T> ih_, hh_, hr_;
  const int64_t block_rows_;  // of a chunk
  int64_t offsets_, terms_, scales_, packed_h_, full_, x_, sums_;
  int64_t hidden_sums_, projected_, transpose_, transpose_bytes_;
  char* base_ = nullptr;
};

template <class T>
TwinfuseStatus lstm_forward(const LstmForward& op, const TwinfuseContext& context) {
  LstmForwardPlan<T> plan(op, context);
  return with_scratch(context, plan.bytes(), [&](char* space) { plan.run(context, space); });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
