// Which instruction set the CPU kernels use: decided once per process.
#include <stdlib.h>
#if defined(TWINFUSE_WITH_X86)
#include <cpuid.h>
#endif

#include <string>

#include "cpu/kernels.h"

namespace twinfuse::cpu {

#if defined(TWINFUSE_WITH_X86)
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
  bool runs_here;
};

struct Choice {
  const Kernels* kernels;
  std::string note;
};

#if defined(TWINFUSE_WITH_X86)
// Not every compiler that builds this knows the name for __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best first. __builtin_cpu_supports also asks whether the system saves the wide registers.
const Built* built(int* count) {
#if defined(TWINFUSE_WITH_X86)
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Built list[] = {
      {&avx512_bf16::kernels, has_avx512 && __builtin_cpu_supports("avx512bf16")},
      {&avx512::kernels, has_avx512},
      {&avx2::kernels, has_avx2},
      {&portable::kernels, true},
  };
#else
  static const Built list[] = {{&portable::kernels, true}};
#endif
  *count = sizeof(list) / sizeof(list[0]);
  return list;
}

Choice choose() {
  int count;
  const Built* list = built(&count);
  const char* wanted = getenv("TWINFUSE_ISA");
  const Kernels* best = nullptr;
  for (int i = 0; i < count; i++) {
    if (!list[i].runs_here) continue;
    if (!best) best = list[i].kernels;
    if (wanted && std::string(wanted) == list[i].kernels->isa) return {list[i].kernels, ""};
  }
  std::string note;
  if (wanted && *wanted)
    note = "TWINFUSE_ISA=" + std::string(wanted) +
           " is not available here (built: " + twinfuse_built_isas() + "); using " + best->isa;
  return {best, note};
}

const Choice& choice() {
  static const Choice once = choose();
  return once;
}

}  // namespace

const Kernels& active_kernels() { return *choice().kernels; }

}  // namespace twinfuse::cpu

extern "C" const char* twinfuse_isa(void) { return twinfuse::cpu::choice().kernels->isa; }

extern "C" const char* twinfuse_isa_note(void) { return twinfuse::cpu::choice().note.c_str(); }

extern "C" const char* twinfuse_built_isas(void) {
  static const std::string text = [] {
    int count;
    const twinfuse::cpu::Built* list = twinfuse::cpu::built(&count);
    std::string s;
    for (int i = 0; i < count; i++) s += (i ? "," : "") + std::string(list[i].kernels->isa);
    return s;
  }();
  return text.c_str();
}
