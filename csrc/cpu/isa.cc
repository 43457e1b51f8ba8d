// Which instruction set the CPU kernels use: decided once per process.
#include <stdlib.h>
#if defined(TWINFUSE_WITH_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <string>

#include "cpu/kernels.h"

namespace twinfuse::cpu {

#if defined(TWINFUSE_WITH_X86)
namespace amx_bf16 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

struct Built {
  const Kernels* kernels;
  bool (*runs_here)();
};

struct Choice {
  Kernels kernels;
  std::string note;
};

bool always() { return true; }

// __builtin_cpu_supports also asks whether the system saves the wide registers.
#if defined(TWINFUSE_WITH_X86)
bool has_avx2() {
  // Not every compiler that builds this knows the name of f16c.
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The processor has tiles, and the system lets this process use them. It has to be asked: it saves
// their eight kilobytes for those only who did.
bool has_amx_bf16() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of the seventh leaf
  constexpr long kRequest = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) &&
         (d & kTile) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first.
constexpr Built kBuilt[] = {
#if defined(TWINFUSE_WITH_X86)
    {&amx_bf16::kernels, has_amx_bf16}, {&avx512_bf16::kernels, has_avx512_bf16},
    {&avx512::kernels, has_avx512},     {&avx2::kernels, has_avx2},
#endif
    {&portable::kernels, always},
};
constexpr int kCount = sizeof(kBuilt) / sizeof(kBuilt[0]);

template <class Function>
void complete(Function* (&of)[TWINFUSE_DTYPE_COUNT],
              Function* const (&next)[TWINFUSE_DTYPE_COUNT]) {
  for (int i = 0; i < TWINFUSE_DTYPE_COUNT; i++)
    if (!of[i]) of[i] = next[i];
}

// The table of kBuilt[index], whole. The last one lacks nothing.
Kernels table(int index) {
  Kernels kernels = *kBuilt[index].kernels;
  if (index == kCount - 1 || kernels.linear_relu_forward[TWINFUSE_FLOAT32]) return kernels;
  const Kernels next = table(index + 1);
  complete(kernels.linear_relu_forward, next.linear_relu_forward);
  complete(kernels.linear_relu_backward, next.linear_relu_backward);
  complete(kernels.conv_relu_forward, next.conv_relu_forward);
  complete(kernels.conv_relu_backward, next.conv_relu_backward);
  complete(kernels.lstm_forward, next.lstm_forward);
  complete(kernels.lstm_backward, next.lstm_backward);
  return kernels;
}

Choice choose() {
  const char* wanted = getenv("TWINFUSE_ISA");
  for (int i = 0; wanted && i < kCount; i++)
    if (std::string(wanted) == kBuilt[i].kernels->isa && kBuilt[i].runs_here())
      return {table(i), ""};
  int best = 0;
  while (!kBuilt[best].runs_here()) best++;
  std::string note;
  if (wanted && *wanted)
    note = "TWINFUSE_ISA=" + std::string(wanted) +
           " is not available here (built: " + twinfuse_built_isas() + "); using " +
           kBuilt[best].kernels->isa;
  return {table(best), note};
}

const Choice& choice() {
  static const Choice once = choose();
  return once;
}

}  // namespace

const Kernels& active_kernels() { return choice().kernels; }

}  // namespace twinfuse::cpu

extern "C" const char* twinfuse_isa(void) { return twinfuse::cpu::choice().kernels.isa; }

extern "C" const char* twinfuse_isa_note(void) { return twinfuse::cpu::choice().note.c_str(); }

extern "C" const char* twinfuse_built_isas(void) {
  static const std::string text = [] {
    std::string s;
    for (const twinfuse::cpu::Built& set : twinfuse::cpu::kBuilt)
      s += (s.empty() ? "" : ",") + std::string(set.kernels->isa);
    return s;
  }();
  return text.c_str();
}
