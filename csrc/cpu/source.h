// Gathers: where the main loop's operands come from.
//
// A `Source` is a matrix seen along one "inner" dimension, the one that packing walks. Masking by
// ReLU's output and widening to the type of the sums happen while it is read. A dense source has
// one stride per dimension; any other has a `Gather` (cpu/gather.h).
#pragma once

#include <type_traits>

#include "cpu/convert.h"
#include "cpu/gather.h"
#include "twinfuse/linear_relu.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class T>
struct Source {
  const T* data;
  int64_t outer, inner;  // strides in elements; unused with a gather
  const T* mask;         // ReLU's output, nullptr for none
  int64_t mask_outer, mask_inner;
  int32_t relu_grad;
  const Gather* gather;

  // Its elements may be used where they lie, line by line.
  bool plain() const { return !gather && !mask && inner == 1; }
};

// How a source is masked, fixed at compile time inside the loops.
enum class Mask { kNone, kSelect, kMultiply };

// Calls `body` with it.
template <class T, class Body>
void with_mask(const T* mask, int32_t relu_grad, const Body& body) {
  if (!mask)
    body(std::integral_constant<Mask, Mask::kNone>());
  else if (relu_grad == TWINFUSE_RELU_GRAD_MULTIPLY)
    body(std::integral_constant<Mask, Mask::kMultiply>());
  else
    body(std::integral_constant<Mask, Mask::kSelect>());
}

template <Mask kMask, class S>
typename S::V masked(typename S::V x, typename S::V y) {
  if constexpr (kMask == Mask::kNone) return x;
  return kMask == Mask::kSelect ? S::select_grad(x, y) : S::multiply_grad(x, y);
}

// The first `n` elements, or a whole vector.
template <Mask kMask, class T>
typename Convert<T>::V load_masked(const T* p, const T* m, int64_t n) {
  using C = Convert<T>;
  const int rest = static_cast<int>(n);
  const bool whole = n >= C::S::kWidth;
  typename C::V x = whole ? C::load(p) : C::load(p, rest);
  if constexpr (kMask == Mask::kNone) return x;
#if defined(__AVX512F__)
  // Else the compiler makes it a load under the mask, which waits for that of the mask.
  __asm__("" : "+v"(x));
#endif
  return masked<kMask, typename C::S>(x, whole ? C::load(m) : C::load(m, rest));
}

template <Mask kMask, class T, class P>
void fetch_dense(const T* p, const T* m, int64_t n, P* out) {
  constexpr int64_t kWidth = Convert<T>::S::kWidth;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    Convert<P>::store(out + i, load_masked<kMask>(p + i, m + i, kWidth));
  if (i < n)
    Convert<P>::store(out + i, load_masked<kMask>(p + i, m + i, n - i), static_cast<int>(n - i));
}

// `n` elements from `p` on, `stride` apart, masked by those of `m` (nullptr for none). `out` is of
// the storage type or of the type of the sums.
template <class T, class P>
void fetch_run(const T* p, int64_t stride, const T* m, int64_t mask_stride, int32_t relu_grad,
               int64_t n, P* out) {
  constexpr int64_t kPiece = 64;
  auto dense = [&](const T* from, const T* mask, int64_t count, P* to) {
    with_mask(mask, relu_grad,
              [&](auto kind) { fetch_dense<decltype(kind)::value>(from, mask, count, to); });
  };
  if (stride == 1 && (!m || mask_stride == 1)) return dense(p, m, n, out);
  T piece[kPiece], mask[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = n - i < kPiece ? n - i : kPiece;
    for (int64_t k = 0; k < count; k++) piece[k] = p[(i + k) * stride];
    for (int64_t k = 0; m && k < count; k++) mask[k] = m[(i + k) * mask_stride];
    dense(piece, m ? mask : nullptr, count, out + i);
  }
}

// The lines of a source from `outer` on, one after another.
template <class T>
class Lines {
 public:
  Lines(const Source<T>& source, int64_t outer) : s_(source) {
    if (s_.gather)
      cursor_.start(s_.gather->outer, outer, s_.gather->origin);
    else
      at_ = {outer * s_.outer, outer * s_.mask_outer, 0, 0};
  }

  void next() {
    if (s_.gather)
      cursor_.advance(s_.gather->outer, 1);
    else
      at_.offset += s_.outer, at_.mask += s_.mask_outer;
  }

  // Asks for the elements of a line to come: lines of a tensor lie too far apart for the processor
  // to foresee the next one.
  void prefetch(int64_t inner, int64_t n) const {
    constexpr int64_t kBytes = 4096;
    const int64_t ahead = 3 + kBytes / (n * static_cast<int64_t>(sizeof(T)) + 256);
    if (s_.gather) {
      if (s_.gather->inner.single())
        ask(s_.gather->outer.digits[kDigits - 1], s_.gather->inner.digits[kDigits - 1], ahead,
            inner, n);
    } else {
      ask({1, s_.outer, s_.mask_outer}, {1, s_.inner, s_.mask_inner}, ahead, inner, n);
    }
  }

  // The line's elements from `inner` on where they lie, or nullptr if they do not lie side by side
  // or are not all used as they are.
  const T* in_place(int64_t inner) const {
    if (s_.mask) return nullptr;
    if (!s_.gather) return s_.inner == 1 ? s_.data + at_.offset + inner : nullptr;
    const Axis& axis = s_.gather->inner;
    if (!axis.single() || axis.stride() != 1 || !s_.gather->covers(cursor_.at)) return nullptr;
    return s_.data + cursor_.at.offset + inner;
  }

  // Writes elements [inner, inner + n) of the line.
  template <class P>
  void fetch(int64_t inner, int64_t n, P* out) const {
    if (s_.gather) return gather(inner, n, out);
    const T* m = s_.mask ? s_.mask + at_.mask + inner * s_.mask_inner : nullptr;
    fetch_run(s_.data + at_.offset + inner * s_.inner, s_.inner, m, s_.mask_inner, s_.relu_grad, n,
              out);
  }

 private:
  void ask(const Digit& outer, const Digit& digit, int64_t ahead, int64_t inner, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* p = s_.data + at().offset + ahead * outer.stride + inner;
    const T* m = s_.mask + at().mask + ahead * outer.mask + inner;
    for (int64_t i = 0; digit.stride == 1 && i < n; i += kLine) __builtin_prefetch(p + i);
    for (int64_t i = 0; s_.mask && digit.mask == 1 && i < n; i += kLine) __builtin_prefetch(m + i);
  }

  const Position& at() const { return s_.gather ? cursor_.at : at_; }

  template <class P>
  void gather(int64_t inner, int64_t n, P* out) const {
    const Gather& g = *s_.gather;
    const Digit& digit = g.inner.digits[kDigits - 1];
    const bool clipped = !g.covers(cursor_.at);
    Cursor run;
    run.start(g.inner, inner, cursor_.at);
    while (n > 0) {
      const int64_t count = n < run.left(g.inner) ? n : run.left(g.inner);
      Range range{0, count};
      if (clipped) {
        range = clip(run.at.y, digit.y, g.y_limit, range);
        range = clip(run.at.x, digit.x, g.x_limit, range);
      }
      if (range.begin > 0) memset(static_cast<void*>(out), 0, range.begin * sizeof(P));
      if (range.end < count)
        memset(static_cast<void*>(out + range.end), 0, (count - range.end) * sizeof(P));
      const T* m = s_.mask ? s_.mask + run.at.mask + range.begin * digit.mask : nullptr;
      fetch_run(s_.data + run.at.offset + range.begin * digit.stride, digit.stride, m, digit.mask,
                s_.relu_grad, range.end - range.begin, out + range.begin);
      out += count;
      n -= count;
      run.advance(g.inner, count);
    }
  }

  const Source<T>& s_;
  Position at_{};
  Cursor cursor_{};
};

template <class T, class P>
void fetch(const Source<T>& source, int64_t outer, int64_t inner, int64_t n, P* out) {
  Lines<T>(source, outer).fetch(inner, n, out);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
