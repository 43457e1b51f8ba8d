#include "twinfuse/conv_relu.h"

#include "api/error.h"
#include "api/kernel_table.h"
#include "api/tensor.h"
#include "cpu/kernels.h"
#include "gpu/ops.h"

namespace twinfuse {
namespace {

using Wide = __int128;  // for products of sizes that nothing has checked yet

// The op by its number of spatial dimensions, and its parameters with a row added in front of one.
struct Op {
  const char* name;
  int spatial;
  TwinfuseConv conv;
};

Op op_of(const TwinfuseTensor* tensor, const TwinfuseConv* conv) {
  Op op{tensor && tensor->ndim == 3 ? "conv1d_relu" : "conv2d_relu", 0, {}};
  op.spatial = tensor && tensor->ndim == 3 ? 1 : 2;
  if (!conv) return op;
  op.conv = *conv;
  if (op.spatial == 2) return op;
  op.conv = {{1, conv->stride[0]},
             {1, conv->dilation[0]},
             {0, conv->padding_low[0]},
             {0, conv->padding_high[0]},
             conv->groups};
  return op;
}

void check_parameters(Checker& check, const Op& op, const TwinfuseConv* conv) {
  check.require(conv, "conv", "parameters", 0);
  if (!check.ok()) return;
  for (int d = 0; d < 2; d++) {
    check.require(op.conv.stride[d] >= 1, "stride", "1 or more", op.conv.stride[d]);
    check.require(op.conv.dilation[d] >= 1, "dilation", "1 or more", op.conv.dilation[d]);
    check.require(op.conv.padding_low[d] >= 0, "padding", "0 or more", op.conv.padding_low[d]);
    check.require(op.conv.padding_high[d] >= 0, "padding", "0 or more", op.conv.padding_high[d]);
  }
  check.require(op.conv.groups >= 1, "groups", "1 or more", op.conv.groups);
}

int64_t output_size(const Op& op, const TwinfuseTensor& input, const TwinfuseTensor& weight,
                    int dimension) {
  const int d = dimension - 2 + (2 - op.spatial);
  return twinfuse_conv_output_size(input.sizes[dimension], weight.sizes[dimension],
                                   op.conv.stride[d], op.conv.dilation[d], op.conv.padding_low[d],
                                   op.conv.padding_high[d]);
}

// Sizes of all three, and of `output` with them.
void check_shapes(Checker& check, const Op& op, const TwinfuseTensor* input, const char* input_name,
                  const TwinfuseTensor* weight, const char* weight_name,
                  const TwinfuseTensor* output, const char* output_name) {
  if (!check.ok()) return;
  const int ndim = op.spatial + 2;
  check.rank(input_name, input, ndim, op.spatial == 1 ? "[N, C, W]" : "[N, C, H, W]");
  check.rank(weight_name, weight, ndim,
             op.spatial == 1 ? "[K, C / groups, S]" : "[K, C / groups, R, S]");
  if (!check.ok()) return;
  const int64_t groups = op.conv.groups, filters = weight->sizes[0];
  check.require(filters % groups == 0, weight_name, "filters that the groups divide", filters);
  check.require(weight->sizes[1] <= INT64_MAX / groups, weight_name, "fewer channels",
                weight->sizes[1]);
  if (!check.ok()) return;
  Size sizes[4] = {{0, 'N'}, {weight->sizes[1] * groups}, {0, 'H'}, {0, 'W'}};
  if (op.spatial == 1) sizes[2] = {0, 'W'};
  check.sizes(input_name, input, sizes, ndim);
  if (!check.ok()) return;
  sizes[0] = {input->sizes[0]};
  sizes[1] = {filters};
  for (int i = 2; i < ndim; i++) {
    check.require(weight->sizes[i] >= 1, weight_name, "a kernel of 1 or more", weight->sizes[i]);
    if (!check.ok()) return;
    sizes[i] = {output_size(op, *input, *weight, i)};
    check.require(sizes[i].value >= 1, weight_name, "a kernel no larger than the padded input",
                  weight->sizes[i]);
  }
  check.sizes(output_name, output, sizes, ndim);
}

// Whether all addresses and counts that a kernel may make up fit in 64 bits.
bool addressable(const Op& op, const TwinfuseTensor* t) {
  if (!t) return true;
  constexpr Wide kMost = Wide{1} << 60;
  Wide count = 1;
  for (int i = 0; i < t->ndim; i++) {
    Wide extent = t->sizes[i];
    if (i >= 2) {
      const int d = i - op.spatial;
      extent += Wide{op.conv.padding_low[d]} + op.conv.padding_high[d] + op.conv.stride[d];
      extent += op.conv.dilation[d];
    }
    const Wide stride = t->sizes[i] == 1 ? 1 : t->strides[i];
    count *= extent > 0 ? extent : 1;
    if (extent > kMost || count > kMost) return false;
    if (extent * (stride < 0 ? -stride : stride) > kMost) return false;
  }
  return true;
}

TwinfuseStatus too_large(const Op& op) {
  return fail(TWINFUSE_UNSUPPORTED, std::string(op.name) + ": sizes are too large for a kernel");
}

Images images(const TwinfuseTensor* t, bool given = true) {
  Images image;
  if (!t || !given) return image;
  // An empty gradient was asked for all the same: give it an address.
  static char nothing;
  image.data = t->data ? t->data : &nothing;
  const int from[4] = {0, 1, t->ndim == 3 ? -1 : 2, t->ndim - 1};
  for (int d = 0; d < 4; d++) {
    image.size[d] = from[d] < 0 ? 1 : t->sizes[from[d]];
    image.stride[d] = from[d] < 0 ? 0 : t->strides[from[d]];
    // The stride of a single element means nothing, but that of a channel tells the layout.
    if (image.size[d] == 1 && !(d == 1 && image.stride[d] == 1)) image.stride[d] = 0;
  }
  return image;
}

TwinfuseStatus forward(const TwinfuseTensor* output, const TwinfuseTensor* input,
                       const TwinfuseTensor* weight, const TwinfuseTensor* bias,
                       const TwinfuseConv* conv, const TwinfuseContext* context) {
  const Op op = op_of(input, conv);
  Checker check(op.name, context);
  check.tensor("input", input, input ? input->dtype : 0);
  if (!check.ok()) return check.status();
  check.rank("input", input, op.spatial + 2, op.spatial == 1 ? "[N, C, W]" : "[N, C, H, W]");
  check.tensor("weight", weight, input->dtype);
  if (bias) check.tensor("bias", bias, input->dtype);
  check.tensor("output", output, input->dtype);
  check_parameters(check, op, conv);
  check_shapes(check, op, input, "input", weight, "weight", output, "output");
  if (!check.ok()) return check.status();
  check.vector("bias", bias, {weight->sizes[0]});
  if (!check.ok()) return check.status();
  if (!addressable(op, input) || !addressable(op, output)) return too_large(op);

  const ConvReluForward call{images(output),
                             images(input),
                             images(weight),
                             bias ? bias->data : nullptr,
                             bias ? bias->strides[0] : 0,
                             op.conv};
  if (context->device == TWINFUSE_CUDA) {
    const TwinfuseStatus status = gpu::conv_relu_forward(call, op.name, input->dtype, *context);
    if (status != TWINFUSE_OK) return status;
  } else if (cpu::active_kernels().conv_relu_forward[input->dtype](call, *context)) {
    return out_of_memory(op.name);
  }
  count_launch(Role::kConvReluForward, input->dtype, context->device);
  return TWINFUSE_OK;
}

TwinfuseStatus backward(const TwinfuseTensor* grad_input, const TwinfuseTensor* grad_weight,
                        const TwinfuseTensor* grad_bias, const TwinfuseTensor* grad_output,
                        const TwinfuseTensor* output, const TwinfuseTensor* input,
                        const TwinfuseTensor* weight, const TwinfuseConv* conv, int32_t relu_grad,
                        const TwinfuseContext* context) {
  const Op op = op_of(grad_output, conv);
  Checker check(op.name, context);
  check.tensor("grad_output", grad_output, grad_output ? grad_output->dtype : 0);
  if (!check.ok()) return check.status();
  const int32_t dtype = grad_output->dtype;
  const int ndim = op.spatial + 2;
  check.rank("grad_output", grad_output, ndim, op.spatial == 1 ? "[N, K, Q]" : "[N, K, P, Q]");
  check.tensor("output", output, dtype);
  check_parameters(check, op, conv);
  check.relu_grad(relu_grad);
  if (!check.ok()) return check.status();
  Size sizes[4];
  for (int i = 0; i < ndim; i++) sizes[i] = {grad_output->sizes[i]};
  check.sizes("output", output, sizes, ndim);
  if (grad_input) {
    check.tensor("weight", weight, dtype);
    check.tensor("grad_input", grad_input, dtype);
    check_shapes(check, op, grad_input, "grad_input", weight, "weight", grad_output, "grad_output");
  }
  if (grad_weight) {
    check.tensor("input", input, dtype);
    check.tensor("grad_weight", grad_weight, dtype);
    check_shapes(check, op, input, "input", grad_weight, "grad_weight", grad_output, "grad_output");
  }
  if (grad_bias) check.tensor("grad_bias", grad_bias, dtype);
  check.vector("grad_bias", grad_bias, {grad_output->sizes[1]});
  if (!check.ok()) return check.status();
  if (!addressable(op, grad_output) || !addressable(op, grad_input) ||
      !addressable(op, grad_weight ? input : nullptr))
    return too_large(op);

  const ConvReluBackward call{images(grad_input),
                              images(grad_weight),
                              grad_bias ? grad_bias->data : nullptr,
                              grad_bias ? grad_bias->strides[0] : 0,
                              images(grad_output),
                              images(output),
                              images(input, grad_weight),
                              images(weight, grad_input),
                              op.conv,
                              relu_grad};
  if (context->device == TWINFUSE_CUDA) {
    const TwinfuseStatus status = gpu::conv_relu_backward(call, op.name, dtype, *context);
    if (status != TWINFUSE_OK) return status;
  } else if (cpu::active_kernels().conv_relu_backward[dtype](call, *context)) {
    return out_of_memory(op.name);
  }
  count_launch(Role::kConvReluBackward, dtype, context->device);
  return TWINFUSE_OK;
}

}  // namespace
}  // namespace twinfuse

extern "C" TwinfuseStatus twinfuse_conv_relu_forward(
    const TwinfuseTensor* output, const TwinfuseTensor* input, const TwinfuseTensor* weight,
    const TwinfuseTensor* bias, const TwinfuseConv* conv, const TwinfuseContext* context) {
  return twinfuse::guarded(
      [&] { return twinfuse::forward(output, input, weight, bias, conv, context); });
}

extern "C" TwinfuseStatus twinfuse_conv_relu_backward(
    const TwinfuseTensor* grad_input, const TwinfuseTensor* grad_weight,
    const TwinfuseTensor* grad_bias, const TwinfuseTensor* grad_output,
    const TwinfuseTensor* output, const TwinfuseTensor* input, const TwinfuseTensor* weight,
    const TwinfuseConv* conv, int32_t relu_grad, const TwinfuseContext* context) {
  return twinfuse::guarded([&] {
    return twinfuse::backward(grad_input, grad_weight, grad_bias, grad_output, output, input,
                              weight, conv, relu_grad, context);
  });
}

extern "C" int64_t twinfuse_conv_output_size(int64_t size, int64_t kernel, int64_t stride,
                                             int64_t dilation, int64_t padding_low,
                                             int64_t padding_high) {
  using twinfuse::Wide;
  const Wide room = Wide{size} + padding_low + padding_high - Wide{dilation} * (kernel - 1) - 1;
  if (room < 0 || stride < 1) return 0;
  const Wide outputs = room / stride + 1;
  return outputs > INT64_MAX ? 0 : static_cast<int64_t>(outputs);
}
