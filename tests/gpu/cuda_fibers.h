// Threads of CUDA blocks as fibers of one thread of the CPU, which meet in barriers and leave each
// other words in memory.
//
// Whose turn it is comes from a seed, and so does when others see what a thread has stored, which
// no order binds but its fences: warps of a block and blocks of a launch drift apart. Nobody runs
// while it waits, so that a launch in which all wait is found at once.
#pragma once

#include "cuda_memory.h"

namespace twinfuse::fibers {

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

inline uintptr_t memory_of(const Block* block) {
  return (reinterpret_cast<uintptr_t>(block->memory.get()) + 127) / 128 * 128;
}
// The block of this number in the cluster.
inline Block* peer(int number) {
  const int own = current->block->index;
  return &launch->blocks[static_cast<size_t>(own - own % launch->cluster + number)];
}

inline void meet_cluster() {
  Block* first = peer(0);
  current->warp->ready &= ~(1u << current->index % kLanes);
  if (++first->arrived_of_cluster == launch->threads * launch->cluster) {
    first->arrived_of_cluster = 0;
    for (int i = 0; i < launch->cluster; i++)
      for (Warp& warp : peer(i)->warps) warp.ready = ~0u;
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
inline std::string run(void (*kernel)(const void*), const void* arguments, int blocks, int cluster,
                       int threads, size_t memory, unsigned seed, int bug) {
  Launch made;
  launch = &made;
  made.random.seed(seed + 1);
  made.writes_early = seed % 2;
  made.bug = bug;
  made.kernel = kernel, made.arguments = arguments, made.threads = threads;
  made.live = blocks * threads;
  made.cluster = cluster;
  if (blocks % cluster) return "blocks are no whole clusters";
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
  if (made.error.empty() && !made.sent.empty()) made.error = "a block has ended before all came";
  for (const Fiber& fiber : made.fibers)
    if (memcmp(fiber.stack, &kCanary, sizeof kCanary) != 0) made.error = "a stack is too small";
  launch = nullptr;
  return made.error;
}

}  // namespace twinfuse::fibers
