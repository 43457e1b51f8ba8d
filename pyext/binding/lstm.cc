// torch.ops.twinfuse.lstm and its private forms: one layer in one direction, for CPU and CUDA
// tensors.
//
// What no kernel serves runs on `_lstm_reference` and `_lstm_reference_backward`, which Python
// defines. Autograd, autocast, vmap and fake tensors are registered for the public operator there.
#include "lstm_binding.h"

namespace twinfuse {
namespace {

constexpr const char* kOp = "lstm";

// Of the forward operators, behind `save` in the private one.
enum Argument {
  kInput,
  kH,
  kC,
  kWeightIh,
  kWeightHh,
  kBiasIh,
  kBiasHh,
  kWeightHr,
  kPeephole,
  kNorm,
  kBatchSizes,
  kMask,
  kNoise,  // four
  kArguments = kNoise + 4
};
constexpr std::array<const char*, kArguments> kNames = {"input",
                                                        "h",
                                                        "c",
                                                        "weight_ih",
                                                        "weight_hh",
                                                        "bias_ih",
                                                        "bias_hh",
                                                        "weight_hr",
                                                        "peephole",
                                                        "norm",
                                                        "batch_sizes",
                                                        "mask",
                                                        "zoneout_hidden",
                                                        "zoneout_cell",
                                                        "dropout_input",
                                                        "dropout_hidden"};
constexpr uint32_t kOptional = ((1u << kArguments) - 1) & ~(1u << kInput | 3u << kWeightIh);
// Numbers behind the tensors; in private forms `save` or `needs` is before them.
constexpr int kOptions = 6;

// Of the backward operator, behind `needs`: incoming gradients, what forward saved, and arguments
// of forward.
enum BackwardArgument {
  kGradOutput,
  kGradH,
  kGradC,
  kGates,
  kCells,
  kHidden,
  kLayer,  // input, weight_ih, weight_hh, and from here on as in forward:
  kLayerHr = kLayer + 3,
  kBackwardArguments = kLayerHr + 9
};
constexpr std::array<const char*, kBackwardArguments> kBackwardNames = {
    "grad_output",  "grad_h",        "grad_c",        "gates",     "cells",
    "hidden",       "input",         "weight_ih",     "weight_hh", "weight_hr",
    "peephole",     "norm",          "batch_sizes",   "mask",      "zoneout_hidden",
    "zoneout_cell", "dropout_input", "dropout_hidden"};
constexpr uint32_t kBackwardOptional = 7u << kGradOutput | 511u << kLayerHr;

// Sizes and options that both directions of a call have.
class Layer : public TwinfuseLstm {
 public:
  int64_t units, state, batch;
  std::vector<int64_t> leading;  // of the sequences: [T, B], [B, T] or [N]
  bool batch_first;
  Noise noise;

  // `options` are the numbers behind the tensors on the stack.
  Layer(const View& input, const View& weight_ih, const View& weight_hh, const View* weight_hr,
        const View* batch_sizes, const View* mask, const Noise::Views& views,
        const StableIValue* options)
      : TwinfuseLstm{}, leading(input.sizes, input.sizes + input.ndim - 1) {
    batch_first = PopBool(options[0]) && batch_sizes == nullptr;
    reverse = PopBool(options[1]);
    cell_activation = static_cast<int32_t>(PopInt(options[2]));
    gate_activation = static_cast<int32_t>(PopInt(options[3]));
    zero_masked_output = PopBool(options[4]);
    norm_epsilon = PopDouble(options[5]);
    batch_major = batch_first;
    units = weight_ih.sizes[0] / 4;
    state = weight_hr != nullptr ? weight_hh.sizes[1] : units;
    if (batch_sizes != nullptr) {
      ReadBatchSizes(*batch_sizes);
    } else {
      batch = leading[batch_first ? 0 : 1];
    }
    if (mask != nullptr) ReadMask(*mask);
    const auto sizes = [this](int64_t width) { return Sizes(width); };
    noise.SetZoneout(kOp, views, units, state, sizes, batch_first);
    noise.SetDropout(kOp, views, batch, input.last_size(), state, batch_sizes != nullptr);
  }

  std::vector<int64_t> Sizes(int64_t width) const {
    std::vector<int64_t> sizes = leading;
    sizes.push_back(width);
    return sizes;
  }

  int64_t rows() const { return leading.size() == 1 ? leading[0] : leading[0] * leading[1]; }

 private:
  void ReadBatchSizes(const View& view) {
    static const int32_t int64 = aoti_torch_dtype_int64();
    static const int32_t cpu = aoti_torch_device_type_cpu();
    if (view.ndim != 1 || view.torch_dtype != int64 || view.device_type != cpu) {
      throw std::runtime_error("lstm: batch_sizes: expected int64 numbers [T] on the CPU, got " +
                               Shape(view.sizes, view.ndim) + " of another kind or rank");
    }
    const auto* numbers = static_cast<const int64_t*>(view.data);
    for (int64_t t = 0; t < view.sizes[0]; ++t) sizes_.push_back(numbers[t * view.strides[0]]);
    steps = view.sizes[0];
    batch = steps > 0 && sizes_[0] > 0 ? sizes_[0] : 0;
    sizes_.push_back(0);  // an address even if there is no step
    batch_sizes = sizes_.data();
  }

  void ReadMask(const View& view) {
    static const int32_t boolean = aoti_torch_dtype_bool();
    if (view.torch_dtype != boolean || view.ndim != 2 || leading.size() != 2 ||
        view.sizes[0] != leading[0] || view.sizes[1] != leading[1]) {
      throw std::runtime_error(std::string("lstm: mask: expected bool ") +
                               Shape(leading.data(), static_cast<int64_t>(leading.size())) +
                               (leading.size() == 2 ? "" : " and no batch_sizes") + ", got shape " +
                               Shape(view.sizes, view.ndim) +
                               (view.torch_dtype == boolean ? "" : " of another dtype"));
    }
    mask = static_cast<const uint8_t*>(view.data);
    mask_stride[0] = view.strides[batch_first ? 1 : 0];
    mask_stride[1] = view.strides[batch_first ? 0 : 1];
  }

  std::vector<int64_t> sizes_;
};

void CheckInput(const View& input, const View* batch_sizes) {
  if (batch_sizes != nullptr) {
    CheckRank(kOp, input, input.ndim == 2, "[N, I] with batch_sizes");
  } else {
    CheckRank(kOp, input, input.ndim == 3, "[T, B, I], or [B, T, I] with batch_first");
  }
}

// Leaves the first `pushed` results on the stack: output, h, c, and with `save` gates, cells and
// hidden.
void Forward(const StableIValue* arguments, bool save, int pushed, StableIValue* stack) {
  const Tensors<kArguments> tensors(kOp, kNames, kOptional, arguments);
  const StableIValue* const options = arguments + kArguments;
  const auto fall_back = [&](const std::string& reason) {
    RunReference<6, kOptions>(kOp, "twinfuse::_lstm_reference", torch::stable::detail::from(save),
                              tensors, options, reason, pushed, stack);
  };
  const View& x = *tensors[kInput];
  tensors.CheckDevices(kInput, kBatchSizes);
  if (x.dtype < 0) return fall_back(kDtypeReason);
  CheckInput(x, tensors[kBatchSizes]);
  tensors.CheckRank(kWeightIh, 2, "[4H, I]");
  tensors.CheckRank(kWeightHh, 2, "[4H, R]");
  Layer layer(x, *tensors[kWeightIh], *tensors[kWeightHh], tensors[kWeightHr], tensors[kBatchSizes],
              tensors[kMask], tensors.Views<4>(kNoise), options);

  Result results[6];
  const std::vector<int64_t> sizes = layer.Sizes(layer.state);
  results[0].Take("output", Empty(kOp, "output", x, sizes));
  results[1].Take("h_n", Empty(kOp, "h_n", x, {layer.batch, layer.state}));
  results[2].Take("c_n", Empty(kOp, "c_n", x, {layer.batch, layer.units}));
  if (save) {
    const int64_t rows = layer.rows();
    const int64_t gates = (tensors[kNorm] != nullptr ? 12 : 4) * layer.units;
    results[3].Take("gates", Empty(kOp, "gates", x, {rows, gates}));
    results[4].Take("cells", Empty(kOp, "cells", x, {rows, layer.units}));
    results[5].Take("hidden", Empty(kOp, "hidden", x, {rows, layer.state}));
  }
  Sequence input, output;
  const Rows rows(kOp, x, &tensors.handle(kInput));
  input.Set(kOp, rows.view(), layer.Sizes(x.last_size()), layer.batch_first);
  output.Set(kOp, *results[0].view(), sizes, layer.batch_first);
  const TwinfuseLstmState final = {results[1].view(), results[2].view()};
  const TwinfuseLstmSaved saved = {results[3].view(), results[4].view(), results[5].view()};
  const TwinfuseLstmState initial = {tensors[kH], tensors[kC]};
  const TwinfuseLstmWeights weights = {tensors[kWeightIh], tensors[kWeightHh], tensors[kBiasIh],
                                       tensors[kBiasHh],   tensors[kWeightHr], tensors[kPeephole],
                                       tensors[kNorm]};
  const TwinfuseLstmNoise noise = layer.noise.get();
  Context context(x, Products::kRecurrent);
  const TwinfuseStatus status = twinfuse_lstm_forward(output.get(), &final, &saved, input.get(),
                                                      &initial, &weights, &noise, &layer, &context);
  if (!context.Served(kOp, status)) return fall_back(twinfuse_last_error());
  for (int i = 0; i < pushed; ++i) stack[i] = results[i].Release();
}

void BoxedPublic(StableIValue* stack, uint64_t, uint64_t) {
  Forward(stack, /*save=*/false, 3, stack);
}

void BoxedForward(StableIValue* stack, uint64_t, uint64_t) {
  Forward(stack + 1, PopBool(stack[0]), 6, stack);
}

void BoxedBackward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr int kGradients = 9;
  const int64_t needs = PopInt(stack[0]);
  const Tensors<kBackwardArguments> tensors(kOp, kBackwardNames, kBackwardOptional, stack + 1);
  const StableIValue* const options = stack + 1 + kBackwardArguments;
  const auto fall_back = [&](const std::string& reason) {
    RunReference<kGradients, kOptions>(kOp, "twinfuse::_lstm_reference_backward",
                                       torch::stable::detail::from(needs), tensors, options, reason,
                                       kGradients, stack);
  };
  const View& x = *tensors[kLayer];
  const View& ih = *tensors[kLayer + 1];
  const View& hh = *tensors[kLayer + 2];
  const View* const hr = tensors[kLayerHr];
  const View* const peephole = tensors[kLayerHr + 1];
  const View* const norm = tensors[kLayerHr + 2];
  const View* const batch_sizes = tensors[kLayerHr + 3];
  tensors.CheckDevices(kLayer, kLayerHr + 3);
  if (x.dtype < 0) return fall_back(kDtypeReason);
  if ((needs & kNeedsHr && hr == nullptr) || (needs & kNeedsPeephole && peephole == nullptr) ||
      (needs & kNeedsNorm && norm == nullptr)) {
    throw std::runtime_error("lstm: needs: expected no gradient of a tensor that is None");
  }
  CheckInput(x, batch_sizes);
  tensors.CheckRank(kLayer + 1, 2, "[4H, I]");
  tensors.CheckRank(kLayer + 2, 2, "[4H, R]");
  Layer layer(x, ih, hh, hr, batch_sizes, tensors[kLayerHr + 4], tensors.Views<4>(kLayerHr + 5),
              options);

  Result results[kGradients];
  if (needs & kNeedsInput) results[0].Take("grad_input", EmptyLike(kOp, "grad_input", x));
  if (needs & kNeedsH) {
    results[1].Take("grad_h", Empty(kOp, "grad_h", x, {layer.batch, layer.state}));
  }
  if (needs & kNeedsC) {
    results[2].Take("grad_c", Empty(kOp, "grad_c", x, {layer.batch, layer.units}));
  }
  if (needs & kNeedsIh) results[3].Take("grad_weight_ih", EmptyLike(kOp, "grad_weight_ih", ih));
  if (needs & kNeedsHh) results[4].Take("grad_weight_hh", EmptyLike(kOp, "grad_weight_hh", hh));
  if (needs & kNeedsBias) {
    results[5].Take("grad_bias", Empty(kOp, "grad_bias", x, {4 * layer.units}));
  }
  if (needs & kNeedsHr) results[6].Take("grad_weight_hr", EmptyLike(kOp, "grad_weight_hr", *hr));
  if (needs & kNeedsPeephole) {
    results[7].Take("grad_peephole", EmptyLike(kOp, "grad_peephole", *peephole));
  }
  if (needs & kNeedsNorm) results[8].Take("grad_norm", EmptyLike(kOp, "grad_norm", *norm));

  Sequence input, grad_input, grad_output;
  const std::vector<int64_t> sizes = layer.Sizes(x.last_size());
  const Rows rows(kOp, x, &tensors.handle(kLayer));
  input.Set(kOp, rows.view(), sizes, layer.batch_first);
  std::optional<Rows> grad_rows;
  if (needs & kNeedsInput) {
    grad_rows.emplace(kOp, *results[0].view(), nullptr);
    grad_input.Set(kOp, grad_rows->view(), sizes, layer.batch_first);
  }
  if (const View* const grad = tensors[kGradOutput]) {
    grad_output.Set(kOp, *grad, layer.Sizes(layer.state), layer.batch_first);
  }
  const TwinfuseLstmState grad_initial = {results[1].view(), results[2].view()};
  const TwinfuseLstmWeights grad_weights = {results[3].view(), results[4].view(), results[5].view(),
                                            nullptr,           results[6].view(), results[7].view(),
                                            results[8].view()};
  const TwinfuseLstmState grad_final = {tensors[kGradH], tensors[kGradC]};
  const TwinfuseLstmSaved saved = {tensors[kGates], tensors[kCells], tensors[kHidden]};
  const TwinfuseLstmWeights weights = {&ih, &hh, nullptr, nullptr, hr, peephole, norm};
  const TwinfuseLstmNoise noise = layer.noise.get();
  Context context(x, Products::kRecurrent);
  const TwinfuseStatus status =
      twinfuse_lstm_backward(grad_input.get(), &grad_initial, &grad_weights, grad_output.get(),
                             &grad_final, &saved, input.get(), &weights, &noise, &layer, &context);
  if (!context.Served(kOp, status)) return fall_back(twinfuse_last_error());
  if (grad_rows) grad_rows->Finish(results[0].handle());
  for (int i = 0; i < kGradients; ++i) stack[i] = results[i].Release();
}

void Implement(torch::stable::detail::StableLibrary& library) {
  library.impl("lstm", BoxedPublic);
  library.impl("_lstm", BoxedForward);
  library.impl("_lstm_backward", BoxedBackward);
}

}  // namespace
}  // namespace twinfuse

STABLE_TORCH_LIBRARY_FRAGMENT(twinfuse, library) {
  // `recompute` keeps nothing for backward, which then runs forward again.
  library.def(
      "lstm(Tensor input, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih=None, Tensor? bias_hh=None, Tensor? weight_hr=None, Tensor? peephole=None, "
      "Tensor? norm=None, Tensor? batch_sizes=None, Tensor? mask=None, "
      "Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, Tensor? dropout_input=None, "
      "Tensor? dropout_hidden=None, bool batch_first=False, bool reverse=False, "
      "int activation=0, int recurrent_activation=1, bool zero_masked_output=False, "
      "float norm_epsilon=1e-05, bool recompute=False) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)");
  // Also gates, cells and hidden of every step, which are undefined unless `save`. What is rare is
  // last in the private forms too: an argument that is left out costs less.
  library.def(
      "_lstm(bool save, Tensor input, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih=None, Tensor? bias_hh=None, Tensor? weight_hr=None, Tensor? peephole=None, "
      "Tensor? norm=None, Tensor? batch_sizes=None, Tensor? mask=None, "
      "Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, Tensor? dropout_input=None, "
      "Tensor? dropout_hidden=None, bool batch_first=False, bool reverse=False, "
      "int activation=0, int recurrent_activation=1, bool zero_masked_output=False, "
      "float norm_epsilon=1e-05) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Gradients of input, h, c, weight_ih, weight_hh, either bias, weight_hr, peephole and norm; one
  // whose bit is not in `needs` (input: 1, h: 2, ...) is undefined (None in Python).
  library.def(
      "_lstm_backward(int needs, Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, "
      "Tensor gates, Tensor cells, Tensor hidden, Tensor input, Tensor weight_ih, "
      "Tensor weight_hh, Tensor? weight_hr=None, Tensor? peephole=None, "
      "Tensor? norm=None, Tensor? batch_sizes=None, Tensor? mask=None, "
      "Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, Tensor? dropout_input=None, "
      "Tensor? dropout_hidden=None, bool batch_first=False, bool reverse=False, "
      "int activation=0, int recurrent_activation=1, bool zero_masked_output=False, "
      "float norm_epsilon=1e-05) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(twinfuse, CPU, library) { twinfuse::Implement(library); }
STABLE_TORCH_LIBRARY_IMPL(twinfuse, CUDA, library) { twinfuse::Implement(library); }
