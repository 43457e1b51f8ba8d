#include "gpu/window_product.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "gpu/box_product.h"

namespace twinfuse::gpu {
namespace {

bool vector_strides(const View& v) {
  return v.stride[1] == 1 && aligned(v.data) && v.stride[0] % kVector == 0 &&
         v.stride[2] % kVector == 0 && v.stride[3] % kVector == 0;
}

constexpr const char* kLargeOffsets = "GPU kernels find elements of an image by offsets of 32 bits";

bool small(const View& x, const View& weight, const View& out, const Windows& rows,
           const Windows& columns) {
  return small_offsets(x, 1, reach(rows), reach(columns)) && small_offsets(weight, 0) &&
         small_offsets(out, 1);
}

void require_small(const View& x, const View& weight, const View& out, const Windows& rows,
                   const Windows& columns) {
  if (!small(x, weight, out, rows, columns)) throw Unsupported(kLargeOffsets);
}

void add_image(Launch& launch, const View& x, const Windows& rows, const Windows& columns) {
  launch.pointer(x.data).number(x.size[1]).number(x.size[2]).number(x.size[3]);
  launch.number(rows.count).number(columns.count).number(columns.taps);
  launch.number(rows.step).number(columns.step).number(rows.origin).number(columns.origin);
  launch.number(rows.dilation).number(columns.dilation);
  launch.number(x.stride[0]).number(x.stride[2]).number(x.stride[3]);
}

void add_pixels(Launch& launch, const View& v) {
  launch.pointer(v.data).number(v.size[2]).number(v.size[3]);
  launch.number(v.stride[0]).number(v.stride[2]).number(v.stride[3]);
}

bool flat(const Kernel& kernel) { return kernel.role.a == Reader::flat; }

}  // namespace

bool small_offsets(const View& v, int from, int64_t rows, int64_t columns) {
  const int64_t room[4] = {0, 0, rows, columns};
  __int128 most = 0;
  for (int d = from; d < 4; d++) most += __int128{v.size[d] + room[d]} * std::llabs(v.stride[d]);
  return most < INT32_MAX;
}

int64_t reach(const Windows& w) {
  return std::llabs(w.origin) + w.count * w.step + w.taps * w.dilation;
}

int64_t pixels(const View& v) { return v.size[0] * v.size[2] * v.size[3]; }

int64_t pixel_stride(const View& v) {
  if (v.size[3] > 1) return v.stride[3];
  return v.size[2] > 1 ? v.stride[2] : v.stride[0];
}

bool dense_pixels(const View& v) {
  const int64_t in_image = v.size[2] * v.size[3];
  return rows_follow(v) &&
         (v.size[0] <= 1 || in_image <= 1 || v.stride[0] == in_image * pixel_stride(v));
}

bool rows_follow(const View& v) {
  return v.size[2] <= 1 || v.size[3] <= 1 || v.stride[2] == v.size[3] * v.stride[3];
}

Windows forward_windows(int64_t count, int64_t taps, int64_t stride, int64_t low,
                        int64_t dilation) {
  return {count, stride, -low, taps, dilation};
}

Windows transposed_windows(int64_t size, int64_t taps, int64_t stride, int64_t low,
                           int64_t dilation, int64_t phase) {
  const int64_t tap_step = stride / std::gcd(stride, dilation);
  const int64_t at = phase + low;
  Windows w{divide(size - phase, stride), 1, 0, 0, tap_step * dilation / stride, 0, -tap_step};
  int64_t first = 0;
  while (first < std::min(taps, tap_step) && (at - first * dilation) % stride != 0) first++;
  if (first == std::min(taps, tap_step)) return w;
  w.taps = (taps - 1 - first) / tap_step + 1;
  w.first = first + (w.taps - 1) * tap_step;
  w.origin = (at - w.first * dilation) / stride;
  return w;
}

View view(const Images& images) {
  View v{static_cast<char*>(images.data), {}, {}};
  std::copy_n(images.size, 4, v.size);
  std::copy_n(images.stride, 4, v.stride);
  return v;
}

View channels(View v, int dimension, int64_t first, int64_t count, Type type) {
  if (v.data) v.data += first * v.stride[dimension] * element_size(type);
  v.size[dimension] = count;
  return v;
}

bool in_boxes(const Choice& choice) {
  if (!choice.kernel) return false;
  const Reader reader = choice.kernel->role.a;
  return reader >= Reader::tensor_windows && reader <= Reader::tensor_pixels;
}

Extents extents_of(const WindowProduct& p) {
  return {p.x.size[0], p.rows.count, p.columns.count, p.out.size[1],
          p.x.size[1], p.rows.taps,  p.columns.taps,  p.rows.step};
}

Extents extents_of(const TapProduct& p) {
  return {p.x.size[0], p.rows.count, p.columns.count, p.grad.size[1],
          p.x.size[1], p.rows.taps,  p.columns.taps,  p.rows.step};
}

Choice plan(const Call& call, const WindowProduct& p) {
  const int64_t taps = p.rows.taps * p.columns.taps, depth = p.x.size[1];
  const Shape shape{p.x.size[0] * p.rows.count * p.columns.count, p.out.size[1], taps * depth};
  for (const int64_t size : {shape.rows, shape.cols, shape.depth}) require_countable(size);
  const bool nothing = p.behind == Behind::nothing;
  Role role{Function::product, {}, {}, {}, {}, call.type, call.precision, true};
  Candidates found(call.device, extents_of(p));
  add_boxes(call, p, found);
  // Each tap takes whole steps.
  const auto consider = [&](Reader a, Reader b) {
    role.a = a;
    role.b = b;
    for (const Kernel* kernel : call.device.find(role)) {
      Shape padded = shape;
      if (a != Reader::flat) padded.depth = taps * divide(depth, kernel->tile.k) * kernel->tile.k;
      found.add(*kernel, padded);
    }
  };
  const View& w = p.weight;
  const bool by_depth = w.stride[1] == 1, by_lines = w.stride[0] == 1;
  const bool other_strides = w.stride[by_depth ? 0 : 1] % kVector == 0 &&
                             w.stride[2] % kVector == 0 && w.stride[3] % kVector == 0;
  const bool bias = p.bias.fits_vectors();
  if (!call.shallow(shape.depth) && vector_strides(p.x) && vector_strides(p.out) &&
      (by_depth || by_lines) && other_strides && aligned(w.data) && tap_offset(p) % kVector == 0 &&
      depth % kVector == 0 && shape.cols % kVector == 0 && bias &&
      small(p.x, p.weight, p.out, p.rows, p.columns)) {
    role.epilogue = nothing ? Epilogue::identity : Epilogue::bias_relu;
    role.store = Writer::windows;
    consider(Reader::windows, by_depth ? Reader::weight_depth : Reader::weight_lines);
  }
  if (!found.empty()) return found.choose();
  require_small(p.x, p.weight, p.out, p.rows, p.columns);
  role.vectors = false;
  role.precision = call.of_elements(shape.depth);
  role.epilogue = nothing ? Epilogue::identity : Epilogue::strided_bias_relu;
  role.store = Writer::planes;
  consider(Reader::planes, Reader::weight_strided);
  if (!nothing) consider(Reader::flat, Reader::weight_flat);
  return found.choose();
}

void run(const Call& call, const WindowProduct& p, const Choice& choice) {
  const int64_t taps = p.rows.taps * p.columns.taps, depth = p.x.size[1];
  const Shape shape{p.x.size[0] * p.rows.count * p.columns.count, p.out.size[1], taps * depth};
  if (!shape.rows || !shape.cols) return;
  if (!choice.kernel) throw Unsupported("this build has no GPU kernel for these strides");
  note_run(choice);
  const Kernel& kernel = *choice.kernel;
  if (in_boxes(choice)) return run_boxes(call, p, kernel);
  const bool elements = !kernel.role.vectors;
  const View& w = p.weight;
  Launch launch(call.device, kernel);
  add_image(launch, p.x, p.rows, p.columns);
  if (elements) launch.number(p.x.stride[1]);
  launch.pointer(w.data + tap_offset(p) * element_size(call.type))
      .number(depth)
      .number(p.columns.taps);
  launch.number(p.rows.tap_step * w.stride[2]).number(p.columns.tap_step * w.stride[3]);
  launch.number(kernel.role.b == Reader::weight_lines ? w.stride[1] : w.stride[0]);
  if (elements) launch.number(w.stride[1]);
  add_pixels(launch, p.out);
  if (elements) launch.number(p.out.stride[1]);
  add(launch, kernel.role.epilogue, p.bias);
  const int64_t steps =
      flat(kernel) ? divide(shape.depth, kernel.tile.k) : taps * divide(depth, kernel.tile.k);
  add_sizes(launch, call, kernel, shape, steps, 1);
}

namespace {

Role tap_role(const Call& call, const TapProduct& p) {
  const int64_t depth = pixels(p.grad);
  Role role;
  role.vectors = !call.shallow(depth) && vector_strides(p.x) && vector_strides(p.grad) &&
                 p.x.size[1] % kVector == 0 && p.grad.size[1] % kVector == 0;
  role.a = role.vectors ? Reader::left_lines : Reader::strided;
  role.b = role.vectors ? Reader::taps : Reader::taps_strided;
  role.epilogue = Epilogue::identity;
  role.type = call.type;
  role.precision = role.vectors ? call.precision : call.of_elements(depth);
  return role;
}

void add_taps(Launch& launch, const TapProduct& p) {
  launch.pointer(p.out.data).number(p.x.size[1]).number(p.columns.taps);
  launch.number(p.out.stride[2]).number(p.out.stride[3]);
  launch.number(p.out.stride[0]).number(p.out.stride[1]);
}

// Adds up parts into `out`.
void combine_taps(const Call& call, const TapProduct& p, const Shape& shape, const void* parts,
                  int splits) {
  Role role{};
  role.function = Function::combine;
  role.epilogue = Epilogue::identity;
  role.store = Writer::taps;
  role.type = call.type;
  const auto found = call.device.find(role);
  if (found.empty()) throw Unsupported("this build has no GPU kernel that adds up parts");
  const Kernel& kernel = **found.begin();
  Launch launch(call.device, kernel);
  launch.pointer(parts);
  add_taps(launch, p);
  launch.number(shape.rows).number(shape.cols).number(splits);
  launch.run(divide(shape.rows, kernel.tile.m) * divide(shape.cols, kernel.tile.n),
             call.context.stream);
}

}  // namespace

Shape tap_shape(const TapProduct& p, const Kernel& kernel) {
  const int64_t width = kernel.tile.n;
  return {p.grad.size[1], p.rows.taps * p.columns.taps * divide(p.x.size[1], width) * width,
          pixels(p.grad)};
}

Choice plan(const Call& call, const TapProduct& p) {
  if (!small_offsets(p.out, 0)) throw Unsupported(kLargeOffsets);
  Candidates found(call.device, extents_of(p));
  add_boxes(call, p, found);
  if (!found.empty() && !small(p.x, p.out, p.grad, p.rows, p.columns)) return found.choose();
  require_small(p.x, p.out, p.grad, p.rows, p.columns);
  Role role = tap_role(call, p);
  if (!found.empty() && !role.vectors) return found.choose();
  for (const Writer store : {Writer::taps, Writer::split}) {
    role.store = store;
    for (const Kernel* kernel : call.device.find(role)) {
      const Shape shape = tap_shape(p, *kernel);
      for (const int64_t size : {shape.rows, shape.cols, shape.depth}) require_countable(size);
      found.add(*kernel, shape);
    }
  }
  return found.choose();
}

void run(const Call& call, const TapProduct& p, const Choice& choice) {
  if (!choice.kernel) throw Unsupported("this build has no GPU kernel for these strides");
  const Kernel& kernel = *choice.kernel;
  const Shape shape = tap_shape(p, kernel);
  if (!shape.rows || !shape.cols) return;
  note_run(choice);
  void* parts = nullptr;
  if (kernel.role.store == Writer::split)
    parts = call.allocate(choice.splits * shape.rows * shape.cols * 4);
  if (kernel.role.b == Reader::tensor_taps) {
    run_boxes(call, p, choice, parts);
  } else {
    Launch launch(call.device, kernel);
    launch.pointer(p.grad.data);
    if (!kernel.role.vectors) launch.number(p.grad.stride[1]);
    launch.number(pixel_stride(p.grad));
    add_image(launch, p.x, p.rows, p.columns);
    if (!kernel.role.vectors) launch.number(p.x.stride[1]);
    parts ? void(launch.pointer(parts)) : add_taps(launch, p);
    add_sizes(launch, call, kernel, shape, divide(shape.depth, kernel.tile.k), choice.splits);
  }
  if (parts) combine_taps(call, p, shape, parts, choice.splits);
}

Pixels pixels_of(const View& x, const View* output) {
  const auto source = [](const View& v) {
    return Pixels::Source{v.data, v.stride[0], pixel_stride(v), v.stride[1]};
  };
  if (!rows_follow(x) || (output && !rows_follow(*output)))
    throw Unsupported("images whose rows do not follow each other, on a GPU");
  Pixels p{output != nullptr, x.size[0], x.size[2] * x.size[3], x.size[1], source(x), {}};
  if (output) p.output = source(*output);
  if (dense_pixels(x) && (!output || dense_pixels(*output))) {
    p.pixels *= p.images;
    p.images = 1;
  }
  return p;
}

View beside(const View& x) {
  const int64_t pitch = divide(x.size[1], kVector) * kVector;
  View v{nullptr, {}, {pitch * x.size[2] * x.size[3], 1, pitch * x.size[3], pitch}};
  std::copy_n(x.size, 4, v.size);
  return v;
}

View filled(const Call& call, const View& x, View v) {
  v.data = static_cast<char*>(call.allocate(v.size[0] * v.stride[0] * element_size(call.type)));
  rearrange(call, pixels_of(x, nullptr), v.data, v.stride[3], nullptr);
  return v;
}

}  // namespace twinfuse::gpu
