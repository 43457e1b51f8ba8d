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
  static constexpr int64_t kMost = INT64_MAX / 2;

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
  int64_t rows_apart() const {
    return op.options.batch_major && !op.options.batch_sizes ? op.steps : 1;
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
    constexpr double kWorthAThread = 4e5, kWorthAMeeting = 1e6;
    constexpr int64_t kFewRows = 8;
    const double step = 4.0 * static_cast<double>(op.batch) * static_cast<double>(op.units) *
                        static_cast<double>(op.state);
    const double all = 4.0 * static_cast<double>(op.rows) * static_cast<double>(op.units) *
                       static_cast<double>(op.state + op.inputs);
    const int64_t threads = max64(context.num_threads, 1);
    const int64_t worth = all >= kWorthAThread * static_cast<double>(threads)
                              ? threads
                              : 1 + static_cast<int64_t>(all / kWorthAThread);
    if (op.steps == 1 || (op.batch < kFewRows * worth && step > kWorthAMeeting))
      team = worth;
    else
      chunks = max64(min64(worth, op.batch), 1);
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      height = max64(height, cut(op, chunk + 1) - cut(op, chunk));
  }

  // Calls body(range of sequences, chunk, team).
  template <class Body>
  void run(const LstmCall& op, const TwinfuseContext& context, const Body& body) const {
    parallel_for(context, chunks, [&](int64_t chunk) {
      body(Range{cut(op, chunk), cut(op, chunk + 1)}, chunk, Team{context, team});
    });
  }

 private:
  // How many sequences the first `count` chunks take: such that they have nearly their share of all
  // steps. Packed sequences come with the longest first.
  int64_t cut(const LstmCall& op, int64_t count) const {
    const int64_t* sizes = op.options.batch_sizes;
    if (!sizes || count == chunks) return op.batch * count / chunks;
    const int64_t share = op.rows / chunks * count;
    int64_t sequences = 0, length = op.steps;
    for (int64_t rows = 0; rows < share; sequences++) {
      while (sizes[length - 1] <= sequences) length--;
      rows += length;
    }
    return sequences;
  }
};

// The weights of one product at each step, as they are kept.
template <class T>
class StepWeights : public Resident<T> {
 public:
  StepWeights(const Matrix& m, bool transposed, bool interleaved, const LstmCall& op,
              const Crew& crew, Space* space)
      : Resident<T>(m, transposed, interleaved), kept_(op.steps > 1), workers_(crew.workers()) {
    packed_ = space->take(Resident<T>::bytes(kept_ ? Resident<T>::panels() : workers_));
    scratch_ = space->take(workers_ * Resident<T>::transpose_bytes());
  }

  void prepare(const TwinfuseContext& context, char* base) {
    base_ = base;
    this->place(base + packed_);
    if (!kept_) return;
    parallel_for(context, workers_, [&](int64_t worker) {
      const Range part = part_of(this->panels(), 1, workers_, worker);
      for (int64_t p = part.begin; p < part.end; p++) this->pack(p, p, scratch(worker));
    });
  }

  void multiply(const void* rows, int64_t row, int64_t n, int64_t panel, int64_t worker,
                typename Engine<T>::Acc* sums, bool continued) const {
    if (!kept_) this->pack(panel, worker, scratch(worker));
    const bool prefetches = kept_ && this->bytes(this->panels()) > kCached;
    Resident<T>::multiply(rows, row, n, panel, kept_ ? panel : worker, prefetches, sums, continued);
  }

 private:
  char* scratch(int64_t worker) const {
    return base_ + scratch_ + worker * Resident<T>::transpose_bytes();
  }

  // More than the second-level cache keeps from step to step.
  static constexpr int64_t kCached = 512 << 10;

  const bool kept_;
  const int64_t workers_;
  int64_t packed_, scratch_;
  char* base_ = nullptr;
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
