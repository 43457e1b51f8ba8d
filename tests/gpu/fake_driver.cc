// A CUDA driver without a GPU: what `TWINFUSE_CUDA_DRIVER` names in tests.
//
// It keeps contexts, streams, modules and functions as the real one does, refuses what the real one
// refuses (and says why in `fake_complaint`), and records launches with their arguments instead of
// running them. Arguments are split by the parameter table in the machine code itself, so that a
// wrong order or size shows.
#include <unistd.h>

#include <utility>

#include "fake_call.h"

using namespace fake;

namespace fake {

thread_local Thread thread;

Thread::~Thread() {
  const std::lock_guard lock(state.mutex);
  state.abandoned += static_cast<int64_t>(stack.size());
}

}  // namespace fake

namespace {

constexpr int kMaxDynamicShared = 8, kLargeClusters = 14;

const std::map<int, std::pair<const char*, const char*>> kErrors = {
    {0, {"CUDA_SUCCESS", "no error"}},
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for the device"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {701, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
    {720, {"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"}},
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when stream is capturing"}},
    {901, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "capture failed due to a previous error"}},
    {906, {"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "dependency on a stream that is capturing"}},
};

bool is_device(int number) {
  return number >= 0 && number < static_cast<int>(state.devices.size());
}

bool is_context(const void* handle) {
  for (const Device& device : state.devices)
    if (handle == &device.primary) return true;
  for (const Context& context : state.contexts)
    if (handle == &context) return true;
  return false;
}

}  // namespace

extern "C" {

int cuGetErrorName(int error, const char** out) {
  const auto found = kErrors.find(error);
  *out = found == kErrors.end() ? nullptr : found->second.first;
  return *out ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int error, const char** out) {
  const auto found = kErrors.find(error);
  *out = found == kErrors.end() ? nullptr : found->second.second;
  return *out ? kSuccess : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
  ENTER();
  *version = state.version;
  return kSuccess;
}

int cuInit(unsigned flags) {
  ENTER();
  REFUSE_IF(flags, kInvalidValue, "flags");
  REFUSE_IF(state.devices.empty(), kNoDevice, "no device");
  state.initialized = true;
  return kSuccess;
}

int cuDeviceGetCount(int* count) {
  ENTER();
  *count = static_cast<int>(state.devices.size());
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  ENTER();
  REFUSE_IF(!is_device(ordinal), kInvalidDevice, "ordinal " + std::to_string(ordinal));
  *device = ordinal;
  return kSuccess;
}

int cuDeviceGetName(char* name, int length, int device) {
  ENTER();
  REFUSE_IF(!is_device(device), kInvalidDevice, "number");
  REFUSE_IF(length < 1, kInvalidValue, "length");
  const std::string full = "Fake GPU " + std::to_string(device);
  name[full.copy(name, static_cast<size_t>(length) - 1)] = 0;
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER();
  REFUSE_IF(!is_device(device), kInvalidDevice, "number");
  const DeviceSpec& spec = state.devices[device].spec;
  const std::map<int, int> known = {
      {75, spec.arch / 10}, {76, spec.arch % 10}, {16, spec.multiprocessors}, {97, spec.shared}};
  REFUSE_IF(!known.count(attribute), kInvalidValue, "attribute " + std::to_string(attribute));
  *value = known.at(attribute);
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER();
  REFUSE_IF(!is_device(device), kInvalidDevice, "number");
  state.retained++;
  *context = &state.devices[device].primary;
  return kSuccess;
}

int cuStreamGetCtx(void* handle, void** context) {
  ENTER();
  const Stream* stream = find(state.streams, handle);
  REFUSE_IF(!stream && !is_default(handle), kInvalidHandle, "no such stream");
  REFUSE_IF(!stream && !thread.current(), kInvalidContext, "no context is current");
  *context = stream ? stream->context : thread.current();
  return kSuccess;
}

int cuCtxGetDevice(int* device) {
  ENTER();
  REFUSE_IF(!thread.current(), kInvalidContext, "no context is current");
  *device = thread.current()->device;
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) {
  ENTER();
  REFUSE_IF(!is_context(context), kInvalidContext, "no such context");
  thread.stack.push_back(static_cast<Context*>(context));
  return kSuccess;
}

// What gives something back does so even where it reports a failure: that of work before it.
int cuCtxPopCurrent_v2(void** context) {
  const Call call(__func__);
  REFUSE_IF(!thread.current(), kInvalidContext, "no context is current");
  if (context) *context = thread.current();
  thread.stack.pop_back();
  return call.injected;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const Call call(__func__);
  REFUSE_IF(*mode < kGlobal || *mode > kRelaxed, kInvalidValue, "mode");
  if (call.injected && *mode == kRelaxed) return call.injected;
  std::swap(*mode, thread.mode);
  return call.injected;
}

int cuModuleLoadData(void** out, const void* image) {
  if (const unsigned delay = load_delay) usleep(delay);
  ENTER();
  REFUSE_IF(!thread.current(), kInvalidContext, "no context is current");
  REFUSE_IF(thread.mode != kRelaxed && break_captures(false), kCaptureUnsupported,
            "a stream is capturing");
  std::string copy = copy_image(static_cast<const char*>(image));
  REFUSE_IF(copy.empty(), kInvalidImage, "not an ELF file");
  const int device = state.devices[thread.current()->device].spec.arch;
  REFUSE_IF(!runs_on(copy, device), kNoBinary,
            std::to_string(architecture(copy)) + " on " + std::to_string(device));
  auto module = std::make_unique<Module>();
  module->context = thread.current();
  module->image = &*state.images.insert(std::move(copy)).first;
  *out = module.get();
  state.modules[*out] = std::move(module);
  return kSuccess;
}

int cuModuleUnload(void* handle) {
  const Call call(__func__);
  const Module* module = find(state.modules, handle);
  REFUSE_IF(!module, kInvalidHandle, "no such module");
  REFUSE_IF(module->context != thread.current(), kInvalidContext, "a module of another context");
  state.modules.erase(handle);
  return call.injected;
}

int cuModuleGetFunction(void** out, void* handle, const char* name) {
  ENTER();
  Module* module = find(state.modules, handle);
  REFUSE_IF(!module, kInvalidHandle, "no such module");
  REFUSE_IF(module->context != thread.current(), kInvalidContext, "a module of another context");
  Function function{module, name, {}};
  REFUSE_IF(!read_function(*module->image, &function), kNotFound, name);
  *out = &module->functions.emplace(name, std::move(function)).first->second;
  return kSuccess;
}

int cuFuncSetAttribute(void* handle, int attribute, int value) {
  ENTER();
  Function* function = find_function(handle);
  REFUSE_IF(!function, kInvalidHandle, "no such function");
  REFUSE_IF(!thread.current(), kInvalidContext, "no context is current");
  if (attribute == kLargeClusters) {
    function->most_cluster = value ? 16 : 8;
    return kSuccess;
  }
  REFUSE_IF(attribute != kMaxDynamicShared, kInvalidValue, "another attribute");
  const int most = state.devices[function->module->context->device].spec.shared;
  REFUSE_IF(value < 0 || value > most, kInvalidValue, std::to_string(value) + " bytes");
  function->shared = static_cast<uint32_t>(value);
  return kSuccess;
}

}  // extern "C"
