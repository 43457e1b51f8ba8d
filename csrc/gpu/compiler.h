// Machine code made in the running process, where this build has none for a GPU.
#pragma once

#include <string>

#include "gpu/kernels.h"
#include "twinfuse/core.h"

namespace twinfuse::gpu {

// Architectures before 8.0 lack instructions that the kernels are written for.
constexpr int kLeastCompiled = 80;

// What the compiler has made of a kernel, or why it never will.
struct Compiled {
  TwinfuseCompiledKernel kernel;
  std::string refused;
};

// nullptr: there is none.
void set_compiler(TwinfuseKernelCompiler compiler);
bool has_compiler();

// `kernel` for `arch`. Throws Unsupported for a failure that may not last.
Compiled compile(const Kernel& kernel, int arch);

}  // namespace twinfuse::gpu
