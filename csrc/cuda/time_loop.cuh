// The kernel: one launch walks all steps of one layer, forward or backward (see time_loop.h).
//
// Who owns what. A group of blocks owns a few rows of the batch and walks their steps alone; block
// `rank` of the group owns kUnits of the H units. Rows are taken kTileRows at a time, `tiles` times
// a step. Blocks of different groups never meet.
//
// Where the operands live. A block's slice of W_hh is in registers, for all steps. The state of the
// group's rows (forward h, backward dz), complete, is in every block's shared memory, twice: one
// copy is read while the next is written. With one block that is all; in a cluster every block
// sends its units to all others (distributed shared memory); in a grid (FAR) they are written to
// global memory, and each tile is fetched from there before its product. What a step needs from
// global memory besides (x, or h and its gradient) is loaded one tile ahead.
//
// What synchronises. Within a step, a tile's product and the use of its sums are separated by
// __syncthreads(). Between steps all blocks of the group meet once: by __syncthreads(), the
// cluster's barrier or a counter in global memory. A block arrives as soon as its units are on
// their way; the outputs are stored, and the next loads sent off, before it waits.
#pragma once

#include "time_loop.h"
#include "products.cuh"
#include "variants.h"

namespace rnnfast::cuda {

// ---------------------------------------------------------------------------------- activation

__device__ inline double tanh_of(double x) { return tanh(x); }

// x + x z P(z) below 9/16, with minimax coefficients; beyond it 1 - 2 / (exp(2|x|) + 1), which is
// at least 1/2 and forgives the error of exp. NaN passes through both, infinities give +-1.
__device__ inline float tanh_of(float x) {
  const float z = x * x, magnitude = fabsf(x);
  float p = z * -0.00617981968047f + 0.0210074679527f;
  p = p * z - 0.0538374331294f;
  p = p * z + 0.133324523105f;
  p = p * z - 0.333333138896f;
  const float large = 1.0f - fast_divide(2.0f, fast_exp(2.0f * magnitude) + 1.0f);
  return pick(magnitude < 0.5625f, x + x * (z * p), copysignf(large, x));
}

template <class Acc, int N>
__device__ void activate_all(Acc (&z)[N], bool relu) {
  if (relu) {
    RNNFAST_UNROLL
    for (int n = 0; n < N; ++n) z[n] = z[n] <= 0 ? Acc(0) : z[n];
  } else {
    RNNFAST_UNROLL
    for (int n = 0; n < N; ++n) z[n] = tanh_of(z[n]);
  }
}

// d act', from the output h: ReLU is no factor, but stops what may be infinite.
template <class Acc>
__device__ Acc through(Acc d, Acc h, bool relu) {
  return relu ? (h <= 0 ? Acc(0) : d) : d * (1 - h * h);
}

// ---------------------------------------------------------------------------------------- walk

struct Visit {
  int64_t t, first, live;  // the step, its first row, and its number of rows
};

// The number of steps that a row takes part in: those with more rows than its index.
__device__ inline int64_t length_of(const Layer& p, int64_t row) {
  if (!p.steps) return p.T;
  int64_t low = 1, high = p.T;  // every row is in the first step
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    p.steps[p.T + middle] > row ? low = middle + 1 : high = middle;
  }
  return low;
}

// The s-th of the steps to visit.
__device__ inline Visit visit(const Layer& p, int64_t s, int64_t steps) {
  const int64_t t = p.descending ? steps - 1 - s : s;
  if (!p.steps) return {t, t * p.B, p.B};
  return {t, p.steps[t], p.steps[p.T + t]};
}

// --------------------------------------------------------------------------------- shared memory

// Offsets in bytes; the launcher and the kernel agree on them here.
template <class Product, bool FAR>
struct SharedLayout {
  using Acc = typename Product::Acc;
  // Lanes that write sums of different rows at once find different banks.
  static constexpr int kSumsStride = Product::kUnits + 4;
  static constexpr size_t kStateTile =
      size_t(Product::kPlanes) * Product::kTileRows * Product::kStateStride;  // elements

  size_t state = 0, sums, own, bias, w_ih, x, total;

  __host__ __device__ SharedLayout(int tiles, bool backward) {
    constexpr size_t kRows = Product::kTileRows, kUnits = Product::kUnits;
    sums = state + (FAR ? 1 : 2 * tiles) * kStateTile * sizeof(typename Product::State);
    own = sums + Product::kSplits * kRows * kSumsStride * sizeof(Acc);
    bias = own + (backward ? 0 : tiles * kRows * kUnits * sizeof(Acc));
    w_ih = bias + (backward ? 0 : kUnits * sizeof(Acc));
    x = w_ih + (backward ? 0 : kFusedInput * kUnits * sizeof(Acc));
    total = x + (backward ? 0 : 2 * kRows * kFusedInput * sizeof(Acc));
  }
};

// -------------------------------------------------------------------------------------- kernel

template <class Product, bool FAR, bool BACKWARD>
__global__ void __launch_bounds__(Product::kThreads, 1) time_loop(Layer p, Grid grid) {
  using Number = typename Product::Number;
  using Acc = typename Product::Acc;
  using State = typename Product::State;
  using Layout = SharedLayout<Product, FAR>;
  constexpr int kUnits = Product::kUnits, kTileRows = Product::kTileRows;
  // Whether one block holds all the units that its terms allow, so that groups are single blocks.
  constexpr bool kAlone = !FAR && kUnits >= Product::kTerms;
  constexpr int kItems = (kTileRows * kUnits + Product::kThreads - 1) / Product::kThreads;

  const int H = p.H, tiles = grid.tiles;
  const int rank = blockIdx.x % grid.blocks, group = blockIdx.x / grid.blocks;
  const int groups = gridDim.x / grid.blocks;
  const int unit0 = rank * kUnits;

  const Layout layout(tiles, BACKWARD);
  unsigned char* shared = dynamic_shared();
  State* const state = reinterpret_cast<State*>(shared + layout.state);
  Acc* const sums = reinterpret_cast<Acc*>(shared + layout.sums);
  Acc* const own = reinterpret_cast<Acc*>(shared + layout.own);    // forward: [tiles, rows, units]
  Acc* const bias = reinterpret_cast<Acc*>(shared + layout.bias);  // [units]
  Acc* const w_ih = reinterpret_cast<Acc*>(shared + layout.w_ih);  // [I, units]
  Acc* const x_rows = reinterpret_cast<Acc*>(shared + layout.x);   // [2, rows, kFusedInput]

  // FAR: every group's counter, then every group's two copies of the state.
  auto* const counter = static_cast<unsigned long long*>(p.workspace) + group * kCounterStride;
  State* const far_state =
      reinterpret_cast<State*>(static_cast<unsigned long long*>(p.workspace) +
                               groups * kCounterStride) +
      group * 2 * tiles * Layout::kStateTile;
  unsigned long long meetings = 0;
  const auto arrive = [&] {
    if constexpr (FAR) {
      grid_arrive(counter);
    } else if (!kAlone && grid.blocks > 1) {
      cluster_arrive();
    }
  };
  const auto wait = [&] {
    if constexpr (FAR) {
      grid_wait(counter, grid.blocks, ++meetings);
    } else if (kAlone || grid.blocks == 1) {
      __syncthreads();
    } else {
      cluster_wait();
    }
  };
  const auto publish = [&](int copy, int tile, int row, int unit, Acc value) {
    State planes[Product::kPlanes];
    Product::split_state(value, planes);
    RNNFAST_UNROLL
    for (int plane = 0; plane < Product::kPlanes; ++plane) {
      const size_t at = (copy * tiles + tile) * Layout::kStateTile +
                        (plane * kTileRows + row) * Product::kStateStride + unit;
      (FAR ? far_state : state)[at] = planes[plane];
    }
  };
  // In a cluster a tile's first `rows` rows are written to the block's own shared memory, and from
  // there to that of the others: a thread reads 16 bytes once and sends them to every n-th block.
  const auto send = [&](int copy, int tile, int rows) {
    if (FAR || kAlone || grid.blocks == 1) return;
    constexpr int kRowVectors = kUnits * sizeof(State) / 16;
    constexpr int kVectors = Product::kPlanes * kTileRows * kRowVectors;
    static_assert(FAR || kAlone || Product::kThreads % kVectors == 0);
    const int v = threadIdx.x % kVectors, plane_row = v / kRowVectors;
    __syncthreads();
    if (plane_row % kTileRows >= rows) return;
    State* units = state + (copy * tiles + tile) * Layout::kStateTile +
                   plane_row * Product::kStateStride + unit0;
    uint4* at = reinterpret_cast<uint4*>(units) + v % kRowVectors;
    const uint4 value = *at;
    for (int i = 1 + threadIdx.x / kVectors; i < grid.blocks; i += Product::kThreads / kVectors) {
      const int other = rank + i;
      store_to_rank(at, other < grid.blocks ? other : other - grid.blocks, value);
    }
  };

  Product product;
  product.load(static_cast<const Number*>(p.w_hh), H, unit0, !BACKWARD);
  if constexpr (!BACKWARD) {
    for (int u = threadIdx.x; u < kUnits; u += Product::kThreads) {
      const bool inside = unit0 + u < H;
      Acc sum = 0;
      if (inside && p.b_ih) sum += widen(static_cast<const Number*>(p.b_ih)[unit0 + u]);
      if (inside && p.b_hh) sum += widen(static_cast<const Number*>(p.b_hh)[unit0 + u]);
      bias[u] = sum;
      for (int i = 0; i < p.I; ++i) {
        w_ih[i * kUnits + u] =
            inside ? Acc(widen(static_cast<const Number*>(p.w_ih)[int64_t(unit0 + u) * p.I + i]))
                   : Acc(0);
      }
    }
  }
  // The terms from H on, and the rows from B on, are zeros.
  for (size_t i = threadIdx.x; i < (FAR ? 1 : 2 * tiles) * Layout::kStateTile;
       i += Product::kThreads) {
    state[i] = State(0);
  }
  arrive();
  wait();

  // An item is a row and a unit of a tile; thread n owns the items n, n + kThreads, ... One beyond the
  // tile counts as of its first row, so that it may be computed and dropped.
  struct Item {
    int row, unit;
    bool exists;
  };
  const auto item_of = [&](int j) -> Item {
    const int item = threadIdx.x + j * Product::kThreads;
    const int row = item / kUnits, unit = item % kUnits;
    return {row < kTileRows ? row : 0, unit, row < kTileRows && unit0 + unit < H};
  };
  const auto for_each_item = [&](auto&& f) {
    RNNFAST_UNROLL
    for (int j = 0; j < kItems; ++j) {
      const Item item = item_of(j);
      if (item.exists) f(j, item.row, item.unit);
    }
  };
  // The element of a tile's rows of x that a thread brings where the projection is fused.
  static_assert(Product::kThreads >= kTileRows * kFusedInput);
  const int x_row = p.I > 0 ? int(threadIdx.x) / p.I : kTileRows;
  const int x_feature = int(threadIdx.x) - x_row * p.I;

  for (int64_t row0 = int64_t(group) * tiles * kTileRows; row0 < p.B;
       row0 += int64_t(groups) * tiles * kTileRows) {
    const int64_t steps = length_of(p, row0);
    const auto rows_of = [&](int tile) {  // that the batch has; at least one, for the arithmetic
      const int64_t left = p.B - row0 - tile * kTileRows;
      return left > kTileRows ? kTileRows : left < 1 ? 1 : int(left);
    };

    // What a tile needs from global memory in a visit, as it lies there: a conversion, or a branch
    // around a load, would have the load waited for on the spot. Items that take no part load the
    // first element.
    struct Operands {
      Acc z[kItems];     // forward: x W_ih^T of the items
      Number x;          // or, fused, an element of the rows of x
      Number h[kItems];  // backward
      Number g[kItems];
    };
    Operands ahead = {};
    const auto fetch = [&](const Visit& v, int tile) {
      const int64_t tile_row = row0 + tile * kTileRows;
      if (!BACKWARD && p.I > 0) {
        const int64_t b = tile_row + x_row;
        const int64_t base =
            p.steps ? (v.first + b) * p.x_stride_b : v.t * p.x_stride_t + b * p.x_stride_b;
        const bool exists = x_row < kTileRows && b < v.live;
        ahead.x = static_cast<const Number*>(p.x)[exists ? base + x_feature * p.x_stride_i : 0];
        return;
      }
      RNNFAST_UNROLL
      for (int j = 0; j < kItems; ++j) {
        const Item item = item_of(j);
        const int64_t b = tile_row + item.row;
        const int64_t at = item.exists && b < v.live ? (v.first + b) * H + unit0 + item.unit : 0;
        if constexpr (BACKWARD) {
          ahead.h[j] = static_cast<const Number*>(p.out)[at];
        } else {
          ahead.z[j] = static_cast<const Acc*>(p.x)[at];
        }
      }
      if constexpr (BACKWARD) {
        if (!p.grad_out) return;
        RNNFAST_UNROLL
        for (int j = 0; j < kItems; ++j) {
          const Item item = item_of(j);
          const int64_t b = tile_row + item.row;
          const int64_t base =
              p.steps ? (v.first + b) * p.g_stride_b : v.t * p.g_stride_t + b * p.g_stride_b;
          const int64_t at = base + (unit0 + item.unit) * p.g_stride_h;
          ahead.g[j] = static_cast<const Number*>(p.grad_out)[item.exists && b < v.live ? at : 0];
        }
      }
    };

    // The sums of a tile's product with copy `copy` of the state.
    const auto multiply = [&](int copy, int tile) {
      const State* from = state + (copy * tiles + tile) * Layout::kStateTile;
      if constexpr (FAR) {
        const uint4* far = reinterpret_cast<const uint4*>(
            far_state + (copy * tiles + tile) * Layout::kStateTile);
        constexpr int kRowLoads = Product::kStateStride * sizeof(State) / 16;
        RNNFAST_UNROLL
        for (int plane = 0; plane < Product::kPlanes; ++plane) {
          const int first = plane * kTileRows * kRowLoads, loads = rows_of(tile) * kRowLoads;
          for (int i = threadIdx.x; i < loads; i += Product::kThreads) {
            reinterpret_cast<uint4*>(state)[first + i] = load_shared_by_grid(far + first + i);
          }
        }
        from = state;
      }
      if (FAR || tile > 0) __syncthreads();  // the sums before have been used
      product.multiply(from, sums, Layout::kSumsStride);
      __syncthreads();
    };
    const auto sum_of = [&](int row, int unit) {
      Acc sum = 0;
      RNNFAST_UNROLL
      for (int split = 0; split < Product::kSplits; ++split) {
        sum += sums[(split * kTileRows + row) * Layout::kSumsStride + unit];
      }
      return sum;
    };

    if constexpr (!BACKWARD) {
      for (int tile = 0; tile < tiles; ++tile) {
        for_each_item([&](int, int row, int unit) {
          const int64_t b = row0 + tile * kTileRows + row;
          Acc h = 0;
          if (p.hx && b < p.B) h = widen(static_cast<const Number*>(p.hx)[b * H + unit0 + unit]);
          own[(tile * kTileRows + row) * kUnits + unit] = h;
          publish(0, tile, row, unit0 + unit, h);
        });
        send(0, tile, rows_of(tile));
      }
      arrive();
      wait();
    }

    int copy = 0, x_copy = 0;
    int64_t live_before = 0;
    Visit now = visit(p, 0, steps);
    fetch(now, 0);
    for (int64_t s = 0; s < steps; ++s) {
      Visit next;
      for (int tile = 0; tile < tiles; ++tile, x_copy ^= 1) {
        // The first step of all has no state before it, and a tile may have no row in this step.
        const int64_t tile_row = row0 + tile * kTileRows;
        const bool any = (s > 0 || (!BACKWARD && p.hx)) &&
                         tile_row < (BACKWARD && live_before > now.live ? live_before : now.live);
        Acc* const x_here = x_rows + x_copy * kTileRows * kFusedInput;
        if (!BACKWARD && x_row < kTileRows) {
          x_here[x_row * kFusedInput + x_feature] = widen(ahead.x);
        }
        any ? multiply(copy, tile) : __syncthreads();
        // Without a branch around an item, so that the items of a thread overlap: those that take no
        // part are computed, too.
        Acc results[kItems], z[kItems];  // h or dz
        int at_item[kItems];
        RNNFAST_UNROLL
        for (int j = 0; j < kItems; ++j) {
          const Item item = item_of(j);
          const Acc sum = sum_of(item.row, item.unit);
          results[j] = any ? sum : Acc(0);
          at_item[j] = (tile * kTileRows + item.row) * kUnits + item.unit;
          if constexpr (!BACKWARD) z[j] = bias[item.unit] + ahead.z[j];
        }
        if constexpr (BACKWARD) {
          if (p.grad_h_n && now.live > live_before) {  // the first visit of some rows
            for_each_item([&](int j, int row, int unit) {
              const int64_t b = tile_row + row;
              if (b < live_before || b >= now.live) return;
              results[j] += widen(static_cast<const Number*>(p.grad_h_n)[b * H + unit0 + unit]);
            });
          }
          if (p.grad_hx && now.live < live_before) {  // the last visit of some was the one before
            for_each_item([&](int j, int row, int unit) {
              const int64_t b = tile_row + row;
              if (b < now.live || b >= live_before) return;
              narrow(results[j], static_cast<Number*>(p.grad_hx) + b * H + unit0 + unit);
            });
          }
          RNNFAST_UNROLL
          for (int j = 0; j < kItems; ++j) {
            const Acc d = through(widen(ahead.g[j]) + results[j], Acc(widen(ahead.h[j])), p.relu);
            results[j] = tile_row + item_of(j).row < now.live ? d : Acc(0);
          }
        } else {
          for (int i = 0; i < p.I; ++i) {
            RNNFAST_UNROLL
            for (int j = 0; j < kItems; ++j) {
              const Item item = item_of(j);
              z[j] += x_here[item.row * kFusedInput + i] * w_ih[i * kUnits + item.unit];
            }
          }
          RNNFAST_UNROLL
          for (int j = 0; j < kItems; ++j) results[j] += z[j];
          activate_all(results, p.relu);
          RNNFAST_UNROLL
          for (int j = 0; j < kItems; ++j) {  // a row that has ended, or not begun, keeps its state
            const Item item = item_of(j);
            if (item.exists && tile_row + item.row >= now.live) results[j] = own[at_item[j]];
          }
        }
        for_each_item([&](int j, int row, int unit) {
          if constexpr (!BACKWARD) own[at_item[j]] = results[j];
          publish(copy ^ 1, tile, row, unit0 + unit, results[j]);
        });
        send(copy ^ 1, tile, rows_of(tile));
        const bool last = tile + 1 == tiles;
        if (last) arrive();
        // Nobody waits for these. A packed batch's table is read here too, off the product's path.
        Number* const to = static_cast<Number*>(BACKWARD ? p.dz : p.out);
        for_each_item([&](int j, int row, int unit) {
          const int64_t b = tile_row + row;
          if (b < now.live) narrow(results[j], to + (now.first + b) * H + unit0 + unit);
        });
        next = last ? visit(p, s + 1 < steps ? s + 1 : s, steps) : now;
        fetch(next, last ? 0 : tile + 1);
      }
      wait();
      copy ^= 1;
      live_before = now.live;
      now = next;
    }

    for (int tile = 0; tile < tiles; ++tile) {
      const int64_t tile_row = row0 + tile * kTileRows;
      const bool ends = BACKWARD && p.grad_hx && tile_row < live_before;
      if (ends) multiply(copy, tile);
      for_each_item([&](int, int row, int unit) {
        const int64_t b = tile_row + row, at_b = b * H + unit0 + unit;
        if constexpr (BACKWARD) {
          if (ends && b < live_before) {
            narrow(sum_of(row, unit), static_cast<Number*>(p.grad_hx) + at_b);
          }
        } else if (b < p.B) {
          narrow(own[(tile * kTileRows + row) * kUnits + unit], static_cast<Number*>(p.h_n) + at_b);
        }
      });
    }
    // Before the next rows' state overwrites that which the last products read. (No plan leaves the
    // backward further rows: its tiles take no shared memory in a grid, and a cluster has its own.)
    if (BACKWARD && row0 + int64_t(groups) * tiles * kTileRows < p.B) {
      arrive();
      wait();
    }
  }
}

}  // namespace rnnfast::cuda
