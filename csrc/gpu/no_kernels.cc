// The table of a build without GPU kernels; see kernels.h.
#include "gpu/kernels.h"

namespace twinfuse::gpu {

const Kernel kKernels[] = {{}};
const int kKernelCount = 0;
const CudaKernel kCudaKernels[] = {{}};
const int kCudaKernelCount = 0;
const unsigned char* const kImages = nullptr;
const char* const kMeasured = "";
const char* const kSources = "";

}  // namespace twinfuse::gpu
