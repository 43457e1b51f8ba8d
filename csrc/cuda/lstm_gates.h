// Activations and their derivatives, and number formats of the tensor cores.
#pragma once

#include "cuda/device.h"
#include "cuda/lstm_arguments.h"

namespace twinfuse::cuda {

// Of sums in float32 that become elements of 16 bits; float has functions of its own accuracy.
template <class T>
TWINFUSE_DEVICE float sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1 / (1 + expf(-x));
  return fast_divide(1, 1 + fast_exp(-x));
}
template <class T>
TWINFUSE_DEVICE float hyperbolic_tangent(float x) {
  if constexpr (sizeof(T) == 4) return tanhf(x);
  return 1 - fast_divide(2, 1 + fast_exp(2 * x));
}

// Numbered as TwinfuseActivation.
enum { kTanh, kSigmoid, kRelu, kHardSigmoid };

template <class T>
TWINFUSE_DEVICE float activate(int activation, float x) {
  switch (activation) {
    case kTanh:
      return hyperbolic_tangent<T>(x);
    case kSigmoid:
      return sigmoid<T>(x);
    case kRelu:
      return x <= 0 ? 0 : x;
    default:
      x = x / 6 + 0.5f;
      return x <= 0 ? 0 : x >= 1 ? 1 : x;
  }
}

// The derivative, from what the activation returned.
TWINFUSE_DEVICE float slope(int activation, float y) {
  switch (activation) {
    case kTanh:
      return 1 - y * y;
    case kSigmoid:
      return y * (1 - y);
    case kRelu:
      return y <= 0 ? 0.f : 1.f;
    default:
      return y <= 0 || y >= 1 ? 0 : 1 / 6.f;
  }
}

TWINFUSE_DEVICE float float_of(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}

// Factors as tensor cores take them: four words of a weight, two of a state. A group is what four
// neighbouring threads read at once, 16 bytes each; it makes two products. `word` is what a thread
// keeps of a weight.
struct Words4 {
  uint32_t words[4];
};
struct Words2 {
  uint32_t words[2];
};

template <class T>
struct Format16 {
  using Element = T;
  using Weight = Words4;
  using State = Words2;
  static constexpr int kGroup = 32;  // elements
  static constexpr int kTemporaries = 0;
  static constexpr bool kApart = false;
  TWINFUSE_DEVICE static uint32_t word(uint32_t word) { return word; }
  TWINFUSE_DEVICE static Weight weight(const uint32_t (&w)[4]) {
    return {{w[0], w[1], w[2], w[3]}};
  }
  TWINFUSE_DEVICE static State state(uint32_t first, uint32_t second) { return {{first, second}}; }
  TWINFUSE_DEVICE static void product(float (&sum)[4], const Weight& weight, const State& state) {
    multiply(sum, weight.words, state.words[0], state.words[1], T{});
  }
};

struct FormatTf32 {
  using Element = float;
  using Weight = Words4;
  using State = Words2;
  static constexpr int kGroup = 16;
  static constexpr int kTemporaries = 0;
  static constexpr bool kApart = false;
  TWINFUSE_DEVICE static uint32_t word(uint32_t word) { return to_tf32(float_of(word)); }
  TWINFUSE_DEVICE static Weight weight(const uint32_t (&w)[4]) {
    return {{w[0], w[1], w[2], w[3]}};
  }
  TWINFUSE_DEVICE static State state(uint32_t first, uint32_t second) {
    return {{to_tf32(float_of(first)), to_tf32(float_of(second))}};
  }
  TWINFUSE_DEVICE static void product(float (&sum)[4], const Weight& weight, const State& state) {
    multiply(sum, weight.words, state.words[0], state.words[1], 0.f);
  }
};

// As accurate as float32: three products of parts.
struct FormatTf32x3 {
  using Element = float;
  struct Weight {
    Words4 large, small;
  };
  struct State {
    Words2 large, small;
  };
  static constexpr int kGroup = 16;
  static constexpr int kTemporaries = 64;  // registers
  // Tensor cores cut sums off instead of rounding them: few are added up there.
  static constexpr bool kApart = true;
  TWINFUSE_DEVICE static uint32_t word(uint32_t word) { return word; }
  TWINFUSE_DEVICE static Weight weight(const uint32_t (&w)[4]) {
    Weight parts;
#pragma unroll
    for (int i = 0; i < 4; i++) split(w[i], &parts.large.words[i], &parts.small.words[i]);
    return parts;
  }
  TWINFUSE_DEVICE static State state(uint32_t first, uint32_t second) {
    State parts;
    split(first, &parts.large.words[0], &parts.small.words[0]);
    split(second, &parts.large.words[1], &parts.small.words[1]);
    return parts;
  }
  TWINFUSE_DEVICE static void product(float (&sum)[4], const Weight& weight, const State& state) {
    const Words2 &large = state.large, &small = state.small;
    multiply(sum, weight.small.words, large.words[0], large.words[1], 0.f);
    multiply(sum, weight.large.words, small.words[0], small.words[1], 0.f);
    multiply(sum, weight.large.words, large.words[0], large.words[1], 0.f);
  }

 private:
  TWINFUSE_DEVICE static void split(uint32_t word, uint32_t* large, uint32_t* small) {
    *large = to_tf32(float_of(word));
    const float rest = float_of(word) - float_of(*large);
    *small = to_tf32(rest == rest ? rest : 0);  // of an infinity nothing is left
  }
};

using Lstm_bf16 = Format16<Bfloat16>;
using Lstm_fp16 = Format16<Half>;
using Lstm_tf32 = FormatTf32;
using Lstm_tf32x3 = FormatTf32x3;

}  // namespace twinfuse::cuda
