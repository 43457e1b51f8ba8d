// Gradient times windows: the gradients of a convolution's weight and bias.
#pragma once

#include "cpu/grad_bias.h"
#include "cpu/window_product.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// How the gradient of a weight is computed: what its rows are, and what is copied.
struct WeightPlan {
  bool channel_rows;  // and taps are the columns, else the other way round
  bool reads_slab;
};

// The input as the taps of the weight see it.
inline Slab weight_slab(const ConvReluBackward& op) {
  const Images &grad = op.grad_output, &w = op.grad_weight;
  return slab_of(op.input, nullptr, w.size[kChannel],
                 forward_windows(grad.size[kRow], w.size[kRow], op.conv, 0),
                 forward_windows(grad.size[kColumn], w.size[kColumn], op.conv, 1), true, false,
                 false, false);
}

// The taps of a slab follow each other in the weight.
inline bool taps_in_order(const Images& w) {
  return w.stride[kChannel] == 1 || w.size[kChannel] == 1 || w.size[kRow] * w.size[kColumn] == 1;
}

// By vector operations per pixel. `in_order`: see above.
template <class T>
WeightPlan plan_weight(const ConvReluBackward& op, const Slab& slab, bool in_order) {
  using E = Engine<T>;
  const int64_t channels = op.grad_weight.size[0] / op.conv.groups;
  const int64_t images = op.grad_output.size[kBatch];
  constexpr int64_t kWidth = E::S::kWidth;
  const int64_t taps = slab.rows.taps * slab.columns.taps * slab.channels;
  const int64_t run = max64(SlabReader<T>::run(slab), 1);
  const int64_t channel_vectors = ceil_div(channels, kWidth);
  const int64_t by_channels = channels * ceil_div(taps, kWidth), by_taps = taps * channel_vectors;
  const bool channel_rows = by_channels <= by_taps;
  const int64_t bytes = SlabReader<T>::block_bytes(slab, images);
  if (E::kGroup != 1 || !copies_less(slab.rows, slab.columns) || bytes > kSummedSlabBytes)
    return {channel_rows, false};
  // Packing a vector of taps takes as long as so many operations; fewer sums than these at a time
  // wait for each other.
  constexpr int64_t kToPack = 10, kFewSums = 8;
  const int64_t packing = taps * kToPack / kWidth;
  // Scattering this many elements takes as long as one operation.
  constexpr int64_t kScattered = 32;
  const int64_t pixels = images * slab.rows.count * slab.columns.count;
  const int64_t scattering = in_order ? 0 : channels * taps / (kScattered * max64(pixels, 1));
  const int64_t slab_columns = channels * (taps / run) * ceil_div(run, kWidth);
  const int64_t sums = min64(run, kMaxRows) * min64(channel_vectors, 2);
  const int64_t slab_rows = by_taps * max64(kFewSums, sums) / max64(sums, 1);
  if (min64(by_channels, by_taps) + packing < min64(slab_columns, slab_rows) + scattering)
    return {channel_rows, false};
  return {slab_columns <= slab_rows, true};
}

// The gradient of the output, pixels by channels, read along whichever lie side by side.
struct GradientAxes {
  Axis pixels, channels;
  bool channels_outer;

  GradientAxes(const ConvReluBackward& op, int64_t count) {
    const int64_t *size = op.grad_output.size, *s = op.grad_output.stride, *m = op.output.stride;
    pixels = {{{size[kBatch], s[kBatch], m[kBatch]},
               {size[kRow], s[kRow], m[kRow]},
               {size[kColumn], s[kColumn], m[kColumn]}}};
    pixels.simplify();
    channels = {{{}, {}, {count, s[kChannel], m[kChannel]}}};
    channels_outer = s[kChannel] != 1 && pixels.stride() == 1;
  }

  // `gather` must outlive it.
  template <class T>
  Source<T> source(const ConvReluBackward& op, Gather* gather) const {
    *gather = {};
    return source_of<T>(op.grad_output, &op.output, op.relu_grad,
                        channels_outer ? channels : pixels, channels_outer ? pixels : channels,
                        gather);
  }
};

// The reduced dimension is that of the pixels. `bias_sums`, if given, receives grad_bias.
template <class T>
void grad_weight_problem(const ConvReluBackward& op, typename Convert<T>::Acc* bias_sums,
                         ConvProblem<T>* problem) {
  Gemm<T>& g = problem->g;
  const Images &w = op.grad_weight, &grad = op.grad_output, &input = op.input;
  const int64_t groups = op.conv.groups, k = w.size[0] / groups, c = w.size[1];
  problem->slab = weight_slab(op);
  const Windows &rows = problem->slab.rows, &columns = problem->slab.columns;
  const WeightPlan plan = plan_weight<T>(op, problem->slab, taps_in_order(w));
  const bool channel_rows = plan.channel_rows;

  const bool channels_last = plan.reads_slab || input.stride[kChannel] == 1;
  const Windowed seen(input, nullptr, c, rows, columns, channels_last);
  const int64_t *s = grad.stride, *m = op.output.stride;
  const GradientAxes axes(op, k);
  const Axis w_channels{{{}, {}, {k, w.stride[0]}}};
  const Axis w_taps = tap_axis(channels_last, {c, w.stride[1]}, {w.size[kRow], w.stride[kRow]},
                               {w.size[kColumn], w.stride[kColumn]});

  const bool along_taps = reads_along_taps(seen);
  Gather* image_gather = channel_rows ? &problem->b_gather : &problem->a_gather;
  Gather* grad_gather = channel_rows ? &problem->a_gather : &problem->b_gather;
  *image_gather = seen.gather;
  Source<T> windows = source_of<T>(input, nullptr, 0, along_taps ? seen.pixels : seen.taps,
                                   along_taps ? seen.taps : seen.pixels, image_gather);
  const Source<T> grads = axes.source<T>(op, grad_gather);
  if (plan.reads_slab) {
    windows = image_source<T>(input, nullptr, 0);
    (channel_rows ? g.b_slab : g.a_slab) = &problem->slab;
    if (!channel_rows) g.row_unit = SlabReader<T>::run(problem->slab);
  }

  g.depth = axes.pixels.size();
  g.splits = count_splits<T>(k, g.depth);
  g.a = channel_rows ? grads : windows;
  g.b = channel_rows ? windows : grads;
  g.a_rows_outer = channel_rows ? axes.channels_outer : !along_taps;
  g.b_cols_outer = channel_rows ? !along_taps : axes.channels_outer;
  (channel_rows ? g.a_sums : g.b_sums) = bias_sums;
  problem->images = grad.size[kBatch];
  problem->set_output(static_cast<T*>(w.data), channel_rows ? w_channels : w_taps,
                      channel_rows ? w_taps : w_channels);

  const int64_t grad_group = k * s[kChannel], mask_group = k * m[kChannel];
  const int64_t input_group = c * input.stride[kChannel], w_group = k * w.stride[0];
  g.batch[1] = channel_rows ? Batch{groups, grad_group, mask_group, input_group, 0, w_group, 0, k}
                            : Batch{groups, input_group, 0, grad_group, mask_group, w_group, 0, k};
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
