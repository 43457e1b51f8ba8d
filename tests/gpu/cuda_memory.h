// When others see what a thread has stored or sent.
#pragma once

#include "cuda_launch.h"

namespace twinfuse::fibers {

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

[[noreturn]] void fail(const std::string& error);

inline void let_arrive(size_t i) {
  const Sent sent = launch->sent[i];
  launch->sent[i] = launch->sent.back();
  launch->sent.pop_back();
  if (sent.to->ended == launch->threads) fail("something is sent to a block that has ended");
  sent.arrive();
}
// In any order, and some of it at once.
inline void send(Block* to, std::function<void()> arrive) {
  launch->sent.push_back({to, std::move(arrive)});
  if (launch->writes_early && draw(2)) let_arrive(draw(static_cast<unsigned>(launch->sent.size())));
}

// Where nobody can go on, some stores come through; whether there were any.
inline bool let_through() {
  bool any = false;
  for (unsigned n = static_cast<unsigned>(launch->sent.size()); n > 0 && (!any || draw(4)); n--) {
    let_arrive(draw(n));
    any = true;
  }
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

}  // namespace twinfuse::fibers
