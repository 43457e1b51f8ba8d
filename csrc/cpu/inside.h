// Taps of windows that leave the image meet nothing but zeros. Where their steps are whole runs,
// these are left out: a run of zeros would change no bit of the sums (but the sign of zero; see
// Identity). Which are is a matter of shapes alone, as an infinite weight would show it.
#pragma once

#include "cpu/engine.h"
#include "cpu/slab.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// For windows as rows of a product whose steps are taps: those that meet the image. `run` steps are
// summed before they are added to what is there.
template <class T>
class InsideTaps {
  static constexpr int64_t kGroup = Engine<T>::kGroup;

 public:
  // Without a slab of such windows all steps count.
  InsideTaps(const Slab* slab, int64_t run) : slab_(slab), run_(run) {
    // Else the steps of a tap lie in as many places as there are channels.
    skips_ = slab && slab->channels_last;
    if (!skips_ || slab->channels % (kGroup * run) != 0) return;
    // Fewer steps are over before another call of the microkernel has begun.
    constexpr int64_t kFewestSteps = 64;
    channel_steps_ = slab->channels / kGroup;
    splits_ = channel_steps_ >= kFewestSteps && slab->columns.leaves(slab->image_columns);
  }

  // Of all steps, those of the rows of taps that a row of windows meets, and up to a run more.
  Range steps(int64_t window_row, Range all) const {
    if (!skips_) return all;
    const Windows& rows = slab_->rows;
    const Range taps = clip(rows.origin + window_row * rows.step, rows.dilation, slab_->image_rows,
                            {0, rows.taps});
    const int64_t row = slab_->columns.taps * slab_->channels / kGroup;
    const int64_t begin = max64(all.begin, taps.begin * row / run_ * run_);
    return {begin, max64(begin, min64(all.end, taps.end * row))};
  }

  // Whether steps of some of `count` windows from `first` on are left out.
  bool splits(int64_t first, int64_t count) const {
    if (!splits_) return false;
    for (int64_t tap = 0; tap < slab_->columns.taps; tap++) {
      const Range met = meets(tap, first, count);
      if (met.end - met.begin < count) return true;
    }
    return false;
  }

  // Calls `body(steps, windows)` for each stretch of `steps` that the same windows meet; windows
  // count from `first` on.
  template <class Body>
  void each(int64_t first, int64_t count, Range steps, const Body& body) const {
    Range met{0, 0};
    int64_t begin = steps.begin;
    for (int64_t step = steps.begin; step < steps.end;) {
      const int64_t tap = step / channel_steps_;
      const Range now = meets(tap % slab_->columns.taps, first, count);
      if (now.begin != met.begin || now.end != met.end) {
        if (step > begin && met.end > met.begin) body(Range{begin, step}, met);
        met = now, begin = step;
      }
      step = min64((tap + 1) * channel_steps_, steps.end);
    }
    if (steps.end > begin && met.end > met.begin) body(Range{begin, steps.end}, met);
  }

 private:
  // The windows, counted from `first` on, that a column of taps meets.
  Range meets(int64_t tap, int64_t first, int64_t count) const {
    const Windows& columns = slab_->columns;
    return clip(columns.origin + first * columns.step + tap * columns.dilation, columns.step,
                slab_->image_columns, {0, count});
  }

  const Slab* slab_;
  int64_t run_, channel_steps_ = 0;
  bool skips_ = false, splits_ = false;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
