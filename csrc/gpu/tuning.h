// Choices by measurement: which kernel has been the fastest for a problem, before any estimate is
// asked; and what `twinfuse.tune` needs to measure.
//
// A problem is everything that decides which kernels can compute something and how fast they are:
// the architecture, the roles of the kernels that can (as their names have it, without the tile;
// types, strides and alignment are in these), and the extents. As text, which is what files hold:
//
//   sm_90 depth-depth-bias_relu-lines-bf16-vectors+depth-depth-identity-split-bf16-vectors
//   48x64x2048
//
// A choice is looked up twice: by the exact extents, since a tile more or less can decide; then by
// each extent rounded to 1 or 1.5 times a power of two, since batches and sequences vary from call
// to call and no table has all of them. A choice whose kernel cannot serve the problem is ignored.
#pragma once

#include <atomic>
#include <initializer_list>

#include "gpu/choice.h"

namespace twinfuse::gpu {

// Of a product: at most eight.
struct Extents {
  int count = 0;
  int64_t values[8] = {};

  Extents(std::initializer_list<int64_t> list) {
    for (const int64_t extent : list) values[count++] = extent;
  }
};

// Measured choices (one for all of them), and threads that measure. While there are none, a call
// looks at nothing else.
extern std::atomic<int> tuning;

inline bool tuned() { return tuning.load(std::memory_order_relaxed) != 0; }

class Problem {
 public:
  Problem(const Device& device, const Extents& extents)
      : architecture_(device.architecture()), extents_(extents) {}

  void add_label(const char* text);
  void add_role(const Kernel& kernel);  // unless it is that of the last one
  uint64_t exact() const { return key(false); }
  uint64_t rounded() const { return key(true); }
  std::string text() const;

 private:
  static constexpr int kMostLabels = 8;
  struct Label {
    uint64_t hash;
    const char* text;
    size_t length;
  };

  uint64_t key(bool rounded) const;

  int architecture_, label_count_ = 0;
  Label labels_[kMostLabels];
  Extents extents_;
};

// The kernels that can compute a product: `choose` takes the measured one, or else the one that is
// estimated to be the fastest.
class Candidates {
 public:
  Candidates(const Device& device, const Extents& extents)
      : device_(device), problem_(device, extents), tuned_(tuned()) {}

  // `shape` as the kernel computes it, with what it pads.
  void add(const Kernel& kernel, const Shape& shape);
  void add(const Role& role, const Shape& shape);  // all kernels of it
  bool empty() const { return !best_.kernel; }
  Choice choose();

 private:
  static constexpr int kMost = 32;
  struct Candidate {
    const Kernel* kernel;
    int splits, most_splits;
  };

  void note(uint64_t key, const Choice& taken) const;

  const Device& device_;
  Problem problem_;
  const bool tuned_;
  Choice best_;
  int count_ = 0;
  Candidate candidates_[kMost];
};

// The same between ways of computing something that differ in more than one kernel. Returns the
// index of the measured way, or of the one with the fewest clocks by estimate.
struct Way {
  const char* name;
  double clocks;
};
using Ways = std::initializer_list<Way>;
size_t estimate(const Ways& ways);
size_t measured(const Problem& problem, const Ways& ways);

// `describe(problem)` adds the labels.
template <class Describe>
size_t choose(const Device& device, const Extents& extents, const Ways& ways,
              const Describe& describe) {
  if (!tuned()) return estimate(ways);
  Problem problem(device, extents);
  describe(problem);
  return measured(problem, ways);
}

// Notes that what was planned is computed. Problems that are only planned are not measured.
void note_run(uint64_t problem);
inline void note_run(const Choice& choice) {
  if (choice.problem) note_run(choice.problem);
}

// To be called for every device at its first use: choices that were built in are there from now
// on, and those of its user (twinfuse_tune_on_device).
void announce(const Device& device);

}  // namespace twinfuse::gpu
