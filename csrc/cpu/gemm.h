// Running a problem: one chunk of it per thread, in scratch that the framework lends.
#pragma once

#include "cpu/chunk.h"
#include "cpu/parallel.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T, class Epilogue>
TwinfuseStatus run_gemm(const Gemm<T>& g, const TwinfuseContext& context) {
  if (g.rows == 0 || g.cols == 0) return TWINFUSE_OK;
  Grid grid = plan_grid(g, context.num_threads);
  Scratch<T> layout(g, grid);
  // A small problem is over before an allocator would have answered.
  constexpr int64_t kOnStack = 32 * 1024;
  alignas(64) char stack[kOnStack];
  char* space = stack;
  if (layout.total * grid.count() > kOnStack) {
    space = static_cast<char*>(
        context.allocate(context.opaque, static_cast<size_t>(layout.total * grid.count() + 64)));
    if (!space) return TWINFUSE_OUT_OF_MEMORY;
    space += -reinterpret_cast<uintptr_t>(space) & 63;
  }
  constexpr int64_t kAlign = 2 * Engine<T>::S::kWidth;
  int64_t chunk_cols = round_up(ceil_div(g.cols, grid.col_chunks), kAlign);
  parallel_for(context, grid.count(), [&](int64_t index) {
    int64_t r = index / grid.col_chunks, c = index % grid.col_chunks;
    int64_t i0 = g.rows * r / grid.row_chunks, i1 = g.rows * (r + 1) / grid.row_chunks;
    int64_t j0 = min64(g.cols, chunk_cols * c), j1 = min64(g.cols, j0 + chunk_cols);
    Chunk<T, Epilogue> chunk(g, layout, space + index * layout.total);
    chunk.run(i0, i1, j0, j1, g.a_sums && c == 0, g.b_sums && r == 0);
  });
  return TWINFUSE_OK;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
