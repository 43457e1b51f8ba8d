#include "gpu/product.h"

#include <algorithm>

#include "gpu/tuning.h"

namespace twinfuse::gpu {
namespace {

// What lies side by side in memory.
enum class Side { depth, lines, neither };

Side side_of(int64_t lines, int64_t depth, int64_t line, int64_t step) {
  if (step == 1 || depth <= 1) return Side::depth;
  return line == 1 || lines <= 1 ? Side::lines : Side::neither;
}

Side side_of(const Operand& m) {
  const Side side = side_of(m.lines, m.depth, m.line, m.step);
  if (!m.mask || side == side_of(m.lines, m.depth, m.mask_line, m.mask_step)) return side;
  return Side::neither;
}

int64_t pitch(const Operand& m, Side side, bool mask) {
  if (side == Side::depth) return mask ? m.mask_line : m.line;
  return mask ? m.mask_step : m.step;
}

Dense dense(const Operand& m, Side side, bool mask) {
  const void* data = mask ? m.mask : m.data;
  const int64_t stride = pitch(m, side, mask);
  // The stride of a single line means nothing, but the driver looks at it.
  const auto row = [&](int64_t count, int64_t length) {
    return count > 1 ? stride : divide(length, kVector) * kVector;
  };
  if (side == Side::depth) return {data, 2, {m.lines, m.depth}, {row(m.lines, m.depth), 1}, {1, 1}};
  return {data, 2, {m.depth, m.lines}, {row(m.depth, m.lines), 1}, {1, 1}};
}

Dense dense(const Result& out, int64_t rows, int64_t cols) {
  return {
      out.data, 2, {rows, cols}, {rows > 1 ? out.row : divide(cols, kVector) * kVector, 1}, {1, 1}};
}

bool fits_tensor(const Operand& m, Side side, Type type) {
  return side != Side::neither && encodable(dense(m, side, false), type) &&
         (!m.mask || encodable(dense(m, side, true), type));
}

bool fits_vectors(const Operand& m, Side side) {
  if (side == Side::neither || !aligned(m.data) || pitch(m, side, false) % kVector) return false;
  if (m.mask && (!aligned(m.mask) || pitch(m, side, true) % kVector)) return false;
  return (side == Side::depth ? m.depth : m.lines) % kVector == 0;
}

Reader reader(Side side, bool masked, bool tensor) {
  if (tensor) {
    if (side == Side::depth) return masked ? Reader::tensor_depth_masked : Reader::tensor_depth;
    return masked ? Reader::tensor_lines_masked : Reader::tensor_lines;
  }
  if (side == Side::depth) return masked ? Reader::depth_masked : Reader::depth;
  return masked ? Reader::lines_masked : Reader::lines;
}

// All arguments of an operand, in the order of csrc/triton/variants.py.
void add(Launch& launch, const Call& call, const Operand& m, Reader reader) {
  const bool any = reader == Reader::strided;
  const bool tensor = reader >= Reader::tensor_depth && reader <= Reader::tensor_lines_masked;
  const bool depth = reader == Reader::depth || reader == Reader::depth_masked ||
                     reader == Reader::tensor_depth || reader == Reader::tensor_depth_masked;
  const Side side = depth ? Side::depth : Side::lines;
  for (const bool mask : {false, true}) {
    if (mask && !m.mask) break;
    if (tensor) {
      launch.tensor(dense(m, side, mask), mask ? Use::exact : Use::factor);
    } else if (any) {
      launch.pointer(mask ? m.mask : m.data)
          .number(mask ? m.mask_line : m.line)
          .number(mask ? m.mask_step : m.step);
    } else {
      launch.pointer(mask ? m.mask : m.data).number(pitch(m, side, mask));
    }
  }
  if (m.mask) launch.number(call.nan_passes);
}

}  // namespace

void* Call::allocate(int64_t bytes) const {
  constexpr uintptr_t kAlignment = 128;  // of a line of the cache
  void* data = context.allocate(context.opaque, static_cast<size_t>(bytes) + kAlignment - 1);
  if (!data) throw OutOfMemory();
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data) + kAlignment - 1) &
                                 -kAlignment);
}

void add_sizes(Launch& launch, const Call& call, const Kernel& kernel, const Shape& shape,
               int64_t steps, int splits) {
  const int64_t tiles = divide(shape.rows, kernel.tile.m) * divide(shape.cols, kernel.tile.n);
  const int64_t blocks = tiles * splits;
  require_countable(blocks);
  require_countable(steps);
  const int64_t most = int64_t{call.device.multiprocessors()} * resident(kernel);
  const int64_t programs = kernel.persistent ? std::min(blocks, most) : blocks;
  launch.number(shape.rows).number(shape.cols).number(shape.depth).number(steps);
  launch.number(programs).number(splits);
  launch.run(programs, call.context.stream);
}

void add(Launch& launch, Epilogue epilogue, const Vector& bias) {
  if (epilogue == Epilogue::identity) return;
  launch.pointer(bias.data).number(bias.data != nullptr);
  if (epilogue == Epilogue::strided_bias_relu) launch.number(bias.stride);
}

void require_countable(int64_t size) {
  if (size > INT32_MAX - 1024) throw Unsupported("GPU kernels count rows and columns in 32 bits");
}

void combine(const Call& call, const void* parts, int splits, int64_t rows, int64_t cols,
             const Result& out, Behind behind, const Vector& bias) {
  Role role{};
  role.function = Function::combine;
  role.epilogue = behind == Behind::bias_relu ? Epilogue::strided_bias_relu : Epilogue::identity;
  role.store = Writer::strided;
  role.type = call.type;
  const auto found = call.device.find(role);
  if (found.empty()) throw Unsupported("this build has no GPU kernel that adds up parts");
  const Kernel* chosen = nullptr;  // whose tiles are one row where there is one
  for (const Kernel* kernel : found)
    if (!chosen || (kernel->tile.m == 1) == (rows == 1)) chosen = kernel;
  const Kernel& kernel = *chosen;
  Launch launch(call.device, kernel);
  launch.pointer(parts).pointer(out.data).number(out.row).number(out.col);
  add(launch, role.epilogue, bias);
  launch.number(rows).number(cols).number(splits);
  launch.run(divide(rows, kernel.tile.m) * divide(cols, kernel.tile.n), call.context.stream);
}

Choice plan(const Call& call, const Product& p) {
  const Shape shape = p.shape();
  for (const int64_t size : {shape.rows, shape.cols, shape.depth}) require_countable(size);
  const Side left = side_of(p.a), right = side_of(p.b);
  const bool plain_bias = p.bias.fits_vectors();
  const bool nothing = p.behind == Behind::nothing;
  const Epilogue epilogue = nothing ? Epilogue::identity : Epilogue::bias_relu;
  Role role{Function::product, {}, {}, {}, {}, call.type, call.precision, true};
  Candidates found(call.device, {shape.rows, shape.cols, shape.depth});
  const bool shallow = call.shallow(shape.depth);
  if (!shallow && call.device.has_tensors() && plain_bias && fits_tensor(p.a, left, call.type) &&
      fits_tensor(p.b, right, call.type) && p.out.col == 1 &&
      encodable(dense(p.out, shape.rows, shape.cols), call.type)) {
    role.a = reader(left, p.a.mask, true);
    role.b = reader(right, p.b.mask, true);
    role.epilogue = epilogue;
    role.store = Writer::tensor;
    found.add(role, shape);
    role.epilogue = Epilogue::identity;
    role.store = Writer::split;
    if (shape.cols % kVector == 0) found.add(role, shape);
  }
  if (!shallow && fits_vectors(p.a, left) && fits_vectors(p.b, right) &&
      shape.cols % kVector == 0) {
    const bool turned = left == Side::lines && !p.a.mask;
    role.a = turned ? Reader::left_lines : reader(left, p.a.mask, false);
    role.b = reader(right, p.b.mask, false);
    if (aligned(p.out.data) && p.out.col == 1 && p.out.row % kVector == 0 && plain_bias) {
      role.epilogue = epilogue;
      role.store = Writer::lines;
      found.add(role, shape);
    }
    role.epilogue = Epilogue::identity;
    role.store = Writer::split;
    found.add(role, shape);
  }
  if (found.empty() && !p.a.mask && !p.b.mask) {
    role.a = role.b = Reader::strided;
    role.precision = call.of_elements(shape.depth);
    role.epilogue = nothing ? Epilogue::identity : Epilogue::strided_bias_relu;
    role.store = Writer::strided;
    role.vectors = false;
    found.add(role, shape);
  }
  return found.choose();
}

void run(const Call& call, const Product& p, const Choice& choice) {
  const Shape shape = p.shape();
  if (!shape.rows || !shape.cols) return;
  if (!choice.kernel) throw Unsupported("this build has no GPU kernel for these strides");
  note_run(choice);
  const Kernel& kernel = *choice.kernel;
  Launch launch(call.device, kernel);
  add(launch, call, p.a, kernel.role.a);
  add(launch, call, p.b, kernel.role.b);
  void* parts = nullptr;
  if (kernel.role.store == Writer::split) {
    parts = call.allocate(choice.splits * shape.rows * shape.cols * 4);
    launch.pointer(parts);
  } else if (kernel.role.store == Writer::tensor) {
    launch.tensor(dense(p.out, shape.rows, shape.cols), Use::exact);
  } else {
    launch.pointer(p.out.data).number(p.out.row);
    if (kernel.role.store == Writer::strided) launch.number(p.out.col);
  }
  add(launch, kernel.role.epilogue, p.bias);
  add_sizes(launch, call, kernel, shape, divide(shape.depth, kernel.tile.k), choice.splits);
  if (parts) combine(call, parts, choice.splits, shape.rows, shape.cols, p.out, p.behind, p.bias);
}

double rearrange_clocks(const Call& call, const Pixels& p, bool writes) {
  const double bytes =
      double(p.images) * double(p.pixels) * double(p.cols) * element_size(call.type);
  return kLaunchClocks + bytes * (1 + p.masked + writes) / kBytesOfClock;
}

namespace {

bool fits_vectors(const Pixels::Source& s) {
  return s.col == 1 && aligned(s.data) && s.pixel % kVector == 0;
}

bool fits_planes(const Pixels::Source& s) {
  return aligned(s.data) && s.col % kVector == 0 && s.image % kVector == 0;
}

// How the pass reads.
void set_access(const Pixels& p, Role* role) {
  role->a = Reader::strided;
  if (p.images == 1 && p.cols % kVector == 0 && p.masked && fits_vectors(p.x) &&
      fits_vectors(p.output)) {
    role->a = Reader::lines;
  } else if (p.pixels > 1 && p.x.pixel == 1 && (!p.masked || p.output.pixel == 1)) {
    role->a = Reader::planes;
    role->vectors = p.cols % kVector == 0 && p.pixels % kVector == 0 && fits_planes(p.x) &&
                    (!p.masked || fits_planes(p.output));
  }
}

void add(Launch& launch, const Pixels::Source& s, Reader reader) {
  launch.pointer(s.data);
  if (reader == Reader::planes) {
    launch.number(s.col).number(s.image);
    return;
  }
  launch.number(s.pixel);
  if (reader == Reader::strided) launch.number(s.col).number(s.image);
}

}  // namespace

void rearrange(const Call& call, const Pixels& p, void* written, int64_t pitch,
               const Vector* sums) {
  const int64_t rows = p.images * p.pixels;
  for (const int64_t size : {rows, p.cols}) require_countable(size);
  if (!p.cols) return;
  Role role;
  role.function = Function::rearrange;
  role.type = call.type;
  role.masks = p.masked;
  role.writes = written != nullptr;
  role.sums = sums != nullptr;
  set_access(p, &role);
  // Those that read no whole rows of a gradient make everything.
  if (role.masks && role.a != Reader::lines) role.writes = role.sums = true;
  const Kernel* chosen = nullptr;  // the narrowest that takes all columns at once, or the widest
  for (const Kernel* kernel : call.device.find(role)) {
    const bool whole = kernel->tile.n >= p.cols;
    if (!chosen || (whole ? kernel->tile.n < chosen->tile.n || chosen->tile.n < p.cols
                          : kernel->tile.n > chosen->tile.n))
      chosen = kernel;
  }
  if (!chosen) throw Unsupported("this build has no GPU kernel that rearranges");
  const Kernel& kernel = *chosen;
  const int64_t tiles = divide(p.cols, kernel.tile.n);
  // Many programs hide each other's waiting; but one adds up their parts.
  constexpr int64_t kPrograms = 32, kMostParts = 512;  // the former per multiprocessor
  const int64_t wanted = divide(kPrograms * call.device.multiprocessors(), tiles);
  const int64_t most = role.sums ? std::min(wanted, kMostParts) : wanted;
  const int64_t height =
      std::max<int64_t>(divide(divide(rows, kernel.tile.m), most), 1) * kernel.tile.m;
  const int64_t parts = std::max<int64_t>(divide(rows, height), 1);
  require_countable(parts * height);
  void* partial = role.sums ? call.allocate(parts * p.cols * 4) : nullptr;
  if (role.writes && !written) {
    pitch = divide(p.cols, kVector) * kVector;
    written = call.allocate(rows * pitch * element_size(call.type));
  }

  Launch launch(call.device, kernel);
  add(launch, p.x, role.a);
  if (role.masks) add(launch, p.output, role.a);
  if (role.writes) launch.pointer(written).number(pitch);
  if (role.sums) launch.pointer(partial);
  launch.number(rows).number(p.cols);
  if (role.masks) launch.number(call.nan_passes);
  launch.number(height);
  if (role.a != Reader::lines) launch.number(p.pixels);
  launch.run(parts * tiles, call.context.stream);
  if (sums) {
    const Result out{const_cast<void*>(sums->data), 0, sums->stride};
    combine(call, partial, static_cast<int>(parts), 1, p.cols, out, Behind::nothing, {});
  }
}

}  // namespace twinfuse::gpu
