// The time loop for AVX-512 (F, BW, DQ, VL). Everything included before the pragma stays baseline
// code: an inline function of a shared header must not carry these instructions elsewhere.
#include "time_loop.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <cstring>

#define RNNFAST_ISA avx512
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_VECTOR_REGISTERS 32
#if defined(RNNFAST_EMULATE_AVX512)  // the same vectors, each made of two of AVX2's
#pragma GCC target("avx2,fma")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "time_loop.inc.h"
#endif
