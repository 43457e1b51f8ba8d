// The GPU of a call: its context, its properties, and the kernels that are loaded there.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/driver.h"
#include "gpu/kernels.h"
#include "twinfuse/core.h"

namespace twinfuse::gpu {

// Why a call cannot be served here (the caller takes its reference path).
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call of the driver that failed.
struct DriverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The framework has no memory to lend.
struct OutOfMemory {};

class Device {
 public:
  Device(const Driver& driver, CUcontext context, CUdevice device);

  const Driver& driver() const { return driver_; }
  CUcontext context() const { return context_; }
  int multiprocessors() const { return multiprocessors_; }
  int architecture() const { return arch_; }
  bool has_kernels() const { return !kernels_.empty(); }
  bool has_tensors() const { return arch_ >= 90; }

  // All kernels of this role, or none.
  struct Range {
    const Kernel* const* first;
    const Kernel* const* last;
    const Kernel* const* begin() const { return first; }
    const Kernel* const* end() const { return last; }
    bool empty() const { return first == last; }
  };
  Range find(const Role& role) const;

  // Loaded by the first call that asks. The context must be current.
  CUfunction function(const Kernel& kernel);

 private:
  int attribute(CUdevice device, int attribute) const;

  const Driver& driver_;
  CUcontext context_;
  int arch_, multiprocessors_;
  std::vector<const Kernel*> kernels_;  // those that run here, in the order of their keys
  std::unique_ptr<std::atomic<CUfunction>[]> functions_;  // indexed as kKernels
  std::mutex loading_;
};

// Makes the context of the call's stream current for its own lifetime.
class Current {
 public:
  // Throws Unsupported or DriverError.
  explicit Current(const TwinfuseContext& call);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  Device& device() const { return *device_; }

 private:
  const Driver* driver_;
  Device* device_ = nullptr;
};

// Throws DriverError unless `result` is success.
void check(const Driver& driver, const char* call, CUresult result);

}  // namespace twinfuse::gpu
