// Depthwise convolutions: every channel has a filter of its own, so there is no product of matrices
// in it. Vectors run over channels or, in the product, over the pixels of a row where those lie
// side by side.
#pragma once

#include <type_traits>

#include "cpu/epilogue.h"
#include "cpu/parallel.h"
#include "cpu/windows.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// One filter per channel.
inline bool is_depthwise(const Images& weight, int64_t groups) {
  return groups > 1 && weight.size[kChannel] == 1 && weight.size[0] == groups;
}

// Slabs of whole rows of windows, one at a time, in the type of the sums.
template <class T>
struct DepthwiseSlab {
  using Acc = typename Convert<T>::Acc;
  Source<T> source;
  Slab slab;

  DepthwiseSlab(const Images& image, const Images* mask, int32_t relu_grad, const Windows& rows,
                const Windows& columns, bool planar = false)
      : source(image_source<T>(image, mask, relu_grad)),
        slab(slab_of(image, mask, image.size[kChannel], rows, columns, !planar, false, planar,
                     false)) {
    slab.height = min64(rows.count, planar ? 32 : 8);
    while (slab.height > 1 && bytes() > kSlabBytes) slab.height /= 2;
  }
  // With room for the vectors that are read past the last window. There may be no taps at all.
  int64_t bytes() const {
    const int64_t elements = max64(slab.size(), 0) + Simd<Acc>::kWidth;
    return round_up(elements * static_cast<int64_t>(sizeof(Acc)), 64);
  }
  // In multiply-adds, of all windows of so many images.
  double work(int64_t images) const {
    const double elements = static_cast<double>(images * slab.channels) *
                            static_cast<double>(slab.rows.count * slab.columns.count);
    return elements * (kElementWork + static_cast<double>(slab.rows.taps * slab.columns.taps));
  }
};

// out[n, p, q, c] = epilogue(sum over taps of image(n, p, q, tap, c) * weight(c, tap)).
template <class T, class Epilogue>
class DepthwiseProduct {
  using Acc = typename Convert<T>::Acc;
  using S = Simd<Acc>;
  static constexpr int kWidth = S::kWidth, kAtOnce = 8;
  static constexpr int64_t kRun = MultiplyAdd<Acc>::kRun;
  // Shorter rows are copied faster pixel by pixel than line by line.
  static constexpr int64_t kWideRow = kWidth / 2;

 public:
  // The output starts at `offset`; `row` and `column` are its strides.
  DepthwiseProduct(const Images& image, const Images* mask, int32_t relu_grad, const Images& weight,
                   const Images& out, const Windows& rows, const Windows& columns, int64_t offset,
                   int64_t row, int64_t column)
      : image_(image, mask, relu_grad, rows, columns,
               column == 1 && out.stride[kChannel] != 1 && columns.count >= kWideRow),
        weight_(weight),
        out_(out),
        offset_(offset),
        row_(row),
        column_(column) {
    if (sizeof(T) == sizeof(Acc) && !mask && !image_.slab.planar && image.stride[kChannel] == 1 &&
        channels() % kWidth == 0)
      in_place_ = &image;
  }

  void set_bias(const void* bias, int64_t stride) {
    bias_ = static_cast<const T*>(bias), bias_stride_ = stride;
  }

  int64_t workers(const TwinfuseContext& context) const {
    return worth_waking(context, image_.work(out_.size[kBatch]), tasks());
  }
  int64_t bytes(const TwinfuseContext& context) const {
    return shared_bytes() + (in_place_ ? 0 : image_.bytes() * workers(context));
  }

  void run(const TwinfuseContext& context, char* space) const {
    const Windows &rows = image_.slab.rows, &columns = image_.slab.columns;
    if (tasks() == 0 || columns.count == 0 || channels() == 0) return;
    Acc* filters = reinterpret_cast<Acc*>(space);
    Acc* bias = filters + taps() * padded();
    int64_t* offsets = reinterpret_cast<int64_t*>(bias + padded());
    prepare(filters, bias, offsets);
    const int64_t workers = this->workers(context), blocks = ceil_div(rows.count, height());
    parallel_for(context, workers, [&](int64_t worker) {
      Acc* slab = reinterpret_cast<Acc*>(space + shared_bytes() + worker * image_.bytes());
      for (int64_t task = tasks() * worker / workers; task < tasks() * (worker + 1) / workers;
           task++) {
        const int64_t image = task / blocks, first = task % blocks * height();
        const int64_t count = min64(height(), rows.count - first);
        if (taps() && !in_place_) fill_slab(image_.slab, image_.source, image, first, count, slab);
        T* to = static_cast<T*>(out_.data) + offset_ + image * out_.stride[kBatch] + first * row_;
        if (in_place_)
          rows_of_image(image, first, to, count, filters, bias, offsets);
        else if (image_.slab.planar)
          planes(slab, to, count, filters, bias, offsets);
        else
          rows_of_pixels(slab, to, count, filters, bias, offsets);
      }
    });
  }

 private:
  int64_t channels() const { return image_.slab.channels; }
  int64_t padded() const { return round_up(channels(), kWidth); }
  int64_t taps() const { return image_.slab.rows.taps * image_.slab.columns.taps; }
  int64_t height() const { return image_.slab.height; }
  int64_t tasks() const { return out_.size[kBatch] * ceil_div(image_.slab.rows.count, height()); }
  int64_t shared_bytes() const {
    const int64_t numbers = (taps() + 1) * padded();
    return round_up(numbers * sizeof(Acc) + taps() * sizeof(int64_t), 64);
  }

  void prepare(Acc* filters, Acc* bias, int64_t* offsets) const {
    const Windows &rows = image_.slab.rows, &columns = image_.slab.columns;
    for (int64_t t = 0; t < taps(); t++) {
      const int64_t r = t / columns.taps, s = t % columns.taps;
      offsets[t] = in_place_ ? r * rows.dilation * in_place_->stride[kRow] +
                                   s * columns.dilation * in_place_->stride[kColumn]
                             : image_.slab.tap(0, r, s);
      const T* from = static_cast<const T*>(weight_.data) +
                      (rows.first_tap + r * rows.tap_step) * weight_.stride[kRow] +
                      (columns.first_tap + s * columns.tap_step) * weight_.stride[kColumn];
      fetch_run(from, weight_.stride[0], static_cast<const T*>(nullptr), 0, 0, channels(),
                filters + t * padded());
    }
    for (int64_t c = 0; c < padded(); c++) bias[c] = 0;
    if (bias_)
      fetch_run(bias_, bias_stride_, static_cast<const T*>(nullptr), 0, 0, channels(), bias);
  }

  // Calls `body` with the size and the beginning of each group of `n` neighbours. Enough of them at
  // once hide the latency of a sum; the last group goes over some a second time rather than be
  // smaller.
  template <class Body>
  static void in_groups(int64_t n, const Body& body) {
    auto groups_of = [&](auto size) {
      for (int64_t i = 0; i < n; i += size) body(size, min64(i, n - size));
    };
    if (n >= kAtOnce)
      groups_of(std::integral_constant<int, kAtOnce>());
    else if (n >= kAtOnce / 2)
      groups_of(std::integral_constant<int, kAtOnce / 2>());
    else
      groups_of(std::integral_constant<int, 1>());
  }

  // The taps of a window that lie inside of the image.
  struct Taps {
    Range rows, columns;
  };
  // As if they were those of a single row.
  Taps all_taps() const { return {{0, 1}, {0, taps()}}; }

  // Sums of `kCount` vectors of windows, `step` apart; `filter(t)` is that of a tap.
  template <int kCount, class Filter>
  void sum_taps(const Acc* from, int64_t step, const int64_t* offsets, const Taps& inside,
                const Filter& filter, typename S::V shift, typename S::V* sum) const {
    typename S::V run[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) sum[i] = run[i] = S::zero();
    int64_t end = kRun;
    for (int64_t r = inside.rows.begin; r < inside.rows.end; r++)
      for (int64_t s = inside.columns.begin; s < inside.columns.end; s++) {
        const int64_t t = r * image_.slab.columns.taps + s;
        for (; t >= end; end += kRun)
#pragma GCC unroll 8
          for (int i = 0; i < kCount; i++) sum[i] = S::add(sum[i], run[i]), run[i] = S::zero();
        const typename S::V factor = filter(t);
        const Acc* p = from + offsets[t];
#pragma GCC unroll 8
        for (int i = 0; i < kCount; i++) run[i] = S::fma(S::load(p + i * step), factor, run[i]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++)
      sum[i] = Epilogue::template apply<S>(S::add(sum[i], run[i]), shift);
  }

  // `count` rows of windows from `first` on, read where they lie. Those at the edges, one by one,
  // skip what is outside.
  void rows_of_image(int64_t image, int64_t first, T* out, int64_t count, const Acc* filters,
                     const Acc* bias, const int64_t* offsets) const {
    const Windows &rows = image_.slab.rows, &columns = image_.slab.columns;
    const int64_t *size = in_place_->size, *stride = in_place_->stride;
    const int64_t last = columns.origin + columns.span() - 1;
    const Range low = clip(columns.origin, columns.step, size[kColumn], {0, columns.count});
    const Range high = clip(last, columns.step, size[kColumn], {0, columns.count});
    const int64_t begin = min64(max64(low.begin, high.begin), columns.count);
    const int64_t end = max64(begin, min64(low.end, high.end));
    const Acc* data = reinterpret_cast<const Acc*>(in_place_->data) + image * stride[kBatch];
    for (int64_t p = first; p < first + count; p++, out += row_) {
      const int64_t y = rows.origin + p * rows.step;
      const Range tap_rows = clip(y, rows.dilation, size[kRow], {0, rows.taps});
      const bool whole_rows = tap_rows.end - tap_rows.begin == rows.taps;
      auto group = [&](auto n, int64_t q) {
        const int64_t x = columns.origin + q * columns.step;
        const bool whole = whole_rows && q >= begin && q < end;
        const Taps inside =
            whole ? all_taps()
                  : Taps{tap_rows, clip(x, columns.dilation, size[kColumn], {0, columns.taps})};
        pixels<n>(data + y * stride[kRow] + x * stride[kColumn], columns.step * stride[kColumn],
                  out + q * column_, filters, bias, offsets, inside);
      };
      const std::integral_constant<int, 1> one;
      for (int64_t q = 0; q < begin; q++) group(one, q);
      in_groups(end - begin, [&](auto n, int64_t q) { group(n, begin + q); });
      for (int64_t q = end; q < columns.count; q++) group(one, q);
    }
  }

  // Vectors of channels of `kCount` pixels.
  template <int kCount>
  void pixels(const Acc* from, int64_t step, T* to, const Acc* filters, const Acc* bias,
              const int64_t* offsets, const Taps& inside) const {
    for (int64_t c = 0; c < channels(); c += kWidth) {
      typename S::V sum[kCount];
      auto filter = [&](int64_t t) { return S::load(filters + t * padded() + c); };
      sum_taps<kCount>(from + c, step, offsets, inside, filter, S::load(bias + c), sum);
      store<kCount>(to + c * out_.stride[kChannel], sum,
                    static_cast<int>(min64(kWidth, channels() - c)));
    }
  }

  // `count` rows of windows in an interleaved slab: vectors of channels, groups of pixels.
  void rows_of_pixels(const Acc* slab, T* out, int64_t count, const Acc* filters, const Acc* bias,
                      const int64_t* offsets) const {
    const int64_t step = image_.slab.window_step();
    for (int64_t p = 0; p < count; p++)
      in_groups(image_.slab.columns.count, [&](auto size, int64_t q) {
        pixels<size>(slab + p * image_.slab.window_row() + q * step, step,
                     out + p * row_ + q * column_, filters, bias, offsets, all_taps());
      });
  }

  // `count` rows of windows in a planar slab: vectors of pixels, groups of rows.
  void planes(const Acc* slab, T* out, int64_t count, const Acc* filters, const Acc* bias,
              const int64_t* offsets) const {
    const int64_t pitch = image_.slab.window_row(), columns = image_.slab.columns.count;
    const int64_t plane = image_.slab.tap(1, 0, 0);
    for (int64_t c = 0; c < channels(); c++)
      in_groups(count, [&](auto size, int64_t p) {
        auto filter = [&](int64_t t) { return S::set(filters[t * padded() + c]); };
        for (int64_t q = 0; q < columns; q += kWidth) {
          typename S::V sum[size];
          sum_taps<size>(slab + c * plane + p * pitch + q, pitch, offsets, all_taps(), filter,
                         S::set(bias[c]), sum);
          T* to = out + c * out_.stride[kChannel] + p * row_ + q;
          const int pixels = static_cast<int>(min64(kWidth, columns - q));
          for (int i = 0; i < size; i++) {
            if (pixels == kWidth)
              Convert<T>::store(to + i * row_, sum[i]);
            else
              Convert<T>::store(to + i * row_, sum[i], pixels);
          }
        }
      });
  }

  template <int kCount>
  void store(T* to, const typename S::V* x, int count) const {
    if (out_.stride[kChannel] == 1) {
      for (int i = 0; i < kCount; i++) {
        if (count == kWidth)
          Convert<T>::store(to + i * column_, x[i]);
        else
          Convert<T>::store(to + i * column_, x[i], count);
      }
      return;
    }
    T each[kCount][kWidth];
    for (int i = 0; i < kCount; i++) Convert<T>::store(each[i], x[i]);
    for (int c = 0; c < count; c++)
      for (int i = 0; i < kCount; i++) to[c * out_.stride[kChannel] + i * column_] = each[i][c];
  }

  DepthwiseSlab<T> image_;
  const Images &weight_, &out_;
  int64_t offset_, row_, column_;
  const T* bias_ = nullptr;
  int64_t bias_stride_ = 0;
  const Images* in_place_ = nullptr;  // the image, if its windows are read where they lie
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
