// The time loop for AVX2 with FMA. See time_loop_avx512.cpp for why the includes come first.
#include "time_loop.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <cstring>

#define RNNFAST_ISA avx2
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_VECTOR_REGISTERS 16
#pragma GCC target("avx2,fma,f16c")
#include "time_loop.inc.h"
#endif
