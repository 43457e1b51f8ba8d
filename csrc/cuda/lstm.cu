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

TWINFUSE_UNIT(TWINFUSE_INSTANCE)

}  // namespace twinfuse::cuda
