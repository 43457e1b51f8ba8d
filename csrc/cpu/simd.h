// Vectors of float and double for the instruction set this file is compiled for.
//
// Everything below lives in a namespace named after the instruction set: the same sources are
// compiled once per set, and the linker must never merge two of them. For the same reason these
// files use no inline function of the standard library.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
// GCC 12 warns of the undefined operands inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace twinfuse::cpu::TWINFUSE_ISA {

// select_grad and multiply_grad are the two rules of TwinfuseReluGrad. The latter adds zero, so
// that masked elements are +0 under both, and relu(x) = select_grad(x, x). min and max are `b`
// where either is NaN.
template <class T>
struct Simd;

#if defined(__AVX512F__)

constexpr int kRegisters = 32;

template <>
struct Simd<float> {
  using V = __m512;
  static constexpr int kWidth = 16;
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static V zero() { return _mm512_setzero_ps(); }
  static V set(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  // Elements p[0], p[2], ..., and nothing behind the last of them.
  static V load_even(const float* p) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(load(p), at, load(p + 15));
  }
  static void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, V x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V relu(V x) { return select_grad(x, x); }
  static V select_grad(V grad, V y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), grad);
  }
  static V multiply_grad(V grad, V y) {
    V one = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_GT_OQ), set(1.0f));
    return _mm512_fmadd_ps(grad, one, zero());
  }
  // Puts the 16 bytes at `p` into lane group `group` of `x`, on the load ports.
  static V insert(V x, int group, const char* p) {
    return _mm512_mask_broadcast_f32x4(x, static_cast<__mmask16>(0xf << 4 * group),
                                       _mm_loadu_ps(reinterpret_cast<const float*>(p)));
  }
  // r[i] holds four columns of rows i, i + 4, i + 8, ...; out[c] holds column c of all rows.
  static void transpose_lanes(const V r[4], V out[4]) {
    __m512d lo0 = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
    __m512d lo1 = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    __m512d hi0 = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    __m512d hi1 = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
  }
};

template <>
struct Simd<double> {
  using V = __m512d;
  static constexpr int kWidth = 8;
  static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1); }
  static V zero() { return _mm512_setzero_pd(); }
  static V set(double x) { return _mm512_set1_pd(x); }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V load(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static V load_even(const double* p) {
    return _mm512_permutex2var_pd(load(p), _mm512_setr_epi64(0, 2, 4, 6, 9, 11, 13, 15),
                                  load(p + 7));
  }
  static void store(double* p, V x) { _mm512_storeu_pd(p, x); }
  static void store(double* p, V x, int n) { _mm512_mask_storeu_pd(p, first(n), x); }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static V min(V a, V b) { return _mm512_min_pd(a, b); }
  static V max(V a, V b) { return _mm512_max_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static V relu(V x) { return select_grad(x, x); }
  static V select_grad(V grad, V y) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y, zero(), _CMP_NLE_UQ), grad);
  }
  static V multiply_grad(V grad, V y) {
    V one = _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y, zero(), _CMP_GT_OQ), set(1.0));
    return _mm512_fmadd_pd(grad, one, zero());
  }
  static V insert(V x, int group, const char* p) {
    return _mm512_mask_broadcast_f64x2(x, static_cast<__mmask8>(3 << 2 * group),
                                       _mm_loadu_pd(reinterpret_cast<const double*>(p)));
  }
  static void transpose_lanes(const V r[2], V out[2]) {
    out[0] = _mm512_unpacklo_pd(r[0], r[1]);
    out[1] = _mm512_unpackhi_pd(r[0], r[1]);
  }
};

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kRegisters = 16;

template <>
struct Simd<float> {
  using V = __m256;
  static constexpr int kWidth = 8;
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static V zero() { return _mm256_setzero_ps(); }
  static V set(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static V load_even(const float* p) {
    const V pairs = _mm256_shuffle_ps(load(p), load(p + 7), _MM_SHUFFLE(3, 1, 2, 0));
    return _mm256_castpd_ps(
        _mm256_permute4x64_pd(_mm256_castps_pd(pairs), _MM_SHUFFLE(3, 1, 2, 0)));
  }
  static void store(float* p, V x) { _mm256_storeu_ps(p, x); }
  static void store(float* p, V x, int n) { _mm256_maskstore_ps(p, first(n), x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V relu(V x) { return select_grad(x, x); }
  static V select_grad(V grad, V y) {
    return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_NLE_UQ), grad);
  }
  static V multiply_grad(V grad, V y) {
    V one = _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_GT_OQ), set(1.0f));
    return _mm256_fmadd_ps(grad, one, zero());
  }
  static V insert(V x, int group, const char* p) {
    __m128 piece = _mm_loadu_ps(reinterpret_cast<const float*>(p));
    return group ? _mm256_insertf128_ps(x, piece, 1) : _mm256_castps128_ps256(piece);
  }
  static void transpose_lanes(const V r[4], V out[4]) {
    __m256d lo0 = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1]));
    __m256d lo1 = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    __m256d hi0 = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    __m256d hi1 = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo0, lo1));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo0, lo1));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(hi0, hi1));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(hi0, hi1));
  }
};

template <>
struct Simd<double> {
  using V = __m256d;
  static constexpr int kWidth = 4;
  static __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static V zero() { return _mm256_setzero_pd(); }
  static V set(double x) { return _mm256_set1_pd(x); }
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V load(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  static V load_even(const double* p) {
    return _mm256_permute4x64_pd(_mm256_shuffle_pd(load(p), load(p + 3), 10),
                                 _MM_SHUFFLE(3, 1, 2, 0));
  }
  static void store(double* p, V x) { _mm256_storeu_pd(p, x); }
  static void store(double* p, V x, int n) { _mm256_maskstore_pd(p, first(n), x); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static V min(V a, V b) { return _mm256_min_pd(a, b); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static V relu(V x) { return select_grad(x, x); }
  static V select_grad(V grad, V y) {
    return _mm256_and_pd(_mm256_cmp_pd(y, zero(), _CMP_NLE_UQ), grad);
  }
  static V multiply_grad(V grad, V y) {
    V one = _mm256_and_pd(_mm256_cmp_pd(y, zero(), _CMP_GT_OQ), set(1.0));
    return _mm256_fmadd_pd(grad, one, zero());
  }
  static V insert(V x, int group, const char* p) {
    __m128d piece = _mm_loadu_pd(reinterpret_cast<const double*>(p));
    return group ? _mm256_insertf128_pd(x, piece, 1) : _mm256_castpd128_pd256(piece);
  }
  static void transpose_lanes(const V r[2], V out[2]) {
    out[0] = _mm256_unpacklo_pd(r[0], r[1]);
    out[1] = _mm256_unpackhi_pd(r[0], r[1]);
  }
};

#else

constexpr int kRegisters = 16;

// 128-bit vectors by compiler extension: SSE2 on any x86-64, NEON on Arm. The product is rounded
// before the sum, as no fused instruction can be relied on.
template <class T>
struct Portable {
  typedef T V __attribute__((vector_size(16)));
  static constexpr int kWidth = 16 / sizeof(T);
  static V zero() { return V{}; }
  static V set(T x) { return x - V{}; }
  static V load(const T* p) {
    V x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  static V load(const T* p, int n) {
    V x{};
    for (int i = 0; i < n; i++) x[i] = p[i];
    return x;
  }
  static void store(T* p, V x) { memcpy(p, &x, sizeof(x)); }
  static void store(T* p, V x, int n) {
    for (int i = 0; i < n; i++) p[i] = x[i];
  }
  static V load_even(const T* p) {
    V x{};
    for (int i = 0; i < kWidth; i++) x[i] = p[2 * i];
    return x;
  }
  static V add(V a, V b) { return a + b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V relu(V x) { return select_grad(x, x); }
  static V select_grad(V grad, V y) { return y <= zero() ? zero() : grad; }
  static V multiply_grad(V grad, V y) { return grad * (y > zero() ? set(1) : zero()) + zero(); }
  static V insert(V, int, const char* p) { return load(reinterpret_cast<const T*>(p)); }
  static void transpose_lanes(const V r[kWidth], V out[kWidth]) {
    T columns[kWidth][kWidth];
    for (int i = 0; i < kWidth; i++)
      for (int c = 0; c < kWidth; c++) columns[c][i] = r[i][c];
    for (int c = 0; c < kWidth; c++) out[c] = load(columns[c]);
  }
};

template <>
struct Simd<float> : Portable<float> {};
template <>
struct Simd<double> : Portable<double> {};

#endif

// To p[0], p[2], ..., `n` elements; what lies between stays.
template <class T>
void store_even(T* p, typename Simd<T>::V x, int n) {
  T each[Simd<T>::kWidth];
  Simd<T>::store(each, x);
  for (int i = 0; i < n; i++) p[2 * i] = each[i];
}

#if defined(__AVX512F__)
inline void store_even(float* p, __m512 x, int n) {
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const uint32_t mask = static_cast<uint32_t>(0x55555555 & ((uint64_t{1} << 2 * n) - 1));
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), _mm512_permutexvar_ps(low, x));
  if (n > 8)
    _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(mask >> 16),
                          _mm512_permutexvar_ps(high, x));
}
#endif

// Elements p[0], p[3], ..., and nothing behind the last of them.
template <class S, class T>
typename S::V load_third(const T* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i low = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0);
    const __m512i high = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 19, 22, 25, 28, 31);
    const __m512 x = _mm512_permutex2var_ps(S::load(p), low, S::load(p + 15));
    return _mm512_permutex2var_ps(x, high, S::load(p + 30));
  }
#endif
  T piece[S::kWidth];
  for (int i = 0; i < S::kWidth; i++) piece[i] = p[3 * i];
  return S::load(piece);
}

// Columns in 16 bytes of a row, and how many such pieces are transposed together: a whole cache
// line where the registers allow. Rows a power of two apart share cache sets, and a line touched
// again later would have been evicted.
template <class T>
constexpr int kPieceColumns = 16 / sizeof(T);
constexpr int kPieces = kRegisters == 32 ? 4 : sizeof(Simd<float>::V) / 16;

// `kWidth` rows, `row` bytes apart: out[c] holds column c, for the columns of `kCount` pieces.
template <class T, int kCount>
__attribute__((always_inline)) inline void transpose(const char* p, int64_t row,
                                                     typename Simd<T>::V* out) {
  using S = Simd<T>;
  constexpr int kColumns = kPieceColumns<T>;
  typename S::V r[kCount][kColumns];
#pragma GCC unroll 4
  for (int piece = 0; piece < kCount; piece++)
#pragma GCC unroll 4
    for (int i = 0; i < kColumns; i++) r[piece][i] = S::zero();
#pragma GCC unroll 16
  for (int i = 0; i < S::kWidth; i++)
#pragma GCC unroll 4
    for (int piece = 0; piece < kCount; piece++) {
      auto& x = r[piece][i % kColumns];
      x = S::insert(x, i / kColumns, p + i * row + 16 * piece);
    }
#pragma GCC unroll 4
  for (int piece = 0; piece < kCount; piece++) S::transpose_lanes(r[piece], out + piece * kColumns);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
