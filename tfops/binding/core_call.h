// What every op of this shim needs to call the core from a TensorFlow kernel: tensors described
// without copies, the thread pool and the scratch memory lent, status texts carried back.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tsl/platform/tensor_float_32_utils.h"
#include "twinfuse/core.h"
#include "twinfuse/kept_scratch.h"
#include "xla/stream_executor/stream.h"
#include "xla/tsl/platform/threadpool.h"

namespace twinfuse {

// Ops of this shim are registered for exactly these types.
inline int32_t CoreDtype(tensorflow::DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_DOUBLE:
      return TWINFUSE_FLOAT64;
    case tensorflow::DT_BFLOAT16:
      return TWINFUSE_BFLOAT16;
    case tensorflow::DT_HALF:
      return TWINFUSE_FLOAT16;
    default:
      return TWINFUSE_FLOAT32;
  }
}

// A TwinfuseTensor over the memory of a tensorflow::Tensor, which must outlive it.
class TensorView {
 public:
  // Row-major, as TensorFlow stores every tensor. Null gives a view that passes NULL to the core.
  static TensorView Dense(const tensorflow::Tensor* tensor) {
    TensorView view;
    if (tensor == nullptr) return view;
    const int rank = tensor->dims();
    view.sizes_.resize(rank);
    view.strides_.resize(rank);
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      view.sizes_[i] = tensor->dim_size(i);
      view.strides_[i] = stride;
      stride *= view.sizes_[i];
    }
    view.Describe(*tensor);
    return view;
  }

  // Dimension i of the view is dimension order[i] of the tensor: {1, 0} transposes a matrix.
  static TensorView Permuted(const tensorflow::Tensor* tensor, absl::Span<const int> order) {
    TensorView dense = Dense(tensor), view = dense;
    if (tensor == nullptr) return view;
    for (size_t i = 0; i < order.size(); ++i) {
      view.sizes_[i] = dense.sizes_[order[i]];
      view.strides_[i] = dense.strides_[order[i]];
    }
    return view;
  }

  // The pointers refer to this view, so they are set on the way out and not kept across moves.
  const TwinfuseTensor* get() {
    if (!present_) return nullptr;
    tensor_.sizes = sizes_.data();
    tensor_.strides = strides_.data();
    return &tensor_;
  }

 private:
  void Describe(const tensorflow::Tensor& tensor) {
    present_ = true;
    tensor_.data = tensor.data();
    tensor_.dtype = CoreDtype(tensor.dtype());
    tensor_.ndim = tensor.dims();
  }

  bool present_ = false;
  TwinfuseTensor tensor_{};
  absl::InlinedVector<int64_t, 4> sizes_;
  absl::InlinedVector<int64_t, 4> strides_;
};

// One parallel loop. The caller works on it too and waits only for indices that someone has begun,
// never for a helper to start: so a call made from a busy pool, or from inside it, cannot deadlock.
class ParallelLoop {
 public:
  ParallelLoop(int64_t count, TwinfuseTask task, void* argument)
      : count_(count), task_(task), argument_(argument) {}

  void Work() {
    int64_t finished = 0;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_; ++finished) {
      task_(argument_, i);
    }
    if (finished == 0) return;
    if (done_.fetch_add(finished, std::memory_order_acq_rel) + finished == count_) {
      std::lock_guard<std::mutex> lock(mutex_);
      all_done_.notify_all();
    }
  }

  void Wait() {
    // Chunks are of equal size, so the others are usually microseconds from the end: cheaper to
    // look again than to sleep.
    for (int i = 0; i < 200; ++i) {
      if (Done()) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return Done(); });
  }

 private:
  bool Done() const { return done_.load(std::memory_order_acquire) == count_; }

  const int64_t count_;
  const TwinfuseTask task_;
  void* const argument_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Threads of TensorFlow's pool sleep, so that to wake one takes tens of microseconds: what a core
// multiplies in 70.
constexpr int64_t kThreadWork = 4'000'000;

// What a kernel lends the core for one call. Lives on the stack of Compute.
class CoreCall {
 public:
  explicit CoreCall(tensorflow::OpKernelContext* op) : op_(op) {
    context_.opaque = this;
    context_.allocate = &Allocate;
    context_.device_index = op->device()->parsed_name().id;
    if (op->device()->device_type() == tensorflow::DEVICE_GPU) {
      context_.device = TWINFUSE_CUDA;
      context_.stream = op->op_device_context()->stream()->platform_specific_handle().stream;
      context_.precision = tsl::tensor_float_32_execution_enabled() ? TWINFUSE_PRECISION_TF32
                                                                    : TWINFUSE_PRECISION_IEEE;
      return;
    }
    context_.device = TWINFUSE_CPU;
    const auto* workers = op->device()->tensorflow_cpu_worker_threads();
    pool_ = workers->workers;
    context_.num_threads = workers->num_threads;
    context_.thread_work = kThreadWork;
    context_.parallel_for = workers->num_threads > 1 ? &ParallelFor : nullptr;
  }
  CoreCall(const CoreCall&) = delete;
  CoreCall& operator=(const CoreCall&) = delete;

  const TwinfuseContext* context() const { return &context_; }

  absl::Status Finish(TwinfuseStatus status) const {
    switch (status) {
      case TWINFUSE_OK:
        return absl::OkStatus();
      case TWINFUSE_INVALID_ARGUMENT:
        return absl::InvalidArgumentError(twinfuse_last_error());
      case TWINFUSE_UNSUPPORTED:
        return absl::UnimplementedError(twinfuse_last_error());
      case TWINFUSE_OUT_OF_MEMORY:
        return absl::ResourceExhaustedError(twinfuse_last_error());
      case TWINFUSE_DRIVER_ERROR:
        break;
    }
    return absl::InternalError(twinfuse_last_error());
  }

 private:
  static void ParallelFor(void* opaque, int64_t count, TwinfuseTask task, void* argument) {
    auto* call = static_cast<CoreCall*>(opaque);
    // Helpers that start late find no index left, but still touch the loop: they share it.
    auto loop = std::make_shared<ParallelLoop>(count, task, argument);
    const int64_t helpers = std::min<int64_t>(count, call->context_.num_threads) - 1;
    for (int64_t i = 0; i < helpers; ++i) {
      call->pool_->Schedule([loop] { loop->Work(); });
    }
    loop->Work();
    loop->Wait();
  }

  static void* Allocate(void* opaque, size_t bytes) {
    auto* call = static_cast<CoreCall*>(opaque);
    if (void* kept = call->kept_.Take(call->context_, bytes)) return kept;
    tensorflow::Tensor scratch;
    const tensorflow::TensorShape shape({static_cast<int64_t>(bytes)});
    if (!call->op_->allocate_temp(tensorflow::DT_UINT8, shape, &scratch).ok()) return nullptr;
    call->scratch_.push_back(scratch);
    return scratch.data();
  }

  tensorflow::OpKernelContext* op_;
  tsl::thread::ThreadPool* pool_ = nullptr;
  TwinfuseContext context_{};
  KeptScratch kept_;
  absl::InlinedVector<tensorflow::Tensor, 2> scratch_;
};

inline absl::Status Mismatch(absl::string_view op, absl::string_view argument,
                             absl::string_view expected, absl::string_view got) {
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": ", argument, ": expected ", expected, ", got ", got));
}

inline absl::Status Mismatch(absl::string_view op, absl::string_view argument,
                             absl::string_view expected, const tensorflow::TensorShape& got) {
  return Mismatch(op, argument, expected, got.DebugString());
}

// Base of this shim's kernels: refuses a core built from other headers, which could only crash.
class CoreOpKernel : public tensorflow::OpKernel {
 public:
  explicit CoreOpKernel(tensorflow::OpKernelConstruction* construction) : OpKernel(construction) {
    OP_REQUIRES(construction, twinfuse_abi_version() == TWINFUSE_ABI_VERSION,
                absl::FailedPreconditionError(
                    "twinfuse: the TensorFlow binding and libtwinfuse.so come from different "
                    "versions: reinstall twinfuse"));
  }

 protected:
  // Attributes that count optional tensors: a graph from elsewhere may hold any number.
  static absl::Status CheckOptional(tensorflow::OpKernelConstruction* construction,
                                    absl::string_view op,
                                    std::initializer_list<const char*> names) {
    for (const char* name : names) {
      int count = 0;
      TF_RETURN_IF_ERROR(construction->GetAttr(name, &count));
      if (count > 1) return Mismatch(op, name, "0 or 1", absl::StrCat(count));
    }
    return absl::OkStatus();
  }

  // Leaves `grad` null when the graph does not ask for this gradient.
  static absl::Status AllocateGrad(tensorflow::OpKernelContext* op, const char* name,
                                   const tensorflow::TensorShape& shape,
                                   tensorflow::Tensor** grad) {
    tensorflow::OpOutputList outputs;
    TF_RETURN_IF_ERROR(op->output_list(name, &outputs));
    return outputs.size() == 0 ? absl::OkStatus() : outputs.allocate(0, shape, grad);
  }
};

}  // namespace twinfuse

// The GPU kernels make the same call: the core knows what it has for a device and says so.
#define TWINFUSE_REGISTER_KERNEL(NAME, CLASS, T)                                            \
  REGISTER_KERNEL_BUILDER(Name(NAME).Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          CLASS);                                                           \
  REGISTER_KERNEL_BUILDER(Name(NAME).Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), CLASS);
#define TWINFUSE_REGISTER_KERNELS(NAME, CLASS)                \
  TWINFUSE_REGISTER_KERNEL(NAME, CLASS, float)                \
  TWINFUSE_REGISTER_KERNEL(NAME, CLASS, double)               \
  TWINFUSE_REGISTER_KERNEL(NAME, CLASS, tensorflow::bfloat16) \
  TWINFUSE_REGISTER_KERNEL(NAME, CLASS, Eigen::half)
