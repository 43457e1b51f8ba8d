// What the ops of lstm.cc and lstm_cell.cc share: attributes, operands by name, optional outputs.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core_call.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "twinfuse/lstm.h"

namespace twinfuse {

using tensorflow::OpInputList;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::OpOutputList;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

constexpr int kTransposed[] = {1, 0};

using Sizes = absl::InlinedVector<int64_t, 3>;

inline std::string Text(absl::Span<const int64_t> sizes) {
  return absl::StrCat("[", absl::StrJoin(sizes, ","), "]");  // as TensorShape prints itself
}

inline bool Fits(const Tensor& tensor, absl::Span<const int64_t> sizes) {
  return absl::MakeConstSpan(tensor.shape().dim_sizes()) == sizes;
}

// Null where the graph has none.
inline const Tensor* Optional(OpKernelContext* op, const char* name) {
  OpInputList list;
  return op->input_list(name, &list).ok() && list.size() > 0 ? &list[0] : nullptr;
}

// Whether the op has this output and anything reads it. Eager calls count as reading everything;
// in a graph the executor knows, so that gradients which nobody takes cost nothing, and neither
// does what only they need.
inline bool Wanted(OpKernelContext* op, const char* name) {
  OpOutputList list;
  return op->output_list(name, &list).ok() && list.size() > 0 && list.required(0);
}

inline absl::Status Allocate(OpKernelContext* op, const char* name, absl::Span<const int64_t> sizes,
                             Tensor** tensor) {
  TensorShape shape;
  TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(sizes, &shape));
  OpOutputList list;
  TF_RETURN_IF_ERROR(op->output_list(name, &list));
  return list.allocate(0, shape, tensor);
}

// Leaves `tensor` null where it is not wanted.
inline absl::Status AllocateWanted(OpKernelContext* op, const char* name,
                                   absl::Span<const int64_t> sizes, Tensor** tensor) {
  return Wanted(op, name) ? Allocate(op, name, sizes, tensor) : absl::OkStatus();
}

// An operand that may have fewer dimensions than the core wants, or of size 1: every missing
// element is the same one, with a stride of zero.
class BroadcastView {
 public:
  // `sizes` are the tensor's own order, `order` is as in TensorView::Permuted.
  absl::Status Set(const char* op, const char* name, const Tensor* tensor,
                   absl::Span<const int64_t> sizes, absl::Span<const int> order) {
    if (tensor == nullptr) return absl::OkStatus();
    const int rank = static_cast<int>(sizes.size()), missing = rank - tensor->dims();
    int64_t strides[kRank] = {}, stride = 1;
    bool fits = missing >= 0;
    for (int i = rank - 1; fits && i >= missing; --i) {
      const int64_t size = tensor->dim_size(i - missing);
      fits = size == 1 || size == sizes[i];
      strides[i] = size == 1 ? 0 : stride;
      stride *= size;
    }
    if (!fits) {
      return Mismatch(op, name, "what broadcasts to " + Text(sizes), tensor->shape());
    }
    for (int i = 0; i < rank; ++i) {
      sizes_[i] = sizes[order[i]];
      strides_[i] = strides[order[i]];
    }
    tensor_ = {tensor->data(), CoreDtype(tensor->dtype()), rank, sizes_, strides_};
    return absl::OkStatus();
  }

  const TwinfuseTensor* get() const { return tensor_.ndim == 0 ? nullptr : &tensor_; }

 private:
  static constexpr int kRank = 3;
  int64_t sizes_[kRank] = {}, strides_[kRank] = {};
  TwinfuseTensor tensor_{};
};

// What is drawn at random, each of it optional.
class NoiseViews {
 public:
  // `hidden` and `cells` are the sizes of zoneouts, `order` that of theirs.
  absl::Status Set(const char* op, OpKernelContext* context, absl::Span<const int64_t> hidden,
                   absl::Span<const int64_t> cells, absl::Span<const int> order, int64_t batch,
                   int64_t inputs) {
    const auto set = [&](BroadcastView* view, const char* name, absl::Span<const int64_t> sizes,
                         absl::Span<const int> order) {
      return view->Set(op, name, Optional(context, name), sizes, order);
    };
    constexpr int in_order[] = {0, 1, 2};
    TF_RETURN_IF_ERROR(set(&zoneout_hidden_, "zoneout_hidden", hidden, order));
    TF_RETURN_IF_ERROR(set(&zoneout_cell_, "zoneout_cell", cells, order));
    TF_RETURN_IF_ERROR(set(&dropout_input_, "dropout_input", {{4, batch, inputs}}, in_order));
    return set(&dropout_hidden_, "dropout_hidden", {{4, batch, hidden.back()}}, in_order);
  }

  TwinfuseLstmNoise get() const {
    return {zoneout_hidden_.get(), zoneout_cell_.get(), dropout_input_.get(),
            dropout_hidden_.get()};
  }

 private:
  BroadcastView zoneout_hidden_, zoneout_cell_, dropout_input_, dropout_hidden_;
};

// Optional tensors of both ops that are lists of length 0 or 1.
inline absl::Status CheckLists(OpKernelConstruction* construction, const char* op,
                               absl::Span<const char* const> names) {
  for (const char* name : names) {
    int count = 0;
    TF_RETURN_IF_ERROR(construction->GetAttr(absl::StrCat("num_", name), &count));
    if (count > 1) {
      return Mismatch(op, absl::StrCat("num_", name), "0 or 1", absl::StrCat(count));
    }
  }
  return absl::OkStatus();
}

inline absl::Status ReadAttributes(OpKernelConstruction* construction, const char* op,
                                   TwinfuseLstm* lstm) {
  TF_RETURN_IF_ERROR(construction->GetAttr("activation", &lstm->cell_activation));
  TF_RETURN_IF_ERROR(construction->GetAttr("recurrent_activation", &lstm->gate_activation));
  // A text, as numbers in attributes have 32 bits.
  std::string epsilon;
  TF_RETURN_IF_ERROR(construction->GetAttr("norm_epsilon", &epsilon));
  if (absl::SimpleAtod(epsilon, &lstm->norm_epsilon)) return absl::OkStatus();
  return Mismatch(op, "norm_epsilon", "a number", epsilon);
}

// [I, 4H] and [R, 4H].
inline absl::Status CheckKernels(const char* op, const Tensor& kernel, const Tensor& recurrent) {
  if (kernel.dims() != 2 || kernel.dim_size(1) % 4 != 0) {
    return Mismatch(op, "kernel", "[I, 4H]", kernel.shape());
  }
  if (recurrent.dims() != 2 || recurrent.dim_size(1) != kernel.dim_size(1)) {
    return Mismatch(op, "recurrent_kernel", absl::StrCat("[R, ", kernel.dim_size(1), "]"),
                    recurrent.shape());
  }
  return absl::OkStatus();
}

// Shape functions: the operands of both ops that have a shape of their own, merged.
struct LstmShapes {
  ShapeHandle kernel, recurrent;
  DimensionHandle inputs, gates, saved_gates, units, hidden;

  absl::Status Read(InferenceContext* c, DimensionHandle of_x) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(One(c, "kernel", 2, &kernel));
    TF_RETURN_IF_ERROR(One(c, "recurrent_kernel", 2, &recurrent));
    TF_RETURN_IF_ERROR(c->Merge(of_x, c->Dim(kernel, 0), &inputs));
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(kernel, 1), c->Dim(recurrent, 1), &gates));
    TF_RETURN_IF_ERROR(One(c, "bias", 1, &shape));
    TF_RETURN_IF_ERROR(c->Merge(gates, c->Dim(shape, 0), &gates));
    TF_RETURN_IF_ERROR(One(c, "norm", 2, &shape));
    TF_RETURN_IF_ERROR(c->Merge(gates, c->Dim(shape, 1), &gates));
    int norms;
    TF_RETURN_IF_ERROR(c->GetAttr("num_norm", &norms));
    TF_RETURN_IF_ERROR(c->Multiply(gates, norms > 0 ? 3 : 1, &saved_gates));
    TF_RETURN_IF_ERROR(c->Divide(gates, 4, true, &units));
    TF_RETURN_IF_ERROR(One(c, "peephole", 2, &shape));
    TF_RETURN_IF_ERROR(c->Merge(units, c->Dim(shape, 1), &units));
    hidden = c->Dim(recurrent, 0);
    return absl::OkStatus();
  }

  // The shape of an operand, of unknown sizes where it is not there.
  static absl::Status One(InferenceContext* c, const char* name, int rank, ShapeHandle* shape) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(c->input(name, &shapes));
    return c->WithRank(shapes.empty() ? c->UnknownShape() : shapes[0], rank, shape);
  }

  // As often as the op has it.
  static absl::Status Set(InferenceContext* c, const char* name, ShapeHandle shape) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(c->output(name, &shapes));
    return c->set_output(name, std::vector<ShapeHandle>(shapes.size(), shape));
  }
};

}  // namespace twinfuse
