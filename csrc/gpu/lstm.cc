// LSTM on a GPU: the products of all inputs at once, then a kernel of csrc/cuda for all steps, or a
// launch for each where none holds the weights; and backward steps first, then products of all
// gradients at once. A cell is one launch forward.
#include <algorithm>

#include "cuda/lstm_arguments.h"
#include "cuda/lstm_kernels.h"
#include "gpu/ops.h"
#include "gpu/serve.h"

namespace twinfuse::gpu {
namespace {

using cuda::kBlock, cuda::kCluster, cuda::kGrid, cuda::LstmFormat;

enum class Pass { Forward, Backward, ForwardStep, BackwardStep };

// Sequences of a cell up to which its kernel reads weights hardly more often than a product would.
constexpr int64_t kMostFused = 128;
// Inputs of a cell that its kernel counts.
constexpr int64_t kMostInputs = int64_t{1} << 24;

// What launches need to know of a kernel's shape.
struct LstmKernel {
  const char* name;
  Pass pass;
  LstmFormat format;
  int threads, units, width, depth, chunk, most_slice, kept;
  cuda::LstmReach reach;
  uint32_t shared;

  int cluster() const { return reach == cuda::kCluster ? width / units : 1; }
};

template <class Shape>
constexpr LstmKernel describe(const char* name, Pass pass, LstmFormat format) {
  return {name,
          pass,
          format,
          Shape::kThreads,
          Shape::kUnits,
          Shape::kWidth,
          Shape::kDepth,
          Shape::kChunk,
          Shape::kMostSlice,
          Shape::kKept,
          Shape::kReach,
          Shape::kSharedBytes};
}

#define TWINFUSE_DESCRIBE(name, pass, format, ...)                                      \
  describe<cuda::Lstm##pass##Shape<LstmFormat::format, __VA_ARGS__>>(#name, Pass::pass, \
                                                                     LstmFormat::format),
// Of a pass and a format in ascending width; of those of steps the narrow one comes first.
constexpr LstmKernel kLstmKernels[] = {
    TWINFUSE_LSTM_BF16(TWINFUSE_DESCRIBE, TWINFUSE_DESCRIBE)
        TWINFUSE_LSTM_FP16(TWINFUSE_DESCRIBE, TWINFUSE_DESCRIBE)
            TWINFUSE_LSTM_TF32(TWINFUSE_DESCRIBE, TWINFUSE_DESCRIBE)
                TWINFUSE_LSTM_TF32X3(TWINFUSE_DESCRIBE, TWINFUSE_DESCRIBE)};
#undef TWINFUSE_DESCRIBE

LstmFormat format_of(const Call& call) {
  if (call.type == Type::bf16) return LstmFormat::bf16;
  if (call.type == Type::fp16) return LstmFormat::fp16;
  return call.precision == Precision::tf32 ? LstmFormat::tf32 : LstmFormat::tf32x3;
}

// A kernel, and how its blocks share the sequences.
struct Plan {
  const LstmKernel* kernel = nullptr;
  const Device::CudaLoaded* loaded = nullptr;
  int64_t blocks = 0;  // of a slice
  int64_t slice = 0;   // sequences
  int64_t slices = 0;  // of a launch
};

const Device::CudaLoaded& loaded(const Call& call, const LstmKernel& kernel) {
  return call.device.cuda_kernel(kernel.name, kernel.threads, kernel.shared, kernel.cluster());
}

// A launch for each step, of blocks so wide that all run at once, or as wide as there are.
Plan plan_steps(const Call& call, Pass pass, int64_t units, int64_t batch) {
  Plan best;
  for (const LstmKernel& kernel : kLstmKernels) {
    if (kernel.pass != pass || kernel.format != format_of(call)) continue;
    Plan made{&kernel, nullptr, divide(units, kernel.units)};
    made.slices = std::max<int64_t>(divide(batch, kernel.most_slice), 1);
    made.slice = std::max<int64_t>(divide(divide(batch, made.slices), 8) * 8, 8);
    made.slices = divide(batch, made.slice);
    require_countable(made.slices * made.blocks);
    try {
      made.loaded = &loaded(call, kernel);
    } catch (const Unsupported&) {
      if (!best.kernel) throw;
      break;  // what serves is there
    }
    best = made;
    if (made.slices * made.blocks <= made.loaded->resident) break;
  }
  return best;
}

// All steps at once by the narrowest kernel that can hold the weights; none where the device has
// no room. Where blocks have all units of their sequences, wider ones take more of these at a time.
Plan plan_layer(const Call& call, Pass pass, int64_t units, int64_t batch) {
  Plan best;
  for (const LstmKernel& kernel : kLstmKernels) {
    if (kernel.pass != pass || kernel.format != format_of(call) || kernel.width < units) continue;
    const bool clusters = kernel.reach == kCluster;
    Plan made{&kernel, nullptr, clusters ? kernel.cluster() : divide(units, kernel.units)};
    try {
      made.loaded = &loaded(call, kernel);
    } catch (const Unsupported&) {
      continue;  // that a build has no kernels at all, those of single steps will say
    }
    if (made.blocks > made.loaded->resident) continue;
    // The tensor cores take eight sequences at a time; alone, more blocks have less to do.
    const int64_t least = kernel.reach == kBlock ? 1 : 8;
    const int64_t most = made.loaded->resident / made.blocks;
    made.slices = std::clamp<int64_t>(divide(batch, least), 1, most);
    made.slice = divide(divide(batch, made.slices), least) * least;
    made.slice = std::clamp<int64_t>(made.slice, 1, kernel.most_slice);
    made.slices = std::clamp<int64_t>(divide(batch, made.slice), 1, made.slices);
    const bool serves_all = made.slice * made.slices >= batch;
    if (clusters && !serves_all) continue;  // blocks anywhere take more
    if (!best.kernel || made.slice * made.slices > best.slice * best.slices) best = made;
    if (serves_all || kernel.reach == kGrid) break;
  }
  return best;
}

Plan plan(const Call& call, const LstmCall& op, bool backward) {
  const Pass layer = backward ? Pass::Backward : Pass::Forward;
  const Pass step = backward ? Pass::BackwardStep : Pass::ForwardStep;
  if (!op.units) throw Unsupported("no GPU kernel takes 0 units");
  // To load weights once would be no gain.
  const Plan best = op.steps > 1 ? plan_layer(call, layer, op.units, op.batch) : Plan();
  return best.kernel ? best : plan_steps(call, step, op.units, op.batch);
}

// What the kernels know of: more would be left out without a word.
static_assert(TWINFUSE_ACTIVATION_COUNT == 4);
static_assert(sizeof(TwinfuseLstmWeights) == 7 * sizeof(void*));
static_assert(sizeof(TwinfuseLstmNoise) == 4 * sizeof(void*));

template <class T>
void refuse_if(const T& tensor, const char* text) {
  if (tensor.data) throw Unsupported(std::string("no GPU kernel computes ") + text);
}

// What the kernels do not do.
void require_served(const LstmCall& op) {
  refuse_if(op.weights.hr, "a projection");
  refuse_if(op.weights.peephole, "peepholes");
  refuse_if(op.weights.norm, "normalised gates");
  refuse_if(op.dropout_input, "dropped inputs");
  refuse_if(op.dropout_hidden, "dropped states");
  for (const int64_t size : {op.rows, op.steps, op.batch, 4 * op.units}) require_countable(size);
}

cuda::LstmSequence sequence(const Sequence& s) { return {s.data, s.step, s.row, s.col}; }
cuda::LstmState state(const Matrix& m) { return {m.data, m.row_stride, m.col_stride}; }

int32_t narrow(int64_t number) { return static_cast<int32_t>(number); }

// The numbers of packed sequences' first rows, on the device.
const int32_t* offsets(const Call& call, const LstmCall& op) {
  const int64_t* sizes = op.options.batch_sizes;
  if (!sizes) return nullptr;
  constexpr int kMost = cuda::LstmOffsetsArguments::kMost;
  using Shape = cuda::LstmOffsetsShape<LstmFormat::bf16, 128>;
  auto* const all = static_cast<int32_t*>(call.allocate((op.steps + 1) * 4));
  const auto& loaded = call.device.cuda_kernel("lstm_offsets", Shape::kThreads, 0);
  cuda::LstmOffsetsArguments arguments{};
  int64_t row = 0;
  for (int64_t t = 0; t <= op.steps; t++) {
    if (arguments.count == 0) arguments.to = all + t;
    arguments.numbers[arguments.count++] = narrow(row);
    if (t < op.steps) row += sizes[t];
    if (arguments.count < kMost && t < op.steps) continue;
    launch_cuda(call.device, loaded, "lstm_offsets", {Blocks::apart, 1}, Shape::kThreads, 0,
                &arguments, call.context.stream);
    arguments.count = 0;
  }
  return all;
}

cuda::LstmShared shared(const Call& call, const LstmCall& op) {
  cuda::LstmShared to{};
  to.steps = narrow(op.steps), to.batch = narrow(op.batch), to.units = narrow(op.units);
  to.cell_activation = op.options.cell_activation;
  to.gate_activation = op.options.gate_activation;
  to.reverse = op.options.reverse;
  to.batch_major = op.options.batch_major;
  to.zero_masked_output = op.options.zero_masked_output;
  to.offsets = offsets(call, op);
  to.mask = op.options.mask;
  to.mask_step = op.options.mask_stride[0], to.mask_batch = op.options.mask_stride[1];
  to.hh = op.weights.hh.data;
  to.hh_row = op.weights.hh.row_stride, to.hh_col = op.weights.hh.col_stride;
  to.zoneout_hidden = sequence(op.zoneout_hidden);
  to.zoneout_cell = sequence(op.zoneout_cell);
  return to;
}

bool is_of_steps(const Plan& plan) {
  return plan.kernel->pass == Pass::ForwardStep || plan.kernel->pass == Pass::BackwardStep;
}

template <class Arguments>
void launch(const Call& call, const Plan& plan, const Arguments& arguments,
            Blocks::Waiting waiting) {
  const LstmKernel& kernel = *plan.kernel;
  const int64_t slices = divide(arguments.shared.count, plan.slice);
  launch_cuda(call.device, *plan.loaded, kernel.name,
              {waiting, slices * plan.blocks, kernel.cluster()}, kernel.threads, kernel.shared,
              &arguments, call.context.stream);
}

// Single steps read weights again and again, fastest where what they sum over lies side by side:
// forward the columns of W_hh, backward the rows.
template <class Arguments>
void line_up(const Call& call, Arguments* arguments, bool rows) {
  cuda::LstmShared& to = arguments->shared;
  int64_t &step = rows ? to.hh_row : to.hh_col, &line = rows ? to.hh_col : to.hh_row;
  if (step == 1) return;
  const int64_t gates = 4 * int64_t{to.units};
  const int64_t lines = rows ? to.units : gates, depth = rows ? gates : to.units;
  const int64_t pitch = divide(depth, kVector) * kVector;
  void* const copy = call.allocate(lines * pitch * element_size(call.type));
  rearrange(call, {false, 1, lines, depth, {to.hh, 0, line, step}, {}}, copy, pitch, nullptr);
  to.hh = copy, line = pitch, step = 1;
}

// One launch after the other.
template <class Arguments>
void run_steps(const Call& call, const Plan& plan, Arguments* arguments, int64_t launches) {
  cuda::LstmShared& to = arguments->shared;
  const int64_t cells = int64_t{to.batch} * to.units;
  to.slice = narrow(plan.slice), to.blocks = narrow(plan.blocks), to.count = to.batch;
  if (launches > 1) {
    to.carried = static_cast<float*>(call.allocate(plan.kernel->kept * cells * 4));
    if (plan.kernel->pass == Pass::ForwardStep)
      to.exchange = call.allocate(2 * cells * element_size(call.type));
  }
  if (to.batch && to.steps > 1) line_up(call, arguments, plan.kernel->pass == Pass::BackwardStep);
  for (int64_t step = 0; to.batch && step < launches; step++) {
    to.step = narrow(step);
    launch(call, plan, *arguments, Blocks::apart);
  }
}

// All sequences, in as many launches as it takes.
template <class Arguments>
void run_layer(const Call& call, const Plan& plan, Arguments* arguments, int64_t batch) {
  const LstmKernel& kernel = *plan.kernel;
  cuda::LstmShared& to = arguments->shared;
  const int64_t rows = divide(plan.slice, kernel.chunk) * kernel.chunk;
  const int64_t bytes =
      plan.slices * cuda::kExchangeSlots * rows * kernel.depth * cuda::element_size(kernel.format);
  const bool in_memory = kernel.reach == kGrid;
  if (in_memory) to.exchange = call.allocate(bytes);
  to.slice = narrow(plan.slice), to.blocks = narrow(plan.blocks);
  for (int64_t first = 0; first < batch; first += plan.slice * plan.slices) {
    to.first = narrow(first);
    to.count = narrow(std::min(plan.slice * plan.slices, batch - first));
    if (in_memory) set_bits(call.device, to.exchange, bytes / 4, call.context.stream);
    launch(call, plan, *arguments, kernel.reach == kCluster ? Blocks::clusters : Blocks::all);
  }
}

void multiply(const Call& call, const Product& product) { run(call, product, plan(call, product)); }

// Inputs or their gradients as a matrix whose rows are in the order of what is saved.
Matrix rows_of(const LstmCall& op, const Sequence& s) {
  const bool packed = op.options.batch_sizes, major = op.options.batch_major;
  int64_t stride = s.row;
  bool uniform = packed || op.steps == 1 || !op.rows;
  if (!uniform && op.batch == 1) {
    stride = s.step, uniform = true;
  } else if (!uniform) {
    stride = major ? s.step : s.row;
    uniform = major ? s.row == op.steps * s.step : s.step == op.batch * s.row;
  }
  if (!uniform)
    throw Unsupported("rows of the input lie at uneven distances, which no GPU kernel takes");
  return {s.data, op.rows, op.inputs, stride, s.col};
}

}  // namespace

TwinfuseStatus lstm_kernel(const LstmCall& sizes, bool backward, int32_t dtype,
                           const TwinfuseContext& context, const char** kernel) {
  return serve("lstm", dtype, context,
               [&](const Call& call) { *kernel = plan(call, sizes, backward).kernel->name; });
}

TwinfuseStatus lstm_forward(const LstmForward& op, const char* name, int32_t dtype,
                            const TwinfuseContext& context) {
  return serve(name, dtype, context, [&](const Call& call) {
    require_served(op);
    const Plan chosen = plan(call, op, false);
    const Matrix input = rows_of(op, op.input), &saved = op.saved.gates;
    cuda::LstmForwardArguments arguments{};
    // A product of few terms is more accurate by itself.
    if (op.steps == 1 && op.batch <= kMostFused && op.inputs <= kMostInputs &&
        !call.shallow(op.inputs)) {
      arguments.x = state(input), arguments.ih = state(op.weights.ih);
      arguments.x_units = narrow(op.inputs);
    } else {
      const int64_t gates = 4 * op.units;
      Matrix products{saved.data, op.rows, gates, saved.row_stride, 1};
      if (!saved.data) {
        products.row_stride = divide(gates, kVector) * kVector;
        products.data = call.allocate(op.rows * products.row_stride * element_size(call.type));
      }
      multiply(call, {operand(input), operand(op.weights.ih), result(products)});
      arguments.inputs = products.data, arguments.inputs_row = products.row_stride;
    }
    arguments.shared = shared(call, op);
    arguments.bias_ih = op.weights.bias_ih.data;
    arguments.bias_hh = op.weights.bias_hh.data;
    arguments.bias_ih_stride = op.weights.bias_ih.stride;
    arguments.bias_hh_stride = op.weights.bias_hh.stride;
    arguments.output = sequence(op.output);
    arguments.initial_h = state(op.initial.h), arguments.initial_c = state(op.initial.c);
    arguments.final_h = state(op.final.h), arguments.final_c = state(op.final.c);
    arguments.gates = saved.data, arguments.gates_row = saved.row_stride;
    arguments.cells = op.saved.cells.data, arguments.cells_row = op.saved.cells.row_stride;
    arguments.hidden = op.saved.hidden.data, arguments.hidden_row = op.saved.hidden.row_stride;
    if (is_of_steps(chosen)) {
      run_steps(call, chosen, &arguments, std::max<int64_t>(op.steps, 1));
    } else {
      run_layer(call, chosen, &arguments, op.batch);
    }
  });
}

TwinfuseStatus lstm_backward(const LstmBackward& op, const char* name, int32_t dtype,
                             const TwinfuseContext& context) {
  return serve(name, dtype, context, [&](const Call& call) {
    require_served(op);
    const Plan chosen = plan(call, op, true);
    const int64_t gates = 4 * op.units;
    const LstmWeights& grads = op.grad_weights;
    const bool sums = grads.bias_ih.data || grads.bias_hh.data;
    // What they refuse they refuse before anything is launched.
    Matrix input, grad_input;
    if (grads.ih.data) input = rows_of(op, op.input);
    if (op.grad_input.data) grad_input = rows_of(op, op.grad_input);

    cuda::LstmBackwardArguments arguments{};
    arguments.shared = shared(call, op);
    arguments.gates = op.saved.gates.data, arguments.gates_row = op.saved.gates.row_stride;
    arguments.cells = op.saved.cells.data, arguments.cells_row = op.saved.cells.row_stride;
    arguments.cells_unit = op.saved.cells.col_stride;
    arguments.grad_output = sequence(op.grad_output);
    arguments.grad_final_h = state(op.grad_final.h);
    arguments.grad_final_c = state(op.grad_final.c);
    arguments.grad_initial_h = state(op.grad_initial.h);
    arguments.grad_initial_c = state(op.grad_initial.c);
    arguments.grad_gates = call.allocate(op.rows * gates * element_size(call.type));
    // A block that has all sequences adds up.
    const bool adds_up = is_of_steps(chosen) && chosen.slices == 1;
    if (sums && !adds_up)
      arguments.grad_bias = static_cast<float*>(call.allocate(op.batch * gates * 4));
    if (adds_up) {
      arguments.grad_biases[0] = {grads.bias_ih.data, 0, grads.bias_ih.stride};
      arguments.grad_biases[1] = {grads.bias_hh.data, 0, grads.bias_hh.stride};
    }
    if (is_of_steps(chosen)) {
      const bool behind = op.steps == 0 || op.grad_initial.h.data;
      run_steps(call, chosen, &arguments, op.steps + behind);
    } else {
      run_layer(call, chosen, &arguments, op.batch);
    }

    const Operand grad_gates{arguments.grad_gates, op.rows, gates, gates, 1};
    if (grad_input.data)
      multiply(call, {grad_gates, transposed(operand(op.weights.ih)), result(grad_input)});
    const auto weight = [&](const Matrix& of, const Matrix& by) {
      if (of.data)
        multiply(call, oriented({transposed(grad_gates), transposed(operand(by)), result(of)}));
    };
    weight(grads.ih, input);
    weight(grads.hh, op.saved.hidden);
    for (const auto& bias : {grads.bias_ih, grads.bias_hh})
      if (bias.data && !adds_up)
        combine(call, arguments.grad_bias, narrow(op.batch), 1, gates, {bias.data, 0, bias.stride},
                Behind::nothing, {});
  });
}

}  // namespace twinfuse::gpu
