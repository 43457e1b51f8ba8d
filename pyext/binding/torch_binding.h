// What every PyTorch binding shares: tensors and the call context, between libtorch's stable C
// interface and the core's. A binding reads its arguments off the stack, allocates the outputs and
// makes one C call; everything else is here.
//
// The raw C functions are used instead of torch::stable::Tensor because a call has to cost less
// than a microsecond: no shared pointers, no dispatcher calls, no copies of views.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "twinfuse/core.h"
#include "twinfuse/kept_scratch.h"

namespace twinfuse {

// The stack reaches us through a C interface, but the caller is C++: an exception arrives in Python
// as RuntimeError with its text.
inline void Check(AOTITorchError error, const char* what) {
  if (error != TORCH_SUCCESS) throw std::runtime_error(std::string("libtorch failed to ") + what);
}

// An owned reference to a tensor; empty when the schema's optional argument was None.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  StableIValue release() { return torch::stable::detail::from(std::exchange(handle_, nullptr)); }

  // A second reference, for stable operators, which take ownership.
  torch::stable::Tensor share() const {
    AtenTensorHandle copy = nullptr;
    Check(aoti_torch_new_tensor_handle(handle_, &copy), "share a tensor");
    return torch::stable::Tensor(copy);
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

inline Handle PopTensor(StableIValue value) {
  return Handle(torch::stable::detail::to<AtenTensorHandle>(value));
}

inline Handle PopOptionalTensor(StableIValue value) {
  auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  return handle ? Handle(*handle) : Handle();
}

inline bool PopBool(StableIValue value) { return torch::stable::detail::to<bool>(value); }

inline std::vector<int64_t> PopInts(StableIValue value) {
  return torch::stable::detail::to<std::vector<int64_t>>(value);
}

// The C++ objects behind the stable operators, used on the reference path only.
inline Handle Own(const torch::stable::Tensor& tensor) {
  AtenTensorHandle copy = nullptr;
  Check(aoti_torch_new_tensor_handle(tensor.get(), &copy), "share a tensor");
  return Handle(copy);
}

inline Handle UndefinedTensor() {
  AtenTensorHandle handle = nullptr;
  Check(aoti_torch_new_uninitialized_tensor(&handle), "create an undefined tensor");
  return Handle(handle);
}

// -1 for a dtype that no kernel takes.
inline int32_t CoreDtype(int32_t dtype) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t float64 = aoti_torch_dtype_float64();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  static const int32_t float16 = aoti_torch_dtype_float16();
  if (dtype == float32) return TWINFUSE_FLOAT32;
  if (dtype == float64) return TWINFUSE_FLOAT64;
  if (dtype == bfloat16) return TWINFUSE_BFLOAT16;
  if (dtype == float16) return TWINFUSE_FLOAT16;
  return -1;
}

// A tensor as the core sees it. Sizes and strides stay torch's own; the handle must outlive it.
struct View : TwinfuseTensor {
  const char* name;
  int32_t torch_dtype;
  int32_t device_type;
  int32_t device_index;

  // `written` asks for a pointer that may be written through: a lazily cloned tensor is copied only
  // then.
  View(const char* name, const Handle& handle, bool written = false) : name(name) {
    const AtenTensorHandle tensor = handle.get();
    int64_t dims = 0;
    int64_t* size_array = nullptr;
    int64_t* stride_array = nullptr;
    const void* pointer = nullptr;
    int32_t error = aoti_torch_get_dim(tensor, &dims);
    error |= aoti_torch_get_sizes(tensor, &size_array);
    error |= aoti_torch_get_strides(tensor, &stride_array);
    error |= aoti_torch_get_dtype(tensor, &torch_dtype);
    error |= aoti_torch_get_device_type(tensor, &device_type);
    error |= aoti_torch_get_device_index(tensor, &device_index);
    error |= written ? torch_get_mutable_data_ptr(tensor, const_cast<void**>(&pointer))
                     : torch_get_const_data_ptr(tensor, &pointer);
    Check(error, "read a tensor");
    data = const_cast<void*>(pointer);
    dtype = CoreDtype(torch_dtype);
    ndim = static_cast<int32_t>(dims);
    sizes = size_array;
    strides = stride_array;
  }

  int64_t last_size() const { return sizes[ndim - 1]; }
};

inline std::string Shape(const int64_t* sizes, int64_t ndim) {
  std::ostringstream text;
  for (int64_t i = 0; i < ndim; ++i) text << (i ? ", " : "[") << sizes[i];
  text << (ndim ? "]" : "[]");
  return text.str();
}

inline void CheckRank(const char* op, const View& view, bool fits, const char* expected) {
  if (fits) return;
  throw std::runtime_error(std::string(op) + ": " + view.name + ": expected " + expected +
                           ", got shape " + Shape(view.sizes, view.ndim));
}

// The core trusts the binding that all tensors of a call are on the context's device.
inline void CheckSameDevice(const char* op, const View& first, const View& other) {
  if (other.device_type == first.device_type && other.device_index == first.device_index) return;
  std::ostringstream text;
  text << op << ": " << other.name << ": expected the device of " << first.name << " (type "
       << first.device_type << ", index " << first.device_index << "), got type "
       << other.device_type << ", index " << other.device_index;
  throw std::runtime_error(text.str());
}

// Asks for huge pages under a new tensor in main memory: the first touch of each small one costs
// more than to compute what is written to it.
void AdviseHugePages(AtenTensorHandle tensor);

inline Handle EmptyStrided(const char* op, const char* name, const View& like,
                           const std::vector<int64_t>& sizes, const int64_t* strides) {
  AtenTensorHandle handle = nullptr;
  const auto ndim = static_cast<int64_t>(sizes.size());
  if (aoti_torch_empty_strided(ndim, sizes.data(), strides, like.torch_dtype, like.device_type,
                               like.device_index, &handle) != TORCH_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": " + name +
                             ": cannot allocate a tensor of shape " + Shape(sizes.data(), ndim));
  }
  AdviseHugePages(handle);
  return Handle(handle);
}

inline Handle Empty(const char* op, const char* name, const View& like,
                    const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  uint64_t step = 1;  // unsigned: a shape that overflows is refused by the allocation, not by us
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = static_cast<int64_t>(step);
    step *= static_cast<uint64_t>(sizes[i] > 1 ? sizes[i] : 1);
  }
  return EmptyStrided(op, name, like, sizes, strides.data());
}

// A gradient of a parameter takes the parameter's own layout, so that accumulating it needs no
// copy; a layout with gaps or overlaps becomes contiguous.
Handle EmptyLike(const char* op, const char* name, const View& parameter);

// The framework's stream for a CUDA device, looked up at run time so that one binary serves CPU and
// CUDA builds of torch.
void* CurrentCudaStream(int32_t device_index);

// What torch has settings for that say how float32 is multiplied on a GPU.
enum class Products { kMatrices, kConvolutions, kRecurrent };

// Lends torch's threads, scratch memory and stream to the core for one call.
class Context : public TwinfuseContext {
 public:
  Context(const View& like, Products products);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Throws what the core or a callback refused; false when no kernel serves the call, for the
  // reason in twinfuse_last_error(), and the caller takes its reference path.
  bool Served(const char* op, TwinfuseStatus status) const;

 private:
  static void ParallelFor(void* opaque, int64_t count, TwinfuseTask task, void* argument);
  static void* Allocate(void* opaque, size_t bytes);

  const View& like_;
  DeviceGuardHandle guard_ = nullptr;
  KeptScratch kept_;
  std::vector<Handle> scratch_;
  bool parallel_failed_ = false;
};

// The three gradients of an op with a weight and a bias; one that is not asked for stays empty.
struct Gradients {
  Handle input, weight, bias;

  // Onto the stack, where an empty one becomes an undefined tensor (None in Python).
  void Push(StableIValue* stack);
};

// `grad_output` where `output` is positive or NaN and else zero, by torch's own operators.
torch::stable::Tensor MaskedGradient(const Handle& grad_output, const Handle& output);

constexpr const char* kDtypeReason = "no kernel takes this dtype";

// Throws where this thread's caller in Python rather takes native layers, for `reason`, than the
// reference path of the binding.
void OfferNative(const char* op, const std::string& reason);

// Tells Python that `op` runs on torch's own operators; throws in strict mode.
void ReportFallback(const char* op, const std::string& reason);

}  // namespace twinfuse
