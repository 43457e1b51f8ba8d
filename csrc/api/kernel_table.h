// Names and launch counts of every kernel.
#pragma once

#include <stdint.h>

namespace twinfuse {

// One entry per role and dtype. The order is that of the names in kernel_table.cc.
enum class Role { kLinearReluForward, kLinearReluBackward, kConvReluForward, kConvReluBackward };

void count_launch(Role role, int32_t dtype);

}  // namespace twinfuse
