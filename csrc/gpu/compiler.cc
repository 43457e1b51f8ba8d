#include "gpu/compiler.h"

#include <atomic>

#include "gpu/device.h"

namespace twinfuse::gpu {
namespace {

std::atomic<TwinfuseKernelCompiler> compiler{nullptr};

}  // namespace

void set_compiler(TwinfuseKernelCompiler given) {
  compiler.store(given, std::memory_order_release);
}

bool has_compiler() { return compiler.load(std::memory_order_acquire) != nullptr; }

Compiled compile(const Kernel& kernel, int arch) {
  const TwinfuseKernelCompiler call = compiler.load(std::memory_order_acquire);
  if (!call) throw Unsupported("the compiler of GPU kernels is gone");
  Compiled compiled{};
  char message[2048] = "";
  const int32_t status =
      call(kernel.name, kernel.arch, arch, &compiled.kernel, message, sizeof message);
  if (status == TWINFUSE_OK) return compiled;
  const std::string text = std::string("kernel ") + kernel.name + " for architecture " +
                           architecture_text(arch) + ": " + message;
  if (status != TWINFUSE_UNSUPPORTED) throw Unsupported(text);
  compiled.refused = text;
  return compiled;
}

}  // namespace twinfuse::gpu
