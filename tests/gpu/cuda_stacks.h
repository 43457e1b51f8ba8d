// Stacks, and what it takes to go on with another one.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace twinfuse::fibers {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 128 << 10;
#else
constexpr size_t kStack = 24 << 10;
#endif
// Stacks that are a power of two apart would share few lines of the caches.
constexpr size_t kBetweenStacks = kStack + 17 * 64;
constexpr uint64_t kCanary = 0x5ca1ab1e5ca1ab1e;

#if defined(__x86_64__)
using Context = void*;  // the stack pointer, above what a call must keep
asm(".text\n"
    ".type twinfuse_swap, @function\n"
    "twinfuse_swap:\n"
    "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
    "movq %rsp, (%rdi); movq (%rsi), %rsp\n"
    "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret\n"
    ".size twinfuse_swap, . - twinfuse_swap\n");
extern "C" __attribute__((visibility("hidden"))) void twinfuse_swap(Context* from, Context* to);
inline void swap(Context* from, Context* to) { twinfuse_swap(from, to); }
inline void prepare(Context* context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStack - 64);
  top[6] = reinterpret_cast<uintptr_t>(entry);  // with the stack as behind a call
  top[7] = 0;
  *context = top;
}
#else
using Context = ucontext_t;
inline void swap(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

// Memory for this many stacks, kept from launch to launch.
inline char* stacks(size_t count) {
  static char* memory = nullptr;
  static size_t reserved = 0;
  if (count > reserved) {
    if (memory) munmap(memory, reserved * kBetweenStacks);
    void* made = mmap(nullptr, count * kBetweenStacks, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) {
      reserved = 0;
      return memory = nullptr;
    }
    memory = static_cast<char*>(made), reserved = count;
  }
  return memory;
}

}  // namespace twinfuse::fibers
