// Machine code of kernels: packed in the library, unpacked for the driver, which keeps a copy.
#pragma once

#include <vector>

#include "gpu/kernels.h"

namespace twinfuse::gpu {

// The code of an image in a block such as kImages. Throws DriverError, which names the kernel,
// where what lies there is not what was packed.
std::vector<unsigned char> unpack(const unsigned char* block, const Image& image,
                                  const char* kernel);

}  // namespace twinfuse::gpu
