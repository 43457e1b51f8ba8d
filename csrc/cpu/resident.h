// Weights that many products share: packed once and kept for all of them, or where there is but
// one, packed a panel at a time.
#pragma once

#include "cpu/microkernel.h"
#include "cpu/scratch.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// The right-hand side of products sum over r of a(i, r) * b(r, j), in panels of columns. A panel of
// `interleaved` weights holds the same stretch of all four gates side by side, one vector of each,
// so that a tile of sums has all that a unit of the LSTM needs.
template <class T>
class Resident {
  using E = Engine<T>;
  using Arithmetic = typename E::Arithmetic;
  using Acc = typename E::Acc;
  using Unit = typename E::Unit;
  using Packed = typename E::Packed;

 public:
  static constexpr int64_t kWidth = E::S::kWidth;
  static constexpr int kGates = kMaxVectors;
  // What all tiles of rows use before the next: whole runs of every length.
  static constexpr int64_t kBlockSteps = 512, kLine = 64;
  static_assert(kBlockSteps % (kLongestRun * E::kRun) == 0, "a block must consist of whole runs");

  // b(r, j) = m[j, r], or with `transposed` m[r, j]. Without data there is nothing to multiply.
  Resident(const Matrix& m, bool transposed, bool interleaved)
      : depth_(transposed ? m.rows : m.cols),
        cols_(transposed ? m.cols : m.rows),
        interleaved_(interleaved) {
    const int64_t column = transposed ? m.col_stride : m.row_stride;
    const int64_t row = transposed ? m.row_stride : m.col_stride;
    cols_outer_ = m.data && (column != 1 || depth_ == 1);
    if (!m.data) depth_ = cols_ = 0;
    source_ = {static_cast<const T*>(m.data),
               cols_outer_ ? column : row,
               cols_outer_ ? row : column,
               nullptr,
               0,
               0,
               0,
               nullptr};
  }

  int64_t panels() const { return ceil_div(interleaved_ ? cols_ / kGates : cols_, stretch()); }
  // Columns of the panel that sums have: whole vectors.
  int64_t width(int64_t panel) const { return vectors(panel) * kWidth; }
  int64_t panel_width() const { return kMaxVectors * kWidth; }

  // With room for all panels, or for one that each worker packs before it is used.
  int64_t bytes(int64_t slots) const { return round_up(slots * panel_units() * sizeof(Unit), 64); }
  int64_t transpose_bytes() const {
    return cols_outer_ ? round_up(transpose_scratch<T>(depth_) * sizeof(Packed), 64) : 0;
  }

  void place(char* space) { packed_ = reinterpret_cast<Unit*>(space); }

  // `scratch` holds transpose_bytes().
  void pack(int64_t panel, int64_t slot, char* scratch) const {
    Unit* to = packed_ + slot * panel_units();
    const int64_t step = width(panel);
    for (int v = 0; v < vectors(panel); v++, to += kWidth) {
      int64_t first = panel * panel_width() + v * kWidth, end = cols_;
      if (interleaved_) {
        const int64_t units = cols_ / kGates;
        first = v * units + panel * kWidth, end = (v + 1) * units;
      }
      const int64_t n = max64(min64(kWidth, end - first), 0);
      if (cols_outer_) {
        pack_transposed(source_, 0, depth_, first, n, kWidth, to, step,
                        reinterpret_cast<Packed*>(scratch));
      } else {
        Lines<T> lines(source_, 0);
        pack_steps(lines, depth_, first, n, kWidth, to, step);
      }
    }
  }

  // sums[i][width] (+)= the products of one panel with `n` rows of packed elements, `row` bytes
  // apart. `prefetches`: the panel in the next slot will be needed next, and the caches do not hold
  // it.
  void multiply(const void* rows, int64_t row, int64_t n, int64_t panel, int64_t slot,
                bool prefetches, Acc* sums, bool continued) const {
    multiply(rows, row, n, panel, slot, 0, vectors(panel), prefetches, sums, continued);
  }

  // sums[i][kWidth] (+)= those of one gate of interleaved weights.
  void multiply_gate(int gate, const void* rows, int64_t row, int64_t n, int64_t panel,
                     int64_t slot, Acc* sums, bool continued) const {
    multiply(rows, row, n, panel, slot, gate, 1, false, sums, continued);
  }

 private:
  void multiply(const void* rows, int64_t row, int64_t n, int64_t panel, int64_t slot, int first,
                int vectors, bool prefetches, Acc* sums, bool continued) const {
    Operands in{};
    in.run = run_of<Arithmetic>(depth_);
    in.a_row = row, in.a_step = sizeof(Unit);
    in.b = reinterpret_cast<const char*>(packed_ + slot * panel_units() + first * kWidth);
    in.b_step = width(panel) * static_cast<int64_t>(sizeof(Unit));
    in.continued = continued;
    const char* a = static_cast<const char*>(rows);
    const int64_t tiles = ceil_div(n, max_rows(vectors));
    int64_t done = 0;
    do {
      in.steps = min64(steps() - done, kBlockSteps);
      const char* ahead = in.b + in.steps * in.b_step;
      for (int64_t t = 0; t < tiles; t++) {
        const Range part = part_of(n, E::kRowUnit, tiles, t);
        const int height = static_cast<int>(part.end - part.begin);
        in.rows = height;
        in.a = a + part.begin * row;
        in.ahead = ahead + t * in.steps * kLine;
        const auto kernel = prefetches && vectors == kMaxVectors
                                ? prefetching_microkernel_for<Arithmetic, kMaxVectors>(height)
                                : microkernel_for<Arithmetic>(InSlab::kNone, height, vectors);
        kernel(in, sums + part.begin * vectors * kWidth, nullptr);
      }
      a += in.steps * in.a_step;
      in.b = ahead;
      in.continued = true;
      done += in.steps;
    } while (done < steps());
  }

  // Of one vector if interleaved, else of a panel.
  int64_t stretch() const { return interleaved_ ? kWidth : panel_width(); }
  int64_t steps() const { return steps_of<T>(depth_); }
  // Transposing writes up to three steps past the last.
  int64_t panel_units() const { return (steps() + 3) * panel_width(); }
  int vectors(int64_t panel) const {
    if (interleaved_) return kGates;
    return vectors_for(cols_ - panel * panel_width(), kWidth);
  }

  int64_t depth_, cols_;
  bool interleaved_, cols_outer_;
  Source<T> source_;
  Unit* packed_ = nullptr;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
