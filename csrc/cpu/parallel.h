// Running chunks of work on the framework's thread pool.
#pragma once

#include <stdint.h>

#include "cpu/amx.h"
#include "twinfuse/core.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace twinfuse::cpu::TWINFUSE_ISA {

// Round to nearest, keep denormals, raise nothing: results must not depend on the mode that a
// framework left its threads in (TensorFlow flushes denormals). Restores the caller's mode.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(static_cast<uint64_t>(0)));
  }
  ~DefaultFloatMode() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// Reading or writing an element takes about as long as so many multiply-adds.
constexpr double kElementWork = 4;

// Of so many tasks of one size, some worker has a tenth more to do than it would without rounding.
inline bool uneven(int64_t tasks, int64_t workers) {
  return (tasks + workers - 1) / workers * workers * 10 > tasks * 11;
}

// As many threads as are worth waking for so many multiply-adds, and no more than have a task.
inline int64_t worth_waking(const TwinfuseContext& context, double work,
                            int64_t tasks = INT64_MAX) {
  constexpr double kThreadWork = 4e5;
  int64_t threads = context.num_threads < tasks ? context.num_threads : tasks;
  if (threads < 1) threads = 1;
  const double least =
      context.thread_work > 0 ? static_cast<double>(context.thread_work) : kThreadWork;
  const double worth = work / least;
  return worth >= static_cast<double>(threads) ? threads : 1 + static_cast<int64_t>(worth);
}

// Calls `body(i)` for every i in [0, count), at once where the framework can.
template <class Body>
void parallel_for(const TwinfuseContext& context, int64_t count, const Body& body) {
  TwinfuseTask task = [](void* argument, int64_t index) {
    DefaultFloatMode mode;
    TileScope tiles;
    (*static_cast<const Body*>(argument))(index);
  };
  void* argument = const_cast<void*>(static_cast<const void*>(&body));
  if (count > 1 && context.parallel_for) {
    context.parallel_for(context.opaque, count, task, argument);
  } else {
    for (int64_t i = 0; i < count; i++) task(argument, i);
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
