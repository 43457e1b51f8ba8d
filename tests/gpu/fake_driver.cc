// A CUDA driver without a GPU: what `TWINFUSE_CUDA_DRIVER` names in tests.
//
// It keeps contexts, streams, modules and functions as the real one does, refuses what the real one
// refuses (and says why in `fake_complaint`), and records launches with their arguments instead of
// running them. Arguments are split by the parameter table in the machine code itself, so that a
// wrong order or size shows.
#include "fake_driver.h"

#include <unistd.h>

#include <cstring>
#include <utility>

using namespace fake;

namespace fake {

thread_local Thread thread;

Thread::~Thread() {
  const std::lock_guard lock(state.mutex);
  state.abandoned += static_cast<int64_t>(stack.size());
}

}  // namespace fake

namespace {

constexpr int kMaxDynamicShared = 8;
constexpr int kElementSizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

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
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when stream is capturing"}},
    {901, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "capture failed due to a previous error"}},
    {906, {"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "dependency on a stream that is capturing"}},
};

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

// The legacy stream under both of its names, and the one of each thread.
bool is_default(const void* stream) { return reinterpret_cast<uintptr_t>(stream) <= 2; }
bool is_legacy(const void* stream) { return reinterpret_cast<uintptr_t>(stream) <= 1; }

template <class T>
T* find(const std::map<void*, std::unique_ptr<T>>& among, void* handle) {
  const auto found = among.find(handle);
  return found == among.end() ? nullptr : found->second.get();
}

Function* find_function(const void* handle) {
  for (auto& [module_handle, module] : state.modules)
    for (auto& [name, function] : module->functions)
      if (&function == handle) return &function;
  return nullptr;
}

// Ends captures that the call is not allowed beside. True if there were any.
bool break_captures(bool only_blocking) {
  bool any = false;
  for (auto& [handle, stream] : state.streams) {
    if (!stream->capturing || (only_blocking && !stream->blocking)) continue;
    any = true;
    stream->valid = false;
  }
  return any;
}

std::string text(uint64_t value) { return std::to_string(value); }

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
  const int built = architecture(copy), device = state.devices[thread.current()->device].spec.arch;
  // Code from 9.0 on is for one architecture.
  const bool runs = built == device || (built < 90 && built / 10 == device / 10 && built < device);
  REFUSE_IF(!runs, kNoBinary, std::to_string(built) + " on " + std::to_string(device));
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
  REFUSE_IF(attribute != kMaxDynamicShared, kInvalidValue, "another attribute");
  const int most = state.devices[function->module->context->device].spec.shared;
  REFUSE_IF(value < 0 || value > most, kInvalidValue, std::to_string(value) + " bytes");
  function->shared = static_cast<uint32_t>(value);
  return kSuccess;
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned* traversal,
                           int interleave, int swizzle, int promotion, int fill) {
  ENTER();
  const auto at = reinterpret_cast<uintptr_t>(address);
  REFUSE_IF(!map || reinterpret_cast<uintptr_t>(map) % 64, kInvalidValue, "address of the map");
  REFUSE_IF(type < 0 || type > 12, kInvalidValue, "type");
  REFUSE_IF(rank < 1 || rank > 5, kInvalidValue, "rank " + text(rank));
  REFUSE_IF(!at || at % 16, kInvalidValue, "address");
  REFUSE_IF(interleave, kInvalidValue, "interleaved, which no kernel reads");
  REFUSE_IF(swizzle < 0 || swizzle > 3, kInvalidValue, "swizzle");
  REFUSE_IF(promotion < 0 || promotion > 3, kInvalidValue, "promotion");
  REFUSE_IF(fill < 0 || fill > 1, kInvalidValue, "fill");
  Encoding encoding = {};
  for (unsigned d = 0; d < rank; d++) {
    REFUSE_IF(sizes[d] < 1 || sizes[d] > uint64_t{1} << 32, kInvalidValue,
              "size " + text(sizes[d]));
    REFUSE_IF(box[d] < 1 || box[d] > 256, kInvalidValue, "box " + text(box[d]));
    // The innermost one is ignored.
    REFUSE_IF(d && (traversal[d] < 1 || traversal[d] > 8), kInvalidValue, "traversal");
    encoding.size[d] = sizes[d];
    encoding.box[d] = static_cast<uint16_t>(box[d]);
    encoding.traversal[d] = static_cast<uint8_t>(traversal[d]);
    if (d + 1 == rank) continue;
    const uint64_t stride = strides[d];
    REFUSE_IF(!stride || stride % 16 || stride >> 40, kInvalidValue, "stride " + text(stride));
    encoding.stride[d] = stride;
  }
  const unsigned inner = box[0] * kElementSizes[type];
  REFUSE_IF(inner % 16 || (swizzle && inner > 16u << swizzle), kInvalidValue,
            "a box of " + text(inner) + " bytes in a row");
  encoding.magic = kMagic;
  encoding.address = at;
  encoding.rank = static_cast<uint8_t>(rank);
  encoding.type = static_cast<uint8_t>(type);
  encoding.swizzle = static_cast<uint8_t>(swizzle);
  encoding.promotion = static_cast<uint8_t>(promotion);
  encoding.fill = static_cast<uint8_t>(fill);
  std::memset(map, 0, kMapSize);
  std::memcpy(map, &encoding, sizeof encoding);
  return kSuccess;
}

int cuLaunchKernelEx(const LaunchConfig* config, void* handle, void** arguments, void** extra) {
  ENTER();
  const Function* function = find_function(handle);
  REFUSE_IF(!function, kInvalidHandle, "no such function");
  REFUSE_IF(!thread.current(), kInvalidContext, "no context is current");
  const Context* context = function->module->context;
  REFUSE_IF(context != thread.current(), kInvalidHandle, "a function of another context");
  Stream* stream = find(state.streams, config->stream);
  REFUSE_IF(!stream && !is_default(config->stream), kInvalidHandle, "no such stream");
  REFUSE_IF(stream && stream->context != context, kInvalidHandle, "a stream of another context");
  REFUSE_IF(is_legacy(config->stream) && break_captures(true), kCaptureImplicit, "legacy stream");
  REFUSE_IF(stream && stream->capturing && !stream->valid, kCaptureInvalidated, "stream");

  const uint32_t *grid = config->grid, *block = config->block;
  for (int d = 0; d < 3; d++)
    REFUSE_IF(!grid[d] || grid[d] > (d ? 0xFFFFu : 0x7FFFFFFFu), kInvalidValue, "grid");
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  REFUSE_IF(!threads || threads > 1024 || threads % 32, kInvalidValue, "block");
  REFUSE_IF(threads != function->threads, kOutOfResources,
            text(threads) + " threads, compiled for " + text(function->threads));
  REFUSE_IF(config->shared > function->shared, kInvalidValue,
            text(config->shared) + " bytes of shared memory, allowed " + text(function->shared));
  REFUSE_IF(!arguments || extra, kInvalidValue, "arguments");
  Recorded record{{}, function->entry, {}};
  for (const Parameter& parameter : function->parameters) {
    const void* argument = arguments[record.arguments.size()];
    REFUSE_IF(!argument, kInvalidValue, "argument " + text(record.arguments.size()));
    record.arguments.emplace_back(static_cast<const char*>(argument), parameter.size);
    if (parameter.size != kMapSize) continue;
    REFUSE_IF(std::memcmp(argument, &kMagic, sizeof kMagic), kInvalidValue, "no descriptor");
  }
  Launch& launch = record.launch;
  launch.image = function->module->image->data();
  launch.image_size = function->module->image->size();
  std::memcpy(launch.grid, grid, sizeof launch.grid);
  std::memcpy(launch.block, block, sizeof launch.block);
  launch.shared = config->shared;
  launch.attribute_count = config->attribute_count;
  launch.stream = config->stream;
  launch.context = thread.current();
  launch.device = context->device;
  launch.captured = stream && stream->capturing;
  launch.argument_count = record.arguments.size();
  state.launches.push_back(std::move(record));
  state.launches.back().launch.entry = state.launches.back().entry.c_str();
  return kSuccess;
}

}  // extern "C"
