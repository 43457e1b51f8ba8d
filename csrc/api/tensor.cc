#include "api/tensor.h"

#include <string.h>

#include "api/error.h"

namespace twinfuse {
namespace {

constexpr size_t kElementSize[TWINFUSE_DTYPE_COUNT] = {4, 8, 2, 2};
constexpr const char* kDtypeNames[TWINFUSE_DTYPE_COUNT] = {"float32", "float64", "bfloat16",
                                                           "float16"};

std::string dtype_text(int32_t dtype) {
  return dtype >= 0 && dtype < TWINFUSE_DTYPE_COUNT ? kDtypeNames[dtype]
                                                    : "dtype number " + std::to_string(dtype);
}

std::string shape_text(const int64_t* sizes, int count) {
  std::string text = "[";
  for (int i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// Checker::tensor has seen to it that this does not overflow unless one of the sizes is zero.
int64_t row_count(const TwinfuseTensor& t) {
  for (int i = 0; i + 1 < t.ndim; i++)
    if (t.sizes[i] == 0) return 0;
  int64_t rows = 1;
  for (int i = 0; i + 1 < t.ndim; i++)
    if (__builtin_mul_overflow(rows, t.sizes[i], &rows)) return INT64_MAX;
  return rows;
}

// Copies between a tensor and a dense array of the same shape.
template <bool kToDense>
void copy(const TwinfuseTensor& t, char* dense) {
  const size_t size = kElementSize[t.dtype];
  const int last = t.ndim - 1;
  std::vector<int64_t> index(static_cast<size_t>(t.ndim), 0);
  const int64_t rows = row_count(t), cols = t.sizes[last];
  for (int64_t r = 0; r < rows; r++) {
    int64_t offset = 0;
    for (int d = 0; d < last; d++) offset += index[d] * t.strides[d];
    for (int64_t c = 0; c < cols; c++, dense += size) {
      char* element = static_cast<char*>(t.data) + (offset + c * t.strides[last]) * size;
      kToDense ? memcpy(dense, element, size) : memcpy(element, dense, size);
    }
    for (int d = last - 1; d >= 0 && ++index[d] == t.sizes[d]; d--) index[d] = 0;
  }
}

// The stride between rows if one serves all leading dimensions.
bool collapse(const TwinfuseTensor& t, int64_t* row_stride) {
  int64_t expected = 0;
  bool started = false;
  for (int d = t.ndim - 2; d >= 0; d--) {
    if (t.sizes[d] == 1) continue;
    if (!started)
      *row_stride = t.strides[d], started = true;
    else if (t.strides[d] != expected)
      return false;
    expected = t.strides[d] * t.sizes[d];
  }
  if (!started) *row_stride = t.sizes[t.ndim - 1];
  return true;
}

}  // namespace

Checker::Checker(const char* op, const TwinfuseContext* context) : op_(op) {
  if (!context || !context->allocate)
    reject("context", "a context with an allocator", "none");
  else if (context->device != TWINFUSE_CPU && context->device != TWINFUSE_CUDA)
    reject("context", "device 0 or 1", std::to_string(context->device));
}

void Checker::reject(const char* name, const std::string& expected, const std::string& got) {
  if (ok()) status_ = invalid(op_, name, expected, got);
}

void Checker::tensor(const char* name, const TwinfuseTensor* t, int32_t dtype) {
  if (!ok()) return;
  if (!t) return reject(name, "a tensor", "NULL");
  if (t->ndim < 1 || !t->sizes || !t->strides)
    return reject(name, "at least 1 dimension", std::to_string(t->ndim) + " dimensions");
  if (t->dtype < 0 || t->dtype >= TWINFUSE_DTYPE_COUNT)
    return reject(name, "float32, float64, bfloat16 or float16", dtype_text(t->dtype));
  if (t->dtype != dtype) return reject(name, dtype_text(dtype), dtype_text(t->dtype));
  bool empty = false, negative = false, too_large = false;
  int64_t count = 1;
  for (int i = 0; i < t->ndim; i++) {
    negative |= t->sizes[i] < 0;
    empty |= t->sizes[i] == 0;
    too_large |= __builtin_mul_overflow(count, t->sizes[i], &count);
  }
  if (negative) return reject(name, "sizes of 0 or more", shape_text(t->sizes, t->ndim));
  // A view may repeat elements, so a huge product is no error until it overflows.
  if (!empty && too_large)
    return reject(name, "fewer than 2^63 elements", shape_text(t->sizes, t->ndim));
  if (!empty && !t->data) reject(name, "data", "NULL");
}

void Checker::shape(const char* name, const TwinfuseTensor* t, const int64_t* leading, int count,
                    const Size* last, int last_count) {
  if (!ok() || !t) return;
  bool same = t->ndim == count + last_count;
  for (int i = 0; same && i < t->ndim; i++) {
    const Size size = i < count ? Size{leading[i]} : last[i - count];
    same = size.any || size.value == t->sizes[i];
  }
  if (same) return;
  std::string expected = "[";
  for (int i = 0; i < count; i++) expected += std::to_string(leading[i]) + ", ";
  for (int i = 0; i < last_count; i++)
    expected += (i ? ", " : "") +
                (last[i].any ? std::string(1, last[i].any) : std::to_string(last[i].value));
  reject(name, expected + "]", shape_text(t->sizes, t->ndim));
}

void Checker::vector(const char* name, const TwinfuseTensor* t, Size size) {
  shape(name, t, nullptr, 0, &size, 1);
}

void Checker::matrix(const char* name, const TwinfuseTensor* t, Size rows, Size cols) {
  const Size sizes[] = {rows, cols};
  shape(name, t, nullptr, 0, sizes, 2);
}

void Checker::rows_like(const char* name, const TwinfuseTensor* t, const TwinfuseTensor& like,
                        Size cols) {
  shape(name, t, like.sizes, like.ndim - 1, &cols, 1);
}

void Checker::sizes(const char* name, const TwinfuseTensor* t, const Size* sizes, int count) {
  shape(name, t, nullptr, 0, sizes, count);
}

void Checker::rank(const char* name, const TwinfuseTensor* t, int ndim, const char* expected) {
  if (ok() && t->ndim != ndim) reject(name, expected, shape_text(t->sizes, t->ndim));
}

void Checker::require(bool holds, const char* name, const char* expected, int64_t got) {
  if (!holds) reject(name, expected, std::to_string(got));
}

void Checker::given(const void* argument, const char* name, const char* expected) {
  if (!argument) reject(name, expected, "NULL");
}

void Checker::relu_grad(int32_t value) {
  if (value != TWINFUSE_RELU_GRAD_SELECT && value != TWINFUSE_RELU_GRAD_MULTIPLY)
    reject("relu_grad", "0 or 1", std::to_string(value));
}

Matrix Matrices::stage(const TwinfuseTensor& t, bool copy_in) {
  if (context_.device != TWINFUSE_CPU) {
    unsupported_ = true;
    return {};
  }
  const int64_t rows = row_count(t), cols = t.sizes[t.ndim - 1];
  Matrix m{nullptr, rows, cols, cols, 1};
  // What is lent may start anywhere, and elements are read whole.
  constexpr size_t kSlack = 63;
  size_t bytes = kElementSize[t.dtype];
  const bool too_large = __builtin_mul_overflow(bytes, static_cast<size_t>(rows), &bytes) ||
                         __builtin_mul_overflow(bytes, static_cast<size_t>(cols), &bytes) ||
                         __builtin_add_overflow(bytes, kSlack, &bytes);
  char* dense = too_large ? nullptr : static_cast<char*>(context_.allocate(context_.opaque, bytes));
  if (!dense) {
    out_of_memory_ = true;
    return m;
  }
  dense += -reinterpret_cast<uintptr_t>(dense) & kSlack;
  if (copy_in)
    copy<true>(t, dense);
  else
    staged_.push_back({&t, dense});
  m.data = dense;
  return m;
}

Matrix Matrices::input(const TwinfuseTensor* t) {
  if (!t) return {};
  const int64_t rows = row_count(*t), cols = t->sizes[t->ndim - 1];
  if (rows == 0 || cols == 0) return {t->data, rows, cols, cols, 1};
  int64_t row_stride = 0;
  if (!collapse(*t, &row_stride)) return stage(*t, true);
  return {t->data, rows, cols, row_stride, cols == 1 ? 1 : t->strides[t->ndim - 1]};
}

Matrix Matrices::output(const TwinfuseTensor* t, bool unit_rows_allowed) {
  if (!t) return {};
  // An empty gradient was asked for all the same: give it an address.
  static char nothing;
  const int64_t rows = row_count(*t), cols = t->sizes[t->ndim - 1];
  if (rows == 0 || cols == 0) return {&nothing, rows, cols, cols, 1};
  int64_t row_stride = 0;
  const int64_t col_stride = cols == 1 ? 1 : t->strides[t->ndim - 1];
  const bool any = context_.device != TWINFUSE_CPU;  // GPU kernels write any strides
  if (!collapse(*t, &row_stride) ||
      (col_stride != 1 && !any && !(unit_rows_allowed && row_stride == 1)))
    return stage(*t, false);
  return {t->data, rows, cols, row_stride, col_stride};
}

TwinfuseStatus Matrices::failure(const char* op) const {
  if (unsupported_)
    return fail(TWINFUSE_UNSUPPORTED,
                std::string(op) + ": leading dimensions with strides of their own, on a GPU");
  return out_of_memory_ ? out_of_memory(op) : TWINFUSE_OK;
}

void Matrices::commit() {
  for (const Staged& s : staged_) copy<false>(*s.tensor, s.data);
}

}  // namespace twinfuse
