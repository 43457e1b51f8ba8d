// TensorFlow ops for Linear + ReLU: y = relu(x @ kernel + bias), and its gradient.
//
//   x, grad_x            [..., K]
//   kernel, grad_kernel  [K, N]     Keras layout: the core takes it as [N, K] with strides (1, N)
//   bias, grad_bias      [N]
//   y, grad              [..., N]
//
// Optional tensors are lists of length 0 or 1, so that the graph itself says what is computed.
#include "twinfuse/linear_relu.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "core_call.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace twinfuse {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

absl::Status ForwardShape(InferenceContext* c) {
  ShapeHandle x, kernel, bias, y;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &kernel));
  DimensionHandle units = c->Dim(kernel, 1);
  for (int i = 2; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &bias));
    TF_RETURN_IF_ERROR(c->Merge(units, c->Dim(bias, 0), &units));
  }
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 1, &x));
  if (!c->RankKnown(x)) {
    c->set_output(0, c->UnknownShape());
    return absl::OkStatus();
  }
  DimensionHandle inner;
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(x, -1), c->Dim(kernel, 0), &inner));
  TF_RETURN_IF_ERROR(c->ReplaceDim(x, -1, units, &y));
  c->set_output(0, y);
  return absl::OkStatus();
}

// Input 0 is `grad`, then y, x, kernel; outputs are the gradients asked for, in the order of x,
// kernel, bias.
absl::Status BackwardShape(InferenceContext* c) {
  ShapeHandle grad, x, kernel;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 1, &grad));
  TF_RETURN_IF_ERROR(c->Merge(grad, c->input(1), &grad));
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(2), 1, &x));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 2, &kernel));
  DimensionHandle inner = c->Dim(kernel, 0), units = c->Dim(kernel, 1);
  if (c->RankKnown(grad)) TF_RETURN_IF_ERROR(c->Merge(units, c->Dim(grad, -1), &units));
  if (c->RankKnown(x)) TF_RETURN_IF_ERROR(c->Merge(inner, c->Dim(x, -1), &inner));
  if (c->RankKnown(grad) && c->RankKnown(x)) {
    ShapeHandle rows;
    TF_RETURN_IF_ERROR(c->ReplaceDim(grad, -1, inner, &rows));
    TF_RETURN_IF_ERROR(c->Merge(x, rows, &x));
  }
  int num_x, num_kernel, num_bias, output = 0;
  TF_RETURN_IF_ERROR(c->GetAttr("num_x", &num_x));
  TF_RETURN_IF_ERROR(c->GetAttr("num_kernel", &num_kernel));
  TF_RETURN_IF_ERROR(c->GetAttr("num_bias", &num_bias));
  for (int i = 0; i < num_x; ++i) c->set_output(output++, x);
  for (int i = 0; i < num_kernel; ++i) c->set_output(output++, c->Matrix(inner, units));
  for (int i = 0; i < num_bias; ++i) c->set_output(output++, c->Vector(units));
  return absl::OkStatus();
}

REGISTER_OP("TwinfuseLinearRelu")
    .Input("x: T")
    .Input("kernel: T")
    .Input("bias: num_bias * T")
    .Output("y: T")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("num_bias: int >= 0")
    .SetShapeFn(ForwardShape);

REGISTER_OP("TwinfuseLinearReluGrad")
    .Input("grad: T")
    .Input("y: T")
    .Input("x: T")
    .Input("kernel: T")
    .Output("grad_x: num_x * T")
    .Output("grad_kernel: num_kernel * T")
    .Output("grad_bias: num_bias * T")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("num_x: int >= 0")
    .Attr("num_kernel: int >= 0")
    .Attr("num_bias: int >= 0")
    .SetShapeFn(BackwardShape);

constexpr const char* kOp = "linear_relu";
constexpr int kTransposed[] = {1, 0};

// The core checks again; what it takes for granted is only that sizes can be read: the ranks.
absl::Status CheckRanks(const Tensor& x, const Tensor& kernel) {
  if (x.dims() < 1) return Mismatch(kOp, "x", "[..., K]", x.shape());
  if (kernel.dims() != 2) return Mismatch(kOp, "kernel", "[K, N]", kernel.shape());
  const int64_t inner = kernel.dim_size(0);
  if (x.dim_size(x.dims() - 1) != inner) {
    return Mismatch(
        kOp, "x",
        absl::StrCat("[..., ", inner, "] for a kernel of shape ", kernel.shape().DebugString()),
        x.shape());
  }
  return absl::OkStatus();
}

class LinearReluOp : public CoreOpKernel {
 public:
  explicit LinearReluOp(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckOptional(construction, kOp, {"num_bias"}));
  }

  void Compute(OpKernelContext* op) override {
    const Tensor& x = op->input(0);
    const Tensor& kernel = op->input(1);
    const Tensor* bias = op->num_inputs() > 2 ? &op->input(2) : nullptr;
    OP_REQUIRES_OK(op, CheckRanks(x, kernel));
    const int64_t units = kernel.dim_size(1);
    OP_REQUIRES(op, !bias || (bias->dims() == 1 && bias->dim_size(0) == units),
                Mismatch(kOp, "bias", absl::StrCat("[", units, "]"), bias->shape()));

    TensorShape shape = x.shape();
    OP_REQUIRES_OK(op, shape.SetDimWithStatus(shape.dims() - 1, units));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(op, op->allocate_output(0, shape, &y));

    CoreCall call(op);
    OP_REQUIRES_OK(op, call.Finish(twinfuse_linear_relu_forward(
                           TensorView::Dense(y).get(), TensorView::Dense(&x).get(),
                           TensorView::Permuted(&kernel, kTransposed).get(),
                           TensorView::Dense(bias).get(), call.context())));
  }
};

class LinearReluGradOp : public CoreOpKernel {
 public:
  explicit LinearReluGradOp(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    OP_REQUIRES_OK(construction,
                   CheckOptional(construction, kOp, {"num_x", "num_kernel", "num_bias"}));
  }

  void Compute(OpKernelContext* op) override {
    const Tensor& grad = op->input(0);
    const Tensor& y = op->input(1);
    const Tensor& x = op->input(2);
    const Tensor& kernel = op->input(3);
    OP_REQUIRES_OK(op, CheckRanks(x, kernel));
    TensorShape rows = x.shape();
    OP_REQUIRES_OK(op, rows.SetDimWithStatus(rows.dims() - 1, kernel.dim_size(1)));
    OP_REQUIRES(op, grad.shape() == rows, Mismatch(kOp, "grad", rows.DebugString(), grad.shape()));
    OP_REQUIRES(op, y.shape() == rows, Mismatch(kOp, "y", rows.DebugString(), y.shape()));

    Tensor *grad_x = nullptr, *grad_kernel = nullptr, *grad_bias = nullptr;
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_x", x.shape(), &grad_x));
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_kernel", kernel.shape(), &grad_kernel));
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_bias", {kernel.dim_size(1)}, &grad_bias));

    CoreCall call(op);
    OP_REQUIRES_OK(op, call.Finish(twinfuse_linear_relu_backward(
                           TensorView::Dense(grad_x).get(),
                           TensorView::Permuted(grad_kernel, kTransposed).get(),
                           TensorView::Dense(grad_bias).get(), TensorView::Dense(&grad).get(),
                           TensorView::Dense(&y).get(), TensorView::Dense(&x).get(),
                           TensorView::Permuted(&kernel, kTransposed).get(),
                           TWINFUSE_RELU_GRAD_MULTIPLY, call.context())));
  }
};

TWINFUSE_REGISTER_KERNELS("TwinfuseLinearRelu", LinearReluOp)
TWINFUSE_REGISTER_KERNELS("TwinfuseLinearReluGrad", LinearReluGradOp)

}  // namespace
}  // namespace twinfuse
