// The main loop of every op, for one chunk: a rectangle of the output that one thread makes.
//
// Row blocks and column blocks are sized for the second-level cache, blocks of the reduced
// dimension (kBlock) by the order of summation, panels (of columns) and tiles (of rows) by the
// microkernel. Every sum is made by one thread in the same order, whatever the blocks and chunks.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/microkernel.h"
#include "cpu/pack.h"
#include "cpu/problem.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

constexpr int64_t kRowBlockBytes = 384 << 10;
constexpr int64_t kTallestRowBlock = 384;
constexpr int64_t kSharedRows = 1152;  // of the row blocks that share packed columns
constexpr int64_t kColumnBlock = 256, kWidestColumnBlock = 1024;

// Rows are packed anew for every column block, and masking while packing reads two tensors. Wide
// blocks spare that, where all scratch together is no more than a masked copy would take.
template <class T>
int64_t column_block(const Gemm<T>& g, const Grid& grid, int64_t depth, int64_t row_block) {
  if (!g.a.mask && !g.b.mask) return kColumnBlock;
  const int64_t masked = (g.a.mask ? g.rows : g.cols) * g.depth;
  constexpr int64_t kPadding = 32;
  const int64_t columns = masked / (grid.count() * depth) - row_block - kPadding;
  return min64(kWidestColumnBlock, max64(kColumnBlock / 2, columns / 64 * 64));
}

// Scratch of one chunk, in bytes; every part starts on a cache line.
template <class T>
struct Scratch {
  using E = Engine<T>;
  // Sums of the blocks so far wait in the output if it is of their type.
  static constexpr bool kSumsInOutput = sizeof(T) == sizeof(typename E::Acc);
  int64_t rows = 0, columns, transpose, partial, total;
  int64_t row_block, column_block;

  Scratch(const Gemm<T>& g, const Grid& grid) {
    constexpr int64_t kUnit = sizeof(typename E::Unit), kPacked = sizeof(typename E::Packed);
    const int64_t depth = min64(round_up(max64(g.depth, 1), E::kGroup), E::kBlock);
    row_block = min64(kTallestRowBlock, kRowBlockBytes / (depth * kPacked));
    column_block = twinfuse::cpu::TWINFUSE_ISA::column_block(g, grid, depth, row_block);
    const int64_t all_rows = ceil_div(g.rows, grid.row_chunks);
    const int64_t height = min64(all_rows, row_block);
    const int64_t width = round_up(min64(g.cols, column_block), kMaxVectors * E::S::kWidth);
    columns = rows + aligned(max64(height * row_stride(depth) * kPacked,
                                   steps_of<T>(depth) * step_stride(height) * kUnit));
    // Transposing writes up to three steps past the last.
    transpose = columns + aligned((steps_of<T>(depth) + 3) * width * kUnit);
    partial = transpose + aligned(g.b_cols_outer ? transpose_scratch<T>() * kPacked : 0);
    const bool spills = g.depth > E::kBlock && !kSumsInOutput;
    const int64_t partial_rows = spills ? min64(all_rows, kSharedRows + row_block) : 0;
    total = partial + aligned(partial_rows * partial_stride(width) * sizeof(typename E::Acc));
  }

  static int64_t aligned(int64_t n) { return round_up(n, 64); }
  // An odd number of cache lines, so that neighbouring rows do not share cache sets.
  static int64_t row_stride(int64_t depth) {
    constexpr int64_t kLine = 64 / sizeof(typename E::Packed);
    return (ceil_div(depth, kLine) | 1) * kLine;
  }
  static int64_t step_stride(int64_t rows) { return round_up(rows, 64 / sizeof(typename E::Unit)); }
  static int64_t partial_stride(int64_t cols) {
    return round_up(cols, kMaxVectors * E::S::kWidth) + 64 / sizeof(typename E::Acc);
  }
};

template <class T>
void add_sums(const typename Engine<T>::Unit* packed, int64_t stride, int64_t steps, int64_t n,
              bool first, typename Engine<T>::Acc* sums) {
  using S = typename Engine<T>::S;
  for (int64_t i = 0; i < n; i += S::kWidth) {
    typename S::V sum = S::zero();
    for (int64_t k = 0; k < steps;) {
      typename S::V run = S::zero();
      for (const int64_t end = min64(steps, k + Engine<T>::kRun); k < end; k++)
        run = Engine<T>::accumulate(run, packed + k * stride + i);
      sum = S::add(sum, run);
    }
    const int count = static_cast<int>(min64(n - i, S::kWidth));
    if (!first) sum = S::add(S::load(sums + i, count), sum);
    S::store(sums + i, sum, count);
  }
}

template <class T, class Epilogue>
class Chunk {
  using E = Engine<T>;
  using Arithmetic = typename E::Arithmetic;
  using Acc = typename E::Acc;
  using Unit = typename E::Unit;
  using Packed = typename E::Packed;
  static constexpr int kWidth = E::S::kWidth;

 public:
  Chunk(const Gemm<T>& g, const Scratch<T>& layout, char* scratch)
      : g_(g),
        row_block_(layout.row_block),
        column_block_(layout.column_block),
        row_space_(scratch + layout.rows),
        columns_(reinterpret_cast<Unit*>(scratch + layout.columns)),
        transpose_(reinterpret_cast<Packed*>(scratch + layout.transpose)),
        partial_(reinterpret_cast<Acc*>(scratch + layout.partial)) {}

  // Rows [i0, i1) and columns [j0, j1). `sum_a` and `sum_b`: this chunk makes the operand's sums.
  void run(int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool sum_a, bool sum_b) {
    const int64_t blocks = ceil_div(i1 - i0, row_block_);
    const int64_t sharing = ceil_div(kSharedRows, row_block_);
    // Blocks of equal height, but for one row.
    auto start = [&](int64_t block) {
      return i0 + (i1 - i0) / blocks * block + min64((i1 - i0) % blocks, block);
    };
    for (j_ = j0; j_ < j1; j_ += column_block_) {
      cols_ = min64(j1 - j_, column_block_);
      for (int64_t first = 0; first < blocks; first += sharing) {
        const int64_t last = min64(first + sharing, blocks);
        first_row_ = start(first);
        keep_columns_ = last - first > 1;
        for (r_ = 0; r_ == 0 || r_ < g_.depth; r_ += E::kBlock) {
          depth_ = min64(g_.depth - r_, E::kBlock);
          for (int64_t block = first; block < last; block++) {
            i_ = start(block);
            rows_ = start(block + 1) - i_;
            sum_a_ = sum_a && j_ == j0;
            sum_b_ = sum_b && block == 0;
            multiply_block();
          }
        }
      }
    }
  }

 private:
  void multiply_block() {
    in_.steps = steps_of<T>(depth_);
    to_.first = r_ == 0;
    to_.last = r_ + depth_ >= g_.depth;
    const bool plain_b = sizeof(Packed) == sizeof(T) && g_.b.inner == 1 && !g_.b.mask;
    const bool streaming = plain_b && g_.b_cols_outer && rows_ <= kStreamingRows && !keep_columns_;
    vectors_ = streaming ? 1 : rows_ <= max_rows(4) && cols_ > 2 * kWidth ? 4 : 2;
    tiles_ = ceil_div(rows_, max_rows(vectors_));
    // Read in place where a column is used once and panels are whole.
    const bool direct = E::kGroup == 1 && plain_b && !g_.b_cols_outer && tiles_ == 1 &&
                        !keep_columns_ && !g_.b_sums;
    prepare_rows();
    if (!g_.b_cols_outer && !direct && i_ == first_row_) pack_panels();
    for (int64_t j = 0; j < cols_;) {
      const int vectors = panel_vectors(cols_ - j);
      const int64_t cols = min64(cols_ - j, vectors * kWidth);
      const bool in_place = streaming && cols == kWidth;
      if (!in_place) prepare_panel(j, cols, vectors * kWidth, direct);
      multiply_panel(j, cols, vectors, in_place);
      j += cols;
    }
  }

  // Width of the panel that starts `left` columns before the end of the block.
  int panel_vectors(int64_t left) const {
    const int needed = left <= kWidth ? 1 : left <= 2 * kWidth ? 2 : 4;
    return needed < vectors_ ? needed : vectors_;
  }

  void multiply_panel(int64_t j, int64_t cols, int vectors, bool streaming) {
    alignas(64) Acc bias[kMaxVectors * kWidth] = {}, sums[kMaxRows * 2 * kWidth];
    if (to_.last && g_.bias) {
      Source<T> source{g_.bias, 0, g_.bias_stride, nullptr, 0, 0, 0};
      fetch(source, 0, j_ + j, cols, bias);
    }
    to_.bias = bias;
    to_.cols = static_cast<int>(cols);
    to_.out_row = g_.out_row;
    // Heights differ by one at most: a short last tile would leave the pipelines idle.
    const int low = static_cast<int>(rows_ / tiles_), taller = static_cast<int>(rows_ % tiles_);
    const Microkernel<Arithmetic> kernels[2] = {
        microkernel_for<Arithmetic>(low, vectors),
        taller ? microkernel_for<Arithmetic>(low + 1, vectors) : nullptr};
    for (int64_t t = 0, i = 0; t < tiles_; t++, i += to_.rows) {
      to_.rows = low + (t < taller);
      to_.out = g_.out + (i_ + i) * g_.out_row + j_ + j;
      if constexpr (Scratch<T>::kSumsInOutput) {
        to_.partial = to_.out;
        to_.partial_row = to_.out_row;
      } else {
        to_.partial_row = Scratch<T>::partial_stride(cols_);
        to_.partial = partial_ + (i_ - first_row_ + i) * to_.partial_row + j;
      }
      fetch_destination();
      in_.a = a_ + i * in_.a_row;
      if (streaming)
        multiply_streaming(j, sums);
      else
        kernels[t < taller](in_, sums);
      finish_tile<T, Epilogue>(to_, sums, vectors);
    }
  }

  // One tile of one vector with `b` where it lies; the last, incomplete run goes through a packed
  // panel.
  void multiply_streaming(int64_t j, Acc* sums) {
    const int64_t done = depth_ / (E::kRun * E::kGroup) * E::kRun, r = done * E::kGroup;
    const T* b = g_.b.data + (j_ + j) * g_.b.outer + r_;
    Operands in = in_;
    in.b = reinterpret_cast<const char*>(b);
    in.steps = done;
    const int64_t b_row = g_.b.outer * static_cast<int64_t>(sizeof(T));
    if (done) streaming_microkernel_for<Arithmetic>(to_.rows)(in, b_row, sums);
    if (done && r == depth_) return;
    pack_transposed(g_.b, r_ + r, depth_ - r, j_ + j, kWidth, kWidth, columns_, kWidth, transpose_);
    alignas(64) Acc run[kStreamingRows * kWidth];
    in.a += done * in.a_step;
    in.b = reinterpret_cast<const char*>(columns_);
    in.b_step = kWidth * sizeof(Unit);
    in.steps = in_.steps - done;
    microkernel_for<Arithmetic>(to_.rows, 1)(in, done ? run : sums);
    for (int i = 0; done && i < to_.rows * kWidth; i += kWidth)
      E::S::store(sums + i, E::S::add(E::S::load(sums + i), E::S::load(run + i)));
  }

  // Points `a_` at this block's rows: where they lie if they can be read as they are, else packed.
  void prepare_rows() {
    const Source<T>& a = g_.a;
    if (g_.a_rows_outer) {
      const bool as_is =
          sizeof(Packed) == sizeof(T) && !a.mask && a.inner == 1 && depth_ % E::kGroup == 0;
      // Rows a large power of two apart share cache sets: a tile of them would not stay cached.
      const bool shares_sets = a.outer * static_cast<int64_t>(sizeof(T)) % 2048 == 0;
      if (as_is && (!shares_sets || rows_ <= max_rows(4))) {
        a_ = reinterpret_cast<const char*>(a.data + i_ * a.outer + r_);
        in_.a_row = a.outer * static_cast<int64_t>(sizeof(T));
      } else {
        const int64_t stride = Scratch<T>::row_stride(round_up(depth_, E::kGroup));
        pack_rows(a, r_, depth_, i_, rows_, reinterpret_cast<Packed*>(row_space_), stride);
        a_ = row_space_;
        in_.a_row = stride * sizeof(Packed);
      }
      in_.a_step = sizeof(Unit);
    } else {
      const int64_t stride = Scratch<T>::step_stride(rows_);
      Unit* packed = reinterpret_cast<Unit*>(row_space_);
      pack_steps(a, r_, depth_, i_, rows_, stride, packed, stride);
      if (sum_a_) add_sums<T>(packed, stride, in_.steps, rows_, to_.first, g_.a_sums + i_);
      a_ = row_space_;
      in_.a_row = sizeof(Unit);
      in_.a_step = stride * sizeof(Unit);
    }
  }

  // All panels of the block at once, row by row: panel by panel would touch every page of `b` again
  // for each of them.
  void pack_panels() {
    alignas(64) Unit row[kWidestColumnBlock + kMaxVectors * kWidth];
    const int64_t padded = round_up(cols_, kMaxVectors * kWidth);
    for (int64_t step = 0; step < in_.steps; step++) {
      const int64_t r = step * E::kGroup;
      pack_steps(g_.b, r_ + r, min64(depth_ - r, E::kGroup), j_, cols_, padded, row, 0);
      for (int64_t j = 0; j < cols_;) {
        const int64_t width = panel_vectors(cols_ - j) * kWidth;
        memcpy(columns_ + j * in_.steps + step * width, row + j, width * sizeof(Unit));
        j += width;
      }
    }
  }

  void prepare_panel(int64_t j, int64_t cols, int64_t width, bool direct) {
    if (direct && cols == width) {
      in_.b = reinterpret_cast<const char*>(g_.b.data + r_ * g_.b.outer + j_ + j);
      in_.b_step = g_.b.outer * static_cast<int64_t>(sizeof(T));
      return;
    }
    // A panel that no other rows will use may as well stay where the one before it was.
    const bool own_place = keep_columns_ || (!g_.b_cols_outer && !direct);
    Unit* panel = columns_ + (own_place ? j * in_.steps : 0);
    if (direct)
      pack_steps(g_.b, r_, depth_, j_ + j, cols, width, panel, width);
    else if (g_.b_cols_outer && i_ == first_row_)
      pack_transposed(g_.b, r_, depth_, j_ + j, cols, width, panel, width, transpose_);
    if (sum_b_) add_sums<T>(panel, width, in_.steps, cols, to_.first, g_.b_sums + j_ + j);
    in_.b = reinterpret_cast<const char*>(panel);
    in_.b_step = width * sizeof(Unit);
  }

  // Asks for the lines that finish_tile will touch, a whole microkernel ahead of it.
  void fetch_destination() {
    for (int row = 0; row < to_.rows; row++)
      for (int64_t c = 0; c < to_.cols; c += 64 / sizeof(Acc)) {
        __builtin_prefetch(to_.partial + row * to_.partial_row + c, 1);
        if (!Scratch<T>::kSumsInOutput && to_.last)
          __builtin_prefetch(to_.out + row * to_.out_row + c, 1);
      }
  }

  const Gemm<T>& g_;
  const int64_t row_block_, column_block_;
  // The block at hand, in the problem's coordinates.
  int64_t i_ = 0, rows_ = 0, j_ = 0, cols_ = 0, r_ = 0, depth_ = 0;
  int64_t first_row_ = 0;      // of the row blocks that share packed columns
  bool keep_columns_ = false;  // there are several of those
  int64_t tiles_ = 0;
  int vectors_ = 0;  // of a whole panel
  bool sum_a_ = false, sum_b_ = false;
  Operands in_{};
  Destination<T> to_{};
  const char* a_ = nullptr;
  char* row_space_;
  Unit* columns_;
  Packed* transpose_;
  Acc* partial_;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
