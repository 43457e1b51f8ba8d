// What the functions of the fake driver share.
#pragma once

#include <cstring>

#include "fake_driver.h"

namespace fake {

// One call of the driver: alone, counted, and failed where a test wants that.
class Call {
 public:
  explicit Call(const char* name) : lock_(state.mutex), name_(name) {
    state.calls.push_back(name);
    if (state.fail_index >= 0 && state.fail_index-- == 0) injected = state.fail_error;
    const auto found = state.fail_functions.find(name);
    if (found != state.fail_functions.end()) injected = found->second;
    if (injected) state.failed = name;
    const bool early = !std::strcmp(name, "cuInit") || !std::strcmp(name, "cuDriverGetVersion");
    if (!state.initialized && !early) refused = refuse(kNotInitialized, "cuInit was not called");
  }

  Result refuse(Result result, const std::string& why) const {
    state.complaint = std::string(name_) + ": " + why;
    return result;
  }

  int injected = 0;
  Result refused = kSuccess;

 private:
  const std::lock_guard<std::mutex> lock_;
  const char* name_;
};

#define ENTER()                            \
  const Call call(__func__);               \
  if (call.injected) return call.injected; \
  if (call.refused) return call.refused
#define REFUSE_IF(condition, result, why) \
  if (condition) return call.refuse(result, why)

// The legacy stream under both of its names, and the one of each thread.
inline bool is_default(const void* stream) { return reinterpret_cast<uintptr_t>(stream) <= 2; }
inline bool is_legacy(const void* stream) { return reinterpret_cast<uintptr_t>(stream) <= 1; }

template <class T>
T* find(const std::map<void*, std::unique_ptr<T>>& among, void* handle) {
  const auto found = among.find(handle);
  return found == among.end() ? nullptr : found->second.get();
}

inline Function* find_function(const void* handle) {
  for (auto& [module_handle, module] : state.modules)
    for (auto& [name, function] : module->functions)
      if (&function == handle) return &function;
  return nullptr;
}

// Ends captures that the call is not allowed beside. True if there were any.
inline bool break_captures(bool only_blocking) {
  bool any = false;
  for (auto& [handle, stream] : state.streams) {
    if (!stream->capturing || (only_blocking && !stream->blocking)) continue;
    any = true;
    stream->valid = false;
  }
  return any;
}

inline std::string text(uint64_t value) { return std::to_string(value); }

}  // namespace fake
