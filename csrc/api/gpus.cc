// What the core can do on which GPU.
#include <string>

#include "api/error.h"
#include "gpu/compiler.h"
#include "gpu/device.h"

using namespace twinfuse;

extern "C" const char* twinfuse_gpu_architectures(void) {
  static const std::string text = gpu::built_architectures();
  return text.c_str();
}

extern "C" const char* twinfuse_gpu_sources(void) { return gpu::kSources; }

extern "C" const char* twinfuse_device_backend(int32_t device_index) {
  const char* backend = nullptr;
  guarded([&] {
    try {
      backend = gpu::backend(device_index);
      return TWINFUSE_OK;
    } catch (const gpu::DriverError& error) {
      return fail(TWINFUSE_DRIVER_ERROR, error.what());
    } catch (const gpu::Unsupported& error) {
      return fail(TWINFUSE_UNSUPPORTED, error.what());
    }
  });
  return backend;
}

extern "C" void twinfuse_set_kernel_compiler(TwinfuseKernelCompiler compiler) {
  gpu::set_compiler(compiler);
}
