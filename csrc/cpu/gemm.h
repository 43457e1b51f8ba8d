// Running a problem: chunks of it on several threads, in scratch that the framework lends.
#pragma once

#include "cpu/chunk.h"
#include "cpu/parallel.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

inline char* align_up(char* p) { return p + (-reinterpret_cast<uintptr_t>(p) & 63); }

// A problem and how it will be run.
template <class T>
struct Plan {
  using Acc = typename Convert<T>::Acc;
  Gemm<T> g;
  Grid grid;
  Scratch<T> layout;
  int64_t depth;  // of one split
  // Sums of one split of one problem, and then its sums of an operand.
  int64_t split_row, split_size;

  // `images` of a problem with slabs.
  Plan(const Gemm<T>& problem, const TwinfuseContext& context, int64_t images = 1)
      : g(problem), grid(plan_grid(g, context)), layout(g, grid, images) {
    // Sums that wait for the next block take less memory where more pieces follow each other.
    constexpr int64_t kWaitingBytes = 640 << 10;
    while (layout.total - layout.partial > kWaitingBytes &&
           2 * grid.col_chunks * max64(g.col_unit, kMaxVectors * Engine<T>::S::kWidth) <= g.cols) {
      grid.col_chunks *= 2;
      layout = Scratch<T>(g, grid, images);
    }
    depth = g.splits > 1 ? split_length<T>(g.depth, g.splits) : g.depth;
    split_row = Scratch<T>::partial_stride(g.cols);
    const int64_t sums = g.a_sums ? g.rows : g.b_sums ? g.cols : 0;
    split_size = g.splits > 1 ? round_up(g.rows * split_row + sums, 64) : 0;
  }
  int64_t bytes() const {
    if (g.empty()) return 0;
    return layout.total * grid.workers + tap_bytes() +
           g.problems() * g.splits * split_size * static_cast<int64_t>(sizeof(Acc));
  }
  int64_t tap_bytes() const {
    return g.slab_reduces_taps ? round_up(g.depth * sizeof(int32_t), 64) : 0;
  }
};

// Adds up what the splits or the parts of one problem left, in their order.
template <class T, class Epilogue>
void combine_splits(const Plan<T>& plan, const Gemm<T>& g, const typename Convert<T>::Acc* splits) {
  using Acc = typename Convert<T>::Acc;
  using S = Simd<Acc>;
  constexpr int kWidth = S::kWidth;
  constexpr int64_t kColumns = 2 * kWidth;
  Writer<T, Epilogue> writer(g);
  alignas(64) Acc sums[(kMaxRows * 2 + 1) * kWidth];
  alignas(64) const Acc bias[3 * kWidth] = {};
  for (int64_t j = 0; j < g.cols; j += kColumns) {
    writer.start_panel(j);
    for (int64_t i = 0; i < g.rows; i += kMaxRows) {
      const Tile tile{i,
                      j,
                      static_cast<int>(min64(kMaxRows, g.rows - i)),
                      static_cast<int>(min64(kColumns, g.cols - j)),
                      true,
                      true};
      for (int r = 0; r < tile.rows; r++)
        for (int v = 0; v < 2; v++) {
          const Acc* from = splits + (i + r) * plan.split_row + j + v * kWidth;
          typename S::V sum = S::load(from);
          for (int64_t s = 1; s < g.splits; s++)
            sum = S::add(sum, S::load(from += plan.split_size));
          S::store(sums + (r * 2 + v) * kWidth, sum);
        }
      writer.write(tile, sums, 2, bias);
    }
  }
  Acc* operand_sums = g.a_sums ? g.a_sums : g.b_sums;
  const int64_t n = g.splits == 1 ? 0 : g.a_sums ? g.rows : g.b_sums ? g.cols : 0;
  for (int64_t i = 0; i < n; i++) {
    const Acc* from = splits + g.rows * plan.split_row + i;
    SplitSum<Acc> sum;
    for (int64_t s = 0; s < g.splits; s++) sum.add(from[s * plan.split_size]);
    operand_sums[i] = sum.value();
  }
}

// `space` holds plan.bytes() and starts on a cache line.
template <class T, class Epilogue>
void run(const Plan<T>& plan, const TwinfuseContext& context, char* space) {
  using Acc = typename Convert<T>::Acc;
  if (plan.g.empty()) return;
  const Grid& grid = plan.grid;
  const int64_t splits = plan.g.splits, problems = plan.g.problems();
  Acc* const waiting = plan.g.part.waiting;
  Acc* split_space =
      waiting ? waiting
              : reinterpret_cast<Acc*>(space + plan.layout.total * grid.workers + plan.tap_bytes());
  int32_t* taps = nullptr;
  if (plan.g.slab_reduces_taps) {
    using E = Engine<T>;
    taps = reinterpret_cast<int32_t*>(space + plan.layout.total * grid.workers);
    (plan.g.a_slab ? plan.g.a_slab : plan.g.b_slab)->fill_taps(taps, sizeof(typename E::Packed));
    for (int64_t i = 1; i * E::kGroup < plan.g.depth; i++) taps[i] = taps[i * E::kGroup];
  }

  auto run_task = [&](int64_t task, char* scratch) {
    const int64_t c = task % grid.col_chunks, r = task / grid.col_chunks % grid.row_chunks;
    const int64_t split = task / grid.count() % splits, problem = task / grid.count() / splits;
    Gemm<T> g = plan.g.problem(problem);
    const Range rows = part_of(g.rows, g.row_unit, grid.row_chunks, r);
    const Range cols = part_of(g.cols, g.col_unit, grid.col_chunks, c);
    Part part;
    part.i0 = rows.begin, part.i1 = rows.end;
    part.j0 = cols.begin, part.j1 = cols.end;
    part.r0 = plan.depth * split, part.r1 = min64(g.depth, part.r0 + plan.depth);
    part.sum_a = g.a_sums && c == 0, part.sum_b = g.b_sums && r == 0;
    Acc* to = split_space + (problem * splits + split) * plan.split_size;
    if (splits > 1) {
      Acc* sums = to + g.rows * plan.split_row;
      if (g.a_sums) g.a_sums = sums;
      if (g.b_sums) g.b_sums = sums;
    }
    const Waiting<Acc> all_sums{to, plan.split_row, 0, 0};
    Chunk<T, Epilogue>(g, plan.layout, scratch, taps)
        .run(part, splits > 1 || waiting ? &all_sums : nullptr);
  };
  const int64_t tasks = problems * splits * grid.count();
  parallel_for(context, grid.workers, [&](int64_t worker) {
    char* scratch = space + worker * plan.layout.total;
    const int64_t end = tasks * (worker + 1) / grid.workers;
    for (int64_t task = tasks * worker / grid.workers; task < end; task++) run_task(task, scratch);
  });
  if (splits == 1 && !(waiting && plan.g.part.last)) return;
  parallel_for(context, min64(problems, grid.workers), [&](int64_t worker) {
    for (int64_t p = worker; p < problems; p += min64(problems, grid.workers))
      combine_splits<T, Epilogue>(plan, plan.g.problem(p),
                                  split_space + p * splits * plan.split_size);
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
