// What csrc/cuda/device.h offers, for a CPU: the tests' stand-ins for a GPU's instructions.
//
// They are no kinder than a GPU has a right to be: shared memory begins as NaN, what a thread
// publishes reaches other blocks at its next fence or any time before, and what lanes do together
// they must all come for.
#pragma once

#include <math.h>

#include <map>

#include "cuda_fibers.h"

#define TWINFUSE_DEVICE inline
#define TWINFUSE_KERNEL(name, Kernel)                                                       \
  const ::twinfuse::cuda::Registered name##_registered(                                     \
      #name, [](const void* p) { Kernel::run(*static_cast<const Kernel::Arguments*>(p)); }, \
      Kernel::kThreads, shared_bytes<Kernel>(0));

namespace twinfuse::cuda {

template <class Kernel>
constexpr auto shared_bytes(int) -> decltype(size_t{Kernel::kSharedBytes}) {
  return Kernel::kSharedBytes;
}
template <class Kernel>
constexpr size_t shared_bytes(...) {
  return 0;
}

struct Entry {
  void (*run)(const void*);
  int threads;
  size_t memory;
};
inline std::map<std::string, Entry>& entries() {
  static std::map<std::string, Entry> all;
  return all;
}
struct Registered {
  Registered(const char* name, void (*run)(const void*), int threads, size_t memory) {
    entries()[name] = {run, threads, memory};
  }
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int thread_index() { return fibers::current->index; }
inline int block_index() { return fibers::current->block->index; }
inline void block_sync() { fibers::meet_block(); }
inline void warp_sync() {
  fibers::meet_warp("warp_sync", [] {});
}
inline void spin() { fibers::wait_for_others(); }

inline void* shared_memory() {
  return reinterpret_cast<void*>(fibers::memory_of(fibers::current->block));
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  // Scaling makes normal numbers of subnormal ones, too.
  const float finite = of_bits(magnitude << 13) * 0x1p112f;
  return of_bits((magnitude < 0x7c00 ? bits_of(finite) : 0x7f800000 | magnitude << 13) | sign);
}
inline float to_float(Bfloat16 x) { return of_bits(uint32_t{x.bits} << 16); }

// To the nearest, ties to even.
inline void convert(float x, float* to) { *to = x; }
inline void convert(float x, Half* to) {
  const float magnitude = fabsf(x);
  uint32_t bits = bits_of(magnitude);
  if (isnan(x)) {
    bits = 0x7fff;
  } else if (magnitude >= 65520) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    bits = bits_of(magnitude + 0.5f) - bits_of(0.5f);
  } else {
    bits = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(bits | (bits_of(x) >> 16 & 0x8000));
}
inline void convert(float x, Bfloat16* to) {
  const uint32_t bits = bits_of(x);
  to->bits = static_cast<uint16_t>(isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fast_exp(float x) { return expf(x); }
inline float fast_divide(float a, float b) {
  // As the GPU's: its reciprocal of such a divisor is zero.
  if (fabsf(b) > 0x1p126f && fabsf(b) < INFINITY) return a * 0;
  return a / b;
}

inline uint32_t to_tf32(float x) {
  // Ties away from zero.
  return isfinite(x) ? (bits_of(x) + 0x1000) & ~0x1fffu : bits_of(x);
}

// Factors as lanes hold them, `kSteps` of the reduced dimension in a word.
inline float factor(uint32_t word, int i, Half) {
  return to_float(Half{static_cast<uint16_t>(word >> 16 * i)});
}
inline float factor(uint32_t word, int i, Bfloat16) {
  return to_float(Bfloat16{static_cast<uint16_t>(word >> 16 * i)});
}
inline float factor(uint32_t word, int, float) { return of_bits(word & ~0x1fffu); }

// The fragments of m16n8k16, and of m16n8k8 for TF32.
template <class T>
void multiply_fragments(fibers::Operands* lanes) {
  typedef float Row __attribute__((vector_size(32)));
  constexpr int kInWord = 4 / static_cast<int>(sizeof(T)), kDepth = 8 * kInWord;
  float a[16][kDepth];
  Row b[kDepth], c[16];
  for (int lane = 0; lane < fibers::kLanes; lane++) {
    const int group = lane / 4, thread = lane % 4;
    const fibers::Operands& own = lanes[lane];
    for (int i = 0; i < kInWord; i++) {
      const int k = thread * kInWord + i;
      for (int word = 0; word < 4; word++)
        a[group + word % 2 * 8][k + word / 2 * 4 * kInWord] = factor(own.a[word], i, T{});
      for (int word = 0; word < 2; word++)
        b[k + word * 4 * kInWord][group] = factor(own.b[word], i, T{});
    }
    for (int i = 0; i < 4; i++) c[group + i / 2 * 8][thread * 2 + i % 2] = own.c[i];
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < kDepth; k++) c[row] += a[row][k] * b[k];
  for (int lane = 0; lane < fibers::kLanes; lane++)
    for (int i = 0; i < 4; i++) lanes[lane].c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  fibers::Warp* warp = fibers::current->warp;
  fibers::Operands& own = warp->lanes[thread_index() % fibers::kLanes];
  memcpy(own.a, a, sizeof a);
  own.b[0] = b0, own.b[1] = b1;
  memcpy(own.c, c, sizeof c);
  fibers::meet_warp("multiply", [warp] { multiply_fragments<T>(warp->lanes); });
  memcpy(c, own.c, sizeof c);
}

template <class T>
void publish(T* to, T value) {
  uint32_t word = 0;
  memcpy(&word, &value, sizeof value);
  const bool empties = word == (sizeof value == 2 ? 0xffffu : ~0u);
  if (empties && fibers::launch->bug == fibers::kNoEmptying) return;
  fibers::store(reinterpret_cast<uintptr_t>(to), word, sizeof value);
}

// A block sees its own, and words at times of their own.
inline uint4 fetch(const void* from) {
  uint32_t words[4];
  uint64_t& looked = fibers::current->looked;
  if (looked > fibers::launch->changes) looked = fibers::launch->changes;
  const auto& own = fibers::current->block->own;
  const unsigned late = fibers::draw(256);  // before this word
  for (unsigned i = 0; i < 4; i++) {
    if (i == late) fibers::pause();
    memcpy(&words[i], static_cast<const uint32_t*>(from) + i, 4);
    if (own.empty()) continue;
    const auto found = own.find(reinterpret_cast<uintptr_t>(from) / 16);
    for (unsigned k = 4 * i; found != own.end() && k < 4 * i + 4; k++)
      if (found->second.mask >> k & 1)
        reinterpret_cast<unsigned char*>(words)[k] = found->second.bytes[k];
  }
  return {words[0], words[1], words[2], words[3]};
}
inline void fence() {
  if (fibers::launch->bug != fibers::kNoFence) fibers::fence();
}

// What is expected and has not come yet, in bytes: in the other order it is less than nothing.
struct alignas(8) Barrier {
  int32_t missing;
  uint16_t is_expected, phase;
};
inline void begin_barrier(Barrier* barrier) { *barrier = {0, 0, 0}; }
inline void complete(Barrier* barrier) {
  if (!barrier->is_expected || barrier->missing) return;
  barrier->is_expected = 0;
  barrier->phase++;
  fibers::launch->changes++;
}
inline void expect_bytes(Barrier* barrier, int bytes) {
  if (barrier->is_expected) fibers::fail("a barrier is told twice what to expect in a phase");
  barrier->is_expected = 1;
  barrier->missing += bytes;
  complete(barrier);
}
inline void wait_barrier(Barrier* barrier, int parity) {
  if (fibers::launch->bug == fibers::kNoWait) return;
  for (;;) {
    fibers::current->looked = fibers::launch->changes;
    if (barrier->phase % 2 != parity) return;
    fibers::wait_for_others();
  }
}
// Comes there at a time of its own, which no fence binds.
inline void send(int block, void* to, const uint4& words, Barrier* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fibers::fail("what is sent is not aligned");
  fibers::Block* of = fibers::peer(block);
  const uintptr_t own = fibers::memory_of(fibers::current->block), there = fibers::memory_of(of);
  void* const at = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(to) - own + there);
  const uintptr_t counter = reinterpret_cast<uintptr_t>(barrier) - own + there;
  fibers::send(of, [at, words, counter] {
    memcpy(at, &words, sizeof words);
    auto* const counts = reinterpret_cast<Barrier*>(counter);
    counts->missing -= static_cast<int32_t>(sizeof words);
    complete(counts);
  });
}
inline void cluster_sync() { fibers::meet_cluster(); }

inline uint32_t from_lane(uint32_t word, int bits) {
  fibers::Warp* warp = fibers::current->warp;
  const int lane = thread_index() % fibers::kLanes;
  warp->lanes[lane].a[0] = word;
  fibers::meet_warp("from_lane", [warp] {
    for (fibers::Operands& own : warp->lanes) own.b[0] = own.a[0];
  });
  return warp->lanes[lane ^ bits].b[0];
}
inline bool any_of_warp(bool here) {
  fibers::Warp* warp = fibers::current->warp;
  warp->vote |= here;
  fibers::meet_warp("any_of_warp", [warp] {
    warp->voted = warp->vote;
    warp->vote = false;
  });
  return warp->voted;
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  const uint32_t low = (a & 0xffff) > (b & 0xffff) ? a : b, high = a > b ? a : b;
  return (high & 0xffff0000) | (low & 0xffff);
}

}  // namespace twinfuse::cuda
