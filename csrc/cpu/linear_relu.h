// Linear + ReLU on the CPU: three problems for the main loop. Equations in twinfuse/linear_relu.h.
#pragma once

#include "cpu/gemm.h"
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
              relu_grad};
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
Gemm<T> grad_weight(const LinearReluBackward& op, typename Convert<T>::Acc* bias_sums) {
  const Matrix &w = op.grad_weight, &grad = op.grad_output, &input = op.input;
  bool weight_is_nk = w.col_stride == 1;
  Gemm<T> g{};
  g.depth = grad.rows;
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

// grad_bias alone, in the order that grad_weight would have summed it.
template <class T>
struct GradBias {
  using E = Engine<T>;
  static constexpr int64_t kColumns = 64;
  const LinearReluBackward& op;
  const int64_t rows = op.grad_output.rows, cols = op.grad_output.cols;
  const int64_t pieces = ceil_div(cols, kColumns);
  const int64_t workers;
  const int64_t worker_bytes =
      kColumns * steps_of<T>(min64(max64(rows, 1), E::kBlock)) * sizeof(typename E::Unit);

  GradBias(const LinearReluBackward& op, const TwinfuseContext& context)
      : op(op), workers(min64(max64(context.num_threads, 1), pieces)) {}

  int64_t bytes() const { return workers * worker_bytes; }

  void run(const TwinfuseContext& context, char* space, typename E::Acc* sums) const {
    const Source<T> grad = source_of<T>(op.grad_output, false, &op.output, op.relu_grad);
    parallel_for(context, workers, [&](int64_t worker) {
      auto* packed = reinterpret_cast<typename E::Unit*>(space + worker * worker_bytes);
      for (int64_t j = worker * kColumns; j < cols; j += workers * kColumns) {
        const int64_t n = min64(kColumns, cols - j);
        for (int64_t r = 0; r == 0 || r < rows; r += E::kBlock) {
          const int64_t depth = min64(rows - r, E::kBlock);
          pack_steps(grad, r, depth, j, n, kColumns, packed, kColumns);
          add_sums<T>(packed, kColumns, steps_of<T>(depth), n, r == 0, sums + j);
        }
      }
    });
  }
};

template <class T>
TwinfuseStatus linear_relu_backward(const LinearReluBackward& op, const TwinfuseContext& context) {
  using Acc = typename Convert<T>::Acc;
  const int64_t n = op.grad_output.cols;
  const int64_t sum_bytes = op.grad_bias ? round_up(n * sizeof(Acc), 64) : 0;
  const bool has_weight = op.grad_weight.data && op.grad_weight.rows && op.grad_weight.cols;
  const GradBias<T> bias(op, context);
  const bool bias_alone = op.grad_bias && !has_weight;
  Gemm<T> for_input{}, for_weight{};
  if (op.grad_input.data) for_input = grad_input<T>(op);
  if (has_weight) for_weight = grad_weight<T>(op, nullptr);
  const Plan<T> input_plan(for_input, context);
  Plan<T> weight_plan(for_weight, context);
  // One after the other in the same scratch.
  int64_t bytes = max64(input_plan.bytes(), weight_plan.bytes());
  if (bias_alone) bytes = max64(bytes, bias.bytes());
  return with_scratch(context, sum_bytes + bytes, [&](char* space) {
    Acc* sums = op.grad_bias ? reinterpret_cast<Acc*>(space) : nullptr;
    space += sum_bytes;
    run<T, Identity>(input_plan, context, space);
    if (has_weight) weight_plan.g = grad_weight<T>(op, sums);
    run<T, Identity>(weight_plan, context, space);
    if (bias_alone) bias.run(context, space, sums);
    if (!op.grad_bias) return;
    DefaultFloatMode mode;
    T* out = static_cast<T*>(op.grad_bias);
    for (int64_t j = 0; j < n; j++)
      Convert<T>::store(out + j * op.grad_bias_stride, Simd<Acc>::load(sums + j, 1), 1);
  });
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
