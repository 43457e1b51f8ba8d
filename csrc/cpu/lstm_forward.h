// Forward through the steps of an LSTM.
//
// A block of steps at a time: the products of its inputs with W_ih, for all its rows at once, then
// step by step those of h with W_hh, whose sums go on where the former stopped, and the gates.
#pragma once

#include "cpu/lstm_gates.h"

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

 public:
  LstmForwardPlan(const LstmForward& op, const TwinfuseContext& context)
      : op_(op),
        crew_(op, context),
        ih_(op.weights.ih, false, true, op, crew_, &space_),
        hh_(op.weights.hh, false, true, op, crew_, &space_),
        hr_(op.weights.hr, false, false, op, crew_, &space_),
        block_rows_(rows_of_block(op.steps, crew_.height)) {
    offsets_ = space_.take_of<int64_t>(Steps::offset_count(op));
    terms_ = space_.take_of<Acc>(Gates<T>::term_count(op));
    for (int64_t& h : h_) h = space_.take_of<T>(op.batch, h_row());
    packed_h_ = space_.take_of<Packed>(kPacks ? op.batch : 0, h_row());
    full_ = space_.take_of<Packed>(projects() ? op.batch : 0, full_row());
    c_ = space_.take_of<Acc>(op.batch, Gates<T>::padded(op.units));
    seen_ = space_.take(op.options.mask ? op.batch : 0);
    x_ = space_.take_of<Packed>(crew_.chunks * block_rows_, x_row());
    sums_ = space_.take_of<Acc>(crew_.chunks * block_rows_, sums_row());
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
    ih_.prepare(context, space), hh_.prepare(context, space), hr_.prepare(context, space);
    const Steps steps{op_, offsets};
    crew_.run(op_, context, [&](Range rows, int64_t chunk, const Team& team) {
      Walk(*this, steps, gates, rows, chunk, team).run();
    });
  }

 private:
  // The sequences of one thread, or all of them with a team.
  class Walk {
   public:
    Walk(const LstmForwardPlan& plan, const Steps& steps, const Gates<T>& gates, Range rows,
         int64_t chunk, const Team& team)
        : p_(plan),
          op_(plan.op_),
          steps_(steps),
          gates_(gates),
          team_(team),
          begin_(rows.begin),
          end_(rows.end),
          block_steps_(steps_of_block(op_.steps, end_ - begin_)),
          x_(p_.template at<Packed>(p_.x_) + chunk * p_.block_rows_ * p_.x_row()),
          sums_(p_.template at<Acc>(p_.sums_) + chunk * p_.block_rows_ * p_.sums_row()),
          projected_(p_.template at<Acc>(p_.projected_) + chunk * p_.projected_size()),
          old_(p_.template at<T>(p_.h_[0])),
          new_(p_.template at<T>(p_.h_[1])),
          seen_(op_.options.mask ? reinterpret_cast<uint8_t*>(p_.base_ + p_.seen_) : nullptr) {}

    void run() {
      // The last unit of a row is read whole.
      if (E::kGroup > 1) {
        clear(old_, p_.h_row()), clear(new_, p_.h_row());
        if (p_.projects()) clear(full(), p_.full_row());
      }
      if (seen_) clear(seen_, 1);
      for (int64_t first = 0; first < op_.steps; first += block_steps_) {
        const int64_t last = min64(op_.steps, first + block_steps_);
        multiply_inputs(first, last);
        int64_t row = 0;
        for (int64_t s = first; s < last; s++) {
          const int64_t t = steps_.time(s);
          change_active(rows_at(t));
          if (active_) step(t, row);
          row += active_;
        }
      }
      if (op_.steps == 0) change_active(end_ - begin_);
      change_active(0);
    }

   private:
    template <class P>
    void clear(P* rows, int64_t row) {
      memset(static_cast<void*>(rows + begin_ * row), 0, (end_ - begin_) * row * sizeof(P));
    }
    Packed* packed_h() const { return p_.template at<Packed>(p_.packed_h_); }
    Packed* full() const { return p_.template at<Packed>(p_.full_); }
    Acc* c_row(int64_t b) const {
      return p_.template at<Acc>(p_.c_) + b * Gates<T>::padded(op_.units);
    }
    int64_t rows_at(int64_t t) const { return max64(min64(end_, steps_.active(t)) - begin_, 0); }
    Acc* sums(int64_t panel, int64_t row) const {
      return sums_ + (panel * p_.block_rows_ + row) * p_.ih_.panel_width();
    }

    // Where blocks are single steps, they are multiplied in these, so that a team meets once.
    void multiply_inputs(int64_t first, int64_t last) {
      const int64_t t = steps_.time(first);
      if (!kPacks && last - first == 1 && op_.input.col == 1 && op_.inputs % E::kGroup == 0) {
        inputs_ = steps_.at<T>(op_.input, t, begin_), inputs_apart_ = op_.input.row * sizeof(T);
        input_rows_ = rows_at(t);
      } else {
        input_rows_ = fetch_inputs(first, last);
        inputs_ = x_, inputs_apart_ = p_.x_row() * sizeof(Packed);
      }
      if (block_steps_ > 1)
        team_.each(p_.ih_.panels(),
                   [&](int64_t panel, int64_t worker) { multiply_inputs_of(panel, worker); });
    }

    void multiply_inputs_of(int64_t panel, int64_t worker) const {
      p_.ih_.multiply(inputs_, inputs_apart_, input_rows_, panel, worker, sums(panel, 0), false);
    }

    int64_t fetch_inputs(int64_t first, int64_t last) {
      const T* none = nullptr;
      Packed* to = x_;
      int64_t rows = 0;
      for (int64_t s = first; s < last; s++) {
        const int64_t t = steps_.time(s), n = rows_at(t);
        for (int64_t b = begin_; b < begin_ + n; b++, rows++, to += p_.x_row()) {
          fetch_run(steps_.at<T>(op_.input, t, b), op_.input.col, none, 0, 0, op_.inputs, to);
          if (E::kGroup == 2 && op_.inputs % 2)
            memset(static_cast<void*>(to + op_.inputs), 0, sizeof(*to));
        }
      }
      return rows;
    }

    // Sequences join with their initial state and leave with their final one.
    void change_active(int64_t active) {
      for (int64_t b = begin_ + active_; b < begin_ + active; b++) join(b);
      for (int64_t b = begin_ + active; b < begin_ + active_; b++) leave(b);
      active_ = active;
    }

    void join(int64_t b) {
      const Matrix &h = op_.initial.h, &c = op_.initial.c;
      T* to = old_ + b * p_.h_row();
      if (h.data)
        copy(static_cast<const T*>(h.data) + b * h.row_stride, h.col_stride, to, 1);
      else
        memset(static_cast<void*>(to), 0, op_.state * sizeof(T));
      for (int64_t k = 0; k < Gates<T>::padded(op_.units); k += kWidth) {
        const int n = static_cast<int>(max64(min64(kWidth, op_.units - k), 0));
        V value = E::S::zero();
        if (c.data)
          value = load_strided(static_cast<const T*>(c.data) + b * c.row_stride + k * c.col_stride,
                               c.col_stride, n);
        E::S::store(c_row(b) + k, value);
      }
    }

    void leave(int64_t b) {
      const Matrix &h = op_.final.h, &c = op_.final.c;
      const T* from = old_ + b * p_.h_row();
      if (h.data) copy(from, 1, static_cast<T*>(h.data) + b * h.row_stride, h.col_stride);
      for (int64_t k = 0; c.data && k < op_.units; k += kWidth)
        store_strided(static_cast<T*>(c.data) + b * c.row_stride + k * c.col_stride, c.col_stride,
                      E::S::load(c_row(b) + k), static_cast<int>(min64(kWidth, op_.units - k)));
    }

    void copy(const T* from, int64_t from_stride, T* to, int64_t to_stride) const {
      if (from_stride == 1 && to_stride == 1) {
        memcpy(static_cast<void*>(to), from, op_.state * sizeof(T));
        return;
      }
      for (int64_t k = 0; k < op_.state; k++) to[k * to_stride] = from[k * from_stride];
    }

    void step(int64_t t, int64_t row) {
      const void* h = old_ + begin_ * p_.h_row();
      int64_t apart = p_.h_row() * sizeof(T);
      if (kPacks) {
        Packed* packed = packed_h() + begin_ * p_.h_row();
        for (int64_t i = 0; i < active_; i++)
          fetch_run(old_ + (begin_ + i) * p_.h_row(), 1, static_cast<const T*>(nullptr), 0, 0,
                    op_.state, packed + i * p_.h_row());
        h = packed, apart = p_.h_row() * sizeof(Packed);
      }
      team_.each(p_.hh_.panels(), [&](int64_t panel, int64_t worker) {
        if (block_steps_ == 1) multiply_inputs_of(panel, worker);
        p_.hh_.multiply(h, apart, active_, panel, worker, sums(panel, row), true);
        finish_panel(t, panel, sums(panel, row));
      });
      if (p_.projects())
        team_.each(p_.hr_.panels(), [&](int64_t panel, int64_t worker) {
          Acc* sums = projected_ + worker * p_.projected_size();
          p_.hr_.multiply(full() + begin_ * p_.full_row(), p_.full_row() * sizeof(Packed), active_,
                          panel, worker, sums, false);
          finish_projection(t, panel, sums);
        });
      for (int64_t b = begin_; seen_ && b < begin_ + active_; b++) seen_[b] |= !steps_.skips(t, b);
      T* swapped = old_;
      old_ = new_, new_ = swapped;
    }

    void finish_panel(int64_t t, int64_t panel, const Acc* sums) {
      const Units u{panel * kWidth, static_cast<int>(min64(kWidth, op_.units - panel * kWidth))};
      for (int64_t i = 0; i < active_; i++, sums += p_.hh_.panel_width()) {
        const int64_t b = begin_ + i, row = steps_.row(t, b);
        T* gates = saved(op_.saved.gates, row);
        T* cells = saved(op_.saved.cells, row);
        if (steps_.skips(t, b)) {
          for (int gate = 0; gates && gate < 4; gate++)
            memset(static_cast<void*>(gates + gate * op_.units + u.unit), 0, u.n * sizeof(T));
          if (cells) memset(static_cast<void*>(cells + u.unit), 0, u.n * sizeof(T));
          if (!p_.projects()) skip(t, b, row, u);
          continue;
        }
        const V h = gates_.forward(sums, u, c_row(b), gates, cells, share(op_.zoneout_cell, t, b));
        if (p_.projects())
          store_packed(full() + b * p_.full_row() + u.unit, h, u.n);
        else
          finish(t, b, row, u, h);
      }
    }

    void finish_projection(int64_t t, int64_t panel, const Acc* sums) {
      const int64_t width = p_.hr_.width(panel), first = panel * p_.hr_.panel_width();
      for (int64_t i = 0; i < active_; i++)
        for (int64_t k = 0; k < width && first + k < op_.state; k += kWidth) {
          const int64_t b = begin_ + i, row = steps_.row(t, b);
          const Units u{first + k, static_cast<int>(min64(kWidth, op_.state - first - k))};
          if (steps_.skips(t, b))
            skip(t, b, row, u);
          else
            finish(t, b, row, u, E::S::load(sums + i * width + k));
        }
    }

    // From h~ to the new state and the output.
    void finish(int64_t t, int64_t b, int64_t row, Units u, V h) {
      const T* old = old_ + b * p_.h_row() + u.unit;
      T* next = new_ + b * p_.h_row() + u.unit;
      const Share<T> zoneout = share(op_.zoneout_hidden, t, b);
      if (zoneout.data) {
        const V z = zoneout.load(u);
        h = E::S::fma(z, load_strided(old, 1, u.n), (E::S::set(1) - z) * h);
      }
      if (T* hidden = saved(op_.saved.hidden, row))
        memcpy(static_cast<void*>(hidden + u.unit), old, u.n * sizeof(T));
      store_strided(next, 1, h, u.n);
      if (T* output = steps_.at<T>(op_.output, t, b))
        store_strided(output + u.unit * op_.output.col, op_.output.col, h, u.n);
    }

    void skip(int64_t t, int64_t b, int64_t row, Units u) {
      const T* old = old_ + b * p_.h_row() + u.unit;
      memcpy(static_cast<void*>(new_ + b * p_.h_row() + u.unit), old, u.n * sizeof(T));
      if (T* hidden = saved(op_.saved.hidden, row))
        memset(static_cast<void*>(hidden + u.unit), 0, u.n * sizeof(T));
      if (T* output = steps_.at<T>(op_.output, t, b)) {
        const bool repeats = seen_[b] && !op_.options.zero_masked_output;
        for (int k = 0; k < u.n; k++)
          output[(u.unit + k) * op_.output.col] = repeats ? old[k] : T{};
      }
    }

    static T* saved(const Matrix& m, int64_t row) {
      return m.data ? static_cast<T*>(m.data) + row * m.row_stride : nullptr;
    }
    Share<T> share(const Sequence& sequence, int64_t t, int64_t b) const {
      return {steps_.at<T>(sequence, t, b), sequence.col};
    }
    static void store_packed(Packed* p, V x, int n) {
      n == kWidth ? Convert<Packed>::store(p, x) : Convert<Packed>::store(p, x, n);
    }

    const LstmForwardPlan& p_;
    const LstmForward& op_;
    const Steps& steps_;
    const Gates<T>& gates_;
    const Team team_;
    const int64_t begin_, end_, block_steps_;
    Packed* x_;
    Acc *sums_, *projected_;
    T *old_, *new_;                 // h before and after the step
    uint8_t* seen_;                 // sequences that have had a step
    const void* inputs_ = nullptr;  // of a block of steps
    int64_t inputs_apart_ = 0, input_rows_ = 0;
    int64_t active_ = 0;
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
  static int64_t row_of(int64_t n) { return Scratch<T>::row_stride(round_up(max64(n, 1), 2)); }
  int64_t h_row() const { return row_of(op_.state); }
  int64_t x_row() const { return row_of(op_.inputs); }
  int64_t full_row() const { return row_of(op_.units); }
  int64_t sums_row() const { return ih_.panels() * ih_.panel_width(); }
  int64_t projected_size() const { return crew_.height * hr_.panel_width(); }

  const LstmForward& op_;
  const Crew crew_;
  Space space_;
  StepWeights<T> ih_, hh_, hr_;
  const int64_t block_rows_;  // of a chunk
  int64_t offsets_, terms_, h_[2], packed_h_, full_, c_, seen_, x_, sums_, projected_;
  char* base_ = nullptr;
};

template <class T>
TwinfuseStatus lstm_forward(const LstmForward& op, const TwinfuseContext& context) {
  LstmForwardPlan<T> plan(op, context);
  return with_scratch(context, plan.bytes(), [&](char* space) { plan.run(context, space); });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
