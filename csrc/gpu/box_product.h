// Products over windows that read and write boxes of pixels (csrc/triton/conv_tensor.py).
#pragma once

#include "gpu/tuning.h"
#include "gpu/window_product.h"

namespace twinfuse::gpu {

// Whether boxes of it can be read (or written) where it lies.
bool readable(const Call& call, const View& images);
// Of a weight, where the results go to `out`.
bool readable_weight(const Call& call, const View& weight, const View& out);

// Adds the kernels that can compute the product.
void add_boxes(const Call& call, const WindowProduct& product, Candidates& found);
void add_boxes(const Call& call, const TapProduct& product, Candidates& found);

// Of these kernels alone.
Choice plan_boxes(const Call& call, const WindowProduct& product);
Choice plan_boxes(const Call& call, const TapProduct& product);

void run_boxes(const Call& call, const WindowProduct& product, const Kernel& kernel);
// Parts of the sums, for `combine`.
void run_boxes(const Call& call, const TapProduct& product, const Choice& choice, void* parts);

}  // namespace twinfuse::gpu
