// Which of the kernels that can serve a product is taken: an estimate of their times.
#pragma once

#include "gpu/device.h"

namespace twinfuse::gpu {

struct Shape {
  int64_t rows, cols, depth;
};

// A kernel, and into how many parts its sums are cut.
struct Choice {
  const Kernel* kernel = nullptr;
  int splits = 1;
  double clocks = 0;              // estimated, of the fastest candidate
  const Kernel* first = nullptr;  // of the candidates
  uint64_t problem = 0;           // for measurements; zero: nobody measures

  // Takes `other` if it has a kernel that is faster.
  void improve(const Choice& other) {
    if (!other.kernel || (kernel && other.clocks >= clocks)) return;
    kernel = other.kernel;
    splits = other.splits;
    clocks = other.clocks;
  }
};

constexpr double kLaunchClocks = 4000;  // from the start of a kernel to its first result and home
constexpr double kBytesOfClock = 2000;  // between the memory and all multiprocessors

// Programs of a kernel that a multiprocessor runs at the same time.
int resident(const Kernel& kernel);

// `splits`: how many parts the kernel may cut the sums into; 1 for those that do not.
double estimate(const Device& device, const Kernel& kernel, const Shape& shape, int splits);

// Into how many parts it pays to cut the sums of a kernel that stores splits.
int most_splits(const Device& device, const Kernel& kernel, const Shape& shape);

// The largest number of parts that may be tried: none without work, nor many more than can run.
int possible_splits(const Device& device, const Kernel& kernel, const Shape& shape);

}  // namespace twinfuse::gpu
