// Launches, which are recorded, and what they need.
#include <cstring>
#include <utility>

#include "fake_call.h"

using namespace fake;

namespace {

constexpr uint32_t kCooperative = 2, kCluster = 4;  // attributes of a launch
constexpr int kElementSizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

int at_once(const Context* context) {
  return context->occupancy * state.devices[context->device].spec.multiprocessors;
}
bool has_no_clusters(const Context* context) {
  return state.devices[context->device].spec.arch < 90;
}

}  // namespace

extern "C" {

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads,
                                                size_t shared) {
  ENTER();
  const Function* function = find_function(handle);
  REFUSE_IF(!function, kInvalidHandle, "no such function");
  REFUSE_IF(function->module->context != thread.current(), kInvalidContext, "of another context");
  REFUSE_IF(threads < 1 || threads > 1024, kInvalidValue, "threads " + std::to_string(threads));
  *blocks = shared > function->shared ? 0 : thread.current()->occupancy;
  return kSuccess;
}

int cuOccupancyMaxActiveClusters(int* clusters, void* handle, const LaunchConfig* config) {
  ENTER();
  const Function* function = find_function(handle);
  REFUSE_IF(!function, kInvalidHandle, "no such function");
  const Context* context = function->module->context;
  REFUSE_IF(context != thread.current(), kInvalidContext, "of another context");
  REFUSE_IF(config->attribute_count != 1 || config->attributes->id != kCluster, kInvalidValue,
            "no cluster");
  const uint32_t size = config->attributes->value[0];
  // The device decides, which is no mistake of the caller.
  if (!size || size > function->most_cluster || has_no_clusters(context)) return kInvalidCluster;
  REFUSE_IF(config->shared > function->shared, kInvalidValue, "shared memory");
  *clusters = at_once(context) / static_cast<int>(size);
  return kSuccess;
}

int cuMemsetD32Async(uint64_t at, unsigned value, size_t count, void* handle) {
  ENTER();
  REFUSE_IF(!thread.current(), kInvalidContext, "no context is current");
  Stream* stream = find(state.streams, handle);
  REFUSE_IF(!stream && !is_default(handle), kInvalidHandle, "no such stream");
  REFUSE_IF(is_legacy(handle) && break_captures(true), kCaptureImplicit, "legacy stream");
  REFUSE_IF(stream && stream->capturing && !stream->valid, kCaptureInvalidated, "stream");
  REFUSE_IF(!at || at % 4 || !count, kInvalidValue, text(count) + " words");
  state.memsets.push_back({at, count, state.launches.size(), handle, value});
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
  const uint32_t compiled = function->threads;
  REFUSE_IF(function->at_most ? threads > compiled : threads != compiled, kOutOfResources,
            text(threads) + " threads, compiled for " + text(compiled));
  REFUSE_IF(config->shared > function->shared, kInvalidValue,
            text(config->shared) + " bytes of shared memory, allowed " + text(function->shared));
  REFUSE_IF(!arguments || extra, kInvalidValue, "arguments");
  Recorded record{{}, function->entry, {}};
  Launch& launch = record.launch;
  for (uint32_t i = 0; i < config->attribute_count; i++) {
    const Attribute& attribute = config->attributes[i];
    const uint32_t* value = attribute.value;
    REFUSE_IF(attribute.id != kCooperative && attribute.id != kCluster, kInvalidValue,
              "attribute " + text(attribute.id));
    if (attribute.id == kCooperative) {
      launch.cooperative = static_cast<int32_t>(value[0]);
      const auto most = static_cast<uint64_t>(at_once(context));
      REFUSE_IF(value[0] && uint64_t{grid[0]} * grid[1] * grid[2] > most, kTooLarge,
                text(grid[0]) + " blocks, " + text(most) + " at once");
    } else {
      for (int d = 0; d < 3; d++) {
        REFUSE_IF(!value[d] || grid[d] % value[d], kInvalidValue, "cluster");
        launch.cluster[d] = value[d];
      }
      const uint32_t size = value[0] * value[1] * value[2];
      REFUSE_IF(size > function->most_cluster || has_no_clusters(context), kInvalidCluster,
                "a cluster of " + text(size));
    }
  }
  for (const Parameter& parameter : function->parameters) {
    const void* argument = arguments[record.arguments.size()];
    REFUSE_IF(!argument, kInvalidValue, "argument " + text(record.arguments.size()));
    record.arguments.emplace_back(static_cast<const char*>(argument), parameter.size);
    if (parameter.size != kMapSize) continue;
    REFUSE_IF(std::memcmp(argument, &kMagic, sizeof kMagic), kInvalidValue, "no descriptor");
  }
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
