// Convolution + ReLU on the CPU: each of output, grad_input and grad_weight is a product of windows
// with something. Equations in twinfuse/conv_relu.h.
#pragma once

#include "cpu/depthwise_gradient.h"
#include "cpu/tile_product.h"
#include "cpu/weight_gradient.h"

#if defined(TWINFUSE_DOT_BF16)
namespace twinfuse::cpu::avx512 {
extern const Kernels kernels;
}
#endif

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
TwinfuseStatus conv_relu_forward(const ConvReluForward& op, const TwinfuseContext& context) {
  const Images &out = op.output, &w = op.weight;
  const Windows rows = forward_windows(out.size[kRow], w.size[kRow], op.conv, 0);
  const Windows columns = forward_windows(out.size[kColumn], w.size[kColumn], op.conv, 1);
  if (is_depthwise(w, op.conv.groups)) {
    DepthwiseProduct<T, BiasRelu> product(op.input, nullptr, 0, w, out, rows, columns, 0,
                                          out.stride[kRow], out.stride[kColumn]);
    product.set_bias(op.bias, op.bias_stride);
    return with_scratch(context, product.bytes(context),
                        [&](char* space) { product.run(context, space); });
  }
  const WindowProduct product{op.input,
                              nullptr,
                              0,
                              w,
                              out,
                              0,
                              {1, 1},
                              rows,
                              columns,
                              false,
                              out.stride[kChannel] == 1,
                              op.conv.groups,
                              op.bias,
                              op.bias_stride};
  TwinfuseStatus status = TWINFUSE_OK;
  const auto run_in_scratch = [&](int64_t bytes, const auto& run) {
    status = with_scratch(context, bytes, run);
  };
#if defined(TWINFUSE_DOT_BF16)
  if constexpr (Engine<T>::kGroup == 2) {
    // Read from a slab as floats, windows take half as long as packed into pairs.
    ConvProblem<T> problem;
    set_up(product, &problem);
    if (problem.lacks_pairs)
      return avx512::kernels.conv_relu_forward[TWINFUSE_BFLOAT16](op, context);
    plan_problem<T, BiasRelu>(problem, context, run_in_scratch);
    return status;
  }
#endif
  plan_window_product<T, BiasRelu>(product, context, run_in_scratch);
  return status;
}

// One part of grad_input: elements phase[d], phase[d] + stride, ... of each spatial dimension,
// which the same taps have met.
struct InputPhase {
  Windows rows, columns;
  int64_t offset;
};

template <class Body>
void each_phase(const ConvReluBackward& op, const Body& body) {
  const Images &out = op.grad_input, &w = op.weight;
  const int64_t* stride = op.conv.stride;
  const int64_t phases[2] = {min64(stride[0], out.size[kRow]), min64(stride[1], out.size[kColumn])};
  for (int64_t phase = 0; out.data && phase < phases[0] * phases[1]; phase++) {
    const int64_t row = phase / phases[1], column = phase % phases[1];
    body(InputPhase{transposed_windows(out.size[kRow], w.size[kRow], op.conv, 0, row),
                    transposed_windows(out.size[kColumn], w.size[kColumn], op.conv, 1, column),
                    row * out.stride[kRow] + column * out.stride[kColumn]});
  }
}

inline WindowProduct phase_product(const ConvReluBackward& op, const InputPhase& phase) {
  return {op.grad_output,
          &op.output,
          op.relu_grad,
          op.weight,
          op.grad_input,
          phase.offset,
          {op.conv.stride[0], op.conv.stride[1]},
          phase.rows,
          phase.columns,
          true,
          op.output.stride[kChannel] == 1,
          op.conv.groups};
}

// grad_input, phase by phase. Calls `body` with each: all that its run needs is bytes and space.
template <class T, class Body>
void each_grad_input(const ConvReluBackward& op, const TwinfuseContext& context, const Body& body) {
  const Images &out = op.grad_input, &w = op.weight;
  each_phase(op, [&](const InputPhase& phase) {
    if (is_depthwise(w, op.conv.groups)) {
      const DepthwiseProduct<T, Identity> product(
          op.grad_output, &op.output, op.relu_grad, w, out, phase.rows, phase.columns, phase.offset,
          out.stride[kRow] * op.conv.stride[0], out.stride[kColumn] * op.conv.stride[1]);
      return body(product.bytes(context), [&](char* space) { product.run(context, space); });
    }
    plan_window_product<T, Identity>(phase_product(op, phase), context, body);
  });
}

// grad_weight in the same way. True if it brings the sums of the bias along.
template <class T, class Body>
bool each_grad_weight(const ConvReluBackward& op, typename Convert<T>::Acc* bias_sums,
                      const TwinfuseContext& context, const Body& body) {
  const Images &w = op.grad_weight, &grad = op.grad_output;
  if (!w.data || w.size[0] * w.size[1] * w.size[kRow] * w.size[kColumn] == 0) return false;
  if (is_depthwise(w, op.conv.groups)) {
    const Windows rows = forward_windows(grad.size[kRow], w.size[kRow], op.conv, 0);
    const Windows columns = forward_windows(grad.size[kColumn], w.size[kColumn], op.conv, 1);
    const DepthwiseGradWeight<T> product(op.input, grad, op.output, op.relu_grad, w, rows, columns);
    body(product.bytes(context), [&](char* space) { product.run(context, space); });
    return false;
  }
  ConvProblem<T> problem;
  grad_weight_problem<T>(op, bias_sums, &problem);
  const Plan<T> plan(problem.g, context, problem.images);
  body(plan.bytes(), [&](char* space) { run<T, Identity>(plan, context, space); });
  return bias_sums;
}

template <class T>
TwinfuseStatus compute_gradients(const ConvReluBackward& op, const TwinfuseContext& context) {
  using Acc = typename Convert<T>::Acc;
  const Images& grad = op.grad_output;
  const int64_t k = grad.size[kChannel];
  const int64_t pixels = grad.size[kBatch] * grad.size[kRow] * grad.size[kColumn];
  const int64_t sum_bytes = op.grad_bias ? round_up(k * sizeof(Acc), 64) : 0;
  const GradientAxes axes(op, k);
  const GradBias<T> bias(pixels, k, count_splits<T>(k / op.conv.groups, pixels),
                         axes.channels_outer, context);

  // One after the other in the same scratch.
  int64_t bytes = 0;
  auto count = [&](int64_t needed, const auto&) { bytes = max64(bytes, needed); };
  Acc planned;  // stands for the sums until there is scratch for them
  each_grad_input<T>(op, context, count);
  const bool summed = each_grad_weight<T>(op, op.grad_bias ? &planned : nullptr, context, count);
  if (op.grad_bias && !summed) bytes = max64(bytes, bias.bytes());
  return with_scratch(context, sum_bytes + bytes, [&](char* space) {
    Acc* sums = op.grad_bias ? reinterpret_cast<Acc*>(space) : nullptr;
    space += sum_bytes;
    auto run = [&](int64_t, const auto& part) { part(space); };
    each_grad_input<T>(op, context, run);
    each_grad_weight<T>(op, sums, context, run);
    if (op.grad_bias && !summed) {
      Gather gather;
      bias.run(axes.source<T>(op, &gather), context, space, false, sums);
    }
    if (op.grad_bias) store_grad_bias<T>(sums, k, op.grad_bias, op.grad_bias_stride);
  });
}

#if defined(TWINFUSE_DOT_BF16)
// For the weight's gradient, pairs of pixels have to be packed for every tap: that pays where rows
// are long, or many channels use each pair, or all is over soon. Bits depend on this: it looks at
// nothing but shapes and the layout of the output.
inline bool packs_pixel_pairs(const ConvReluBackward& op) {
  constexpr int64_t kFewPixels = 1024, kLongRow = 128;
  const Images& grad = op.grad_output;
  const bool channels_last = op.output.stride[kChannel] == 1;
  const int64_t many_channels = channels_last ? 128 : 512;
  return grad.size[kBatch] * grad.size[kRow] * grad.size[kColumn] < kFewPixels ||
         (!channels_last && grad.size[kColumn] >= kLongRow) ||
         op.grad_weight.size[0] / op.conv.groups >= many_channels;
}

// Leaves in `op` the gradients whose windows come in pairs, and the rest to the float kernels. The
// bias stays: its bits must not depend on what else is asked for.
inline ConvReluBackward without_pairs(ConvReluBackward* op) {
  ConvReluBackward rest = *op;
  rest.grad_bias = nullptr;
  bool input = false, weight = false;
  if (!is_depthwise(op->weight, op->conv.groups))
    each_phase(*op, [&](const InputPhase& phase) {
      ConvProblem<Bf16> problem;
      set_up(phase_product(*op, phase), &problem);
      input |= problem.lacks_pairs;
    });
  const Images& w = op->grad_weight;
  if (w.data && !is_depthwise(w, op->conv.groups))
    weight = !packs_pixel_pairs(*op) && plan_weight<float>(*op, weight_slab(*op), true).reads_slab;
  (input ? op : &rest)->grad_input.data = nullptr;
  (weight ? op : &rest)->grad_weight.data = nullptr;
  return rest;
}
#endif

template <class T>
TwinfuseStatus conv_relu_backward(const ConvReluBackward& op, const TwinfuseContext& context) {
#if defined(TWINFUSE_DOT_BF16)
  if constexpr (Engine<T>::kGroup == 2) {
    ConvReluBackward paired = op;
    const ConvReluBackward rest = without_pairs(&paired);
    const TwinfuseStatus status =
        rest.grad_input.data || rest.grad_weight.data
            ? avx512::kernels.conv_relu_backward[TWINFUSE_BFLOAT16](rest, context)
            : TWINFUSE_OK;
    return status == TWINFUSE_OK ? compute_gradients<T>(paired, context) : status;
  }
#endif
  return compute_gradients<T>(op, context);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
