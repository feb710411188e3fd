// The product of a step: a block's slice of the matrix, held in registers from the first step to
// the last, by the state of a few rows, in shared memory.
//
//   sums[split][row][unit] = sum over the split's terms k of state[row][k] M[k][unit]
//
// M is W_hh^T in the forward and W_hh in the backward. The terms are split over warps; the caller
// adds the splits' sums, in their order. Either class defines
//
//   Number, Acc, State   storage, accumulation, and an element of the state as an operand
//   kUnits, kTerms       columns of the slice; terms at most, the rest being zeros
//   kTileRows            rows of one product
//   kPlanes              operands that add up to one element of the state
//   kStateStride         elements from one row of the state to the next
//   kSplits, kThreads
#pragma once

#include "device.cuh"

namespace rnnfast::cuda {

template <class Number>
__device__ auto matrix_element(const Number* w_hh, int H, bool transposed, int k, int unit)
    -> decltype(widen(Number{})) {
  if (k >= H || unit >= H) return 0;
  return widen(w_hh[transposed ? int64_t(unit) * H + k : int64_t(k) * H + unit]);
}

// Whether a lane may bring the terms of a unit 16 bytes a load: they are adjacent, units being rows.
template <class Number>
__device__ bool terms_are_vectors(const Number* w_hh, int H, bool transposed) {
  return transposed && H % (16 / sizeof(Number)) == 0 &&
         reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
}

// ----------------------------------------------------------------------------- by tensor cores
//
// The matrix is the left operand, 16 units by K terms, so that the few rows are the narrow side: 8.
// A 16-bit state is the sum of two operands, high and low, as a float32 state rounded to one of
// them would lose half of its digits: 2^-18 is lost in bf16, 2^-22 in f16. The low one of f16 is
// scaled, so that it does not underflow.
//
// Which term is which within a fragment does not matter as long as both operands agree. So a lane
// takes the terms of two steps from 16 adjacent bytes of the state, in one load.
template <class Number_, int WARPS, int UNIT_TILES, int SPLITS, int K_STEPS>
struct ByTensorCores {
  using Number = Number_;
  using Acc = float;
  static constexpr bool kTf32 = sizeof(Number) == 4;
  using State = std::conditional_t<kTf32, float, uint16_t>;

  static constexpr int kTileRows = 8;
  static constexpr int kUnits = WARPS * UNIT_TILES * 16;
  static constexpr int kSplits = SPLITS;
  static constexpr int kThreads = WARPS * SPLITS * 32;
  static constexpr int kStepTerms = kTf32 ? 8 : 16;
  static constexpr int kSplitTerms = K_STEPS * kStepTerms;
  static constexpr int kTerms = SPLITS * kSplitTerms;
  static constexpr int kPlanes = kTf32 ? 1 : 2;
  static constexpr float kLowScale = std::is_same_v<Number, f16> ? 2048.0f : 1.0f;
  // Four lanes read 64 bytes of a row; rows an odd number of 64 bytes apart share no bank.
  static constexpr int kStateStride =
      kTerms + (kTerms * sizeof(State) % 128 == 0 ? 64 / int(sizeof(State)) : 0);
  static constexpr int kPerLoad = 16 / sizeof(State);
  static_assert(K_STEPS % 2 == 0, "a load serves two steps");
  static_assert(kTerms % kUnits == 0 || kUnits >= kTerms, "the last block's units are terms");

  uint32_t a[UNIT_TILES][K_STEPS][4];
  int warp, split, group, quad;  // of the lane: its row of a fragment, and its terms

  __device__ void load(const Number* w_hh, int H, int unit0, bool transposed) {
    warp = threadIdx.x / 32 % WARPS;
    split = threadIdx.x / (32 * WARPS);
    group = threadIdx.x % 32 / 4;
    quad = threadIdx.x % 4;
    if (terms_are_vectors(w_hh, H, transposed)) return load_vectors(w_hh, H, unit0);
    RNNFAST_UNROLL
    for (int tile = 0; tile < UNIT_TILES; ++tile) {
      RNNFAST_UNROLL
      for (int step = 0; step < K_STEPS; ++step) {
        RNNFAST_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int unit = unit0 + (warp * UNIT_TILES + tile) * 16 + group + (r & 1) * 8;
          const int k = split * kSplitTerms + (step / 2) * 4 * kPerLoad + quad * kPerLoad +
                        (step % 2) * kPerLoad / 2 + (r >> 1) * kPerLoad / 4;
          if constexpr (kTf32) {
            const float w = round_to_tf32(matrix_element(w_hh, H, transposed, k, unit));
            memcpy(&a[tile][step][r], &w, 4);
          } else {
            Number pair[2];
            narrow(matrix_element(w_hh, H, transposed, k, unit), &pair[0]);
            narrow(matrix_element(w_hh, H, transposed, k + 1, unit), &pair[1]);
            a[tile][step][r] = uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
          }
        }
      }
    }
  }

  // The same where rows of W_hh are the units, 16 bytes a load, which are the terms of two steps as
  // those of the state are: one by one they take as long as ten steps.
  __device__ void load_vectors(const Number* w_hh, int H, int unit0) {
    RNNFAST_UNROLL
    for (int tile = 0; tile < UNIT_TILES; ++tile) {
      RNNFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int unit = unit0 + (warp * UNIT_TILES + tile) * 16 + group + half * 8;
        RNNFAST_UNROLL
        for (int pair = 0; pair < K_STEPS / 2; ++pair) {
          const int k = split * kSplitTerms + pair * 4 * kPerLoad + quad * kPerLoad;
          uint4 loaded = {};
          if (k < H && unit < H) {
            loaded = *reinterpret_cast<const uint4*>(w_hh + int64_t(unit) * H + k);
          }
          uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
          RNNFAST_UNROLL
          for (int i = 0; i < 4; ++i) {
            if constexpr (kTf32) {
              float w;
              memcpy(&w, &words[i], 4);
              w = round_to_tf32(w);
              memcpy(&words[i], &w, 4);
            }
            a[tile][pair * 2 + i / 2][half + i % 2 * 2] = words[i];
          }
        }
      }
    }
  }

  // The operands whose sum is an element of the state.
  static __device__ void split_state(float x, State (&planes)[kPlanes]) {
    if constexpr (kTf32) {
      planes[0] = round_to_tf32(x);
    } else {
      Number high, low;
      narrow(x, &high);
      const float rest = x - widen(high);
      // An infinity is all in the high part: what is left of it would be NaN.
      narrow(fabsf(widen(high)) <= 3.4e38f ? rest * kLowScale : 0.0f, &low);
      planes[0] = high.bits;
      planes[1] = low.bits;
    }
  }

  __device__ void multiply(const State* state, float* sums, int sums_stride) const {
    // Independent sums, to hide the latency of one; with one tile of units also of the steps'
    // parity.
    constexpr int kParities = UNIT_TILES == 1 ? 2 : 1, kChains = kParities * kPlanes;
    float c[UNIT_TILES][kChains][4] = {};
    const State* row = state + group * kStateStride + split * kSplitTerms + quad * kPerLoad;
    RNNFAST_UNROLL
    for (int pair = 0; pair < K_STEPS / 2; ++pair) {
      RNNFAST_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const uint4 b = *reinterpret_cast<const uint4*>(row + plane * kTileRows * kStateStride +
                                                        pair * 4 * kPerLoad);
        RNNFAST_UNROLL
        for (int tile = 0; tile < UNIT_TILES; ++tile) {
          mma(Number{}, c[tile][plane * kParities], a[tile][pair * 2], b.x, b.y);
          mma(Number{}, c[tile][(plane + 1) * kParities - 1], a[tile][pair * 2 + 1], b.z, b.w);
        }
      }
    }
    RNNFAST_UNROLL
    for (int tile = 0; tile < UNIT_TILES; ++tile) {
      RNNFAST_UNROLL
      for (int r = 0; r < 4; ++r) {
        float sum = 0;
        RNNFAST_UNROLL
        for (int chain = kChains - 1; chain >= 0; --chain) {  // low first
          sum += c[tile][chain][r];
          if (chain == kParities) sum *= 1 / kLowScale;
        }
        const int unit = (warp * UNIT_TILES + tile) * 16 + group + (r >> 1) * 8;
        const int at = split * kTileRows + quad * 2 + (r & 1);
        sums[at * sums_stride + unit] = sum;
      }
    }
  }
};

// ------------------------------------------------------------------------------------- by FMA
//
// IEEE float32 and float64. A lane owns UNITS columns and TERMS of their terms; the state, which
// all lanes of a split need alike, is broadcast. With LANES = 16 the halves of a warp are two
// splits. Two columns a lane halve the loads of the state per multiply-add.
template <class Number_, int LANES, int UNITS, int WARPS, int WARP_SPLITS, int TERMS, int ROWS>
struct ByFma {
  using Number = Number_;
  using Acc = Number;
  using State = Number;

  static constexpr int kTileRows = ROWS;
  static constexpr int kUnits = WARPS * LANES * UNITS;
  static constexpr int kSplits = WARP_SPLITS * (32 / LANES);
  static constexpr int kThreads = WARPS * WARP_SPLITS * 32;
  static constexpr int kTerms = kSplits * TERMS;
  static constexpr int kPlanes = 1;
  static constexpr int kStateStride = kTerms;
  static constexpr int kPerLoad = 16 / sizeof(State);
  static_assert(TERMS % kPerLoad == 0, "loads of 16 bytes");
  static_assert(kTerms % kUnits == 0 || kUnits >= kTerms, "the last block's units are terms");

  Number w[UNITS][TERMS];
  int column, split;

  __device__ void load(const Number* w_hh, int H, int unit0, bool transposed) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    column = warp % WARPS * LANES * UNITS + lane % LANES;
    split = warp / WARPS * (32 / LANES) + lane / LANES;
    if (terms_are_vectors(w_hh, H, transposed)) return load_vectors(w_hh, H, unit0);
    RNNFAST_UNROLL
    for (int n = 0; n < UNITS; ++n) {
      RNNFAST_UNROLL
      for (int k = 0; k < TERMS; ++k) {
        w[n][k] = matrix_element(w_hh, H, transposed, split * TERMS + k,
                                 unit0 + column + n * LANES);
      }
    }
  }

  // One by one, each load would touch a line of every lane.
  __device__ void load_vectors(const Number* w_hh, int H, int unit0) {
    RNNFAST_UNROLL
    for (int n = 0; n < UNITS; ++n) {
      const int unit = unit0 + column + n * LANES;
      RNNFAST_UNROLL
      for (int k = 0; k < TERMS; k += kPerLoad) {
        const int term = split * TERMS + k;
        uint4 loaded = {};
        if (unit < H && term < H) {
          loaded = *reinterpret_cast<const uint4*>(w_hh + int64_t(unit) * H + term);
        }
        memcpy(&w[n][k], &loaded, 16);
      }
    }
  }

  static __device__ void split_state(Number x, State (&planes)[1]) { planes[0] = x; }

  __device__ void multiply(const State* state, Number* sums, int sums_stride) const {
    Number c[UNITS][ROWS] = {};
    const State* terms = state + split * TERMS;
    RNNFAST_UNROLL
    for (int k = 0; k < TERMS; k += kPerLoad) {
      RNNFAST_UNROLL
      for (int row = 0; row < ROWS; ++row) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(terms + row * kStateStride + k);
        State h[kPerLoad];
        memcpy(h, &loaded, 16);
        RNNFAST_UNROLL
        for (int v = 0; v < kPerLoad; ++v) {
          RNNFAST_UNROLL
          for (int n = 0; n < UNITS; ++n) c[n][row] += w[n][k + v] * h[v];
        }
      }
    }
    RNNFAST_UNROLL
    for (int n = 0; n < UNITS; ++n) {
      RNNFAST_UNROLL
      for (int row = 0; row < ROWS; ++row) {
        sums[(split * ROWS + row) * sums_stride + column + n * LANES] = c[n][row];
      }
    }
  }
};

}  // namespace rnnfast::cuda
