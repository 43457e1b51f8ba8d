// What this machine can do at best: fused multiply-adds and memory traffic per second.
//
// Each probe runs on `threads` threads that start together and work for `seconds`. The result is
// the sum of the threads' own rates, so that a thread that starts late does not lower it.
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define LIMITS_WITH_TILES
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kChains = 24;  // of 32 registers: enough to hide the latency of two FMA pipes
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kChains = 12;  // of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kChains = 12;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

// Constants come from here so that the compiler cannot work the sums out beforehand.
volatile float source = 0.5F;
volatile double sink;

template <typename T>
double MultiplyAdd() {
  using Vector = typename VectorOf<T>::type;
  constexpr int kSteps = 20000;
  // Each chain tends to 2: no overflow and no denormals, which some processors handle slowly.
  Vector scale = Vector{} + T(source);
  Vector shift = Vector{} + T(1);
  Vector chains[kChains];
  for (int j = 0; j < kChains; ++j) chains[j] = shift + T(j);
  for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) chains[j] = chains[j] * scale + shift;
  }
  Vector total = chains[0];
  for (int j = 1; j < kChains; ++j) total += chains[j];
  sink = total[0];
  return 2.0 * kSteps * kChains * (kVectorBytes / sizeof(T));
}

#if defined(__AVX512BF16__)
double DotBfloat16() {
  constexpr int kSteps = 20000;
  const __m512 one = _mm512_set1_ps(source);
  const __m512bh a = _mm512_cvtne2ps_pbh(one, one);
  const __m512bh b = _mm512_cvtne2ps_pbh(one, _mm512_sub_ps(_mm512_setzero_ps(), one));
  __m512 chains[kChains];
  for (int j = 0; j < kChains; ++j) chains[j] = one;
  for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) chains[j] = _mm512_dpbf16_ps(chains[j], a, b);
  }
  __m512 total = chains[0];
  for (int j = 1; j < kChains; ++j) total = _mm512_add_ps(total, chains[j]);
  sink = total[0];
  return 2.0 * kSteps * kChains * 32;
}
#endif

#if defined(LIMITS_WITH_TILES)
// The system lends tile registers to those only who ask.
bool HasTiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool lent = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return lent;
}

double TileBfloat16() {
  constexpr int kSteps = 20000, kRows = 16, kRowBytes = 64;
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = kRowBytes, shape.rows[i] = kRows;
  _tile_loadconfig(&shape);
  alignas(64) uint16_t numbers[kRows * kRowBytes / 2];
  const uint16_t half = source == 0.5F ? 0x3f00 : 0x3f80;
  for (int i = 0; i < kRows * kRowBytes / 2; ++i) numbers[i] = half + i % 64;
  __asm__ volatile("" ::"m"(numbers));
  _tile_loadd(4, numbers, kRowBytes);
  _tile_loadd(5, numbers, kRowBytes);
  _tile_loadd(6, numbers, kRowBytes);
  _tile_loadd(7, numbers, kRowBytes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < kSteps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * kSteps * 4 * kRows * kRows * (kRowBytes / 2);
}
#endif

using Words = VectorOf<uint64_t>::type;

uint64_t Read(const Words* data, size_t count) {
  Words sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] ^= data[i + j];
  }
  for (; i < count; ++i) sums[0] ^= data[i];
  for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
  return sums[0][0];
}

void Copy(Words* to, const Words* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

void Triad(Words* to, const Words* left, const Words* right, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = left[i] + 3 * right[i];
}

class Gate {
 public:
  explicit Gate(int count) : missing_(count) {}

  void Pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (--missing_ == 0) all_here_.notify_all();
    all_here_.wait(lock, [this] { return missing_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int missing_;
};

// Runs `make()()` again and again on every thread; the callable returns the work it has done.
template <typename Make>
double Rate(int threads, double seconds, Make make) {
  using Clock = std::chrono::steady_clock;
  Gate gate(threads);
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      auto work = make();
      work();
      gate.Pass();
      double done = 0, elapsed = 0;
      const auto start = Clock::now();
      do {
        done += work();
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds);
      rates[t] = done / elapsed;
    });
  }
  for (auto& thread : pool) thread.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace

extern "C" {

enum Arithmetic { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2 };
enum Pattern { kRead = 0, kCopy = 1, kTriad = 2 };

// FLOP/s, a multiply-add counted as two; 0 when the processor has no such instruction.
double limits_multiply_add(int arithmetic, int threads, double seconds) {
  switch (arithmetic) {
    case kFloat32:
      return Rate(threads, seconds, [] { return MultiplyAdd<float>; });
    case kFloat64:
      return Rate(threads, seconds, [] { return MultiplyAdd<double>; });
#if defined(__AVX512BF16__)
    case kBfloat16:
#if defined(LIMITS_WITH_TILES)
      if (HasTiles()) return Rate(threads, seconds, [] { return TileBfloat16; });
#endif
      return Rate(threads, seconds, [] { return DotBfloat16; });
#endif
    default:
      return 0;
  }
}

// Bytes/s that the pattern names (reads and writes, without what the caches add), over `bytes` of
// data in all, shared evenly by the threads.
double limits_bandwidth(int pattern, size_t bytes, int threads, double seconds) {
  const size_t arrays = static_cast<size_t>(pattern) + 1;
  const size_t count = bytes / sizeof(Words) / arrays / threads;
  return Rate(threads, seconds, [=] {
    // Filled by the thread that reads it, so that the pages are its own on a NUMA machine.
    auto storage = std::make_shared<std::vector<uint64_t>>(
        (count * arrays + 1) * (sizeof(Words) / sizeof(uint64_t)), 7);
    auto address = reinterpret_cast<uintptr_t>(storage->data());
    auto* data = reinterpret_cast<Words*>((address + sizeof(Words) - 1) & -sizeof(Words));
    return [=]() -> double {
      const auto keep = storage;
      // Many passes over a small array between two looks at the clock.
      const size_t passes = 1 + (size_t{1} << 20) / (count * sizeof(Words) * arrays + 1);
      for (size_t i = 0; i < passes; ++i) {
        if (pattern == kRead) sink = static_cast<double>(Read(data, count));
        if (pattern == kCopy) Copy(data, data + count, count);
        if (pattern == kTriad) Triad(data, data + count, data + 2 * count, count);
      }
      return static_cast<double>(passes * count * sizeof(Words) * arrays);
    };
  });
}
}
