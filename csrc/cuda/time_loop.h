// The CUDA time loop as its callers see it: what a layer is, which kernel takes it, and its launch.
// No PyTorch header here or in the .cu files: nvcc alone compiles them, in seconds.
//
//   forward    z_t = x_t W_ih^T + b_ih + b_hh + h_{t-1} W_hh^T,    h_t = act(z_t)
//   backward   dz_t = (g_t + c_t) act'(h_t),    c_{t-1} = dz_t W_hh,    against the forward's order
//
// with g_t the gradient of h_t from outside and c_t the one that comes back through the recurrence
// (c starts as the gradient of h_n and ends as that of hx); tanh' = 1 - h^2, ReLU' = [h > 0].
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace rnnfast::cuda {

// What the layer is stored in and how its products are rounded. tf32 is stored as float32.
enum class Numbers { f32, tf32, f64, bf16, f16 };

// One layer in one direction. Every pointer is to device memory; T, B, I, H are as in the op.
// `storage` is the layer's dtype, `acc` float (double for f64). Strides count elements.
struct Layer {
  int64_t T = 0, B = 0;
  int I = 0, H = 0;
  bool relu = false;
  bool descending = false;  // the walk begins at the last step

  // Packed rows: int64 [2, T], each step's first row and its number of rows. Null if dense.
  const int64_t* steps = nullptr;

  const void* w_hh = nullptr;  // storage [H, H], contiguous

  // Forward. x is the input [T, B, I] or [rows, I] where I > 0 (the projection is fused), else
  // x W_ih^T as a contiguous acc [T, B, H] or [rows, H].
  const void* x = nullptr;
  int64_t x_stride_t = 0, x_stride_b = 0, x_stride_i = 0;
  const void* w_ih = nullptr;  // storage [H, I], contiguous; null unless fused
  const void* b_ih = nullptr;  // storage [H] or null
  const void* b_hh = nullptr;  // storage [H] or null
  const void* hx = nullptr;    // storage [B, H], contiguous, or null: zeros
  void* out = nullptr;         // storage [T, B, H] or [rows, H], contiguous
  void* h_n = nullptr;         // storage [B, H], contiguous

  // Backward. `out` is read.
  const void* grad_out = nullptr;  // storage [T, B, H] or [rows, H], or null
  int64_t g_stride_t = 0, g_stride_b = 0, g_stride_h = 0;
  const void* grad_h_n = nullptr;  // storage [B, H], contiguous, or null
  void* dz = nullptr;              // storage, as out
  void* grad_hx = nullptr;         // storage [B, H], contiguous, or null

  void* workspace = nullptr;  // Plan::workspace bytes, zeroed by launch(); null if that is 0
};

struct Variant;  // one compiled kernel pair; see variants.h

// How a layer is laid out on a device.
struct Plan {
  const Variant* variant = nullptr;
  int blocks = 0;     // that share a group of rows, each owning `units` of the H units
  int tiles = 0;      // of rows, in a group at once
  int groups = 0;     // of rows, in the grid
  size_t shared = 0;  // bytes of shared memory, per block
  size_t workspace = 0;
};

// A layer's projection is fused up to this many input features.
constexpr int kFusedInput = 8;

// Why no kernel can run a layer. rnnfast/backends.py has the sentences, in this order.
enum class Refusal { none, dtype, capability, hidden_size };

// Fills `plan` from the first row of the table that can run the layer on the current device. `only`
// names the one to take instead.
Refusal make_plan(Numbers numbers, int64_t B, int H, bool backward, Plan* plan,
                  const char* only = nullptr);

const char* name_of(const Variant& variant);

cudaError_t launch(const Plan& plan, const Layer& layer, bool backward, cudaStream_t stream);

}  // namespace rnnfast::cuda
