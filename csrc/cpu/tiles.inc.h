// The blocks of a step in AMX's tiles: part of time_loop.inc.h.
//
//   sums[m,n] = sum_k a[m,k] w[k,n],  up to 32 rows m by 32 columns n, or 16 by 64
//
// Tiles       Eight registers of 16 rows of 64 bytes. Four hold sums, of 16 columns each; the
//             others 32 terms k of 16 rows of `a`, and 16 pairs of terms of 16 columns of `w`, as
//             packed. One instruction adds the products of the two, 8192 of them, to a tile of sums.
// Operands    `a` is read where it lies, the state and the input alike. Where K is no multiple of
//             32, its last terms are copied with zeros behind them, since what lies there may be
//             another sequence's or nobody's; those of the weights are packed so. The sums go through
//             memory to the vectors that finish them.
// Order       A block's sums wait for their finish until the next block's products run, which take
//             the tiles as it takes the vectors; not beyond a meeting of threads, nor where those
//             products need its results.
// Rows        The blocks of a step have one height, which the tiles are configured for: the last
//             begins early where rows do not divide, and finishes only those that are left.

namespace amx_tiles {

// What is configured, as LDTILECFG reads it.
struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t unused[15] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr int kA = 4, kB = 6;  // the first tile of `a`, and of `w`; sums are 0 to 3

#if defined(RNNFAST_EMULATE_TILES)
thread_local Configuration now;
thread_local char data[8][16][64];

RNNFAST_INLINE void configure(const Configuration& c) { now = c; }
RNNFAST_INLINE void release() { now = {}; }
template <int tile>
RNNFAST_INLINE void clear() {
  __builtin_memset(data[tile], 0, sizeof(data[tile]));
}
template <int tile>
RNNFAST_INLINE void load(const void* from, int64_t stride) {
  clear<tile>();
  for (int m = 0; m < now.rows[tile]; ++m)
    __builtin_memcpy(data[tile][m], static_cast<const char*>(from) + m * stride,
                     now.row_bytes[tile]);
}
template <int tile>
RNNFAST_INLINE void store(void* to, int64_t stride) {
  for (int m = 0; m < now.rows[tile]; ++m)
    __builtin_memcpy(static_cast<char*>(to) + m * stride, data[tile][m], now.row_bytes[tile]);
}
template <int sum, int a, int w>
RNNFAST_INLINE void add_products() {
  for (int m = 0; m < now.rows[sum]; ++m) {
    V<float> z;
    __builtin_memcpy(&z, data[sum][m], sizeof(z));
    for (int k = 0; k < 16; ++k) {
      uint32_t pair;
      V<float> weights;
      __builtin_memcpy(&pair, &data[a][m][4 * k], sizeof(pair));
      __builtin_memcpy(&weights, data[w][k], sizeof(weights));
      z = add_pairs(z, (V<float>)(pair - Vector<float>::Bits{}), weights);
    }
    __builtin_memcpy(data[sum][m], &z, sizeof(z));
  }
}
#else
RNNFAST_INLINE void configure(const Configuration& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
RNNFAST_INLINE void release() { asm volatile("tilerelease"); }
template <int tile>
RNNFAST_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
RNNFAST_INLINE void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
RNNFAST_INLINE void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int a, int w>
RNNFAST_INLINE void add_products() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(w), "i"(a), "i"(sum));
}
#endif

// For blocks of `rows` rows, up to 32: shared between two tiles beyond 16.
RNNFAST_INLINE void configure_rows(int64_t rows) {
  Configuration c;
  const int first = int(rows > 16 ? (rows + 1) / 2 : rows);
  for (int tile = 0; tile < 8; ++tile) {
    const bool second = rows > 16 && (tile == kA + 1 || (tile < kA && tile >= 2));
    c.row_bytes[tile] = 64;
    c.rows[tile] = uint8_t(tile >= kB ? 16 : second ? rows - first : first);
  }
  configure(c);
}

// R tiles of rows, the second `second` rows below the first, by C of columns, of which `w` has two in
// a panel: sum (i, j) is in tile 2 * i + j.
template <int R, int C>
struct Products {
  static_assert(R == 1 ? C <= 4 : R == 2 && C <= 2);

  template <int j = 0>
  static RNNFAST_INLINE void clear() {
    amx_tiles::clear<j>();
    if constexpr (R == 2) amx_tiles::clear<2 + j>();
    if constexpr (j + 1 < C) clear<j + 1>();
  }

  template <int j = 0>
  static RNNFAST_INLINE void store(float* to, int64_t second) {
    amx_tiles::store<j>(to + 16 * j, 64 * C);
    if constexpr (R == 2) amx_tiles::store<2 + j>(to + 16 * (second * C + j), 64 * C);
    if constexpr (j + 1 < C) store<j + 1>(to, second);
  }

  // 32 terms.
  template <int j = 0>
  static RNNFAST_INLINE void add(const BFloat16* a, int64_t lda, int64_t second,
                                 const BFloat16* w, int64_t row_bytes, int64_t stride_g) {
    constexpr int b = kB + j % 2;
    load<b>(w + j / 2 * stride_g + j % 2 * 32, row_bytes);
    if constexpr (j == 0) load<kA>(a, lda * 2);
    add_products<j, kA, b>();
    if constexpr (R == 2) {
      if constexpr (j == 0) load<kA + 1>(a + second * lda, lda * 2);
      add_products<2 + j, kA + 1, b>();
    }
    if constexpr (j + 1 < C) add<j + 1>(a, lda, second, w, row_bytes, stride_g);
  }
};

}  // namespace amx_tiles

// The state of a walk.
struct Tiles {
  int64_t rows = 0;  // of a block, as configured
  // Of the waiting block, of which rows [next, end) are to be finished.
  void (*finish)(const void* cell, Tiles& self, int64_t rows) = nullptr;
  int64_t t = 0, b = 0, p = 0, next = 0, end = 0;
  int last = 0;
  bool first_visit = false;
  int waiting = 0;  // which sums are its
  alignas(64) float sums[2][4 * 16 * 16];

  // Copies of a state's and an input's last terms, for the panels of a step to share.
  struct LastTerms {
    const BFloat16* of = nullptr;
    int64_t stride = 0, rows = 0;
    int n = 0;
    alignas(64) BFloat16 copy[32][32];
  } kept[2];
  int newer = 0;

  // `n` < 32 numbers of some rows, and zeros.
  const BFloat16* last_terms(const BFloat16* a, int64_t lda, int64_t rows, int n) {
    for (const LastTerms& k : kept)
      if (k.of == a && k.stride == lda && k.rows == rows && k.n == n) return k.copy[0];
    LastTerms& to = kept[newer ^= 1];
    to.of = a;
    to.stride = lda;
    to.rows = rows;
    to.n = n;
    for (int64_t m = 0; m < rows; ++m) {
      const V<float> part = Product<BFloat16>::load_part(a + m * lda, n);
      __builtin_memcpy(to.copy[m], &part, sizeof(part));
    }
    return to.copy[0];
  }

  ~Tiles() { amx_tiles::release(); }
  int64_t left() const { return end - next; }
};

// The next `n` rows of the waiting block, of G panels of N vectors.
template <class Cell, int N, int G>
void finish_rows(const void* of, Tiles& tiles, int64_t n) {
  const Cell& cell = *static_cast<const Cell*>(of);
  constexpr int vectors = G * N;
  const float* sums = tiles.sums[tiles.waiting];
  const auto finish = [&](auto height) RNNFAST_LAMBDA_INLINE {
    constexpr int M = decltype(height)::value;
    Block<BFloat16, M, N, G> z;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        z.acc[i][v] = load(sums + ((tiles.next + i) * vectors + v) * L<float>);
    cell.finish(z, tiles.t, tiles.b + tiles.next, tiles.p, tiles.last, tiles.first_visit);
    tiles.next += M;
  };
  constexpr int high = 4 / vectors;  // the activation takes four vectors
  for (; n >= high && tiles.left() >= high; n -= high)
    finish(std::integral_constant<int, high>{});
  if constexpr (high > 1) {
    for (; n > 0 && tiles.left() > 0; --n) finish(std::integral_constant<int, 1>{});
  }
}

template <class Cell>
void finish_all(const Cell& cell) {
  if (cell.tiles->left() > 0) cell.tiles->finish(&cell, *cell.tiles, cell.tiles->left());
}

// `rows` rows of a step from b on, by G panels of N vectors from p on, `last` lanes in the last of
// them. The first `done` rows are another block's.
template <int R, int N, int G, class Cell>
void tile_block(const Cell& cell, int64_t t, int64_t b, int64_t rows, int64_t done, int64_t p,
                int last, const BFloat16* carried) {
  using T = BFloat16;
  using Products = amx_tiles::Products<R, G * N>;
  constexpr int64_t terms = 32, unit = 8;
  Tiles& tiles = *cell.tiles;
  // Of the step before, and what this block's products need.
  if (tiles.t != t && tiles.b + tiles.end > b && tiles.b + tiles.next < b + rows) finish_all(cell);
  // Rows are finished as products proceed.
  const int64_t products = cell.terms() / terms + 1, waiting = tiles.left();
  int64_t due = 0;
  const auto proceed = [&]() RNNFAST_LAMBDA_INLINE {
    due += waiting;
    if (due < unit * products || tiles.left() == 0) return;
    const int64_t n = due / (unit * products) * unit;
    due -= n * products;
    tiles.finish(&cell, tiles, n);
  };

  const int64_t second = (rows + 1) / 2;
  Products::clear();
  cell.template products<0, G * N>(
      t, b, p, carried, [&](const T* a, int64_t lda, const T* w, int64_t K) RNNFAST_LAMBDA_INLINE {
        const Columns<T> columns = panel_of<T, N>(w, p, K);
        const T* from = columns.data;
        int64_t k = 0;
        for (; k + terms <= K; k += terms, from += terms * N * L<T>) {
          Products::add(a + k, lda, second, from, N * 64, columns.stride_g);
          proceed();
        }
        if (k == K) return;
        Products::add(tiles.last_terms(a + k, lda, rows, int(K - k)), terms, second, from, N * 64,
                      columns.stride_g);
        proceed();
      });
  finish_all(cell);
  tiles.waiting ^= 1;
  Products::store(tiles.sums[tiles.waiting], second);
  tiles.finish = finish_rows<Cell, N, G>;
  tiles.t = t;
  tiles.b = b;
  tiles.p = p;
  tiles.next = done;
  tiles.end = rows;
  tiles.last = last;
  tiles.first_visit = carried == nullptr;
}

// Rows [r, r + height) of those from b to `end`, or the last `height` of them, by panel p, or where
// `two`, p and the next.
template <class Cell>
void block_at(const Cell& cell, int64_t t, int64_t b, int64_t end, int64_t r, int64_t height,
                int64_t p, bool two, const BFloat16* carried) {
  constexpr int lanes = L<BFloat16>;
  const int64_t first = r < end - height ? r : end - height, done = r - first;
  if (carried) carried += (first - b) * cell.state_stride();
  const int64_t left = cell.columns() - p * kPanel * lanes;
  const auto run = [&](auto block, int64_t columns) RNNFAST_LAMBDA_INLINE {
    const int last = int(left < columns ? left - columns + lanes : lanes);
    block(cell, t, first, height, done, p, last, carried);
  };
  if (two) {
    run(tile_block<1, 2, 2, Cell>, 4 * lanes);
  } else if (height <= 16) {
    left > lanes ? run(tile_block<1, 2, 1, Cell>, 2 * lanes)
                 : run(tile_block<1, 1, 1, Cell>, lanes);
  } else {
    left > lanes ? run(tile_block<2, 2, 1, Cell>, 2 * lanes)
                 : run(tile_block<2, 1, 1, Cell>, lanes);
  }
}

// Panels [p0, p1) of rows [b, end) of one step. Weights that stay in the second-level cache are
// walked over for each block of rows, whose state then stays in the first; others once.
template <class Cell>
void step(const Cell& cell, int64_t t, int64_t b, int64_t end, int64_t p0, int64_t p1,
          const BFloat16* carried) {
  if (b >= end) return;
  constexpr int64_t most = 32, kWeightBytes = 1 << 20;
  const int64_t blocks = (end - b + most - 1) / most;
  const int64_t height = (end - b + blocks - 1) / blocks;
  if (height != cell.tiles->rows) {
    amx_tiles::configure_rows(height);
    cell.tiles->rows = height;
  }
  const int64_t whole = cell.columns() / (kPanel * L<BFloat16>);
  const auto panels = [&](int64_t r, int64_t p, int64_t p1) {
    while (p < p1) {
      const bool two = height <= 16 && p + 1 < p1 && p + 1 < whole;
      block_at(cell, t, b, end, r, height, p, two, carried);
      p += two ? 2 : 1;
    }
  };
  const int64_t bytes = cell.terms() * (p1 - p0) * kPanel * L<BFloat16> * int64_t(sizeof(BFloat16));
  if (bytes <= kWeightBytes) {
    for (int64_t r = b; r < end; r += height) panels(r, p0, p1);
  } else {
    for (int64_t i = 0; i < p1 - p0; ++i) {
      const int64_t p = p0 + nth(i, p1 - p0, t % 2);
      for (int64_t r = b; r < end; r += height) panels(r, p, p + 1);
    }
  }
}
