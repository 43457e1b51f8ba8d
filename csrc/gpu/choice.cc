#include "gpu/choice.h"

#include <algorithm>

namespace twinfuse::gpu {
namespace {

constexpr int64_t kMostSplits = 32;

bool is_masked(Reader reader) {
  switch (reader) {
    case Reader::depth_masked:
    case Reader::lines_masked:
    case Reader::tensor_depth_masked:
    case Reader::tensor_lines_masked:
      return true;
    default:
      return false;
  }
}

// Clocks of a multiprocessor for one step of a tile whose data is there.
double step_clocks(const Kernel& kernel) {
  const double products = double(kernel.tile.m) * kernel.tile.n * kernel.tile.k;
  const double rate = kernel.role.type != Type::fp32             ? 2048
                      : kernel.role.precision == Precision::tf32 ? 1024
                      : kernel.role.precision == Precision::ieee ? 128
                                                                 : 340;
  // Addresses of elements cost more than their products; masks pass through registers. Measured on
  // sm_90.
  const Role& role = kernel.role;
  const bool masked = is_masked(role.a) || is_masked(role.b);
  const double efficiency = role.a == Reader::flat ? 0.02
                            : !role.vectors        ? 0.04
                            : masked               ? 0.12
                            : kernel.persistent    ? 0.85
                                                   : 0.6;
  return products / (rate * efficiency);
}

}  // namespace

int resident(const Kernel& kernel) {
  const int by_shared = static_cast<int>((227 << 10) / (kernel.shared + 1024));
  const int by_registers = 65536 / std::max(kernel.registers * kernel.warps * 32, 1);
  return std::clamp(std::min(by_shared, by_registers), 1, 16);
}

double estimate(const Device& device, const Kernel& kernel, const Shape& shape, int splits) {
  const int64_t tiles = divide(shape.rows, kernel.tile.m) * divide(shape.cols, kernel.tile.n);
  const int64_t blocks = tiles * splits, processors = device.multiprocessors();
  const int64_t most = resident(kernel);
  const int64_t together = std::clamp<int64_t>(divide(blocks, processors), 1, most);
  const double waves = double(divide(blocks, processors * together));
  const double steps = double(divide(divide(shape.depth, kernel.tile.k), splits));
  // A single tile waits for its data; several hide each other's waiting, and share what a
  // multiprocessor can read.
  const double bytes = double(kernel.tile.m + kernel.tile.n) * kernel.tile.k *
                       double(element_size(kernel.role.type));
  const double step =
      std::max({together * step_clocks(kernel), together * bytes / (kernel.persistent ? 64 : 40),
                !kernel.role.vectors ? 1500.0
                : kernel.persistent  ? 400.0
                                     : 550.0});
  double clocks = kLaunchClocks + waves * (steps * step + 700);
  if (splits > 1)
    clocks +=
        kLaunchClocks + 8.0 * double(shape.rows) * double(shape.cols) * splits / kBytesOfClock;
  return clocks;
}

int most_splits(const Device& device, const Kernel& kernel, const Shape& shape) {
  const int64_t tiles = divide(shape.rows, kernel.tile.m) * divide(shape.cols, kernel.tile.n);
  const int64_t steps = divide(shape.depth, kernel.tile.k);
  // Each part takes four steps or more, or the cuts cost more than they save.
  const int64_t wanted = 2 * device.multiprocessors() / std::max<int64_t>(tiles, 1);
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, steps / 4), 2, kMostSplits));
}

int possible_splits(const Device& device, const Kernel& kernel, const Shape& shape) {
  const int64_t tiles = divide(shape.rows, kernel.tile.m) * divide(shape.cols, kernel.tile.n);
  const int64_t together = 8 * device.multiprocessors() / std::max<int64_t>(tiles, 1);
  const int64_t steps = divide(shape.depth, kernel.tile.k);
  return static_cast<int>(std::clamp<int64_t>(std::min(together, steps), 2, kMostSplits));
}

}  // namespace twinfuse::gpu
