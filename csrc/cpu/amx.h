// The tile registers of AMX: sixteen rows of 64 bytes each. One instruction multiplies sixteen rows
// of units with sixteen columns of them, sixteen steps deep.
#pragma once

#include <stdint.h>
#include <string.h>

namespace twinfuse::cpu::TWINFUSE_ISA {

#if defined(TWINFUSE_AMX)
constexpr int kTileRows = 16, kTileSteps = 16, kTileBytes = 64;

// Written out, as compilers' own functions for these do not say that they read and write memory.
template <int kTile>
void amx_load(const void* p, int64_t row) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row), "i"(kTile) : "memory");
}
template <int kTile>
void amx_store(void* p, int64_t row) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row), "i"(kTile) : "memory");
}
template <int kTile>
void amx_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// sum += a * b
template <int kSum, int kA, int kB>
void amx_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// While one lives, all eight tiles of this thread are whole ones. Others may have configured them
// before, and must not meet what is left of ours. A task that waits for others multiplies nothing
// after them: one of these may have run on its thread, and ended this.
class TileScope {
 public:
  TileScope() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    static_assert(sizeof(shape) == 64, "as the processor reads it");
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = kTileBytes, shape.rows[i] = kTileRows;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileScope() { __asm__ volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
#else
struct TileScope {
  TileScope() {}
};
#endif

}  // namespace twinfuse::cpu::TWINFUSE_ISA
