// Linear + ReLU on the CPU: three problems for the main loop. Equations in twinfuse/linear_relu.h.
#pragma once

#include "cpu/grad_bias.h"
#include "cpu/kernels.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// `m` walked along its columns (inner) row by row (outer), or with `swap` the other way round.
template <class T>
Source<T> source_of(const Matrix& m, bool swap, const Matrix* mask = nullptr,
                    int32_t relu_grad = 0) {
  Source<T> s{static_cast<const T*>(m.data),
              swap ? m.col_stride : m.row_stride,
              swap ? m.row_stride : m.col_stride,
              nullptr,
              0,
              0,
              relu_grad,
              nullptr};
  if (mask) {
    s.mask = static_cast<const T*>(mask->data);
    s.mask_outer = swap ? mask->col_stride : mask->row_stride;
    s.mask_inner = swap ? mask->row_stride : mask->col_stride;
  }
  return s;
}

template <class T>
TwinfuseStatus linear_relu_forward(const LinearReluForward& op, const TwinfuseContext& context) {
  Gemm<T> g{};
  g.rows = op.output.rows, g.cols = op.output.cols, g.depth = op.input.cols;
  g.a_rows_outer = op.input.col_stride == 1 || op.input.row_stride != 1;
  g.a = source_of<T>(op.input, !g.a_rows_outer);
  g.b_cols_outer = op.weight.row_stride != 1;
  g.b = source_of<T>(op.weight, !g.b_cols_outer);
  g.out = static_cast<T*>(op.output.data);
  g.out_row = op.output.row_stride;
  g.bias = static_cast<const T*>(op.bias);
  g.bias_stride = op.bias_stride;
  const Plan<T> plan(g, context);
  return with_scratch(context, plan.bytes(),
                      [&](char* space) { run<T, BiasRelu>(plan, context, space); });
}

template <class T>
Gemm<T> grad_input(const LinearReluBackward& op) {
  const Matrix& grad = op.grad_output;
  Gemm<T> g{};
  g.rows = op.grad_input.rows, g.cols = op.grad_input.cols, g.depth = grad.cols;
  g.a_rows_outer = grad.col_stride == 1 || grad.row_stride != 1;
  g.a = source_of<T>(grad, !g.a_rows_outer, &op.output, op.relu_grad);
  g.b_cols_outer = op.weight.col_stride != 1;
  g.b = source_of<T>(op.weight, g.b_cols_outer);
  g.out = static_cast<T*>(op.grad_input.data);
  g.out_row = op.grad_input.row_stride;
  return g;
}

// The reduced dimension is that of the rows. Whichever of N and K lies densely in grad_weight
// becomes j. `bias_sums`, if given, receives grad_bias [N].
template <class T>
Gemm<T> grad_weight(const LinearReluBackward& op, const PartOfSums<typename Convert<T>::Acc>& part,
                    typename Convert<T>::Acc* bias_sums) {
  const Matrix &w = op.grad_weight, &grad = op.grad_output, &input = op.input;
  bool weight_is_nk = w.col_stride == 1;
  Gemm<T> g{};
  g.depth = grad.rows;
  g.splits = part.depth ? 1 : count_splits<T>(grad.cols, grad.rows);
  g.part = part;
  g.out = static_cast<T*>(w.data);
  if (weight_is_nk) {
    g.rows = w.rows, g.cols = w.cols, g.out_row = w.row_stride;
    g.a_rows_outer = false;
    g.a = source_of<T>(grad, false, &op.output, op.relu_grad);
    g.a_sums = bias_sums;
    g.b_cols_outer = input.col_stride != 1;
    g.b = source_of<T>(input, g.b_cols_outer);
  } else {
    g.rows = w.cols, g.cols = w.rows, g.out_row = w.col_stride;
    g.a_rows_outer = input.col_stride != 1 && input.row_stride == 1;
    g.a = source_of<T>(input, g.a_rows_outer);
    g.b_cols_outer = grad.col_stride != 1;
    g.b = source_of<T>(grad, g.b_cols_outer, &op.output, op.relu_grad);
    g.b_sums = bias_sums;
  }
  return g;
}

// All gradients of one call. The rows may be a `part` of those that the gradients of the weight and
// of the bias are sums over; the latter's wait in `bias_sums` [N].
template <class T>
class LinearBackward {
  using Acc = typename Convert<T>::Acc;

 public:
  LinearBackward(const LinearReluBackward& op, const TwinfuseContext& context,
                 const PartOfSums<Acc>& part = {}, Acc* bias_sums = nullptr)
      : op_(op),
        part_(part),
        bias_sums_(bias_sums),
        input_(op.grad_input.data ? grad_input<T>(op) : Gemm<T>{}, context),
        weight_(
            has_weight() ? grad_weight<T>(op, part, op.grad_bias ? &planned_ : nullptr) : Gemm<T>{},
            context),
        bias_(op.grad_output.rows, n(), part.depth ? 1 : count_splits<T>(n(), op.grad_output.rows),
              false, context) {}

  // One gradient after the other is made in the same scratch.
  int64_t bytes() const {
    const int64_t bytes = max64(input_.bytes(), weight_.bytes());
    return sum_bytes() + (bias_alone() ? max64(bytes, bias_.bytes()) : bytes);
  }

  // `space` holds bytes() and starts on a cache line.
  void run(const TwinfuseContext& context, char* space) {
    Acc* sums = bias_sums_;
    if (sum_bytes()) sums = reinterpret_cast<Acc*>(space);
    space += sum_bytes();
    cpu::TWINFUSE_ISA::run<T, Identity>(input_, context, space);
    if (has_weight()) weight_.g = grad_weight<T>(op_, part_, op_.grad_bias ? sums : nullptr);
    cpu::TWINFUSE_ISA::run<T, Identity>(weight_, context, space);
    if (bias_alone())
      bias_.run(source_of<T>(op_.grad_output, false, &op_.output, op_.relu_grad), context, space,
                !part_.first, sums);
    if (op_.grad_bias && part_.last)
      store_grad_bias<T>(sums, n(), op_.grad_bias, op_.grad_bias_stride);
  }

 private:
  int64_t n() const { return op_.grad_output.cols; }
  int64_t sum_bytes() const {
    return op_.grad_bias && !bias_sums_ ? round_up(n() * sizeof(Acc), 64) : 0;
  }
  bool has_weight() const {
    return op_.grad_weight.data && op_.grad_weight.rows && op_.grad_weight.cols;
  }
  bool bias_alone() const { return op_.grad_bias && !has_weight(); }

  const LinearReluBackward op_;
  const PartOfSums<Acc> part_;
  Acc* const bias_sums_;
  Acc planned_ = 0;  // stands for the sums until there is scratch for them
  const Plan<T> input_;
  Plan<T> weight_;
  const GradBias<T> bias_;
};

template <class T>
TwinfuseStatus linear_relu_backward(const LinearReluBackward& op, const TwinfuseContext& context) {
  LinearBackward<T> backward(op, context);
  return with_scratch(context, backward.bytes(),
                      [&](char* space) { backward.run(context, space); });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
