// torch.ops.twinfuse.conv1d_relu, conv2d_relu and their private forms, for CPU and CUDA tensors.
//
// The private forms take the convolution's numbers as one list (see `Conv::Conv`), because each
// argument of its own costs a tenth of a microsecond. Autograd, autocast, vmap and fake tensors are
// registered for the public operators in Python. All of them take batched tensors only.
#include "twinfuse/conv_relu.h"

#include <algorithm>
#include <array>

#include "torch_binding.h"

namespace twinfuse {
namespace {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// The numbers of a convolution, in one or two spatial dimensions.
struct Conv : TwinfuseConv {
  int rank;

  // From stride, dilation, padding below and padding above, each with one number per dimension, and
  // the number of groups.
  explicit Conv(const Ints& numbers) : TwinfuseConv{} {
    if (numbers.size() != 5 && numbers.size() != 9) {
      throw std::runtime_error("conv_relu: conv: expected 5 or 9 numbers, got " +
                               std::to_string(numbers.size()));
    }
    rank = static_cast<int>(numbers.size() / 4);
    const int64_t* next = numbers.data();
    for (int64_t* each : {stride, dilation, padding_low, padding_high}) {
      std::copy_n(next, rank, each);
      next += rank;
    }
    groups = *next;
  }

  const char* op() const { return rank == 1 ? "conv1d_relu" : "conv2d_relu"; }
  const char* images() const { return rank == 1 ? "[N, C, W]" : "[N, C, H, W]"; }
  const char* filters() const { return rank == 1 ? "[K, C / groups, S]" : "[K, C / groups, R, S]"; }
  Ints list(const int64_t* numbers) const { return Ints(numbers, numbers + rank); }
  bool symmetric() const { return std::equal(padding_low, padding_low + rank, padding_high); }

  int64_t output_size(const View& input, const View& weight, int d) const {
    // What is out of range is for the core to refuse, once there is an output to hand over.
    if (dilation[d] < 1) return 0;
    return twinfuse_conv_output_size(input.sizes[d + 2], weight.sizes[d + 2], stride[d],
                                     dilation[d], padding_low[d], padding_high[d]);
  }
};

// torch's rule, which tells [N, C, H, W] in memory as [N, H, W, C] by its strides.
bool IsChannelsLast(const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& strides) {
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d];
    if (sizes[d] > 1 && __builtin_mul_overflow(least, sizes[d], &least)) return false;
  }
  return true;
}

bool IsChannelsLast(const View& view) {
  const int64_t* const n = view.sizes;
  const int64_t* const s = view.strides;
  if (view.ndim == 4) return IsChannelsLast({n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]});
  const uint64_t row = static_cast<uint64_t>(n[2]) * static_cast<uint64_t>(s[2]);
  return IsChannelsLast({n[0], n[1], 1, n[2]}, {s[0], s[1], static_cast<int64_t>(row), s[2]});
}

// As native: in one dimension the weight alone decides.
bool TakesChannelsLast(const View& input, const View& weight) {
  return (input.ndim == 4 && IsChannelsLast(input)) || IsChannelsLast(weight);
}

Handle EmptyImages(const char* op, const char* name, const View& like, const Ints& sizes,
                   bool channels_last) {
  if (!channels_last) return Empty(op, name, like, sizes);
  Ints strides(sizes.size(), 1);
  uint64_t step = static_cast<uint64_t>(sizes[1]);  // unsigned: as in `Empty`
  for (size_t i = sizes.size(); i-- > 2;) {
    strides[i] = static_cast<int64_t>(step);
    step *= static_cast<uint64_t>(sizes[i]);
  }
  strides[0] = static_cast<int64_t>(step);
  return EmptyStrided(op, name, like, sizes, strides.data());
}

void CheckImages(const Conv& conv, const View& view) {
  CheckRank(conv.op(), view, view.ndim == conv.rank + 2, conv.images());
}

// What the core takes and torch refuses.
void CheckNotEmpty(const Conv& conv, const View& input, const View& weight) {
  CheckRank(conv.op(), weight, weight.ndim == conv.rank + 2 && weight.sizes[0] > 0, conv.filters());
  const bool pixels =
      std::all_of(input.sizes + 2, input.sizes + input.ndim, [](int64_t size) { return size > 0; });
  CheckRank(conv.op(), input, pixels || input.sizes[0] == 0, "one pixel or more");
}

// The input between its zeros where torch's convolution cannot add them, and the padding left.
Tensor Padded(const Conv& conv, const Handle& input, Ints* padding) {
  *padding = conv.list(conv.padding_low);
  if (conv.symmetric()) return input.share();
  Ints both;
  for (int d = conv.rank; d-- > 0;) {
    both.insert(both.end(), {conv.padding_low[d], conv.padding_high[d]});
  }
  padding->assign(conv.rank, 0);
  return torch::stable::pad(input.share(), both);
}

Handle ReferenceForward(const Conv& conv, const Handle& input, const Handle& weight,
                        const Handle& bias) {
  using torch::stable::detail::from;
  std::optional<Tensor> optional_bias;
  if (bias) optional_bias = bias.share();
  Ints padding;
  const Tensor padded = Padded(conv, input, &padding);
  StableIValue stack[] = {from(padded),        from(weight.share()),
                          from(optional_bias), from(conv.list(conv.stride)),
                          from(padding),       from(conv.list(conv.dilation)),
                          from(false),         from(Ints(conv.rank)),
                          from(conv.groups)};
  Check(torch_call_dispatcher("aten::convolution", "", stack, TORCH_ABI_VERSION),
        "run aten::convolution");
  Check(torch_call_dispatcher("aten::relu", "", stack, TORCH_ABI_VERSION), "run aten::relu");
  return PopTensor(stack[0]);
}

Handle Forward(const Conv& conv, const Handle& input, const Handle& weight, const Handle& bias) {
  const char* const op = conv.op();
  const View x("input", input);
  const View w("weight", weight);
  std::optional<View> b;
  CheckSameDevice(op, x, w);
  if (bias) CheckSameDevice(op, x, b.emplace("bias", bias));
  // A call that torch refuses too is an error and no fall-back: hence the report comes last.
  const auto fall_back = [&](const std::string& reason) {
    Handle result = ReferenceForward(conv, input, weight, bias);
    ReportFallback(op, reason);
    return result;
  };
  if (x.dtype < 0) return fall_back(kDtypeReason);
  CheckImages(conv, x);
  CheckNotEmpty(conv, x, w);

  Ints sizes = {x.sizes[0], w.sizes[0]};
  for (int d = 0; d < conv.rank; ++d) sizes.push_back(conv.output_size(x, w, d));
  Handle output = EmptyImages(op, "output", x, sizes, TakesChannelsLast(x, w));
  const View y("output", output, /*written=*/true);
  Context context(x, Products::kConvolutions);
  const TwinfuseStatus status =
      twinfuse_conv_relu_forward(&y, &x, &w, b ? &*b : nullptr, &conv, &context);
  if (!context.Served(op, status)) return fall_back(twinfuse_last_error());
  return output;
}

Gradients ReferenceBackward(const Conv& conv, const Handle& grad_output, const Handle& output,
                            const Handle& input, const Handle& weight, bool want_input,
                            bool want_weight, bool want_bias) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Tensor w = weight.share();
  Ints padding;
  const Tensor padded = Padded(conv, input, &padding);
  const bool mask[] = {want_input, want_weight, want_bias};
  StableIValue stack[] = {from(MaskedGradient(grad_output, output)),
                          from(padded),
                          from(w),
                          from(std::optional<Ints>(Ints{w.size(0)})),
                          from(conv.list(conv.stride)),
                          from(padding),
                          from(conv.list(conv.dilation)),
                          from(false),
                          from(Ints(conv.rank)),
                          from(conv.groups),
                          from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
  Check(torch_call_dispatcher("aten::convolution_backward", "", stack, TORCH_ABI_VERSION),
        "run aten::convolution_backward");
  Tensor results[] = {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};

  Gradients gradients;
  if (want_input) {
    for (int d = 0; d < conv.rank && !conv.symmetric(); ++d) {
      const int64_t size = View("input", input).sizes[d + 2];
      results[0] = torch::stable::narrow(results[0], d + 2, conv.padding_low[d], size);
    }
    gradients.input = Own(results[0]);
  }
  if (want_weight) gradients.weight = Own(results[1]);
  if (want_bias) gradients.bias = Own(results[2]);
  return gradients;
}

Gradients Backward(const Conv& conv, const Handle& grad_output, const Handle& output,
                   const Handle& input, const Handle& weight, bool want_input, bool want_weight,
                   bool want_bias) {
  const char* const op = conv.op();
  const View g("grad_output", grad_output);
  const View y("output", output);
  const View x("input", input);
  const View w("weight", weight);
  for (const View* other : {&y, &x, &w}) CheckSameDevice(op, g, *other);
  const auto fall_back = [&](const std::string& reason) {
    Gradients result = ReferenceBackward(conv, grad_output, output, input, weight, want_input,
                                         want_weight, want_bias);
    ReportFallback(op, reason);
    return result;
  };
  if (g.dtype < 0) return fall_back(kDtypeReason);
  CheckImages(conv, g);
  CheckImages(conv, x);
  CheckNotEmpty(conv, x, w);

  Gradients gradients;
  std::optional<View> gx, gw, gb;
  if (want_input) {
    gradients.input =
        EmptyImages(op, "grad_input", g, Ints(x.sizes, x.sizes + x.ndim), TakesChannelsLast(x, w));
    gx.emplace("grad_input", gradients.input, /*written=*/true);
  }
  if (want_weight) {
    gradients.weight = EmptyLike(op, "grad_weight", w);
    gw.emplace("grad_weight", gradients.weight, /*written=*/true);
  }
  if (want_bias) {
    gradients.bias = Empty(op, "grad_bias", g, {w.sizes[0]});
    gb.emplace("grad_bias", gradients.bias, /*written=*/true);
  }
  Context context(g, Products::kConvolutions);
  const TwinfuseStatus status =
      twinfuse_conv_relu_backward(gx ? &*gx : nullptr, gw ? &*gw : nullptr, gb ? &*gb : nullptr, &g,
                                  &y, &x, &w, &conv, TWINFUSE_RELU_GRAD_SELECT, &context);
  if (!context.Served(op, status)) return fall_back(twinfuse_last_error());
  return gradients;
}

// One number stands for all dimensions, as in torch's own operators.
void Append(Ints* numbers, Ints value, const char* op, const char* name, size_t count) {
  if (value.size() == 1) value.resize(count, value[0]);
  if (value.size() != count) {
    throw std::runtime_error(std::string(op) + ": " + name + ": expected " + std::to_string(count) +
                             " numbers, got " + std::to_string(value.size()));
  }
  numbers->insert(numbers->end(), value.begin(), value.end());
}

template <size_t kRank>
void BoxedPublic(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kOp = kRank == 1 ? "conv1d_relu" : "conv2d_relu";
  const Handle input = PopTensor(stack[0]);
  const Handle weight = PopTensor(stack[1]);
  const Handle bias = PopOptionalTensor(stack[2]);
  const Ints stride = PopInts(stack[3]), dilation = PopInts(stack[5]);
  Ints padding = PopInts(stack[4]);
  if (padding.size() <= kRank) {
    Ints below;
    Append(&below, padding, kOp, "padding", kRank);
    padding = below;
    padding.insert(padding.end(), below.begin(), below.end());
  }
  Ints numbers;
  Append(&numbers, stride, kOp, "stride", kRank);
  Append(&numbers, dilation, kOp, "dilation", kRank);
  Append(&numbers, padding, kOp, "padding", 2 * kRank);
  numbers.push_back(torch::stable::detail::to<int64_t>(stack[6]));
  stack[0] = Forward(Conv(numbers), input, weight, bias).release();
}

void BoxedForward(StableIValue* stack, uint64_t, uint64_t) {
  const Handle input = PopTensor(stack[0]);
  const Handle weight = PopTensor(stack[1]);
  const Handle bias = PopOptionalTensor(stack[2]);
  stack[0] = Forward(Conv(PopInts(stack[3])), input, weight, bias).release();
}

void BoxedBackward(StableIValue* stack, uint64_t, uint64_t) {
  const Handle grad_output = PopTensor(stack[0]);
  const Handle output = PopTensor(stack[1]);
  const Handle input = PopTensor(stack[2]);
  const Handle weight = PopTensor(stack[3]);
  Backward(Conv(PopInts(stack[4])), grad_output, output, input, weight, PopBool(stack[5]),
           PopBool(stack[6]), PopBool(stack[7]))
      .Push(stack);
}

void Implement(torch::stable::detail::StableLibrary& library) {
  library.impl("conv1d_relu", BoxedPublic<1>);
  library.impl("conv2d_relu", BoxedPublic<2>);
  library.impl("_conv_relu", BoxedForward);
  library.impl("_conv_relu_backward", BoxedBackward);
}

}  // namespace
}  // namespace twinfuse

STABLE_TORCH_LIBRARY_FRAGMENT(twinfuse, library) {
  // `padding` holds one number per spatial dimension, or two: first all below, then all above.
  library.def(
      "conv1d_relu(Tensor input, Tensor weight, Tensor? bias=None, int[1] stride=1, "
      "int[1] padding=0, int[1] dilation=1, int groups=1) -> Tensor");
  library.def(
      "conv2d_relu(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1) -> Tensor");
  library.def("_conv_relu(Tensor input, Tensor weight, Tensor? bias, int[] conv) -> Tensor");
  // A gradient that is not asked for is undefined (None in Python).
  library.def(
      "_conv_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, "
      "int[] conv, bool needs_input, bool needs_weight, bool needs_bias) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(twinfuse, CPU, library) { twinfuse::Implement(library); }
STABLE_TORCH_LIBRARY_IMPL(twinfuse, CUDA, library) { twinfuse::Implement(library); }
