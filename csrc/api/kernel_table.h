// Names and launch counts of every kernel.
#pragma once

#include <stdint.h>

namespace twinfuse {

// One entry per device, role and dtype. The order is that of the names in kernel_table.cc.
enum class Role {
  kLinearReluForward,
  kLinearReluBackward,
  kConvReluForward,
  kConvReluBackward,
  kLstmForward,
  kLstmBackward,
  kLstmCellForward,
  kLstmCellBackward
};

void count_launch(Role role, int32_t dtype, int32_t device);

}  // namespace twinfuse
