// Products outside the walk over the steps: part of time_loop.inc.h.

// ------------------------------------------------------------------------- sums of outer products
//
// c[m,n] += sum_r a[r,m] b[r,n]: a weight gradient, of dz and what the weight multiplied. Rows are
// taken in chunks, of which what a panel of b and a few columns of a take stays in the first-level
// cache; a chunk's sums start from zero in registers, so that an addition rounds at the size of a
// chunk's sum; the column sums, which have no lanes to spread a bias over, fold every 16 rows.

// Measured against MKL (notes/cpu.md, "Weight gradients"), and in bfloat16 against oneDNN ("bfloat16 with
// AVX512-BF16").
#if defined(RNNFAST_BFLOAT16)
constexpr int64_t kOuterSumNumbers = 128 * 128;
#elif RNNFAST_VECTOR_BYTES == 64
constexpr int64_t kOuterSumNumbers = 700 * 700;
#elif RNNFAST_VECTOR_BYTES == 32
constexpr int64_t kOuterSumNumbers = 160 * 160;
#else
constexpr int64_t kOuterSumNumbers = 112 * 112;
#endif

template <class T>
struct OuterCell {
  template <int M, int N>
  static void block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t R, int last, Sum<T>* c,
                    int64_t ldc) {
    constexpr int64_t pairing = Sums<T>::pairing;
    Block<T, M, N> sum;
    sum.clear();
    if (last == L<T> || pairing > 1) {  // pairs are packed, and padded
      sum.template chain<true>(a, pairing, lda, {b, ldb, 0}, R, last);
    } else {
      sum.template chain<false>(a, pairing, lda, {b, ldb, 0}, R, last);
    }
    sum.add(c, ldc, last);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store_nth<Sum<T>, N>(c + m * ldc, n, last, sum.acc[m][n]);
  }

  // Rows [0, M) and `columns` columns, one panel's at most, of c.
  template <int N>
  static void rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t R, int64_t M,
                   int64_t columns, Sum<T>* c, int64_t ldc) {
    const int last = int(columns - (N - 1) * L<T>);
    level_blocks<OuterCell, N>(0, M, [&](auto block, int64_t m, int64_t) RNNFAST_LAMBDA_INLINE {
      block(a + m * Sums<T>::pairing, lda, b, ldb, R, last, c + m * ldc, ldc);
    });
  }

  static void panel(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t R, int64_t M,
                    int64_t columns, Sum<T>* c, int64_t ldc) {
    switch ((columns + L<T> - 1) / L<T>) {
      case 1: rows<1>(a, lda, b, ldb, R, M, columns, c, ldc); break;
      case 2: rows<2>(a, lda, b, ldb, R, M, columns, c, ldc); break;
#if RNNFAST_VECTOR_REGISTERS == 32
      case 3: rows<3>(a, lda, b, ldb, R, M, columns, c, ldc); break;
      case 4: rows<4>(a, lda, b, ldb, R, M, columns, c, ldc); break;
#endif
    }
  }
};

// Of R rows from r on.
template <class T>
void add_column_sums(const OuterSum<T>& f, int64_t r, int64_t R, int64_t m0, int64_t m1) {
  constexpr int lanes = L<T>;
  const T* a = f.a + r * f.lda;
  for (int64_t m = m0; m < m1; m += lanes) {
    const int width = m1 - m < lanes ? int(m1 - m) : lanes;
    V<T> sum = {};
    for (int64_t k0 = 0; k0 < R; k0 += 16) {
      V<T> part = {};
      for (int64_t k = k0; k < (R - k0 < 16 ? R : k0 + 16); ++k)
        part += width == lanes ? load(a + k * f.lda + m) : load_part(a + k * f.lda + m, width);
      sum += part;
    }
    Sum<T>* to = f.column_sums + m;
    if (width == lanes) {
      store(to, load(to) + sum);
    } else {
      store_part(to, load_part(to, width) + sum, width);
    }
  }
}

template <class T>
void outer_sum(const OuterSum<T>& f, int64_t m0, int64_t m1) {
  using Cell = OuterCell<T>;
  constexpr int lanes = L<T>;
  // A panel of b, and of a two lines or so of each row. Not of m1 - m0, which varies with the
  // number of threads.
  constexpr int64_t kBytes = 24 << 10, kMost = 256;
  const int64_t columns = (f.N < kPanel * lanes ? f.N : kPanel * lanes) + 32;
  const int64_t fitting = kBytes / (int64_t(sizeof(T)) * columns);
  const int64_t chunk = fitting > kMost ? kMost : fitting;
  for (int64_t r = 0; r < f.rows; r += chunk) {
    const int64_t R = f.rows - r < chunk ? f.rows - r : chunk;
    const T* a = f.a + r * f.lda + m0;
    for (int64_t n = 0; n < f.N; n += kPanel * lanes) {
      const int64_t columns = f.N - n < kPanel * lanes ? f.N - n : kPanel * lanes;
      Cell::panel(a, f.lda, f.b + r * f.ldb + n, f.ldb, R, m1 - m0, columns, f.c + m0 * f.ldc + n,
                  f.ldc);
    }
    if (f.column_sums) add_column_sums(f, r, R, m0, m1);
  }
}

#if defined(RNNFAST_BFLOAT16)
// In bfloat16 a chunk's rows are packed first: all columns of b as weights are, and kColumns of `a` at a
// time. By vectors a panel of b and those stay in the first-level cache; in tiles, of which threads take
// whole ones, all of b in the second-level one.
#if defined(RNNFAST_TILES)
constexpr int64_t kColumns = 32, kPackedNumbers = 128 << 10, kMostRows = 512;
#else
constexpr int64_t kColumns = 48, kPackedNumbers = 64 << 10, kMostRows = 128;
#endif
int64_t rows_of_a_chunk(int64_t rows, int64_t N) {
  const int64_t fitting = kPackedNumbers / N / 32 * 32;
  const int64_t most = fitting < 32 ? 32 : fitting > kMostRows ? kMostRows : fitting;
  return rows < most ? rows : most;
}
int64_t outer_sum_space(int64_t rows, int64_t N) {
  const int64_t R = rows_of_a_chunk(rows, N);
  return packed_size<BFloat16>(R, N) + padded<BFloat16>(R) * kColumns;
}
#endif

#if defined(RNNFAST_BFLOAT16) && !defined(RNNFAST_TILES)
// Both are in pairs of rows, so that the time loop's blocks take them.
void paired_outer_sum(const OuterSum<BFloat16>& f, int64_t m0, int64_t m1) {
  using T = BFloat16;
  constexpr int64_t width = kPanel * L<T>;
  const int64_t chunk = rows_of_a_chunk(f.rows, f.N);
  for (int64_t r = 0; r < f.rows; r += chunk) {
    const int64_t R = f.rows - r < chunk ? f.rows - r : chunk, K = padded<T>(R);
    if (f.column_sums) add_column_sums(f, r, R, m0, m1);
    pack(f.b + r * f.ldb, f.ldb, 1, R, f.N, f.space);
    T* a = f.space + packed_size<T>(R, f.N);
    for (int64_t m = m0; m < m1; m += kColumns) {
      const int64_t M = m1 - m < kColumns ? m1 - m : kColumns;
      const int64_t lda = (M + L<T> - 1) / L<T> * L<T>;
      pack_pairs(f.a + r * f.lda + m, f.lda, R, M, lda, a);
      for (int64_t n = 0; n < f.N; n += width) {
        const int64_t columns = f.N - n < width ? f.N - n : width;
        OuterCell<T>::panel(a, lda, f.space + n * K, (columns + L<T> - 1) / L<T> * L<T>, K, M,
                            columns, f.c + m * f.ldc + n, f.ldc);
      }
    }
  }
}
#endif

// -------------------------------------------------------------------- products with packed weights
//
// c[r,n] = start[r,n] + sum_k a[r,k] w[k,n], n of one panel: M rows by the panel's width, summed in
// registers in the chains of the time loop. The panel stays in the second-level cache while all rows
// pass by.

template <class T>
struct PanelCell {
  template <int M, int N>
  static void block(const PanelProduct<T>& f, int64_t r, int last) {
    Block<T, M, N> sum;
    sum.clear();
    sum.product(f.a + r * f.lda, f.lda, {f.w, N * L<T>, 0}, f.K, /*backwards=*/false);
    if (f.start) sum.add(f.start + r * f.ld_start, f.ld_start, last);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
        store_nth<T, N>(f.c + (r + m) * f.ldc, n, last, sum.acc[m][n]);
  }

  template <int N>
  static void rows(const PanelProduct<T>& f) {
    const int last = int(f.columns - (N - 1) * L<T>);
    level_blocks<PanelCell, N>(
        0, f.rows,
        [&](auto block, int64_t r, int64_t) RNNFAST_LAMBDA_INLINE { block(f, r, last); });
  }
};

template <class T>
void panel_product(const PanelProduct<T>& f) {
  switch ((f.columns + L<T> - 1) / L<T>) {
    case 1: PanelCell<T>::template rows<1>(f); break;
    case 2: PanelCell<T>::template rows<2>(f); break;
#if RNNFAST_VECTOR_REGISTERS == 32
    case 3: PanelCell<T>::template rows<3>(f); break;
    case 4: PanelCell<T>::template rows<4>(f); break;
#endif
  }
}

// ------------------------------------------------------------------ products with unpacked weights
//
// z[b,n] += sum_k x[b,k] w[n,k]: M rows times N weight rows at a time, vectors along k, whose lanes
// are added up at the end, those of four vectors side by side.

// The upper half onto the lower, until there are `left` lanes.
template <class S, int n, int left>
RNNFAST_INLINE typename Lanes<S, left>::V fold(typename Lanes<S, n>::V v) {
  if constexpr (n == left) {
    return v;
  } else {
    typename Lanes<S, n / 2>::V half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return fold<S, n / 2, left>(half[0] + half[1]);
  }
}

template <class S>
RNNFAST_INLINE typename Lanes<S, 4>::V lane_sums(const typename Lanes<S, 4>::V (&v)[4]) {
  const auto ab = RNNFAST_SHUFFLE(v[0], v[1], 0, 4, 2, 6) + RNNFAST_SHUFFLE(v[0], v[1], 1, 5, 3, 7);
  const auto cd = RNNFAST_SHUFFLE(v[2], v[3], 0, 4, 2, 6) + RNNFAST_SHUFFLE(v[2], v[3], 1, 5, 3, 7);
  return RNNFAST_SHUFFLE(ab, cd, 0, 1, 4, 5) + RNNFAST_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// z[j] += the sum of the lanes of acc[j].
template <class T, int N>
RNNFAST_INLINE void add_lane_sums(const V<T> (&acc)[N], Sum<T>* z) {
  using S = Sum<T>;
  if constexpr (N == 1 || L<T> < 4) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const auto two = fold<S, L<T>, 2>(acc[j]);
      z[j] += two[0] + two[1];
    }
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < N; j += 4) {
      typename Lanes<S, 4>::V four[4] = {}, sum = {};
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l)
        if (j + l < N) four[l] = fold<S, L<T>, 4>(acc[j + l]);
      const int bytes = (N - j < 4 ? N - j : 4) * int(sizeof(S));
      __builtin_memcpy(&sum, z + j, bytes);
      sum += lane_sums<S>(four);
      __builtin_memcpy(z + j, &sum, bytes);
    }
  }
}

template <class T, int M, int N>
void linear_block(const Linear<T>& f, int64_t b, int64_t n) {
  const T* x = f.x + b * f.ldx;
  const T* w = f.w + n * f.ldw;
  using P = Product<T>;
  constexpr int taken = L<T> * Sums<T>::pairing;
  V<T> acc[M][N] = {};
  const auto add = [&](int64_t k, const auto& load_k) RNNFAST_LAMBDA_INLINE {
    V<T> xk[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) xk[i] = load_k(x + i * f.ldx + k);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      V<T> wk = load_k(w + j * f.ldw + k);
      if constexpr (M > 1) hold(wk);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) acc[i][j] = P::add(acc[i][j], xk[i], wk);
    }
  };
  int64_t k = 0;
  for (; k + taken <= f.K; k += taken) {
    add(k, [](const T* p) RNNFAST_LAMBDA_INLINE { return P::load(p); });
  }
  if (k < f.K) {
    const int left = int(f.K - k);
    add(k, [left](const T* p) RNNFAST_LAMBDA_INLINE { return P::load_part(p, left); });
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) add_lane_sums<T, N>(acc[i], f.z + (b + i) * f.ldz + n);
}

template <class T, int M>
void linear_rows(const Linear<T>& f, int64_t b, int64_t n0, int64_t n1) {
#if RNNFAST_VECTOR_REGISTERS == 32
  constexpr int N = M <= 2 ? 8 : 6;
#else
  constexpr int N = M == 1 ? 8 : M == 4 ? 3 : 4;
#endif
  const int64_t blocks = (n1 - n0) / N;
  for (int64_t i = 0; i < blocks; ++i)
    linear_block<T, M, N>(f, b, n0 + nth(i, blocks, f.backwards) * N);
  for (int64_t n = n0 + blocks * N; n < n1; ++n) linear_block<T, M, 1>(f, b, n);
}

// Weight rows in strips that stay in the first-level cache while all rows of x pass by.
template <class T>
void linear(const Linear<T>& f, int64_t n0, int64_t n1) {
  constexpr int64_t kBytes = 16 << 10;
  const int64_t fitting = kBytes / (int64_t(sizeof(T)) * f.K) / 24 * 24;
  const int64_t strip = f.batch <= 4 ? n1 - n0 : fitting < 24 ? 24 : fitting;
  const int64_t strips = (n1 - n0 + strip - 1) / strip;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t n = n0 + nth(i, strips, f.backwards) * strip;
    const int64_t end = n1 - n < strip ? n1 : n + strip;
    int64_t b = 0;
    for (; b + 4 <= f.batch; b += 4) linear_rows<T, 4>(f, b, n, end);
    switch (f.batch - b) {
      case 3: linear_rows<T, 3>(f, b, n, end); break;
      case 2: linear_rows<T, 2>(f, b, n, end); break;
      case 1: linear_rows<T, 1>(f, b, n, end); break;
    }
  }
}
