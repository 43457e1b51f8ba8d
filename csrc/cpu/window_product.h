// Windows times weight: the output of a convolution, and the gradient of its input.
#pragma once

#include "cpu/gemm.h"
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
  bool lacks_pairs = false;  // a slab would be read, if only its elements came in pairs
  // Weights that are rows of `g` and packed before it runs, once for all images and blocks.
  Source<T> loose_weights{};
  int64_t loose_group = 0, packed_group = 0;

  ConvProblem() = default;
  ConvProblem(const ConvProblem&) = delete;
  ConvProblem& operator=(const ConvProblem&) = delete;

  void share_weights() {
    if constexpr (std::is_same<typename Engine<T>::Packed, T>::value) {
      const int64_t row = Scratch<T>::row_stride(round_up(g.depth, Engine<T>::kGroup));
      loose_weights = g.a, loose_group = g.batch[1].a;
      g.a = {};
      g.a.outer = row, g.a.inner = 1;
      g.batch[1].a = packed_group = g.rows * row;
    }
  }
  int64_t weight_bytes() const {
    return round_up(packed_group * g.batch[1].count * static_cast<int64_t>(sizeof(T)), 64);
  }
  void pack_weights(const TwinfuseContext& context, T* to) const {
    if constexpr (std::is_same<typename Engine<T>::Packed, T>::value) {
      constexpr int64_t kRows = 32;
      const int64_t parts = ceil_div(g.rows, kRows), tasks = parts * g.batch[1].count;
      const double elements =
          static_cast<double>(g.rows * g.batch[1].count) * static_cast<double>(g.depth);
      const int64_t workers = worth_waking(context, kElementWork * elements, tasks);
      parallel_for(context, workers, [&](int64_t worker) {
        for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers;
             task++) {
          const int64_t group = task / parts, row = task % parts * kRows;
          Source<T> weights = loose_weights;
          weights.data += group * loose_group;
          pack_rows(weights, 0, g.depth, row, min64(kRows, g.rows - row),
                    to + group * packed_group + row * g.a.outer, g.a.outer);
        }
      });
    }
  }

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
  Images image;
  const Images* mask;
  int32_t relu_grad;
  const Images& weight;
  Images out;
  int64_t out_offset, out_step[2];  // first pixel; rows and columns of `out` per window
  Windows rows, columns;
  bool transposed;
  bool channels_last;  // order of the sums
  int64_t groups;
  const void* bias = nullptr;  // one element per channel
  int64_t bias_stride = 0;
};

// Where the taps of a channel follow each other, the weight is read forwards in either product.
inline bool backwards(const WindowProduct& op) { return op.transposed && !op.channels_last; }

// Whether to sum over channels first although they do not lie side by side, so that neighbours make
// pairs: copying windows and weight in that order pays where tiles are large, and images, too. (Not
// batches: results must not depend on them.)
template <class T>
bool pairs_channels(const WindowProduct& op, int64_t in_channels, int64_t out_channels) {
  constexpr int64_t kFewestSteps = 128, kFewestPixels = 128;
  const int64_t taps = op.rows.taps * op.columns.taps;
  return Engine<T>::kGroup == 2 && !op.channels_last && in_channels % 2 == 0 && taps > 1 &&
         in_channels * taps >= kFewestSteps && out_channels >= Engine<T>::S::kWidth &&
         op.rows.count * op.columns.count >= kFewestPixels;
}

// Whether to do so for another reason: taps that meet nothing but the border of the image can then
// be left out for all channels at once. It pays without a border, too, as a tap's channels are one
// run, but for images of 32 columns and more with few channels: their planes may lie a power of two
// apart.
template <class T>
bool sums_channels_first(const WindowProduct& op, int64_t in_channels, int64_t out_channels) {
  using E = Engine<T>;
  constexpr int64_t kFewestTaps = 4, kFewestChannels = 16, kManyChannels = 64, kSmallImage = 32;
  constexpr int64_t kMostSteps = 5 * E::kBlock;
  static_assert(kMostSteps <= kDeepestBlock<T>, "the taps of a channel are packed in one block");
  const int64_t taps = op.rows.taps * op.columns.taps;
  const bool pays = in_channels % kManyChannels == 0 || op.columns.count < kSmallImage;
  return kUnitsAsStored<T> && !op.channels_last && taps >= kFewestTaps &&
         abs64(op.rows.tap_step) == 1 && abs64(op.columns.tap_step) == 1 &&
         in_channels >= kFewestChannels && pays && in_channels * taps <= kMostSteps &&
         out_channels >= E::S::kWidth && copies_less(op.rows, op.columns);
}

// So few pixels (of all images: bits must not depend on this) that the weight is best read where it
// lies: in one tile, or in three where the caches hold the weight.
template <class T>
bool fits_few_tiles(const WindowProduct& op) {
  constexpr int64_t kSmallWeight = (512 << 10) / sizeof(T);
  const int64_t* w = op.weight.size;
  const int64_t tiles = w[0] * w[1] * w[kRow] * w[kColumn] <= kSmallWeight ? 3 : 1;
  return op.image.stride[kChannel] == 1 &&
         op.image.size[kBatch] * op.rows.count * op.columns.count <= tiles * kMaxRows;
}

// Lets the product read its windows from a slab, if that is cheaper than writing them out.
template <class T>
bool set_slab(const WindowProduct& op, int64_t in_channels, int64_t out_channels, bool pixel_rows,
              ConvProblem<T>* problem) {
  constexpr int kGroup = Engine<T>::kGroup;
  constexpr int64_t kFewestWindows = 4, kWindows = 384, kPlanarWindows = 768;
  const Windows &rows = op.rows, &columns = op.columns;
  if (!copies_less(rows, columns) || in_channels == 0) return false;
  // The choice of pairs must not depend on the batch.
  const bool packs_few = kGroup == 2 || !op.channels_last || fits_few_tiles<T>(op);
  if (columns.count < kFewestWindows && packs_few) return false;
  Slab& slab = problem->slab;
  slab = slab_of(op.image, op.mask, in_channels, rows, columns, op.channels_last, backwards(op),
                 !pixel_rows || (!op.channels_last && op.image.stride[kChannel] != 1), !pixel_rows);
  const int64_t run = SlabReader<T>::run(slab);
  problem->lacks_pairs = kGroup == 2 && (!pixel_rows || !op.channels_last || run % 2);
  if (problem->lacks_pairs) return false;
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

// Whether pixels had better be the rows although the output's lie side by side: as columns, those
// between two rows of an image are computed for nothing, and as rows their tiles are transposed
// when they are stored.
template <class T>
bool prefers_pixel_rows(const WindowProduct& op, int64_t in_channels, int64_t out_channels) {
  constexpr int64_t kFewestSteps = 128, kWidth = Engine<T>::S::kWidth;
  const int64_t taps = op.rows.taps * op.columns.taps;
  const int64_t wasted = (op.columns.span() - 1) / op.columns.step;
  // Those of strided windows are few, but then vectors of them begin anywhere in a line.
  const bool strided = op.columns.step > 1 && taps >= 2 * op.rows.step * op.columns.step;
  return taps > 1 && in_channels * taps >= kFewestSteps && out_channels >= kWidth &&
         (strided || wasted * 32 > op.columns.count);
}

template <class T>
void set_up(WindowProduct op, ConvProblem<T>* problem) {
  Gemm<T>& g = problem->g;
  const Images &image = op.image, &w = op.weight, &out = op.out;
  const int64_t k = w.size[0] / op.groups, c = w.size[1];
  const int64_t in_channels = op.transposed ? k : c, out_channels = op.transposed ? c : k;
  const bool pairs = pairs_channels<T>(op, in_channels, out_channels);
  const bool channels_first = sums_channels_first<T>(op, in_channels, out_channels);
  if (pairs || channels_first) op.channels_last = true;
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
  // Along the side whose elements lie closer together, though taps may be read backwards.
  const bool w_channels_outer =
      w_taps.stride() == 1 || (channels_first && has_dense_taps<T>(w_taps)) ||
      (w_channels.stride() != 1 && abs64(w_taps.stride()) <= abs64(w_channels.stride()));
  const bool w_plain = w_taps.single() && w_taps.stride() == 1;

  const int64_t step = out.stride[kColumn] * op.out_step[1];
  const bool dense_channels = out.stride[kChannel] == 1 && !(out_channels == 1 && step == 1);
  // Few channels would leave lanes empty: then pixels fill them, if a slab has them side by side.
  constexpr int64_t kFewChannels = 3 * Engine<T>::S::kWidth / 4;
  // Whether there are pairs must not depend on the layout of what is written.
  const bool reads_pairs = pairs || (Engine<T>::kGroup == 2 && op.channels_last);
  bool pixel_rows = dense_channels || reads_pairs || channels_first ||
                    prefers_pixel_rows<T>(op, in_channels, out_channels);
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
  g.bias = static_cast<const T*>(op.bias);
  g.bias_stride = op.bias_stride;
  problem->set_output(static_cast<T*>(out.data) + op.out_offset,
                      pixel_rows ? out_pixels : out_channel, pixel_rows ? out_channel : out_pixels,
                      pitched ? op.columns.count : INT64_MAX);
  if (pitched) {
    g.cols = (op.rows.count - 1) * problem->slab.pitch + op.columns.count;
    // What a tile costs that lies in two rows, in steps of one of its vectors.
    constexpr int64_t kToDivide = 6, kWidth = Engine<T>::S::kWidth;
    const int64_t panel = out_channels <= max_rows(4) ? 4 * kWidth : 2 * kWidth;
    const int64_t idle = round_up(op.columns.count, panel) - problem->slab.pitch;
    g.row_panels = g.scatter && idle * g.depth <= kToDivide * kWidth;
  }

  Batch &images = g.batch[0], &groups = g.batch[1];
  const int64_t image_group = in_channels * image.stride[kChannel], w_group = k * w.stride[0];
  const int64_t mask_group = op.mask ? in_channels * op.mask->stride[kChannel] : 0;
  groups = {op.groups, image_group, mask_group, w_group, 0, out_channels * out.stride[kChannel]};
  if (by_image)
    images = {out.size[kBatch],  image.stride[kBatch], op.mask ? op.mask->stride[kBatch] : 0, 0, 0,
              out.stride[kBatch]};
  groups.bias = out_channels * op.bias_stride;
  if (pixel_rows) return;
  for (Batch& batch : g.batch) {
    const Batch b = batch;
    batch.a = b.b, batch.a_mask = b.b_mask, batch.b = b.a, batch.b_mask = b.a_mask;
  }
  constexpr int64_t kManyColumns = 1024;
  if (g.a_rows_outer && !g.a.plain() && g.cols * images.count >= kManyColumns)
    problem->share_weights();
}

// Calls `body` with all that running the problem needs: bytes and a function of the space.
template <class T, class Epilogue, class Body>
void plan_problem(const ConvProblem<T>& problem, const TwinfuseContext& context, const Body& body) {
  Plan<T> plan(problem.g, context);
  const int64_t weights = problem.weight_bytes();
  body(weights + plan.bytes(), [&](char* space) {
    if (weights && !plan.g.empty()) {
      plan.g.a.data = reinterpret_cast<T*>(space);
      problem.pack_weights(context, reinterpret_cast<T*>(space));
    }
    run<T, Epilogue>(plan, context, space + weights);
  });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
