// The fused time loop, forward and backward, and the sums of outer products that the weight
// gradients are, for one instruction set (see time_loop.h for what they compute). Included with
// RNNFAST_ISA, RNNFAST_VECTOR_BYTES and RNNFAST_VECTOR_REGISTERS defined; with RNNFAST_BFLOAT16 too,
// for the recurrence in bfloat16 alone, and with RNNFAST_TILES, for its products in AMX's tiles
// (tiles.inc.h).
//
// Ownership   A call owns a Share: rows [b0, b1) and panels [p0, p1) of hidden units, and walks all
//             their steps. Rows never meet, so shares of rows synchronise nothing; shares of panels
//             meet at a barrier after each step. Within a step a share is cut into register blocks
//             of M rows by G panels of N vectors of hidden units.
// Operands    W_hh (and W_ih where the projection is fused) is packed once per call into panels
//             [panel][k][columns]: k-major, columns padded with zeros to whole vectors, so that the
//             inner loop is one broadcast of h[b,k] against N adjacent vectors. bfloat16 comes in
//             pairs, [panel][k / 2][columns][2], against a broadcast pair. The state is never
//             copied: h[t-1] is read from where the output stores it, dz[t+1] from where the backward does.
// Order       Every other step takes the weights from the last to the first, panels of them and, of few
//             rows, terms: it begins with those that a cache still holds from the step before, where
//             in the same order again the cache would have let go of each by its turn.
// Registers   M * G * N accumulators live across the whole sum over k. With many rows a block is
//             tall and one panel wide, since each weight loaded then serves M rows; with one to
//             three it spans panels, to have enough sums under way to cover an addition's latency.
// Padding     Lanes beyond H see only zero weights and are never loaded from or stored to tensors.
//
// No function of the standard library is instantiated here: it could be shared with code that must
// run without these instructions.

// Vectors are passed only between functions of this file and of those that it includes.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rnnfast::cpu::RNNFAST_ISA {
namespace {

#define RNNFAST_INLINE inline __attribute__((always_inline))
#define RNNFAST_LAMBDA_INLINE __attribute__((always_inline))

#include "vectors.inc.h"

#include "tanh.inc.h"

// ------------------------------------------------------------------------------ register blocks

// Vectors across a panel, and the most rows of a block by its width: as many accumulators as leave
// registers for the weights and the broadcast. Tiles use kPanel alone.
#if RNNFAST_VECTOR_REGISTERS == 32 && !defined(RNNFAST_TILES)
constexpr int kPanel = 4;
constexpr int kMaxRows[kPanel] = {8, 8, 8, 6};
// Panels that a block of 1, 2, 3 rows spans.
constexpr int kSpan[] = {2, 2, 2};
#else
constexpr int kPanel = 2;
constexpr int kMaxRows[kPanel] = {8, 6};
constexpr int kSpan[] = {4, 3, 2};
#endif
constexpr int kFewRows = 3;

// K and zeros to whole pairs, or tiles, as packed weights have them.
template <class T>
RNNFAST_INLINE int64_t padded(int64_t K) {
#if defined(RNNFAST_TILES)
  constexpr int64_t whole = L<T> * Sums<T>::pairing;
#else
  constexpr int64_t whole = Sums<T>::pairing;
#endif
  return (K + whole - 1) / whole * whole;
}

// The i-th of n, or of n from the last on.
RNNFAST_INLINE int64_t nth(int64_t i, int64_t n, bool backwards) {
  return backwards ? n - 1 - i : i;
}

// What of a matrix a block reads: element (k, panel g, column n) at data + k * stride_k +
// g * stride_g + n; of pairs, (k, g, n) and (k + 1, g, n) at data + k * stride_k + g * stride_g +
// 2 * n, for every even k.
template <class T>
struct Columns {
  const T* data;
  int64_t stride_k;
  int64_t stride_g;
};

// M rows by G panels of N vectors.
template <class T, int M, int N, int G = 1>
struct Block {
  static constexpr int vectors = G * N;
  V<T> acc[M][vectors];

  RNNFAST_INLINE void clear() {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) acc[m][n] = V<T>{};
  }

  // acc[m] += rows of a tensor, of T or of sums, `last` lanes of the last vector.
  template <class S>
  RNNFAST_INLINE void add(const S* row, int64_t stride, int last) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n)
        acc[m][n] += load_nth<S, vectors>(row + m * stride, n, last);
  }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
  // acc[m][n] += sum_k a[m * lda + k] * w(k, n). Long sums are cut into chains that each start from
  // zero, since every addition rounds at the size of the sum so far. `backwards`: from the last term
  // on, where rows are so few that reading weights is what takes the time.
  RNNFAST_INLINE void product(const T* a, int64_t lda, Columns<T> w, int64_t K, bool backwards) {
    if constexpr (M <= kFewRows && Sums<T>::pairing == 1) {
      if (backwards) {
        const Columns<T> last = {w.data + (K - 1) * w.stride_k, -w.stride_k, w.stride_g};
        return chains<-1>(a + K - 1, lda, last, K);
      }
    }
    chains<1>(a, lda, w, K);
  }
  template <int stride>
  RNNFAST_INLINE void chains(const T* a, int64_t lda, Columns<T> w, int64_t K) {
    constexpr int64_t kChain = 128;
    for (int64_t k = 0; k < K; k += kChain) {
      Block before;  // written and read where k > 0 alone
      if (k > 0) {
        before = *this;
        asm("" : "+m"(before));  // it is what is spilled, not the weights
        clear();
      }
      chain<true>(a + stride * k, lda, stride, {w.data + k * w.stride_k, w.stride_k, w.stride_g},
                  K - k < kChain ? K - k : kChain, L<T>);
      if (k > 0) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
          for (int n = 0; n < vectors; ++n) acc[m][n] += before.acc[m][n];
      }
    }
  }
#pragma GCC diagnostic pop

  // acc[m][n] += sum_k a[m * stride_m + k * stride_k] * w(k, n), in one chain, or a few where the
  // block is too small to cover the latency of a multiply-add otherwise. Unless `whole`, the last
  // vector has `last` lanes (and a product is of one k).
  template <bool whole>
  RNNFAST_INLINE void chain(const T* a, int64_t stride_m, int64_t stride_k, Columns<T> w, int64_t K,
                            int last) {
    using P = Product<T>;
    constexpr int64_t pairing = Sums<T>::pairing;
    constexpr int size = M * vectors;
    constexpr int U = size >= 8 ? 1 : size >= 4 ? 2 : 4;
    const auto load_w = [&](int64_t k, int n) RNNFAST_LAMBDA_INLINE {
      const T* p = w.data + k * w.stride_k + (n / N) * w.stride_g + (n % N) * L<T> * pairing;
      return whole || n < vectors - 1 ? P::load(p) : P::load_part(p, last);
    };
    V<T> part[U][M][vectors];
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < vectors; ++n) part[u][m][n] = u == 0 ? acc[m][n] : V<T>{};
    const auto add = [&](V<T> (&sum)[M][vectors], int64_t k, bool pair) RNNFAST_LAMBDA_INLINE {
      const auto a_m = [&](int m) RNNFAST_LAMBDA_INLINE {
        return P::broadcast(a + m * stride_m + k * stride_k, pair);
      };
      if constexpr (M <= kFewRows) {
        // One weight in a register at a time: these blocks fill the others with sums.
        V<T> am[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) am[m] = a_m(m);
#pragma GCC unroll 16
        for (int n = 0; n < vectors; ++n) {
          V<T> wk = load_w(k, n);
          if constexpr (M > 1) hold(wk);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) sum[m][n] = P::add(sum[m][n], am[m], wk);
        }
      } else {
        V<T> wk[vectors];
#pragma GCC unroll 16
        for (int n = 0; n < vectors; ++n) {
          wk[n] = load_w(k, n);
          hold(wk[n]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const V<T> am = a_m(m);
#pragma GCC unroll 16
          for (int n = 0; n < vectors; ++n) sum[m][n] = P::add(sum[m][n], am, wk[n]);
        }
      }
    };
    int64_t k = 0;
    for (; k + U * pairing <= K; k += U * pairing) {
#pragma GCC unroll 16
      for (int u = 0; u < U; ++u) add(part[u], k + u * pairing, true);
    }
    if (U > 1) {
      for (; k + pairing <= K; k += pairing) add(part[0], k, true);
    }
    if (pairing > 1 && k < K) add(part[0], k, false);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) {
        V<T> sum = part[0][m][n];
#pragma GCC unroll 16
        for (int u = 1; u < U; ++u) sum += part[u][m][n];
        acc[m][n] = sum;
      }
  }
};

// The columns of panel `p` of a packed [K, n] matrix, N vectors wide there.
template <class T, int N>
RNNFAST_INLINE Columns<T> panel_of(const T* packed, int64_t p, int64_t K) {
  const int64_t size = kPanel * L<T> * padded<T>(K);
  return {packed + p * size, N * L<T>, size};
}

// act(z), for `count` vectors, a multiple of 4.
template <class T>
__attribute__((noinline)) void activate(V<T>* z, int count, bool relu) {
  for (int i = 0; i < count; i += 4) {
    V<T> four[4] = {z[i], z[i + 1], z[i + 2], z[i + 3]};
    if (relu) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) four[j] = four[j] < T(0) ? V<T>{} : four[j];  // a NaN is kept
    } else {
      tanh<T, 4>(four);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) z[i + j] = four[j];
  }
}

// Asks for M rows of N vectors that the next step reads: step by step they lie too far apart for
// the processor to foresee.
template <class T, int M, int N>
RNNFAST_INLINE void prefetch(const T* row, int64_t stride) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int byte = 0; byte < N * L<T> * int(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row + m * stride) + byte);
}

// ------------------------------------------------------------------------------------- the cells

struct Tiles;  // the state of a walk in AMX's tiles; empty elsewhere

// A cell says what one block of one step computes: `products` calls add(a, lda, w, K) for each
// product that its sums are of, of rows of `a` and packed weights, and `finish` makes the block's
// results of the sums; M rows of `vectors` vectors of the next step are prefetched on the way.
// `carried` is the block's rows of the state that the walk carries (h[t-1]
// forward, dz[t+1] backward), nullptr for rows at their first visit.

// M rows by G panels of N vectors, the last of them of `last` lanes.
template <int M, int N, int G, class Cell, class T>
RNNFAST_INLINE void sum_and_finish(const Cell& cell, int64_t t, int64_t b, int64_t p, int last,
                                   const T* carried) {
  Block<T, M, N, G> sum;
  sum.clear();
  cell.template products<M, G * N>(
      t, b, p, carried,
      [&](const T* a, int64_t lda, const T* w, int64_t K) RNNFAST_LAMBDA_INLINE {
        sum.product(a, lda, panel_of<T, N>(w, p, K), K, t % 2);
      });
  cell.finish(sum, t, b, p, last, carried == nullptr);
}

template <class T>
struct ForwardCell {
  using Scalar = T;
  const Forward<T>& f;
  int64_t t_next = -1;  // the step after, to be prefetched, or -1
  Tiles* tiles = nullptr;

  const Walk& walk() const { return f.walk; }
  int64_t columns() const { return f.hidden_size; }
  int64_t terms() const { return f.hidden_size; }
  bool backwards() const { return f.walk.reverse; }
  const T* state(int64_t t, int64_t b) const { return f.walk.row(f.out, t, b); }
  int64_t state_stride() const { return f.out.stride_b; }

  template <int M, int N, int G = 1>
  static void block(const ForwardCell& self, int64_t t, int64_t b, int64_t p, int last,
                    const T* carried) {
    sum_and_finish<M, N, G>(self, t, b, p, last, carried);
  }

  template <int M, int vectors, class Add>
  RNNFAST_INLINE void products(int64_t t, int64_t b, int64_t p, const T* carried,
                               const Add& add) const {
    int64_t h_stride = f.out.stride_b;
    if (!carried && f.h0.data) {
      carried = f.h0.data + b * f.h0.stride_b;
      h_stride = f.h0.stride_b;
    }
    // Smallest terms first, the long sum over h from zero: each addition rounds at the size that
    // the sum has by then.
    if (carried) add(carried, h_stride, f.w_hh, f.hidden_size);
    if (f.input_size > 0) {
      if (t_next >= 0 && p * kPanel * L<T> < f.input_size) {
        prefetch<T, M, vectors>(f.walk.row(f.x, t_next, b) + p * kPanel * L<T>, f.x.stride_b);
      }
      add(f.walk.row(f.x, t, b), f.x.stride_b, f.w_ih, f.input_size);
    }
  }

  template <int M, int N, int G>
  RNNFAST_INLINE void finish(Block<T, M, N, G>& z, int64_t t, int64_t b, int64_t p, int last,
                             bool) const {
    constexpr int vectors = G * N;
    T* out = f.walk.row(f.out, t, b) + p * kPanel * L<T>;
    if (f.input_size > 0) {
      if (f.bias) {
        const Sum<T>* bias = f.bias + p * kPanel * L<T>;
#pragma GCC unroll 16
        for (int n = 0; n < vectors; ++n) {
          const V<T> bias_n = load(bias + n * L<T>);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) z.acc[m][n] += bias_n;
        }
      }
    } else {
      z.add(out, f.out.stride_b, last);
    }
    if (t_next >= 0) {
      prefetch<T, M, vectors>(f.walk.row(f.out, t_next, b) + p * kPanel * L<T>, f.out.stride_b);
    }
    V<T> h[(M * vectors + 3) / 4 * 4] = {};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) h[m * vectors + n] = z.acc[m][n];
    activate<Sum<T>>(h, sizeof(h) / sizeof(h[0]), f.relu);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n)
        store_nth<T, vectors>(out + m * f.out.stride_b, n, last, h[m * vectors + n]);
  }
};

template <class T>
struct BackwardCell {
  using Scalar = T;
  const Backward<T>& f;
  int64_t t_next = -1;  // the step after, to be prefetched, or -1
  Tiles* tiles = nullptr;

  const Walk& walk() const { return f.walk; }
  int64_t columns() const { return f.hidden_size; }
  int64_t terms() const { return f.hidden_size; }
  bool backwards() const { return !f.walk.reverse; }
  const T* state(int64_t t, int64_t b) const { return f.walk.row(f.dz, t, b); }
  int64_t state_stride() const { return f.dz.stride_b; }

  template <int M, int N, int G = 1>
  static void block(const BackwardCell& self, int64_t t, int64_t b, int64_t p, int last,
                    const T* carried) {
    sum_and_finish<M, N, G>(self, t, b, p, last, carried);
  }

  template <int M, int vectors, class Add>
  RNNFAST_INLINE void products(int64_t, int64_t b, int64_t p, const T* carried,
                               const Add& add) const {
    const int64_t column = p * kPanel * L<T>;
    if (t_next >= 0) {
      prefetch<T, M, vectors>(f.walk.row(f.out, t_next, b) + column, f.out.stride_b);
      prefetch<T, M, vectors>(f.walk.row(f.dz, t_next, b) + column, f.dz.stride_b);
      if (f.grad_out.data) {
        prefetch<T, M, vectors>(f.walk.row(f.grad_out, t_next, b) + column, f.grad_out.stride_b);
      }
    }
    if (carried) add(carried, f.dz.stride_b, f.w_hh, f.hidden_size);
  }

  template <int M, int N, int G>
  RNNFAST_INLINE void finish(Block<T, M, N, G>& dh, int64_t t, int64_t b, int64_t p, int last,
                             bool first_visit) const {
    constexpr int vectors = G * N;
    const int64_t column = p * kPanel * L<T>;
    if (first_visit && f.grad_h_n.data) {
      dh.add(f.grad_h_n.data + b * f.grad_h_n.stride_b + column, f.grad_h_n.stride_b, last);
    }
    if (f.grad_out.data) dh.add(f.walk.row(f.grad_out, t, b) + column, f.grad_out.stride_b, last);
    const T* out = f.walk.row(f.out, t, b) + column;
    T* dz = f.walk.row(f.dz, t, b) + column;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) {
        const V<T> h = load_nth<T, vectors>(out + m * f.out.stride_b, n, last);
        const V<T> g = dh.acc[m][n];
        store_nth<T, vectors>(dz + m * f.dz.stride_b, n, last,
                              f.relu ? (h <= Sum<T>(0) ? V<T>{} : g) : g * (Sum<T>(1) - h * h));
      }
  }
};

// --------------------------------------------------------------------------------------- the walk

// The blocks of 1 to most rows that are N vectors wide.
template <class Cell, int N, int most>
struct BlocksOf {
  using Function = decltype(&Cell::template block<1, N>);
  Function of[most];
  constexpr BlocksOf() : of() { fill<most>(); }
  template <int M>
  constexpr void fill() {
    of[M - 1] = Cell::template block<M, N>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

// Rows [r, end) in blocks of about equal height, each run(block, r, height): a low block at the end
// would waste its loads.
template <class Cell, int N, class Run>
RNNFAST_INLINE void level_blocks(int64_t r, int64_t end, const Run& run) {
  constexpr int most = kMaxRows[N - 1];
  static constexpr BlocksOf<Cell, N, most> blocks;
  for (int64_t left = (end - r + most - 1) / most; left > 0; --left) {
    const int64_t m = (end - r + left - 1) / left;
    run(blocks.of[m - 1], r, m);
    r += m;
  }
}

#if defined(RNNFAST_TILES)
#include "tiles.inc.h"
#else
struct Tiles {};
template <class Cell>
RNNFAST_INLINE void finish_all(const Cell&) {}

// Rows [b, end) of one panel of one step.
template <class Cell, int N>
void rows(const Cell& cell, int64_t t, int64_t b, int64_t end, int64_t p, int last,
          const typename Cell::Scalar* carried) {
  const int64_t stride = carried ? cell.state_stride() : 0;
  level_blocks<Cell, N>(b, end, [&](auto block, int64_t b, int64_t m) RNNFAST_LAMBDA_INLINE {
    block(cell, t, b, p, last, carried);
    carried += m * stride;
  });
}

// Panels [p, p + n) of rows [b, end) of one step, at once where a block spans them.
template <class Cell>
void panels(const Cell& cell, int64_t t, int64_t b, int64_t end, int64_t p, int64_t n,
            const typename Cell::Scalar* carried) {
  constexpr int lanes = L<typename Cell::Scalar>;
  const int64_t H = cell.columns(), whole = H / (kPanel * lanes), M = end - b;
  if (M <= kFewRows && n == kSpan[M - 1] && p + n <= whole) {
    switch (M) {
      case 1: return Cell::template block<1, kPanel, kSpan[0]>(cell, t, b, p, lanes, carried);
      case 2: return Cell::template block<2, kPanel, kSpan[1]>(cell, t, b, p, lanes, carried);
      case 3: return Cell::template block<3, kPanel, kSpan[2]>(cell, t, b, p, lanes, carried);
    }
  }
  for (; n > 0 && p < whole; --n, ++p) rows<Cell, kPanel>(cell, t, b, end, p, lanes, carried);
  if (n == 0) return;
  const int64_t left = H - p * kPanel * lanes;  // less than a panel
  const int width = int((left + lanes - 1) / lanes);
  const int last = int(left - (width - 1) * lanes);
  switch (width) {
    case 1: rows<Cell, 1>(cell, t, b, end, p, last, carried); break;
    case 2: rows<Cell, 2>(cell, t, b, end, p, last, carried); break;
#if RNNFAST_VECTOR_REGISTERS == 32
    case 3: rows<Cell, 3>(cell, t, b, end, p, last, carried); break;
    case 4: rows<Cell, 4>(cell, t, b, end, p, last, carried); break;
#endif
  }
}

// Panels [p0, p1) of rows [b, end) of one step.
template <class Cell>
void step(const Cell& cell, int64_t t, int64_t b, int64_t end, int64_t p0, int64_t p1,
          const typename Cell::Scalar* carried) {
  if (b >= end) return;
  const int64_t span = end - b <= kFewRows ? kSpan[end - b - 1] : 1;
  const int64_t groups = (p1 - p0 + span - 1) / span;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t p = p0 + nth(g, groups, t % 2) * span;
    panels(cell, t, b, end, p, p1 - p < span ? p1 - p : span, carried);
  }
}

#endif

// Every step of the walk, of the share's panels of rows [b0, b1). Sequences are sorted by length,
// so the rows alive at a step are a prefix, and so are those of them that the step before also
// visited.
template <class Cell>
void walk_rows(Cell cell, int64_t b0, int64_t b1, const Share& share) {
  const Walk& walk = cell.walk();
  // Not where all steps fit the second-level cache, nor where one step alone would fill it.
  const int64_t step_bytes =
      (b1 - b0) * cell.columns() * int64_t(sizeof(typename Cell::Scalar));
  const int64_t steps = walk.end - walk.begin;
  const bool prefetching = step_bytes <= 128 << 10 && step_bytes * steps > 256 << 10;
  Tiles tiles;
  cell.tiles = &tiles;
  int64_t t_last = cell.backwards() ? walk.end : walk.begin - 1;
  int64_t visited = b0;  // rows [b0, visited) were alive at the step visited last
  if (t_last >= 0 && t_last < walk.seq_len && walk.live(t_last) > b0) {
    visited = walk.live(t_last) < b1 ? walk.live(t_last) : b1;
  }
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = cell.backwards() ? walk.end - 1 - s : walk.begin + s;
    const int64_t alive = walk.live(t) < b1 ? walk.live(t) : b1;
    if (alive <= b0) continue;
    const int64_t carried = visited < alive ? visited : alive;
    if (prefetching) cell.t_next = s + 1 == steps ? -1 : cell.backwards() ? t - 1 : t + 1;
    step(cell, t, b0, carried, share.p0, share.p1, carried > b0 ? cell.state(t_last, b0) : nullptr);
    step(cell, t, carried, alive, share.p0, share.p1, nullptr);
    if (share.barrier) {
      finish_all(cell);
      share.barrier->arrive_and_wait(share.party0, share.party1);
    }
    visited = alive;
    t_last = t;
  }
  finish_all(cell);
}

// Rows are taken through time in groups: small enough that a group's state stays in the first-level
// cache while the weights, resident too, are reused; but where the weights exceed the second-level
// cache they are streamed once per group and step, so there the group is everything.
template <class Cell>
void run(const Cell& cell, const Share& share) {
  using T = typename Cell::Scalar;
  constexpr int64_t kStateBytes = 16 << 10, kWeightBytes = 512 << 10;
#if defined(RNNFAST_TILES)
  constexpr int64_t kLeast = 64;  // two blocks, of which one multiplies while the other is finished
#else
  constexpr int64_t kLeast = 48;
#endif
  const int64_t row_bytes = cell.columns() * int64_t(sizeof(T));
  const int64_t n = share.b1 - share.b0;
  int64_t groups = 1;
  if (!share.barrier && cell.columns() * row_bytes <= kWeightBytes) {
    const int64_t fitting = kStateBytes / row_bytes;
    const int64_t group = fitting > kLeast ? fitting : kLeast;
    groups = (n + group - 1) / group;
  }
  for (int64_t i = 0; i < groups; ++i)
    walk_rows(cell, share.b0 + n * i / groups, share.b0 + n * (i + 1) / groups, share);
}

#include "packing.inc.h"

#include "products.inc.h"

// ----------------------------------------------------------------------------------- entry points

template <class T>
void forward(const Forward<T>& f, const Share& share) {
  run(ForwardCell<T>{f}, share);
}

template <class T>
void backward(const Backward<T>& f, const Share& share) {
  run(BackwardCell<T>{f}, share);
}

template <class T>
void activate_array(const Sum<T>* z, int64_t n, bool relu, T* h) {
  for (int64_t i = 0; i < n; i += 4 * L<T>) {
    V<T> four[4] = {};
    const int64_t left = n - i < 4 * L<T> ? n - i : 4 * L<T>;
    __builtin_memcpy(four, z + i, left * sizeof(Sum<T>));
    activate<Sum<T>>(four, 4, relu);
    for (int j = 0; j * L<T> < left; ++j) {
      const int64_t rest = left - j * L<T>;
      store_nth<T, 1>(h + i + j * L<T>, 0, int(rest < L<T> ? rest : L<T>), four[j]);
    }
  }
}

#if !defined(RNNFAST_BFLOAT16)
// As many numbers of float16 as a vector of float has lanes.
typedef uint16_t Halves __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
RNNFAST_INLINE V<float> widened(Halves h) {
#if RNNFAST_VECTOR_BYTES == 64 && !defined(RNNFAST_EMULATE_AVX512)
  return (V<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);  // GCC 12 warns of the unmasked one
#elif RNNFAST_VECTOR_BYTES == 32
  return (V<float>)_mm256_cvtph_ps((__m128i)h);
#else
  using Bits = Vector<float>::Bits;
  const Bits bits = __builtin_convertvector(h, Bits), sign = (bits & 0x8000u) << 16;
  // Exponents of 5 bits become those of 8: biased by 127, not 15; infinities and NaNs keep the
  // largest. Below the least of them, of 1, a number is its bits times 2^-24.
  const Bits wide = (bits & 0x7fffu) << 13;
  const Bits normal = wide + (wide < (31u << 23) ? Bits{} + (112u << 23) : Bits{} + (224u << 23));
  typedef int32_t Signed __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  const auto tiny = __builtin_convertvector((Signed)(bits & 0x3ffu), V<float>) * 0x1p-24f;
  return (V<float>)((wide < (1u << 23) ? (Bits)tiny : normal) | sign);
#endif
}

void widen(const Float16* from, int64_t n, float* to) {
  constexpr int64_t lanes = L<float>;
  Halves h;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    __builtin_memcpy(&h, from + i, sizeof(h));
    store(to + i, widened(h));
  }
  if (i == n) return;
  h = Halves{};
  __builtin_memcpy(&h, from + i, (n - i) * sizeof(Float16));
  store_part(to + i, widened(h), int(n - i));
}
#endif

#if defined(RNNFAST_TILES)
#include "tile_products.inc.h"
#endif

#undef RNNFAST_INLINE
#undef RNNFAST_LAMBDA_INLINE

#if !defined(RNNFAST_BFLOAT16)
int64_t no_space(int64_t, int64_t) { return 0; }
#endif

template <class T>
constexpr TimeLoop<T> table() {
  TimeLoop<T> table;
  table.panel_columns = kPanel * L<T>;
  table.packed_size = packed_size<T>;
  table.pack = pack<T>;
  table.forward = forward<T>;
  table.backward = backward<T>;
  table.linear = linear<T>;
  table.activate = activate_array<T>;
#if defined(RNNFAST_TILES)
  table.outer_sum = tile_outer_sum;
  table.outer_sum_space = outer_sum_space;
  table.panel_product = tile_product;
#elif defined(RNNFAST_BFLOAT16)
  table.outer_sum = paired_outer_sum;
  table.outer_sum_space = outer_sum_space;
  table.outer_sum_numbers = kOuterSumNumbers;
  table.panel_product = panel_product<T>;
#else
  table.outer_sum = outer_sum<T>;
  table.outer_sum_space = no_space;
  table.outer_sum_numbers = kOuterSumNumbers;
  table.panel_product = panel_product<T>;
#endif
  return table;
}

}  // namespace

#if defined(RNNFAST_BFLOAT16)
const TimeLoop<BFloat16> bf16 = table<BFloat16>();
#else
constexpr TimeLoop<float> table_of_float() {
  TimeLoop<float> with_widen = table<float>();
  with_widen.widen = widen;
  return with_widen;
}
const TimeLoop<float> f32 = table_of_float();
const TimeLoop<double> f64 = table<double>();
#endif

}  // namespace rnnfast::cpu::RNNFAST_ISA
