// csrc/cuda/device.cuh for the CPU: the same functions, a thread of a kernel being a fiber.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define RNNFAST_UNROLL
#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define gridDim (emulation::grid_size())

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads() { emulation::block_barrier(); }

namespace rnnfast::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct tf32 {
  float value;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(tf32 x) { return x.value; }
inline float widen(bf16 x) { return c10::BFloat16(x.bits, c10::BFloat16::from_bits()); }
inline float widen(f16 x) { return c10::Half(x.bits, c10::Half::from_bits()); }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, tf32* to) { to->value = x; }
inline void narrow(float x, bf16* to) { to->bits = c10::BFloat16(x).x; }
inline void narrow(float x, f16* to) { to->bits = c10::Half(x).x; }

inline float round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isfinite(x)) bits = (bits + 0x1000u) & ~0x1FFFu;  // ties away from zero
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float pick(bool first, float a, float b) { return first ? a : b; }
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }

// The operands' elements, in the layout of the PTX manual.
inline float element(bf16, uint32_t pair, int i) { return widen(bf16{uint16_t(pair >> 16 * i)}); }
inline float element(f16, uint32_t pair, int i) { return widen(f16{uint16_t(pair >> 16 * i)}); }
inline float element(tf32, uint32_t word, int) {
  word &= ~0x1FFFu;  // what the tensor cores read of it
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

template <class Number>
void mma(Number number, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kPerWord = std::is_same_v<Number, tf32> ? 1 : 2;
  const int lane = threadIdx.x % 32;
  auto& given = emulation::warp_words();  // [lane][a0, a1, a2, a3, b0, b1]
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(given[lane], words, sizeof words);
  emulation::warp_barrier();
  for (int r = 0; r < 4; ++r) {
    const int m = lane / 4 + (r >> 1) * 8, n = lane % 4 * 2 + (r & 1);
    float sum = c[r];
    for (int half = 0; half < 2; ++half) {
      for (int quad = 0; quad < 4; ++quad) {
        for (int i = 0; i < kPerWord; ++i) {
          sum += element(number, given[m % 8 * 4 + quad][m / 8 + 2 * half], i) *
                 element(number, given[n * 4 + quad][4 + half], i);
        }
      }
    }
    c[r] = sum;
  }
  emulation::warp_barrier();
}

inline unsigned char* dynamic_shared() { return emulation::shared_memory(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }

inline void store_to_rank(uint4* own, int rank, uint4 value) {
  *static_cast<uint4*>(emulation::of_rank(own, rank, sizeof value)) = value;
}

inline uint4 load_shared_by_grid(const uint4* from) { return *from; }

inline void grid_arrive(unsigned long long* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ++*counter;
    emulation::progressed();
  }
}
inline void grid_wait(const unsigned long long* counter, int blocks, unsigned long long meeting) {
  if (threadIdx.x == 0) emulation::wait([&] { return *counter >= meeting * blocks; });
  __syncthreads();
}

}  // namespace rnnfast::cuda
