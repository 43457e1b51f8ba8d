// A launch on the CPU: its blocks, warps and threads, and what they have left each other in memory.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>
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
  int arrived_of_cluster = 0;  // counted by its first block
  std::vector<Warp> warps;
  Fiber* fibers = nullptr;
  std::unordered_map<uintptr_t, Own> own;   // by address / 16
  std::unique_ptr<unsigned char[]> memory;  // with room to align it
};

// What a test leaves out to see that something is missing then.
enum Bug { kNone, kNoFence, kNoBlockSync, kNoEmptying, kNoWait };

// What is on its way into the memory of a block.
struct Sent {
  Block* to;
  std::function<void()> arrive;
};

struct Launch {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Sent> sent;
  std::minstd_rand random;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  int threads = 0, live = 0;
  int cluster = 1;             // blocks
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

}  // namespace twinfuse::fibers
