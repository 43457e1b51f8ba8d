// Types and services shared by every op of the core.
//
// The core is one C library without a framework in it. A framework binding describes its tensors
// with `TwinfuseTensor`, lends what it owns through `TwinfuseContext`, and makes one call per op.
// Nothing throws or exits across this interface, and nothing is kept between calls except launch
// counters and, of GPUs, contexts, loaded kernels and measured choices.
//
// Every function that returns `TwinfuseStatus` leaves the text for a failure in
// `twinfuse_last_error()`, which belongs to the calling thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TWINFUSE_API __attribute__((visibility("default")))
#else
#define TWINFUSE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Bindings compare this with `twinfuse_abi_version()` before the first call. Raised whenever a
// struct or a signature in include/twinfuse/ changes.
#define TWINFUSE_ABI_VERSION 8

typedef enum TwinfuseStatus {
  TWINFUSE_OK = 0,
  // The call is wrong in a way that the native layer refuses too (shapes, dtypes, devices).
  TWINFUSE_INVALID_ARGUMENT = 1,
  // The call is valid but no kernel serves it. The caller takes its reference path; the error text
  // is the reason to show.
  TWINFUSE_UNSUPPORTED = 2,
  // The framework's allocator returned NULL.
  TWINFUSE_OUT_OF_MEMORY = 3,
  // The CUDA driver refused a call, whose error text is its own, or a kernel's machine code in the
  // library is damaged.
  TWINFUSE_DRIVER_ERROR = 4,
} TwinfuseStatus;

typedef enum TwinfuseDtype {
  TWINFUSE_FLOAT32 = 0,
  TWINFUSE_FLOAT64 = 1,
  TWINFUSE_BFLOAT16 = 2,
  TWINFUSE_FLOAT16 = 3,
} TwinfuseDtype;
#define TWINFUSE_DTYPE_COUNT 4

typedef enum TwinfuseDevice {
  TWINFUSE_CPU = 0,
  TWINFUSE_CUDA = 1,
} TwinfuseDevice;

// How float32 is multiplied on a GPU. CPU kernels do not look at it.
typedef enum TwinfusePrecision {
  TWINFUSE_PRECISION_IEEE = 0,  // to the accuracy of float32
  TWINFUSE_PRECISION_TF32 = 1,  // operands rounded to 10 bits of mantissa
} TwinfusePrecision;

// A dense array lent for the length of one call. Strides count elements, may be zero or huge for
// inputs, and describe any view the framework can make. `data` may be NULL when a size is 0.
typedef struct TwinfuseTensor {
  void* data;
  int32_t dtype;  // TwinfuseDtype
  int32_t ndim;
  const int64_t* sizes;    // [ndim]
  const int64_t* strides;  // [ndim], in elements
} TwinfuseTensor;

typedef void (*TwinfuseTask)(void* argument, int64_t index);

// What the framework lends for one call. The core starts no threads and allocates no memory of its
// own for kernels.
typedef struct TwinfuseContext {
  int32_t device;        // TwinfuseDevice of every tensor in the call
  int32_t device_index;  // CUDA: the framework's ordinal
  void* stream;          // CUDA: CUstream; CPU: NULL
  int32_t precision;     // TwinfusePrecision

  // CPU: runs `task(argument, i)` for every i in [0, count), possibly at the same time, and returns
  // when all are done. NULL means serial. `num_threads` is how many can run at once; results never
  // depend on it.
  int32_t num_threads;
  // CPU: multiply-adds for which waking one more thread is worth its while; 0: what suits a pool
  // whose threads wait awake, as OpenMP's do for a time.
  int64_t thread_work;
  void (*parallel_for)(void* opaque, int64_t count, TwinfuseTask task, void* argument);

  // Scratch of at least `bytes` on the call's device, uninitialised, valid until the framework has
  // finished the call; CPU scratch needs no particular alignment. NULL on failure.
  void* (*allocate)(void* opaque, size_t bytes);

  void* opaque;  // handed back to both callbacks
} TwinfuseContext;

TWINFUSE_API int32_t twinfuse_abi_version(void);
TWINFUSE_API const char* twinfuse_version(void);

// Text of the calling thread's last failure: "linear_relu: weight: expected ..., got ...".
TWINFUSE_API const char* twinfuse_last_error(void);

// The CPU instruction set whose kernels run here: "amx_bf16", "avx512_bf16", "avx512", "avx2" or
// "portable". The best one the processor has, or the one forced by TWINFUSE_ISA when it is first
// asked for; a forced one that the processor or the build lacks falls back to the best, and
// `twinfuse_isa_note()` says so (it is empty otherwise).
TWINFUSE_API const char* twinfuse_isa(void);
TWINFUSE_API const char* twinfuse_isa_note(void);
// Comma-separated list of what this build contains.
TWINFUSE_API const char* twinfuse_built_isas(void);

// The kernel table: every kernel this process can launch, and how often each has been.
TWINFUSE_API int32_t twinfuse_kernel_count(void);
TWINFUSE_API const char* twinfuse_kernel_name(int32_t index);  // NULL when out of range
TWINFUSE_API int64_t twinfuse_kernel_launches(int32_t index);  // -1 when out of range

// Which GPU kernels compute what is estimated, unless it was measured. A *problem* (operands, sizes
// and architecture of one product) and its candidates are text; csrc/gpu/tuning.h says of what.
//
// Notes the problems of the calling thread's calls from now on, until `twinfuse_tune_end`. Returns
// those noted since the last time, a line for each candidate: problem, kernel, number of splits
// (0: a way of computing, which decides what problems follow), and 1 for the candidate that was
// taken, else 0, with tabs between them. Valid until the thread's next call of this function.
TWINFUSE_API const char* twinfuse_tune_record(void);
TWINFUSE_API void twinfuse_tune_end(void);  // and forgets what was forced
// While this thread records, its calls take this candidate. NULL for `kernel`: no longer.
TWINFUSE_API void twinfuse_tune_force(const char* problem, const char* kernel, int32_t splits);
// Measured choices for every thread, over those of before: lines as above, of which the last column
// may be missing. Lines without a meaning are left out, and kernels that do not exist or cannot
// compute the problem are never taken. NULL: none but those of the build. Returns the number of
// lines that were understood.
TWINFUSE_API int32_t twinfuse_tune_select(const char* choices);
// `call(name)` runs when a GPU (a context of it) is used for the first time, in the thread that
// uses it and before that thread chooses a kernel. NULL: no longer.
typedef void (*TwinfuseOnDevice)(const char* name);
TWINFUSE_API void twinfuse_tune_on_device(TwinfuseOnDevice call);

// Name of the kernel that `role` ("linear_relu_forward", "linear_relu_backward", ...) would take
// for this dtype and device, or NULL with the reason in `twinfuse_last_error()`.
TWINFUSE_API const char* twinfuse_find_kernel(const char* role, int32_t dtype, int32_t device);

// Comma-separated list of the GPU architectures that this build has machine code for: "8.0, 9.0".
TWINFUSE_API const char* twinfuse_gpu_architectures(void);

// What serves calls on the GPU with this ordinal: "cuda" (machine code of this build), "triton"
// (code that a compiler makes in this process), or NULL with the reason in `twinfuse_last_error()`.
// Opens the driver; needs no context.
TWINFUSE_API const char* twinfuse_device_backend(int32_t device_index);

// Machine code for one architecture. Pointers stay valid until the process ends.
typedef struct TwinfuseCompiledKernel {
  const void* image;
  const char* entry;  // name of the function in it
  int32_t warps;
  int32_t shared;  // bytes
} TwinfuseCompiledKernel;

// Compiles a kernel for GPUs of architecture `arch` (90 is 9.0). `name` is that of a variant in
// csrc/triton/catalogue.py, listed there for the architecture `listed`. Several threads may call at
// the same time, and while they do the core holds no lock.
//
// Returns TWINFUSE_OK, or a failure with a text of at most `capacity` bytes in `message`: the call
// that needed the kernel is then unsupported. After TWINFUSE_UNSUPPORTED that kernel is not asked
// for again, after any other failure it is.
typedef int32_t (*TwinfuseKernelCompiler)(const char* name, int32_t listed, int32_t arch,
                                          TwinfuseCompiledKernel* kernel, char* message,
                                          int64_t capacity);

// Used from now on for architectures without machine code in this build; NULL: those are not
// served. `twinfuse_gpu_sources()` is the hash of the sources (csrc/embed.py) whose variants it
// must compile: others may take other arguments.
TWINFUSE_API void twinfuse_set_kernel_compiler(TwinfuseKernelCompiler compiler);
TWINFUSE_API const char* twinfuse_gpu_sources(void);

#ifdef __cplusplus
}  // extern "C"
#endif
