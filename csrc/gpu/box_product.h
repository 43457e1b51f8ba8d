// Products over windows that read and write boxes of pixels (csrc/triton/conv_tensor.py).
#pragma once

#include "gpu/window_product.h"

namespace twinfuse::gpu {

Choice plan_boxes(const Call& call, const WindowProduct& product);
Choice plan_boxes(const Call& call, const TapProduct& product);

void run_boxes(const Call& call, const WindowProduct& product, const Kernel& kernel);
// Parts of the sums, for `combine`.
void run_boxes(const Call& call, const TapProduct& product, const Choice& choice, void* parts);

}  // namespace twinfuse::gpu
