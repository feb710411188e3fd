// The compiled kernels, as rows that make_plan (plan.cpp) chooses from.
#pragma once

#include <cstddef>

#include "time_loop.h"

namespace rnnfast::cuda {

struct Grid {
  int blocks, tiles;  // as in Plan
};

using Kernel = void (*)(Layer, Grid);

// A group's counter has a cache line of its own; counted in 64-bit words.
constexpr int kCounterStride = 16;

struct Variant {
  const char* name;
  bool far;                 // blocks meet in global memory, else in a cluster
  int largest_hidden_size;  // terms that a block holds
  int units;                // of a block
  int threads;
  int tile_rows;
  size_t state_tile;                            // bytes
  size_t (*shared)(int tiles, bool backward);  // bytes
  Kernel forward, backward;
};

struct Variants {
  const Variant* rows;
  int count;
};

// In the order of preference; time_loop_*.cu.
Variants f32_variants();
Variants tf32_variants();
Variants f64_variants();
Variants bf16_variants();
Variants f16_variants();

}  // namespace rnnfast::cuda
