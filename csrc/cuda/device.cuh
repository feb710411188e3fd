// What the kernels use of the machine, in one place: numbers, tensor cores, barriers, memory that
// blocks share. tests/cuda_emulation/ has the same functions for a CPU.
#pragma once

#ifdef RNNFAST_EMULATED
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#define RNNFAST_UNROLL _Pragma("unroll")

namespace rnnfast::cuda {

// ----------------------------------------------------------------------------------- numbers

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct tf32 {  // float32 in memory
  float value;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(tf32 x) { return x.value; }
__device__ inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }
__device__ inline void narrow(float x, tf32* to) { to->value = x; }
__device__ inline void narrow(float x, bf16* to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
__device__ inline void narrow(float x, f16* to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}

// To the nearest TF32, in a float's bits.
__device__ inline float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// Both are computed, and one is taken: no branch, which would keep a thread's items apart.
__device__ inline float pick(bool first, float a, float b) {
  float picked;
  asm("{.reg .pred p; setp.ne.s32 p, %1, 0; selp.f32 %0, %2, %3, p;}"
      : "=f"(picked) : "r"(int(first)), "f"(a), "f"(b));
  return picked;
}
__device__ inline float fast_exp(float x) { return __expf(x); }
__device__ inline float fast_divide(float x, float y) { return __fdividef(x, y); }

// -------------------------------------------------------------------------------- tensor cores

// c += a b, 16 units by 8 rows by 16 (tf32: 8) terms; fragments as in the PTX manual, mma.m16n8k16
// and mma.m16n8k8.
__device__ inline void mma(bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(f16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(tf32, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -------------------------------------------------------------------------------------- blocks

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
}

// All threads of the blocks of a cluster arrive, and wait for all to have arrived: what each wrote
// before, to shared memory, its own or another's, is then seen by all.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // "aligned" asks for whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();  // no plan launches clusters of this code
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores 16 bytes to the same place of the shared memory of another block of the cluster.
__device__ inline void store_to_rank(uint4* own, int rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = uint32_t(__cvta_generic_to_shared(own));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

// Global memory as the other blocks see it, past this multiprocessor's own cache.
__device__ inline uint4 load_shared_by_grid(const uint4* from) { return __ldcg(from); }

// All threads of `blocks` blocks, which must run at the same time, arrive at a counter that began
// as zero, and wait for all to have arrived for the `meeting`-th time (from 1 on). A block's
// barrier and one thread's release and acquire order what all of them wrote and read.
__device__ inline void grid_arrive(unsigned long long* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
  }
}
__device__ inline void grid_wait(const unsigned long long* counter, int blocks,
                                 unsigned long long meeting) {
  if (threadIdx.x == 0) {
    unsigned long long arrived;
#ifdef RNNFAST_BOUNDED_BARRIERS
    long long spins = 0;
#endif
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(arrived) : "l"(counter) : "memory");
#ifdef RNNFAST_BOUNDED_BARRIERS
      if (++spins > (1ll << 22)) __trap();  // seconds
#endif
    } while (arrived < meeting * blocks);
  }
  __syncthreads();
}

}  // namespace rnnfast::cuda
#endif
