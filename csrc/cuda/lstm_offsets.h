// What the host knows of packed sequences, where the other kernels read it.
#pragma once

#include "cuda/device.h"
#include "cuda/lstm_arguments.h"

namespace twinfuse::cuda {

template <class, class Shape>
struct LstmOffsets : Shape {
  using Arguments = LstmOffsetsArguments;

  TWINFUSE_DEVICE static void run(const LstmOffsetsArguments& p) {
    for (int i = thread_index(); i < p.count; i += Shape::kThreads) p.to[i] = p.numbers[i];
  }
};

}  // namespace twinfuse::cuda
