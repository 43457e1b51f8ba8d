// States of sequences between the steps of forward: where they come from, what a step makes of
// them, and where they go.
#pragma once

#include "cpu/lstm_gates.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// A row of what is saved, or nullptr.
template <class T>
T* saved_row(const Matrix& m, int64_t row) {
  return m.data ? static_cast<T*>(m.data) + row * m.row_stride : nullptr;
}

// Where those of all sequences lie.
template <class T>
struct StateSpace {
  using Acc = typename Convert<T>::Acc;

  int64_t h[2], c, seen;

  StateSpace(const LstmForward& op, Space* space) {
    for (int64_t& rows : h) rows = space->take_of<T>(op.batch, h_row(op));
    c = space->take_of<Acc>(op.batch, Gates<T>::padded(op.units));
    seen = space->take(op.options.mask ? op.batch : 0);
  }
  static int64_t h_row(const LstmForward& op) { return Scratch<T>::dense_row(op.state); }
};

// Those of a range of sequences.
template <class T>
class States {
  using Acc = typename Convert<T>::Acc;
  using S = Simd<Acc>;
  using V = typename S::V;
  static constexpr int64_t kWidth = S::kWidth;

 public:
  States(const LstmForward& op, const Steps& steps, const StateSpace<T>& space, char* base,
         Range range)
      : op_(op),
        steps_(steps),
        begin_(range.begin),
        row_(StateSpace<T>::h_row(op)),
        old_(reinterpret_cast<T*>(base + space.h[0])),
        new_(reinterpret_cast<T*>(base + space.h[1])),
        c_(reinterpret_cast<Acc*>(base + space.c)),
        seen_(op.options.mask ? reinterpret_cast<uint8_t*>(base + space.seen) : nullptr) {
    const int64_t count = range.end - begin_;
    // The last unit of a row is read whole.
    if (Engine<T>::kGroup > 1) {
      memset(static_cast<void*>(old_ + begin_ * row_), 0, count * row_ * sizeof(T));
      memset(static_cast<void*>(new_ + begin_ * row_), 0, count * row_ * sizeof(T));
    }
    if (seen_) memset(seen_ + begin_, 0, count);
  }

  // h before the step, and c.
  const T* h(int64_t b) const { return old_ + b * row_; }
  int64_t h_row() const { return row_; }
  Acc* c(int64_t b) const { return c_ + b * Gates<T>::padded(op_.units); }
  // Sequences that have the step, from the first of the range on.
  int64_t active() const { return active_; }

  // For a single step, which threads share: what each of them does for some of the sequences before
  // it, and for some of the units behind it.
  void begin_single(int64_t active) { active_ = active; }
  void begin_single(Range sequences) {
    for (int64_t b = sequences.begin; b < sequences.end; b++) join(b);
  }
  void end_single(Units u) const {
    for (int64_t b = begin_; b < begin_ + active_; b++) {
      store(op_.final.h, b, u, load_strided(new_ + b * row_ + u.unit, 1, u.n));
      store(op_.final.c, b, u, S::load(c(b) + u.unit));
    }
  }

  // Sequences join with their initial state and leave with their final one.
  void change_active(int64_t active) {
    for (int64_t b = begin_ + active_; b < begin_ + active; b++) join(b);
    for (int64_t b = begin_ + active; b < begin_ + active_; b++) leave(b);
    active_ = active;
  }

  // From h~ to the new state and the output.
  void finish(int64_t t, int64_t b, int64_t row, Units u, V h) const {
    const T* old = old_ + b * row_ + u.unit;
    T* next = new_ + b * row_ + u.unit;
    const Share<T> zoneout{steps_.at<T>(op_.zoneout_hidden, t, b), op_.zoneout_hidden.col};
    if (zoneout.data) {
      const V z = zoneout.load(u);
      h = S::fma(z, load_strided(old, 1, u.n), (S::set(1) - z) * h);
    }
    if (T* hidden = saved_row<T>(op_.saved.hidden, row))
      memcpy(static_cast<void*>(hidden + u.unit), old, u.n * sizeof(T));
    store_strided(next, 1, h, u.n);
    if (T* output = steps_.at<T>(op_.output, t, b))
      store_strided(output + u.unit * op_.output.col, op_.output.col, h, u.n);
  }

  // Of a step that the sequence skips.
  void skip(int64_t t, int64_t b, int64_t row, Units u) const {
    const T* old = old_ + b * row_ + u.unit;
    memcpy(static_cast<void*>(new_ + b * row_ + u.unit), old, u.n * sizeof(T));
    if (T* hidden = saved_row<T>(op_.saved.hidden, row))
      memset(static_cast<void*>(hidden + u.unit), 0, u.n * sizeof(T));
    if (T* output = steps_.at<T>(op_.output, t, b)) {
      const bool repeats = seen_[b] && !op_.options.zero_masked_output;
      for (int k = 0; k < u.n; k++) output[(u.unit + k) * op_.output.col] = repeats ? old[k] : T{};
    }
  }

  // What was new is old.
  void end_step(int64_t t) {
    for (int64_t b = begin_; seen_ && b < begin_ + active_; b++) seen_[b] |= !steps_.skips(t, b);
    T* swapped = old_;
    old_ = new_, new_ = swapped;
  }

 private:
  void join(int64_t b) {
    const Matrix &h = op_.initial.h, &c = op_.initial.c;
    T* to = old_ + b * row_;
    if (h.data)
      copy_strided(static_cast<const T*>(h.data) + b * h.row_stride, h.col_stride, to, 1,
                   op_.state);
    else
      memset(static_cast<void*>(to), 0, op_.state * sizeof(T));
    for (int64_t k = 0; k < Gates<T>::padded(op_.units); k += kWidth) {
      const T* from = static_cast<const T*>(c.data) + b * c.row_stride + k * c.col_stride;
      S::store(this->c(b) + k, c.data ? load_strided(from, c.col_stride, lanes(k)) : S::zero());
    }
  }

  void leave(int64_t b) {
    const Matrix &h = op_.final.h, &c = op_.final.c;
    if (h.data)
      copy_strided(this->h(b), 1, static_cast<T*>(h.data) + b * h.row_stride, h.col_stride,
                   op_.state);
    for (int64_t k = 0; k < op_.units; k += kWidth)
      store(c, b, {k, lanes(k)}, S::load(this->c(b) + k));
  }

  static void store(const Matrix& m, int64_t b, Units u, V x) {
    if (m.data)
      store_strided(static_cast<T*>(m.data) + b * m.row_stride + u.unit * m.col_stride,
                    m.col_stride, x, u.n);
  }

  int lanes(int64_t k) const { return static_cast<int>(max64(min64(kWidth, op_.units - k), 0)); }

  const LstmForward& op_;
  const Steps& steps_;
  const int64_t begin_, row_;
  T *old_, *new_;  // h before and after the step
  Acc* c_;
  uint8_t* seen_;  // sequences that have had a step
  int64_t active_ = 0;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
