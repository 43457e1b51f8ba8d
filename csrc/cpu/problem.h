// The one problem that every op is made of, and how it is cut for threads.
#pragma once

#include "cpu/engine.h"
#include "cpu/parallel.h"
#include "cpu/slab.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Equal problems side by side, such as the images or the groups of a convolution: how many, and how
// far apart their operands lie.
struct Batch {
  int64_t count = 1;
  int64_t a = 0, a_mask = 0, b = 0, b_mask = 0, out = 0, bias = 0, sums = 0;
};

// Which part of its sums a problem makes: all of them, or what follows on the parts before it.
template <class Acc>
struct PartOfSums {
  int64_t depth = 0;  // of all parts together; 0: there is this one alone
  bool first = true, last = true;
  // [rows][Scratch::partial_stride]: where they wait for the next part. Without it, in the output.
  Acc* waiting = nullptr;
};

// out[i, j] = epilogue(sum over r of a(i, r) * b(r, j)).
template <class T>
struct Gemm {
  int64_t rows, cols, depth;
  Source<T> a;
  bool a_rows_outer;  // a's outer dimension is i (else it is the reduced one)
  Source<T> b;
  bool b_cols_outer;       // b's outer dimension is j (else it is the reduced one)
  T* out;                  // [rows, cols], unit stride along j
  int64_t out_row;         // stride along i
  const Scatter* scatter;  // replaces both strides
  const T* bias;           // [cols] or [rows], or nullptr
  int64_t bias_stride;
  bool bias_of_rows;
  // Sums of one operand over the reduced dimension, for bias gradients: [rows] of a or [cols] of b.
  typename Engine<T>::Acc *a_sums, *b_sums;
  Batch batch[2];
  // With others: one split, no epilogue, and sums of an operand go on from what is there.
  PartOfSums<typename Engine<T>::Acc> part;
  // Pieces of the reduced dimension that may be summed at the same time.
  int64_t splits = 1;
  // What reads `a` or `b` by windows. With the windows as rows or columns, the taps are reduced,
  // and the rows or columns of a chunk are whole rows of windows; with the taps as rows or columns,
  // the windows are reduced.
  const Slab *a_slab, *b_slab;
  bool slab_reduces_taps;
  // Panels end with the rows of an image: columns of the slab behind them are skipped.
  bool row_panels;
  // Chunks are made of whole units.
  int64_t row_unit = Engine<T>::kRowUnit == 1 ? 1 : 2 * Engine<T>::kRowUnit;
  int64_t col_unit = 2 * Engine<T>::S::kWidth;

  int64_t problems() const { return batch[0].count * batch[1].count; }
  bool empty() const { return rows == 0 || cols == 0 || problems() == 0; }

  Gemm problem(int64_t index) const {
    Gemm g = *this;
    const int64_t at[2] = {index / batch[1].count, index % batch[1].count};
    for (int d = 0; d < 2; d++) {
      g.a.data += at[d] * batch[d].a;
      g.b.data += at[d] * batch[d].b;
      if (g.a.mask) g.a.mask += at[d] * batch[d].a_mask;
      if (g.b.mask) g.b.mask += at[d] * batch[d].b_mask;
      g.out += at[d] * batch[d].out;
      if (g.bias) g.bias += at[d] * batch[d].bias;
      if (g.a_sums) g.a_sums += at[d] * batch[d].sums;
      if (g.b_sums) g.b_sums += at[d] * batch[d].sums;
    }
    return g;
  }
};

template <class T>
int64_t split_length(int64_t depth, int64_t splits) {
  constexpr int64_t kUnit = kLongestRun * Engine<T>::kRun * Engine<T>::kGroup;
  return round_up(max64(ceil_div(depth, splits), 1), kUnit);
}

// Into how many pieces a sum over `depth` rows of a gradient with `channels` channels is cut, so
// that many threads find work in a small weight, and each reads whole rows where there are many. By
// the shape alone: results must not depend on threads.
template <class T>
int64_t count_splits(int64_t channels, int64_t depth) {
  constexpr int64_t kMost = 16, kChannels = 64, kLeastLength = 2048, kLengthPerChannel = 4;
  const int64_t wanted = kMost / max64(ceil_div(channels, kChannels), 1);
  const int64_t count =
      max64(1, min64(wanted, depth / max64(kLeastLength, kLengthPerChannel * channels)));
  return max64(ceil_div(depth, split_length<T>(depth, count)), 1);
}

// How each problem is cut, and how many threads work on all of them.
struct Grid {
  int64_t row_chunks = 1, col_chunks = 1;
  int64_t workers = 1;
  int64_t count() const { return row_chunks * col_chunks; }
};

// Part `index` of `count` parts of `size` elements, in whole units.
inline Range part_of(int64_t size, int64_t unit, int64_t count, int64_t index) {
  const int64_t units = ceil_div(size, unit);
  return {min64(size, units * index / count * unit),
          min64(size, units * (index + 1) / count * unit)};
}

template <class T>
Grid plan_grid(const Gemm<T>& g, const TwinfuseContext& context) {
  const int64_t problems = max64(g.problems(), 1) * g.splits;
  const double work = static_cast<double>(g.rows) * static_cast<double>(g.cols) *
                      static_cast<double>(max64(g.depth, 1)) * static_cast<double>(g.problems());
  const int64_t workers = worth_waking(context, work);
  // As few pieces of each problem as give every worker nearly the same number of them.
  int64_t most = 1;
  while (most < workers && uneven(problems * most, workers)) most++;
  // Not a quarter, by which gradients of gates, four times as many as units, would be cut either
  // way: packed rows are more scratch than packed columns.
  double row_packing = 0.12, col_packing = 0.4;
  if (g.a_slab && g.slab_reduces_taps) row_packing *= g.a_slab->copies() / g.depth;
  if (g.b_slab && g.slab_reduces_taps) col_packing *= g.b_slab->copies() / g.depth;
  Grid best;
  double best_cost = 0;
  for (int64_t r = 1; r <= most; r++) {
    int64_t c = most / r;
    // Per chunk and step: vector operations of the tiles, then packing of both operands.
    double rows = static_cast<double>(ceil_div(ceil_div(g.rows, g.row_unit), r) * g.row_unit);
    double cols = static_cast<double>(ceil_div(ceil_div(g.cols, g.col_unit), c) * g.col_unit);
    double cost = rows * cols / Engine<T>::S::kWidth + row_packing * rows + col_packing * cols;
    if (r == 1 || cost < best_cost) best.row_chunks = r, best.col_chunks = c, best_cost = cost;
  }
  best.row_chunks = min64(best.row_chunks, max64(ceil_div(g.rows, g.row_unit), 1));
  best.col_chunks = min64(best.col_chunks, max64(ceil_div(g.cols, g.col_unit), 1));
  best.workers = min64(workers, problems * best.count());
  return best;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
