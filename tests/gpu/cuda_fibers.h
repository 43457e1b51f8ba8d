// Threads of CUDA blocks as fibers of one thread of the CPU, which meet in barriers and leave each
// other words in memory.
//
// Whose turn it is comes from a seed, and so does when others see what a thread has stored, which
// no order binds but its fences: warps of a block and blocks of a launch drift apart. Nobody runs
// while it waits, so that a launch in which all wait is found at once.
#pragma once

#include <stdint.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_stacks.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace twinfuse::fibers {

constexpr int kLanes = 32;

struct Block;
struct Warp;

// What others need not see yet. Each address is there once: of two values the first may be missed.
struct Store {
  uintptr_t address;
  uint32_t value, size;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;                 // in its block
  uint64_t looked = UINT64_MAX;  // when it last began to look at memory, in changes of it
  std::vector<Store> pending;
  bool slow = false;  // whose stores come through after those of all others
};

// What a warp computes together: operands of all lanes, and what each gets back.
struct Operands {
  uint32_t a[4], b[2];
  float c[4];
};

struct Warp {
  uint32_t ready = ~0u;  // lanes
  uint32_t spinning = 0;
  uint64_t seen = 0;  // when these began, in changes of memory
  int arrived = 0;
  bool vote = false, voted = false;
  const char* meeting = nullptr;  // the barrier at which lanes wait
  int index = 0;
  Operands lanes[kLanes];
};

// Bytes of pending stores, which the block sees.
struct Own {
  unsigned char bytes[16];
  uint16_t mask = 0;
};

struct Block {
  int index = 0, arrived = 0, ended = 0;
  std::vector<Warp> warps;
  Fiber* fibers = nullptr;
  std::unordered_map<uintptr_t, Own> own;   // by address / 16
  std::unique_ptr<unsigned char[]> memory;  // with room to align it
};

// What a test leaves out to see that something is missing then.
enum Bug { kNone, kNoFence, kNoBlockSync, kNoEmptying };

struct Launch {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::minstd_rand random;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  int threads = 0, live = 0;
  int turns = 0, choices = 0;  // of this warp, of this block, before another one's turn
  uint64_t changes = 0;        // of memory that blocks share
  bool writes_early = false;
  int bug = kNone;
  Context main;
  std::string error;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_size = 0;
#endif
};

inline Launch* launch;
inline Fiber* current;

inline unsigned draw(unsigned below) { return launch->random() % below; }

inline uint32_t ready_lanes(Warp* warp) {
  if (warp->spinning && warp->seen != launch->changes) {
    warp->ready |= warp->spinning;
    warp->spinning = 0;
  }
  return warp->ready;
}

inline bool may_run(Block* block) {
  for (Warp& warp : block->warps)
    if (ready_lanes(&warp)) return true;
  return false;
}

// Memory has it now.
inline void show(Block* block, const Store& store) {
  memcpy(reinterpret_cast<void*>(store.address), &store.value, store.size);
  const auto mask = ((1u << store.size) - 1) << store.address % 16;
  const auto own = block->own.find(store.address / 16);
  own->second.mask &= static_cast<uint16_t>(~mask);
  if (!own->second.mask) block->own.erase(own);
  launch->changes++;
}

inline void show_pending(Fiber* fiber, size_t i) {
  const Store store = fiber->pending[i];
  fiber->pending[i] = fiber->pending.back();
  fiber->pending.pop_back();
  show(fiber->block, store);
}

// Where nobody can go on, some stores come through; whether there were any.
inline bool let_through() {
  bool any = false;
  Fiber* slow = nullptr;
  for (Fiber& fiber : launch->fibers) {
    if (fiber.slow && !fiber.pending.empty() && (!slow || draw(3) == 0)) slow = &fiber;
    for (size_t i = fiber.slow ? 0 : fiber.pending.size(); i-- > 0;) {
      if (any && draw(2)) continue;
      show_pending(&fiber, i);
      any = true;
    }
  }
  if (any || !slow) return any;
  show_pending(slow, draw(static_cast<unsigned>(slow->pending.size())));
  return true;
}

inline Fiber* next_lane(Block* block, Warp* warp, int after) {
  for (int i = 1; i <= kLanes; i++) {
    const int lane = (after + i) % kLanes;
    if (warp->ready >> lane & 1) return &block->fibers[warp->index * kLanes + lane];
  }
  return nullptr;
}

// Null if all wait or have ended.
inline Fiber* choose() {
  Block* block = current ? current->block : nullptr;
  if (current && launch->turns > 0 && current->warp->ready)
    return next_lane(block, current->warp, current->index % kLanes);
  if (!block || launch->choices <= 0 || !may_run(block)) {
    const auto count = static_cast<unsigned>(launch->blocks.size());
    block = nullptr;
    do {
      const unsigned first = draw(count);
      for (unsigned i = 0; i < count && !block; i++)
        if (may_run(&launch->blocks[(first + i) % count]))
          block = &launch->blocks[(first + i) % count];
    } while (!block && let_through());
    if (!block) return nullptr;
    // Until it can only wait, or not for long.
    constexpr int kChoices[] = {1, 10, 1 << 30};
    launch->choices = kChoices[draw(3)];
  }
  launch->choices--;
  constexpr int kTurns[] = {1, 8, 64};
  launch->turns = kTurns[draw(3)];
  const auto count = static_cast<unsigned>(block->warps.size());
  Warp* warp = &block->warps[draw(count)];
  while (!ready_lanes(warp)) warp = &block->warps[(warp->index + 1) % count];
  return next_lane(block, warp, static_cast<int>(draw(kLanes)));
}

inline void switch_to(Context* from, Fiber* to, bool ends) {
  Context* context = to ? &to->context : &launch->main;
  current = to;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, to ? to->stack : launch->main_stack,
                                 to ? kStack : launch->main_size);
  swap(from, context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)ends;
  swap(from, context);
#endif
}

// Others run until this one is ready again.
inline void yield() {
  Fiber* self = current;
  Fiber* next = choose();
  if (next != self) switch_to(&self->context, next, false);
}

// A pause in which others may run.
inline void pause() {
  launch->turns = launch->choices = 0;
  yield();
}

[[noreturn]] inline void fail(const std::string& error) {
  if (launch->error.empty()) launch->error = error;
  switch_to(&current->context, nullptr, true);
  __builtin_unreachable();
}

inline void store(uintptr_t address, uint32_t value, uint32_t size) {
  Fiber* self = current;
  Own& own = self->block->own[address / 16];
  memcpy(own.bytes + address % 16, &value, size);
  const auto mask = static_cast<uint16_t>(((1u << size) - 1) << address % 16);
  const bool again = own.mask & mask;
  own.mask |= mask;
  const Store made{address, value, size};
  for (size_t i = 0; again; i++)
    if (self->pending[i].address == address) {
      self->pending[i] = self->pending.back();
      self->pending.pop_back();
      break;
    }
  if (launch->writes_early && !self->slow && draw(2)) return show(self->block, made);
  self->pending.push_back(made);
}

// All that the thread has stored comes through, in any order, before it goes on.
inline void fence() {
  Fiber* self = current;
  const bool in_order = draw(2);
  while (!self->pending.empty()) {
    show_pending(self, in_order ? 0 : self->pending.size() - 1);
    if (draw(64) == 0) pause();
  }
}

inline void entry() {
  Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (!launch->main_stack) launch->main_stack = stack, launch->main_size = size;
#endif
  launch->kernel(launch->arguments);
  fence();
  self->block->ended++;
  launch->live--;
  self->warp->ready &= ~(1u << self->index % kLanes);
  switch_to(&self->context, choose(), true);
}

// All lanes of a warp meet; the last one does what is to be done for all.
template <class Last>
void meet_warp(const char* name, const Last& last) {
  Warp* warp = current->warp;
  if (warp->meeting && strcmp(warp->meeting, name) != 0)
    fail(std::string("lanes of a warp meet in ") + warp->meeting + " and in " + name);
  warp->meeting = name;
  warp->ready &= ~(1u << current->index % kLanes);
  if (++warp->arrived < kLanes) return yield();
  last();
  warp->arrived = 0;
  warp->meeting = nullptr;
  warp->ready = ~0u;
  if (--launch->turns <= 0) yield();
}

inline void meet_block() {
  if (launch->bug == kNoBlockSync) return;
  Block* block = current->block;
  current->warp->ready &= ~(1u << current->index % kLanes);
  if (++block->arrived == launch->threads) {
    block->arrived = 0;
    for (Warp& warp : block->warps) warp.ready = ~0u;
    launch->turns = 0;
  }
  yield();
}

// Until memory is not what this thread has seen.
inline void wait_for_others() {
  const bool has_changed = current->looked < launch->changes;
  current->looked = UINT64_MAX;
  if (has_changed) return pause();
  const uint32_t lane = 1u << current->index % kLanes;
  Warp* warp = current->warp;
  ready_lanes(warp);
  warp->ready &= ~lane;
  warp->spinning |= lane;
  warp->seen = launch->changes;
  yield();
}

inline std::string why_stuck() {
  for (const Block& block : launch->blocks) {
    if (block.ended == launch->threads) continue;
    int warps = 0, spinning = 0;
    for (const Warp& warp : block.warps) {
      warps += warp.arrived;
      spinning += __builtin_popcount(warp.spinning);
    }
    return "deadlock: of block " + std::to_string(block.index) + " " +
           std::to_string(block.arrived) + " threads wait for the block, " + std::to_string(warps) +
           " for their warps, " + std::to_string(spinning) + " for other blocks, and " +
           std::to_string(block.ended) + " have ended";
  }
  return "deadlock";
}

// Runs a kernel, and returns what went wrong.
inline std::string run(void (*kernel)(const void*), const void* arguments, int blocks, int threads,
                       size_t memory, unsigned seed, int bug) {
  Launch made;
  launch = &made;
  made.random.seed(seed + 1);
  made.writes_early = seed % 2;
  made.bug = bug;
  made.kernel = kernel, made.arguments = arguments, made.threads = threads;
  made.live = blocks * threads;
  made.blocks.resize(static_cast<size_t>(blocks));
  made.fibers.resize(static_cast<size_t>(made.live));
  char* stack = stacks(made.fibers.size());
  if (!stack) return "no memory for stacks";
  for (int b = 0; b < blocks; b++) {
    Block& block = made.blocks[static_cast<size_t>(b)];
    block.index = b;
    block.fibers = &made.fibers[static_cast<size_t>(b * threads)];
    block.memory.reset(new unsigned char[memory + 128]);
    memset(block.memory.get(), 0xFF, memory + 128);
    block.warps.resize(static_cast<size_t>(threads / kLanes));
    for (int i = 0; i < threads; i++) {
      Fiber& fiber = block.fibers[i];
      fiber.index = i;
      fiber.block = &block;
      fiber.slow = draw(static_cast<unsigned>(made.live)) < 3;
      fiber.warp = &block.warps[static_cast<size_t>(i / kLanes)];
      fiber.warp->index = i / kLanes;
      fiber.stack = stack + static_cast<size_t>(b * threads + i) * kBetweenStacks;
#if defined(__SANITIZE_ADDRESS__)
      // Whoever had the stack before may have been left in the middle.
      __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
      // Variables that nobody has set are NaN, too.
      memset(fiber.stack + kStack - 4096, 0xFF, 4096);
      memcpy(fiber.stack, &kCanary, sizeof kCanary);
      prepare(&fiber.context, fiber.stack, entry);
    }
  }
  current = nullptr;
  switch_to(&made.main, choose(), false);
  if (made.error.empty() && made.live) made.error = why_stuck();
  for (const Fiber& fiber : made.fibers)
    if (memcmp(fiber.stack, &kCanary, sizeof kCanary) != 0) made.error = "a stack is too small";
  launch = nullptr;
  return made.error;
}

}  // namespace twinfuse::fibers
