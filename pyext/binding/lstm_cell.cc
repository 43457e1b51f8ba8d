// torch.ops.twinfuse.lstm_cell and its private forms, for CPU and CUDA tensors.
//
// As lstm.cc; the reference operators are `_lstm_cell_reference` and
// `_lstm_cell_reference_backward`.
#include "lstm_binding.h"

namespace twinfuse {
namespace {

constexpr const char* kOp = "lstm_cell";

// Of the forward operators, behind `save` in the private one.
enum Argument {
  kInput,
  kH,
  kC,
  kWeightIh,
  kWeightHh,
  kBiasIh,
  kBiasHh,
  kPeephole,
  kNorm,
  kNoise,  // four
  kArguments = kNoise + 4
};
constexpr std::array<const char*, kArguments> kNames = {
    "input",         "h",        "c",    "weight_ih",      "weight_hh",    "bias_ih",
    "bias_hh",       "peephole", "norm", "zoneout_hidden", "zoneout_cell", "dropout_input",
    "dropout_hidden"};
constexpr uint32_t kOptional = 255u << kBiasIh;
// Numbers behind the tensors; in private forms `save` or `needs` is before them.
constexpr int kOptions = 3;

// Of the backward operator, behind `needs`: incoming gradients, gates, and then arguments of
// forward.
enum BackwardArgument {
  kGradH,
  kGradC,
  kGates,
  kCell,  // input, h, c, weight_ih, weight_hh, and then:
  kCellPeephole = kCell + 5,
  kBackwardArguments = kCellPeephole + 6
};
constexpr std::array<const char*, kBackwardArguments> kBackwardNames = {"grad_h",
                                                                        "grad_c",
                                                                        "gates",
                                                                        "input",
                                                                        "h",
                                                                        "c",
                                                                        "weight_ih",
                                                                        "weight_hh",
                                                                        "peephole",
                                                                        "norm",
                                                                        "zoneout_hidden",
                                                                        "zoneout_cell",
                                                                        "dropout_input",
                                                                        "dropout_hidden"};
constexpr uint32_t kBackwardOptional = 3u << kGradH | 63u << kCellPeephole;

// Options and noise, which both directions have.
struct Step : TwinfuseLstm {
  Noise noise;

  Step(const Noise::Views& views, int64_t batch, int64_t inputs, int64_t units,
       const StableIValue* options)
      : TwinfuseLstm{} {
    cell_activation = static_cast<int32_t>(PopInt(options[0]));
    gate_activation = static_cast<int32_t>(PopInt(options[1]));
    norm_epsilon = PopDouble(options[2]);
    const auto sizes = [batch](int64_t width) { return std::vector<int64_t>{batch, width}; };
    noise.SetZoneout(kOp, views, units, units, sizes, /*batch_first=*/false);
    noise.SetDropout(kOp, views, batch, inputs, units, /*packed=*/false);
  }
};

// Leaves the first `pushed` results on the stack: h, c, and with `save` the gates.
void Forward(const StableIValue* arguments, bool save, int pushed, StableIValue* stack) {
  const Tensors<kArguments> tensors(kOp, kNames, kOptional, arguments);
  const StableIValue* const options = arguments + kArguments;
  const auto fall_back = [&](const std::string& reason) {
    RunReference<3, kOptions>(kOp, "twinfuse::_lstm_cell_reference",
                              torch::stable::detail::from(save), tensors, options, reason, pushed,
                              stack);
  };
  const View& x = *tensors[kInput];
  tensors.CheckDevices(kInput);
  if (x.dtype < 0) return fall_back(kDtypeReason);
  tensors.CheckRank(kInput, 2, "[B, I]");
  tensors.CheckRank(kWeightIh, 2, "[4H, I]");
  const int64_t batch = x.sizes[0], units = tensors[kWeightIh]->sizes[0] / 4;
  Step step(tensors.Views<4>(kNoise), batch, x.sizes[1], units, options);

  Result results[3];
  results[0].Take("h", Empty(kOp, "h", x, {batch, units}));
  results[1].Take("c", Empty(kOp, "c", x, {batch, units}));
  if (save) {
    const int64_t gates = (tensors[kNorm] != nullptr ? 12 : 4) * units;
    results[2].Take("gates", Empty(kOp, "gates", x, {batch, gates}));
  }
  const TwinfuseLstmState final = {results[0].view(), results[1].view()};
  const TwinfuseLstmState initial = {tensors[kH], tensors[kC]};
  const TwinfuseLstmWeights weights = {
      tensors[kWeightIh], tensors[kWeightHh], tensors[kBiasIh], tensors[kBiasHh], nullptr,
      tensors[kPeephole], tensors[kNorm]};
  const TwinfuseLstmNoise noise = step.noise.get();
  Context context(x, Products::kMatrices);
  const TwinfuseStatus status = twinfuse_lstm_cell_forward(&final, results[2].view(), &x, &initial,
                                                           &weights, &noise, &step, &context);
  if (!context.Served(kOp, status)) return fall_back(twinfuse_last_error());
  for (int i = 0; i < pushed; ++i) stack[i] = results[i].Release();
}

void BoxedPublic(StableIValue* stack, uint64_t, uint64_t) {
  Forward(stack, /*save=*/false, 2, stack);
}

void BoxedForward(StableIValue* stack, uint64_t, uint64_t) {
  Forward(stack + 1, PopBool(stack[0]), 3, stack);
}

void BoxedBackward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr int kGradients = 8;
  constexpr int kNeedsPeepholeOfCell = kNeedsHr, kNeedsNormOfCell = kNeedsPeephole;
  const int64_t needs = PopInt(stack[0]);
  const Tensors<kBackwardArguments> tensors(kOp, kBackwardNames, kBackwardOptional, stack + 1);
  const StableIValue* const options = stack + 1 + kBackwardArguments;
  const auto fall_back = [&](const std::string& reason) {
    RunReference<kGradients, kOptions>(kOp, "twinfuse::_lstm_cell_reference_backward",
                                       torch::stable::detail::from(needs), tensors, options, reason,
                                       kGradients, stack);
  };
  const View& x = *tensors[kCell];
  const View& ih = *tensors[kCell + 3];
  const View& hh = *tensors[kCell + 4];
  const View* const peephole = tensors[kCellPeephole];
  const View* const norm = tensors[kCellPeephole + 1];
  tensors.CheckDevices(kCell);
  if (x.dtype < 0) return fall_back(kDtypeReason);
  if ((needs & kNeedsPeepholeOfCell && peephole == nullptr) ||
      (needs & kNeedsNormOfCell && norm == nullptr)) {
    throw std::runtime_error("lstm_cell: needs: expected no gradient of a tensor that is None");
  }
  tensors.CheckRank(kCell, 2, "[B, I]");
  tensors.CheckRank(kCell + 3, 2, "[4H, I]");
  tensors.CheckRank(kCell + 4, 2, "[4H, H]");
  const int64_t batch = x.sizes[0], units = ih.sizes[0] / 4;
  Step step(tensors.Views<4>(kCellPeephole + 2), batch, x.sizes[1], units, options);

  Result results[kGradients];
  if (needs & kNeedsInput) results[0].Take("grad_input", EmptyLike(kOp, "grad_input", x));
  if (needs & kNeedsH) results[1].Take("grad_h", Empty(kOp, "grad_h", x, {batch, units}));
  if (needs & kNeedsC) results[2].Take("grad_c", Empty(kOp, "grad_c", x, {batch, units}));
  if (needs & kNeedsIh) results[3].Take("grad_weight_ih", EmptyLike(kOp, "grad_weight_ih", ih));
  if (needs & kNeedsHh) results[4].Take("grad_weight_hh", EmptyLike(kOp, "grad_weight_hh", hh));
  if (needs & kNeedsBias) results[5].Take("grad_bias", Empty(kOp, "grad_bias", x, {4 * units}));
  if (needs & kNeedsPeepholeOfCell) {
    results[6].Take("grad_peephole", EmptyLike(kOp, "grad_peephole", *peephole));
  }
  if (needs & kNeedsNormOfCell) results[7].Take("grad_norm", EmptyLike(kOp, "grad_norm", *norm));
  const TwinfuseLstmState grad_initial = {results[1].view(), results[2].view()};
  const TwinfuseLstmWeights grad_weights = {results[3].view(), results[4].view(), results[5].view(),
                                            nullptr,           nullptr,           results[6].view(),
                                            results[7].view()};
  const TwinfuseLstmState grad_final = {tensors[kGradH], tensors[kGradC]};
  const TwinfuseLstmState initial = {tensors[kCell + 1], tensors[kCell + 2]};
  const TwinfuseLstmWeights weights = {&ih, &hh, nullptr, nullptr, nullptr, peephole, norm};
  const TwinfuseLstmNoise noise = step.noise.get();
  Context context(x, Products::kMatrices);
  const TwinfuseStatus status =
      twinfuse_lstm_cell_backward(results[0].view(), &grad_initial, &grad_weights, &grad_final,
                                  tensors[kGates], &x, &initial, &weights, &noise, &step, &context);
  if (!context.Served(kOp, status)) return fall_back(twinfuse_last_error());
  for (int i = 0; i < kGradients; ++i) stack[i] = results[i].Release();
}

void Implement(torch::stable::detail::StableLibrary& library) {
  library.impl("lstm_cell", BoxedPublic);
  library.impl("_lstm_cell", BoxedForward);
  library.impl("_lstm_cell_backward", BoxedBackward);
}

}  // namespace
}  // namespace twinfuse

STABLE_TORCH_LIBRARY_FRAGMENT(twinfuse, library) {
  library.def(
      "lstm_cell(Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih=None, Tensor? bias_hh=None, Tensor? peephole=None, Tensor? norm=None, "
      "Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, Tensor? dropout_input=None, "
      "Tensor? dropout_hidden=None, int activation=0, int recurrent_activation=1, "
      "float norm_epsilon=1e-05) -> (Tensor, Tensor)");
  // Also the gates, which are undefined unless `save`.
  library.def(
      "_lstm_cell(bool save, Tensor input, Tensor h, Tensor c, Tensor weight_ih, "
      "Tensor weight_hh, Tensor? bias_ih=None, Tensor? bias_hh=None, Tensor? peephole=None, "
      "Tensor? norm=None, Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, "
      "Tensor? dropout_input=None, Tensor? dropout_hidden=None, int activation=0, "
      "int recurrent_activation=1, float norm_epsilon=1e-05) "
      "-> (Tensor, Tensor, Tensor)");
  // Gradients of input, h, c, weight_ih, weight_hh, either bias, peephole and norm; one whose bit
  // is not in `needs` (input: 1, h: 2, ...) is undefined (None in Python).
  library.def(
      "_lstm_cell_backward(int needs, Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor input, "
      "Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? peephole=None, "
      "Tensor? norm=None, Tensor? zoneout_hidden=None, Tensor? zoneout_cell=None, "
      "Tensor? dropout_input=None, Tensor? dropout_hidden=None, int activation=0, "
      "int recurrent_activation=1, float norm_epsilon=1e-05) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(twinfuse, CPU, library) { twinfuse::Implement(library); }
STABLE_TORCH_LIBRARY_IMPL(twinfuse, CUDA, library) { twinfuse::Implement(library); }
