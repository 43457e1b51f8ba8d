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

using tensorflow::OpInputList;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::OpOutputList;
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

absl::Status Mismatch(const char* argument, const std::string& expected, const TensorShape& got) {
  return absl::InvalidArgumentError(absl::StrCat("linear_relu: ", argument, ": expected ", expected,
                                                 ", got ", got.DebugString()));
}

// The core checks again; what it takes for granted is only that sizes can be read: the ranks.
absl::Status CheckRanks(const Tensor& x, const Tensor& kernel) {
  if (x.dims() < 1) return Mismatch("x", "[..., K]", x.shape());
  if (kernel.dims() != 2) return Mismatch("kernel", "[K, N]", kernel.shape());
  const int64_t inner = kernel.dim_size(0);
  if (x.dim_size(x.dims() - 1) != inner) {
    return Mismatch(
        "x",
        absl::StrCat("[..., ", inner, "] for a kernel of shape ", kernel.shape().DebugString()),
        x.shape());
  }
  return absl::OkStatus();
}

absl::Status CheckOptional(const char* name, int count) {
  if (count <= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("linear_relu: ", name, ": expected 0 or 1, got ", count));
}

class LinearReluOp : public CoreOpKernel {
 public:
  explicit LinearReluOp(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    int num_bias = 0;
    OP_REQUIRES_OK(construction, construction->GetAttr("num_bias", &num_bias));
    OP_REQUIRES_OK(construction, CheckOptional("num_bias", num_bias));
  }

  void Compute(OpKernelContext* op) override {
    const Tensor& x = op->input(0);
    const Tensor& kernel = op->input(1);
    const Tensor* bias = op->num_inputs() > 2 ? &op->input(2) : nullptr;
    OP_REQUIRES_OK(op, CheckRanks(x, kernel));
    const int64_t units = kernel.dim_size(1);
    OP_REQUIRES(op, !bias || (bias->dims() == 1 && bias->dim_size(0) == units),
                Mismatch("bias", absl::StrCat("[", units, "]"), bias->shape()));

    TensorShape shape = x.shape();
    OP_REQUIRES_OK(op, shape.SetDimWithStatus(shape.dims() - 1, units));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(op, op->allocate_output(0, shape, &y));

    CoreCall call(op);
    OP_REQUIRES_OK(op, call.Finish(twinfuse_linear_relu_forward(
                           TensorView::Dense(y).get(), TensorView::Dense(&x).get(),
                           TensorView::Transposed(&kernel).get(), TensorView::Dense(bias).get(),
                           call.context())));
  }
};

class LinearReluGradOp : public CoreOpKernel {
 public:
  explicit LinearReluGradOp(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    for (const char* name : {"num_x", "num_kernel", "num_bias"}) {
      int count = 0;
      OP_REQUIRES_OK(construction, construction->GetAttr(name, &count));
      OP_REQUIRES_OK(construction, CheckOptional(name, count));
    }
  }

  void Compute(OpKernelContext* op) override {
    const Tensor& grad = op->input(0);
    const Tensor& y = op->input(1);
    const Tensor& x = op->input(2);
    const Tensor& kernel = op->input(3);
    OP_REQUIRES_OK(op, CheckRanks(x, kernel));
    TensorShape rows = x.shape();
    OP_REQUIRES_OK(op, rows.SetDimWithStatus(rows.dims() - 1, kernel.dim_size(1)));
    OP_REQUIRES(op, grad.shape() == rows, Mismatch("grad", rows.DebugString(), grad.shape()));
    OP_REQUIRES(op, y.shape() == rows, Mismatch("y", rows.DebugString(), y.shape()));

    Tensor *grad_x = nullptr, *grad_kernel = nullptr, *grad_bias = nullptr;
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_x", x.shape(), &grad_x));
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_kernel", kernel.shape(), &grad_kernel));
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_bias", {kernel.dim_size(1)}, &grad_bias));

    CoreCall call(op);
    OP_REQUIRES_OK(
        op,
        call.Finish(twinfuse_linear_relu_backward(
            TensorView::Dense(grad_x).get(), TensorView::Transposed(grad_kernel).get(),
            TensorView::Dense(grad_bias).get(), TensorView::Dense(&grad).get(),
            TensorView::Dense(&y).get(), TensorView::Dense(&x).get(),
            TensorView::Transposed(&kernel).get(), TWINFUSE_RELU_GRAD_MULTIPLY, call.context())));
  }

 private:
  // Leaves `grad` null when the graph does not ask for this gradient.
  static absl::Status AllocateGrad(OpKernelContext* op, const char* name, const TensorShape& shape,
                                   Tensor** grad) {
    OpOutputList outputs;
    TF_RETURN_IF_ERROR(op->output_list(name, &outputs));
    return outputs.size() == 0 ? absl::OkStatus() : outputs.allocate(0, shape, grad);
  }
};

// The GPU kernels make the same call: the core knows what it has for a device and says so.
#define REGISTER_KERNELS(T)                                                                 \
  REGISTER_KERNEL_BUILDER(                                                                  \
      Name("TwinfuseLinearRelu").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),     \
      LinearReluOp);                                                                        \
  REGISTER_KERNEL_BUILDER(                                                                  \
      Name("TwinfuseLinearRelu").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"),     \
      LinearReluOp);                                                                        \
  REGISTER_KERNEL_BUILDER(                                                                  \
      Name("TwinfuseLinearReluGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
      LinearReluGradOp);                                                                    \
  REGISTER_KERNEL_BUILDER(                                                                  \
      Name("TwinfuseLinearReluGrad").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), \
      LinearReluGradOp);
REGISTER_KERNELS(float)
REGISTER_KERNELS(double)
REGISTER_KERNELS(tensorflow::bfloat16)
REGISTER_KERNELS(Eigen::half)
#undef REGISTER_KERNELS

}  // namespace
}  // namespace twinfuse
