// Running a problem: one chunk of it per thread, in scratch that the framework lends.
#pragma once

#include "cpu/chunk.h"
#include "cpu/parallel.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

inline char* align_up(char* p) { return p + (-reinterpret_cast<uintptr_t>(p) & 63); }

// A problem and how it will be run.
template <class T>
struct Plan {
  Gemm<T> g;
  Grid grid;
  Scratch<T> layout;

  Plan(const Gemm<T>& g, const TwinfuseContext& context)
      : g(g), grid(plan_grid(g, context.num_threads)), layout(g, grid) {}
  bool empty() const { return g.rows == 0 || g.cols == 0; }
  int64_t bytes() const { return empty() ? 0 : layout.total * grid.count(); }
};

// `space` holds plan.bytes() and starts on a cache line.
template <class T, class Epilogue>
void run(const Plan<T>& plan, const TwinfuseContext& context, char* space) {
  if (plan.empty()) return;
  const Gemm<T>& g = plan.g;
  const Grid& grid = plan.grid;
  constexpr int64_t kAlign = 2 * Engine<T>::S::kWidth;
  const int64_t chunk_cols = round_up(ceil_div(g.cols, grid.col_chunks), kAlign);
  parallel_for(context, grid.count(), [&](int64_t index) {
    const int64_t r = index / grid.col_chunks, c = index % grid.col_chunks;
    const int64_t i0 = g.rows * r / grid.row_chunks, i1 = g.rows * (r + 1) / grid.row_chunks;
    const int64_t j0 = min64(g.cols, chunk_cols * c), j1 = min64(g.cols, j0 + chunk_cols);
    Chunk<T, Epilogue> chunk(g, plan.layout, space + index * plan.layout.total);
    chunk.run(i0, i1, j0, j1, g.a_sums && c == 0, g.b_sums && r == 0);
  });
}

// Calls `body(space)` with `bytes` of scratch. A small problem is over before an allocator would
// have answered: its scratch lies on the stack.
template <class Body>
TwinfuseStatus with_scratch(const TwinfuseContext& context, int64_t bytes, const Body& body) {
  constexpr int64_t kOnStack = 32 * 1024;
  if (bytes <= kOnStack) {
    alignas(64) char stack[kOnStack];
    body(stack);
    return TWINFUSE_OK;
  }
  char* space =
      static_cast<char*>(context.allocate(context.opaque, static_cast<size_t>(bytes + 64)));
  if (!space) return TWINFUSE_OUT_OF_MEMORY;
  body(align_up(space));
  return TWINFUSE_OK;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
