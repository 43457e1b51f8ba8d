// For bindings: scratch that a thread keeps from call to call. Small blocks at the end of a heap go
// back to the system when they are freed, and what the next call touches there are new pages: they
// cost more than what many a small call computes.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "twinfuse/core.h"

namespace twinfuse {

// What one call has of it; made and destroyed by the thread that calls.
class KeptScratch {
 public:
  static constexpr std::size_t kBytes = 256 << 10;

  KeptScratch() = default;
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;
  ~KeptScratch() {
    if (taken_) of_thread().taken = false;
  }

  // NULL where the framework has to lend: on a GPU, for more bytes, and for all but the first block
  // of a call.
  void* Take(const TwinfuseContext& context, std::size_t bytes) noexcept {
    if (context.device != TWINFUSE_CPU) return nullptr;
    Kept& kept = of_thread();
    if (bytes > kBytes || kept.taken) return nullptr;
    if (!kept.bytes) kept.bytes.reset(new (std::nothrow) char[kBytes]);
    kept.taken = taken_ = kept.bytes != nullptr;
    return kept.bytes.get();
  }

 private:
  struct Kept {
    std::unique_ptr<char[]> bytes;
    bool taken = false;
  };
  static Kept& of_thread() noexcept {
    thread_local Kept kept;
    return kept;
  }

  bool taken_ = false;
};

}  // namespace twinfuse
