// Storage types and their conversion to the type that sums run in.
#pragma once

#include "cpu/simd.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Acc: the type sums run in. `load` and `store` convert one vector; the forms with a count touch
// only the first `n` elements.
template <class T>
struct Convert {
  using Acc = T;
  using S = Simd<T>;
  using V = typename S::V;
  static V load(const T* p) { return S::load(p); }
  static V load(const T* p, int n) { return S::load(p, n); }
  static void store(T* p, V x) { S::store(p, x); }
  static void store(T* p, V x, int n) { S::store(p, x, n); }
};

// Rounds to nearest even and keeps NaN a NaN.
inline uint16_t bf16_from_float(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float float_from_bf16(uint16_t bits) {
  uint32_t u = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

#if !defined(__F16C__)
inline float float_from_f16(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3ff, u;
  if (exponent == 0) {
    // Zero and denormals: an integer times 2^-24 is exact in float.
    float x = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  u = exponent == 31 ? sign | 0x7f800000 | (fraction << 13)
                     : sign | ((exponent + 112) << 23) | (fraction << 13);
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline uint16_t f16_from_float(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((u >> 13) & 0x1ff));
  if (u >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (u < 0x38800000) {
    // Adding 0.5 lines the last f16 bit up with the last float bit, so the sum rounds for us.
    float y;
    memcpy(&y, &u, 4);
    y += 0.5f;
    memcpy(&u, &y, 4);
    return static_cast<uint16_t>(sign | (u - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u - 0x38000000) >> 13));
}
#endif

// The 16-bit types: a vector of floats from as many halves. `Self` supplies the full-vector forms.
template <class T, class Self>
struct ConvertHalf {
  using Acc = float;
  using S = Simd<float>;
  using V = typename S::V;
  static V load(const T* p, int n) {
    T whole[S::kWidth] = {};
    memcpy(whole, p, n * sizeof(T));
    return Self::load(whole);
  }
  static void store(T* p, V x, int n) {
    T whole[S::kWidth];
    Self::store(whole, x);
    memcpy(p, whole, n * sizeof(T));
  }
};

template <>
struct Convert<Bf16> : ConvertHalf<Bf16, Convert<Bf16>> {
  using ConvertHalf::load;
  using ConvertHalf::store;
#if defined(__AVX512F__)
  static V load(const Bf16* p) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  // In integers rather than by vcvtneps2bf16, which turns denormals into zero.
  static void store(Bf16* p, V x) {
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u,
                             _mm512_set1_epi32(0x400000));
    __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  }
#else
  static V load(const Bf16* p) {
    float x[S::kWidth];
    for (int i = 0; i < S::kWidth; i++) x[i] = float_from_bf16(p[i].bits);
    return S::load(x);
  }
  static void store(Bf16* p, V v) {
    float x[S::kWidth];
    S::store(x, v);
    for (int i = 0; i < S::kWidth; i++) p[i].bits = bf16_from_float(x[i]);
  }
#endif
};

template <>
struct Convert<F16> : ConvertHalf<F16, Convert<F16>> {
  using ConvertHalf::load;
  using ConvertHalf::store;
#if defined(__AVX512F__)
  static V load(const F16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(F16* p, V x) {
    __m256i h = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  }
#elif defined(__F16C__)
  static V load(const F16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(F16* p, V x) {
    __m128i h = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
  }
#else
  static V load(const F16* p) {
    float x[S::kWidth];
    for (int i = 0; i < S::kWidth; i++) x[i] = float_from_f16(p[i].bits);
    return S::load(x);
  }
  static void store(F16* p, V v) {
    float x[S::kWidth];
    S::store(x, v);
    for (int i = 0; i < S::kWidth; i++) p[i].bits = f16_from_float(x[i]);
  }
#endif
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
