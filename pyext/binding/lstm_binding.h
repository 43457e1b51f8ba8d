// What the bindings of the LSTM layer and cell share: optional tensors by number, and views of
// whole sequences.
#pragma once

#include <array>

#include "torch_binding.h"
#include "twinfuse/lstm.h"

namespace twinfuse {

inline int64_t PopInt(StableIValue value) { return torch::stable::detail::to<int64_t>(value); }
inline double PopDouble(StableIValue value) { return torch::stable::detail::to<double>(value); }

// The tensor arguments of a call in the order of its schema, with their views. An optional tensor
// that is None has none.
template <size_t kCount>
class Tensors {
 public:
  // Takes the first `kCount` values off the stack; bit i of `optional` says whether the schema has
  // argument i as `Tensor?`.
  Tensors(const char* op, const std::array<const char*, kCount>& names, uint32_t optional,
          const StableIValue* stack)
      : op_(op), optional_(optional) {
    for (size_t i = 0; i < kCount; ++i) {
      handles_[i] = optional >> i & 1 ? PopOptionalTensor(stack[i]) : PopTensor(stack[i]);
    }
    for (size_t i = 0; i < kCount; ++i) {
      if (handles_[i]) views_[i].emplace(names[i], handles_[i]);
    }
  }

  const View* operator[](size_t i) const { return views_[i] ? &*views_[i] : nullptr; }
  const Handle& handle(size_t i) const { return handles_[i]; }

  template <size_t kViews>
  std::array<const View*, kViews> Views(size_t first) const {
    std::array<const View*, kViews> views;
    for (size_t i = 0; i < kViews; ++i) views[i] = (*this)[first + i];
    return views;
  }

  void CheckRank(size_t i, int32_t rank, const char* expected) const {
    if (views_[i]) twinfuse::CheckRank(op_, *views_[i], views_[i]->ndim == rank, expected);
  }

  // Those of `except` may lie elsewhere.
  void CheckDevices(size_t first, size_t except = kCount) const {
    for (size_t i = 0; i < kCount; ++i) {
      if (i != except && views_[i]) CheckSameDevice(op_, *views_[first], *views_[i]);
    }
  }

  // References of its own for an operator that is called with the same tensors.
  void Share(StableIValue* stack) const {
    using torch::stable::detail::from;
    for (size_t i = 0; i < kCount; ++i) {
      if (!(optional_ >> i & 1)) {
        stack[i] = from(handles_[i].share());
      } else if (handles_[i]) {
        stack[i] = from(std::optional<torch::stable::Tensor>(handles_[i].share()));
      } else {
        stack[i] = from(std::optional<torch::stable::Tensor>());
      }
    }
  }

 private:
  const char* const op_;
  const uint32_t optional_;
  std::array<Handle, kCount> handles_;
  std::array<std::optional<View>, kCount> views_;
};

// A tensor as the core wants it: time first, and expanded to `sizes` where it has fewer dimensions
// or some of one element. Sizes and strides are its own.
class Sequence {
 public:
  // `sizes` are in the tensor's order, in which `batch_first` sequences have their batch in front.
  void Set(const char* op, const View& view, const std::vector<int64_t>& sizes, bool batch_first) {
    const auto ndim = static_cast<int32_t>(sizes.size());
    bool fits = view.ndim <= ndim;
    for (int32_t i = 0; fits && i < ndim; ++i) {
      const int32_t d = i - (ndim - view.ndim);
      const int64_t size = d < 0 ? 1 : view.sizes[d];
      fits = size == 1 || size == sizes[i];
      sizes_[i] = sizes[i];
      strides_[i] = size == sizes[i] && d >= 0 ? view.strides[d] : 0;
    }
    if (!fits) {
      throw std::runtime_error(std::string(op) + ": " + view.name +
                               ": expected what broadcasts to " + Shape(sizes.data(), ndim) +
                               ", got shape " + Shape(view.sizes, view.ndim));
    }
    if (batch_first) {
      std::swap(sizes_[0], sizes_[1]);
      std::swap(strides_[0], strides_[1]);
    }
    tensor_ = {view.data, view.dtype, ndim, sizes_, strides_};
  }

  // Leaves out what is behind the first `count` of the second dimension.
  void Narrow(int64_t count) { sizes_[1] = count; }

  // NULL before `Set`.
  const TwinfuseTensor* get() const { return tensor_.ndim != 0 ? &tensor_ : nullptr; }

 private:
  static constexpr int kRank = 3;
  int64_t sizes_[kRank] = {}, strides_[kRank] = {};
  TwinfuseTensor tensor_{};
};

// Rows of inputs, or of their gradients. A GPU multiplies those of all steps as one matrix, and its
// kernels ask for one stride from each row to the next, in the order of what is saved: this is a
// dense copy of a tensor that lies in memory otherwise. A CPU takes any strides.
class Rows {
 public:
  // `from` is what the view is of, if it holds something.
  Rows(const char* op, const View& view, const Handle* from) : view_(&view) {
    static const int32_t cuda = aoti_torch_device_type_cuda();
    if (view.device_type != cuda || view.ndim < 3 || view.sizes[0] <= 1 || view.sizes[1] <= 1 ||
        view.strides[0] == view.sizes[1] * view.strides[1]) {
      return;
    }
    copy_ = Empty(op, view.name, view, {view.sizes, view.sizes + view.ndim});
    if (from != nullptr) Copy(copy_, *from);
    view_ = &copied_.emplace(view.name, copy_, /*written=*/true);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  const View& view() const { return *view_; }

  // Puts what was computed into the tensor that this was made for.
  void Finish(const Handle& tensor) const {
    if (copy_) Copy(tensor, copy_);
  }

 private:
  static void Copy(const Handle& to, const Handle& from) {
    torch::stable::Tensor target = to.share();
    torch::stable::copy_(target, from.share());
  }

  Handle copy_;
  std::optional<View> copied_;
  const View* view_;
};

// The zoneouts and dropouts of a call.
class Noise {
 public:
  // hidden and cell of zoneout, input and hidden of dropout, in the order of the schema.
  using Views = std::array<const View*, 4>;

  void SetDropout(const char* op, const Views& views, int64_t batch, int64_t inputs,
                  int64_t outputs, bool packed) {
    SetDropout(op, views[2], &tensors_[2], batch, inputs, packed);
    SetDropout(op, views[3], &tensors_[3], batch, outputs, packed);
  }

  // `sizes` makes those of a tensor out of its last one.
  template <typename Sizes>
  void SetZoneout(const char* op, const Views& views, int64_t units, int64_t outputs,
                  const Sizes& sizes, bool batch_first) {
    if (views[0] != nullptr) tensors_[0].Set(op, *views[0], sizes(outputs), batch_first);
    if (views[1] != nullptr) tensors_[1].Set(op, *views[1], sizes(units), batch_first);
  }

  TwinfuseLstmNoise get() const {
    return {tensors_[0].get(), tensors_[1].get(), tensors_[2].get(), tensors_[3].get()};
  }

 private:
  // A tracer does not know how many sequences are packed, and draws for more.
  static void SetDropout(const char* op, const View* view, Sequence* tensor, int64_t batch,
                         int64_t width, bool packed) {
    if (view == nullptr) return;
    const int64_t given = view->ndim > 1 ? view->sizes[view->ndim - 2] : 1;
    tensor->Set(op, *view, {4, packed && given > batch ? given : batch, width}, false);
    tensor->Narrow(batch);
  }

  Sequence tensors_[4];
};

// A tensor that the call makes; empty, and pushed as an undefined one, unless it is wanted.
class Result {
 public:
  void Take(const char* name, Handle handle) {
    handle_ = std::move(handle);
    view_.emplace(name, handle_, /*written=*/true);
  }
  const View* view() const { return view_ ? &*view_ : nullptr; }
  const Handle& handle() const { return handle_; }
  StableIValue Release() {
    if (!handle_) handle_ = UndefinedTensor();
    return handle_.release();
  }

 private:
  Handle handle_;
  std::optional<View> view_;
};

// Runs the operator `name`, which Python defines by torch's own, instead of a kernel: with `first`,
// the same tensors and the numbers behind them. Leaves the first `pushed` of its results on the
// stack.
template <int kResults, int kOptions, size_t kCount>
void RunReference(const char* op, const char* name, StableIValue first,
                  const Tensors<kCount>& tensors, const StableIValue* options,
                  const std::string& reason, int pushed, StableIValue* stack) {
  OfferNative(op, reason);
  StableIValue call[1 + kCount + kOptions];
  call[0] = first;
  tensors.Share(call + 1);
  for (size_t i = 0; i < kOptions; ++i) call[1 + kCount + i] = options[i];
  if (torch_call_dispatcher(name, "", call, TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": torch's own operators refused the call");
  }
  // A call that torch refuses too is an error and no fall-back: hence the report comes last.
  std::array<Handle, kResults> results;
  for (int i = 0; i < kResults; ++i) results[i] = PopTensor(call[i]);
  ReportFallback(op, reason);
  for (int i = 0; i < pushed; ++i) stack[i] = results[i].release();
}

// Bits of `needs`, in the order in which gradients are returned. A cell has no `kNeedsHr`, and its
// peephole has that bit, its norm that of the peephole.
enum Needs {
  kNeedsInput = 1,
  kNeedsH = 2,
  kNeedsC = 4,
  kNeedsIh = 8,
  kNeedsHh = 16,
  kNeedsBias = 32,
  kNeedsHr = 64,
  kNeedsPeephole = 128,
  kNeedsNorm = 256
};

}  // namespace twinfuse
