// The kernels of the LSTM. TWINFUSE_UNIT is the list of those that this unit compiles.
#include "cuda/lstm_backward.h"
#include "cuda/lstm_backward_step.h"
#include "cuda/lstm_forward.h"
#include "cuda/lstm_forward_step.h"
#include "cuda/lstm_offsets.h"

namespace twinfuse::cuda {

#define TWINFUSE_INSTANCE(name, pass, format, ...)                                   \
  using name##_kernel =                                                              \
      Lstm##pass<Lstm_##format, Lstm##pass##Shape<LstmFormat::format, __VA_ARGS__>>; \
  TWINFUSE_KERNEL(name, name##_kernel)

// 8.0 has no clusters, 12.0 none of 16 blocks, and those of 10.0 have registers for half of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
#define TWINFUSE_CLUSTER(...)
#else
#define TWINFUSE_CLUSTER TWINFUSE_INSTANCE
#endif

TWINFUSE_UNIT(TWINFUSE_INSTANCE, TWINFUSE_CLUSTER)

}  // namespace twinfuse::cuda
