#include "gpu/device.h"

#include <algorithm>

namespace twinfuse::gpu {
namespace {

// "a" targets run on exactly one architecture; code for 8.0 runs on all of 8.x.
int built_architecture(int arch) { return arch / 10 == 8 ? 80 : arch; }

std::string built_architectures() {
  std::string text;
  for (int i = 0, last = 0; i < kKernelCount; i++) {
    const int arch = kKernels[i].arch;
    if (arch == last) continue;
    text += (last ? ", " : "") + std::to_string(arch / 10) + "." + std::to_string(arch % 10);
    last = arch;
  }
  return text;
}

// Every context that has been seen. They are as many as GPUs, and stay.
std::mutex devices_mutex;
std::vector<std::unique_ptr<Device>> devices;

Device* known(CUcontext context) {
  const std::lock_guard lock(devices_mutex);
  for (const auto& device : devices)
    if (device->context() == context) return device.get();
  return nullptr;
}

CUcontext primary_context(const Driver& driver, int index) {
  static std::mutex mutex;
  static std::vector<CUcontext> contexts;
  const std::lock_guard lock(mutex);
  if (index < 0) throw Unsupported("the device's number is negative");
  if (contexts.size() <= static_cast<size_t>(index)) contexts.resize(index + 1);
  if (!contexts[index]) {
    CUdevice device = 0;
    check(driver, "cuDeviceGet", driver.cuDeviceGet(&device, index));
    CUcontext context = nullptr;
    check(driver, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(&context, device));
    contexts[index] = context;
  }
  return contexts[index];
}

// Loading may allocate and synchronise, which a capture forbids unless the thread's mode is
// relaxed.
class Relaxed {
 public:
  explicit Relaxed(const Driver& driver) : driver_(driver) {
    check(driver, "cuThreadExchangeStreamCaptureMode",
          driver.cuThreadExchangeStreamCaptureMode(&mode_));
  }
  ~Relaxed() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  const Driver& driver_;
  int mode_ = kCaptureRelaxed;
};

}  // namespace

void check(const Driver& driver, const char* call, CUresult result) {
  if (result) throw DriverError(failure(driver, call, result));
}

Device::Device(const Driver& driver, CUcontext context, CUdevice device)
    : driver_(driver), context_(context) {
  const int major = attribute(device, kArchitectureMajor);
  arch_ = built_architecture(major * 10 + attribute(device, kArchitectureMinor));
  multiprocessors_ = attribute(device, kMultiprocessors);
  const auto shared = static_cast<uint32_t>(attribute(device, kSharedOptIn));
  for (int i = 0; i < kKernelCount; i++)
    if (kKernels[i].arch == arch_ && kKernels[i].shared <= shared) kernels_.push_back(&kKernels[i]);
  std::stable_sort(kernels_.begin(), kernels_.end(),
                   [](const Kernel* a, const Kernel* b) { return a->role.key() < b->role.key(); });
  functions_ = std::make_unique<std::atomic<CUfunction>[]>(kKernelCount);
}

int Device::attribute(CUdevice device, int attribute) const {
  int value = 0;
  check(driver_, "cuDeviceGetAttribute", driver_.cuDeviceGetAttribute(&value, attribute, device));
  return value;
}

Device::Range Device::find(const Role& role) const {
  const uint64_t key = role.key();
  const Kernel* const* first = kernels_.data();
  const Kernel* const* last = first + kernels_.size();
  first = std::lower_bound(first, last, key,
                           [](const Kernel* k, uint64_t key) { return k->role.key() < key; });
  const Kernel* const* end = first;
  while (end != last && (*end)->role.key() == key) end++;
  return {first, end};
}

CUfunction Device::function(const Kernel& kernel) {
  std::atomic<CUfunction>& slot = functions_[&kernel - kKernels];
  if (const CUfunction loaded = slot.load(std::memory_order_acquire)) return loaded;
  const std::lock_guard lock(loading_);
  if (const CUfunction loaded = slot.load(std::memory_order_relaxed)) return loaded;
  const Relaxed relaxed(driver_);
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  check(driver_, "cuModuleLoadData", driver_.cuModuleLoadData(&module, kImages + kernel.offset));
  const char* call = "cuModuleGetFunction";
  CUresult result = driver_.cuModuleGetFunction(&function, module, kernel.entry);
  if (!result) {
    call = "cuFuncSetAttribute";
    result = driver_.cuFuncSetAttribute(function, kMaxDynamicShared, kernel.shared);
  }
  if (result) driver_.cuModuleUnload(module);
  check(driver_, call, result);
  slot.store(function, std::memory_order_release);
  return function;
}

Current::Current(const TwinfuseContext& call) {
  if (kKernelCount == 0) throw Unsupported("this build has no GPU kernels");
  std::string why;
  driver_ = gpu::driver(&why);
  if (!driver_) throw Unsupported(why);
  CUcontext context = nullptr;
  // The default streams (0, 1 and 2) belong to whatever context is current.
  if (reinterpret_cast<uintptr_t>(call.stream) > 2)
    check(*driver_, "cuStreamGetCtx",
          driver_->cuStreamGetCtx(static_cast<CUstream>(call.stream), &context));
  else
    context = primary_context(*driver_, call.device_index);
  // TensorFlow's threads may have no context, or another one.
  check(*driver_, "cuCtxPushCurrent", driver_->cuCtxPushCurrent_v2(context));
  try {
    device_ = known(context);
    if (!device_) {
      CUdevice number = 0;
      check(*driver_, "cuCtxGetDevice", driver_->cuCtxGetDevice(&number));
      auto made = std::make_unique<Device>(*driver_, context, number);
      const std::lock_guard lock(devices_mutex);
      for (const auto& device : devices)
        if (device->context() == context) device_ = device.get();
      if (!device_) {
        device_ = made.get();
        devices.push_back(std::move(made));
      }
    }
    if (!device_->has_kernels())
      throw Unsupported("this build has GPU kernels for the architectures " +
                        built_architectures() + ", the device is " +
                        std::to_string(device_->architecture() / 10) + "." +
                        std::to_string(device_->architecture() % 10));
  } catch (...) {
    CUcontext popped = nullptr;
    driver_->cuCtxPopCurrent_v2(&popped);
    throw;
  }
}

Current::~Current() {
  CUcontext popped = nullptr;
  driver_->cuCtxPopCurrent_v2(&popped);
}

}  // namespace twinfuse::gpu
