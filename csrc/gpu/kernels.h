// The kernels that csrc/aot.py has compiled: what each computes, and what its launch needs.
//
// The table itself is generated beside the machine code (build/kernels/table.cc). The enumerators
// are the names of csrc/triton/variants.py.
#pragma once

#include <stdint.h>

namespace twinfuse::gpu {

enum class Function : uint8_t { product, combine, rearrange };

enum class Reader : uint8_t {
  none,
  depth,
  lines,
  left_lines,
  strided,
  depth_masked,
  lines_masked,
  tensor_depth,
  tensor_lines,
  tensor_depth_masked,
  tensor_lines_masked,
  windows,
  planes,
  flat,
  weight_depth,
  weight_lines,
  weight_strided,
  weight_flat,
  taps,
  taps_strided,
  tensor_windows,
  tensor_weight_depth,
  tensor_weight_lines,
  tensor_taps,
  tensor_pixels,
};

enum class Epilogue : uint8_t { none, bias_relu, strided_bias_relu, identity };

enum class Writer : uint8_t {
  none,
  lines,
  strided,
  tensor,
  split,
  windows,
  planes,
  taps,
  tensor_windows,
  box_planes,
};

enum class Type : uint8_t { bf16, fp16, fp32 };

constexpr int64_t element_size(Type type) { return type == Type::fp32 ? 4 : 2; }

enum class Precision : uint8_t { ieee, tf32, tf32x3 };

// What vectors need: of addresses in bytes, of strides and sizes in elements.
constexpr int64_t kVector = 16;

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVector == 0; }

inline int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a kernel computes. `vectors` of a product: whether it reads vectors. Of a rearrangement, `a`
// is how it reads (lines, strided or planes, the latter by vectors or not), and what it does is
// told by `masks`, `writes` and `sums`.
struct Role {
  Function function = Function::product;
  Reader a = Reader::none, b = Reader::none;
  Epilogue epilogue = Epilogue::none;
  Writer store = Writer::none;
  Type type = Type::bf16;
  Precision precision = Precision::ieee;
  bool vectors = false;
  bool masks = false, writes = false, sums = false;

  uint64_t key() const {
    const uint8_t parts[] = {
        uint8_t(function),  uint8_t(a),
        uint8_t(b),         uint8_t(epilogue),
        uint8_t(store),     uint8_t(type),
        uint8_t(precision), uint8_t(vectors * 8 + masks * 4 + writes * 2 + sums)};
    uint64_t key = 0;
    for (const uint8_t part : parts) key = key << 8 | part;
    return key;
  }
};

constexpr int kMostRank = 5;

enum class Kind : uint8_t { pointer, i32, i64, tensor };

// A parameter: whether its value must be divisible by 16, and how a descriptor is encoded.
struct Parameter {
  Kind kind;
  bool divisible;
  uint8_t rank;
  uint8_t swizzle;
  uint16_t box[kMostRank];  // outermost dimension first
};

// Rows and columns of the output that one program computes, and `k` of the reduced dimension that
// it takes at a time.
struct Tile {
  int32_t m, n, k;
};

// Machine code in kImages, each file packed by itself in zlib's format. Kernels may share one.
struct Image {
  uint32_t offset;
  uint32_t packed;  // bytes there
  uint32_t size;    // bytes of the code
};

struct Kernel {
  int32_t arch;
  Role role;
  Tile tile;
  int32_t warps;
  bool persistent;
  int32_t registers;  // of a thread
  uint32_t shared;    // bytes
  const Parameter* parameters;
  int32_t parameter_count;
  Image image;
  const char* entry;
  const char* name;
};

// A kernel of csrc/cuda, which takes one struct. Code for 9.0 runs on all of 9.x.
struct CudaKernel {
  int32_t arch;
  const char* entry;
  int32_t registers;  // of a thread
  Image image;
};

extern const Kernel kKernels[];
extern const int kKernelCount;
extern const CudaKernel kCudaKernels[];
extern const int kCudaKernelCount;
extern const unsigned char* const kImages;
extern const char* const kSources;  // hash of what the kernels were compiled from

// Choices that were measured when this was built: lines as twinfuse_tune_select takes them.
extern const char* const kMeasured;

}  // namespace twinfuse::gpu
