// The GPU of a call: its context, its properties, and the kernels that are loaded there.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "gpu/driver.h"
#include "gpu/kernels.h"
#include "twinfuse/core.h"

namespace twinfuse::gpu {

// Why a call cannot be served here (the caller takes its reference path).
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call of the driver that failed, or machine code that cannot be given to it.
struct DriverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The framework has no memory to lend.
struct OutOfMemory {};

// Whose rows of the table serve an architecture (0: none), and whether their machine code does,
// too.
struct Rows {
  int arch = 0;
  bool code = false;
};

class Device {
 public:
  Device(const Driver& driver, CUcontext context, CUdevice device);

  const Driver& driver() const { return driver_; }
  CUcontext context() const { return context_; }
  const char* name() const { return name_; }
  int multiprocessors() const { return multiprocessors_; }
  // For which the kernels here are compiled.
  int architecture() const { return rows_.code ? rows_.arch : arch_; }
  // Kernels that are compiled for an architecture that nobody knew read no descriptors.
  bool has_tensors() const { return rows_.code && rows_.arch >= 90; }
  // Throws Unsupported where no kernel can run here.
  void require_kernels() const;

  // All kernels of this role, or none.
  struct Range {
    const Kernel* const* first;
    const Kernel* const* last;
    const Kernel* const* begin() const { return first; }
    const Kernel* const* end() const { return last; }
    bool empty() const { return first == last; }
  };
  Range find(const Role& role) const;

  // What a launch needs of a kernel, or why there never will be anything to launch.
  struct Loaded {
    CUfunction function = nullptr;
    int32_t warps = 0;
    uint32_t shared = 0;
    std::string refused;
  };

  // Loaded, and compiled where there is no code, by the first call that asks. The context must be
  // current. Throws Unsupported or DriverError.
  const Loaded& loaded(const Kernel& kernel);

  struct CudaLoaded {
    CUfunction function = nullptr;
    int resident = 0;  // blocks that fit on the device at once, of clusters whole ones
  };

  // The kernel of csrc/cuda with this name, loaded by the first call that asks; an entry has always
  // the same threads of a block, bytes of dynamic shared memory and blocks of a cluster (1: it has
  // none). The context must be current. Throws Unsupported or DriverError.
  const CudaLoaded& cuda_kernel(const char* entry, int threads, uint32_t shared, int cluster = 1);

 private:
  using Slot = std::atomic<const Loaded*>;

  const Loaded* load(const Kernel& kernel, Slot& slot);
  CudaLoaded load(const CudaKernel& kernel, int threads, uint32_t shared, int cluster);
  int resident(CUfunction function, int threads, uint32_t shared, int cluster) const;
  CUfunction function(const void* image, const char* entry, uint32_t shared) const;

  const Driver& driver_;
  CUcontext context_;
  int arch_, multiprocessors_;
  char name_[256];
  uint32_t shared_;  // bytes that a block may have
  Rows rows_;
  std::vector<const Kernel*> kernels_;  // those that run here, in the order of their keys
  std::unique_ptr<Slot[]> slots_;       // indexed as kKernels
  std::vector<std::unique_ptr<const Loaded>> owned_;
  std::map<std::string_view, CudaLoaded> cuda_;  // none of which ever moves
  std::map<uint32_t, CUmodule> modules_;         // of csrc/cuda, by offset
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

// "9.0" for 90, and all that this build has machine code for: "8.0, 9.0".
std::string architecture_text(int arch);
std::string built_architectures();

// "cuda" or "triton": what serves calls on the device of this number. Needs no context. Throws
// Unsupported or DriverError.
const char* backend(int index);

}  // namespace twinfuse::gpu
