// Convolution + ReLU on the CPU: each of output, grad_input and grad_weight is a product of windows
// with something. Equations in twinfuse/conv_relu.h.
#pragma once

#include "cpu/grad_bias.h"
#include "cpu/windows.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// A problem with the axes that its pointers lead to. Stays where it is.
template <class T>
struct ConvProblem {
  Gemm<T> g{};
  Gather a_gather, b_gather;
  Slab slab;
  Scatter scatter;
  int64_t images = 1;

  ConvProblem() = default;
  ConvProblem(const ConvProblem&) = delete;
  ConvProblem& operator=(const ConvProblem&) = delete;

  // The output is a matrix if its axes are strides, and one of them 1. Of the last digit of the
  // columns, `cols_used` are written, or all.
  void set_output(T* out, const Axis& rows, const Axis& cols, int64_t cols_used = INT64_MAX) {
    g.out = out;
    scatter = {rows, cols, cols_used};
    scatter.rows.simplify();
    if (cols_used == INT64_MAX) scatter.cols.simplify();
    g.rows = rows.size(), g.cols = cols.size();
    const bool dense = scatter.rows.single() && scatter.cols.single() &&
                       (scatter.cols.stride() == 1 || g.cols == 1);
    if (dense)
      g.out_row = scatter.rows.stride();
    else
      g.scatter = &scatter;
  }
};

// Runs shorter than this cost more to copy than as many steps of a stride of one.
constexpr int64_t kShortRun = 8;

// Whether the windows of an image are best read tap after tap, rather than pixel after pixel.
inline bool reads_along_taps(const Windowed& seen) {
  const Digit &tap = seen.taps.digits[kDigits - 1], &pixel = seen.pixels.digits[kDigits - 1];
  if (pixel.stride == 1) return tap.stride == 1 && tap.size >= kShortRun;
  return tap.stride == 1 || tap.x == 1;
}

// out[pixel, channel] = sum over taps of image(pixel, tap) * weight(channel, tap). For the output,
// and `transposed`, with channels of the weight exchanged, for the input's gradient.
struct WindowProduct {
  const Images &image, *mask;
  int32_t relu_grad;
  const Images& weight;
  const Images& out;
  int64_t out_offset, out_step[2];  // first pixel; rows and columns of `out` per window
  Windows rows, columns;
  bool transposed;
  bool channels_last;  // order of the sums
  int64_t groups;
};

// Where the taps of a channel follow each other, the weight is read forwards in either product.
inline bool backwards(const WindowProduct& op) { return op.transposed && !op.channels_last; }

// Lets the product read its windows from a slab, if that is cheaper than writing them out.
template <class T>
bool set_slab(const WindowProduct& op, int64_t in_channels, int64_t out_channels, bool pixel_rows,
              ConvProblem<T>* problem) {
  constexpr int kGroup = Engine<T>::kGroup;
  constexpr int64_t kFewestWindows = 4, kWindows = 384, kPlanarWindows = 768;
  const Windows &rows = op.rows, &columns = op.columns;
  const bool copies_less = rows.taps * columns.taps >= 2 * rows.step * columns.step;
  if (!copies_less || columns.count < kFewestWindows || in_channels == 0) return false;
  Slab& slab = problem->slab;
  slab = slab_of(op.image, op.mask, in_channels, rows, columns, op.channels_last, backwards(op),
                 !pixel_rows);
  const int64_t run = SlabReader<T>::run(slab);
  if (kGroup == 2 && (!pixel_rows || !op.channels_last || run % 2)) return false;
  // Columns between two rows of an image are computed for nothing; packing costs about as much as
  // this many rows.
  constexpr int64_t kRowsToPack = 24, kWidth = Engine<T>::S::kWidth;
  if (!pixel_rows) {
    const int64_t packed = ceil_div(rows.count * columns.count, kWidth);
    const int64_t flat = ceil_div((rows.count - 1) * slab.pitch + columns.count, kWidth);
    if ((flat - packed) * out_channels > kRowsToPack * packed) return false;
  }
  if (!choose_height<T>(&slab, slab.windows_per_row(), pixel_rows ? kWindows : kPlanarWindows))
    return false;
  Gemm<T>& g = problem->g;
  (pixel_rows ? g.a_slab : g.b_slab) = &slab;
  (pixel_rows ? g.row_unit : g.col_unit) = slab.windows_per_row();
  g.slab_reduces_taps = true;
  return true;
}

template <class T>
void set_up(const WindowProduct& op, ConvProblem<T>* problem) {
  Gemm<T>& g = problem->g;
  const Images &image = op.image, &w = op.weight, &out = op.out;
  const int64_t k = w.size[0] / op.groups, c = w.size[1];
  const int64_t in_channels = op.transposed ? k : c, out_channels = op.transposed ? c : k;
  const int64_t pixels = op.rows.count * op.columns.count;

  const bool forwards = !backwards(op);
  auto weight_taps = [&](const Windows& windows, int64_t stride) {
    return Digit{windows.taps, (forwards ? 1 : -1) * windows.tap_step * stride};
  };
  auto first_tap = [&](const Windows& windows, int64_t stride) {
    return (windows.first_tap + (forwards ? 0 : (windows.taps - 1) * windows.tap_step)) * stride;
  };
  Axis w_taps =
      tap_axis(op.channels_last, {in_channels, w.stride[op.transposed ? 0 : 1]},
               weight_taps(op.rows, w.stride[kRow]), weight_taps(op.columns, w.stride[kColumn]));
  w_taps.simplify();
  const Axis w_channels{{{}, {}, {out_channels, w.stride[op.transposed ? 1 : 0]}}};
  const bool w_channels_outer = w_channels.stride() != 1 || w_taps.stride() == 1;
  const bool w_plain = w_taps.single() && w_taps.stride() == 1;

  const int64_t step = out.stride[kColumn] * op.out_step[1];
  const bool dense_channels = out.stride[kChannel] == 1 && !(out_channels == 1 && step == 1);
  // Few channels would leave lanes empty: then pixels fill them, if a slab has them side by side.
  constexpr int64_t kFewChannels = 3 * Engine<T>::S::kWidth / 4;
  bool pixel_rows = dense_channels;
  bool reads_slab = false;
  if (dense_channels && out_channels < kFewChannels)
    pixel_rows = !(reads_slab = set_slab<T>(op, in_channels, out_channels, false, problem));
  if (!reads_slab) reads_slab = set_slab<T>(op, in_channels, out_channels, pixel_rows, problem);
  // Small images are taken together: their pixels would leave lanes empty. So are they where
  // weights have to be packed: the more columns use them, the better.
  constexpr int64_t kSmallImage = 128;
  const bool by_image = !pixel_rows && (reads_slab || (w_plain && pixels > kSmallImage));
  Images seen_image = image, seen_out = out;
  if (by_image) seen_image.size[kBatch] = seen_out.size[kBatch] = 1;
  const Windowed seen(seen_image, op.mask, in_channels, op.rows, op.columns, op.channels_last,
                      backwards(op));
  const bool pitched = reads_slab && !pixel_rows && problem->slab.pitch != op.columns.count;
  const Axis out_pixels{{{seen_out.size[kBatch], out.stride[kBatch]},
                         {op.rows.count, out.stride[kRow] * op.out_step[0]},
                         {pitched ? problem->slab.pitch : op.columns.count, step}}};
  const Axis out_channel{{{}, {}, {out_channels, out.stride[kChannel]}}};

  const bool along_taps = reads_along_taps(seen);
  Gather* image_gather = pixel_rows ? &problem->a_gather : &problem->b_gather;
  Gather* weight_gather = pixel_rows ? &problem->b_gather : &problem->a_gather;
  *image_gather = seen.gather;
  *weight_gather = {};
  Source<T> windows =
      source_of<T>(image, op.mask, op.relu_grad, along_taps ? seen.pixels : seen.taps,
                   along_taps ? seen.taps : seen.pixels, image_gather);
  Source<T> weights = source_of<T>(w, nullptr, 0, w_channels_outer ? w_channels : w_taps,
                                   w_channels_outer ? w_taps : w_channels, weight_gather);
  weights.data += first_tap(op.rows, w.stride[kRow]) + first_tap(op.columns, w.stride[kColumn]);

  if (reads_slab) windows = image_source<T>(image, op.mask, op.relu_grad);
  g.depth = w_taps.size();
  g.a = pixel_rows ? windows : weights;
  g.b = pixel_rows ? weights : windows;
  g.a_rows_outer = pixel_rows ? along_taps : w_channels_outer;
  g.b_cols_outer = pixel_rows ? w_channels_outer : along_taps;
  g.bias_of_rows = !pixel_rows;
  problem->set_output(static_cast<T*>(out.data) + op.out_offset,
                      pixel_rows ? out_pixels : out_channel, pixel_rows ? out_channel : out_pixels,
                      pitched ? op.columns.count : INT64_MAX);
  if (pitched) g.cols = (op.rows.count - 1) * problem->slab.pitch + op.columns.count;

  Batch &images = g.batch[0], &groups = g.batch[1];
  const int64_t image_group = in_channels * image.stride[kChannel], w_group = k * w.stride[0];
  const int64_t mask_group = op.mask ? in_channels * op.mask->stride[kChannel] : 0;
  groups = {op.groups, image_group, mask_group, w_group, 0, out_channels * out.stride[kChannel]};
  if (by_image)
    images = {out.size[kBatch],  image.stride[kBatch], op.mask ? op.mask->stride[kBatch] : 0, 0, 0,
              out.stride[kBatch]};
  if (!pixel_rows)
    for (Batch& batch : g.batch) {
      const Batch b = batch;
      batch.a = b.b, batch.a_mask = b.b_mask, batch.b = b.a, batch.b_mask = b.a_mask;
    }
}

template <class T>
TwinfuseStatus conv_relu_forward(const ConvReluForward& op, const TwinfuseContext& context) {
  const Images &out = op.output, &w = op.weight;
  const WindowProduct product{op.input,
                              nullptr,
                              0,
                              w,
                              out,
                              0,
                              {1, 1},
                              forward_windows(out.size[kRow], w.size[kRow], op.conv, 0),
                              forward_windows(out.size[kColumn], w.size[kColumn], op.conv, 1),
                              false,
                              out.stride[kChannel] == 1,
                              op.conv.groups};
  ConvProblem<T> problem;
  set_up(product, &problem);
  Gemm<T>& g = problem.g;
  g.bias = static_cast<const T*>(op.bias);
  g.bias_stride = op.bias_stride;
  g.batch[1].bias = w.size[0] / op.conv.groups * op.bias_stride;
  const Plan<T> plan(g, context);
  return with_scratch(context, plan.bytes(),
                      [&](char* space) { run<T, BiasRelu>(plan, context, space); });
}

// Part of grad_input: elements phase[d], phase[d] + stride, ... of each spatial dimension, which
// the same taps have met.
template <class T>
void grad_input_problem(const ConvReluBackward& op, int64_t row_phase, int64_t column_phase,
                        ConvProblem<T>* problem) {
  const Images &out = op.grad_input, &w = op.weight;
  const WindowProduct product{
      op.grad_output,
      &op.output,
      op.relu_grad,
      w,
      out,
      row_phase * out.stride[kRow] + column_phase * out.stride[kColumn],
      {op.conv.stride[0], op.conv.stride[1]},
      transposed_windows(out.size[kRow], w.size[kRow], op.conv, 0, row_phase),
      transposed_windows(out.size[kColumn], w.size[kColumn], op.conv, 1, column_phase),
      true,
      op.output.stride[kChannel] == 1,
      op.conv.groups};
  set_up(product, problem);
}

// How the gradient of a weight is computed: what its rows are, and what is copied.
struct WeightPlan {
  bool channel_rows;  // and taps are the columns, else the other way round
  bool reads_slab;
};

// By vector operations per pixel.
template <class T>
WeightPlan plan_weight(int64_t channels, const Slab& slab, int64_t images) {
  using E = Engine<T>;
  constexpr int64_t kWidth = E::S::kWidth;
  const int64_t taps = slab.rows.taps * slab.columns.taps * slab.channels;
  const int64_t run = max64(SlabReader<T>::run(slab), 1);
  const int64_t channel_vectors = ceil_div(channels, kWidth);
  const int64_t by_channels = channels * ceil_div(taps, kWidth), by_taps = taps * channel_vectors;
  const bool channel_rows = by_channels <= by_taps;
  const bool copies_less =
      slab.rows.taps * slab.columns.taps >= 2 * slab.rows.step * slab.columns.step;
  const int64_t bytes =
      SlabReader<T>::block_size(slab, images) * static_cast<int64_t>(sizeof(typename E::Packed));
  if (E::kGroup != 1 || !copies_less || bytes > kSummedSlabBytes) return {channel_rows, false};
  // Packing a vector of taps takes as long as so many operations; fewer sums than these at a time
  // wait for each other.
  constexpr int64_t kToPack = 10, kFewSums = 8;
  const int64_t packing = taps * kToPack / kWidth;
  const int64_t slab_columns = channels * (taps / run) * ceil_div(run, kWidth);
  const int64_t sums = min64(run, kMaxRows) * min64(channel_vectors, 2);
  const int64_t slab_rows = by_taps * max64(kFewSums, sums) / max64(sums, 1);
  if (min64(by_channels, by_taps) + packing < min64(slab_columns, slab_rows))
    return {channel_rows, false};
  return {slab_columns <= slab_rows, true};
}

// The reduced dimension is that of the pixels. `bias_sums`, if given, receives grad_bias.
template <class T>
void grad_weight_problem(const ConvReluBackward& op, typename Convert<T>::Acc* bias_sums,
                         ConvProblem<T>* problem) {
  Gemm<T>& g = problem->g;
  const Images &w = op.grad_weight, &grad = op.grad_output, &input = op.input;
  const int64_t groups = op.conv.groups, k = w.size[0] / groups, c = w.size[1];
  const Windows rows = forward_windows(grad.size[kRow], w.size[kRow], op.conv, 0);
  const Windows columns = forward_windows(grad.size[kColumn], w.size[kColumn], op.conv, 1);
  problem->slab = slab_of(input, nullptr, c, rows, columns, true, false, false);
  const WeightPlan plan = plan_weight<T>(k, problem->slab, grad.size[kBatch]);
  const bool channel_rows = plan.channel_rows;

  const bool channels_last = plan.reads_slab || input.stride[kChannel] == 1;
  const Windowed seen(input, nullptr, c, rows, columns, channels_last);
  const int64_t* s = grad.stride;
  const int64_t* m = op.output.stride;
  Axis pixels{{{grad.size[kBatch], s[kBatch], m[kBatch]},
               {grad.size[kRow], s[kRow], m[kRow]},
               {grad.size[kColumn], s[kColumn], m[kColumn]}}};
  pixels.simplify();
  const Axis channels{{{}, {}, {k, s[kChannel], m[kChannel]}}};
  const Axis w_channels{{{}, {}, {k, w.stride[0]}}};
  const Axis w_taps = tap_axis(channels_last, {c, w.stride[1]}, {w.size[kRow], w.stride[kRow]},
                               {w.size[kColumn], w.stride[kColumn]});

  const bool along_taps = reads_along_taps(seen);
  const bool along_channels = s[kChannel] == 1 || pixels.stride() != 1;
  Gather* image_gather = channel_rows ? &problem->b_gather : &problem->a_gather;
  Gather* grad_gather = channel_rows ? &problem->a_gather : &problem->b_gather;
  *image_gather = seen.gather;
  *grad_gather = {};
  Source<T> windows = source_of<T>(input, nullptr, 0, along_taps ? seen.pixels : seen.taps,
                                   along_taps ? seen.taps : seen.pixels, image_gather);
  const Source<T> grads =
      source_of<T>(grad, &op.output, op.relu_grad, along_channels ? pixels : channels,
                   along_channels ? channels : pixels, grad_gather);
  if (plan.reads_slab) {
    windows = image_source<T>(input, nullptr, 0);
    (channel_rows ? g.b_slab : g.a_slab) = &problem->slab;
    if (!channel_rows) g.row_unit = SlabReader<T>::run(problem->slab);
  }

  g.depth = pixels.size();
  g.splits = count_splits<T>(k, g.depth);
  g.a = channel_rows ? grads : windows;
  g.b = channel_rows ? windows : grads;
  g.a_rows_outer = channel_rows ? !along_channels : !along_taps;
  g.b_cols_outer = channel_rows ? !along_taps : !along_channels;
  (channel_rows ? g.a_sums : g.b_sums) = bias_sums;
  problem->images = grad.size[kBatch];
  problem->set_output(static_cast<T*>(w.data), channel_rows ? w_channels : w_taps,
                      channel_rows ? w_taps : w_channels);

  const int64_t grad_group = k * s[kChannel], mask_group = k * m[kChannel];
  const int64_t input_group = c * input.stride[kChannel], w_group = k * w.stride[0];
  g.batch[1] = channel_rows ? Batch{groups, grad_group, mask_group, input_group, 0, w_group, 0, k}
                            : Batch{groups, input_group, 0, grad_group, mask_group, w_group, 0, k};
}

// The gradient of the output as a source of lines of channels.
template <class T>
Source<T> grad_lines(const ConvReluBackward& op, Gather* gather) {
  const Images& grad = op.grad_output;
  const int64_t* s = grad.stride;
  const int64_t* m = op.output.stride;
  Axis pixels{{{grad.size[kBatch], s[kBatch], m[kBatch]},
               {grad.size[kRow], s[kRow], m[kRow]},
               {grad.size[kColumn], s[kColumn], m[kColumn]}}};
  pixels.simplify();
  *gather = {};
  const Axis channels{{{}, {}, {grad.size[kChannel], s[kChannel], m[kChannel]}}};
  return source_of<T>(grad, &op.output, op.relu_grad, pixels, channels, gather);
}

template <class T>
TwinfuseStatus conv_relu_backward(const ConvReluBackward& op, const TwinfuseContext& context) {
  using Acc = typename Convert<T>::Acc;
  const Images& grad = op.grad_output;
  const int64_t k = grad.size[kChannel];
  const int64_t pixels = grad.size[kBatch] * grad.size[kRow] * grad.size[kColumn];
  const int64_t sum_bytes = op.grad_bias ? round_up(k * sizeof(Acc), 64) : 0;
  const Images& w = op.grad_weight;
  const bool has_weight = w.data && w.size[0] * w.size[1] * w.size[kRow] * w.size[kColumn] > 0;
  const bool bias_alone = op.grad_bias && !has_weight;
  const GradBias<T> bias(pixels, k, count_splits<T>(k / op.conv.groups, pixels), context);

  // One after the other in the same scratch.
  int64_t bytes = bias_alone ? bias.bytes() : 0;
  Acc planned;  // stands for the sums until there is scratch for them
  if (has_weight) {
    ConvProblem<T> problem;
    grad_weight_problem<T>(op, op.grad_bias ? &planned : nullptr, &problem);
    bytes = max64(bytes, Plan<T>(problem.g, context, problem.images).bytes());
  }
  auto each_phase = [&](auto body) {
    const int64_t rows = min64(op.conv.stride[0], op.grad_input.size[kRow]);
    const int64_t columns = min64(op.conv.stride[1], op.grad_input.size[kColumn]);
    for (int64_t phase = 0; op.grad_input.data && phase < rows * columns; phase++) {
      ConvProblem<T> problem;
      grad_input_problem<T>(op, phase / columns, phase % columns, &problem);
      body(Plan<T>(problem.g, context, problem.images));
    }
  };
  each_phase([&](const Plan<T>& plan) { bytes = max64(bytes, plan.bytes()); });
  return with_scratch(context, sum_bytes + bytes, [&](char* space) {
    Acc* sums = op.grad_bias ? reinterpret_cast<Acc*>(space) : nullptr;
    space += sum_bytes;
    each_phase([&](const Plan<T>& plan) { run<T, Identity>(plan, context, space); });
    if (has_weight) {
      ConvProblem<T> problem;
      grad_weight_problem<T>(op, sums, &problem);
      run<T, Identity>(Plan<T>(problem.g, context, problem.images), context, space);
    }
    Gather gather;
    if (bias_alone) bias.run(grad_lines<T>(op, &gather), context, space, sums);
    if (op.grad_bias) store_grad_bias<T>(sums, k, op.grad_bias, op.grad_bias_stride);
  });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
