// What tests tell the fake driver, and ask it. None of this counts as a call of the driver.
#include <cstring>

#include "fake_driver.h"

using namespace fake;
using Lock = std::lock_guard<std::mutex>;

extern "C" {

// Before the first call of the driver.
void fake_set_devices(const DeviceSpec* specs, int count) {
  const Lock lock(state.mutex);
  state.devices.clear();
  for (int i = 0; i < count; i++) state.devices.push_back({specs[i], {i}});
}

void fake_set_version(int version) {
  const Lock lock(state.mutex);
  state.version = version;
}

void fake_set_occupancy(int blocks) {
  const Lock lock(state.mutex);
  state.occupancy = blocks;
}

// Makes loads take so many microseconds, as real ones do.
void fake_set_load_delay(unsigned delay) { load_delay = delay; }

void* fake_primary_context(int device) {
  const Lock lock(state.mutex);
  return &state.devices.at(device).primary;
}

void* fake_create_context(int device) {
  const Lock lock(state.mutex);
  state.contexts.push_back({device, state.occupancy});
  return &state.contexts.back();
}

void* fake_create_stream(void* context, int blocking) {
  const Lock lock(state.mutex);
  auto stream = std::make_unique<Stream>();
  stream->context = static_cast<Context*>(context);
  stream->blocking = blocking != 0;
  void* handle = stream.get();
  state.streams[handle] = std::move(stream);
  return handle;
}

void fake_destroy_stream(void* stream) {
  const Lock lock(state.mutex);
  state.streams.erase(stream);
}

void fake_begin_capture(void* stream) {
  const Lock lock(state.mutex);
  Stream& found = *state.streams.at(stream);
  found.capturing = found.valid = true;
}

// Whether nothing has spoilt it.
int fake_end_capture(void* stream) {
  const Lock lock(state.mutex);
  Stream& found = *state.streams.at(stream);
  found.capturing = false;
  return found.valid;
}

// The n-th call from now fails, counted from 0; a negative number: none does.
void fake_fail_call(int64_t n, int error) {
  const Lock lock(state.mutex);
  state.fail_index = n;
  state.fail_error = error;
}

// Every call of this function fails, until `error` is 0.
void fake_fail_function(const char* name, int error) {
  const Lock lock(state.mutex);
  if (error)
    state.fail_functions[name] = error;
  else
    state.fail_functions.erase(name);
}

// Forgets records and wishes, but nothing that callers hold.
void fake_clear() {
  const Lock lock(state.mutex);
  state.launches.clear();
  state.memsets.clear();
  state.calls.clear();
  state.complaint.clear();
  state.failed.clear();
  state.fail_index = -1;
  state.fail_functions.clear();
}

// Both valid until the next call of the driver.
const char* fake_complaint() { return state.complaint.c_str(); }
const char* fake_failed() { return state.failed.c_str(); }

uint64_t fake_call_count() {
  const Lock lock(state.mutex);
  return state.calls.size();
}

const char* fake_call(uint64_t index) {
  const Lock lock(state.mutex);
  return state.calls.at(index);
}

uint64_t fake_launch_count() {
  const Lock lock(state.mutex);
  return state.launches.size();
}

void fake_launch(uint64_t index, Launch* launch) {
  const Lock lock(state.mutex);
  *launch = state.launches.at(index).launch;
}

// Copies at most `room` bytes of the argument and returns its size.
uint64_t fake_argument(uint64_t index, uint64_t argument, void* bytes, uint64_t room) {
  const Lock lock(state.mutex);
  const std::string& found = state.launches.at(index).arguments.at(argument);
  std::memcpy(bytes, found.data(), found.size() < room ? found.size() : room);
  return found.size();
}

uint64_t fake_memset_count() {
  const Lock lock(state.mutex);
  return state.memsets.size();
}

void fake_memset(uint64_t index, Memset* out) {
  const Lock lock(state.mutex);
  *out = state.memsets.at(index);
}

int64_t fake_module_count() {
  const Lock lock(state.mutex);
  return static_cast<int64_t>(state.modules.size());
}

int64_t fake_retained() {
  const Lock lock(state.mutex);
  return state.retained;
}

int64_t fake_abandoned() {
  const Lock lock(state.mutex);
  return state.abandoned;
}

// Of the calling thread.
int fake_depth() { return static_cast<int>(thread.stack.size()); }
void* fake_current() { return thread.current(); }
int fake_capture_mode() { return thread.mode; }

}  // extern "C"
