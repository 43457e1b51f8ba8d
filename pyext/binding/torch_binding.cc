#include "torch_binding.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace twinfuse {
namespace {

// Returns 0, or 1 to refuse with the text left in `message` (`capacity` bytes).
using FallbackCallback = int32_t (*)(const char* op, const char* reason, char* message,
                                     int64_t capacity);
std::atomic<FallbackCallback> fallback_callback{nullptr};
using NativeCallback = int32_t (*)();
std::atomic<NativeCallback> native_callback{nullptr};

void* FindSymbol(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
  return handle != nullptr ? dlsym(handle, symbol) : nullptr;
}

struct Range {
  TwinfuseTask task;
  void* argument;
};

void RunRange(int64_t begin, int64_t end, void* opaque) {
  const auto* range = static_cast<const Range*>(opaque);
  for (int64_t i = begin; i < end; ++i) range->task(range->argument, i);
}

// Whether the dimensions lie in memory in another order than theirs, with no gap and no overlap.
// The stride of a dimension of one element means nothing.
bool IsPermuted(const View& view) {
  std::vector<int64_t> order;  // from the fastest to the slowest
  for (int64_t d = view.ndim; d-- > 0;) {
    if (view.sizes[d] > 1) order.push_back(d);
  }
  const std::vector<int64_t> own = order;
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return view.strides[a] < view.strides[b]; });
  uint64_t step = 1;
  for (const int64_t d : order) {
    if (static_cast<uint64_t>(view.strides[d]) != step) return false;
    step *= static_cast<uint64_t>(view.sizes[d]);
  }
  return order != own;
}

// Whether torch's settings let float32 be multiplied in TF32. They have no stable interface, so
// they are found by name; where a torch has other names, products keep the accuracy of float32.
bool AllowsTf32(Products products) {
  using GetContext = void* (*)();
  using OfMatrices = bool (*)(const void*);
  using OfCudnn = bool (*)(const void*, std::optional<int32_t>);
  constexpr int32_t kConvolution = 1, kRnn = 2;  // of at::Float32Op
  const auto find = [](const char* name) { return FindSymbol("libtorch_cpu.so", name); };
  static const auto context = reinterpret_cast<GetContext>(find("_ZN2at13globalContextEv"));
  static const auto matrices =
      reinterpret_cast<OfMatrices>(find("_ZNK2at7Context15allowTF32CuBLASEv"));
  static const auto cudnn = reinterpret_cast<OfCudnn>(
      find("_ZNK2at7Context14allowTF32CuDNNESt8optionalINS_9Float32OpEE"));
  const bool is_matrices = products == Products::kMatrices;
  if (context == nullptr || (is_matrices ? matrices == nullptr : cudnn == nullptr)) return false;
  try {
    if (is_matrices) return matrices(context());
    return cudnn(context(), products == Products::kRecurrent ? kRnn : kConvolution);
  } catch (const std::exception&) {  // settings that contradict each other
    return false;
  }
}

}  // namespace

void AdviseHugePages(AtenTensorHandle tensor) {
  constexpr uintptr_t kPage = 2 << 20;
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int64_t bytes = 0;
  int32_t device = cpu;
  void* pointer = nullptr;
  if (aoti_torch_get_storage_size(tensor, &bytes) != TORCH_SUCCESS ||
      static_cast<uintptr_t>(bytes) < kPage) {
    return;
  }
  if (aoti_torch_get_device_type(tensor, &device) != TORCH_SUCCESS || device != cpu) return;
  if (torch_get_mutable_data_ptr(tensor, &pointer) != TORCH_SUCCESS) return;
  // Whole pages inside of the tensor: no memory is taken that it does not have.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(pointer) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(pointer) + bytes) & ~(kPage - 1);
  // Advice only: a kernel without huge pages refuses, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Handle EmptyLike(const char* op, const char* name, const View& parameter) {
  const std::vector<int64_t> sizes(parameter.sizes, parameter.sizes + parameter.ndim);
  if (!IsPermuted(parameter)) return Empty(op, name, parameter, sizes);
  return EmptyStrided(op, name, parameter, sizes, parameter.strides);
}

void Gradients::Push(StableIValue* stack) {
  for (Handle* gradient : {&input, &weight, &bias}) {
    if (!*gradient) *gradient = UndefinedTensor();
    *stack++ = gradient->release();
  }
}

torch::stable::Tensor MaskedGradient(const Handle& grad_output, const Handle& output) {
  using torch::stable::detail::from;
  const torch::stable::Tensor grad = grad_output.share();
  const torch::stable::Tensor zeros = torch::stable::new_zeros(grad, {});
  StableIValue dead[] = {from(output.share()), from(zeros)};
  Check(torch_call_dispatcher("aten::le", "Tensor", dead, TORCH_ABI_VERSION), "run aten::le");
  StableIValue masked[] = {dead[0], from(zeros), from(grad)};
  Check(torch_call_dispatcher("aten::where", "self", masked, TORCH_ABI_VERSION), "run aten::where");
  return torch::stable::detail::to<torch::stable::Tensor>(masked[0]);
}

void OfferNative(const char* op, const std::string& reason) {
  const NativeCallback callback = native_callback.load();
  if (callback == nullptr || callback() == 0) return;
  const std::string prefix = std::string(op) + ": ";
  const bool named = reason.compare(0, prefix.size(), prefix) == 0;
  throw std::runtime_error(named ? reason : prefix + reason);
}

void ReportFallback(const char* op, const std::string& reason) {
  const FallbackCallback callback = fallback_callback.load();
  char message[1024] = "";
  const std::string prefix = std::string(op) + ": ";  // the core's texts begin so
  const size_t start = reason.compare(0, prefix.size(), prefix) == 0 ? prefix.size() : 0;
  if (callback != nullptr && callback(op, reason.c_str() + start, message, sizeof(message)) != 0) {
    throw std::runtime_error(message);
  }
}

void* CurrentCudaStream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  using GetHandle = AOTITorchError (*)(StreamHandle, void**);
  static const auto get_stream = reinterpret_cast<GetStream>(
      FindSymbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  static const auto get_handle = reinterpret_cast<GetHandle>(
      FindSymbol("libtorch_cpu.so", "torch_stream_native_handle"));  // torch 2.13 and newer
  void* stream = nullptr;
  if (get_stream != nullptr) {
    Check(get_stream(device_index, &stream), "find the current CUDA stream");
    return stream;
  }
  if (get_handle == nullptr) {
    throw std::runtime_error("this build of torch does not say what its current CUDA stream is");
  }
  StreamHandle current = nullptr;
  Check(aoti_torch_get_current_stream(device_index, &current), "find the current stream");
  const AOTITorchError error = get_handle(current, &stream);
  aoti_torch_delete_stream(current);
  Check(error, "find the current CUDA stream");
  return stream;
}

Context::Context(const View& like, Products products) : TwinfuseContext{}, like_(like) {
  static const int32_t cuda = aoti_torch_device_type_cuda();
  opaque = this;
  allocate = Allocate;
  device_index = like.device_index;
  if (like.device_type == cuda) {
    device = TWINFUSE_CUDA;
    Check(aoti_torch_create_device_guard(device_index, &guard_), "set the current device");
    stream = CurrentCudaStream(device_index);
    if (like.dtype == TWINFUSE_FLOAT32 && AllowsTf32(products)) {
      precision = TWINFUSE_PRECISION_TF32;
    }
    return;
  }
  device = TWINFUSE_CPU;
  uint32_t threads = 1;
  Check(torch_get_num_threads(&threads), "read the number of threads");
  num_threads = static_cast<int32_t>(threads);
  parallel_for = ParallelFor;
}

Context::~Context() {
  if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
}

void Context::ParallelFor(void* opaque, int64_t count, TwinfuseTask task, void* argument) {
  Range range{task, argument};
  // No exception may cross the core: the failure is raised once the core has returned.
  if (torch_parallel_for(0, count, 1, RunRange, &range) != TORCH_SUCCESS) {
    static_cast<Context*>(opaque)->parallel_failed_ = true;
  }
}

void* Context::Allocate(void* opaque, size_t bytes) {
  auto* context = static_cast<Context*>(opaque);
  if (void* kept = context->kept_.Take(*context, bytes)) return kept;
  static const int32_t uint8 = aoti_torch_dtype_uint8();
  const auto size = static_cast<int64_t>(bytes);
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  void* pointer = nullptr;
  if (aoti_torch_empty_strided(1, &size, &stride, uint8, context->like_.device_type,
                               context->like_.device_index, &handle) != TORCH_SUCCESS) {
    return nullptr;
  }
  context->scratch_.emplace_back(handle);
  AdviseHugePages(handle);
  return torch_get_mutable_data_ptr(handle, &pointer) == TORCH_SUCCESS ? pointer : nullptr;
}

bool Context::Served(const char* op, TwinfuseStatus status) const {
  if (status == TWINFUSE_UNSUPPORTED) return false;
  if (status != TWINFUSE_OK) throw std::runtime_error(twinfuse_last_error());
  if (parallel_failed_) throw std::runtime_error(std::string(op) + ": torch's thread pool failed");
  return true;
}

}  // namespace twinfuse

// Called by the Python side once, after loading.
extern "C" TWINFUSE_API void twinfuse_torch_on_fallback(twinfuse::FallbackCallback callback) {
  twinfuse::fallback_callback.store(callback);
}

// Likewise; returns whether this thread's caller takes native layers itself.
extern "C" TWINFUSE_API void twinfuse_torch_on_native(twinfuse::NativeCallback callback) {
  twinfuse::native_callback.store(callback);
}

extern "C" TWINFUSE_API int32_t twinfuse_torch_abi_version(void) { return TWINFUSE_ABI_VERSION; }
