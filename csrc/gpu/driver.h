// The CUDA driver, opened at run time: the library links nothing of CUDA, so that it loads
// anywhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace twinfuse::gpu {

// As cuda.h declares them; handles are opaque.
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

struct CUlaunchAttribute {
  int id, padding;
  union {
    uint64_t bytes[8];
    int cooperative;
    unsigned cluster[3];
  };
};

struct CUlaunchConfig {
  unsigned grid[3], block[3], shared;
  CUstream stream;
  const CUlaunchAttribute* attributes;
  unsigned attribute_count;
};

enum : int {
  kMaxDynamicShared = 8,    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  kLargeClusters = 14,      // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
  kMultiprocessors = 16,    // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
  kArchitectureMajor = 75,  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
  kArchitectureMinor = 76,
  kSharedOptIn = 97,  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
  kCaptureRelaxed = 2,
  kCooperative = 2,      // CU_LAUNCH_ATTRIBUTE_COOPERATIVE
  kCluster = 4,          // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
  kNoSuchCluster = 912,  // CUDA_ERROR_INVALID_CLUSTER_SIZE
};

// Machine code made by CUDA 13 needs a driver that knows it.
constexpr int kLeastDriver = 13000;

#define TWINFUSE_DRIVER_FUNCTIONS(F)                                                               \
  F(cuGetErrorName, (CUresult, const char**))                                                      \
  F(cuGetErrorString, (CUresult, const char**))                                                    \
  F(cuDriverGetVersion, (int*))                                                                    \
  F(cuInit, (unsigned))                                                                            \
  F(cuDeviceGet, (CUdevice*, int))                                                                 \
  F(cuDeviceGetName, (char*, int, CUdevice))                                                       \
  F(cuDeviceGetAttribute, (int*, int, CUdevice))                                                   \
  F(cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice))                                              \
  F(cuStreamGetCtx, (CUstream, CUcontext*))                                                        \
  F(cuCtxGetDevice, (CUdevice*))                                                                   \
  F(cuCtxPushCurrent_v2, (CUcontext))                                                              \
  F(cuCtxPopCurrent_v2, (CUcontext*))                                                              \
  F(cuThreadExchangeStreamCaptureMode, (int*))                                                     \
  F(cuModuleLoadData, (CUmodule*, const void*))                                                    \
  F(cuModuleUnload, (CUmodule))                                                                    \
  F(cuModuleGetFunction, (CUfunction*, CUmodule, const char*))                                     \
  F(cuFuncSetAttribute, (CUfunction, int, int))                                                    \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int*, CUfunction, int, size_t))                  \
  F(cuOccupancyMaxActiveClusters, (int*, CUfunction, const CUlaunchConfig*))                       \
  F(cuMemsetD32Async, (uint64_t, unsigned, size_t, CUstream))                                      \
  F(cuTensorMapEncodeTiled, (CUtensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*, \
                             const unsigned*, const unsigned*, int, int, int, int))                \
  F(cuLaunchKernelEx, (const CUlaunchConfig*, CUfunction, void**, void**))

struct Driver {
#define TWINFUSE_DECLARE(name, arguments) CUresult(*name) arguments = nullptr;
  TWINFUSE_DRIVER_FUNCTIONS(TWINFUSE_DECLARE)
#undef TWINFUSE_DECLARE
};

// The driver, or nullptr with the reason in `why`. It is opened once in a process: libcuda.so.1, or
// the library that TWINFUSE_CUDA_DRIVER names.
const Driver* driver(std::string* why);

// "cuInit failed: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"
std::string failure(const Driver& driver, const char* call, CUresult result);

}  // namespace twinfuse::gpu
