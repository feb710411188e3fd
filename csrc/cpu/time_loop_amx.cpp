// The recurrence in bfloat16 for AMX, beside the AVX-512 of time_loop_avx512.cpp, which says why the
// includes come first.
#include "time_loop.h"

#if defined(RNNFAST_AMX)
#include <immintrin.h>
#include <cstring>
#include <type_traits>

#define RNNFAST_ISA amx
#define RNNFAST_BFLOAT16
#define RNNFAST_TILES
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_VECTOR_REGISTERS 32
#if defined(RNNFAST_EMULATE_AVX512)
#pragma GCC target("avx2,fma")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include "time_loop.inc.h"
#endif
