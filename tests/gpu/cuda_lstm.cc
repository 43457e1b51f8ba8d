// The kernels of csrc/cuda/lstm.cu, under the names that they have for a driver.
#define TWINFUSE_LAYERS(F, C) \
  TWINFUSE_LSTM_BF16(F, C)    \
  TWINFUSE_LSTM_FP16(F, C) TWINFUSE_LSTM_TF32(F, C) TWINFUSE_LSTM_TF32X3(F, C)
#define TWINFUSE_UNIT(F, C) TWINFUSE_LAYERS(F, C) TWINFUSE_LSTM_OFFSETS(F, C)

#include "cuda/lstm.cu"

namespace twinfuse::cuda {
namespace {

struct Facts {
  const char* name;
  int32_t threads, units, width, chunk, slice, depth, reach, kept, arguments;
};

#define TWINFUSE_FACTS(name, ...) \
  {#name,                         \
   name##_kernel::kThreads,       \
   name##_kernel::kUnits,         \
   name##_kernel::kWidth,         \
   name##_kernel::kChunk,         \
   name##_kernel::kMostSlice,     \
   name##_kernel::kDepth,         \
   name##_kernel::kReach,         \
   name##_kernel::kKept,          \
   static_cast<int32_t>(sizeof(name##_kernel::Arguments))},

const Facts kFacts[] = {TWINFUSE_LAYERS(TWINFUSE_FACTS, TWINFUSE_FACTS)};

}  // namespace
}  // namespace twinfuse::cuda

extern "C" {

// The kernel of this index, or NULL.
const void* lstm_facts(int index) {
  using twinfuse::cuda::kFacts;
  return index < static_cast<int>(sizeof kFacts / sizeof *kFacts) ? &kFacts[index] : nullptr;
}

// 0, or 1 and why it did not end as it should. `bug` is one of those of the fibers.
int run_lstm(const char* kernel, const void* arguments, int blocks, int cluster, unsigned seed,
             int bug, char* message, int size) {
  const auto& entries = twinfuse::cuda::entries();
  const auto found = entries.find(kernel);
  std::string error = "there is no such kernel";
  if (found != entries.end())
    error = twinfuse::fibers::run(found->second.run, arguments, blocks, cluster,
                                  found->second.threads, found->second.memory, seed, bug);
  snprintf(message, static_cast<size_t>(size), "%s", error.c_str());
  return !error.empty();
}
}
