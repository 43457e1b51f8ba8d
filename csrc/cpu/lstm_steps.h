// The steps of an LSTM over its sequences: in which order, who takes part, and where things lie.
#pragma once

#include "cpu/gemm.h"
#include "cpu/resident.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Hands out stretches of scratch; each starts on a cache line. More than there can be is asked for
// as a number that no allocator grants.
class Space {
 public:
  int64_t take(int64_t bytes, int64_t count = 1) {
    const int64_t at = bytes_;
    int64_t all = 0;
    if (__builtin_mul_overflow(bytes, count, &all) || all > kMost - bytes_ - 64)
      bytes_ = kMost;
    else
      bytes_ += round_up(all, 64);
    return at;
  }
  template <class P>
  int64_t take_of(int64_t count, int64_t times = 1) {
    return take(static_cast<int64_t>(sizeof(P)) * times, count);
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kMost = INT64_MAX / 4;

  int64_t bytes_ = 0;
};

// Time runs over steps in the order of the tensors; packed sequences have offsets of their steps.
struct Steps {
  const LstmCall& op;
  const int64_t* offsets;

  static int64_t offset_count(const LstmCall& op) { return op.options.batch_sizes ? op.steps : 0; }
  static void fill_offsets(const LstmCall& op, int64_t* offsets) {
    int64_t rows = 0;
    for (int64_t t = 0; t < offset_count(op); rows += op.options.batch_sizes[t++])
      offsets[t] = rows;
  }

  // Of the s-th step that is taken forward.
  int64_t time(int64_t s) const { return op.options.reverse ? op.steps - 1 - s : s; }
  int64_t active(int64_t t) const {
    return op.options.batch_sizes ? op.options.batch_sizes[t] : op.batch;
  }
  // Of what is saved.
  int64_t row(int64_t t, int64_t b) const {
    if (op.options.batch_sizes) return offsets[t] + b;
    return op.options.batch_major ? b * op.steps + t : t * op.batch + b;
  }
  // In the order of time, that of what is saved if it is not batch-major.
  int64_t row_in_time(int64_t t, int64_t b) const {
    return op.options.batch_sizes ? offsets[t] + b : t * op.batch + b;
  }
  struct Place {
    int64_t t, b;
  };
  Place place(int64_t row_in_time) const {
    if (!op.options.batch_sizes) return {row_in_time / op.batch, row_in_time % op.batch};
    int64_t t = 0, end = op.steps;
    while (end - t > 1) {
      const int64_t middle = (t + end) / 2;
      (offsets[middle] <= row_in_time ? t : end) = middle;
    }
    return {t, row_in_time - offsets[t]};
  }
  int64_t saved_row(int64_t row_in_time) const {
    if (op.options.batch_sizes || !op.options.batch_major) return row_in_time;
    return row_in_time % op.batch * op.steps + row_in_time / op.batch;
  }
  template <class T>
  T* at(const Sequence& sequence, int64_t t, int64_t b) const {
    if (!sequence.data) return nullptr;
    return static_cast<T*>(sequence.data) + (op.options.batch_sizes
                                                 ? (offsets[t] + b) * sequence.row
                                                 : t * sequence.step + b * sequence.row);
  }
  bool skips(int64_t t, int64_t b) const {
    const TwinfuseLstm& o = op.options;
    return o.mask && !o.mask[t * o.mask_stride[0] + b * o.mask_stride[1]];
  }
};

// Who works on the panels of one step: this thread, or several that meet after each.
struct Team {
  const TwinfuseContext& context;
  int64_t workers;

  // Calls body(range of panels, worker).
  template <class Body>
  void split(int64_t panels, const Body& body) const {
    if (workers == 1) return body(Range{0, panels}, 0);
    parallel_for(context, workers,
                 [&](int64_t worker) { body(part_of(panels, 1, workers, worker), worker); });
  }
  // Calls body(panel, worker).
  template <class Body>
  void each(int64_t panels, const Body& body) const {
    split(panels, [&](Range part, int64_t worker) {
      for (int64_t p = part.begin; p < part.end; p++) body(p, worker);
    });
  }
};

// Sequences know nothing of each other, so threads best take some of them each, through all steps.
// Where those would be too few to pay for reading the weights at every step, or packing them for a
// single one, threads share the columns of each step instead.
struct Crew {
  int64_t chunks = 1, team = 1;
  int64_t height = 1;  // sequences of the largest chunk
  int64_t workers() const { return chunks * team; }

  Crew(const LstmCall& op, const TwinfuseContext& context) {
    constexpr double kWorthAMeeting = 1e6;
    constexpr int64_t kFewRows = 8;
    const double step = 4.0 * static_cast<double>(op.batch) * static_cast<double>(op.units) *
                        static_cast<double>(op.state);
    const double all = 4.0 * static_cast<double>(op.rows) * static_cast<double>(op.units) *
                       static_cast<double>(op.state + op.inputs);
    const int64_t worth = worth_waking(context, all);
    if (op.steps == 1 || (op.batch < kFewRows * worth && step > kWorthAMeeting))
      team = worth;
    else
      chunks = max64(min64(worth, op.batch), 1);
    const Range all_steps{0, op.steps};
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      height = max64(height, cut(op, all_steps, chunk + 1) - cut(op, all_steps, chunk));
  }

  // Calls body(range of sequences, chunk, team), for the steps at `times`.
  template <class Body>
  void run(const LstmCall& op, Range times, const TwinfuseContext& context,
           const Body& body) const {
    parallel_for(context, chunks, [&](int64_t chunk) {
      body(Range{cut(op, times, chunk), cut(op, times, chunk + 1)}, chunk, Team{context, team});
    });
  }

 private:
  // How many sequences the first `count` chunks take: such that they have nearly their share of
  // these steps. Packed sequences come with the longest first.
  int64_t cut(const LstmCall& op, Range times, int64_t count) const {
    if (!op.options.batch_sizes || count == chunks) return op.batch * count / chunks;
    const int64_t* sizes = op.options.batch_sizes + times.begin;
    int64_t sequences = 0, length = times.end - times.begin, all = 0;
    for (int64_t t = 0; t < length; t++) all += sizes[t];
    const int64_t share = all / chunks * count;
    for (int64_t rows = 0; rows < share; sequences++) {
      while (sizes[length - 1] <= sequences) length--;
      rows += length;
    }
    return sequences;
  }
};

// Sums of the gates of some rows, in panels of one vector of units: [panel][row][gate][lane], or
// where each gate has a product of its own, [panel][gate][row][lane].
template <class Acc>
struct GateSums {
  static constexpr int64_t kWidth = Simd<Acc>::kWidth, kGates = 4;

  Acc* data;
  int64_t rows;
  bool by_gate;

  int64_t row_stride() const { return by_gate ? kWidth : kGates * kWidth; }
  int64_t gate_stride() const { return by_gate ? rows * kWidth : kWidth; }
  Acc* at(int64_t panel, int64_t row) const {
    return data + panel * rows * kGates * kWidth + row * row_stride();
  }
};

// Rows of packed elements, `apart` bytes from each other; those for the next gate `gate` bytes on.
struct StepRows {
  const void* data;
  int64_t apart, gate;
};

// The rows of one gate.
template <class T>
Matrix of_gate(const Matrix& weights, int gate, int64_t units) {
  return {static_cast<T*>(weights.data) + gate * units * weights.row_stride, units, weights.cols,
          weights.row_stride, weights.col_stride};
}

// The weights of one product at each step, as they are kept.
template <class T>
class StepWeights : public Resident<T> {
  using Acc = typename Engine<T>::Acc;

 public:
  StepWeights(const Matrix& m, bool transposed, bool interleaved, const LstmCall& op,
              const Crew& crew, Space* space)
      : Resident<T>(m, transposed, interleaved), kept_(op.steps > 1), workers_(crew.workers()) {
    packed_ =
        space->take(m.data ? Resident<T>::bytes(kept_ ? Resident<T>::panels() : workers_) : 0);
  }

  // Every worker has `bytes` of `transpose`: transpose_bytes() or more.
  void prepare(const TwinfuseContext& context, char* base, char* transpose, int64_t bytes) {
    transpose_ = transpose, transpose_bytes_ = bytes;
    this->place(base + packed_);
    if (!kept_) return;
    parallel_for(context, workers_, [&](int64_t worker) {
      const Range part = part_of(this->panels(), 1, workers_, worker);
      for (int64_t p = part.begin; p < part.end; p++) this->pack(p, p, scratch(worker));
    });
  }

  void multiply(const StepRows& rows, int64_t n, int64_t panel, int64_t worker, Acc* sums,
                bool continued) const {
    const bool prefetches = kept_ && this->bytes(this->panels()) > kCached;
    Resident<T>::multiply(rows.data, rows.apart, n, panel, slot(panel, worker), prefetches, sums,
                          continued);
  }
  // Of the gates, to `row` and those behind it.
  void multiply(const StepRows& rows, int64_t n, int64_t panel, int64_t worker,
                const GateSums<Acc>& sums, int64_t row, bool continued) const {
    Acc* to = sums.at(panel, row);
    if (!sums.by_gate) return multiply(rows, n, panel, worker, to, continued);
    const int64_t packed = slot(panel, worker);
    for (int gate = 0; gate < GateSums<Acc>::kGates; gate++)
      this->multiply_gate(gate, static_cast<const char*>(rows.data) + gate * rows.gate, rows.apart,
                          n, panel, packed, to + gate * sums.gate_stride(), continued);
  }

 private:
  int64_t slot(int64_t panel, int64_t worker) const {
    if (kept_) return panel;
    this->pack(panel, worker, scratch(worker));
    return worker;
  }
  char* scratch(int64_t worker) const { return transpose_ + worker * transpose_bytes_; }

  // More than the second-level cache keeps from step to step.
  static constexpr int64_t kCached = 512 << 10;

  const bool kept_;
  const int64_t workers_;
  int64_t packed_;
  char* transpose_ = nullptr;
  int64_t transpose_bytes_ = 0;
};

// The first `n` of a row with any stride, or a whole vector.
template <class T>
__attribute__((always_inline)) inline typename Convert<T>::V load_strided(const T* p,
                                                                          int64_t stride, int n) {
  using C = Convert<T>;
  constexpr int kWidth = C::S::kWidth;
  if (stride == 1) return n == kWidth ? C::load(p) : C::load(p, n);
  T piece[kWidth] = {};
  for (int i = 0; i < n; i++) piece[i] = p[i * stride];
  return C::load(piece);
}

template <class T>
void copy_strided(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    memcpy(static_cast<void*>(to), from, n * sizeof(T));
    return;
  }
  for (int64_t k = 0; k < n; k++) to[k * to_stride] = from[k * from_stride];
}

// A row times the factors of a dropout: rounded to the type of the row, whatever it goes to.
template <class T, class To>
void multiply_row(const T* row, int64_t stride, const T* factors, int64_t factor_stride, int64_t n,
                  To* to) {
  using C = Convert<T>;
  constexpr int kWidth = C::S::kWidth;
  for (int64_t k = 0; k < n; k += kWidth) {
    const int count = static_cast<int>(min64(kWidth, n - k));
    T dropped[kWidth];
    C::store(dropped, load_strided(row + k * stride, stride, count) *
                          load_strided(factors + k * factor_stride, factor_stride, count));
    Convert<To>::store(to + k, C::load(dropped), count);
  }
}

template <class T>
__attribute__((always_inline)) inline void store_strided(T* p, int64_t stride,
                                                         typename Convert<T>::V x, int n) {
  using C = Convert<T>;
  constexpr int kWidth = C::S::kWidth;
  if (stride == 1) return n == kWidth ? C::store(p, x) : C::store(p, x, n);
  T piece[kWidth];
  C::store(piece, x);
  for (int i = 0; i < n; i++) p[i * stride] = piece[i];
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
