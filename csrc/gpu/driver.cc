#include "gpu/driver.h"

#include <dlfcn.h>
#include <stdlib.h>

namespace twinfuse::gpu {
namespace {

struct Opened {
  Driver driver;
  std::string why;
};

Opened open() {
  Opened opened;
  const char* path = getenv("TWINFUSE_CUDA_DRIVER");
  void* library = dlopen(path && *path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    opened.why = std::string("the CUDA driver does not load: ") + (reason ? reason : "no reason");
    return opened;
  }
  Driver& d = opened.driver;
#define TWINFUSE_FIND(name, arguments)                                     \
  d.name = reinterpret_cast<CUresult(*) arguments>(dlsym(library, #name)); \
  if (!d.name && opened.why.empty()) opened.why = "the CUDA driver has no function " #name;
  TWINFUSE_DRIVER_FUNCTIONS(TWINFUSE_FIND)
#undef TWINFUSE_FIND
  if (!opened.why.empty()) return opened;
  int version = 0;
  if (const CUresult result = d.cuInit(0)) {
    opened.why = failure(d, "cuInit", result);
  } else if (const CUresult asked = d.cuDriverGetVersion(&version)) {
    opened.why = failure(d, "cuDriverGetVersion", asked);
  } else if (version < kLeastDriver) {
    const auto text = [](int v) {
      return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
    };
    opened.why = "the CUDA driver supports CUDA " + text(version) + ", the kernels need " +
                 text(kLeastDriver) + " (driver 580)";
  }
  return opened;
}

}  // namespace

const Driver* driver(std::string* why) {
  // Never destroyed: threads of a framework may outlive the library's own objects.
  static const Opened& opened = *new Opened(open());
  if (opened.why.empty()) return &opened.driver;
  *why = opened.why;
  return nullptr;
}

std::string failure(const Driver& driver, const char* call, CUresult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.cuGetErrorName(result, &name);
  driver.cuGetErrorString(result, &text);
  return std::string(call) + " failed: " + (name ? name : "error " + std::to_string(result)) +
         ": " + (text ? text : "the driver has no text for it");
}

}  // namespace twinfuse::gpu
