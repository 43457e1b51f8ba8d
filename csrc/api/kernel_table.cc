#include "api/kernel_table.h"

#include <array>
#include <atomic>
#include <string>

#include "api/error.h"
#include "gpu/kernels.h"
#include "twinfuse/core.h"

namespace twinfuse {
namespace {

constexpr const char* kRoles[] = {
    "linear_relu_forward", "linear_relu_backward", "conv_relu_forward", "conv_relu_backward",
    "lstm_forward",        "lstm_backward",        "lstm_cell_forward", "lstm_cell_backward"};
constexpr int kRoleCount = sizeof(kRoles) / sizeof(kRoles[0]);
constexpr const char* kDtypes[TWINFUSE_DTYPE_COUNT] = {"f32", "f64", "bf16", "f16"};
constexpr int kFirstLstm = static_cast<int>(Role::kLstmForward);  // and all behind it
constexpr int kCpuEntries = kRoleCount * TWINFUSE_DTYPE_COUNT;
constexpr int kKernelCount = 2 * kCpuEntries;  // of either device

std::array<std::atomic<int64_t>, kKernelCount> launches;

const std::string& kernel_name(int32_t index) {
  static const auto names = [] {
    std::array<std::string, kKernelCount> list;
    for (int i = 0; i < kKernelCount; i++)
      list[i] = std::string(kRoles[i % kCpuEntries / TWINFUSE_DTYPE_COUNT]) + "_" +
                kDtypes[i % TWINFUSE_DTYPE_COUNT] + "_" +
                (i < kCpuEntries ? twinfuse_isa() : "cuda");
    return list;
  }();
  return names[index];
}

}  // namespace

void count_launch(Role role, int32_t dtype, int32_t device) {
  const int index = static_cast<int>(role) * TWINFUSE_DTYPE_COUNT + dtype;
  launches[device * kCpuEntries + index].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace twinfuse

using namespace twinfuse;

extern "C" int32_t twinfuse_kernel_count(void) { return kKernelCount; }

extern "C" const char* twinfuse_kernel_name(int32_t index) {
  return index < 0 || index >= kKernelCount ? nullptr : kernel_name(index).c_str();
}

extern "C" int64_t twinfuse_kernel_launches(int32_t index) {
  if (index < 0 || index >= kKernelCount) return -1;
  return launches[index].load(std::memory_order_relaxed);
}

extern "C" const char* twinfuse_find_kernel(const char* role, int32_t dtype, int32_t device) {
  int index = 0;
  while (index < kRoleCount && std::string(kRoles[index]) != (role ? role : "")) index++;
  if (index == kRoleCount) {
    fail(TWINFUSE_UNSUPPORTED, std::string("no kernel has the role '") + (role ? role : "") + "'");
  } else if (device != TWINFUSE_CPU && device != TWINFUSE_CUDA) {
    fail(TWINFUSE_UNSUPPORTED,
         std::string(role) + ": no device has the number " + std::to_string(device));
  } else if (device != TWINFUSE_CPU && gpu::kKernelCount == 0) {
    fail(TWINFUSE_UNSUPPORTED, std::string(role) + ": this build has no GPU kernels");
  } else if (device != TWINFUSE_CPU && gpu::kCudaKernelCount == 0 && index >= kFirstLstm) {
    fail(TWINFUSE_UNSUPPORTED,
         std::string(role) + ": this build has no LSTM kernels for GPUs: making them needs nvcc");
  } else if (device != TWINFUSE_CPU && dtype == TWINFUSE_FLOAT64) {
    fail(TWINFUSE_UNSUPPORTED, std::string(role) + ": no GPU kernel takes float64");
  } else if (dtype < 0 || dtype >= TWINFUSE_DTYPE_COUNT) {
    fail(TWINFUSE_UNSUPPORTED,
         std::string(role) + ": no kernel takes dtype number " + std::to_string(dtype));
  } else {
    const int first = device == TWINFUSE_CPU ? 0 : kCpuEntries;
    return kernel_name(first + index * TWINFUSE_DTYPE_COUNT + dtype).c_str();
  }
  return nullptr;
}
