#include "twinfuse/linear_relu.h"

#include "api/error.h"
#include "api/kernel_table.h"
#include "api/tensor.h"
#include "cpu/kernels.h"
#include "gpu/ops.h"

namespace twinfuse {
namespace {

constexpr const char* kOp = "linear_relu";

TwinfuseStatus forward(const TwinfuseTensor* output, const TwinfuseTensor* input,
                       const TwinfuseTensor* weight, const TwinfuseTensor* bias,
                       const TwinfuseContext* context) {
  Checker check(kOp, context);
  check.tensor("input", input, input ? input->dtype : 0);
  if (!check.ok()) return check.status();
  const int64_t k = input->sizes[input->ndim - 1];
  check.tensor("weight", weight, input->dtype);
  check.matrix("weight", weight, {0, 'N'}, {k});
  if (!check.ok()) return check.status();
  const int64_t n = weight->sizes[0];
  if (bias) check.tensor("bias", bias, input->dtype);
  check.vector("bias", bias, {n});
  check.tensor("output", output, input->dtype);
  check.rows_like("output", output, *input, {n});
  if (!check.ok()) return check.status();

  Matrices matrices(*context);
  LinearReluForward op{};
  op.output = matrices.output(output, false);
  // Nothing is read for an empty output, so nothing need be staged for it.
  op.input = matrices.input(op.output.rows && op.output.cols ? input : nullptr);
  op.weight = matrices.input(weight);
  op.bias = bias ? bias->data : nullptr;
  op.bias_stride = bias ? bias->strides[0] : 0;
  if (matrices.failure(kOp) != TWINFUSE_OK) return matrices.failure(kOp);
  if (context->device == TWINFUSE_CUDA) {
    const TwinfuseStatus status = gpu::linear_relu_forward(op, input->dtype, *context);
    if (status != TWINFUSE_OK) return status;
  } else if (cpu::active_kernels().linear_relu_forward[input->dtype](op, *context)) {
    return out_of_memory(kOp);
  }
  matrices.commit();
  count_launch(Role::kLinearReluForward, input->dtype, context->device);
  return TWINFUSE_OK;
}

TwinfuseStatus backward(const TwinfuseTensor* grad_input, const TwinfuseTensor* grad_weight,
                        const TwinfuseTensor* grad_bias, const TwinfuseTensor* grad_output,
                        const TwinfuseTensor* output, const TwinfuseTensor* input,
                        const TwinfuseTensor* weight, int32_t relu_grad,
                        const TwinfuseContext* context) {
  Checker check(kOp, context);
  check.tensor("grad_output", grad_output, grad_output ? grad_output->dtype : 0);
  if (!check.ok()) return check.status();
  const int32_t dtype = grad_output->dtype;
  const int64_t n = grad_output->sizes[grad_output->ndim - 1];
  check.tensor("output", output, dtype);
  check.rows_like("output", output, *grad_output, {n});
  check.relu_grad(relu_grad);
  if (grad_input) {
    check.tensor("weight", weight, dtype);
    check.matrix("weight", weight, {n}, {0, 'K'});
    check.tensor("grad_input", grad_input, dtype);
    if (!check.ok()) return check.status();
    check.rows_like("grad_input", grad_input, *grad_output, {weight->sizes[1]});
  }
  if (grad_weight) {
    check.tensor("input", input, dtype);
    if (!check.ok()) return check.status();
    check.rows_like("input", input, *grad_output, {0, 'K'});
    check.tensor("grad_weight", grad_weight, dtype);
    check.matrix("grad_weight", grad_weight, {n}, {input->sizes[input->ndim - 1]});
  }
  if (grad_bias) check.tensor("grad_bias", grad_bias, dtype);
  check.vector("grad_bias", grad_bias, {n});
  if (!check.ok()) return check.status();

  Matrices matrices(*context);
  LinearReluBackward op{};
  op.grad_input = matrices.output(grad_input, false);
  op.grad_weight = matrices.output(grad_weight, true);
  op.grad_bias = grad_bias ? grad_bias->data : nullptr;
  op.grad_bias_stride = grad_bias ? grad_bias->strides[0] : 0;
  op.grad_output = matrices.input(grad_output);
  op.output = matrices.input(output);
  op.input = matrices.input(grad_weight ? input : nullptr);
  op.weight = matrices.input(grad_input ? weight : nullptr);
  op.relu_grad = relu_grad;
  if (matrices.failure(kOp) != TWINFUSE_OK) return matrices.failure(kOp);
  if (context->device == TWINFUSE_CUDA) {
    const TwinfuseStatus status = gpu::linear_relu_backward(op, dtype, *context);
    if (status != TWINFUSE_OK) return status;
  } else if (cpu::active_kernels().linear_relu_backward[dtype](op, *context)) {
    return out_of_memory(kOp);
  }
  matrices.commit();
  count_launch(Role::kLinearReluBackward, dtype, context->device);
  return TWINFUSE_OK;
}

}  // namespace
}  // namespace twinfuse

extern "C" TwinfuseStatus twinfuse_linear_relu_forward(const TwinfuseTensor* output,
                                                       const TwinfuseTensor* input,
                                                       const TwinfuseTensor* weight,
                                                       const TwinfuseTensor* bias,
                                                       const TwinfuseContext* context) {
  return twinfuse::guarded([&] { return twinfuse::forward(output, input, weight, bias, context); });
}

extern "C" TwinfuseStatus twinfuse_linear_relu_backward(
    const TwinfuseTensor* grad_input, const TwinfuseTensor* grad_weight,
    const TwinfuseTensor* grad_bias, const TwinfuseTensor* grad_output,
    const TwinfuseTensor* output, const TwinfuseTensor* input, const TwinfuseTensor* weight,
    int32_t relu_grad, const TwinfuseContext* context) {
  return twinfuse::guarded([&] {
    return twinfuse::backward(grad_input, grad_weight, grad_bias, grad_output, output, input,
                              weight, relu_grad, context);
  });
}
