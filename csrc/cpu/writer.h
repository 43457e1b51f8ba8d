// From the sums of a tile to the output, or to where they wait for those of the next block.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/microkernel.h"
#include "cpu/problem.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Elements [i, i + rows) x [j, j + cols) of a problem; the first and last block of their sums.
struct Tile {
  int64_t i, j;
  int rows, cols;
  bool first, last;
};

// Sums that wait: element (i, j) of the problem is data[(i - top) * row + j - left]. Without data
// they wait in the output.
template <class Acc>
struct Waiting {
  Acc* data = nullptr;
  int64_t row = 0, top = 0, left = 0;
};

// out[c * stride + r] = dense[r][c], for types that are summed as they are. Reads whole vectors of
// rows.
template <class T>
void store_transposed(const T* dense, int64_t row, int rows, int cols, T* out, int64_t stride) {
  if constexpr (sizeof(T) == sizeof(typename Convert<T>::Acc)) {
    constexpr int kColumns = kPieceColumns<T>;
    using S = Simd<T>;
    for (int r = 0; r < rows; r += S::kWidth)
      for (int c = 0; c < cols; c += kColumns) {
        typename S::V columns[kColumns];
        transpose<T, 1>(reinterpret_cast<const char*>(dense + r * row + c), row * sizeof(T),
                        columns);
        for (int k = 0; k < kColumns && c + k < cols; k++) {
          T* to = out + (c + k) * stride + r;
          if (rows - r >= S::kWidth)
            S::store(to, columns[k]);
          else
            S::store(to, columns[k], rows - r);
        }
      }
  }
}

template <class T, class Epilogue>
class Writer {
  using Acc = typename Convert<T>::Acc;
  static constexpr int kWidth = Simd<Acc>::kWidth;

 public:
  explicit Writer(const Gemm<T>& g) : g_(g) {}
  Waiting<Acc> waiting;

  // Before the tiles whose first column is `j`: these are prefetched and written from there on.
  void start_panel(int64_t j) {
    if (g_.scatter) panel_.start(g_.scatter->cols, j, {});
  }

  // Asks for the lines that `write` will touch, a whole microkernel ahead of it.
  void prefetch(const Tile& t) const {
    if (!g_.scatter) {
      if (t.last || !waiting.data) ask(t, g_.out + t.i * g_.out_row + t.j, g_.out_row);
    } else if (t.last && g_.scatter->rows.single() && g_.scatter->cols.stride() == 1) {
      ask(t, g_.out + t.i * g_.scatter->rows.stride() + panel_.at.offset,
          g_.scatter->rows.stride());
    }
    if (waiting.data) ask(t, partial(t), waiting.row);
  }

  // Where a tile goes that is finished where its sums are, or false: it lies in one piece, and its
  // columns side by side.
  bool direct(const Tile& t, const Acc* bias, Direct<Acc>* to) const {
    if constexpr (sizeof(T) == sizeof(Acc)) {
      T* out = g_.out + t.i * g_.out_row + t.j;
      int64_t row = g_.out_row;
      if (g_.scatter) {
        const Axis& cols = g_.scatter->cols;
        if (!g_.scatter->rows.single() || cols.stride() != 1 || t.cols > panel_.left(cols) ||
            panel_.index[kDigits - 1] + t.cols > g_.scatter->cols_used)
          return false;
        row = g_.scatter->rows.stride();
        out = g_.out + t.i * row + panel_.at.offset;
      }
      *to = {out, row, bias, g_.bias_of_rows, t.cols};
      return true;
    }
    return false;
  }

  // The sums of the blocks before.
  void resume(const Tile& t, int vectors, Acc* sums) const {
    resume_tile(destination(t), vectors, sums);
  }

  // `bias` has one element per row, or whole vectors of columns and one more vector.
  void write(const Tile& t, const Acc* sums, int vectors, const Acc* bias) const {
    Destination<T> to = destination(t);
    to.bias = bias;
    if (g_.scatter && t.last) return scatter(t, to, sums, vectors);
    finish_tile<T, Epilogue>(to, sums, vectors);
  }

 private:
  template <class P>
  static void ask(const Tile& t, const P* p, int64_t row) {
    constexpr int64_t kLine = 64 / sizeof(P);
    for (int r = 0; r < t.rows; r++)
      for (int64_t c = 0; c < t.cols; c += kLine) __builtin_prefetch(p + r * row + c, 1);
  }

  Destination<T> destination(const Tile& t) const {
    Destination<T> to{};
    to.last = t.last;
    to.rows = t.rows, to.cols = t.cols;
    to.bias_of_rows = g_.bias_of_rows;
    to.partial = partial(t), to.partial_row = waiting.row;
    if (!g_.scatter) to.out = g_.out + t.i * g_.out_row + t.j, to.out_row = g_.out_row;
    if constexpr (sizeof(T) == sizeof(Acc))
      if (!waiting.data) to.partial = to.out, to.partial_row = to.out_row;
    return to;
  }

  Acc* partial(const Tile& t) const {
    if (!waiting.data) return nullptr;
    return waiting.data + (t.i - waiting.top) * waiting.row + t.j - waiting.left;
  }

  // One piece for every stretch of rows and of columns that a stride describes.
  void scatter(const Tile& t, const Destination<T>& tile, const Acc* sums, int vectors) const {
    const Axis &rows = g_.scatter->rows, &cols = g_.scatter->cols;
    Cursor row;
    row.start(rows, t.i, {});
    for (int64_t r = 0; r < t.rows;) {
      const int64_t height = min64(t.rows - r, row.left(rows));
      Cursor col = panel_;
      for (int64_t c = 0; c < t.cols;) {
        const int64_t width = min64(t.cols - c, col.left(cols));
        const int64_t used = min64(width, g_.scatter->cols_used - col.index[kDigits - 1]);
        if (used <= 0) {
          c += width;
          col.advance(cols, width);
          continue;
        }
        Destination<T> to = tile;
        to.rows = static_cast<int>(height), to.cols = static_cast<int>(used);
        to.bias += g_.bias_of_rows ? r : c;
        to.out = g_.out + row.at.offset + col.at.offset;
        to.out_row = rows.stride();
        piece(to, sums + r * vectors * kWidth + c, vectors, cols.stride());
        c += width;
        col.advance(cols, width);
      }
      r += height;
      row.advance(rows, height);
    }
  }

  void piece(Destination<T> to, const Acc* sums, int vectors, int64_t stride) const {
    if (stride == 1 || to.cols == 1) return finish_tile<T, Epilogue>(to, sums, vectors);
    T dense[(kMaxRows + kWidth) * kMaxVectors * kWidth];
    T* out = to.out;
    const int64_t out_row = to.out_row;
    to.out = dense, to.out_row = vectors * kWidth;
    finish_tile<T, Epilogue>(to, sums, vectors);
    if (sizeof(T) == sizeof(Acc) && out_row == 1)
      return store_transposed(dense, vectors * kWidth, to.rows, to.cols, out, stride);
    if constexpr (sizeof(T) == sizeof(Acc)) {
      if (stride == 2) {
        for (int r = 0; r < to.rows; r++)
          for (int c = 0; c < to.cols; c += kWidth)
            store_even(out + r * out_row + 2 * c, Simd<T>::load(dense + r * vectors * kWidth + c),
                       static_cast<int>(min64(kWidth, to.cols - c)));
        return;
      }
    }
    for (int c = 0; c < to.cols; c++)
      for (int r = 0; r < to.rows; r++)
        out[r * out_row + c * stride] = dense[r * vectors * kWidth + c];
  }

  const Gemm<T>& g_;
  Cursor panel_{};
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
