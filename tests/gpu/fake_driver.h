// What the fake driver (fake_driver.cc) keeps, and what tests ask and tell it (fake_control.cc).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace fake {

enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinary = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kOutOfResources = 701,
  kTooLarge = 720,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureImplicit = 906,
  kInvalidCluster = 912,
};

enum CaptureMode { kGlobal, kThreadLocal, kRelaxed };

struct DeviceSpec {
  int32_t arch, multiprocessors, shared;
};
struct Context {
  int device;
  int occupancy = 1;  // blocks of any kernel on a multiprocessor; the core asks once
};
struct Device {
  DeviceSpec spec;
  Context primary;
};
struct Stream {
  Context* context;
  bool blocking;  // waits for the legacy stream
  bool capturing = false, valid = true;
};
struct Module;
struct Parameter {
  uint32_t offset, size;
};
struct Function {
  Module* module;
  std::string entry;
  std::vector<Parameter> parameters;
  uint32_t threads = 0;        // that it was compiled for, or
  bool at_most = false;        // so many and fewer
  uint32_t shared = 48 << 10;  // bytes that a launch may have
  uint32_t most_cluster = 8;   // blocks of a cluster
};
struct Module {
  Context* context;
  const std::string* image;
  std::map<std::string, Function> functions;
};

// What an encoded descriptor holds, in place of the hardware's own bits.
struct Encoding {
  uint64_t magic, address, size[5], stride[4];
  uint16_t box[5];
  uint8_t traversal[5], rank, type, interleave, swizzle, promotion, fill;
};
constexpr uint64_t kMagic = 0x50414d454b4146;  // "FAKEMAP"
constexpr size_t kMapSize = 128;
static_assert(sizeof(Encoding) <= kMapSize);

struct Attribute {
  uint32_t id, padding, value[16];
};
struct LaunchConfig {
  uint32_t grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  uint32_t attribute_count;
};
struct Launch {  // as tests read it
  const char *entry, *image;
  uint64_t image_size;
  uint32_t grid[3], block[3], shared, attribute_count;
  void *stream, *context;
  int32_t device, captured;
  uint64_t argument_count;
  int32_t cooperative;
  uint32_t cluster[3];
};
struct Memset {  // before the launch of this index
  uint64_t at, count, launch;
  void* stream;
  uint32_t value;
};
struct Recorded {
  Launch launch;
  std::string entry;
  std::vector<std::string> arguments;
};

// Everything but what belongs to a thread; `mutex` guards it.
struct State {
  std::mutex mutex;
  bool initialized = false;
  int version = 13000;
  int occupancy = 1;           // of contexts to come
  std::deque<Device> devices;  // neither these nor contexts ever move
  std::deque<Context> contexts;
  std::map<void*, std::unique_ptr<Stream>> streams;
  std::map<void*, std::unique_ptr<Module>> modules;
  std::set<std::string> images;  // kept, since records point to them

  std::deque<Recorded> launches;
  std::vector<Memset> memsets;
  std::vector<const char*> calls;
  std::string complaint, failed;
  int64_t fail_index = -1;
  int fail_error = 0;
  std::map<std::string, int> fail_functions;
  int64_t retained = 0;   // references to primary contexts
  int64_t abandoned = 0;  // contexts on the stacks of threads that have ended
};
inline State state;
inline std::atomic<unsigned> load_delay{0};  // microseconds

struct Thread {
  std::vector<Context*> stack;
  int mode = kGlobal;
  ~Thread();

  Context* current() const { return stack.empty() ? nullptr : stack.back(); }
};
extern thread_local Thread thread;

// The ELF file at `image`, whose end its own tables tell; empty if it is none.
std::string copy_image(const char* image);
int architecture(const std::string& image);
// Plain code, as nvcc makes it unless told, is for all devices of a major number from its own on;
// that of "f" targets for those of their family, and that of "a" targets for its own alone.
bool runs_on(const std::string& image, int device);
// Parameters of the function of that name. False if there is none.
bool read_function(const std::string& image, Function* function);

}  // namespace fake
