// Reading ahead while the microkernel computes.
#pragma once

#include "cpu/source.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// The cache lines of a rectangle of a source, touched a few at a time. The processor's own
// prefetchers do not follow the short rows that packing reads.
class ReadAhead {
 public:
  // Spreads the rectangle over about `calls` calls of `advance`.
  template <class T>
  void start(const Source<T>& s, int64_t outer, int64_t rows, int64_t inner, int64_t n,
             int64_t calls) {
    rows_ = s.inner == 1 && rows > 0 && n > 0 ? rows : 0;
    if (!rows_) return;
    data_ = reinterpret_cast<const char*>(s.data + outer * s.outer + inner);
    row_bytes_ = s.outer * static_cast<int64_t>(sizeof(T));
    mask_ = s.mask && s.mask_inner == 1
                ? reinterpret_cast<const char*>(s.mask + outer * s.mask_outer + inner)
                : nullptr;
    mask_row_bytes_ = s.mask_outer * static_cast<int64_t>(sizeof(T));
    bytes_ = n * static_cast<int64_t>(sizeof(T));
    offset_ = 0;
    const int64_t lines = rows_ * ((bytes_ + 63) / 64);
    per_call_ = (lines + calls - 1) / calls;
  }

  void advance() {
    for (int64_t i = 0; i < per_call_ && rows_ > 0; i++) {
      __builtin_prefetch(data_ + offset_, 0, 2);
      if (mask_) __builtin_prefetch(mask_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ < bytes_) continue;
      offset_ = 0;
      rows_--;
      data_ += row_bytes_;
      if (mask_) mask_ += mask_row_bytes_;
    }
  }

 private:
  const char *data_ = nullptr, *mask_ = nullptr;
  int64_t row_bytes_ = 0, mask_row_bytes_ = 0, bytes_ = 0, offset_ = 0, rows_ = 0, per_call_ = 0;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
