// TensorFlow ops for Conv + ReLU in one or two dimensions: y = relu(conv(x, kernel) + bias), and
// its gradient.
//
//   x, grad_x            [N, H, W, C] or [N, C, H, W]   without H in one dimension
//   kernel, grad_kernel  [R, S, C / groups, K]          Keras layout; groups follow from the shapes
//   bias, grad_bias      [K]
//   y, grad              [N, P, Q, K] or [N, K, P, Q]
//
// The core takes all of them in its own order of dimensions, as strided views. Attributes have one
// entry per spatial dimension, and two in explicit_paddings: zeros before and after.
#include "twinfuse/conv_relu.h"

#include <string.h>

#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
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

// No product of two numbers up to this overflows, and no sum of a few such products.
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();

// The attributes of both ops, and what follows from them for sizes.
struct Windows {
  std::vector<int64_t> strides, dilations, explicit_paddings;
  std::string padding, data_format;

  // `Context` is an OpKernelConstruction or an InferenceContext.
  template <class Context>
  absl::Status Read(Context* context) {
    TF_RETURN_IF_ERROR(context->GetAttr("strides", &strides));
    TF_RETURN_IF_ERROR(context->GetAttr("dilations", &dilations));
    TF_RETURN_IF_ERROR(context->GetAttr("padding", &padding));
    TF_RETURN_IF_ERROR(context->GetAttr("explicit_paddings", &explicit_paddings));
    TF_RETURN_IF_ERROR(context->GetAttr("data_format", &data_format));
    if (strides.size() != 1 && strides.size() != 2) {
      return Mismatch("conv_relu", "strides", "1 or 2 numbers", absl::StrCat(strides.size()));
    }
    TF_RETURN_IF_ERROR(Check("strides", strides, strides.size(), 1));
    TF_RETURN_IF_ERROR(Check("dilations", dilations, strides.size(), 1));
    const size_t pads = padding == "EXPLICIT" ? 2 * strides.size() : 0;
    return Check("explicit_paddings", explicit_paddings, pads, 0);
  }

  absl::Status Check(const char* name, const std::vector<int64_t>& numbers, size_t count,
                     int64_t smallest) const {
    bool fits = numbers.size() == count;
    for (int64_t number : numbers) fits &= number >= smallest && number <= kLargest;
    if (fits) return absl::OkStatus();
    return Mismatch(op(), name, absl::StrCat(count, " numbers from ", smallest, " to ", kLargest),
                    absl::StrCat("[", absl::StrJoin(numbers, ", "), "]"));
  }

  const char* op() const { return strides.size() == 1 ? "conv1d_relu" : "conv2d_relu"; }
  int spatial() const { return static_cast<int>(strides.size()); }
  int rank() const { return spatial() + 2; }
  bool channels_last() const { return data_format == "channels_last"; }
  // Where a tensor like x has its channels, and the first of its spatial dimensions.
  int channels() const { return channels_last() ? rank() - 1 : 1; }
  int first() const { return channels_last() ? 1 : 2; }

  std::string Layout(const char* channels) const {
    const char* sizes = spatial() == 1 ? "W" : "H, W";
    return channels_last() ? absl::StrCat("[N, ", sizes, ", ", channels, "]")
                           : absl::StrCat("[N, ", channels, ", ", sizes, "]");
  }

  // The core's order of dimensions is [N, C, H, W] and [K, C / groups, R, S].
  absl::InlinedVector<int, 4> ImageOrder() const {
    absl::InlinedVector<int, 4> order = {0, channels()};
    for (int i = 0; i < spatial(); ++i) order.push_back(first() + i);
    return order;
  }
  absl::InlinedVector<int, 4> KernelOrder() const {
    absl::InlinedVector<int, 4> order = {spatial() + 1, spatial()};
    for (int i = 0; i < spatial(); ++i) order.push_back(i);
    return order;
  }

  // Padding and output size of spatial dimension i.
  absl::Status Place(int i, int64_t size, int64_t kernel, int64_t* low, int64_t* high,
                     int64_t* output) const {
    if (size > kLargest) return Mismatch(op(), "x", "sizes below 2^31", absl::StrCat(size));
    if (kernel < 1 || kernel > kLargest) {
      return Mismatch(op(), "kernel", "windows of at least 1 and below 2^31", absl::StrCat(kernel));
    }
    const int64_t span = dilations[i] * (kernel - 1) + 1;
    *low = *high = 0;
    if (padding == "SAME") {
      const int64_t windows = (size + strides[i] - 1) / strides[i];
      const int64_t zeros = std::max<int64_t>((windows - 1) * strides[i] + span - size, 0);
      *low = zeros / 2;
      *high = zeros - *low;
      *output = windows;  // also where there is nothing and so no window
      return absl::OkStatus();
    }
    if (padding == "CAUSAL") *low = span - 1;
    if (padding == "EXPLICIT") {
      *low = explicit_paddings[2 * i];
      *high = explicit_paddings[2 * i + 1];
    }
    const int64_t padded = *low + size + *high;
    // As TensorFlow has it, rounded towards zero: a window may be too large by nearly two strides.
    *output = (padded - span + strides[i]) / strides[i];
    if (*output < 0) {
      return Mismatch(
          op(), "kernel",
          absl::StrCat("windows that span at most ", padded, " elements, the padded size of x"),
          absl::StrCat(span));
    }
    return absl::OkStatus();
  }

  absl::Status CheckChannels(int64_t channels, int64_t per_group, int64_t filters) const {
    const int64_t groups = Groups(channels, per_group);
    if (groups == 0) {
      return Mismatch(op(), "x", absl::StrCat("channels in a multiple of the kernel's ", per_group),
                      absl::StrCat(channels));
    }
    if (filters % groups != 0) {
      return Mismatch(op(), "kernel", absl::StrCat("filters in a multiple of ", groups, " groups"),
                      absl::StrCat(filters));
    }
    return absl::OkStatus();
  }

  // 0 where the two do not fit together.
  static int64_t Groups(int64_t channels, int64_t per_group) {
    if (channels == 0 && per_group == 0) return 1;
    return per_group != 0 && channels % per_group == 0 ? channels / per_group : 0;
  }
};

absl::Status OutputShape(InferenceContext* c, const Windows& windows, ShapeHandle x,
                         ShapeHandle kernel, ShapeHandle* y) {
  const int spatial = windows.spatial();
  const DimensionHandle channels = c->Dim(x, windows.channels());
  const DimensionHandle per_group = c->Dim(kernel, spatial), filters = c->Dim(kernel, spatial + 1);
  if (c->ValueKnown(channels) && c->ValueKnown(per_group)) {
    // An unknown number of filters is taken for one that fits.
    const int64_t some = c->ValueKnown(filters) ? c->Value(filters) : 0;
    TF_RETURN_IF_ERROR(windows.CheckChannels(c->Value(channels), c->Value(per_group), some));
  }
  *y = x;
  for (int i = 0; i < spatial; ++i) {
    const int dim = windows.first() + i;
    const DimensionHandle size = c->Dim(x, dim), window = c->Dim(kernel, i);
    DimensionHandle output = c->UnknownDim();
    if (c->ValueKnown(size) && (c->ValueKnown(window) || windows.padding == "SAME")) {
      int64_t low, high, known;
      const int64_t window_size = c->ValueKnown(window) ? c->Value(window) : 1;
      TF_RETURN_IF_ERROR(windows.Place(i, c->Value(size), window_size, &low, &high, &known));
      output = c->MakeDim(known);
    }
    TF_RETURN_IF_ERROR(c->ReplaceDim(*y, dim, output, y));
  }
  return c->ReplaceDim(*y, windows.channels(), filters, y);
}

absl::Status ForwardShape(InferenceContext* c) {
  Windows windows;
  TF_RETURN_IF_ERROR(windows.Read(c));
  ShapeHandle x, kernel, bias, y;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), windows.rank(), &x));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), windows.rank(), &kernel));
  DimensionHandle filters = c->Dim(kernel, -1);
  for (int i = 2; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &bias));
    TF_RETURN_IF_ERROR(c->Merge(filters, c->Dim(bias, 0), &filters));
  }
  TF_RETURN_IF_ERROR(c->ReplaceDim(kernel, -1, filters, &kernel));
  TF_RETURN_IF_ERROR(OutputShape(c, windows, x, kernel, &y));
  c->set_output(0, y);
  return absl::OkStatus();
}

// Input 0 is `grad`, then y, x, kernel; outputs are the gradients asked for, in the order of x,
// kernel, bias.
absl::Status BackwardShape(InferenceContext* c) {
  Windows windows;
  TF_RETURN_IF_ERROR(windows.Read(c));
  ShapeHandle grad, x, kernel, y;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), windows.rank(), &grad));
  TF_RETURN_IF_ERROR(c->Merge(grad, c->input(1), &grad));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), windows.rank(), &x));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), windows.rank(), &kernel));
  TF_RETURN_IF_ERROR(OutputShape(c, windows, x, kernel, &y));
  TF_RETURN_IF_ERROR(c->Merge(grad, y, &grad));
  TF_RETURN_IF_ERROR(c->ReplaceDim(x, 0, c->Dim(grad, 0), &x));
  TF_RETURN_IF_ERROR(c->ReplaceDim(kernel, -1, c->Dim(grad, windows.channels()), &kernel));
  int num_x, num_kernel, num_bias, output = 0;
  TF_RETURN_IF_ERROR(c->GetAttr("num_x", &num_x));
  TF_RETURN_IF_ERROR(c->GetAttr("num_kernel", &num_kernel));
  TF_RETURN_IF_ERROR(c->GetAttr("num_bias", &num_bias));
  for (int i = 0; i < num_x; ++i) c->set_output(output++, x);
  for (int i = 0; i < num_kernel; ++i) c->set_output(output++, kernel);
  for (int i = 0; i < num_bias; ++i) c->set_output(output++, c->Vector(c->Dim(kernel, -1)));
  return absl::OkStatus();
}

#define WINDOW_ATTRIBUTES                                       \
  Attr("strides: list(int)")                                    \
      .Attr("dilations: list(int)")                             \
      .Attr("padding: {'VALID', 'SAME', 'CAUSAL', 'EXPLICIT'}") \
      .Attr("explicit_paddings: list(int)")                     \
      .Attr("data_format: {'channels_last', 'channels_first'}")

REGISTER_OP("TwinfuseConvRelu")
    .Input("x: T")
    .Input("kernel: T")
    .Input("bias: num_bias * T")
    .Output("y: T")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("num_bias: int >= 0")
    .WINDOW_ATTRIBUTES.SetShapeFn(ForwardShape);

REGISTER_OP("TwinfuseConvReluGrad")
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
    .WINDOW_ATTRIBUTES.SetShapeFn(BackwardShape);

#undef WINDOW_ATTRIBUTES

class ConvOpKernel : public CoreOpKernel {
 public:
  explicit ConvOpKernel(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    OP_REQUIRES_OK(construction, windows_.Read(construction));
    image_order_ = windows_.ImageOrder();
    kernel_order_ = windows_.KernelOrder();
  }

 protected:
  // Everything that sizes are read for, so that nothing is read which is not there.
  absl::Status Describe(const Tensor& x, const Tensor& kernel, TwinfuseConv* conv,
                        TensorShape* y) const {
    const int spatial = windows_.spatial(), channels = windows_.channels();
    if (x.dims() != windows_.rank()) {
      return Mismatch(windows_.op(), "x", windows_.Layout("C"), x.shape());
    }
    if (kernel.dims() != windows_.rank()) {
      return Mismatch(windows_.op(), "kernel",
                      spatial == 1 ? "[S, C / groups, K]" : "[R, S, C / groups, K]",
                      kernel.shape());
    }
    const int64_t per_group = kernel.dim_size(spatial), filters = kernel.dim_size(spatial + 1);
    TF_RETURN_IF_ERROR(windows_.CheckChannels(x.dim_size(channels), per_group, filters));
    conv->groups = Windows::Groups(x.dim_size(channels), per_group);
    *y = x.shape();
    TF_RETURN_IF_ERROR(y->SetDimWithStatus(channels, filters));
    for (int i = 0; i < spatial; ++i) {
      const int dim = windows_.first() + i;
      int64_t size;
      conv->stride[i] = windows_.strides[i];
      conv->dilation[i] = windows_.dilations[i];
      TF_RETURN_IF_ERROR(windows_.Place(i, x.dim_size(dim), kernel.dim_size(i),
                                        &conv->padding_low[i], &conv->padding_high[i], &size));
      TF_RETURN_IF_ERROR(y->SetDimWithStatus(dim, size));
    }
    return absl::OkStatus();
  }

  // Whether there is no window at all, which the core takes for an error.
  bool NoWindow(const TensorShape& y) const {
    for (int i = 0; i < windows_.spatial(); ++i) {
      if (y.dim_size(windows_.first() + i) == 0) return true;
    }
    return false;
  }

  TensorView Image(const Tensor* tensor) const {
    return TensorView::Permuted(tensor, image_order_);
  }
  TensorView Kernel(const Tensor* tensor) const {
    return TensorView::Permuted(tensor, kernel_order_);
  }

  Windows windows_;

 private:
  absl::InlinedVector<int, 4> image_order_, kernel_order_;
};

class ConvReluOp : public ConvOpKernel {
 public:
  explicit ConvReluOp(OpKernelConstruction* construction) : ConvOpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckOptional(construction, windows_.op(), {"num_bias"}));
  }

  void Compute(OpKernelContext* op) override {
    const Tensor& x = op->input(0);
    const Tensor& kernel = op->input(1);
    const Tensor* bias = op->num_inputs() > 2 ? &op->input(2) : nullptr;
    TwinfuseConv conv{};
    TensorShape shape;
    OP_REQUIRES_OK(op, Describe(x, kernel, &conv, &shape));
    const int64_t filters = shape.dim_size(windows_.channels());
    OP_REQUIRES(op, !bias || (bias->dims() == 1 && bias->dim_size(0) == filters),
                Mismatch(windows_.op(), "bias", absl::StrCat("[", filters, "]"), bias->shape()));

    Tensor* y = nullptr;
    OP_REQUIRES_OK(op, op->allocate_output(0, shape, &y));
    if (NoWindow(shape)) return;

    CoreCall call(op);
    OP_REQUIRES_OK(op, call.Finish(twinfuse_conv_relu_forward(
                           Image(y).get(), Image(&x).get(), Kernel(&kernel).get(),
                           TensorView::Dense(bias).get(), &conv, call.context())));
  }
};

class ConvReluGradOp : public ConvOpKernel {
 public:
  explicit ConvReluGradOp(OpKernelConstruction* construction) : ConvOpKernel(construction) {
    OP_REQUIRES_OK(construction,
                   CheckOptional(construction, windows_.op(), {"num_x", "num_kernel", "num_bias"}));
  }

  void Compute(OpKernelContext* op) override {
    const Tensor& grad = op->input(0);
    const Tensor& y = op->input(1);
    const Tensor& x = op->input(2);
    const Tensor& kernel = op->input(3);
    TwinfuseConv conv{};
    TensorShape shape;
    OP_REQUIRES_OK(op, Describe(x, kernel, &conv, &shape));
    OP_REQUIRES(op, grad.shape() == shape,
                Mismatch(windows_.op(), "grad", shape.DebugString(), grad.shape()));
    OP_REQUIRES(op, y.shape() == shape,
                Mismatch(windows_.op(), "y", shape.DebugString(), y.shape()));

    Tensor *grad_x = nullptr, *grad_kernel = nullptr, *grad_bias = nullptr;
    const int64_t filters = shape.dim_size(windows_.channels());
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_x", x.shape(), &grad_x));
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_kernel", kernel.shape(), &grad_kernel));
    OP_REQUIRES_OK(op, AllocateGrad(op, "grad_bias", {filters}, &grad_bias));
    CoreCall call(op);
    if (NoWindow(shape) && call.context()->device == TWINFUSE_CPU) {
      for (Tensor* tensor : {grad_x, grad_kernel, grad_bias}) {
        if (tensor != nullptr && tensor->NumElements() != 0) {
          memset(tensor->data(), 0, tensor->TotalBytes());
        }
      }
      return;
    }

    OP_REQUIRES_OK(
        op, call.Finish(twinfuse_conv_relu_backward(
                Image(grad_x).get(), Kernel(grad_kernel).get(), TensorView::Dense(grad_bias).get(),
                Image(&grad).get(), Image(&y).get(), Image(&x).get(), Kernel(&kernel).get(), &conv,
                TWINFUSE_RELU_GRAD_MULTIPLY, call.context())));
  }
};

TWINFUSE_REGISTER_KERNELS("TwinfuseConvRelu", ConvReluOp)
TWINFUSE_REGISTER_KERNELS("TwinfuseConvReluGrad", ConvReluGradOp)

}  // namespace
}  // namespace twinfuse
