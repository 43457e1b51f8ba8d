// Epilogues: what happens to a finished sum on its way to the output.
#pragma once

#include "cpu/engine.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Products that underflow may add up to -0, which becomes 0: whether zeros were added to it, as
// where they are not left out, must not show.
struct Identity {
  template <class S>
  static typename S::V apply(typename S::V sum, typename S::V) {
    return S::add(sum, S::zero());
  }
};

struct BiasRelu {
  template <class S>
  static typename S::V apply(typename S::V sum, typename S::V bias) {
    return S::relu(S::add(sum, bias));
  }
};

// Where a tile's sums go.
template <class T>
struct Destination {
  using Acc = typename Convert<T>::Acc;
  bool last;            // of the blocks of the reduced dimension
  Acc* partial;         // where sums wait for the next block; may be `out` itself
  int64_t partial_row;  // in elements, as below
  T* out;
  int64_t out_row;
  const Acc* bias;  // one per row, or whole vectors of columns
  bool bias_of_rows;
  int rows, cols;
};

// Takes up a tile's sums where the block before has left them.
template <class T>
void resume_tile(const Destination<T>& from, int vectors, typename Convert<T>::Acc* sums) {
  using S = Simd<typename Convert<T>::Acc>;
  constexpr int kWidth = S::kWidth;
  for (int i = 0; i < from.rows; i++)
    for (int v = 0; v * kWidth < from.cols; v++) {
      const int cols = from.cols - v * kWidth;
      const auto* p = from.partial + i * from.partial_row + v * kWidth;
      S::store(sums + (i * vectors + v) * kWidth, cols >= kWidth ? S::load(p) : S::load(p, cols));
    }
}

template <class T, class Epilogue, bool kLast>
void finish_tile(const Destination<T>& to, const typename Convert<T>::Acc* sums, int vectors) {
  using Acc = typename Convert<T>::Acc;
  using S = Simd<Acc>;
  constexpr int kWidth = S::kWidth;
  for (int v = 0; v * kWidth < to.cols; v++) {
    const int cols = to.cols - v * kWidth;
    const typename S::V col_bias = to.bias_of_rows ? S::zero() : S::load(to.bias + v * kWidth);
    const Acc* sum = sums + v * kWidth;
    Acc* partial = to.partial + v * kWidth;
    T* out = to.out + v * kWidth;
    auto each_row = [&](auto store_partial, auto store_out) {
      for (int i = 0; i < to.rows; i++) {
        const typename S::V x = S::load(sum);
        if (kLast)
          store_out(
              out, Epilogue::template apply<S>(x, to.bias_of_rows ? S::set(to.bias[i]) : col_bias));
        else
          store_partial(partial, x);
        sum += vectors * kWidth;
        partial += to.partial_row;
        out += to.out_row;
      }
    };
    using V = typename S::V;
    if (cols >= kWidth)
      each_row([](Acc* p, V x) { S::store(p, x); }, [](T* p, V x) { Convert<T>::store(p, x); });
    else
      each_row([=](Acc* p, V x) { S::store(p, x, cols); },
               [=](T* p, V x) { Convert<T>::store(p, x, cols); });
  }
}

// Leaves a tile's sums for the next block, or after the last one applies the epilogue and converts.
// `sums` has `vectors` vectors per row, and a vector may be read behind
// the last one.
template <class T, class Epilogue>
void finish_tile(const Destination<T>& to, const typename Convert<T>::Acc* sums, int vectors) {
  to.last ? finish_tile<T, Epilogue, true>(to, sums, vectors)
          : finish_tile<T, Epilogue, false>(to, sums, vectors);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
