// Scratch memory of one worker, and the blocks that fit into the caches.
#pragma once

#include "cpu/microkernel.h"
#include "cpu/pack.h"
#include "cpu/slab_reader.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

constexpr int64_t kRowBlockBytes = 384 << 10;
constexpr int64_t kTallestRowBlock = 384;
constexpr int64_t kSharedRows = 1152;  // of the row blocks that share packed columns
constexpr int64_t kMostShared = 32;    // such row blocks
// Every slab streams through the packed columns: what the second-level cache does not hold, it
// would have to fetch either way.
constexpr int64_t kPackedBytes = 1152 << 10;
constexpr int64_t kColumnBlock = 256, kWidestColumnBlock = 1024;
constexpr int64_t kSlabsBytes = 4 * kSlabBytes;  // of those that share packed columns
template <class T>
constexpr int64_t kDeepestBlock = 5 * Engine<T>::kBlock;

// Sums of the blocks so far wait in the output if it is a matrix of their type.
template <class T>
bool sums_in_output(const Gemm<T>& g) {
  return std::is_same<T, typename Engine<T>::Acc>::value && !g.scatter;
}

// Weights whose rows lie side by side are packed in stretches of whole rows, which are one stretch
// of memory, where packing is much of the work: few rows use them, or they do not stay in the
// caches.
template <class T>
bool packs_whole_rows(const Gemm<T>& g) {
  constexpr int64_t kFewRows = 128, kDeep = 4096;
  if (g.b_cols_outer || g.b_slab) return false;
  if (g.a_slab) return g.slab_reduces_taps;
  const bool plain = !g.a.mask && !g.b.mask && !g.b.gather && !g.a_sums && !g.b_sums;
  // Blocks as small as these would make sums wait in scratch, if they could not in the output.
  return sums_in_output(g) && plain && g.a_rows_outer && (g.rows <= kFewRows || g.depth >= kDeep);
}

// Steps of a block of such weights.
template <class T>
int64_t whole_rows_block(int64_t chunk_cols) {
  using E = Engine<T>;
  constexpr int64_t kRuns = kLongestRun * E::kRun * E::kGroup;
  const int64_t row = min64(round_up(max64(chunk_cols, 1), 32), kWidestColumnBlock);
  const int64_t bytes = row * static_cast<int64_t>(sizeof(typename E::Packed));
  return max64(kPackedBytes / bytes / kRuns * kRuns, kRuns);
}

// Rows are packed anew for every column block, and masking while packing reads two tensors. Wide
// blocks spare that, where all scratch together is no more than a masked copy would take.
template <class T>
int64_t column_block(const Gemm<T>& g, const Grid& grid, int64_t depth, int64_t row_block) {
  const bool whole_rows = packs_whole_rows(g);
  if (whole_rows || (g.a_slab && g.slab_reduces_taps)) {
    // Packed once for all rows, or for as many images as have slabs at a time.
    const int64_t columns = kPackedBytes / (depth * sizeof(typename Engine<T>::Packed));
    return min64(whole_rows ? kWidestColumnBlock : kColumnBlock, max64(columns / 32 * 32, 32));
  }
  if (g.b_slab) return g.slab_reduces_taps ? g.b_slab->height * g.col_unit : g.cols;
  // Wide ones, too, unless sums would wait in scratch that grows with them.
  const int64_t packed = kPackedBytes / (depth * sizeof(typename Engine<T>::Packed));
  const int64_t wide = min64(max64(packed / 64 * 64, kColumnBlock), kWidestColumnBlock);
  const int64_t usual = g.depth > depth && !sums_in_output(g) ? kColumnBlock : wide;
  if ((!g.a.mask && !g.b.mask) || g.a.gather || g.b.gather || g.a_slab) return usual;
  const int64_t masked = (g.a.mask ? g.rows : g.cols) * g.depth;
  constexpr int64_t kPadding = 32;
  const int64_t columns = masked / (grid.count() * depth) - row_block - kPadding;
  return min64(kWidestColumnBlock, max64(kColumnBlock / 2, columns / 64 * 64));
}

// How much of the reduced dimension is multiplied at once: whole runs, and where an operand is
// summed as well, a multiple of kLeastBlock. `chunk_cols`: columns that one thread makes.
template <class T>
int64_t depth_block(const Gemm<T>& g, int64_t chunk_cols, int64_t images) {
  using E = Engine<T>;
  constexpr int64_t kRuns = kLongestRun * E::kRun * E::kGroup;
  static_assert(kLeastBlock<T> % kRuns == 0, "a block must consist of the longest runs");
  if (packs_whole_rows(g)) {
    const int64_t most = g.a_slab ? INT64_MAX : E::kBlock;
    return min64(whole_rows_block<T>(chunk_cols), most);
  }
  if (g.a_slab && g.slab_reduces_taps) {
    // Windows are read from a slab that stays, so that sums need not wait for more.
    const int64_t most = g.a_slab->planar ? 4 * E::kBlock : kDeepestBlock<T>;
    return max64(round_up(ceil_div(g.depth, max64(ceil_div(g.depth, most), 1)), kRuns), kRuns);
  }
  if (g.slab_reduces_taps) return E::kBlock;
  // For few rows, deep blocks would be much scratch for little.
  constexpr int64_t kFew = 16;
  if (g.b_slab && g.rows <= kFew) return kLeastBlock<T>;
  if (g.a_slab || g.b_slab) return SlabReader<T>::block(g.a_slab ? *g.a_slab : *g.b_slab, images);
  // Each step of such rows is another stretch of memory: the longer, the fewer pages are met twice.
  return g.a_rows_outer ? E::kBlock : kLeastBlock<T>;
}

// Steps that lie no further apart than this, their elements side by side, are read from as many
// lines as if they were packed. Further apart they would share cache sets.
template <class T>
constexpr int64_t kClose = 1024 / static_cast<int64_t>(sizeof(T));

// Whether a block of rows is multiplied where it lies.
template <class T>
bool reads_rows_in_place(const Gemm<T>& g, int64_t rows, int64_t depth, bool summed) {
  using E = Engine<T>;
  if (g.a_slab || !g.a.plain()) return false;
  if (!g.a_rows_outer) return kUnitsAsStored<T> && g.a.outer <= kClose<T>;
  if (summed) return false;
  // Rows a large power of two apart share cache sets: a tile of them would not stay cached, but for
  // those that are read whole lines at a time.
  const bool shares_sets =
      E::kRowUnit == 1 && g.a.outer * static_cast<int64_t>(sizeof(T)) % 2048 == 0;
  return sizeof(typename E::Packed) == sizeof(T) && depth % E::kGroup == 0 &&
         (!shares_sets || rows <= max_rows(4));
}

// Whether the only block of rows reads whole panels of columns where they lie: those that it uses
// once, or so few times that the caches still hold them, or that lie as close as if they were
// packed. What holds for a block holds for smaller ones.
template <class T>
bool reads_columns_in_place(const Gemm<T>& g, int64_t rows, int64_t depth) {
  using E = Engine<T>;
  constexpr int64_t kCached = (512 << 10) / static_cast<int64_t>(sizeof(T));
  if (g.b_slab || g.b_cols_outer || !g.b.plain()) return false;
  const int64_t most_tiles = g.b.outer <= kCached / max64(depth, 1) ? 3 : 1;
  const bool close = g.b.outer <= kClose<T>;
  return E::kGroup == 1 && sizeof(typename E::Packed) == sizeof(T) &&
         (close || ceil_div(rows, max_rows(2)) <= most_tiles);
}

// In bytes; every part starts on a cache line.
template <class T>
struct Scratch {
  using E = Engine<T>;
  using Acc = typename E::Acc;
  int64_t rows = 0, columns, slab, offsets, transpose, partial, total;
  int64_t block;  // of the reduced dimension
  int64_t row_block, column_block, shared;
  int64_t slots = 1;  // for slabs whose windows are rows

  Scratch(const Gemm<T>& g, const Grid& grid, int64_t images) {
    constexpr int64_t kUnit = sizeof(typename E::Unit), kPacked = sizeof(typename E::Packed);
    const int64_t units = ceil_div(ceil_div(g.rows, g.row_unit), grid.row_chunks);
    const int64_t all_rows = min64(g.rows, units * g.row_unit);
    const int64_t all_cols = ceil_div(ceil_div(g.cols, g.col_unit), grid.col_chunks) * g.col_unit;
    block = depth_block(g, min64(g.cols, all_cols), images);
    const int64_t depth = min64(round_up(max64(g.depth, 1), E::kGroup), block);
    // Slabs are in the caches, too.
    const int64_t row_bytes = g.b_slab ? kRowBlockBytes / 2 : kRowBlockBytes;
    row_block = min64(kTallestRowBlock, row_bytes / (depth * kPacked));
    if (g.row_unit > 1) row_block = max64(row_block / g.row_unit, 1) * g.row_unit;
    shared = min64(kMostShared, ceil_div(kSharedRows, row_block));
    column_block = twinfuse::cpu::TWINFUSE_ISA::column_block(g, grid, depth, row_block);
    int64_t slab_size = 0;
    if (g.a_slab && g.slab_reduces_taps) {
      row_block = g.a_slab->height * g.row_unit;
      shared = kMostShared;
      // Slabs are kept for the blocks of the reduced dimension to come.
      if (g.depth > block) {
        shared = min64(kMostShared, ceil_div(min64(kSharedRows, all_rows), row_block));
        shared = min64(shared, max64(kSlabsBytes / (g.a_slab->size() * kPacked), 1));
        slots = shared;
      }
      slab_size = slots * g.a_slab->size();
    } else if (g.b_slab && g.slab_reduces_taps) {
      slab_size = g.b_slab->size();
    } else if (g.a_slab || g.b_slab) {
      slab_size = SlabReader<T>::block_bytes(g.a_slab ? *g.a_slab : *g.b_slab, images) / kPacked;
    }
    // Summing packed rows reads whole vectors of them, and turning them writes these.
    const bool in_rows = g.a_rows_outer || E::kRowUnit > 1, sums_rows = g.a_sums && in_rows;
    const bool whole = sums_rows || (in_rows && !g.a_rows_outer);
    const int64_t height = round_up(min64(all_rows, row_block), whole ? E::S::kWidth : 1);
    const int64_t width = min64(min64(g.cols, all_cols), column_block);
    const int64_t packed_rows = max64(height * row_stride(depth) * kPacked,
                                      steps_of<T>(depth) * step_stride(height) * kUnit);
    const bool packs_rows = !g.a_slab && !reads_rows_in_place(g, height, g.depth, g.a_sums);
    columns = rows + aligned(packs_rows ? packed_rows : 0);
    // Of columns that no second block of rows uses, there is a panel at a time, or part of one: of
    // those that are read in place, the last one if it is not whole.
    const bool one_block = all_rows <= row_block && !g.a_slab;
    const bool in_place = one_block && reads_columns_in_place(g, all_rows, depth);
    const bool once = in_place || (one_block && g.b_cols_outer);
    const bool whole_panels = in_place && g.cols % (2 * E::S::kWidth) == 0;
    const int64_t kept_width =
        whole_panels ? 0 : panels_width(once ? min64(width, kMaxVectors * E::S::kWidth) : width);
    // Transposing writes up to three steps past the last.
    slab = columns + aligned(g.b_slab ? 0 : (steps_of<T>(depth) + 3) * kept_width * kUnit);
    // Vectors are read past the last window.
    offsets = slab + (slab_size ? aligned((slab_size + kMaxVectors * E::S::kWidth) * kPacked) : 0);
    transpose = offsets + aligned(slab_size && !g.slab_reduces_taps ? depth * sizeof(int32_t) : 0);
    const bool transposes = (g.b_cols_outer && !g.b_slab) || sums_rows;
    partial = transpose + aligned(transposes ? transpose_scratch<T>(depth) * kPacked : 0);
    const bool spills = g.splits == 1 && g.depth > block && !sums_in_output(g) && !g.part.waiting;
    const int64_t partial_rows = spills ? min64(all_rows, shared * row_block + row_block) : 0;
    total = partial + aligned(partial_rows * partial_stride(width) * sizeof(Acc));
  }

  static int64_t aligned(int64_t n) { return round_up(n, 64); }
  // Of the panels of so many columns: the last may be narrower than the others.
  static int64_t panels_width(int64_t cols) {
    constexpr int64_t kWidth = E::S::kWidth;
    const int64_t last = cols % (kMaxVectors * kWidth);
    return cols - last + (last ? vectors_for(last, kWidth) * kWidth : 0);
  }
  // An odd number of cache lines, so that neighbouring rows do not share cache sets.
  static int64_t row_stride(int64_t depth) {
    constexpr int64_t kLine = 64 / sizeof(typename E::Packed);
    return (ceil_div(depth, kLine) | 1) * kLine;
  }
  // Of rows that are read in whole units.
  static int64_t dense_row(int64_t n) { return row_stride(round_up(max64(n, 1), 2)); }
  static int64_t step_stride(int64_t rows) { return round_up(rows, 64 / sizeof(typename E::Unit)); }
  static int64_t partial_stride(int64_t cols) {
    return round_up(cols, kMaxVectors * E::S::kWidth) + 64 / sizeof(Acc);
  }
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
