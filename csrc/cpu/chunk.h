// The main loop of every op, for one chunk: a rectangle of the output that one thread makes.
//
// Blocks are sized for the second-level cache (scratch.h), panels (of columns) and tiles (of rows)
// by the microkernel. Every sum is made by one thread in the same order (engine.h), whatever the
// blocks and chunks: the next block takes up the sums of the one before.
#pragma once

#include "cpu/inside.h"
#include "cpu/scratch.h"
#include "cpu/sums.h"
#include "cpu/writer.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// A rectangle of a problem, and the part of the reduced dimension that is summed.
struct Part {
  int64_t i0, i1, j0, j1, r0, r1;
  bool sum_a, sum_b;  // it makes the sums of the operand, too
};

template <class T, class Epilogue>
class Chunk {
  using E = Engine<T>;
  using Arithmetic = typename E::Arithmetic;
  using Acc = typename E::Acc;
  using Unit = typename E::Unit;
  using Packed = typename E::Packed;
  static constexpr int kWidth = E::S::kWidth;
  static constexpr bool kFinishes =
      std::is_same<T, float>::value && std::is_same<Epilogue, BiasRelu>::value;

 public:
  // `taps`: offsets of all taps in a slab, where taps are reduced.
  Chunk(const Gemm<T>& g, const Scratch<T>& layout, char* scratch, int32_t* taps)
      : g_(g),
        layout_(layout),
        slab_kind_(g.a_slab   ? InSlab::kA
                   : g.b_slab ? InSlab::kB
                              : InSlab::kNone),
        slab_(g.a_slab ? g.a_slab : g.b_slab, g.a_slab ? g.a : g.b, scratch + layout.slab,
              taps ? taps : reinterpret_cast<int32_t*>(scratch + layout.offsets)),
        windows_are_rows_(g.a_slab && g.slab_reduces_taps),
        row_space_(scratch + layout.rows),
        columns_(reinterpret_cast<Unit*>(scratch + layout.columns)),
        transpose_(reinterpret_cast<Packed*>(scratch + layout.transpose)),
        partial_(reinterpret_cast<Acc*>(scratch + layout.partial)),
        writer_(g),
        run_(run_of<Arithmetic>(max64(g.depth, g.part.depth))),
        inside_(windows_are_rows_ ? g.a_slab : nullptr, run_) {
    in_.run = run_;
  }

  // With `all_sums`, sums over a part of the reduced dimension go there and no further.
  void run(const Part& part, const Waiting<Acc>* all_sums) {
    for (j_ = part.j0; j_ < part.j1; j_ += layout_.column_block) {
      cols_ = min64(part.j1 - j_, layout_.column_block);
      if (g_.b_slab && g_.slab_reduces_taps) slab_.fill_rows(j_, cols_, 0);
      for (int64_t i = part.i0; i < part.i1; i = starts_[blocks_]) {
        plan_blocks(i, part);
        if (all_sums)
          writer_.waiting = *all_sums;
        else if (!sums_in_output(g_))
          writer_.waiting = {partial_, Scratch<T>::partial_stride(cols_), i, j_};
        for (r_ = part.r0; r_ == part.r0 || r_ < part.r1; r_ += layout_.block) {
          depth_ = min64(part.r1 - r_, layout_.block);
          tile_.first = r_ == part.r0 && g_.part.first;
          tile_.last = !all_sums && r_ + depth_ >= part.r1;
          if (slab_kind_ != InSlab::kNone && !g_.slab_reduces_taps) slab_.fill_windows(r_, depth_);
          for (block_ = 0; block_ < blocks_; block_++) {
            i_ = starts_[block_];
            rows_ = starts_[block_ + 1] - i_;
            sum_a_ = part.sum_a && j_ == part.j0;
            sum_b_ = part.sum_b && i_ == part.i0;
            multiply_block();
          }
        }
      }
    }
  }

 private:
  // Row blocks from `i` on that share packed columns: of equal height, but for one row or unit, and
  // of one image where they are read from a slab.
  void plan_blocks(int64_t i, const Part& part) {
    starts_[0] = i;
    const int64_t left = ceil_div(part.i1 - i, g_.row_unit);
    const int64_t most = layout_.row_block / g_.row_unit, blocks = ceil_div(left, most);
    blocks_ = min64(blocks, layout_.shared);
    for (int64_t b = 0; b < blocks_; b++) {
      int64_t units = left / blocks + (b < left % blocks);
      if (windows_are_rows_) {
        const int64_t rows = g_.a_slab->rows.count;
        units = min64(most, rows - starts_[b] / g_.row_unit % rows);
      }
      starts_[b + 1] = min64(part.i1, starts_[b] + units * g_.row_unit);
      if (starts_[b + 1] == part.i1) blocks_ = b + 1;
    }
  }

  void multiply_block() {
    in_.steps = steps_of<T>(depth_);
    const bool plain_b = sizeof(Packed) == sizeof(T) && g_.b.plain() && !g_.b_slab;
    const bool keep_columns = blocks_ > 1;
    const bool streaming = plain_b && g_.b_cols_outer && rows_ <= kStreamingRows && !keep_columns &&
                           slab_kind_ == InSlab::kNone;
    segment_ = g_.a_slab ? g_.row_unit : rows_;
    vectors_ = streaming ? 1 : segment_ <= max_rows(4) && cols_ > 2 * kWidth ? 4 : 2;
    tiles_ = ceil_div(segment_, max_rows(vectors_));
    const bool direct =
        !keep_columns && segment_ == rows_ && reads_columns_in_place(g_, rows_, depth_);
    own_panels_ = keep_columns || (!g_.b_cols_outer && !direct);
    prepare_rows();
    if (!g_.b_slab && !g_.b_cols_outer && !direct && block_ == 0) pack_panels();
    for (int64_t j = 0; j < cols_;) {
      const int64_t left = panel_limit(j);
      // Between two rows of an image, with row_panels.
      if (left <= 0) {
        j += pitch() - (j_ + j) % pitch();
        continue;
      }
      const int vectors = panel_vectors(left);
      const int64_t cols = min64(left, vectors * kWidth);
      const bool in_place = streaming && cols == kWidth;
      if (g_.b_slab)
        in_.b = g_.slab_reduces_taps ? slab_.slot(0) + j * sizeof(Packed) : slab_.tap(j_ + j);
      else if (!in_place)
        prepare_panel(j, cols, vectors * kWidth, direct);
      multiply_panel(j, cols, vectors, in_place);
      j += cols;
    }
  }

  int64_t pitch() const { return g_.b_slab->pitch; }

  // Columns from `j` on that a panel may take.
  int64_t panel_limit(int64_t j) const {
    if (g_.row_panels) return min64(cols_ - j, g_.scatter->cols_used - (j_ + j) % pitch());
    if (!g_.b_slab || g_.slab_reduces_taps) return cols_ - j;
    const int64_t run = SlabReader<T>::run(*g_.b_slab);
    return min64(cols_ - j, run - (j_ + j) % run);
  }

  // Width of the panel that starts `left` columns before the end of the block.
  int panel_vectors(int64_t left) const {
    const int needed = vectors_for(left, kWidth);
    return needed < vectors_ ? needed : vectors_;
  }

  void multiply_panel(int64_t j, int64_t cols, int vectors, bool streaming) {
    // A vector more: pieces of a tile are read from anywhere on.
    alignas(64) Acc bias[(kMaxVectors + 1) * kWidth] = {}, sums[(kMaxRows * 2 + 1) * kWidth];
    if (tile_.last && g_.bias && !g_.bias_of_rows) fetch_bias(j_ + j, cols, bias);
    tile_.j = j_ + j;
    tile_.cols = static_cast<int>(cols);
    writer_.start_panel(tile_.j);
    // Heights differ by one unit at most: a short last tile would leave the pipelines idle.
    const int64_t units = ceil_div(segment_, E::kRowUnit);
    const int low = static_cast<int>(units / tiles_) * E::kRowUnit, tall = low + E::kRowUnit;
    const int taller = static_cast<int>(units % tiles_);
    const Microkernel<Arithmetic> kernels[2] = {
        microkernel_for<Arithmetic>(slab_kind_, low, vectors),
        taller ? microkernel_for<Arithmetic>(slab_kind_, tall, vectors) : nullptr};
    // Tiles with few steps are finished in registers.
    constexpr int64_t kFewSteps = 128;
    Microkernel<Arithmetic> direct[2] = {};
    if constexpr (kFinishes) {
      if (tile_.first && tile_.last && in_.steps <= kFewSteps && !streaming) {
        direct[0] = microkernel_for<Arithmetic, Epilogue>(slab_kind_, low, vectors);
        if (taller) direct[1] = microkernel_for<Arithmetic, Epilogue>(slab_kind_, tall, vectors);
      }
    }
    for (int64_t start = 0; start < rows_; start += segment_) {
      const char* a = segment_rows(start);
      const int64_t first = r_ / E::kGroup;
      const Range steps = inside_.steps(window_row(start), {first, first + in_.steps});
      Operands in = in_;
      if (windows_are_rows_) in = in.part(steps.begin - first, steps.end - steps.begin);
      for (int64_t t = 0, i = 0; t < tiles_; t++, i += tile_.rows) {
        tile_.i = i_ + start + i;
        tile_.rows = static_cast<int>(min64(t < taller ? tall : low, segment_ - i));
        writer_.prefetch(tile_);
        in.a = a + i * in.a_row;
        in.rows = tile_.rows;
        in.continued = !tile_.first;
        if (tile_.last && g_.bias && g_.bias_of_rows) fetch_bias(tile_.i, tile_.rows, bias);
        Direct<Acc> to;
        if (direct[t < taller] && writer_.direct(tile_, bias, &to)) {
          direct[t < taller](in, sums, &to);
          continue;
        }
        if (in.continued) writer_.resume(tile_, vectors, sums);
        if (streaming)
          multiply_streaming(in, j, sums);
        else if (inside_.splits(i, tile_.rows))
          multiply_inside(in, steps, i, vectors, sums);
        else
          kernels[t < taller](in, sums, nullptr);
        writer_.write(tile_, sums, vectors, bias);
      }
    }
  }

  // A tile of windows from column `first` on: each tap with the windows that meet the image there.
  void multiply_inside(const Operands& in, Range steps, int64_t first, int vectors,
                       Acc* sums) const {
    if (tile_.first) memset(sums, 0, tile_.rows * vectors * kWidth * sizeof(Acc));
    inside_.each(first, tile_.rows, steps, [&](Range some, Range windows) {
      Operands part = in.part(some.begin - steps.begin, some.end - some.begin);
      part.a += windows.begin * part.a_row;
      part.continued = true;
      part.rows = static_cast<int>(windows.end - windows.begin);
      microkernel_for<Arithmetic>(slab_kind_, part.rows, vectors)(
          part, sums + windows.begin * vectors * kWidth, nullptr);
    });
  }

  int64_t window_row(int64_t start) const {
    return windows_are_rows_ ? (i_ + start) / g_.row_unit % g_.a_slab->rows.count : 0;
  }

  // Rows `start` and following of this block, as far as they are equally far apart.
  const char* segment_rows(int64_t start) const {
    if (windows_are_rows_) return a_ + start / segment_ * slab_.window_row_bytes();
    return g_.a_slab ? slab_.tap(i_ + start) : a_;
  }

  void fetch_bias(int64_t first, int64_t n, Acc* bias) const {
    fetch_run(g_.bias + first * g_.bias_stride, g_.bias_stride, static_cast<const T*>(nullptr), 0,
              0, n, bias);
  }

  // One tile of one vector with `b` where it lies; the last, incomplete run goes through a packed
  // panel.
  void multiply_streaming(Operands in, int64_t j, Acc* sums) {
    const int64_t done = depth_ / (in_.run * E::kGroup) * in_.run, r = done * E::kGroup;
    const T* b = g_.b.data + (j_ + j) * g_.b.outer + r_;
    in.b = reinterpret_cast<const char*>(b);
    in.steps = done;
    const int64_t b_row = g_.b.outer * static_cast<int64_t>(sizeof(T));
    if (done) streaming_microkernel_for<Arithmetic>(tile_.rows)(in, b_row, sums);
    if (done && r == depth_) return;
    pack_transposed(g_.b, r_ + r, depth_ - r, j_ + j, kWidth, kWidth, columns_, kWidth, transpose_);
    in.a += done * in.a_step;
    in.b = reinterpret_cast<const char*>(columns_);
    in.b_step = kWidth * sizeof(Unit);
    in.steps = in_.steps - done;
    in.continued = in.continued || done;
    microkernel_for<Arithmetic>(InSlab::kNone, tile_.rows, 1)(in, sums, nullptr);
  }

  // Points `a_` at this block's rows: where they lie if they can be read as they are, else packed.
  void prepare_rows() {
    const Source<T>& a = g_.a;
    in_.offsets = slab_.offsets() + (g_.slab_reduces_taps ? r_ / E::kGroup : 0);
    in_.a_step = sizeof(Unit);
    if (g_.a_slab) {
      const int64_t slot = windows_are_rows_ ? block_ % layout_.slots : 0;
      if (windows_are_rows_ && tile_.first) slab_.fill_rows(i_, rows_, slot);
      a_ = slab_.slot(slot);
      in_.a_row = windows_are_rows_ ? slab_.window_bytes() : static_cast<int64_t>(sizeof(Packed));
    } else if (g_.a_rows_outer) {
      if (reads_rows_in_place(g_, rows_, depth_, sum_a_)) {
        a_ = reinterpret_cast<const char*>(a.data + i_ * a.outer + r_);
        in_.a_row = a.outer * static_cast<int64_t>(sizeof(T));
      } else {
        pack_row_space([&](Packed* packed, int64_t stride) {
          pack_rows(a, r_, depth_, i_, rows_, packed, stride);
        });
      }
    } else if constexpr (E::kRowUnit > 1) {
      pack_row_space([&](Packed* packed, int64_t stride) {
        pack_turned(a, r_, depth_, i_, rows_, packed, stride);
      });
    } else if (reads_rows_in_place(g_, rows_, depth_, sum_a_)) {
      const T* rows = depth_ ? a.data + r_ * a.outer + i_ : a.data;
      a_ = reinterpret_cast<const char*>(rows);
      in_.a_row = sizeof(T), in_.a_step = a.outer * static_cast<int64_t>(sizeof(T));
      if (sum_a_)
        add_sums<T>(reinterpret_cast<const Unit*>(rows), a.outer, in_.steps, rows_, tile_.first,
                    g_.a_sums + i_);
    } else {
      const int64_t stride = Scratch<T>::step_stride(rows_);
      Unit* packed = reinterpret_cast<Unit*>(row_space_);
      Lines<T> lines(a, r_);
      pack_steps(lines, depth_, i_, rows_, stride, packed, stride);
      if (sum_a_) add_sums<T>(packed, stride, in_.steps, rows_, tile_.first, g_.a_sums + i_);
      a_ = row_space_;
      in_.a_row = sizeof(Unit);
      in_.a_step = stride * sizeof(Unit);
    }
  }

  // Packs whole rows; `pack` is called with where, and how far apart.
  template <class Pack>
  void pack_row_space(const Pack& pack) {
    const int64_t stride = Scratch<T>::row_stride(round_up(depth_, E::kGroup));
    Packed* packed = reinterpret_cast<Packed*>(row_space_);
    pack(packed, stride);
    if (sum_a_)
      add_row_sums<T>(packed, stride, in_.steps, rows_, tile_.first, transpose_, g_.a_sums + i_);
    a_ = row_space_;
    in_.a_row = stride * sizeof(Packed);
  }

  // All panels of the block at once, row by row: panel by panel would touch every page of `b` again
  // for each of them.
  void pack_panels() {
    alignas(64) Unit row[kWidestColumnBlock];
    Lines<T> lines(g_.b, r_);
    for (int64_t step = 0; step < in_.steps; step++) {
      const Unit* units = nullptr;
      if constexpr (kUnitsAsStored<T>) {
        units = lines.in_place(j_);
      }
      if (units) {
        lines.prefetch(j_, cols_);
        lines.next();
      } else {
        const int64_t left = depth_ - step * E::kGroup;
        pack_steps(lines, min64(left, E::kGroup), j_, cols_, cols_, row, 0);
        units = row;
      }
      for (int64_t j = 0; j < cols_;) {
        const int64_t width = panel_vectors(cols_ - j) * kWidth;
        pad_units(units + j, min64(width, cols_ - j), width,
                  columns_ + j * in_.steps + step * width);
        j += width;
      }
    }
  }

  // `n` units, and zeros up to `width`.
  static void pad_units(const Unit* from, int64_t n, int64_t width, Unit* to) {
    using S = typename E::S;
    const Acc* p = reinterpret_cast<const Acc*>(from);
    for (int64_t i = 0; i < width; i += kWidth) {
      const int rest = static_cast<int>(max64(n - i, 0));
      S::store(reinterpret_cast<Acc*>(to) + i,
               rest >= kWidth ? S::load(p + i) : S::load(p + i, rest));
    }
  }

  void prepare_panel(int64_t j, int64_t cols, int64_t width, bool direct) {
    if (direct && cols == width) {
      const T* lines = depth_ ? g_.b.data + r_ * g_.b.outer + j_ + j : g_.b.data;
      in_.b = reinterpret_cast<const char*>(lines);
      in_.b_step = g_.b.outer * static_cast<int64_t>(sizeof(T));
      if (sum_b_)
        add_sums<T>(reinterpret_cast<const Unit*>(lines), g_.b.outer, in_.steps, cols, tile_.first,
                    g_.b_sums + j_ + j);
      return;
    }
    // A panel that no other rows will use may as well stay where the one before it was.
    Unit* panel = columns_ + (own_panels_ ? j * in_.steps : 0);
    if (direct) {
      Lines<T> lines(g_.b, r_);
      pack_steps(lines, depth_, j_ + j, cols, width, panel, width);
    } else if (g_.b_cols_outer && block_ == 0) {
      pack_transposed(g_.b, r_, depth_, j_ + j, cols, width, panel, width, transpose_);
    }
    if (sum_b_) add_sums<T>(panel, width, in_.steps, cols, tile_.first, g_.b_sums + j_ + j);
    in_.b = reinterpret_cast<const char*>(panel);
    in_.b_step = width * sizeof(Unit);
  }

  const Gemm<T>& g_;
  const Scratch<T>& layout_;
  const InSlab slab_kind_;
  SlabReader<T> slab_;
  const bool windows_are_rows_;
  // The block at hand, in the problem's coordinates.
  int64_t i_ = 0, rows_ = 0, j_ = 0, cols_ = 0, r_ = 0, depth_ = 0;
  int64_t starts_[kMostShared + 1], blocks_ = 0, block_ = 0;  // of rows that share packed columns
  int64_t segment_ = 0;                                       // rows that are equally far apart
  int64_t tiles_ = 0;                                         // of a segment
  int vectors_ = 0;                                           // of a whole panel
  bool own_panels_ = false;
  bool sum_a_ = false, sum_b_ = false;
  Operands in_{};
  Tile tile_{};
  const char* a_ = nullptr;
  char* row_space_;
  Unit* columns_;
  Packed* transpose_;
  Acc* partial_;
  Writer<T, Epilogue> writer_;
  const int64_t run_;
  const InsideTaps<T> inside_;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
