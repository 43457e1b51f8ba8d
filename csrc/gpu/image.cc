#include "gpu/image.h"

#include <string>

#include "gpu/device.h"
#include "third_party/tinf/tinf.h"

namespace twinfuse::gpu {

std::vector<unsigned char> unpack(const unsigned char* block, const Image& image,
                                  const char* kernel) {
  std::vector<unsigned char> code(image.size);
  unsigned size = image.size;
  // Writes no more than it is given room for, and compares the checksum.
  const int status = tinf_zlib_uncompress(code.data(), &size, block + image.offset, image.packed);
  if (status != TINF_OK || size != image.size)
    throw DriverError(std::string("the machine code of kernel ") + kernel +
                      " in libtwinfuse.so is damaged: its " + std::to_string(image.packed) +
                      " bytes do not unpack to " + std::to_string(image.size) +
                      "; install twinfuse again");
  return code;
}

}  // namespace twinfuse::gpu
