#include "twinfuse/lstm.h"

#include <string>

#include "api/error.h"
#include "api/kernel_table.h"
#include "api/tensor.h"
#include "cpu/kernels.h"
#include "gpu/ops.h"

namespace twinfuse {
namespace {

constexpr TwinfuseLstmState kNoState{};
constexpr TwinfuseLstmNoise kNoNoise{};
constexpr TwinfuseLstmSaved kNothingSaved{};
constexpr TwinfuseLstmWeights kNoWeights{};

// What is checked in the same way forward and backward.
class Call {
 public:
  Call(const char* op, bool cell, const TwinfuseLstm* lstm, const TwinfuseContext* context)
      : check(op, context), op_(op), cell_(cell) {
    check.given(lstm, "lstm", "options");
    if (!check.ok()) return;
    options_ = *lstm;
    activation("cell_activation", options_.cell_activation);
    activation("gate_activation", options_.gate_activation);
    if (!cell) return;
    options_.reverse = options_.batch_major = 0;
    options_.batch_sizes = nullptr;
    options_.mask = nullptr;
  }

  Checker check;

  // Sizes from a sequence (of a cell or packed: from its rows), and from the weights.
  void sizes(const char* name, const TwinfuseTensor* rows, const TwinfuseLstmWeights* weights,
             int32_t dtype) {
    dtype_ = dtype;
    check.tensor(name, rows, dtype);
    const bool packed = options_.batch_sizes != nullptr;
    const int rank = packed || cell_ ? 2 : 3;
    if (check.ok())
      check.rank(name, rows, rank, cell_ ? "[B, n]" : packed ? "[N, n]" : "[T, B, n]");
    check.given(weights, "weights", "weights");
    if (!check.ok()) return;
    check.tensor("weight_ih", weights->ih, dtype);
    check.tensor("weight_hh", weights->hh, dtype);
    if (!check.ok()) return;
    check.rank("weight_ih", weights->ih, 2, "[4H, I]");
    check.rank("weight_hh", weights->hh, 2, "[4H, R]");
    if (!check.ok()) return;
    const int64_t gates = weights->ih->sizes[0];
    check.require(gates % 4 == 0, "weight_ih", "a multiple of 4 rows", gates);
    call_.units = gates / 4;
    call_.inputs = weights->ih->sizes[1];
    call_.state = weights->hr ? weights->hh->sizes[1] : call_.units;
    check.matrix("weight_hh", weights->hh, {gates}, {call_.state});
    vector("bias_ih", weights->bias_ih);
    vector("bias_hh", weights->bias_hh);
    matrix("weight_hr", weights->hr, call_.state, call_.units);
    matrix("peephole", weights->peephole, 3, call_.units);
    matrix("norm", weights->norm, 2, gates);
    saved_gates_ = weights->norm ? 3 * gates : gates;
    if (weights->norm && !(options_.norm_epsilon >= 0))
      check.reject("norm_epsilon", "a number that is not negative",
                   std::to_string(options_.norm_epsilon));
    call_.steps = cell_ ? 1 : packed ? options_.steps : rows->sizes[0];
    call_.batch = cell_ ? rows->sizes[0] : packed ? 0 : rows->sizes[1];
    check.require(!__builtin_mul_overflow(call_.steps, call_.batch, &call_.rows), name,
                  "fewer than 2^63 rows", call_.steps);
    if (packed) packed_sizes(rows->sizes[0]);
  }

  // The same where no sequence tells how many steps make up the saved rows: a state does.
  void sizes_of_rows(const TwinfuseTensor& gates, const TwinfuseTensor* const (&states)[4],
                     const TwinfuseLstmWeights* weights, int32_t dtype) {
    const TwinfuseTensor* any = nullptr;
    for (const TwinfuseTensor* state : states)
      if (state) any = state;
    check.given(any, "input", "a tensor, or else one of the states");
    if (!any || !check.ok()) return;
    check.tensor("state", any, dtype);
    if (check.ok()) check.rank("state", any, 2, "[B, n]");
    if (check.ok()) check.rank("gates", &gates, 2, "[rows, 4H]");
    if (!check.ok()) return;
    const int64_t rows = gates.sizes[0], batch = any->sizes[0];
    const int64_t sizes[] = {batch ? rows / batch : 0, batch, 0}, strides[] = {0, 0, 0};
    const TwinfuseTensor shape{nullptr, dtype, 3, sizes, strides};
    this->sizes("input", &shape, weights, dtype);
  }

  void matrix(const char* name, const TwinfuseTensor* tensor, int64_t rows, int64_t cols) {
    if (!tensor) return;
    check.tensor(name, tensor, dtype_);
    check.matrix(name, tensor, {rows}, {cols});
  }
  void vector(const char* name, const TwinfuseTensor* tensor) {
    if (tensor) check.tensor(name, tensor, dtype_);
    check.vector(name, tensor, {4 * call_.units});
  }
  void state(const char* h, const char* c, const TwinfuseLstmState& state) {
    matrix(h, state.h, call_.batch, call_.state);
    matrix(c, state.c, call_.batch, call_.units);
  }
  // [T, B, cols], or what stands for it in packed sequences and in a cell.
  void sequence(const char* name, const TwinfuseTensor* tensor, int64_t cols) {
    if (!tensor) return;
    check.tensor(name, tensor, dtype_);
    const Size sizes[] = {{call_.steps}, {call_.batch}, {cols}}, rows[] = {{call_.rows}, {cols}};
    const bool flat = cell_ || options_.batch_sizes;
    check.sizes(name, tensor, flat ? rows : sizes, flat ? 2 : 3);
  }
  void factors(const char* name, const TwinfuseTensor* tensor, int64_t cols) {
    if (!tensor) return;
    check.tensor(name, tensor, dtype_);
    const Size sizes[] = {{4}, {call_.batch}, {cols}};
    check.sizes(name, tensor, sizes, 3);
  }
  // Rows that are dense: what is saved.
  void dense(const char* name, const TwinfuseTensor* tensor, int64_t cols) {
    matrix(name, tensor, call_.rows, cols);
    if (check.ok() && tensor && cols > 1)
      check.require(tensor->strides[1] == 1, name, "rows with a stride of 1", tensor->strides[1]);
  }
  void noise(const TwinfuseLstmNoise& noise) {
    sequence("zoneout_hidden", noise.zoneout_hidden, call_.state);
    sequence("zoneout_cell", noise.zoneout_cell, call_.units);
    factors("dropout_input", noise.dropout_input, call_.inputs);
    factors("dropout_hidden", noise.dropout_hidden, call_.state);
  }
  void saved(const TwinfuseLstmSaved& saved, bool wanted) {
    if (wanted || saved.gates || saved.cells || saved.hidden) {
      check.given(saved.gates, "gates", "a tensor, as all that is saved");
      check.given(saved.cells, cell_ ? "initial_c" : "cells", "a tensor, as all that is saved");
      check.given(saved.hidden, cell_ ? "initial_h" : "hidden", "a tensor, as all that is saved");
    }
    dense("gates", saved.gates, saved_gates_);
    if (cell_) return state("initial_h", "initial_c", {saved.hidden, saved.cells});
    dense("cells", saved.cells, call_.units);
    dense("hidden", saved.hidden, call_.state);
  }
  // Of what is not there, there is no gradient.
  void gradients(const TwinfuseLstmWeights& grads, const TwinfuseLstmWeights& weights,
                 const TwinfuseTensor* input) {
    if (grads.ih) check.given(input, "input", "a tensor, for the gradient of weight_ih");
    if (grads.hr) check.given(weights.hr, "grad_weight_hr", "NULL without weight_hr");
    if (grads.peephole) check.given(weights.peephole, "grad_peephole", "NULL without peephole");
    if (grads.norm) check.given(weights.norm, "grad_norm", "NULL without norm");
    matrix("grad_weight_ih", grads.ih, 4 * call_.units, call_.inputs);
    matrix("grad_weight_hh", grads.hh, 4 * call_.units, call_.state);
    matrix("grad_weight_hr", grads.hr, call_.state, call_.units);
    matrix("grad_peephole", grads.peephole, 3, call_.units);
    matrix("grad_norm", grads.norm, 2, 4 * call_.units);
    vector("grad_bias_ih", grads.bias_ih);
    vector("grad_bias_hh", grads.bias_hh);
  }

  void fill(LstmCall* call, const TwinfuseLstmWeights& weights,
            const TwinfuseLstmNoise& noise) const {
    *call = call_;
    call->options = options_;
    call->weights = view(weights);
    call->zoneout_hidden = view_sequence(noise.zoneout_hidden);
    call->zoneout_cell = view_sequence(noise.zoneout_cell);
    call->dropout_input = view_factors(noise.dropout_input);
    call->dropout_hidden = view_factors(noise.dropout_hidden);
  }

  static Matrix view(const TwinfuseTensor* t) {
    if (!t) return {};
    // An empty tensor that was given has an address all the same.
    static char nothing;
    return {t->data ? t->data : &nothing, t->sizes[0], t->sizes[1], t->strides[0], t->strides[1]};
  }
  static LstmState view(const TwinfuseLstmState& state) { return {view(state.h), view(state.c)}; }
  static LstmSaved view(const TwinfuseLstmSaved& saved) {
    return {view(saved.gates), view(saved.cells), view(saved.hidden)};
  }
  static LstmWeights view(const TwinfuseLstmWeights& w) {
    const auto vector = [](const TwinfuseTensor* t) {
      return t ? Vector{t->data, t->strides[0]} : Vector{};
    };
    return {view(w.ih),   view(w.hh),        view(w.hr),       view(w.peephole),
            view(w.norm), vector(w.bias_ih), vector(w.bias_hh)};
  }
  Sequence view_sequence(const TwinfuseTensor* t) const {
    if (!t) return {};
    if (options_.batch_sizes || cell_) return {t->data, 0, t->strides[0], t->strides[1]};
    return view_factors(t);
  }
  static Sequence view_factors(const TwinfuseTensor* t) {
    return t ? Sequence{t->data, t->strides[0], t->strides[1], t->strides[2]} : Sequence{};
  }

  int64_t saved_gates() const { return saved_gates_; }
  int64_t inputs() const { return call_.inputs; }
  int64_t hidden() const { return call_.state; }
  int64_t batch() const { return call_.batch; }

 private:
  void activation(const char* name, int32_t number) {
    check.require(number >= 0 && number < TWINFUSE_ACTIVATION_COUNT, name, "0 to 3", number);
  }

  void packed_sizes(int64_t rows) {
    check.require(options_.steps > 0, "batch_sizes", "at least one step", options_.steps);
    check.require(!options_.mask, "mask", "no mask with batch_sizes", 1);
    if (!check.ok()) return;
    const int64_t* sizes = options_.batch_sizes;
    call_.batch = sizes[0];
    call_.rows = rows;
    uint64_t sum = 0;
    for (int64_t t = 0; t < options_.steps; t++) {
      check.require(sizes[t] >= 1 && sizes[t] <= (t ? sizes[t - 1] : rows), "batch_sizes",
                    "positive numbers that do not increase", sizes[t]);
      if (!check.ok()) return;
      // Behind the number of rows the sum no longer matters, and could overflow.
      if (sum <= static_cast<uint64_t>(rows)) sum += static_cast<uint64_t>(sizes[t]);
    }
    check.require(sum == static_cast<uint64_t>(rows), "batch_sizes",
                  "a sum equal to the number of rows of the packed tensor",
                  static_cast<int64_t>(sum));
  }

  const char* op_;
  const bool cell_;
  int32_t dtype_ = 0;
  TwinfuseLstm options_{};
  LstmCall call_{};
  int64_t saved_gates_ = 0;  // in a row
};

TwinfuseStatus forward(const char* op_name, bool is_cell, const TwinfuseTensor* output,
                       const TwinfuseLstmState* final, const TwinfuseLstmSaved* saved,
                       const TwinfuseTensor* gates, const TwinfuseTensor* input,
                       const TwinfuseLstmState* initial, const TwinfuseLstmWeights* weights,
                       const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm,
                       const TwinfuseContext* context) {
  if (!final) final = &kNoState;
  if (!saved) saved = &kNothingSaved;
  if (!initial) initial = &kNoState;
  if (!noise) noise = &kNoNoise;
  Call call(op_name, is_cell, lstm, context);
  call.sizes("input", input, weights, input ? input->dtype : 0);
  if (!call.check.ok()) return call.check.status();
  call.sequence("input", input, call.inputs());
  call.sequence("output", output, call.hidden());
  call.state("final_h", "final_c", *final);
  call.state("initial_h", "initial_c", *initial);
  call.noise(*noise);
  is_cell ? call.dense("gates", gates, call.saved_gates()) : call.saved(*saved, false);
  if (!call.check.ok()) return call.check.status();

  LstmForward op{};
  call.fill(&op, *weights, *noise);
  op.output = call.view_sequence(output);
  op.final = Call::view(*final), op.initial = Call::view(*initial);
  op.saved = Call::view(*saved);
  if (is_cell) op.saved.gates = Call::view(gates);
  op.input = call.view_sequence(input);
  if (context->device == TWINFUSE_CUDA) {
    const TwinfuseStatus status = gpu::lstm_forward(op, op_name, input->dtype, *context);
    if (status != TWINFUSE_OK) return status;
  } else if (cpu::active_kernels().lstm_forward[input->dtype](op, *context)) {
    return out_of_memory(op_name);
  }
  count_launch(is_cell ? Role::kLstmCellForward : Role::kLstmForward, input->dtype,
               context->device);
  return TWINFUSE_OK;
}

TwinfuseStatus backward(const char* op_name, bool is_cell, const TwinfuseTensor* grad_input,
                        const TwinfuseLstmState* grad_initial,
                        const TwinfuseLstmWeights* grad_weights, const TwinfuseTensor* grad_output,
                        const TwinfuseLstmState* grad_final, const TwinfuseLstmSaved* saved,
                        const TwinfuseTensor* input, const TwinfuseLstmWeights* weights,
                        const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm,
                        const TwinfuseContext* context) {
  if (!grad_initial) grad_initial = &kNoState;
  if (!grad_final) grad_final = &kNoState;
  if (!grad_weights) grad_weights = &kNoWeights;
  if (!noise) noise = &kNoNoise;
  if (!saved) saved = &kNothingSaved;
  Call call(op_name, is_cell, lstm, context);
  call.check.given(saved->gates, "gates", "a tensor");
  if (!call.check.ok()) return call.check.status();
  const int32_t dtype = saved->gates->dtype;
  call.check.tensor("gates", saved->gates, dtype);
  if (is_cell || lstm->batch_sizes) {
    call.sizes("gates", saved->gates, weights, dtype);
  } else if (const TwinfuseTensor* any = input ? input : grad_output ? grad_output : grad_input) {
    call.sizes(input ? "input" : grad_output ? "grad_output" : "grad_input", any, weights, dtype);
  } else {
    const TwinfuseTensor* states[] = {grad_final->h, grad_final->c, grad_initial->h,
                                      grad_initial->c};
    call.sizes_of_rows(*saved->gates, states, weights, dtype);
  }
  if (!call.check.ok()) return call.check.status();
  const TwinfuseLstmWeights& g = *grad_weights;
  call.sequence("input", input, call.inputs());
  call.sequence("grad_input", grad_input, call.inputs());
  call.sequence("grad_output", grad_output, call.hidden());
  call.state("grad_final_h", "grad_final_c", *grad_final);
  call.state("grad_initial_h", "grad_initial_c", *grad_initial);
  call.noise(*noise);
  call.saved(*saved, true);
  call.gradients(g, *weights, input);
  if (!call.check.ok()) return call.check.status();

  LstmBackward op{};
  call.fill(&op, *weights, *noise);
  op.saved = Call::view(*saved);
  op.input = call.view_sequence(input);
  op.grad_input = call.view_sequence(grad_input);
  op.grad_output = call.view_sequence(grad_output);
  op.grad_initial = Call::view(*grad_initial), op.grad_final = Call::view(*grad_final);
  Matrices matrices(*context);
  op.grad_weights = Call::view(g);
  op.grad_weights.ih = matrices.output(g.ih, true);
  op.grad_weights.hh = matrices.output(g.hh, true);
  op.grad_weights.hr = matrices.output(g.hr, true);
  if (matrices.failure(op_name) != TWINFUSE_OK) return matrices.failure(op_name);
  if (context->device == TWINFUSE_CUDA) {
    const TwinfuseStatus status = gpu::lstm_backward(op, op_name, dtype, *context);
    if (status != TWINFUSE_OK) return status;
  } else if (cpu::active_kernels().lstm_backward[dtype](op, *context)) {
    return out_of_memory(op_name);
  }
  matrices.commit();
  count_launch(is_cell ? Role::kLstmCellBackward : Role::kLstmBackward, dtype, context->device);
  return TWINFUSE_OK;
}

}  // namespace
}  // namespace twinfuse

extern "C" TwinfuseStatus twinfuse_lstm_forward(
    const TwinfuseTensor* output, const TwinfuseLstmState* final, const TwinfuseLstmSaved* saved,
    const TwinfuseTensor* input, const TwinfuseLstmState* initial,
    const TwinfuseLstmWeights* weights, const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm,
    const TwinfuseContext* context) {
  return twinfuse::guarded([&] {
    return twinfuse::forward("lstm", false, output, final, saved, nullptr, input, initial, weights,
                             noise, lstm, context);
  });
}

extern "C" TwinfuseStatus twinfuse_lstm_backward(
    const TwinfuseTensor* grad_input, const TwinfuseLstmState* grad_initial,
    const TwinfuseLstmWeights* grad_weights, const TwinfuseTensor* grad_output,
    const TwinfuseLstmState* grad_final, const TwinfuseLstmSaved* saved,
    const TwinfuseTensor* input, const TwinfuseLstmWeights* weights, const TwinfuseLstmNoise* noise,
    const TwinfuseLstm* lstm, const TwinfuseContext* context) {
  return twinfuse::guarded([&] {
    return twinfuse::backward("lstm", false, grad_input, grad_initial, grad_weights, grad_output,
                              grad_final, saved, input, weights, noise, lstm, context);
  });
}

extern "C" TwinfuseStatus twinfuse_lstm_cell_forward(
    const TwinfuseLstmState* final, const TwinfuseTensor* gates, const TwinfuseTensor* input,
    const TwinfuseLstmState* initial, const TwinfuseLstmWeights* weights,
    const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm, const TwinfuseContext* context) {
  return twinfuse::guarded([&] {
    return twinfuse::forward("lstm_cell", true, nullptr, final, nullptr, gates, input, initial,
                             weights, noise, lstm, context);
  });
}

extern "C" TwinfuseStatus twinfuse_lstm_cell_backward(
    const TwinfuseTensor* grad_input, const TwinfuseLstmState* grad_initial,
    const TwinfuseLstmWeights* grad_weights, const TwinfuseLstmState* grad_final,
    const TwinfuseTensor* gates, const TwinfuseTensor* input, const TwinfuseLstmState* initial,
    const TwinfuseLstmWeights* weights, const TwinfuseLstmNoise* noise, const TwinfuseLstm* lstm,
    const TwinfuseContext* context) {
  return twinfuse::guarded([&] {
    TwinfuseLstmSaved saved{gates, initial ? initial->c : nullptr, initial ? initial->h : nullptr};
    return twinfuse::backward("lstm_cell", true, grad_input, grad_initial, grad_weights, nullptr,
                              grad_final, &saved, input, weights, noise, lstm, context);
  });
}

extern "C" const char* twinfuse_lstm_gpu_kernel(int32_t backward, int32_t dtype, int32_t precision,
                                                int32_t device_index, int64_t steps, int64_t batch,
                                                int64_t units) {
  const char* name = nullptr;
  twinfuse::guarded([&] {
    TwinfuseContext context{};
    context.device = TWINFUSE_CUDA, context.device_index = device_index;
    context.precision = precision;
    twinfuse::LstmCall op{};
    op.steps = steps, op.batch = batch, op.units = units;
    return twinfuse::gpu::lstm_kernel(op, backward, dtype, context, &name);
  });
  return name;
}
