// The gradient of the weight of a depthwise convolution: a sum over windows for every channel and
// tap.
#pragma once

#include "cpu/depthwise.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Calls `body` with the size and the first of each group of taps: enough sums at once to hide the
// latency of one, and no more than the registers hold.
template <class Body>
void in_tap_groups(int64_t taps, const Body& body) {
  int64_t t = 0;
  auto groups_of = [&](auto size) {
    for (; t + size <= taps; t += size) body(size, t);
  };
  groups_of(std::integral_constant<int, 10>());
  groups_of(std::integral_constant<int, 9>());
  groups_of(std::integral_constant<int, 5>());
  groups_of(std::integral_constant<int, 3>());
  groups_of(std::integral_constant<int, 1>());
}

// Sums run over stretches of a row of windows, then over rows, then
// over images; images are cut into splits, by their number alone.
template <class T>
class DepthwiseGradWeight {
  using Acc = typename Convert<T>::Acc;
  using S = Simd<Acc>;
  static constexpr int kWidth = S::kWidth;
  static constexpr int64_t kRun = MultiplyAdd<Acc>::kRun, kMostSplits = 16;

 public:
  DepthwiseGradWeight(const Images& input, const Images& grad, const Images& output,
                      int32_t relu_grad, const Images& weight, const Windows& rows,
                      const Windows& columns)
      : input_(input, nullptr, 0, rows, columns),
        grad_(grad, &output, relu_grad, {rows.count, 1, 0, 1, 1, 0, 1},
              {columns.count, 1, 0, 1, 1, 0, 1}),
        weight_(weight),
        images_(grad.size[kBatch]) {
    grad_.slab.height = input_.slab.height;
  }

  int64_t workers(const TwinfuseContext& context) const {
    return worth_waking(context, input_.work(images_), splits());
  }
  int64_t bytes(const TwinfuseContext& context) const {
    return offset_bytes() + sum_bytes() * splits() + slab_bytes() * workers(context);
  }

  void run(const TwinfuseContext& context, char* space) const {
    if (channels() == 0) return;
    const int64_t workers = this->workers(context), per_row = input_.slab.columns.taps;
    int64_t* offsets = reinterpret_cast<int64_t*>(space);
    for (int64_t t = 0; t < taps(); t++) offsets[t] = input_.slab.tap(0, t / per_row, t % per_row);
    space += offset_bytes();
    char* slabs = space + sum_bytes() * splits();
    parallel_for(context, workers, [&](int64_t worker) {
      Acc* input = reinterpret_cast<Acc*>(slabs + worker * slab_bytes());
      Acc* grad = reinterpret_cast<Acc*>(slabs + worker * slab_bytes() + input_.bytes());
      for (int64_t split = worker; split < splits(); split += workers)
        sum_split(split, offsets, sums(space, split), input, grad);
    });
    DefaultFloatMode mode;
    Acc* all = sums(space, 0);
    for (int64_t split = 1; split < splits(); split++) add(all, sums(space, split));
    write(all);
  }

 private:
  int64_t channels() const { return grad_.slab.channels; }
  int64_t padded() const { return round_up(channels(), kWidth); }
  int64_t taps() const { return input_.slab.rows.taps * input_.slab.columns.taps; }
  int64_t splits() const { return max64(1, min64(images_, kMostSplits)); }
  int64_t numbers() const { return taps() * padded(); }
  int64_t sum_bytes() const { return round_up(numbers() * static_cast<int64_t>(sizeof(Acc)), 64); }
  int64_t offset_bytes() const {
    return round_up(taps() * static_cast<int64_t>(sizeof(int64_t)), 64);
  }
  int64_t slab_bytes() const { return input_.bytes() + grad_.bytes(); }
  Acc* sums(char* space, int64_t split) const {
    return reinterpret_cast<Acc*>(space + split * sum_bytes());
  }

  void add(Acc* to, const Acc* from) const {
    for (int64_t i = 0; i < numbers(); i += kWidth)
      S::store(to + i, S::add(S::load(to + i), S::load(from + i)));
  }

  void sum_split(int64_t split, const int64_t* offsets, Acc* sums, Acc* input, Acc* grad) const {
    const int64_t rows = grad_.slab.rows.count, height = grad_.slab.height;
    for (int64_t i = 0; i < numbers(); i += kWidth) S::store(sums + i, S::zero());
    for (int64_t n = images_ * split / splits(); n < images_ * (split + 1) / splits(); n++)
      for (int64_t first = 0; first < rows; first += height) {
        const int64_t count = min64(height, rows - first);
        fill_slab(grad_.slab, grad_.source, n, first, count, grad);
        fill_slab(input_.slab, input_.source, n, first, count, input);
        for (int64_t p = 0; p < count; p++)
          sum_row(input + p * input_.slab.window_row(), grad + p * grad_.slab.window_row(), offsets,
                  sums);
      }
  }

  void sum_row(const Acc* input, const Acc* grad, const int64_t* offsets, Acc* sums) const {
    const int64_t columns = grad_.slab.columns.count;
    for (int64_t q = 0; q < columns; q += kRun) {
      const int64_t count = min64(kRun, columns - q);
      const Acc* g = grad + q * grad_.slab.window_step();
      const Acc* x = input + q * input_.slab.window_step();
      for (int64_t c = 0; c < channels(); c += kWidth) {
        in_tap_groups(taps(), [&](auto size, int64_t t) {
          sum_taps<size>(x + c, g + c, count, offsets + t, sums + t * padded() + c);
        });
      }
    }
  }

  template <int kCount>
  void sum_taps(const Acc* input, const Acc* grad, int64_t pixels, const int64_t* offsets,
                Acc* sums) const {
    const int64_t step = input_.slab.window_step(), grad_step = grad_.slab.window_step();
    const Acc* from[kCount];
    for (int i = 0; i < kCount; i++) from[i] = input + offsets[i];
    typename S::V sum[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) sum[i] = S::zero();
    for (int64_t q = 0; q < pixels; q++) {
      const typename S::V g = S::load(grad + q * grad_step);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; i++) sum[i] = S::fma(S::load(from[i] + q * step), g, sum[i]);
    }
    for (int i = 0; i < kCount; i++) {
      Acc* to = sums + i * padded();
      S::store(to, S::add(S::load(to), sum[i]));
    }
  }

  void write(const Acc* sums) const {
    const int64_t per_row = input_.slab.columns.taps;
    for (int64_t t = 0; t < taps(); t++)
      for (int64_t c = 0; c < channels(); c++) {
        T* to = static_cast<T*>(weight_.data) + c * weight_.stride[0] +
                t / per_row * weight_.stride[kRow] + t % per_row * weight_.stride[kColumn];
        Convert<T>::store(to, S::load(sums + t * padded() + c, 1), 1);
      }
  }

  DepthwiseSlab<T> input_, grad_;
  const Images& weight_;
  int64_t images_;
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
