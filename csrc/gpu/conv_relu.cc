// Conv+ReLU on a GPU.
#include "gpu/box_product.h"
#include "gpu/ops.h"
#include "gpu/serve.h"
#include "gpu/window_product.h"

namespace twinfuse::gpu {
namespace {

// Each group is launched by itself; with more of them the framework's own layers are faster.
constexpr int64_t kMostGroups = 4;

void require_few_groups(const TwinfuseConv& conv) {
  if (conv.groups > kMostGroups)
    throw Unsupported("more than " + std::to_string(kMostGroups) + " groups on a GPU");
}

// The channels (or filters) of one group.
View group(const View& v, int dimension, int64_t index, int64_t groups, Type type) {
  const int64_t size = v.size[dimension] / groups;
  return channels(v, dimension, index * size, size, type);
}

// One tap, and windows that are the image's own pixels: a product of matrices.
bool pointwise(const Windows& rows, const Windows& columns, const View& x) {
  for (const Windows& w : {rows, columns})
    if (w.taps != 1 || w.step != 1 || w.origin != 0) return false;
  return rows.count == x.size[2] && columns.count == x.size[3];
}

bool as_matrices(const Call& call, const WindowProduct& p, Product* product) {
  if (!pointwise(p.rows, p.columns, p.x) || !dense_pixels(p.x) || !dense_pixels(p.out))
    return false;
  const int64_t rows = pixels(p.x), depth = p.x.size[1];
  const Operand a{p.x.data, rows, depth, pixel_stride(p.x), p.x.stride[1]};
  const char* tap = p.weight.data + tap_offset(p) * element_size(call.type);
  const Operand b{tap, p.weight.size[0], depth, p.weight.stride[0], p.weight.stride[1]};
  *product = {a, b, {p.out.data, pixel_stride(p.out), p.out.stride[1]}, p.behind, p.bias};
  return true;
}

bool as_matrices(const Call&, const TapProduct& p, Product* product) {
  if (!pointwise(p.rows, p.columns, p.x) || !dense_pixels(p.x) || !dense_pixels(p.grad))
    return false;
  const int64_t depth = pixels(p.x);
  const Operand a{p.grad.data, p.grad.size[1], depth, p.grad.stride[1], pixel_stride(p.grad)};
  const Operand b{p.x.data, p.x.size[1], depth, p.x.stride[1], pixel_stride(p.x)};
  *product = oriented({a, b, {p.out.data, p.out.stride[0], p.out.stride[1]}});
  return true;
}

double filling_clocks(const Call& call, const View& x) {
  return rearrange_clocks(call, {false, x.size[0], x.size[2] * x.size[3], x.size[1], {}, {}}, true);
}

// Whether to move images, so that boxes can be read, in so many clocks with the product.
bool pays(const Call& call, const Choice& direct, const Choice& boxes, double clocks,
          const Extents& extents) {
  if (!direct.kernel || !boxes.kernel) return boxes.kernel != nullptr;
  return choose(call.device, extents, {{"where_it_lies", direct.clocks}, {"moved", clocks}},
                [&](Problem& problem) {
                  problem.add_role(*direct.first);
                  problem.add_role(*boxes.first);
                }) == 1;
}

// Where boxes cannot be read from where the images lie, it may pay to put their channels side by
// side first.
void compute(const Call& call, const WindowProduct& p) {
  Product product;
  if (as_matrices(call, p, &product)) return run(call, product, plan(call, product));
  const Choice direct = plan(call, p);
  const bool x = !readable(call, p.x), weight = !readable_weight(call, p.weight, p.out);
  const bool movable = (!x || rows_follow(p.x)) && (!weight || rows_follow(p.weight));
  if (in_boxes(direct) || !(x || weight) || !movable) return run(call, p, direct);
  WindowProduct moved = p;
  double clocks = 0;
  if (x) moved.x = beside(p.x), clocks += filling_clocks(call, p.x);
  if (weight) moved.weight = beside(p.weight), clocks += filling_clocks(call, p.weight);
  const Choice boxes = plan_boxes(call, moved);
  clocks += boxes.clocks;
  if (!pays(call, direct, boxes, clocks, extents_of(p))) return run(call, p, direct);
  if (x) moved.x = filled(call, p.x, moved.x);
  if (weight) moved.weight = filled(call, p.weight, moved.weight);
  run(call, moved, boxes);
}

void compute(const Call& call, const TapProduct& p) {
  Product product;
  if (as_matrices(call, p, &product)) return run(call, product, plan(call, product));
  const Choice direct = plan(call, p);
  if (in_boxes(direct) || readable(call, p.x) || !rows_follow(p.x)) return run(call, p, direct);
  TapProduct moved = p;
  moved.x = beside(p.x);
  const Choice boxes = plan_boxes(call, moved);
  const double clocks = boxes.clocks + filling_clocks(call, p.x);
  if (!pays(call, direct, boxes, clocks, extents_of(p))) return run(call, p, direct);
  moved.x = filled(call, p.x, moved.x);
  run(call, moved, boxes);
}

// The weight with inputs for outputs.
View transposed(View weight) {
  std::swap(weight.size[0], weight.size[1]);
  std::swap(weight.stride[0], weight.stride[1]);
  return weight;
}

// The gradient of the input, phase by phase of the stride.
template <class Body>
void each_phase(const View& grad, const View& turned, const View& grad_input,
                const TwinfuseConv& conv, Type type, const Body& body) {
  for (int64_t y = 0; y < std::min(conv.stride[0], grad_input.size[2]); y++) {
    for (int64_t x = 0; x < std::min(conv.stride[1], grad_input.size[3]); x++) {
      const int64_t phase[2] = {y, x};
      Windows windows[2];
      View out = grad_input;
      for (int d = 0; d < 2; d++) {
        windows[d] = transposed_windows(grad_input.size[2 + d], turned.size[2 + d], conv.stride[d],
                                        conv.padding_low[d], conv.dilation[d], phase[d]);
        out.data += phase[d] * out.stride[2 + d] * element_size(type);
        out.size[2 + d] = windows[d].count;
        out.stride[2 + d] *= conv.stride[d];
      }
      body(WindowProduct{grad, turned, windows[0], windows[1], out});
    }
  }
}

}  // namespace

TwinfuseStatus conv_relu_forward(const ConvReluForward& op, const char* name, int32_t dtype,
                                 const TwinfuseContext& context) {
  return serve(name, dtype, context, [&](const Call& call) {
    require_few_groups(op.conv);
    const View input = view(op.input), weight = view(op.weight), output = view(op.output);
    const int64_t groups = op.conv.groups;
    Windows windows[2];
    for (int d = 0; d < 2; d++)
      windows[d] = forward_windows(output.size[2 + d], weight.size[2 + d], op.conv.stride[d],
                                   op.conv.padding_low[d], op.conv.dilation[d]);
    for (int64_t i = 0; i < groups; i++) {
      const View filters = group(weight, 0, i, groups, call.type);
      const char* bias = static_cast<const char*>(op.bias);
      if (bias) bias += i * filters.size[0] * op.bias_stride * element_size(call.type);
      compute(call, WindowProduct{group(input, 1, i, groups, call.type),
                                  filters,
                                  windows[0],
                                  windows[1],
                                  group(output, 1, i, groups, call.type),
                                  Behind::bias_relu,
                                  {bias, op.bias_stride}});
    }
  });
}

TwinfuseStatus conv_relu_backward(const ConvReluBackward& op, const char* name, int32_t dtype,
                                  const TwinfuseContext& context) {
  return serve(name, dtype, context, [&](Call call) {
    require_few_groups(op.conv);
    call.nan_passes = op.relu_grad == TWINFUSE_RELU_GRAD_SELECT;
    const View grad = view(op.grad_output), output = view(op.output);
    const View input = view(op.input), weight = view(op.weight);
    const View grad_input = view(op.grad_input), grad_weight = view(op.grad_weight);
    const int64_t groups = op.conv.groups;
    const bool wants_input = op.grad_input.data != nullptr;
    const bool wants_weight = op.grad_weight.data != nullptr;

    // One pass over the gradient sums it for the bias, and leaves it masked with its channels side
    // by side, as products read it best.
    const bool products = wants_input || wants_weight;
    if (!products && !op.grad_bias) return;
    View masked = beside(grad);
    if (products)
      masked.data = static_cast<char*>(
          call.allocate(masked.size[0] * masked.stride[0] * element_size(call.type)));
    const Vector sums{op.grad_bias, op.grad_bias_stride};
    rearrange(call, pixels_of(grad, &output), masked.data, masked.stride[3],
              op.grad_bias ? &sums : nullptr);
    // All phases of the stride read the same weight, its filters side by side where it is moved.
    View turned = transposed(weight);
    if (wants_input && call.device.has_tensors() && !readable_weight(call, turned, grad_input) &&
        rows_follow(turned))
      turned = filled(call, turned, beside(turned));
    for (int64_t i = 0; i < groups && products; i++) {
      const View g = group(masked, 1, i, groups, call.type);
      if (wants_input) {
        each_phase(g, group(turned, 1, i, groups, call.type),
                   group(grad_input, 1, i, groups, call.type), op.conv, call.type,
                   [&](const WindowProduct& product) { compute(call, product); });
      }
      if (wants_weight) {
        Windows windows[2];
        for (int d = 0; d < 2; d++)
          windows[d] = forward_windows(grad.size[2 + d], grad_weight.size[2 + d], op.conv.stride[d],
                                       op.conv.padding_low[d], op.conv.dilation[d]);
        const TapProduct product{g, group(input, 1, i, groups, call.type), windows[0], windows[1],
                                 group(grad_weight, 0, i, groups, call.type)};
        compute(call, product);
      }
    }
  });
}

}  // namespace twinfuse::gpu
