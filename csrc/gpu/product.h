// Products of matrices: out[i, j] = epilogue(sum over r of a[i, r] * b[j, r]).
#pragma once

#include "api/calls.h"
#include "gpu/choice.h"
#include "gpu/launch.h"

namespace twinfuse::gpu {

// What every launch of a call shares.
struct Call {
  const TwinfuseContext& context;
  Device& device;
  Type type;
  Precision precision;
  bool nan_passes = true;  // by the rule of TwinfuseReluGrad

  // Throws OutOfMemory.
  void* allocate(int64_t bytes) const;

  // Three terms of TF32 are less accurate than single float32 products, which shows where few are
  // summed.
  bool shallow(int64_t depth) const {
    constexpr int64_t kShallow = 16;
    return precision == Precision::tf32x3 && depth <= kShallow;
  }

  // Kernels that read single elements take the time of three terms anyway.
  Precision of_elements(int64_t depth) const {
    if (shallow(depth)) return Precision::ieee;
    return precision == Precision::tf32 ? Precision::tf32x3 : precision;
  }
};

// An operand [lines, depth] with the strides of both, and beside it, where the operand is a
// gradient, ReLU's output.
struct Operand {
  const void* data;
  int64_t lines, depth, line, step;
  const void* mask = nullptr;
  int64_t mask_line = 0, mask_step = 0;
};

struct Vector {
  const void* data = nullptr;
  int64_t stride = 0;

  // Whether it can be read by vectors, as one that is not there can.
  bool fits_vectors() const { return !data || (stride == 1 && aligned(data)); }
};

// Where results of [rows, cols] go.
struct Result {
  void* data;
  int64_t row, col;
};

inline Operand operand(const Matrix& m) {
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride};
}

inline Operand transposed(const Operand& m) {
  return {m.data, m.depth, m.lines, m.step, m.line, m.mask, m.mask_step, m.mask_line};
}

inline Result result(const Matrix& m) { return {m.data, m.row_stride, m.col_stride}; }

enum class Behind { nothing, bias_relu };

struct Product {
  Operand a, b;
  Result out;
  Behind behind = Behind::nothing;
  Vector bias = {};

  Shape shape() const { return {a.lines, b.lines, a.depth}; }
};

// Kernels write columns that lie side by side: where rows do, the product is transposed (which it
// can be without anything behind it).
inline Product oriented(const Product& p) {
  if (p.out.col == 1 || p.out.row != 1) return p;
  return {p.b, p.a, {p.out.data, p.out.col, p.out.row}};
}

// The kernel for a product; none where no kernel serves it.
Choice plan(const Call& call, const Product& product);

// Throws Unsupported, DriverError or OutOfMemory.
void run(const Call& call, const Product& product, const Choice& choice);

// [images * pixels, cols] with its strides; and where it is a gradient behind ReLU, ReLU's output
// with its own.
struct Pixels {
  bool masked;
  int64_t images, pixels, cols;
  struct Source {
    const void* data;
    int64_t image, pixel, col;  // strides
  } x, output;
};

// One pass: written to `written` with rows `pitch` apart (nullptr: not), and summed over the rows
// to `sums` (nullptr: not).
void rearrange(const Call& call, const Pixels& source, void* written, int64_t pitch,
               const Vector* sums);

// Clocks that it takes, as Choice has them.
double rearrange_clocks(const Call& call, const Pixels& source, bool writes);

// Adds up parts [splits, rows, cols] of float32.
void combine(const Call& call, const void* parts, int splits, int64_t rows, int64_t cols,
             const Result& out, Behind behind, const Vector& bias);

// The sizes behind the operands of every product, and the launch.
void add_sizes(Launch& launch, const Call& call, const Kernel& kernel, const Shape& shape,
               int64_t steps, int splits);

// The bias, as an epilogue takes it.
void add(Launch& launch, Epilogue epilogue, const Vector& bias);

// Whether numbers of tiles and elements fit into the 32 bits that kernels count with.
void require_countable(int64_t size);

}  // namespace twinfuse::gpu
