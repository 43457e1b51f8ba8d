// What the main loop reads from a slab: where windows and taps begin in it.
#pragma once

#include "cpu/problem.h"
#include "cpu/slab_fill.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Most that a slab may take; where it would be larger, windows are packed one by one. Where windows
// are summed, each stretch of a slab is used again and again before the next.
constexpr int64_t kSlabBytes = 512 << 10, kSummedSlabBytes = 2 << 20;

template <class T>
class SlabReader {
  using E = Engine<T>;
  using Packed = typename E::Packed;
  static constexpr int64_t kUnit = sizeof(Packed);

 public:
  SlabReader(const Slab* slab, const Source<T>& source, char* space, int32_t* offsets)
      : slab_(slab), source_(source), space_(space), offsets_(offsets) {}

  // Windows of one block of a sum over windows: fewer where their slab would not stay in the
  // second-level cache, as each panel of taps is read from there for every tile.
  static int64_t block(const Slab& slab, int64_t images) {
    return block_bytes(slab, E::kBlock, images) > kSlabBytes ? kLeastBlock<T> : E::kBlock;
  }
  static int64_t block_bytes(const Slab& slab, int64_t images) {
    return block_bytes(slab, block(slab, images), images);
  }
  static int64_t block_bytes(const Slab& slab, int64_t block, int64_t images) {
    const int64_t rows = min64(ceil_div(block, slab.columns.count) + 1, images * slab.rows.count);
    const int64_t parts = min64(images, rows / slab.rows.count + 2);
    const int64_t overlap = max64(slab.rows.span() - slab.rows.step, 0);
    return (rows * slab.rows.step + parts * overlap) * slab.line() * kUnit;
  }
  // Taps that lie next to each other in an interleaved slab.
  static int64_t run(const Slab& slab) {
    return slab.columns.dilation == 1 ? slab.columns.taps * slab.channels : slab.channels;
  }

  int64_t window_bytes() const { return slab_->window_step() * kUnit; }
  int64_t window_row_bytes() const { return slab_->window_row() * kUnit; }

  // Whole rows of windows from `window` on; the `slot`th slab in the space.
  void fill_rows(int64_t window, int64_t count, int64_t slot) {
    const int64_t width = slab_->windows_per_row(), row = window / width;
    fill_slab(*slab_, source_, row / slab_->rows.count, row % slab_->rows.count,
              ceil_div(count, width), at(slot * slab_->size()));
  }
  const char* slot(int64_t index) const { return space_ + index * slab_->size() * kUnit; }

  // The rows that hold `count` windows from `window` on, and the offset of each of these.
  void fill_windows(int64_t window, int64_t count) {
    const int64_t width = slab_->windows_per_row(), rows = slab_->rows.count;
    int32_t* offset = offsets_;
    int64_t row = window / width, column = window % width, base = 0;
    while (count > 0) {
      const int64_t here = min64(rows - row % rows, ceil_div(column + count, width));
      fill_slab(*slab_, source_, row / rows, row % rows, here, at(base));
      for (int64_t y = 0; y < here; y++, column = 0)
        for (; column < width && count > 0; column++, count--)
          *offset++ = static_cast<int32_t>(
              (base + y * slab_->window_row() + column * slab_->window_step()) * kUnit);
      base += slab_->lines_for(here) * slab_->line();
      row += here;
    }
  }
  const char* tap(int64_t index) const {
    const int64_t run = SlabReader::run(*slab_), number = index / run;
    const int64_t per_row = slab_->columns.dilation == 1 ? 1 : slab_->columns.taps;
    return space_ + (slab_->tap(0, number / per_row, number % per_row) + index % run) * kUnit;
  }
  const int32_t* offsets() const { return offsets_; }

 private:
  Packed* at(int64_t element) const { return reinterpret_cast<Packed*>(space_) + element; }

  const Slab* slab_;
  const Source<T>& source_;
  char* space_;
  int32_t* offsets_;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
