// Windows times weight in tiles of 2x2 windows: sixteen products of transformed tiles and
// transformed weights, which take 4/9 of the multiplications (cpu/winograd_transforms.h).
#pragma once

#include "cpu/tile_plan.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T, class Epilogue>
class TileWorker {
  using E = Engine<T>;
  using Acc = typename E::Acc;
  using S = typename E::S;
  using V = typename S::V;
  static constexpr int64_t kWidth = S::kWidth;

 public:
  // `overflowed`: a flag for each image.
  TileWorker(const WindowProduct& op, const TilePlan<T>& plan, Acc* scratch, uint8_t* overflowed)
      : op_(op), plan_(plan), overflowed_(overflowed) {
    slab_ = scratch;
    outputs_ = reinterpret_cast<T*>(slab_ + plan.slab());
    tiles_ = slab_ + plan.slab() + plan.outputs();
    weights_ = tiles_ + kProducts * plan.tile_plane();
    sums_ = weights_ + kProducts * plan.weight_plane();
    turned_ = sums_ + kProducts * plan.sum_plane();
    const Images& w = op.weight;
    taps_ = {static_cast<const T*>(w.data) + op.rows.first_tap * w.stride[kRow] +
                 op.columns.first_tap * w.stride[kColumn],
             w.stride[op.transposed ? 1 : 0], w.stride[op.transposed ? 0 : 1],
             op.rows.tap_step * w.stride[kRow], op.columns.tap_step * w.stride[kColumn]};
  }

  // Tasks of the same columns should follow each other: they share transformed weights.
  void run(int64_t task) {
    const int64_t first = task % plan_.blocks * plan_.block_strips;
    const int64_t strips = min64(plan_.block_strips, plan_.strips - first);
    chunk_ = task / plan_.blocks;
    cols_ = min64(plan_.columns, plan_.out_channels - chunk_ * plan_.columns);
    block_tiles_ = strips * plan_.strip_tiles;
    vectors_ = block_tiles_ <= max_rows(kMaxVectors) ? kMaxVectors : 2;
    if (plan_.turned) vectors_ = static_cast<int>(plan_.lanes() / kWidth);
    for (int64_t c = 0; c < plan_.in_channels; c += plan_.depth) {
      const int64_t depth = min64(plan_.depth, plan_.in_channels - c);
      transform_strips(first, strips, c, depth);
      transform_weights(c, depth);
      plan_.turned ? multiply_turned(depth, c > 0) : multiply(depth, c > 0);
    }
    if (plan_.turned) turn_sums();
    for (int64_t strip = 0; strip < strips; strip++) finish(first + strip, strip);
  }

 private:
  struct Strip {
    int64_t image, row, piece;
  };
  Strip strip_at(int64_t index) const {
    const int64_t row = index / plan_.pieces;
    return {row / plan_.tile_rows, row % plan_.tile_rows, index % plan_.pieces};
  }

  void transform_strips(int64_t first, int64_t count, int64_t channel, int64_t depth) {
    Source<T> source = image_source<T>(op_.image, op_.mask, op_.relu_grad);
    source.data += channel * op_.image.stride[kChannel];
    if (source.mask) source.mask += channel * op_.mask->stride[kChannel];
    TransformedTiles<Acc> to{tiles_, plan_.tile_row(), plan_.tile_plane()};
    for (int64_t done = 0; done < count;) {
      const Strip strip = strip_at(first + done);
      const int64_t rows = plan_.pieces > 1 ? 1 : min64(count - done, plan_.tile_rows - strip.row);
      const int64_t left = op_.columns.origin + 2 * strip.piece * plan_.strip_tiles;
      const Slab slab = slab_of(
          op_.image, op_.mask, depth,
          {plan_.tile_rows, kTileOutputs, op_.rows.origin, kTilePixels, 1, 0, 1},
          {plan_.strip_tiles, kTileOutputs, left, kTilePixels, 1, 0, 1}, true, false, false, false);
      fill_slab(slab, source, strip.image, strip.row, rows, slab_);
      for (int64_t y = 0; y < rows; y++, to.data += plan_.strip_tiles * to.row)
        transform_image(slab_ + 2 * y * slab.line(), slab.line(), depth, plan_.strip_tiles, to);
      done += rows;
    }
  }

  // Calls `body` with the first column and the vectors of each panel.
  template <class Body>
  void each_panel(const Body& body) const {
    for (int64_t j = 0; j < cols_;) {
      const int needed = vectors_for(cols_ - j, kWidth);
      const int vectors = needed < vectors_ ? needed : vectors_;
      body(j, vectors);
      j += vectors * kWidth;
    }
  }

  void transform_weights(int64_t channel, int64_t depth) {
    const bool kept =
        depth == plan_.in_channels && weights_chunk_ == chunk_ && weights_vectors_ == vectors_;
    if (kept) return;
    weights_chunk_ = chunk_, weights_vectors_ = vectors_;
    const WeightTransform<T> transform(taps_);
    if (plan_.turned)
      return transform.run_rows(chunk_ * plan_.columns, cols_, channel, depth, weights_,
                                plan_.weight_row(), plan_.weight_plane());
    const int64_t step = transform.reads_vectors() ? 1 : depth;
    for (int64_t c = 0; c < depth; c += step)
      each_panel([&](int64_t j, int vectors) {
        for (int v = 0; v < vectors; v++) {
          const int64_t at = j + v * kWidth, left = max64(min64(cols_ - at, kWidth), 0);
          const int64_t column = chunk_ * plan_.columns + (left ? at : 0), width = vectors * kWidth;
          transform.run(column, static_cast<int>(left), channel + c, step,
                        weights_ + j * depth + c * width + v * kWidth, width, plan_.weight_plane());
        }
      });
  }

  // Blocks of channels are whole runs.
  int64_t run() const {
    return min64(run_of<typename E::Arithmetic>(plan_.in_channels), TilePlan<T>::kDepth);
  }

  void multiply(int64_t depth, bool continued) {
    Operands in{};
    in.run = run();
    in.steps = depth, in.a_step = sizeof(Acc);
    in.a_row = plan_.tile_row() * static_cast<int64_t>(sizeof(Acc));
    in.continued = continued;
    const int64_t parts = ceil_div(block_tiles_, max_rows(vectors_));
    for (int64_t product = 0; product < kProducts; product++) {
      const Acc* tiles = tiles_ + product * plan_.tile_plane();
      each_panel([&](int64_t j, int vectors) {
        in.b = reinterpret_cast<const char*>(weights_ + product * plan_.weight_plane() + j * depth);
        in.b_step = vectors * kWidth * static_cast<int64_t>(sizeof(Acc));
        Acc* sums = sums_ + product * plan_.sum_plane() + j * block_tiles_;
        for (int64_t p = 0; p < parts; p++) {
          const Range part = part_of(block_tiles_, 1, parts, p);
          const int rows = static_cast<int>(part.end - part.begin);
          in.a = reinterpret_cast<const char*>(tiles + part.begin * plan_.tile_row());
          microkernel_for<typename E::Arithmetic>(InSlab::kNone, rows, vectors)(
              in, sums + part.begin * vectors * kWidth, nullptr);
        }
      });
    }
  }

  // Weights as rows, tiles as columns.
  void multiply_turned(int64_t depth, bool continued) {
    const int64_t lanes = plan_.lanes(), row = plan_.tile_row() * static_cast<int64_t>(sizeof(Acc));
    Operands in{};
    in.run = run();
    in.steps = depth, in.a_step = sizeof(Acc),
    in.b_step = lanes * static_cast<int64_t>(sizeof(Acc));
    in.a_row = plan_.weight_row() * static_cast<int64_t>(sizeof(Acc));
    in.continued = continued;
    const int64_t parts = ceil_div(cols_, max_rows(vectors_));
    for (int64_t product = 0; product < kProducts; product++) {
      Acc* tiles = turned_ + product * plan_.turned_plane();
      for (int64_t i = 0; i < lanes; i += kWidth)
        transpose_rows<T>(reinterpret_cast<const char*>(tiles_ + product * plan_.tile_plane() +
                                                        i * plan_.tile_row()),
                          row, round_up(depth, kPieceColumns<Acc>), tiles + i, lanes);
      in.b = reinterpret_cast<const char*>(tiles);
      for (int64_t p = 0; p < parts; p++) {
        const Range part = part_of(cols_, 1, parts, p);
        const int rows = static_cast<int>(part.end - part.begin);
        in.a = reinterpret_cast<const char*>(weights_ + product * plan_.weight_plane() +
                                             part.begin * plan_.weight_row());
        microkernel_for<typename E::Arithmetic>(InSlab::kNone, rows, vectors_)(
            in, sums_ + product * plan_.sum_plane() + part.begin * lanes, nullptr);
      }
    }
  }

  // Their sums as those of `multiply`.
  void turn_sums() {
    constexpr int kColumns = kPieces * kPieceColumns<Acc>;
    const int64_t lanes = plan_.lanes();
    for (int64_t product = 0; product < kProducts; product++) {
      Acc* from = sums_ + product * plan_.sum_plane();
      Acc* to = turned_ + product * plan_.sum_plane();
      memset(static_cast<void*>(from + cols_ * lanes), 0,
             (round_up(cols_, kWidth) - cols_) * lanes * sizeof(Acc));
      each_panel([&](int64_t j, int vectors) {
        for (int v = 0; v < vectors && j + v * kWidth < cols_; v++)
          for (int64_t tile = 0; tile < block_tiles_; tile += kColumns) {
            V columns[kColumns];
            transpose<Acc, kPieces>(
                reinterpret_cast<const char*>(from + (j + v * kWidth) * lanes + tile),
                lanes * sizeof(Acc), columns);
            for (int64_t i = 0; i < min64(kColumns, block_tiles_ - tile); i++)
              S::store(to + j * block_tiles_ + ((tile + i) * vectors + v) * kWidth, columns[i]);
          }
      });
    }
  }

  void finish(int64_t index, int64_t strip) {
    const Strip at = strip_at(index);
    const int64_t row = kTileOutputs * at.row;
    const int64_t column = kTileOutputs * at.piece * plan_.strip_tiles;
    const int64_t rows = min64(kTileOutputs, op_.rows.count - row);
    const int64_t pixels = min64(kTileOutputs * plan_.strip_tiles, op_.columns.count - column);
    const Images& out = op_.out;
    const int64_t line = out.stride[kRow] * op_.out_step[0];
    const int64_t pixel = out.stride[kColumn] * op_.out_step[1], channel = out.stride[kChannel];
    T* const image = static_cast<T*>(out.data) + op_.out_offset + at.image * out.stride[kBatch] +
                     row * line + column * pixel;
    V seen = S::zero();
    each_panel([&](int64_t j, int vectors) {
      for (int v = 0; v < vectors && j + v * kWidth < cols_; v++) {
        const int64_t k = chunk_ * plan_.columns + j + v * kWidth;
        const int n = static_cast<int>(min64(kWidth, plan_.out_channels - k));
        alignas(64) Acc bias[kWidth] = {};
        if (op_.bias)
          fetch_run(static_cast<const T*>(op_.bias) + k * op_.bias_stride, op_.bias_stride,
                    static_cast<const T*>(nullptr), 0, 0, n, bias);
        const Acc* sums = (plan_.turned ? turned_ : sums_) + j * block_tiles_ +
                          (strip * plan_.strip_tiles * vectors + v) * kWidth;
        if (channel == 1 && n == kWidth) {
          finish_vector(sums, vectors * kWidth, S::load(bias), image + k, line, pixel, rows, pixels,
                        &seen);
          continue;
        }
        const int64_t plane = plan_.outputs() / kTileOutputs;
        finish_vector(sums, vectors * kWidth, S::load(bias), outputs_, plane, kWidth, rows, pixels,
                      &seen);
        for (int64_t y = 0; y < rows; y++)
          store_pixels(outputs_ + y * plane, pixels, n, image + k * channel + y * line, pixel,
                       channel);
      }
    });
    alignas(64) Acc lanes[kWidth];
    S::store(lanes, seen);
    for (Acc x : lanes)
      if (!(x == 0)) __atomic_store_n(overflowed_ + at.image, uint8_t{1}, __ATOMIC_RELAXED);
  }

  // A vector of channels of a strip. `seen` stays zero as long as all sums are finite: those of
  // outputs beyond the image, too, so that each product shows, wherever blocks begin.
  void finish_vector(const Acc* sums, int64_t step, V bias, T* to, int64_t line, int64_t pixel,
                     int64_t rows, int64_t pixels, V* seen) const {
    for (int64_t x = 0; x < pixels; x += kTileOutputs, sums += step, to += kTileOutputs * pixel) {
      V tile[kTileOutputs][kTileOutputs];
      transform_products(sums, plan_.sum_plane(), tile);
#pragma GCC unroll 2
      for (int y = 0; y < kTileOutputs; y++)
#pragma GCC unroll 2
        for (int i = 0; i < kTileOutputs; i++) {
          *seen = S::fma(tile[y][i], S::zero(), *seen);
          if (y < rows && x + i < pixels)
            Convert<T>::store(to + y * line + i * pixel,
                              Epilogue::template apply<S>(tile[y][i], bias));
        }
    }
  }

  // `n` channels of pixels that lie side by side in `from`.
  static void store_pixels(const T* from, int64_t pixels, int n, T* to, int64_t pixel,
                           int64_t channel) {
    if (pixel == 1) return store_transposed(from, kWidth, static_cast<int>(pixels), n, to, channel);
    for (int64_t x = 0; x < pixels; x++)
      for (int k = 0; k < n; k++) to[x * pixel + k * channel] = from[x * kWidth + k];
  }

  const WindowProduct& op_;
  const TilePlan<T>& plan_;
  uint8_t* overflowed_;
  WeightTaps<T> taps_;
  T* outputs_;
  Acc *slab_, *tiles_, *weights_, *sums_, *turned_;
  int64_t chunk_ = 0, cols_ = 0, block_tiles_ = 0, weights_chunk_ = -1;
  int vectors_ = 2, weights_vectors_ = 0;
};

// Leaves in `overflowed` which images have sums that are not finite: infinities that taps meet
// become NaN here, and so may what is large, so that these images are to be done in the other way.
template <class T, class Epilogue>
void run_tiles(const WindowProduct& op, const TilePlan<T>& plan, const TwinfuseContext& context,
               char* space, uint8_t* overflowed) {
  using Acc = typename Engine<T>::Acc;
  memset(overflowed, 0, plan.images);
  parallel_for(context, plan.workers, [&](int64_t worker) {
    TileWorker<T, Epilogue> tiles(op, plan, reinterpret_cast<Acc*>(space) + worker * plan.scratch(),
                                  overflowed);
    const int64_t end = plan.tasks() * (worker + 1) / plan.workers;
    for (int64_t task = plan.tasks() * worker / plan.workers; task < end; task++) tiles.run(task);
  });
}

// Calls `body` with all that plain sums need: bytes and a function of the space.
template <class T, class Epilogue, class Body>
void plan_sums(const WindowProduct& op, const TwinfuseContext& context, const Body& body) {
  ConvProblem<T> problem;
  set_up(op, &problem);
  plan_problem<T, Epilogue>(problem, context, body);
}

template <class T>
Images image_at(Images images, int64_t index) {
  images.data = static_cast<T*>(images.data) + index * images.stride[kBatch];
  images.size[kBatch] = min64(images.size[kBatch], 1);
  return images;
}

// Those of one image.
template <class T, class Epilogue, class Body>
void plan_image(const WindowProduct& op, int64_t index, const TwinfuseContext& context,
                const Body& body) {
  WindowProduct one = op;
  one.image = image_at<T>(op.image, index), one.out = image_at<T>(op.out, index);
  const Images mask = op.mask ? image_at<T>(*op.mask, index) : Images();
  if (op.mask) one.mask = &mask;
  plan_sums<T, Epilogue>(one, context, body);
}

template <class T, class Epilogue, class Body>
void plan_tiles(const WindowProduct& op, const TwinfuseContext& context, const Body& body) {
  const TilePlan<T> plan(op, context);
  int64_t without_tiles = 0;
  plan_image<T, Epilogue>(op, 0, context,
                          [&](int64_t bytes, const auto&) { without_tiles = bytes; });
  const int64_t flags = plan.flag_bytes();
  body(flags + max64(plan.bytes(), without_tiles), [&](char* space) {
    uint8_t* overflowed = reinterpret_cast<uint8_t*>(space);
    run_tiles<T, Epilogue>(op, plan, context, space + flags, overflowed);
    for (int64_t i = 0; i < plan.images; i++)
      if (overflowed[i])
        plan_image<T, Epilogue>(op, i, context,
                                [&](int64_t, const auto& run) { run(space + flags); });
  });
}

// The same for the product in tiles, or by plain sums.
template <class T, class Epilogue, class Body>
void plan_window_product(const WindowProduct& op, const TwinfuseContext& context,
                         const Body& body) {
  if constexpr (kHasTiles<T>) {
    if (takes_tiles(op)) return plan_tiles<T, Epilogue>(op, context, body);
  }
  plan_sums<T, Epilogue>(op, context, body);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
