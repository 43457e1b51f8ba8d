// How products are summed: one fused multiply-add per element, or a bfloat16 dot instruction, on
// vectors or on tile registers.
#pragma once

#include <type_traits>

#include "cpu/amx.h"
#include "cpu/convert.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// A step of the main loop multiplies one unit per row with one unit per
// column: kGroup neighbouring elements of the reduced dimension.
//
// The order of every sum, which its bits depend on: runs of steps, one product after another, then
// the runs one after another. Short runs keep rounding errors as small as those of libraries that
// split a sum over the lanes of a vector. Blocks of the reduced dimension are whole runs.
template <class A>
struct MultiplyAdd {
  using Acc = A;   // the type sums run in
  using Unit = A;  // what one step multiplies in each lane
  using S = Simd<A>;
  using V = typename S::V;
  static constexpr int kGroup = 1;
  static constexpr int64_t kBlock = 4096 / sizeof(A);
  static constexpr int64_t kRun = 32;  // at least: see run_of
  static constexpr int kRowUnit = 1;   // tiles of rows are best made of whole units
  static V broadcast(const char* p) { return S::set(*reinterpret_cast<const Unit*>(p)); }
  static V load(const char* p) { return S::load(reinterpret_cast<const Unit*>(p)); }
  static V multiply_add(V a, V b, V c) { return S::fma(a, b, c); }
  // acc + the elements of one vector of units, in order; of the first `n` of them.
  static V accumulate(V acc, const Unit* p) { return S::add(acc, S::load(p)); }
  static V accumulate(V acc, const Unit* p, int n) { return S::add(acc, S::load(p, n)); }
};

// The engine of a storage type, and the type its packed elements have.
template <class T>
struct Engine : MultiplyAdd<typename Convert<T>::Acc> {
  using Arithmetic = MultiplyAdd<typename Convert<T>::Acc>;
  using Packed = typename Convert<T>::Acc;
};

#if defined(TWINFUSE_DOT_BF16)
// The bfloat16 dot instruction: units are pairs.
struct DotBf16 {
  using Acc = float;
  using Unit = uint32_t;
  using S = Simd<float>;
  using V = __m512;
  static constexpr int kGroup = 2;
  static constexpr int64_t kBlock = 2048;
  static constexpr int64_t kRun = 64;
  static constexpr int kRowUnit = 1;
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
  // Pairs are always packed in whole vectors, so that nothing has to stop behind the first ones.
  static V accumulate(V acc, const Unit* p, int) { return accumulate(acc, p); }
};

#if defined(TWINFUSE_AMX)
// The same on tile registers, whose instruction sums a run. Rows lie along the steps.
struct TileBf16 : DotBf16 {
  static constexpr int64_t kRun = kTileSteps;
  static constexpr int kRowUnit = kTileRows;
};
using PairsOfBf16 = TileBf16;
#else
using PairsOfBf16 = DotBf16;
#endif

template <>
struct Engine<Bf16> : PairsOfBf16 {
  using Arithmetic = PairsOfBf16;
  using Packed = Bf16;
};
#endif

// One element is a unit, in the type in which it is stored.
template <class T>
constexpr bool kUnitsAsStored = std::is_same<typename Engine<T>::Unit, T>::value;

// Blocks of the reduced dimension are multiples of this, but for those of windows in a slab.
template <class T>
constexpr int64_t kLeastBlock = Engine<T>::kBlock / 2;

// The longest run, in those of kRun steps.
constexpr int64_t kLongestRun = 4;

// Steps of a run. Errors are least where a run has as many products as a sum has runs. Tile
// registers sum their own.
template <class E>
int64_t run_of(int64_t depth) {
  if (E::kRowUnit > 1) return E::kRun;
  const int64_t steps = depth / E::kGroup;
  return steps < 1024 ? E::kRun : steps < 16384 ? 2 * E::kRun : kLongestRun * E::kRun;
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
