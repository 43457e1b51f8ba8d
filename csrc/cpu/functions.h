// Elementary functions on vectors, and the activations made of them. Errors are below two and a
// half units in the last place; NaN stays NaN. Sigmoids below the smallest normal number may be
// zero.
#pragma once

#include "cpu/simd.h"
#include "twinfuse/lstm.h"

// The processor overlaps what several functions wait for only where it sees them together.
#define TWINFUSE_INLINE __attribute__((always_inline)) inline

namespace twinfuse::cpu::TWINFUSE_ISA {

template <class A>
struct ExpConstants;

// Adding `shifter` leaves an integer in the lowest bits of the mantissa. `ln2_high` has so few bits
// that its products with exponents are exact.
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLeast = -87.0f, kMost = 88.0f;
  static constexpr float kShifter = 12582912.0f, kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kTerms = 7;
};

template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLeast = -708.0, kMost = 709.0;
  static constexpr double kShifter = 6755399441055744.0, kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kTerms = 13;
};

// exp(x) = scale * (1 + fraction), for x between kLeast and kMost or the nearer of the two.
template <class A>
struct Exp {
  using S = Simd<A>;
  using V = typename S::V;
  using C = ExpConstants<A>;
  typedef typename C::Int Ints __attribute__((vector_size(sizeof(V))));

  V scale, fraction;

  TWINFUSE_INLINE explicit Exp(V x) {
    x = S::max(S::set(C::kLeast), S::min(S::set(C::kMost), x));
    const V shifted = S::fma(x, S::set(C::kLog2e), S::set(C::kShifter));
    const V n = shifted - S::set(C::kShifter);
    V r = S::fma(n, S::set(-C::kLn2High), x);
    r = S::fma(n, S::set(-C::kLn2Low), r);
    // r + r^2 / 2! + r^3 / 3! + ...
    A term = 1;
    for (int k = 2; k <= C::kTerms; k++) term /= static_cast<A>(k);
    V sum = S::set(term);
#pragma GCC unroll 16
    for (int k = C::kTerms; k > 2; k--) {
      term *= static_cast<A>(k);
      sum = S::fma(sum, r, S::set(term));
    }
    fraction = S::fma(sum * r, r, r);
    const Ints bits = (Ints)shifted - (Ints)S::set(C::kShifter);
    scale = (V)((bits + C::kBias) << C::kMantissa);
  }

  // exp + x and x - exp, rounded once where scale is exact beside x.
  TWINFUSE_INLINE V plus(A x) const { return S::fma(scale, fraction, scale + S::set(x)); }
  TWINFUSE_INLINE V from(A x) const { return S::fma(-scale, fraction, S::set(x) - scale); }
};

template <class A>
TWINFUSE_INLINE typename Simd<A>::V sigmoid(typename Simd<A>::V x) {
  using S = Simd<A>;
  const auto y = S::set(1) / Exp<A>(-x).plus(1);
  return x < S::set(-ExpConstants<A>::kMost) ? S::zero() : y;
}

template <class A>
TWINFUSE_INLINE typename Simd<A>::V tanh(typename Simd<A>::V x) {
  using E = Exp<A>;
  typedef typename E::Ints Ints;
  const Ints sign = (Ints)x & (Ints)Simd<A>::set(static_cast<A>(-0.0));
  const E e(Simd<A>::set(-2) * (typename E::V)((Ints)x ^ sign));
  return (typename E::V)((Ints)(e.from(1) / e.plus(1)) | sign);
}

// `kind` is a TwinfuseActivation.
template <class A>
typename Simd<A>::V activate(int32_t kind, typename Simd<A>::V x) {
  using S = Simd<A>;
  switch (kind) {
    case TWINFUSE_TANH:
      return tanh<A>(x);
    case TWINFUSE_SIGMOID:
      return sigmoid<A>(x);
    case TWINFUSE_RELU:
      return S::relu(x);
    default:
      break;
  }
  const auto one = S::set(1), zero = S::zero();
  const auto y = S::fma(x, S::set(static_cast<A>(1) / 6), S::set(static_cast<A>(0.5)));
  return S::min(one, S::max(zero, y));
}

// The derivative where the activation has the value `y`.
template <class A>
typename Simd<A>::V activation_slope(int32_t kind, typename Simd<A>::V y) {
  using S = Simd<A>;
  const auto one = S::set(1), zero = S::zero();
  switch (kind) {
    case TWINFUSE_TANH:
      return S::fma(-y, y, one);
    case TWINFUSE_SIGMOID:
      return S::fma(-y, y, y);
    case TWINFUSE_RELU:
      return S::select_grad(one, y);
    default:
      return (y > zero) & (y < one) ? S::set(static_cast<A>(1) / 6) : zero;
  }
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
