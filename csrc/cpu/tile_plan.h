// Which convolutions are made in tiles of 2x2 outputs, and how they are cut.
#pragma once

#include "cpu/window_product.h"
#include "cpu/winograd_transforms.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
constexpr bool kHasTiles = std::is_same<T, float>::value;

// By shapes of one image alone, as bits depend on it.
inline bool takes_tiles(const WindowProduct& op) {
  constexpr int64_t kFewestChannels = 16, kFewestPixels = 16;
  const auto fits = [](const Windows& w) {
    return w.taps == kTileTaps && w.step == 1 && w.dilation == 1 && abs64(w.tap_step) == 1;
  };
  if (!fits(op.rows) || !fits(op.columns) || op.groups != 1) return false;
  if (min64(op.weight.size[0], op.weight.size[1]) < kFewestChannels) return false;
  const int64_t pixels = op.rows.count * op.columns.count;
  const int64_t tiles =
      ceil_div(op.rows.count, kTileOutputs) * ceil_div(op.columns.count, kTileOutputs);
  // Transforms take about a fourth of the time of the products of few channels.
  return pixels >= kFewestPixels && tiles * kProducts * 5 <= pixels * kTileTaps * kTileTaps * 4;
}

// Of blocks of tiles, which one thread takes through all steps in its second-level cache.
template <class T>
struct TilePlan {
  using E = Engine<T>;
  using Acc = typename E::Acc;
  static constexpr int64_t kWidth = E::S::kWidth;
  static constexpr int64_t kTiles = 64, kDepth = 64, kColumns = 8 * kWidth;
  static constexpr int64_t kStretch = 2 * kWidth;  // chunks are made of these

  int64_t in_channels, out_channels, images;
  int64_t tile_rows, tile_columns;  // of an image
  // A strip is a row of tiles, or one of `pieces` of it.
  int64_t pieces, strip_tiles, strips;
  int64_t block_strips, blocks;    // of all images
  int64_t depth, columns, chunks;  // channels of the input, and of the output, at a time
  int64_t workers;
  // Tiles fill one vector, and channels in of the weight lie side by side: it is cheaper to turn
  // the tiles and their sums than the weights, which are then the rows of the products. That
  // changes no sum.
  bool turned;

  TilePlan(const WindowProduct& op, const TwinfuseContext& context) {
    in_channels = op.weight.size[op.transposed ? 0 : 1];
    out_channels = op.weight.size[op.transposed ? 1 : 0];
    images = op.image.size[kBatch];
    tile_rows = ceil_div(op.rows.count, kTileOutputs);
    tile_columns = ceil_div(op.columns.count, kTileOutputs);
    depth = min64(in_channels, kDepth);
    // Where all channels fit, a worker keeps transformed weights from block to block, so that low
    // blocks cost nothing.
    const int64_t most = depth == in_channels ? kTiles / 2 : kTiles;
    pieces = ceil_div(tile_columns, most);
    strip_tiles = ceil_div(tile_columns, pieces);
    strips = images * tile_rows * pieces;
    const double work = static_cast<double>(strips * strip_tiles * kProducts) *
                        static_cast<double>(in_channels * out_channels);
    workers = worth_waking(context, work);
    columns = min64(round_up(out_channels, kStretch), kColumns);
    block_strips = pieces > 1 ? 1 : max64(most / tile_columns, 1);
    cut();
    while (uneven(tasks(), workers) && columns > kStretch)
      columns = round_up(columns / 2, kStretch), cut();
    while (uneven(tasks(), workers) && block_strips > 1)
      block_strips = ceil_div(block_strips, 2), cut();
    columns = round_up(ceil_div(out_channels, chunks), kStretch);
    chunks = ceil_div(out_channels, columns);
    workers = max64(min64(workers, tasks()), 1);
    const int64_t* stride = op.weight.stride;
    const int64_t all = strips * strip_tiles;
    turned = all <= kWidth && 4 * all > 3 * kWidth && stride[op.transposed ? 0 : 1] == 1 &&
             stride[op.transposed ? 1 : 0] != 1;
  }

  int64_t tasks() const { return blocks * chunks; }
  int64_t tiles() const { return block_strips * strip_tiles; }
  // Odd numbers of cache lines, so that neighbours, such as the products of a tile, do not share
  // cache sets.
  int64_t tile_row() const { return Scratch<T>::row_stride(depth); }
  int64_t tile_plane() const { return lanes() * tile_row() + kWidth; }
  int64_t weight_row() const { return round_up(depth, kWidth); }
  int64_t weight_plane() const { return weight_row() * columns + kWidth; }
  int64_t sum_plane() const { return lanes() * columns + kWidth; }
  // Turned: tiles as vectors, step by step, and afterwards the sums turned back.
  int64_t lanes() const { return turned ? round_up(tiles(), kWidth) : tiles(); }
  int64_t turned_plane() const { return turned ? max64(weight_row() * lanes(), sum_plane()) : 0; }
  int64_t line() const { return (2 * strip_tiles + 2) * depth; }

  // Per worker, in elements.
  int64_t slab() const { return round_up((2 * block_strips + 2) * line() + 2 * kWidth, kWidth); }
  int64_t outputs() const { return 2 * round_up(2 * strip_tiles, kWidth) * kWidth; }
  int64_t scratch() const {
    const int64_t planes = tile_plane() + weight_plane() + sum_plane() + turned_plane();
    return slab() + outputs() + kProducts * planes;
  }
  int64_t flag_bytes() const { return round_up(images, 64); }
  int64_t bytes() const { return workers * scratch() * static_cast<int64_t>(sizeof(Acc)); }

 private:
  void cut() {
    blocks = ceil_div(strips, block_strips);
    block_strips = max64(ceil_div(strips, max64(blocks, 1)), 1);
    chunks = ceil_div(out_channels, columns);
  }
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
