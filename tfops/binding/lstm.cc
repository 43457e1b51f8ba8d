// TensorFlow ops for one LSTM layer in one direction, and its gradient; lstm.h has the equations.
//
//   x, grad_x                  [B, T, I]     time_major: [T, B, I], and so all that has steps
//   kernel, recurrent_kernel   [I, 4H], [R, 4H]   Keras layout: the core takes both transposed
//   bias, projection, peephole [4H], [H, R], [3, H]
//   norm                       [2, 4H]       of kernel and recurrent kernel
//   h, h_n, c, c_n             [B, R], [B, H]
//   mask                       [B, T]        false where a sequence skips a step
//   zoneout_hidden, _cell      whatever broadcasts to [B, T, R], [B, T, H]
//   dropout_input, _hidden     whatever broadcasts to [4, B, I], [4, B, R]
//   outputs                    [B, T, R]     by time, also with go_backwards
//   gates, cells, hidden       [B * T, 4H], [B * T, H], [B * T, R]: what the gradient needs
//
// With a norm `gates` are [B * T, 12H]. Optional tensors are lists of length 0 or 1. In a graph
// `gates`, `cells` and `hidden` are outputs always, and computed where something reads them, which
// is where a gradient is taken; in eager calls the length of these lists decides. `h`, `c` and
// `bias` go into the gradient for the sake of the gradient of that.
#include <limits>
#include <utility>

#include "lstm_args.h"

namespace twinfuse {
namespace {

constexpr const char* kOp = "lstm";

struct LayerShapes : LstmShapes {
  ShapeHandle x, outputs, h, c;
  DimensionHandle steps, batch;

  absl::Status Read(InferenceContext* context) {
    bool time_major;
    TF_RETURN_IF_ERROR(context->GetAttr("time_major", &time_major));
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(One(context, "x", 3, &x));
    TF_RETURN_IF_ERROR(LstmShapes::Read(context, context->Dim(x, 2)));
    int projections;
    TF_RETURN_IF_ERROR(context->GetAttr("num_projection", &projections));
    TF_RETURN_IF_ERROR(One(context, "projection", 2, &shape));
    TF_RETURN_IF_ERROR(context->Merge(units, context->Dim(shape, 0), &units));
    TF_RETURN_IF_ERROR(context->Merge(hidden, context->Dim(shape, 1), &hidden));
    if (projections == 0) {
      TF_RETURN_IF_ERROR(context->Merge(hidden, units, &hidden));
      units = hidden;
    }
    steps = context->Dim(x, time_major ? 0 : 1);
    batch = context->Dim(x, time_major ? 1 : 0);
    TF_RETURN_IF_ERROR(One(context, "mask", 2, &shape));
    TF_RETURN_IF_ERROR(context->Merge(steps, context->Dim(shape, time_major ? 0 : 1), &steps));
    TF_RETURN_IF_ERROR(context->Merge(batch, context->Dim(shape, time_major ? 1 : 0), &batch));
    for (const auto& [name, size] : {std::pair("h", hidden), std::pair("c", units)}) {
      TF_RETURN_IF_ERROR(One(context, name, 2, &shape));
      TF_RETURN_IF_ERROR(context->Merge(shape, context->Matrix(batch, size), &shape));
      batch = context->Dim(shape, 0);
    }
    const DimensionHandle first = time_major ? steps : batch, second = time_major ? batch : steps;
    x = context->MakeShape({first, second, inputs});
    outputs = context->MakeShape({first, second, hidden});
    h = context->Matrix(batch, hidden);
    c = context->Matrix(batch, units);
    return absl::OkStatus();
  }
};

absl::Status ForwardShape(InferenceContext* c) {
  LayerShapes shapes;
  TF_RETURN_IF_ERROR(shapes.Read(c));
  DimensionHandle rows;
  TF_RETURN_IF_ERROR(c->Multiply(shapes.steps, shapes.batch, &rows));
  TF_RETURN_IF_ERROR(shapes.Set(c, "outputs", shapes.outputs));
  TF_RETURN_IF_ERROR(shapes.Set(c, "h_n", shapes.h));
  TF_RETURN_IF_ERROR(shapes.Set(c, "c_n", shapes.c));
  TF_RETURN_IF_ERROR(shapes.Set(c, "gates", c->Matrix(rows, shapes.saved_gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "cells", c->Matrix(rows, shapes.units)));
  return shapes.Set(c, "hidden", c->Matrix(rows, shapes.hidden));
}

absl::Status BackwardShape(InferenceContext* c) {
  LayerShapes shapes;
  TF_RETURN_IF_ERROR(shapes.Read(c));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_x", shapes.x));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_kernel", c->Matrix(shapes.inputs, shapes.gates)));
  TF_RETURN_IF_ERROR(
      shapes.Set(c, "grad_recurrent_kernel", c->Matrix(shapes.hidden, shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_bias", c->Vector(shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_projection", c->Matrix(shapes.units, shapes.hidden)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_peephole", c->Matrix(3, shapes.units)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_norm", c->Matrix(2, shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_h", shapes.h));
  return shapes.Set(c, "grad_c", shapes.c);
}

#define OPERANDS                                       \
  Input("x: T")                                        \
      .Input("kernel: T")                              \
      .Input("recurrent_kernel: T")                    \
      .Input("bias: num_bias * T")                     \
      .Input("projection: num_projection * T")         \
      .Input("peephole: num_peephole * T")             \
      .Input("norm: num_norm * T")                     \
      .Input("h: num_h * T")                           \
      .Input("c: num_c * T")                           \
      .Input("mask: num_mask * bool")                  \
      .Input("zoneout_hidden: num_zoneout_hidden * T") \
      .Input("zoneout_cell: num_zoneout_cell * T")     \
      .Input("dropout_input: num_dropout_input * T")   \
      .Input("dropout_hidden: num_dropout_hidden * T") \
      .Attr("T: {float, double, bfloat16, half}")      \
      .Attr("num_bias: int >= 0")                      \
      .Attr("num_projection: int >= 0")                \
      .Attr("num_peephole: int >= 0")                  \
      .Attr("num_norm: int >= 0")                      \
      .Attr("num_h: int >= 0")                         \
      .Attr("num_c: int >= 0")                         \
      .Attr("num_mask: int >= 0")                      \
      .Attr("num_zoneout_hidden: int >= 0")            \
      .Attr("num_zoneout_cell: int >= 0")              \
      .Attr("num_dropout_input: int >= 0")             \
      .Attr("num_dropout_hidden: int >= 0")            \
      .Attr("activation: int")                         \
      .Attr("recurrent_activation: int")               \
      .Attr("norm_epsilon: string")                    \
      .Attr("go_backwards: bool")                      \
      .Attr("time_major: bool")                        \
      .Attr("zero_output_for_mask: bool")

constexpr const char* kOptional[] = {
    "bias",           "projection",   "peephole",      "norm",          "h", "c", "mask",
    "zoneout_hidden", "zoneout_cell", "dropout_input", "dropout_hidden"};

REGISTER_OP("TwinfuseLstm")
    .OPERANDS.Output("outputs: num_outputs * T")
    .Output("h_n: T")
    .Output("c_n: T")
    .Output("gates: num_saved * T")
    .Output("cells: num_saved * T")
    .Output("hidden: num_saved * T")
    .Attr("num_outputs: int >= 0")
    .Attr("num_saved: int >= 0")
    .SetShapeFn(ForwardShape);

REGISTER_OP("TwinfuseLstmGrad")
    .Input("gates: T")
    .Input("cells: T")
    .Input("hidden: T")
    .Input("grad_outputs: num_grad_outputs * T")
    .Input("grad_h_n: num_grad_h_n * T")
    .Input("grad_c_n: num_grad_c_n * T")
    .OPERANDS.Output("grad_x: num_grad_x * T")
    .Output("grad_kernel: num_grad_kernel * T")
    .Output("grad_recurrent_kernel: num_grad_recurrent_kernel * T")
    .Output("grad_bias: num_grad_bias * T")
    .Output("grad_projection: num_grad_projection * T")
    .Output("grad_peephole: num_grad_peephole * T")
    .Output("grad_norm: num_grad_norm * T")
    .Output("grad_h: num_grad_h * T")
    .Output("grad_c: num_grad_c * T")
    .Attr("num_grad_outputs: int >= 0")
    .Attr("num_grad_h_n: int >= 0")
    .Attr("num_grad_c_n: int >= 0")
    .Attr("num_grad_x: int >= 0")
    .Attr("num_grad_kernel: int >= 0")
    .Attr("num_grad_recurrent_kernel: int >= 0")
    .Attr("num_grad_bias: int >= 0")
    .Attr("num_grad_projection: int >= 0")
    .Attr("num_grad_peephole: int >= 0")
    .Attr("num_grad_norm: int >= 0")
    .Attr("num_grad_h: int >= 0")
    .Attr("num_grad_c: int >= 0")
    .SetShapeFn(BackwardShape);

#undef OPERANDS

constexpr int kBatchMajor[] = {1, 0, 2}, kTimeMajor[] = {0, 1, 2};

class LstmOpKernel : public CoreOpKernel {
 public:
  explicit LstmOpKernel(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    OP_REQUIRES_OK(construction, ReadAttributes(construction, kOp, &attributes_));
    bool go_backwards, time_major, zero_output;
    OP_REQUIRES_OK(construction, construction->GetAttr("go_backwards", &go_backwards));
    OP_REQUIRES_OK(construction, construction->GetAttr("time_major", &time_major));
    OP_REQUIRES_OK(construction, construction->GetAttr("zero_output_for_mask", &zero_output));
    attributes_.reverse = go_backwards;
    attributes_.batch_major = !time_major;
    attributes_.zero_masked_output = zero_output;
    OP_REQUIRES_OK(construction, CheckLists(construction, kOp, kOptional));
  }

 protected:
  // The operands of one call as the core takes them. Views live as long as this does.
  struct Call {
    TwinfuseLstm lstm;
    TensorView x, kernel, recurrent, bias, projection, peephole, norm, h, c;
    NoiseViews noise;
    Sizes of_x, of_outputs, of_h, of_c;
    int64_t rows, gates, saved_gates, units, hidden;

    TwinfuseLstmState initial() { return {h.get(), c.get()}; }
    TwinfuseLstmWeights weights() {
      return {kernel.get(),     recurrent.get(), bias.get(), nullptr,
              projection.get(), peephole.get(),  norm.get()};
    }
  };

  bool time_major() const { return !attributes_.batch_major; }
  absl::Span<const int> order() const { return time_major() ? kTimeMajor : kBatchMajor; }
  // Of a tensor with steps.
  TensorView Sequence(const Tensor* tensor) const { return TensorView::Permuted(tensor, order()); }

  // The core checks again; here is what sizes of outputs follow from.
  absl::Status Describe(OpKernelContext* op, Call* call) const {
    const Tensor *x, *kernel, *recurrent;
    TF_RETURN_IF_ERROR(op->input("x", &x));
    TF_RETURN_IF_ERROR(op->input("kernel", &kernel));
    TF_RETURN_IF_ERROR(op->input("recurrent_kernel", &recurrent));
    if (x->dims() != 3) {
      return Mismatch(kOp, "x", time_major() ? "[T, B, I]" : "[B, T, I]", x->shape());
    }
    TF_RETURN_IF_ERROR(CheckKernels(kOp, *kernel, *recurrent));
    const int64_t steps = x->dim_size(time_major() ? 0 : 1);
    const int64_t batch = x->dim_size(time_major() ? 1 : 0);
    call->gates = kernel->dim_size(1);
    call->units = call->gates / 4;
    call->hidden = recurrent->dim_size(0);
    if (batch != 0 && steps > std::numeric_limits<int64_t>::max() / batch) {
      return Mismatch(kOp, "x", "fewer steps", x->shape());
    }
    call->rows = steps * batch;
    call->of_x = {x->dim_size(0), x->dim_size(1), x->dim_size(2)};
    call->of_outputs = {x->dim_size(0), x->dim_size(1), call->hidden};
    call->of_h = {batch, call->hidden};
    call->of_c = {batch, call->units};

    const Tensor *projection = Optional(op, "projection"), *norm = Optional(op, "norm");
    if (projection != nullptr && projection->dims() != 2) {
      return Mismatch(kOp, "projection", Text({call->units, call->hidden}), projection->shape());
    }
    call->x = Sequence(x);
    call->kernel = TensorView::Permuted(kernel, kTransposed);
    call->recurrent = TensorView::Permuted(recurrent, kTransposed);
    call->bias = TensorView::Dense(Optional(op, "bias"));
    call->projection = TensorView::Permuted(projection, kTransposed);
    call->peephole = TensorView::Dense(Optional(op, "peephole"));
    call->norm = TensorView::Dense(norm);
    call->saved_gates = norm == nullptr ? call->gates : 3 * call->gates;
    call->h = TensorView::Dense(Optional(op, "h"));
    call->c = TensorView::Dense(Optional(op, "c"));
    const int64_t of_cells[] = {x->dim_size(0), x->dim_size(1), call->units};
    TF_RETURN_IF_ERROR(
        call->noise.Set(kOp, op, call->of_outputs, of_cells, order(), batch, x->dim_size(2)));

    call->lstm = attributes_;
    call->lstm.steps = steps;
    const Tensor* mask = Optional(op, "mask");
    if (mask == nullptr) return absl::OkStatus();
    const int64_t flags[] = {x->dim_size(0), x->dim_size(1)};
    if (!Fits(*mask, flags)) return Mismatch(kOp, "mask", Text(flags), mask->shape());
    call->lstm.mask = static_cast<const uint8_t*>(mask->data());
    call->lstm.mask_stride[0] = time_major() ? batch : 1;
    call->lstm.mask_stride[1] = time_major() ? 1 : steps;
    return absl::OkStatus();
  }

 private:
  TwinfuseLstm attributes_{};
};

class LstmOp : public LstmOpKernel {
 public:
  explicit LstmOp(OpKernelConstruction* construction) : LstmOpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckLists(construction, kOp, {{"outputs", "saved"}}));
  }

  void Compute(OpKernelContext* op) override {
    Call call;
    OP_REQUIRES_OK(op, Describe(op, &call));
    Tensor *outputs = nullptr, *h_n = nullptr, *c_n = nullptr;
    Tensor *gates = nullptr, *cells = nullptr, *hidden = nullptr;
    OP_REQUIRES_OK(op, AllocateWanted(op, "outputs", call.of_outputs, &outputs));
    OP_REQUIRES_OK(op, AllocateWanted(op, "h_n", call.of_h, &h_n));
    OP_REQUIRES_OK(op, AllocateWanted(op, "c_n", call.of_c, &c_n));
    if (Wanted(op, "gates") || Wanted(op, "cells") || Wanted(op, "hidden")) {
      OP_REQUIRES_OK(op, Allocate(op, "gates", {call.rows, call.saved_gates}, &gates));
      OP_REQUIRES_OK(op, Allocate(op, "cells", {call.rows, call.units}, &cells));
      OP_REQUIRES_OK(op, Allocate(op, "hidden", {call.rows, call.hidden}, &hidden));
    }

    TensorView sequence = Sequence(outputs), last_h = TensorView::Dense(h_n),
               last_c = TensorView::Dense(c_n), saved_gates = TensorView::Dense(gates),
               saved_cells = TensorView::Dense(cells), saved_hidden = TensorView::Dense(hidden);
    const TwinfuseLstmState initial = call.initial(), last = {last_h.get(), last_c.get()};
    const TwinfuseLstmSaved saved = {saved_gates.get(), saved_cells.get(), saved_hidden.get()};
    const TwinfuseLstmWeights weights = call.weights();
    const TwinfuseLstmNoise noise = call.noise.get();
    CoreCall core(op);
    OP_REQUIRES_OK(
        op, core.Finish(twinfuse_lstm_forward(sequence.get(), &last, &saved, call.x.get(), &initial,
                                              &weights, &noise, &call.lstm, core.context())));
  }
};

class LstmGradOp : public LstmOpKernel {
 public:
  explicit LstmGradOp(OpKernelConstruction* construction) : LstmOpKernel(construction) {
    OP_REQUIRES_OK(construction,
                   CheckLists(construction, kOp,
                              {{"grad_outputs", "grad_h_n", "grad_c_n", "grad_x", "grad_kernel",
                                "grad_recurrent_kernel", "grad_bias", "grad_projection",
                                "grad_peephole", "grad_norm", "grad_h", "grad_c"}}));
  }

  void Compute(OpKernelContext* op) override {
    Call call;
    OP_REQUIRES_OK(op, Describe(op, &call));
    const Tensor *gates, *cells, *hidden, *grad_outputs = Optional(op, "grad_outputs");
    OP_REQUIRES_OK(op, op->input("gates", &gates));
    OP_REQUIRES_OK(op, op->input("cells", &cells));
    OP_REQUIRES_OK(op, op->input("hidden", &hidden));
    OP_REQUIRES(op, !grad_outputs || Fits(*grad_outputs, call.of_outputs),
                Mismatch(kOp, "grad_outputs", Text(call.of_outputs), grad_outputs->shape()));

    Tensor *x = nullptr, *kernel = nullptr, *recurrent = nullptr, *bias = nullptr;
    Tensor *projection = nullptr, *peephole = nullptr, *norm = nullptr, *h = nullptr, *c = nullptr;
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_x", call.of_x, &x));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_kernel", {call.of_x[2], call.gates}, &kernel));
    OP_REQUIRES_OK(
        op, AllocateWanted(op, "grad_recurrent_kernel", {call.hidden, call.gates}, &recurrent));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_bias", {call.gates}, &bias));
    OP_REQUIRES_OK(op,
                   AllocateWanted(op, "grad_projection", {call.units, call.hidden}, &projection));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_peephole", {3, call.units}, &peephole));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_norm", {2, call.gates}, &norm));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_h", call.of_h, &h));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_c", call.of_c, &c));

    TensorView grad_x = Sequence(x), grad_kernel = TensorView::Permuted(kernel, kTransposed),
               grad_recurrent = TensorView::Permuted(recurrent, kTransposed),
               grad_bias = TensorView::Dense(bias),
               grad_projection = TensorView::Permuted(projection, kTransposed),
               grad_peephole = TensorView::Dense(peephole), grad_norm = TensorView::Dense(norm),
               grad_h = TensorView::Dense(h), grad_c = TensorView::Dense(c),
               sequence = Sequence(grad_outputs),
               last_h = TensorView::Dense(Optional(op, "grad_h_n")),
               last_c = TensorView::Dense(Optional(op, "grad_c_n")),
               saved_gates = TensorView::Dense(gates), saved_cells = TensorView::Dense(cells),
               saved_hidden = TensorView::Dense(hidden);
    const TwinfuseLstmState grad_initial = {grad_h.get(), grad_c.get()};
    const TwinfuseLstmState grad_last = {last_h.get(), last_c.get()};
    const TwinfuseLstmSaved saved = {saved_gates.get(), saved_cells.get(), saved_hidden.get()};
    const TwinfuseLstmWeights grad_weights = {
        grad_kernel.get(),     grad_recurrent.get(), grad_bias.get(), nullptr,
        grad_projection.get(), grad_peephole.get(),  grad_norm.get()};
    const TwinfuseLstmWeights weights = call.weights();
    const TwinfuseLstmNoise noise = call.noise.get();
    CoreCall core(op);
    OP_REQUIRES_OK(op, core.Finish(twinfuse_lstm_backward(
                           grad_x.get(), &grad_initial, &grad_weights, sequence.get(), &grad_last,
                           &saved, call.x.get(), &weights, &noise, &call.lstm, core.context())));
  }
};

TWINFUSE_REGISTER_KERNELS("TwinfuseLstm", LstmOp)
TWINFUSE_REGISTER_KERNELS("TwinfuseLstmGrad", LstmGradOp)

}  // namespace
}  // namespace twinfuse
