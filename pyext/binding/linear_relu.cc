// torch.ops.twinfuse.linear_relu and its private forms, for CPU and CUDA tensors.
//
// The public operator and `_linear_relu` are one function; autograd, autocast, vmap and fake
// tensors are registered for the public one in Python.
#include "twinfuse/linear_relu.h"

#include <tuple>

#include "torch_binding.h"

namespace twinfuse {
namespace {

constexpr const char* kOp = "linear_relu";

Handle ReferenceForward(const Handle& input, const Handle& weight, const Handle& bias) {
  using torch::stable::Tensor;
  using torch::stable::detail::from;
  std::optional<Tensor> optional_bias;
  if (bias) optional_bias = bias.share();
  StableIValue stack[] = {from(input.share()), from(weight.share()), from(optional_bias)};
  Check(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION), "run aten::linear");
  Check(torch_call_dispatcher("aten::relu", "", stack, TORCH_ABI_VERSION), "run aten::relu");
  return PopTensor(stack[0]);
}

Handle Forward(const Handle& input, const Handle& weight, const Handle& bias) {
  const View x("input", input);
  const View w("weight", weight);
  std::optional<View> b;
  CheckSameDevice(kOp, x, w);
  if (bias) CheckSameDevice(kOp, x, b.emplace("bias", bias));
  // A call that torch refuses too is an error and no fall-back: hence the report comes last.
  const auto fall_back = [&](const std::string& reason) {
    Handle result = ReferenceForward(input, weight, bias);
    ReportFallback(kOp, reason);
    return result;
  };
  if (x.dtype < 0) return fall_back(kDtypeReason);
  CheckRank(kOp, x, x.ndim >= 1, "[..., K]");
  CheckRank(kOp, w, w.ndim == 2, "[N, K]");

  std::vector<int64_t> sizes(x.sizes, x.sizes + x.ndim);
  sizes.back() = w.sizes[0];
  Handle output = Empty(kOp, "output", x, sizes);
  const View y("output", output, /*written=*/true);
  Context context(x, Products::kMatrices);
  const TwinfuseStatus status =
      twinfuse_linear_relu_forward(&y, &x, &w, b ? &*b : nullptr, &context);
  if (!context.Served(kOp, status)) return fall_back(twinfuse_last_error());
  return output;
}

Gradients ReferenceBackward(const Handle& grad_output, const Handle& output, const Handle& input,
                            const Handle& weight, bool want_input, bool want_weight,
                            bool want_bias) {
  using torch::stable::Tensor;
  const Tensor g = MaskedGradient(grad_output, output);
  const auto rows = [](const Tensor& tensor) {
    return tensor.dim() == 1 ? torch::stable::unsqueeze(tensor, 0)
                             : torch::stable::flatten(tensor, 0, -2);
  };

  Gradients gradients;
  if (want_input) gradients.input = Own(torch::stable::matmul(g, weight.share()));
  if (want_weight) {
    const Tensor transposed = torch::stable::transpose(rows(g), 0, 1);
    gradients.weight = Own(torch::stable::matmul(transposed, rows(input.share())));
  }
  if (want_bias) gradients.bias = Own(torch::stable::sum(rows(g), {{0}}));
  return gradients;
}

Gradients Backward(const Handle& grad_output, const Handle& output, const Handle& input,
                   const Handle& weight, bool want_input, bool want_weight, bool want_bias) {
  const View g("grad_output", grad_output);
  const View y("output", output);
  std::optional<View> x, w;
  CheckSameDevice(kOp, g, y);
  if (input) CheckSameDevice(kOp, g, x.emplace("input", input));
  if (weight) CheckSameDevice(kOp, g, w.emplace("weight", weight));
  if ((want_weight && !x) || (want_input && !w)) {
    throw std::runtime_error(std::string(kOp) +
                             ": grad_input needs weight and grad_weight needs input");
  }
  const auto fall_back = [&](const std::string& reason) {
    Gradients result =
        ReferenceBackward(grad_output, output, input, weight, want_input, want_weight, want_bias);
    ReportFallback(kOp, reason);
    return result;
  };
  if (g.dtype < 0) return fall_back(kDtypeReason);
  CheckRank(kOp, g, g.ndim >= 1, "[..., N]");
  if (x) CheckRank(kOp, *x, x->ndim >= 1, "[..., K]");
  if (w) CheckRank(kOp, *w, w->ndim == 2, "[N, K]");

  Gradients gradients;
  std::optional<View> gx, gw, gb;
  if (want_input) {
    std::vector<int64_t> sizes(g.sizes, g.sizes + g.ndim);
    sizes.back() = w->sizes[1];
    gradients.input = Empty(kOp, "grad_input", g, sizes);
    gx.emplace("grad_input", gradients.input, /*written=*/true);
  }
  if (want_weight) {
    gradients.weight = w ? EmptyLike(kOp, "grad_weight", *w)
                         : Empty(kOp, "grad_weight", g, {g.last_size(), x->last_size()});
    gw.emplace("grad_weight", gradients.weight, /*written=*/true);
  }
  if (want_bias) {
    gradients.bias = Empty(kOp, "grad_bias", g, {g.last_size()});
    gb.emplace("grad_bias", gradients.bias, /*written=*/true);
  }
  Context context(g, Products::kMatrices);
  const TwinfuseStatus status = twinfuse_linear_relu_backward(
      gx ? &*gx : nullptr, gw ? &*gw : nullptr, gb ? &*gb : nullptr, &g, &y, x ? &*x : nullptr,
      w ? &*w : nullptr, TWINFUSE_RELU_GRAD_SELECT, &context);
  if (!context.Served(kOp, status)) return fall_back(twinfuse_last_error());
  return gradients;
}

void BoxedForward(StableIValue* stack, uint64_t, uint64_t) {
  const Handle input = PopTensor(stack[0]);
  const Handle weight = PopTensor(stack[1]);
  const Handle bias = PopOptionalTensor(stack[2]);
  stack[0] = Forward(input, weight, bias).release();
}

void BoxedBackward(StableIValue* stack, uint64_t, uint64_t) {
  const Handle grad_output = PopTensor(stack[0]);
  const Handle output = PopTensor(stack[1]);
  const Handle input = PopOptionalTensor(stack[2]);
  const Handle weight = PopOptionalTensor(stack[3]);
  Backward(grad_output, output, input, weight, PopBool(stack[4]), PopBool(stack[5]),
           PopBool(stack[6]))
      .Push(stack);
}

void Implement(torch::stable::detail::StableLibrary& library) {
  library.impl("linear_relu", BoxedForward);
  library.impl("_linear_relu", BoxedForward);
  library.impl("_linear_relu_backward", BoxedBackward);
}

}  // namespace
}  // namespace twinfuse

STABLE_TORCH_LIBRARY_FRAGMENT(twinfuse, library) {
  library.def("linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  library.def("_linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  // A gradient that is not asked for is undefined (None in Python); `input` and `weight` may be
  // None where their gradients are not needed.
  library.def(
      "_linear_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, "
      "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(twinfuse, CPU, library) { twinfuse::Implement(library); }
STABLE_TORCH_LIBRARY_IMPL(twinfuse, CUDA, library) { twinfuse::Implement(library); }
