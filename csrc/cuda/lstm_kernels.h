// The kernels of the LSTM that there are, and their shapes: plain C++, which the host reads, too.
//
// A thread holds weights in most of its 255 registers, which decides how many units a kernel takes.
#pragma once

#include <stdint.h>

namespace twinfuse::cuda {

enum class LstmFormat { bf16, fp16, tf32, tf32x3 };

template <int a, int b>
constexpr int kSmaller = a < b ? a : b;
template <int a, int b>
constexpr int kLarger = a < b ? b : a;

constexpr bool is_half(LstmFormat format) {
  return format == LstmFormat::bf16 || format == LstmFormat::fp16;
}
constexpr int element_size(LstmFormat format) { return is_half(format) ? 2 : 4; }

// Who has the units of a sequence: one block, a cluster of blocks, which write into each other's
// memory, or blocks anywhere on the device, which see each other's writes in its memory.
enum LstmReach { kBlock, kCluster, kGrid };

// Sequences that the memory of a block has room for, where it shares them with others anywhere.
constexpr int kMostShared = 128;

// Exchanges through the device's memory: steps whose results are kept at a time. Bytes are all set
// before.
constexpr int kExchangeSlots = 4;

// Exchanges in the memory of a block: rows begin in different banks.
constexpr int exchange_pitch(int width, int size) { return width + 64 / size; }

// `rows` groups of warps have different units, `parts` warps of each share these and have
// different parts of the reduced dimension: `groups` times 64 bytes. `columns` times 8 sequences
// make a chunk.
template <LstmFormat format, int rows, int parts, int groups, int columns, LstmReach reach>
struct LstmShape {
  static constexpr int kParts = parts, kGroups = groups, kColumns = columns;
  static constexpr LstmReach kReach = reach;
  static constexpr int kKept = 0;
  static constexpr int kThreads = 32 * rows * kParts;
  static constexpr int kDepth = kParts * kGroups * 64 / element_size(format);
  static constexpr int kChunk = 8 * kColumns;
  // Of two steps, and two barriers.
  static constexpr int kExchange =
      reach == kGrid
          ? 16
          : 2 * kChunk * exchange_pitch(kDepth, element_size(format)) * element_size(format) + 16;

  // Sequences of a slice: where a block is alone, a thread has one cell.
  template <int kUnits>
  static constexpr int most_slice() {
    return reach == kGrid      ? kMostShared
           : reach == kCluster ? kChunk
                               : kSmaller<kChunk, kThreads / kUnits>;
  }
  // While weights are loaded, each warp has a kilobyte for each of its tiles.
  template <class Memory, int kTiles>
  static constexpr int shared_bytes() {
    return kLarger<sizeof(Memory), kThreads / 32 * kTiles * 1024>;
  }
};

// Forward, a warp has `octets` times 8 units.
template <LstmFormat format, int rows, int parts, int octets, int groups, int columns,
          LstmReach reach>
struct LstmForwardShape : LstmShape<format, rows, parts, groups, columns, reach> {
  using Base = LstmShape<format, rows, parts, groups, columns, reach>;
  static constexpr int kOctets = octets, kTiles = 2 * octets;
  static constexpr int kUnits = 8 * octets * rows;  // of a block
  static constexpr int kWidth = Base::kDepth;       // units that a sequence may have
  static constexpr int kPitch = 4 * kUnits + 4;     // of sums: neighbours in different banks
  static constexpr int kMostSlice = Base::template most_slice<kUnits>();
  // Of a cluster, each thread hands over 16 bytes with its neighbours, and every unit has a block.
  static_assert(reach != kCluster ||
                (kUnits % (16 / element_size(format)) == 0 && kWidth % kUnits == 0 &&
                 Base::kChunk * kUnits % Base::kThreads == 0));

  struct Memory {
    alignas(16) unsigned char exchange[Base::kExchange];
    alignas(16) float sums[parts][Base::kChunk][kPitch];
    float bias[kUnits][4];
    float h[kMostSlice][kUnits], c[kMostSlice][kUnits], last[kMostSlice][kUnits];
  };
  static constexpr int kSharedBytes = Base::template shared_bytes<Memory, kTiles>();
};

// Backward, a warp has 16 units.
template <LstmFormat format, int rows, int parts, int groups, int columns, LstmReach reach>
struct LstmBackwardShape : LstmShape<format, rows, parts, groups, columns, reach> {
  using Base = LstmShape<format, rows, parts, groups, columns, reach>;
  static constexpr int kTiles = 1;
  static constexpr int kUnits = 16 * rows;
  static constexpr int kWidth = Base::kDepth / 4;
  static constexpr int kPitch = kUnits + 4;
  static constexpr int kMostSlice = Base::template most_slice<kUnits>();
  static_assert(reach != kCluster, "clusters are no faster here");

  // Gradients of the state, and what skipped steps add to the output of the last one that was not.
  struct Memory {
    alignas(16) unsigned char exchange[Base::kExchange];
    float sums[parts][Base::kChunk][kPitch];
    float h[kMostSlice][kUnits], c[kMostSlice][kUnits], last[kMostSlice][kUnits];
    alignas(16) float bias[kMostSlice][kUnits][4];
  };
  static constexpr int kSharedBytes = Base::template shared_bytes<Memory, kTiles>();
};

// One step in a launch, of any depth: `rows` groups of warps have `tiles` tiles each, and a warp of
// these one of `parts` parts of the reduced dimension. No weights are held.
template <int rows, int parts, int tiles, int columns>
struct LstmStepShape {
  static constexpr int kParts = parts, kTiles = tiles, kColumns = columns;
  static constexpr int kThreads = 32 * rows * parts, kChunk = 8 * columns, kMostSlice = kChunk;
  static constexpr int kWidth = INT32_MAX, kDepth = 0;
  static constexpr LstmReach kReach = kGrid;
};

template <LstmFormat, int rows, int parts, int tiles, int columns>
struct LstmForwardStepShape : LstmStepShape<rows, parts, tiles, columns> {
  using Base = LstmStepShape<rows, parts, tiles, columns>;
  static constexpr int kUnits = 4 * tiles * rows;
  static constexpr int kKept = 2;  // numbers of a cell between two launches

  struct Memory {
    alignas(16) float sums[parts][Base::kChunk][4 * kUnits + 4];
    float bias[kUnits][4];
    float h[Base::kChunk][kUnits], c[Base::kChunk][kUnits], last[Base::kChunk][kUnits];
  };
  static constexpr int kSharedBytes = sizeof(Memory);
};

template <LstmFormat, int rows, int parts, int tiles, int columns>
struct LstmBackwardStepShape : LstmStepShape<rows, parts, tiles, columns> {
  using Base = LstmStepShape<rows, parts, tiles, columns>;
  static constexpr int kUnits = 16 * tiles * rows;
  static constexpr int kKept = 7;

  struct Memory {
    float sums[parts][Base::kChunk][kUnits + 4];
    float h[Base::kChunk][kUnits], c[Base::kChunk][kUnits], last[Base::kChunk][kUnits];
    alignas(16) float bias[Base::kChunk][kUnits][4];
  };
  static constexpr int kSharedBytes = sizeof(Memory);
};

// F(name, pass, format, the shape's numbers), by the units that a kernel takes; C of those that run
// in clusters, which have all blocks that the width needs.
#define TWINFUSE_LSTM_STEPS(F, format)                                 \
  F(lstm_forward_##format##_step, ForwardStep, format, 1, 8, 2, 4)     \
  F(lstm_forward_##format##_widestep, ForwardStep, format, 2, 4, 2, 8) \
  F(lstm_backward_##format##_step, BackwardStep, format, 1, 16, 1, 4)  \
  F(lstm_backward_##format##_widestep, BackwardStep, format, 2, 8, 1, 4)

#define TWINFUSE_LSTM_16(F, C, format)                                            \
  F(lstm_forward_##format##_64, Forward, format, 8, 2, 1, 1, 1, kBlock)           \
  F(lstm_forward_##format##_128, Forward, format, 16, 1, 1, 4, 1, kBlock)         \
  C(lstm_forward_##format##_cluster256, Forward, format, 2, 4, 1, 2, 2, kCluster) \
  F(lstm_forward_##format##_256, Forward, format, 1, 8, 2, 1, 4, kGrid)           \
  C(lstm_forward_##format##_cluster512, Forward, format, 4, 4, 1, 4, 2, kCluster) \
  F(lstm_forward_##format##_512, Forward, format, 1, 8, 2, 2, 4, kGrid)           \
  F(lstm_forward_##format##_768, Forward, format, 1, 8, 2, 3, 2, kGrid)           \
  F(lstm_forward_##format##_1024, Forward, format, 1, 8, 2, 4, 2, kGrid)          \
  F(lstm_forward_##format##_1280, Forward, format, 1, 8, 2, 5, 1, kGrid)          \
  F(lstm_backward_##format##_64, Backward, format, 4, 4, 2, 1, kBlock)            \
  F(lstm_backward_##format##_128, Backward, format, 8, 2, 8, 1, kBlock)           \
  F(lstm_backward_##format##_256, Backward, format, 1, 8, 4, 4, kGrid)            \
  F(lstm_backward_##format##_512, Backward, format, 1, 8, 8, 2, kGrid)            \
  F(lstm_backward_##format##_768, Backward, format, 1, 8, 12, 1, kGrid)           \
  F(lstm_backward_##format##_1024, Backward, format, 1, 8, 16, 1, kGrid)          \
  TWINFUSE_LSTM_STEPS(F, format)

#define TWINFUSE_LSTM_32(F, C, format)                                            \
  F(lstm_forward_##format##_64, Forward, format, 4, 2, 2, 2, 1, kBlock)           \
  C(lstm_forward_##format##_cluster256, Forward, format, 2, 4, 1, 4, 2, kCluster) \
  F(lstm_forward_##format##_256, Forward, format, 1, 8, 1, 2, 4, kGrid)           \
  F(lstm_forward_##format##_512, Forward, format, 1, 8, 1, 4, 4, kGrid)           \
  F(lstm_forward_##format##_768, Forward, format, 1, 8, 1, 6, 2, kGrid)           \
  F(lstm_forward_##format##_1024, Forward, format, 1, 8, 1, 8, 2, kGrid)          \
  F(lstm_backward_##format##_64, Backward, format, 4, 2, 8, 1, kBlock)            \
  F(lstm_backward_##format##_256, Backward, format, 1, 8, 8, 2, kGrid)            \
  F(lstm_backward_##format##_512, Backward, format, 1, 8, 16, 1, kGrid)           \
  TWINFUSE_LSTM_STEPS(F, format)

// Only the threads of a block are its shape.
template <LstmFormat, int threads>
struct LstmOffsetsShape {
  static constexpr int kThreads = threads;
};
#define TWINFUSE_LSTM_OFFSETS(F, C) F(lstm_offsets, Offsets, bf16, 128)

#define TWINFUSE_LSTM_BF16(F, C) TWINFUSE_LSTM_16(F, C, bf16)
#define TWINFUSE_LSTM_FP16(F, C) TWINFUSE_LSTM_16(F, C, fp16)
#define TWINFUSE_LSTM_TF32(F, C) TWINFUSE_LSTM_32(F, C, tf32)
// Three products take so long that clusters gain nothing.
#define TWINFUSE_LSTM_NO_CLUSTERS(...)
#define TWINFUSE_LSTM_TF32X3(F, C) TWINFUSE_LSTM_32(F, TWINFUSE_LSTM_NO_CLUSTERS, tf32x3)

}  // namespace twinfuse::cuda
