// Epilogues: what happens to a finished sum on its way to the output.
#pragma once

#include "cpu/engine.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

struct Identity {
  template <class S>
  static typename S::V apply(typename S::V sum, typename S::V) {
    return sum;
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
  bool first, last;     // of the blocks of the reduced dimension
  Acc* partial;         // sums of the blocks before; may be `out` itself
  int64_t partial_row;  // in elements, as below
  T* out;
  int64_t out_row;
  const Acc* bias;  // one per row, or whole vectors of columns
  bool bias_of_rows;
  int rows, cols;
};

template <class T, class Epilogue, bool kFirst, bool kLast>
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
    auto each_row = [&](auto load, auto store_partial, auto store_out) {
      for (int i = 0; i < to.rows; i++) {
        typename S::V x = S::load(sum);
        if (!kFirst) x = S::add(load(partial), x);
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
      each_row([](const Acc* p) { return S::load(p); }, [](Acc* p, V x) { S::store(p, x); },
               [](T* p, V x) { Convert<T>::store(p, x); });
    else
      each_row([=](const Acc* p) { return S::load(p, cols); },
               [=](Acc* p, V x) { S::store(p, x, cols); },
               [=](T* p, V x) { Convert<T>::store(p, x, cols); });
  }
}

// Adds a tile's sums over one block to those of the blocks before, and after the last block applies
// the epilogue and converts. `sums` has `vectors` vectors per row, and a vector may be read behind
// the last one.
template <class T, class Epilogue>
void finish_tile(const Destination<T>& to, const typename Convert<T>::Acc* sums, int vectors) {
  if (to.first)
    to.last ? finish_tile<T, Epilogue, true, true>(to, sums, vectors)
            : finish_tile<T, Epilogue, true, false>(to, sums, vectors);
  else
    to.last ? finish_tile<T, Epilogue, false, true>(to, sums, vectors)
            : finish_tile<T, Epilogue, false, false>(to, sums, vectors);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
