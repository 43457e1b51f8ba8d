// The instructions that the kernels are written with. Under nvcc they are the GPU's; the tests
// bring stand-ins, under which the same kernels run on a CPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define TWINFUSE_DEVICE __device__ __forceinline__
#define TWINFUSE_KERNEL(name, Kernel)                               \
  extern "C" __global__ void __launch_bounds__(Kernel::kThreads, 1) \
      name(const __grid_constant__ Kernel::Arguments arguments) {   \
    Kernel::run(arguments);                                         \
  }

namespace twinfuse::cuda {

using Half = __half;
using Bfloat16 = __nv_bfloat16;

TWINFUSE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TWINFUSE_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
TWINFUSE_DEVICE void block_sync() { __syncthreads(); }
TWINFUSE_DEVICE void warp_sync() { __syncwarp(); }
TWINFUSE_DEVICE void spin() {}

TWINFUSE_DEVICE void* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

TWINFUSE_DEVICE float to_float(float x) { return x; }
TWINFUSE_DEVICE float to_float(Half x) { return __half2float(x); }
TWINFUSE_DEVICE float to_float(Bfloat16 x) { return __bfloat162float(x); }
TWINFUSE_DEVICE void convert(float x, float* to) { *to = x; }
TWINFUSE_DEVICE void convert(float x, Half* to) { *to = __float2half_rn(x); }
TWINFUSE_DEVICE void convert(float x, Bfloat16* to) { *to = __float2bfloat16_rn(x); }

TWINFUSE_DEVICE float fast_exp(float x) { return __expf(x); }
TWINFUSE_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }

// To the nearest number that TF32 has. Volatile, or the parts of all weights would be computed
// before the first step, for which there are no registers.
TWINFUSE_DEVICE uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// c[16, 8] += a[16, 16] b[16, 8] (k = 8 for TF32), in the fragments of the PTX manual.
TWINFUSE_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TWINFUSE_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TWINFUSE_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What other blocks read while they run: in the L2 cache, where all of them look. An element is
// written as a whole; 16 bytes are read as four words, each at some time of its own. (PTX promises
// nothing of words that are read over halves; the hardware does.)
TWINFUSE_DEVICE void publish(Half* to, Half value) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(__half_as_ushort(value))
               : "memory");
}
TWINFUSE_DEVICE void publish(Bfloat16* to, Bfloat16 value) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(__bfloat16_as_ushort(value))
               : "memory");
}
TWINFUSE_DEVICE void publish(float* to, float value) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}
TWINFUSE_DEVICE uint4 fetch(const void* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

// Counts the bytes that come into a block's memory, and completes a phase when all that were
// expected have.
struct alignas(8) Barrier {
  uint64_t state;
};
TWINFUSE_DEVICE uint32_t shared_address(const void* own) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(own));
}
// By one thread, which then must meet all others of the cluster.
TWINFUSE_DEVICE void begin_barrier(Barrier* barrier) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
      : "memory");
}
// Once a phase, even if some have come already.
TWINFUSE_DEVICE void expect_bytes(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Phases have parities 0 and 1 in turn; of the one before nobody waits any more.
TWINFUSE_DEVICE void wait_barrier(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// To a block of the cluster, where data and barrier have the addresses that they have here.
TWINFUSE_DEVICE void send(int block, void* to, const uint4& words, Barrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3,%4,%5,%6}, "
      "[barrier];\n"
      "}" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(block), "r"(words.x), "r"(words.y), "r"(words.z),
      "r"(words.w)
      : "memory");
}
TWINFUSE_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// What this thread has published is there for whoever sees what it publishes after.
TWINFUSE_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
TWINFUSE_DEVICE bool any_of_warp(bool here) { return __any_sync(0xffffffff, here); }
// What the lane has whose number differs in these bits.
TWINFUSE_DEVICE uint32_t from_lane(uint32_t word, int bits) {
  return __shfl_xor_sync(0xffffffff, word, bits);
}
// The larger of each half.
TWINFUSE_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

}  // namespace twinfuse::cuda

#else
#include "cuda_shim.h"
#endif
