// Checking tensors, and seeing them as matrices.
#pragma once

#include <string>
#include <vector>

#include "api/calls.h"
#include "twinfuse/core.h"

namespace twinfuse {

// One size of an expected shape: a number, or any number that goes by a letter in messages.
struct Size {
  int64_t value;
  char any = 0;
};

// One check after another for the arguments of one call; after the first failure the rest are
// skipped. Texts are made only on failure: a call on a tiny tensor pays for every microsecond.
class Checker {
 public:
  Checker(const char* op, const TwinfuseContext* context);

  // A usable tensor of the given dtype, with at least one dimension.
  void tensor(const char* name, const TwinfuseTensor* tensor, int32_t dtype);
  // `tensor` may be nullptr, which passes.
  void vector(const char* name, const TwinfuseTensor* tensor, Size size);
  void matrix(const char* name, const TwinfuseTensor* tensor, Size rows, Size cols);
  // The sizes of `like`, but for the last one.
  void rows_like(const char* name, const TwinfuseTensor* tensor, const TwinfuseTensor& like,
                 Size cols);
  // All sizes given.
  void sizes(const char* name, const TwinfuseTensor* tensor, const Size* sizes, int count);
  void rank(const char* name, const TwinfuseTensor* tensor, int ndim, const char* expected);
  void relu_grad(int32_t value);
  void require(bool holds, const char* name, const char* expected, int64_t got);
  void given(const void* argument, const char* name, const char* expected);
  void reject(const char* name, const std::string& expected, const std::string& got);

  bool ok() const { return status_ == TWINFUSE_OK; }
  TwinfuseStatus status() const { return status_; }

 private:
  void shape(const char* name, const TwinfuseTensor* tensor, const int64_t* leading, int count,
             const Size* last, int last_count);

  const char* op_;
  TwinfuseStatus status_ = TWINFUSE_OK;
};

// Tensors as matrices: all dimensions but the last collapsed into rows. A tensor whose leading
// dimensions do not collapse, or an output without a unit stride, is staged in scratch. Nothing is
// staged on a GPU.
class Matrices {
 public:
  explicit Matrices(const TwinfuseContext& context) : context_(context) {}

  // `tensor` may be nullptr: no data.
  Matrix input(const TwinfuseTensor* tensor);
  Matrix output(const TwinfuseTensor* tensor, bool unit_rows_allowed);

  // Whether all of them could be seen so.
  TwinfuseStatus failure(const char* op) const;
  // Copies staged outputs to where they belong.
  void commit();

 private:
  struct Staged {
    const TwinfuseTensor* tensor;
    char* data;
  };
  Matrix stage(const TwinfuseTensor& tensor, bool copy_in);

  const TwinfuseContext& context_;
  std::vector<Staged> staged_;
  bool out_of_memory_ = false, unsupported_ = false;
};

}  // namespace twinfuse
