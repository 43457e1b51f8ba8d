#include "gpu/device.h"

#include <string.h>

#include <algorithm>

#include "gpu/compiler.h"
#include "gpu/image.h"
#include "gpu/tuning.h"

namespace twinfuse::gpu {
namespace {

// The architecture whose machine code runs on this one: that of 8.0 on all of 8.x, that of families
// ("f" targets) on their later members, and any other ("a" targets) on exactly one.
// csrc/triton/catalogue.py knows the same.
int code_for(int arch) {
  if (arch / 10 == 8) return 80;
  if (arch == 103 || arch == 121) return arch / 10 * 10;
  return arch;
}

Rows rows_for(int arch) {
  const int own = code_for(arch);
  for (int i = 0; i < kKernelCount; i++)
    if (kKernels[i].arch == own) return {own, true};
  if (arch < kLeastCompiled || kKernelCount == 0) return {};
  return {kKernels[0].arch, false};  // the lowest, which asks for least
}

// Descriptors are copied by instructions that not every architecture has.
bool reads_descriptors(const Kernel& kernel) {
  const Parameter* const end = kernel.parameters + kernel.parameter_count;
  return std::any_of(kernel.parameters, end,
                     [](const Parameter& p) { return p.kind == Kind::tensor; });
}

int attribute_of(const Driver& driver, CUdevice device, int attribute) {
  int value = 0;
  check(driver, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute(&value, attribute, device));
  return value;
}

int architecture_of(const Driver& driver, CUdevice device) {
  return attribute_of(driver, device, kArchitectureMajor) * 10 +
         attribute_of(driver, device, kArchitectureMinor);
}

// The kernel of csrc/cuda with this name for the largest X.0 that this architecture runs. Throws
// Unsupported where there is none.
const CudaKernel& row_of(const char* entry, int arch) {
  bool any = false;
  std::string built;
  for (int i = 0, last = 0; i < kCudaKernelCount; i++) {
    const CudaKernel& kernel = kCudaKernels[i];
    const bool runs = kernel.arch / 10 == arch / 10 && kernel.arch <= arch;
    if (runs && !strcmp(kernel.entry, entry)) return kernel;
    any |= runs;
    if (kernel.arch != last) built += (last ? ", " : "") + architecture_text(kernel.arch);
    last = kernel.arch;
  }
  const std::string what = any ? std::string("kernel ") + entry : "LSTM kernels";
  const std::string text = "this build has no " + what;
  if (built.empty()) throw Unsupported(text + ": making them needs nvcc");
  throw Unsupported(text + " for architecture " + architecture_text(arch) + ": it was built for " +
                    built);
}

// Throws Unsupported unless kernels of these rows can run.
void require(const Rows& rows, int arch) {
  if (!rows.arch)
    throw Unsupported("this build has GPU kernels for the architectures " + built_architectures() +
                      ", the device is " + architecture_text(arch));
  if (!rows.code && !has_compiler())
    throw Unsupported(
        "this build has GPU kernels for the architectures " + built_architectures() +
        "; the device is " + architecture_text(arch) +
        ", for which they are compiled when Triton is installed (pip install triton)");
}

const Driver& opened_driver() {
  if (kKernelCount == 0) throw Unsupported("this build has no GPU kernels");
  std::string why;
  const Driver* found = driver(&why);
  if (!found) throw Unsupported(why);
  return *found;
}

// Every context that has been seen. They are as many as GPUs, and are never destroyed: threads of a
// framework may outlive static objects.
std::mutex devices_mutex;
auto& devices = *new std::vector<std::unique_ptr<Device>>;

Device* known(CUcontext context) {
  const std::lock_guard lock(devices_mutex);
  for (const auto& device : devices)
    if (device->context() == context) return device.get();
  return nullptr;
}

CUcontext primary_context(const Driver& driver, int index) {
  static std::mutex mutex;
  static auto& contexts = *new std::map<int, CUcontext>;  // never destroyed, as the devices
  const std::lock_guard lock(mutex);
  const auto found = contexts.find(index);
  if (found != contexts.end()) return found->second;
  if (index < 0) throw Unsupported("the device's number is negative");
  CUdevice device = 0;
  check(driver, "cuDeviceGet", driver.cuDeviceGet(&device, index));
  CUcontext context = nullptr;
  check(driver, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(&context, device));
  return contexts[index] = context;
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

std::string architecture_text(int arch) {
  return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

std::string built_architectures() {
  std::string text;
  for (int i = 0, last = 0; i < kKernelCount; i++) {
    const int arch = kKernels[i].arch;
    if (arch == last) continue;
    text += (last ? ", " : "") + architecture_text(arch);
    last = arch;
  }
  return text;
}

const char* backend(int index) {
  const Driver& driver = opened_driver();
  CUdevice device = 0;
  check(driver, "cuDeviceGet", driver.cuDeviceGet(&device, index));
  const int arch = architecture_of(driver, device);
  const Rows rows = rows_for(arch);
  require(rows, arch);
  return rows.code ? "cuda" : "triton";
}

Device::Device(const Driver& driver, CUcontext context, CUdevice device)
    : driver_(driver),
      context_(context),
      arch_(architecture_of(driver, device)),
      multiprocessors_(attribute_of(driver, device, kMultiprocessors)),
      shared_(static_cast<uint32_t>(attribute_of(driver, device, kSharedOptIn))),
      rows_(rows_for(arch_)) {
  check(driver, "cuDeviceGetName", driver.cuDeviceGetName(name_, sizeof name_, device));
  for (int i = 0; i < kKernelCount; i++) {
    const Kernel& kernel = kKernels[i];
    if (kernel.arch == rows_.arch && kernel.shared <= shared_ &&
        (rows_.code || !reads_descriptors(kernel)))
      kernels_.push_back(&kernel);
  }
  std::stable_sort(kernels_.begin(), kernels_.end(),
                   [](const Kernel* a, const Kernel* b) { return a->role.key() < b->role.key(); });
  slots_ = std::make_unique<Slot[]>(kKernelCount);
}

void Device::require_kernels() const { require(rows_, arch_); }

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

const Device::Loaded& Device::loaded(const Kernel& kernel) {
  Slot& slot = slots_[&kernel - kKernels];
  const Loaded* found = slot.load(std::memory_order_acquire);
  if (!found) found = load(kernel, slot);
  if (!found->function) throw Unsupported(found->refused);
  return *found;
}

const Device::Loaded* Device::load(const Kernel& kernel, Slot& slot) {
  auto made = std::make_unique<Loaded>();
  const void* image = nullptr;
  const char* entry = kernel.entry;
  made->warps = kernel.warps;
  made->shared = kernel.shared;
  if (!rows_.code) {
    // Nothing is locked: the compiler waits for locks of its own (Python's), whose owners may be
    // waiting here for a kernel. Threads may ask for the same one at once.
    Compiled compiled = compile(kernel, arch_);
    image = compiled.kernel.image;
    entry = compiled.kernel.entry;
    made->warps = compiled.kernel.warps;
    made->shared = static_cast<uint32_t>(compiled.kernel.shared);
    made->refused = std::move(compiled.refused);
    if (made->refused.empty() && made->shared > shared_)
      made->refused = std::string("kernel ") + kernel.name + " for architecture " +
                      architecture_text(arch_) + " needs " + std::to_string(made->shared) +
                      " bytes of shared memory, the device has " + std::to_string(shared_);
  }
  const std::lock_guard lock(loading_);
  if (const Loaded* other = slot.load(std::memory_order_relaxed)) return other;
  std::vector<unsigned char> code;
  if (rows_.code) {
    code = unpack(kImages, kernel.image, kernel.name);
    image = code.data();
  }
  if (made->refused.empty()) made->function = function(image, entry, made->shared);
  owned_.push_back(std::move(made));
  slot.store(owned_.back().get(), std::memory_order_release);
  return owned_.back().get();
}

CUfunction Device::function(const void* image, const char* entry, uint32_t shared) const {
  const Relaxed relaxed(driver_);
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  check(driver_, "cuModuleLoadData", driver_.cuModuleLoadData(&module, image));
  const char* call = "cuModuleGetFunction";
  CUresult result = driver_.cuModuleGetFunction(&function, module, entry);
  if (!result) {
    call = "cuFuncSetAttribute";
    result = driver_.cuFuncSetAttribute(function, kMaxDynamicShared, static_cast<int>(shared));
  }
  if (result) driver_.cuModuleUnload(module);
  check(driver_, call, result);
  return function;
}

const Device::CudaLoaded& Device::cuda_kernel(const char* entry, int threads, uint32_t shared,
                                              int cluster) {
  const std::lock_guard lock(loading_);
  const auto found = cuda_.find(entry);
  if (found != cuda_.end()) return found->second;
  const CudaKernel& kernel = row_of(entry, arch_);
  if (shared > shared_)
    throw Unsupported(std::string("kernel ") + entry + " needs " + std::to_string(shared) +
                      " bytes of shared memory, the device has " + std::to_string(shared_));
  return cuda_.emplace(kernel.entry, load(kernel, threads, shared, cluster)).first->second;
}

Device::CudaLoaded Device::load(const CudaKernel& kernel, int threads, uint32_t shared,
                                int cluster) {
  const Relaxed relaxed(driver_);
  auto module = modules_.find(kernel.image.offset);
  if (module == modules_.end()) {
    CUmodule made = nullptr;
    const auto code = unpack(kImages, kernel.image, kernel.entry);
    check(driver_, "cuModuleLoadData", driver_.cuModuleLoadData(&made, code.data()));
    module = modules_.emplace(kernel.image.offset, made).first;
  }
  CudaLoaded loaded;
  check(driver_, "cuModuleGetFunction",
        driver_.cuModuleGetFunction(&loaded.function, module->second, kernel.entry));
  check(driver_, "cuFuncSetAttribute",
        driver_.cuFuncSetAttribute(loaded.function, kMaxDynamicShared, static_cast<int>(shared)));
  loaded.resident = resident(loaded.function, threads, shared, cluster);
  return loaded;
}

int Device::resident(CUfunction function, int threads, uint32_t shared, int cluster) const {
  int count = 0;
  if (cluster == 1) {
    check(driver_, "cuOccupancyMaxActiveBlocksPerMultiprocessor",
          driver_.cuOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, threads, shared));
    return count * multiprocessors_;
  }
  // Larger ones than every device has.
  if (cluster > 8)
    check(driver_, "cuFuncSetAttribute", driver_.cuFuncSetAttribute(function, kLargeClusters, 1));
  const auto size = static_cast<unsigned>(cluster);
  CUlaunchAttribute attribute = {};
  attribute.id = kCluster;
  attribute.cluster[0] = size, attribute.cluster[1] = attribute.cluster[2] = 1;
  const CUlaunchConfig config = {
      {size, 1, 1}, {static_cast<unsigned>(threads), 1, 1}, shared, nullptr, &attribute, 1};
  const CUresult asked = driver_.cuOccupancyMaxActiveClusters(&count, function, &config);
  if (asked == kNoSuchCluster) return 0;
  check(driver_, "cuOccupancyMaxActiveClusters", asked);
  return count * cluster;
}

Current::Current(const TwinfuseContext& call) : driver_(&opened_driver()) {
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
      {
        const std::lock_guard lock(devices_mutex);
        for (const auto& device : devices)
          if (device->context() == context) device_ = device.get();
        if (!device_) {
          device_ = made.get();
          devices.push_back(std::move(made));
        }
      }
      // Calls back, and so must hold no lock.
      if (!made) announce(*device_);
    }
    device_->require_kernels();
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
