#include "gpu/launch.h"

namespace twinfuse::gpu {
namespace {

constexpr int kDataTypes[] = {9, 6, 7};  // CUtensorMapDataType of bfloat16, float16 and float32
constexpr int kTf32 = 11;                // of float32 that is rounded as it is copied
constexpr int kPromoteTo128 = 2;         // CU_TENSOR_MAP_L2_PROMOTION_L2_128B

[[noreturn]] void refuse(const Kernel& kernel, const char* text) {
  throw std::logic_error(std::string("kernel ") + kernel.name + ": " + text);
}

}  // namespace

bool encodable(const Dense& t, Type type) {
  if (!aligned(t.data) || t.stride[t.rank - 1] != 1) return false;
  for (int d = 0; d < t.rank; d++) {
    if (t.size[d] < 1 || t.size[d] > INT32_MAX || t.traversal[d] < 1 || t.traversal[d] > 8)
      return false;
    const int64_t bytes = t.stride[d] * element_size(type);
    if (d + 1 < t.rank && (bytes % kVector || bytes <= 0 || bytes >= int64_t{1} << 40))
      return false;
  }
  return true;
}

void Launch::push(const void* argument) {
  if (count_ == kMostArguments) refuse(kernel_, "too many arguments");
  arguments_[count_++] = const_cast<void*>(argument);
}

void Launch::push_cell(uint64_t value) {
  if (count_ == kMostArguments) refuse(kernel_, "too many arguments");
  cells_[count_] = value;
  push(&cells_[count_]);
}

Launch& Launch::cell(uint64_t value) {
  if (given_ == kernel_.parameter_count) refuse(kernel_, "more arguments than parameters");
  const Parameter& parameter = kernel_.parameters[given_++];
  if (parameter.kind == Kind::tensor) refuse(kernel_, "a number where a descriptor belongs");
  if (parameter.kind == Kind::i32 && static_cast<int64_t>(value) != static_cast<int32_t>(value))
    refuse(kernel_, "a number does not fit into 32 bits");
  if (parameter.divisible && value % kVector) refuse(kernel_, "an argument is not divisible by 16");
  push_cell(value);
  return *this;
}

Launch& Launch::tensor(const Dense& t, Use use) {
  if (given_ == kernel_.parameter_count) refuse(kernel_, "more arguments than parameters");
  const Parameter& parameter = kernel_.parameters[given_++];
  if (parameter.kind != Kind::tensor || parameter.rank != t.rank || tensors_ == kMostTensors)
    refuse(kernel_, "a descriptor that is not the parameter's");
  uint64_t sizes[kMostRank], strides[kMostRank];
  unsigned box[kMostRank], traversal[kMostRank];
  const int64_t element = element_size(kernel_.role.type);
  for (int d = 0; d < t.rank; d++) {
    const int from = t.rank - 1 - d;  // the driver starts with the innermost dimension
    sizes[d] = static_cast<uint64_t>(t.size[from]);
    traversal[d] = static_cast<unsigned>(t.traversal[from]);
    // A box counts what it spans, not what is read of it.
    const bool own = t.box[0] && d;
    box[d] = (own ? static_cast<unsigned>(t.box[from]) : parameter.box[from]) * traversal[d];
    if (d) strides[d - 1] = static_cast<uint64_t>(t.stride[from] * element);
  }
  const bool rounded = use == Use::factor && kernel_.role.precision == Precision::tf32;
  const int type = rounded ? kTf32 : kDataTypes[static_cast<int>(kernel_.role.type)];
  CUtensorMap& map = maps_[tensors_++];
  const Driver& driver = device_.driver();
  check(driver, "cuTensorMapEncodeTiled",
        driver.cuTensorMapEncodeTiled(&map, type, static_cast<unsigned>(t.rank),
                                      const_cast<void*>(t.data), sizes, strides, box, traversal, 0,
                                      parameter.swizzle, kPromoteTo128, 0));
  push(&map);
  for (const int64_t* list : {t.size, t.stride}) {
    for (int d = 0; d < t.rank; d++) {
      push_cell(static_cast<uint64_t>(list[d]));
    }
  }
  return *this;
}

void Launch::run(int64_t programs, void* stream) {
  if (given_ != kernel_.parameter_count) refuse(kernel_, "fewer arguments than parameters");
  for (int hidden = 0; hidden < 2; hidden++) {  // scratch of the kernel and of a profiler: none
    push_cell(0);
  }
  const Device::Loaded& loaded = device_.loaded(kernel_);
  const CUlaunchConfig config = {{static_cast<unsigned>(programs), 1, 1},
                                 {static_cast<unsigned>(loaded.warps) * 32, 1, 1},
                                 loaded.shared,
                                 static_cast<CUstream>(stream),
                                 nullptr,
                                 0};
  const Driver& driver = device_.driver();
  check(driver, "cuLaunchKernelEx",
        driver.cuLaunchKernelEx(&config, loaded.function, arguments_, nullptr));
}

void launch_cuda(Device& device, const Device::CudaLoaded& loaded, const char* name,
                 const Blocks& blocks, int threads, uint32_t shared, const void* arguments,
                 void* stream) {
  const int64_t at_once = blocks.waiting == Blocks::all        ? blocks.count
                          : blocks.waiting == Blocks::clusters ? blocks.cluster
                                                               : 0;
  if (at_once > loaded.resident)
    throw Unsupported(std::string("kernel ") + name + " needs " + std::to_string(at_once) +
                      " blocks at once, the device has room for " +
                      std::to_string(loaded.resident));
  CUlaunchAttribute attribute = {};
  if (blocks.waiting == Blocks::clusters) {
    attribute.id = kCluster;
    attribute.cluster[0] = static_cast<unsigned>(blocks.cluster);
    attribute.cluster[1] = attribute.cluster[2] = 1;
  } else {
    attribute.id = kCooperative;
    attribute.cooperative = 1;
  }
  const CUlaunchConfig config = {{static_cast<unsigned>(blocks.count), 1, 1},
                                 {static_cast<unsigned>(threads), 1, 1},
                                 shared,
                                 static_cast<CUstream>(stream),
                                 &attribute,
                                 blocks.waiting == Blocks::apart ? 0u : 1u};
  void* list[] = {const_cast<void*>(arguments)};
  const Driver& driver = device.driver();
  check(driver, "cuLaunchKernelEx",
        driver.cuLaunchKernelEx(&config, loaded.function, list, nullptr));
}

void set_bits(Device& device, void* words, int64_t count, void* stream) {
  if (!count) return;
  const Driver& driver = device.driver();
  check(driver, "cuMemsetD32Async",
        driver.cuMemsetD32Async(reinterpret_cast<uintptr_t>(words), 0xffffffff,
                                static_cast<size_t>(count), static_cast<CUstream>(stream)));
}

}  // namespace twinfuse::gpu
