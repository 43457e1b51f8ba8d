// One launch: the arguments of a kernel in the order of its parameters, and the call of the driver.
#pragma once

#include "gpu/device.h"

namespace twinfuse::gpu {

// A tensor in memory as a descriptor sees it, outermost dimension first; the last has stride 1.
struct Dense {
  const void* data;
  int rank;
  int64_t size[kMostRank];
  int64_t stride[kMostRank];     // in elements
  int32_t traversal[kMostRank];  // every how manieth element of a dimension is read
  // Instead of the parameter's but for the last dimension, and of as many elements; zeros: not.
  int32_t box[kMostRank] = {};
};

// What becomes of a descriptor's elements: factors of a product are rounded to its precision.
enum class Use { exact, factor };

// Whether the hardware can copy boxes of it.
bool encodable(const Dense& tensor, Type type);

class Launch {
 public:
  Launch(Device& device, const Kernel& kernel) : device_(device), kernel_(kernel) {}

  // In the order of the kernel's parameters. Numbers fill parameters of 32 and of 64 bits alike:
  // the driver reads as many bytes as the parameter has.
  Launch& pointer(const void* data) { return cell(reinterpret_cast<uintptr_t>(data)); }
  Launch& number(int64_t value) { return cell(static_cast<uint64_t>(value)); }
  Launch& tensor(const Dense& tensor, Use use);

  // Throws DriverError, or std::logic_error where the arguments are not what the kernel was
  // compiled for.
  void run(int64_t programs, void* stream);

 private:
  Launch& cell(uint64_t value);
  void push(const void* argument);
  void push_cell(uint64_t value);

  static constexpr int kMostArguments = 96, kMostTensors = 5;

  Device& device_;
  const Kernel& kernel_;
  int given_ = 0, tensors_ = 0, count_ = 0;
  uint64_t cells_[kMostArguments];
  CUtensorMap maps_[kMostTensors];
  void* arguments_[kMostArguments];
};

// How many blocks, and which of them run at the same time since they wait for each other: none,
// all, or as many as a cluster has.
struct Blocks {
  enum Waiting { apart, all, clusters } waiting;
  int64_t count;
  int64_t cluster = 1;
};

// A kernel of csrc/cuda. `name` is for texts, `arguments` points to the struct that the kernel
// takes. Throws DriverError, or Unsupported where blocks that wait do not fit on the device at
// once.
void launch_cuda(Device& device, const Device::CudaLoaded& loaded, const char* name,
                 const Blocks& blocks, int threads, uint32_t shared, const void* arguments,
                 void* stream);

// Sets all bits of so many words of 32 bits. Throws DriverError.
void set_bits(Device& device, void* words, int64_t count, void* stream);

}  // namespace twinfuse::gpu
