#include "gpu/box_product.h"

#include <algorithm>

namespace twinfuse::gpu {
namespace {

constexpr int64_t kMostOfBox = 256;  // of one dimension, with what it steps over

// Of pixels: a tile of an output, or a step of a sum over it; and how many cover the output.
struct Box {
  int64_t images = 0, rows = 0, columns = 0;
  int64_t tiles_n = 0, tiles_y = 0, tiles_x = 0;

  int64_t tiles() const { return tiles_n * tiles_y * tiles_x; }
};

// The box of so many pixels that wastes least of the output. `whole`: it must not reach beyond rows
// and columns. No box: `images` is zero.
Box box_of(int64_t pixels, const View& out, const Windows& rows, const Windows& columns,
           bool whole) {
  Box best;
  for (int64_t h = 1; h <= pixels; h *= 2) {
    for (int64_t w = 1; h * w <= pixels; w *= 2) {
      if (h * rows.step > kMostOfBox || w * columns.step > kMostOfBox) continue;
      if (pixels / (h * w) > kMostOfBox) continue;
      if (whole && (rows.count % h || columns.count % w)) continue;
      Box box{pixels / (h * w), h, w, 0, divide(rows.count, h), divide(columns.count, w)};
      box.tiles_n = divide(out.size[0], box.images);
      const bool better =
          box.tiles() < best.tiles() || (box.tiles() == best.tiles() && box.images < best.images);
      if (!best.images || better) best = box;
    }
  }
  return best;
}

// Sizes and strides in the order of a descriptor, channels last. The strides of dimensions of one
// element mean nothing, but the driver looks at them.
Dense dense(const void* data, const View& v, const int (&order)[4]) {
  Dense t{data, 4, {}, {}, {1, 1, 1, 1}};
  for (int d = 0; d < 4; d++) {
    t.size[d] = v.size[order[d]];
    t.stride[d] = t.size[d] > 1 || d == 3 ? v.stride[order[d]] : kVector;
  }
  if (t.size[3] == 1) t.stride[3] = 1;
  return t;
}

constexpr int kChannelsLast[4] = {0, 2, 3, 1};
constexpr int kDepthLast[4] = {2, 3, 0, 1}, kLinesLast[4] = {2, 3, 1, 0};

Dense boxed(const void* data, const View& v, const Box& box, int64_t step_y = 1,
            int64_t step_x = 1) {
  Dense t = dense(data, v, kChannelsLast);
  const int64_t sizes[4] = {box.images, box.rows, box.columns, 0};
  const int64_t steps[4] = {1, step_y, step_x, 1};
  for (int d = 0; d < 4; d++) {
    t.box[d] = static_cast<int32_t>(sizes[d]);
    t.traversal[d] = static_cast<int32_t>(steps[d]);
  }
  return t;
}

bool by_depth(const View& weight) { return weight.stride[1] == 1 || weight.size[1] == 1; }

Dense taps_of(const View& weight) {
  return by_depth(weight) ? dense(weight.data, weight, kDepthLast)
                          : dense(weight.data, weight, kLinesLast);
}

bool fits(const Call& call, const void* data, const View& v) {
  return encodable(dense(data, v, kChannelsLast), call.type);
}

// Whether kernels can say where a window lies.
bool countable(const Windows& rows, const Windows& columns) {
  return reach(rows) < INT32_MAX && reach(columns) < INT32_MAX;
}

// Kernels decode steps exactly up to here.
bool decodable(int64_t steps, int64_t divisor) {
  return steps < INT32_MAX / std::max<int64_t>(divisor, 1);
}

void add_image(Launch& launch, const View& x, const Windows& rows, const Windows& columns,
               const Box& box) {
  launch.tensor(boxed(x.data, x, box, rows.step, columns.step), Use::factor);
  launch.number(x.size[1]).number(columns.taps).number(box.tiles_y).number(box.tiles_x);
  launch.number(box.images).number(box.rows * rows.step).number(box.columns * columns.step);
  launch.number(rows.origin).number(columns.origin);
  launch.number(rows.dilation).number(columns.dilation);
}

void add_pixels(Launch& launch, const View& v, const Box& box, Use use) {
  launch.tensor(boxed(v.data, v, box), use).number(box.tiles_y).number(box.tiles_x);
  launch.number(box.images).number(box.rows).number(box.columns);
}

void add_planes(Launch& launch, const View& v, const Box& box) {
  launch.pointer(v.data).number(box.tiles_y).number(box.tiles_x);
  launch.number(box.images).number(box.rows).number(box.columns);
  launch.number(v.size[0]).number(v.size[2]).number(v.size[3]);
  launch.number(v.stride[0]).number(v.stride[2]).number(v.stride[3]).number(v.stride[1]);
}

Shape shape_of(const WindowProduct& p, const Kernel& kernel, const Box& box) {
  return {box.tiles() * kernel.tile.m, p.out.size[1], p.rows.taps * p.columns.taps * p.x.size[1]};
}

int64_t steps_of(const WindowProduct& p, const Kernel& kernel) {
  return p.rows.taps * p.columns.taps * divide(p.x.size[1], kernel.tile.k);
}

}  // namespace

bool readable(const Call& call, const View& images) { return fits(call, images.data, images); }

bool readable_weight(const Call& call, const View& weight, const View& out) {
  // Large tiles take float32 along the reduced dimension alone (but on consumers' GPUs), and
  // kernels that write single elements take all types so.
  const bool turned = call.type == Type::fp32 && call.device.architecture() < 120;
  return encodable(taps_of(weight), call.type) &&
         (by_depth(weight) || !(turned || !fits(call, out.data, out)));
}

void add_boxes(const Call& call, const WindowProduct& p, Candidates& found) {
  const bool bias = p.bias.fits_vectors();
  const bool planes = !bias || !fits(call, p.out.data, p.out);  // single elements are written
  const bool steps = p.rows.step <= 8 && p.columns.step <= 8;   // what descriptors can step over
  if (call.shallow(p.rows.taps * p.columns.taps * p.x.size[1]) || !call.device.has_tensors() ||
      !steps || !countable(p.rows, p.columns) || (planes && !small_offsets(p.out, 1)) ||
      !fits(call, p.x.data, p.x) || !readable_weight(call, p.weight, p.out))
    return;
  const bool depth = by_depth(p.weight);
  const Role role{Function::product,
                  Reader::tensor_windows,
                  depth ? Reader::tensor_weight_depth : Reader::tensor_weight_lines,
                  p.behind == Behind::nothing ? Epilogue::identity
                  : planes                    ? Epilogue::strided_bias_relu
                                              : Epilogue::bias_relu,
                  planes ? Writer::box_planes : Writer::tensor_windows,
                  call.type,
                  call.precision,
                  true};
  for (const Kernel* kernel : call.device.find(role)) {
    const Box box = box_of(kernel->tile.m, p.out, p.rows, p.columns, false);
    const int64_t count = steps_of(p, *kernel);
    const int64_t chunks = divide(p.x.size[1], kernel->tile.k);
    if (!box.images || !decodable(count, std::max(chunks, p.columns.taps))) continue;
    Shape shape = shape_of(p, *kernel, box);
    shape.depth = count * kernel->tile.k;
    if (shape.rows > INT32_MAX - 1024) continue;
    found.add(*kernel, shape);
  }
}

Choice plan_boxes(const Call& call, const WindowProduct& p) {
  Candidates found(call.device, extents_of(p));
  add_boxes(call, p, found);
  return found.choose();
}

void run_boxes(const Call& call, const WindowProduct& p, const Kernel& kernel) {
  const Box box = box_of(kernel.tile.m, p.out, p.rows, p.columns, false);
  Launch launch(call.device, kernel);
  add_image(launch, p.x, p.rows, p.columns, box);
  launch.tensor(taps_of(p.weight), Use::factor).number(p.x.size[1]).number(p.columns.taps);
  launch.number(p.rows.first).number(p.columns.first);
  launch.number(p.rows.tap_step).number(p.columns.tap_step);
  if (kernel.role.store == Writer::box_planes)
    add_planes(launch, p.out, box);
  else
    add_pixels(launch, p.out, box, Use::exact);
  add(launch, kernel.role.epilogue, p.bias);
  add_sizes(launch, call, kernel, shape_of(p, kernel, box), steps_of(p, kernel), 1);
}

void add_boxes(const Call& call, const TapProduct& p, Candidates& found) {
  const bool steps = p.rows.step <= 8 && p.columns.step <= 8;
  if (call.shallow(p.grad.size[0] * p.grad.size[2] * p.grad.size[3]) ||
      !call.device.has_tensors() || !steps || !countable(p.rows, p.columns) ||
      !fits(call, p.x.data, p.x) || !fits(call, p.grad.data, p.grad))
    return;
  const Role role{Function::product,   Reader::tensor_pixels,
                  Reader::tensor_taps, Epilogue::identity,
                  Writer::split,       call.type,
                  call.precision,      true};
  for (const Kernel* kernel : call.device.find(role)) {
    const Box box = box_of(kernel->tile.k, p.grad, p.rows, p.columns, true);
    if (!box.images || !decodable(box.tiles(), std::max(box.tiles_y, box.tiles_x))) continue;
    Shape shape = tap_shape(p, *kernel);
    shape.depth = box.tiles() * kernel->tile.k;
    found.add(*kernel, shape);
  }
}

Choice plan_boxes(const Call& call, const TapProduct& p) {
  Candidates found(call.device, extents_of(p));
  add_boxes(call, p, found);
  return found.choose();
}

void run_boxes(const Call& call, const TapProduct& p, const Choice& choice, void* parts) {
  const Kernel& kernel = *choice.kernel;
  const Box box = box_of(kernel.tile.k, p.grad, p.rows, p.columns, true);
  Launch launch(call.device, kernel);
  add_pixels(launch, p.grad, box, Use::factor);
  add_image(launch, p.x, p.rows, p.columns, box);
  launch.pointer(parts);
  add_sizes(launch, call, kernel, tap_shape(p, kernel), box.tiles(), choice.splits);
}

}  // namespace twinfuse::gpu
