// Products over all steps in AMX's tiles: part of time_loop.inc.h.
//
//   c[r,n] = start[r,n] + sum_k a[r,k] w[k,n]
//   c[m,n] += sum_r a[r,m] b[r,n]
//
// Both as the blocks of one step of the walk (tiles.inc.h); of the second a chunk of rows r at a
// time, whose a is transposed and whose b is packed as weights are.

struct ProductCell {
  using Scalar = BFloat16;
  const PanelProduct<BFloat16>& f;
  Tiles* tiles = nullptr;

  int64_t columns() const { return f.columns; }
  int64_t terms() const { return f.K; }
  int64_t state_stride() const { return 0; }

  template <int M, int vectors, class Add>
  RNNFAST_INLINE void products(int64_t, int64_t b, int64_t, const BFloat16*, const Add& add) const {
    add(f.a + b * f.lda, f.lda, f.w, f.K);
  }

  template <int M, int N, int G>
  RNNFAST_INLINE void finish(Block<BFloat16, M, N, G>& z, int64_t, int64_t b, int64_t p, int last,
                             bool) const {
    const int64_t column = p * kPanel * L<float>;
    if (f.start) z.add(f.start + b * f.ld_start + column, f.ld_start, last);
    BFloat16* c = f.c + b * f.ldc + column;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < G * N; ++n)
        store_nth<BFloat16, G * N>(c + m * f.ldc, n, last, z.acc[m][n]);
  }
};

// Rows [m, m + 32) of c, from a transposed block of `a`.
struct OuterSumCell {
  using Scalar = BFloat16;
  const OuterSum<BFloat16>& f;
  int64_t K = 0;  // of a chunk
  const BFloat16* transposed = nullptr;
  const BFloat16* packed = nullptr;
  int64_t m = 0;
  Tiles* tiles = nullptr;

  int64_t columns() const { return f.N; }
  int64_t terms() const { return K; }
  int64_t state_stride() const { return 0; }

  template <int M, int vectors, class Add>
  RNNFAST_INLINE void products(int64_t, int64_t b, int64_t, const BFloat16*, const Add& add) const {
    add(transposed + (b - m) * K, K, packed, K);
  }

  template <int M, int N, int G>
  RNNFAST_INLINE void finish(Block<BFloat16, M, N, G>& z, int64_t, int64_t b, int64_t p, int last,
                             bool) const {
    float* c = f.c + b * f.ldc + p * kPanel * L<float>;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < G * N; ++n) {
        const V<float> before = load_nth<float, G * N>(c + m * f.ldc, n, last);
        store_nth<float, G * N>(c + m * f.ldc, n, last, before + z.acc[m][n]);
      }
  }
};

int64_t tile_panels(int64_t columns) {
  constexpr int64_t width = kPanel * L<BFloat16>;
  return (columns + width - 1) / width;
}

void tile_product(const PanelProduct<BFloat16>& f) {
  // Rows of `a` that stay in the second-level cache while the weights pass by.
  constexpr int64_t kBytes = 256 << 10, most = 32;
  const int64_t fitting = kBytes / (int64_t(sizeof(BFloat16)) * f.K) / most * most;
  const int64_t some = fitting < most ? most : fitting;
  Tiles tiles;
  const ProductCell cell{f, &tiles};
  for (int64_t r = 0; r < f.rows; r += some)
    step(cell, 0, r, f.rows - r < some ? f.rows : r + some, 0, tile_panels(f.columns), nullptr);
  finish_all(cell);
}

// to[m][r] = a[r][m], m < M, r < R, and zeros to r = `terms`, a multiple of 32.
void transpose_rows(const BFloat16* a, int64_t lda, int64_t R, int64_t M, int64_t terms,
                    BFloat16* to) {
  for (int64_t m = 0; m < M; m += L<float>) {
    const int64_t lanes = M - m < L<float> ? M - m : L<float>;
    for (int64_t r = 0; r < terms; r += 2 * L<float>) {
      V<float> square[L<float>];
      for (int64_t i = 0; i < L<float>; ++i) {
        const int64_t at = r + 2 * i;
        square[i] = pairs_of(a + at * lda + m, lda, R - at, int(lanes));
      }
      transpose<BFloat16>(square);
      for (int64_t i = 0; i < lanes; ++i)
        __builtin_memcpy(to + (m + i) * terms + r, &square[i], sizeof(square[i]));
    }
  }
}

void tile_outer_sum(const OuterSum<BFloat16>& f, int64_t m0, int64_t m1) {
  const int64_t chunk = rows_of_a_chunk(f.rows, f.N);
  Tiles tiles;
  OuterSumCell cell{f};
  cell.tiles = &tiles;
  for (int64_t r = 0; r < f.rows; r += chunk) {
    const int64_t R = f.rows - r < chunk ? f.rows - r : chunk;
    if (f.column_sums) add_column_sums(f, r, R, m0, m1);
    pack(f.b + r * f.ldb, f.ldb, 1, R, f.N, f.space);
    BFloat16* transposed = f.space + packed_size<BFloat16>(R, f.N);
    cell.K = padded<BFloat16>(R);
    cell.packed = f.space;
    cell.transposed = transposed;
    for (cell.m = m0; cell.m < m1; cell.m += kColumns) {
      const int64_t M = m1 - cell.m < kColumns ? m1 - cell.m : kColumns;
      transpose_rows(f.a + r * f.lda + cell.m, f.lda, R, M, cell.K, transposed);
      step(cell, 0, cell.m, cell.m + M, 0, tile_panels(f.N), nullptr);
    }
  }
  finish_all(cell);
}
