// Linear+ReLU on a GPU.
#include "gpu/ops.h"
#include "gpu/serve.h"
#include "gpu/tuning.h"

namespace twinfuse::gpu {
namespace {

constexpr const char* kOp = "linear_relu";

}  // namespace

TwinfuseStatus linear_relu_forward(const LinearReluForward& op, int32_t dtype,
                                   const TwinfuseContext& context) {
  return serve(kOp, dtype, context, [&](const Call& call) {
    const Product product{operand(op.input),
                          operand(op.weight),
                          result(op.output),
                          Behind::bias_relu,
                          {op.bias, op.bias_stride}};
    run(call, product, plan(call, product));
  });
}

TwinfuseStatus linear_relu_backward(const LinearReluBackward& op, int32_t dtype,
                                    const TwinfuseContext& context) {
  return serve(kOp, dtype, context, [&](Call call) {
    call.nan_passes = op.relu_grad == TWINFUSE_RELU_GRAD_SELECT;
    const Matrix& g = op.grad_output;
    const Matrix& y = op.output;
    const Pixels gradient{true,
                          1,
                          g.rows,
                          g.cols,
                          {g.data, 0, g.row_stride, g.col_stride},
                          {y.data, 0, y.row_stride, y.col_stride}};
    Operand masked = operand(g);
    masked.mask = y.data;
    masked.mask_line = y.row_stride;
    masked.mask_step = y.col_stride;

    const auto input_gradient = [&](const Operand& grad) {
      return Product{grad, transposed(operand(op.weight)), result(op.grad_input)};
    };
    const auto weight_gradient = [&](const Operand& grad) {
      return oriented({transposed(grad), transposed(operand(op.input)), result(op.grad_weight)});
    };
    const bool input = op.grad_input.data && op.grad_input.rows && op.grad_input.cols;
    const bool weight = op.grad_weight.data && op.grad_weight.rows && op.grad_weight.cols;

    // Either the gradient is masked once and written for plain products, or where it is read.
    const int64_t pitch = divide(g.cols, kVector) * kVector;
    alignas(128) static char somewhere;  // plans look at alignment alone
    Operand written{&somewhere, g.rows, g.cols, pitch, 1};
    struct Plans {
      Choice input, weight;
      double clocks = 0;
      bool complete = true;
    };
    const auto plans = [&](const Operand& grad) {
      Plans found;
      if (input) found.input = plan(call, input_gradient(grad));
      if (weight) found.weight = plan(call, weight_gradient(grad));
      for (const auto& [wanted, choice] : {std::pair{input, found.input}, {weight, found.weight}}) {
        if (!wanted) continue;
        found.complete &= choice.kernel != nullptr;
        found.clocks += choice.clocks;
      }
      return found;
    };
    Plans chosen = plans(masked);
    Operand grad = masked;
    const bool sums = op.grad_bias != nullptr;
    if (input || weight) {
      const Plans plain = plans(written);
      const double read = sums ? rearrange_clocks(call, gradient, false) : 0;
      const auto describe = [&](Problem& problem) {
        for (const Plans& both : {chosen, plain})
          for (const Choice& choice : {both.input, both.weight})
            if (choice.first) problem.add_role(*choice.first);
        for (const auto& [wanted, name] :
             {std::pair{input, "input"}, {weight, "weight"}, {sums, "bias"}})
          if (wanted) problem.add_label(name);
      };
      const double once = plain.clocks + rearrange_clocks(call, gradient, true);
      if (plain.complete &&
          (!chosen.complete ||
           choose(call.device, {g.rows, g.cols, input ? op.weight.cols : op.input.cols},
                  {{"masked_where_read", chosen.clocks + read}, {"masked_once", once}},
                  describe) == 1)) {
        chosen = plain;
        written.data = call.allocate(g.rows * pitch * element_size(call.type));
        grad = written;
      }
    }
    const Vector bias{op.grad_bias, op.grad_bias_stride};
    const bool writes = grad.data == written.data;
    if (writes || sums)
      rearrange(call, gradient, writes ? const_cast<void*>(written.data) : nullptr, pitch,
                sums ? &bias : nullptr);
    if (input) run(call, input_gradient(grad), chosen.input);
    if (weight) run(call, weight_gradient(grad), chosen.weight);
  });
}

}  // namespace twinfuse::gpu
