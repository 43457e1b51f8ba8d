// The products of a single step with the weights where they lie: few rows of activations use them
// once, and to store them packed would cost more than it saves. They are the rows of the products,
// and the packed activations the columns. For weights whose rows are dense, as torch's are.
#pragma once

#include "cpu/lstm_gates.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
class WeightRows {
  using E = Engine<T>;
  using Arithmetic = typename E::Arithmetic;
  using Acc = typename E::Acc;
  using Packed = typename E::Packed;
  static constexpr int64_t kWidth = E::S::kWidth;
  static constexpr int kGates = GateSums<Acc>::kGates, kMostVectors = 2;
  // With fewer sequences, most lanes of a vector of them would be empty; with more, packing the
  // weights pays.
  static constexpr int64_t kFewest = 12, kMost = 256;

 public:
  static bool serves(const LstmCall& op) {
    const LstmWeights& w = op.weights;
    return E::kGroup == 1 && sizeof(T) == sizeof(Packed) && op.steps == 1 && op.batch >= kFewest &&
           op.batch <= kMost && w.ih.col_stride == 1 && w.hh.col_stride == 1 && !w.norm.data &&
           !op.dropout_input.data && !op.dropout_hidden.data;
  }
  // Rows of sums come in whole vectors of sequences.
  static int64_t rows_of_sums(const LstmCall& op) { return round_up(op.batch, kWidth); }

  // Takes space only for what it serves.
  WeightRows(const LstmForward& op, int64_t workers, Space* space) : op_(op), workers_(workers) {
    const int64_t served = serves(op) ? pitch() : 0;
    // Packing writes up to three steps past the last.
    x_ = space->take_of<Packed>(served, op.inputs + 3);
    h_ = space->take_of<Packed>(served, op.state + 3);
    tiles_ = space->take_of<Acc>(served ? workers : 0, kTile);
    transpose_ = space->take_of<Packed>(served ? workers : 0, transpose_scratch<T>(depth()));
  }

  void place(char* base) {
    base_ = base;
    memset(base + tiles_, 0, workers_ * kTile * sizeof(Acc));
  }

  // Packs x and h of a vector of sequences, or of the last ones. `h`: dense rows, `h_row` apart.
  void pack(const T* h, int64_t h_row, Range sequences, int64_t worker) const {
    const Sequence& x = op_.input;
    const Source<T> inputs{static_cast<const T*>(x.data), x.row, x.col, nullptr, 0, 0, 0, nullptr};
    pack(inputs, op_.inputs, sequences, worker, x_);
    pack({h, h_row, 1, nullptr, 0, 0, 0, nullptr}, op_.state, sequences, worker, h_);
  }

  // The sums of all sequences for the gates of some units.
  void multiply(Units u, int64_t worker, const GateSums<Acc>& sums) const {
    Acc* tile = at<Acc>(tiles_) + worker * kTile;
    const LstmWeights& w = op_.weights;
    for (int gate = 0; gate < kGates; gate++)
      for (int64_t b = 0; b < op_.batch; b += kMostVectors * kWidth) {
        const int vectors = op_.batch - b > kWidth ? kMostVectors : 1;
        // What the caches do not hold is asked for while what comes before it is multiplied.
        const T* const then = b ? nullptr : rows(w.hh, gate, u.unit);
        const bool is_last = gate == kGates - 1;
        const T* const later =
            b ? nullptr : rows(w.ih, is_last ? 0 : gate + 1, is_last ? u.unit + kWidth : u.unit);
        multiply(w.ih, gate, u, at<Packed>(x_) + b, vectors, tile, false, then);
        multiply(w.hh, gate, u, at<Packed>(h_) + b, vectors, tile, true, later);
        Acc* to = sums.at(u.unit / kWidth, b) + gate * sums.gate_stride();
        for (int v = 0; v < vectors; v++, to += kWidth * sums.row_stride())
          transpose_rows<T>(reinterpret_cast<const char*>(tile + v * kWidth),
                            vectors * kWidth * static_cast<int64_t>(sizeof(Acc)), kWidth,
                            reinterpret_cast<typename E::Unit*>(to), sums.row_stride());
      }
  }

 private:
  static constexpr int64_t kTile = kWidth * kMostVectors * kWidth;  // [unit][sequence]

  int64_t pitch() const { return rows_of_sums(op_); }

  int64_t depth() const { return max64(op_.inputs, op_.state); }

  void pack(const Source<T>& rows, int64_t depth, Range sequences, int64_t worker,
            int64_t to) const {
    pack_transposed(rows, 0, depth, sequences.begin, sequences.end - sequences.begin, kWidth,
                    at<typename E::Unit>(to) + sequences.begin, pitch(),
                    at<Packed>(transpose_) + worker * transpose_scratch<T>(this->depth()));
  }

  const T* rows(const Matrix& weights, int gate, int64_t unit) const {
    return static_cast<const T*>(weights.data) + (gate * op_.units + unit) * weights.row_stride;
  }

  void multiply(const Matrix& weights, int gate, Units u, const Packed* columns, int vectors,
                Acc* tile, bool continued, const T* next) const {
    Operands in{};
    in.steps = weights.cols, in.run = run_of<Arithmetic>(weights.cols);
    in.a_row = weights.row_stride * static_cast<int64_t>(sizeof(T)), in.a_step = sizeof(T);
    in.b = reinterpret_cast<const char*>(columns);
    in.b_step = pitch() * static_cast<int64_t>(sizeof(Packed));
    in.continued = continued;
    const int64_t tiles = ceil_div(u.n, max_rows(vectors));
    for (int64_t t = 0; t < tiles; t++) {
      const Range part = part_of(u.n, 1, tiles, t);
      in.a = reinterpret_cast<const char*>(rows(weights, gate, u.unit) +
                                           part.begin * weights.row_stride);
      const int height = static_cast<int>(part.end - part.begin);
      auto kernel = microkernel_for<Arithmetic>(InSlab::kNone, height, vectors);
      if constexpr (E::kGroup == 1) {  // what is served
        if (next && vectors == kMostVectors) {
          in.ahead = reinterpret_cast<const char*>(next) + part.begin * in.a_row;
          kernel = prefetching_microkernel_for<Arithmetic, kMostVectors>(height);
        }
      }
      kernel(in, tile + part.begin * vectors * kWidth, nullptr);
    }
  }

  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(base_ + offset);
  }

  const LstmForward& op_;
  const int64_t workers_;
  int64_t x_, h_, tiles_, transpose_;
  char* base_ = nullptr;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
