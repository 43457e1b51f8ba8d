// Gathers: where the main loop's operands come from.
//
// A `Source` is a matrix seen along one "inner" dimension, the one that packing walks. Masking by
// ReLU's output and widening to the type of the sums happen while it is read.
#pragma once

#include "cpu/convert.h"
#include "twinfuse/linear_relu.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
struct Source {
  const T* data;
  int64_t outer, inner;  // strides in elements
  const T* mask;         // ReLU's output, nullptr for none
  int64_t mask_outer, mask_inner;
  int32_t relu_grad;
};

// How a source is masked, fixed at compile time inside the loops.
enum class Mask { kNone, kSelect, kMultiply };

template <Mask kMask, class T, class P>
void fetch_dense(const T* p, const T* m, int64_t n, P* out) {
  using C = Convert<T>;
  using S = Simd<typename C::Acc>;
  auto masked = [](typename S::V x, typename S::V y) {
    return kMask == Mask::kSelect ? S::select_grad(x, y) : S::multiply_grad(x, y);
  };
  int64_t i = 0;
  for (; i + S::kWidth <= n; i += S::kWidth) {
    typename S::V x = C::load(p + i);
    if constexpr (kMask != Mask::kNone) x = masked(x, C::load(m + i));
    Convert<P>::store(out + i, x);
  }
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  typename S::V x = C::load(p + i, rest);
  if constexpr (kMask != Mask::kNone) x = masked(x, C::load(m + i, rest));
  Convert<P>::store(out + i, x, rest);
}

// Writes elements [inner, inner + n) of row `outer` to `out`, which is of the storage type or of
// the type of the sums.
template <class T, class P>
void fetch(const Source<T>& s, int64_t outer, int64_t inner, int64_t n, P* out) {
  constexpr int64_t kPiece = 64;
  const T* p = s.data + outer * s.outer + inner * s.inner;
  const T* m = s.mask ? s.mask + outer * s.mask_outer + inner * s.mask_inner : nullptr;
  auto dense = [&](const T* from, const T* mask, int64_t count, P* to) {
    if (!mask)
      fetch_dense<Mask::kNone>(from, mask, count, to);
    else if (s.relu_grad == TWINFUSE_RELU_GRAD_MULTIPLY)
      fetch_dense<Mask::kMultiply>(from, mask, count, to);
    else
      fetch_dense<Mask::kSelect>(from, mask, count, to);
  };
  if (s.inner == 1 && (!m || s.mask_inner == 1)) return dense(p, m, n, out);
  T piece[kPiece], mask[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = n - i < kPiece ? n - i : kPiece;
    for (int64_t k = 0; k < count; k++) piece[k] = p[(i + k) * s.inner];
    for (int64_t k = 0; m && k < count; k++) mask[k] = m[(i + k) * s.mask_inner];
    dense(piece, m ? mask : nullptr, count, out + i);
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
