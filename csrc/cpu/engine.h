// How products are summed: one fused multiply-add per element, or the bfloat16 dot instruction,
// which takes two neighbouring elements of the reduced dimension at a time.
#pragma once

#include "cpu/convert.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// Packed: element of a packed operand. Unit: what one step multiplies in each lane, kGroup
// elements.
//
// The order of every sum, which its bits depend on: runs of kRun steps, one product after another;
// the runs of a block of kBlock elements one after another; then the blocks. Short runs keep
// rounding errors as small as those of libraries that split a sum over the lanes of a vector;
// bfloat16 results are rounded so coarsely that it would not show.
template <class T>
struct Engine {
  using Acc = typename Convert<T>::Acc;
  using Packed = Acc;
  using Unit = Acc;
  using S = Simd<Acc>;
  using V = typename S::V;
  static constexpr int kGroup = 1;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kRun = sizeof(Acc) == 8 ? 32 : 64;
  static V broadcast(const char* p) { return S::set(*reinterpret_cast<const Unit*>(p)); }
  static V load(const char* p) { return S::load(reinterpret_cast<const Unit*>(p)); }
  static V multiply_add(V a, V b, V c) { return S::fma(a, b, c); }
  // acc + the elements of one vector of units, in order.
  static V accumulate(V acc, const Unit* p) { return S::add(acc, S::load(p)); }
};

#if defined(__AVX512BF16__)
template <>
struct Engine<Bf16> {
  using Acc = float;
  using Packed = Bf16;
  using Unit = uint32_t;
  using S = Simd<float>;
  using V = __m512;
  static constexpr int kGroup = 2;
  static constexpr int64_t kBlock = 512;
  static constexpr int64_t kRun = 256;
  static V broadcast(const char* p) {
    uint32_t pair;
    memcpy(&pair, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair)));
  }
  static V load(const char* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static V multiply_add(V a, V b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static V accumulate(V acc, const Unit* p) {
    __m512i x = _mm512_loadu_si512(p);
    acc = S::add(acc, _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
    return S::add(acc, _mm512_castsi512_ps(
                           _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
  }
};
#endif

}  // namespace twinfuse::cpu::TWINFUSE_ISA
