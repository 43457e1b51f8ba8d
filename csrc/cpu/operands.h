// What the inner kernels read.
#pragma once

#include <stdint.h>

namespace twinfuse::cpu::TWINFUSE_ISA {

// Operands as packed or as they lie in memory; byte strides. A unit is Engine::Unit.
struct Operands {
  int64_t steps, run;
  const char *a, *b;
  int64_t a_row, a_step, b_step;
  int rows;                     // for kernels that are not made for a number of them
  const int32_t* offsets;       // of each step of the operand that is read from a slab
  bool continued = false;       // `sums` holds those of the steps before
  const char* ahead = nullptr;  // a cache line for each step that will be needed soon

  // So many steps from step `first` on, where `a` is read from a slab.
  Operands part(int64_t first, int64_t count) const {
    Operands in = *this;
    in.steps = count;
    in.b += first * b_step, in.offsets += first;
    return in;
  }
};

// Which operand is read from a slab: its steps have offsets instead of a stride.
enum class InSlab { kNone, kA, kB };

// Where finished sums go at once, in the type that they were summed in.
template <class Acc>
struct Direct {
  Acc* out;
  int64_t out_row;
  const Acc* bias;  // one per row, or whole vectors of columns
  bool bias_of_rows;
  int cols;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
