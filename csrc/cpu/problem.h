// The one problem that every op is made of, and how it is cut for threads.
#pragma once

#include "cpu/engine.h"
#include "cpu/source.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// out[i, j] = epilogue(sum over r of a(i, r) * b(r, j)).
template <class T>
struct Gemm {
  int64_t rows, cols, depth;
  Source<T> a;
  bool a_rows_outer;  // a's outer dimension is i (else it is the reduced one)
  Source<T> b;
  bool b_cols_outer;  // b's outer dimension is j (else it is the reduced one)
  T* out;             // [rows, cols], unit stride along j
  int64_t out_row;
  const T* bias;  // [cols] or nullptr
  int64_t bias_stride;
  // Sums of one operand over the reduced dimension, for bias gradients: [rows] of a or [cols] of b.
  typename Engine<T>::Acc *a_sums, *b_sums;
};

// How a problem is cut for `threads` threads.
struct Grid {
  int64_t row_chunks, col_chunks;
  int64_t count() const { return row_chunks * col_chunks; }
};

template <class T>
Grid plan_grid(const Gemm<T>& g, int32_t threads) {
  constexpr int64_t kPanelColumns = 2 * Engine<T>::S::kWidth;
  // Below this many multiply-adds, waking another thread costs more than it saves.
  constexpr double kWorthAThread = 4e5;
  double work = static_cast<double>(g.rows) * static_cast<double>(g.cols) *
                static_cast<double>(max64(g.depth, 1));
  const double worth = work / kWorthAThread;
  const int64_t most = worth >= threads ? max64(threads, 1) : 1 + static_cast<int64_t>(worth);
  Grid best{1, 1};
  double best_cost = 0;
  for (int64_t r = 1; r <= most; r++) {
    int64_t c = most / r;
    // Per chunk and step: vector operations of the tiles, then packing of both operands.
    double rows = static_cast<double>(ceil_div(g.rows, r));
    double cols = static_cast<double>(round_up(ceil_div(g.cols, c), kPanelColumns));
    double cost = rows * cols / Engine<T>::S::kWidth + 0.1 * rows + 0.4 * cols;
    if (r == 1 || cost < best_cost) best = {min64(r, max64(g.rows, 1)), c}, best_cost = cost;
  }
  best.col_chunks = min64(best.col_chunks, ceil_div(max64(g.cols, 1), kPanelColumns));
  return best;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
