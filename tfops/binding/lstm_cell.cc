// TensorFlow ops for one step of an LSTM, and its gradient; lstm.h has the equations.
//
//   x, grad_x                  [B, I]
//   kernel, recurrent_kernel   [I, 4H], [H, 4H]   Keras layout: the core takes both transposed
//   bias, peephole, norm       [4H], [3, H], [2, 4H]
//   h, c, h_n, c_n             [B, H]
//   zoneout_hidden, _cell      whatever broadcasts to [B, H]
//   dropout_input, _hidden     whatever broadcasts to [4, B, I], [4, B, H]
//   gates                      [B, 4H], with a norm [B, 12H]: what the gradient needs
//
// Lists of length 0 or 1 are as in lstm.cc.
#include "lstm_args.h"

namespace twinfuse {
namespace {

constexpr const char* kOp = "lstm_cell";

struct CellShapes : LstmShapes {
  ShapeHandle x, state;

  absl::Status Read(InferenceContext* context) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(One(context, "x", 2, &x));
    TF_RETURN_IF_ERROR(LstmShapes::Read(context, context->Dim(x, 1)));
    TF_RETURN_IF_ERROR(context->Merge(units, hidden, &units));
    state = context->Matrix(context->Dim(x, 0), units);
    for (const char* name : {"h", "c"}) {
      TF_RETURN_IF_ERROR(One(context, name, 2, &shape));
      TF_RETURN_IF_ERROR(context->Merge(state, shape, &state));
    }
    x = context->Matrix(context->Dim(state, 0), inputs);
    units = context->Dim(state, 1);
    return absl::OkStatus();
  }
};

absl::Status ForwardShape(InferenceContext* c) {
  CellShapes shapes;
  TF_RETURN_IF_ERROR(shapes.Read(c));
  TF_RETURN_IF_ERROR(shapes.Set(c, "h_n", shapes.state));
  TF_RETURN_IF_ERROR(shapes.Set(c, "c_n", shapes.state));
  return shapes.Set(c, "gates", c->Matrix(c->Dim(shapes.state, 0), shapes.saved_gates));
}

absl::Status BackwardShape(InferenceContext* c) {
  CellShapes shapes;
  TF_RETURN_IF_ERROR(shapes.Read(c));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_x", shapes.x));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_kernel", c->Matrix(shapes.inputs, shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_recurrent_kernel", c->Matrix(shapes.units, shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_bias", c->Vector(shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_peephole", c->Matrix(3, shapes.units)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_norm", c->Matrix(2, shapes.gates)));
  TF_RETURN_IF_ERROR(shapes.Set(c, "grad_h", shapes.state));
  return shapes.Set(c, "grad_c", shapes.state);
}

#define OPERANDS                                       \
  Input("x: T")                                        \
      .Input("kernel: T")                              \
      .Input("recurrent_kernel: T")                    \
      .Input("bias: num_bias * T")                     \
      .Input("peephole: num_peephole * T")             \
      .Input("norm: num_norm * T")                     \
      .Input("h: T")                                   \
      .Input("c: T")                                   \
      .Input("zoneout_hidden: num_zoneout_hidden * T") \
      .Input("zoneout_cell: num_zoneout_cell * T")     \
      .Input("dropout_input: num_dropout_input * T")   \
      .Input("dropout_hidden: num_dropout_hidden * T") \
      .Attr("T: {float, double, bfloat16, half}")      \
      .Attr("num_bias: int >= 0")                      \
      .Attr("num_peephole: int >= 0")                  \
      .Attr("num_norm: int >= 0")                      \
      .Attr("num_zoneout_hidden: int >= 0")            \
      .Attr("num_zoneout_cell: int >= 0")              \
      .Attr("num_dropout_input: int >= 0")             \
      .Attr("num_dropout_hidden: int >= 0")            \
      .Attr("activation: int")                         \
      .Attr("recurrent_activation: int")               \
      .Attr("norm_epsilon: string")

constexpr const char* kOptional[] = {"bias",           "peephole",     "norm",
                                     "zoneout_hidden", "zoneout_cell", "dropout_input",
                                     "dropout_hidden"};

REGISTER_OP("TwinfuseLstmCell")
    .OPERANDS.Output("h_n: T")
    .Output("c_n: T")
    .Output("gates: num_saved * T")
    .Attr("num_saved: int >= 0")
    .SetShapeFn(ForwardShape);

REGISTER_OP("TwinfuseLstmCellGrad")
    .Input("gates: T")
    .Input("grad_h_n: num_grad_h_n * T")
    .Input("grad_c_n: num_grad_c_n * T")
    .OPERANDS.Output("grad_x: num_grad_x * T")
    .Output("grad_kernel: num_grad_kernel * T")
    .Output("grad_recurrent_kernel: num_grad_recurrent_kernel * T")
    .Output("grad_bias: num_grad_bias * T")
    .Output("grad_peephole: num_grad_peephole * T")
    .Output("grad_norm: num_grad_norm * T")
    .Output("grad_h: num_grad_h * T")
    .Output("grad_c: num_grad_c * T")
    .Attr("num_grad_h_n: int >= 0")
    .Attr("num_grad_c_n: int >= 0")
    .Attr("num_grad_x: int >= 0")
    .Attr("num_grad_kernel: int >= 0")
    .Attr("num_grad_recurrent_kernel: int >= 0")
    .Attr("num_grad_bias: int >= 0")
    .Attr("num_grad_peephole: int >= 0")
    .Attr("num_grad_norm: int >= 0")
    .Attr("num_grad_h: int >= 0")
    .Attr("num_grad_c: int >= 0")
    .SetShapeFn(BackwardShape);

#undef OPERANDS

class LstmCellOpKernel : public CoreOpKernel {
 public:
  explicit LstmCellOpKernel(OpKernelConstruction* construction) : CoreOpKernel(construction) {
    OP_REQUIRES_OK(construction, ReadAttributes(construction, kOp, &lstm_));
    OP_REQUIRES_OK(construction, CheckLists(construction, kOp, kOptional));
  }

 protected:
  // The operands of one call as the core takes them. Views live as long as this does.
  struct Call {
    TensorView x, kernel, recurrent, bias, peephole, norm, h, c;
    NoiseViews noise;
    int64_t batch, inputs, gates, saved_gates, units;

    Sizes state() const { return {batch, units}; }
    TwinfuseLstmState initial() { return {h.get(), c.get()}; }
    TwinfuseLstmWeights weights() {
      return {kernel.get(), recurrent.get(), bias.get(), nullptr,
              nullptr,      peephole.get(),  norm.get()};
    }
  };

  const TwinfuseLstm* lstm() const { return &lstm_; }

  // The core checks again; here is what sizes of outputs follow from.
  absl::Status Describe(OpKernelContext* op, Call* call) const {
    const Tensor *x, *kernel, *recurrent, *h, *c, *norm = Optional(op, "norm");
    TF_RETURN_IF_ERROR(op->input("x", &x));
    TF_RETURN_IF_ERROR(op->input("kernel", &kernel));
    TF_RETURN_IF_ERROR(op->input("recurrent_kernel", &recurrent));
    TF_RETURN_IF_ERROR(op->input("h", &h));
    TF_RETURN_IF_ERROR(op->input("c", &c));
    if (x->dims() != 2) return Mismatch(kOp, "x", "[B, I]", x->shape());
    TF_RETURN_IF_ERROR(CheckKernels(kOp, *kernel, *recurrent));
    call->batch = x->dim_size(0);
    call->inputs = x->dim_size(1);
    call->gates = kernel->dim_size(1);
    call->units = call->gates / 4;
    constexpr int order[] = {0, 1};
    TF_RETURN_IF_ERROR(
        call->noise.Set(kOp, op, call->state(), call->state(), order, call->batch, call->inputs));
    call->x = TensorView::Dense(x);
    call->kernel = TensorView::Permuted(kernel, kTransposed);
    call->recurrent = TensorView::Permuted(recurrent, kTransposed);
    call->bias = TensorView::Dense(Optional(op, "bias"));
    call->peephole = TensorView::Dense(Optional(op, "peephole"));
    call->norm = TensorView::Dense(norm);
    call->saved_gates = norm == nullptr ? call->gates : 3 * call->gates;
    call->h = TensorView::Dense(h);
    call->c = TensorView::Dense(c);
    return absl::OkStatus();
  }

 private:
  TwinfuseLstm lstm_{};
};

class LstmCellOp : public LstmCellOpKernel {
 public:
  explicit LstmCellOp(OpKernelConstruction* construction) : LstmCellOpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckLists(construction, kOp, {{"saved"}}));
  }

  void Compute(OpKernelContext* op) override {
    Call call;
    OP_REQUIRES_OK(op, Describe(op, &call));
    Tensor *h_n = nullptr, *c_n = nullptr, *gates = nullptr;
    OP_REQUIRES_OK(op, AllocateWanted(op, "h_n", call.state(), &h_n));
    OP_REQUIRES_OK(op, AllocateWanted(op, "c_n", call.state(), &c_n));
    OP_REQUIRES_OK(op, AllocateWanted(op, "gates", {call.batch, call.saved_gates}, &gates));

    TensorView h = TensorView::Dense(h_n), c = TensorView::Dense(c_n);
    const TwinfuseLstmState initial = call.initial(), last = {h.get(), c.get()};
    const TwinfuseLstmWeights weights = call.weights();
    const TwinfuseLstmNoise noise = call.noise.get();
    CoreCall core(op);
    OP_REQUIRES_OK(op, core.Finish(twinfuse_lstm_cell_forward(&last, TensorView::Dense(gates).get(),
                                                              call.x.get(), &initial, &weights,
                                                              &noise, lstm(), core.context())));
  }
};

class LstmCellGradOp : public LstmCellOpKernel {
 public:
  explicit LstmCellGradOp(OpKernelConstruction* construction) : LstmCellOpKernel(construction) {
    OP_REQUIRES_OK(construction, CheckLists(construction, kOp,
                                            {{"grad_h_n", "grad_c_n", "grad_x", "grad_kernel",
                                              "grad_recurrent_kernel", "grad_bias", "grad_peephole",
                                              "grad_norm", "grad_h", "grad_c"}}));
  }

  void Compute(OpKernelContext* op) override {
    Call call;
    OP_REQUIRES_OK(op, Describe(op, &call));
    const Tensor* gates;
    OP_REQUIRES_OK(op, op->input("gates", &gates));
    Tensor *x = nullptr, *kernel = nullptr, *recurrent = nullptr, *bias = nullptr;
    Tensor *peephole = nullptr, *norm = nullptr, *h = nullptr, *c = nullptr;
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_x", {call.batch, call.inputs}, &x));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_kernel", {call.inputs, call.gates}, &kernel));
    OP_REQUIRES_OK(
        op, AllocateWanted(op, "grad_recurrent_kernel", {call.units, call.gates}, &recurrent));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_bias", {call.gates}, &bias));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_peephole", {3, call.units}, &peephole));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_norm", {2, call.gates}, &norm));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_h", call.state(), &h));
    OP_REQUIRES_OK(op, AllocateWanted(op, "grad_c", call.state(), &c));

    TensorView grad_kernel = TensorView::Permuted(kernel, kTransposed),
               grad_recurrent = TensorView::Permuted(recurrent, kTransposed),
               grad_bias = TensorView::Dense(bias), grad_peephole = TensorView::Dense(peephole),
               grad_norm = TensorView::Dense(norm), grad_h = TensorView::Dense(h),
               grad_c = TensorView::Dense(c), last_h = TensorView::Dense(Optional(op, "grad_h_n")),
               last_c = TensorView::Dense(Optional(op, "grad_c_n"));
    const TwinfuseLstmState initial = call.initial(), grad_initial = {grad_h.get(), grad_c.get()};
    const TwinfuseLstmState grad_last = {last_h.get(), last_c.get()};
    const TwinfuseLstmWeights grad_weights = {
        grad_kernel.get(), grad_recurrent.get(), grad_bias.get(), nullptr,
        nullptr,           grad_peephole.get(),  grad_norm.get()};
    const TwinfuseLstmWeights weights = call.weights();
    const TwinfuseLstmNoise noise = call.noise.get();
    CoreCall core(op);
    OP_REQUIRES_OK(op, core.Finish(twinfuse_lstm_cell_backward(
                           TensorView::Dense(x).get(), &grad_initial, &grad_weights, &grad_last,
                           TensorView::Dense(gates).get(), call.x.get(), &initial, &weights, &noise,
                           lstm(), core.context())));
  }
};

TWINFUSE_REGISTER_KERNELS("TwinfuseLstmCell", LstmCellOp)
TWINFUSE_REGISTER_KERNELS("TwinfuseLstmCellGrad", LstmCellGradOp)

}  // namespace
}  // namespace twinfuse
