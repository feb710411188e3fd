// The time loop for the baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "time_loop.h"

#include <cstring>

#define RNNFAST_ISA fallback
#define RNNFAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RNNFAST_VECTOR_REGISTERS 32
#else
#define RNNFAST_VECTOR_REGISTERS 16
#endif
#include "time_loop.inc.h"
