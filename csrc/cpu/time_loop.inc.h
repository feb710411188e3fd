// The fused time loop, forward and backward, for one instruction set (see time_loop.h for what it
// computes). Included with RNNFAST_ISA, RNNFAST_VECTOR_BYTES and RNNFAST_VECTOR_REGISTERS defined.
//
// Ownership   A call owns rows [b0, b1) and walks all their steps; rows never meet, so nothing
//             synchronises. Within a step the rows are cut into register blocks of M rows by N
//             vectors of hidden units.
// Operands    W_hh (and W_ih where the projection is fused) is packed once per call into panels
//             [panel][k][columns]: k-major, columns padded with zeros to whole vectors, so that the
//             inner loop is one broadcast of h[b,k] against N adjacent vectors. The state is never
//             copied: h[t-1] is read from where the output stores it, z'[t+1] from dz.
// Registers   M * N accumulators live across the whole sum over k; act is applied to them in place.
// Padding     Lanes beyond H see only zero weights and are never loaded from or stored to tensors.
//
// No function of the standard library is instantiated here: it could be shared with code that must
// run without these instructions.

namespace rnnfast::cpu::RNNFAST_ISA {
namespace {

#define RNNFAST_INLINE inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------- vectors

template <class T>
struct Vector;
template <>
struct Vector<float> {
  static constexpr int lanes = RNNFAST_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  static constexpr int lanes = RNNFAST_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};
template <class T>
using V = typename Vector<T>::V;
template <class T>
constexpr int L = Vector<T>::lanes;

template <class T>
RNNFAST_INLINE V<T> load(const T* p) {
  V<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
RNNFAST_INLINE void store(T* p, V<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first n < L lanes; the others load as zero and are not stored.
#if RNNFAST_VECTOR_BYTES == 64
RNNFAST_INLINE V<float> load_part(const float* p, int n) {
  return (V<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
RNNFAST_INLINE V<double> load_part(const double* p, int n) {
  return (V<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
RNNFAST_INLINE void store_part(float* p, V<float> v, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
RNNFAST_INLINE void store_part(double* p, V<double> v, int n) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
#elif RNNFAST_VECTOR_BYTES == 32
RNNFAST_INLINE __m256i first_lanes(int n, const float*) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RNNFAST_INLINE __m256i first_lanes(int n, const double*) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
RNNFAST_INLINE V<float> load_part(const float* p, int n) {
  return (V<float>)_mm256_maskload_ps(p, first_lanes(n, p));
}
RNNFAST_INLINE V<double> load_part(const double* p, int n) {
  return (V<double>)_mm256_maskload_pd(p, first_lanes(n, p));
}
RNNFAST_INLINE void store_part(float* p, V<float> v, int n) {
  _mm256_maskstore_ps(p, first_lanes(n, p), (__m256)v);
}
RNNFAST_INLINE void store_part(double* p, V<double> v, int n) {
  _mm256_maskstore_pd(p, first_lanes(n, p), (__m256d)v);
}
#else
template <class T>
RNNFAST_INLINE V<T> load_part(const T* p, int n) {
  V<T> v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T>
RNNFAST_INLINE void store_part(T* p, V<T> v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// Vector n of N; only the last of a panel may be partial, with `last` lanes.
template <class T, int N>
RNNFAST_INLINE V<T> load_nth(const T* p, int n, int last) {
  return n < N - 1 || last == L<T> ? load(p + n * L<T>) : load_part(p + n * L<T>, last);
}
template <class T, int N>
RNNFAST_INLINE void store_nth(T* p, int n, int last, V<T> v) {
  if (n < N - 1 || last == L<T>) {
    store(p + n * L<T>, v);
  } else {
    store_part(p + n * L<T>, v, last);
  }
}

// -------------------------------------------------------------------------------------- tanh
//
// |x| < 9/16: x + x z P(z), z = x^2;  beyond: sign(x) (1 - 2 / (exp(2|x|) + 1)), where the result
// is at least 1/2 and so forgives the error of exp. NaN passes through both, infinities give
// +-1, -0 stays -0. Coefficients: minimax (Remez exchange), relative error of the approximation
// below 2^-29 (float) and 2^-59 (double), so the 2 ulp that remain are rounding; tests/test_tanh.py
// measures them.

template <class T>
struct TanhConstants;
template <>
struct TanhConstants<float> {
  // (tanh(s)/s - 1) / z on z = s^2 in [0, (9/16)^2]
  static constexpr float odd[] = {-0.333333138896f, 0.133324523105f, -0.0538374331294f,
                                  0.0210074679527f, -0.00617981968047f};
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2
  static constexpr float exp[] = {0.49999993413f, 0.166665201148f, 0.0416683943111f,
                                  0.00836877992563f, 0.00138144560449f};
  static constexpr float saturated = 10.0f;       // tanh is 1 to the last bit from 9.02 on
  static constexpr float rounder = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693145751953125f;  // 15 bits: n * ln2_high is exact
  static constexpr float ln2_low = 1.42860682030941723212e-6f;
  static constexpr int mantissa_bits = 23;
};
template <>
struct TanhConstants<double> {
  static constexpr double odd[] = {
      -0.3333333333333327785,    0.1333333333332313291,     -0.053968253961724116778,
      0.021869488327266697884,   -0.0088632316370338055197, 0.0035920822486322000606,
      -0.0014554796336065654794, 0.00058818361717666269524, -0.00023271614440350185165,
      0.000082360830980555517499, -0.000018903907411166039165};
  static constexpr double exp[] = {
      0.50000000000000107205,    0.16666666666666410092,    0.041666666666529191598,
      0.0083333333334957163613,  0.0013888888943922266434,  0.00019841269504567054923,
      0.000024801492762812617171, 2.7557587514318378903e-6, 2.7630378720477170792e-7,
      2.4999912961441213034e-8};
  static constexpr double saturated = 20.0;  // 1 to the last bit from 19.1 on
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01;  // 32 bits
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa_bits = 52;
};

template <class T, int N>
RNNFAST_INLINE V<T> polynomial(const T (&c)[N], V<T> x) {
  V<T> y = V<T>{} + c[N - 1];
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

template <class T>
RNNFAST_INLINE V<T> tanh(V<T> x) {
  using C = TanhConstants<T>;
  using Bits = typename Vector<T>::Bits;
  constexpr T log2e = T(1.44269504088896340736);
  const Bits sign_bit = (Bits)(-V<T>{});
  const Bits sign = (Bits)x & sign_bit;
  const V<T> magnitude = (V<T>)((Bits)x & ~sign_bit);

  const V<T> z = x * x;
  const V<T> small = magnitude + magnitude * (z * polynomial(C::odd, z));

  // Ordered so that a NaN is kept.
  const V<T> clamped = magnitude > C::saturated ? V<T>{} + C::saturated : magnitude;
  const V<T> y = clamped + clamped;
  const V<T> shifted = y * log2e + C::rounder;
  const V<T> n = shifted - C::rounder;
  const V<T> r = (y - n * C::ln2_high) - n * C::ln2_low;
  const V<T> p = r * r * polynomial(C::exp, r) + r + T(1);
  // The integer sits in the low mantissa bits of `shifted`; move it to the exponent of p.
  const V<T> e = (V<T>)((Bits)p + ((Bits)shifted << C::mantissa_bits));
  const V<T> large = T(1) - T(2) / (e + T(1));
  return (V<T>)((Bits)(magnitude < T(0.5625) ? small : large) | sign);
}

// ------------------------------------------------------------------------------ register blocks

// Vectors across a panel, and the most rows of a block by its width: as many accumulators as leave
// registers for the weights and the broadcast.
#if RNNFAST_VECTOR_REGISTERS == 32
constexpr int kPanel = 4;
constexpr int kMaxRows[kPanel] = {12, 12, 8, 6};
#else
constexpr int kPanel = 2;
constexpr int kMaxRows[kPanel] = {8, 6};
#endif

template <class T, int M, int N>
struct Block {
  V<T> acc[M][N];

  RNNFAST_INLINE void clear() {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = V<T>{};
  }

  // acc[m] += rows of a tensor, `last` lanes of the last vector.
  RNNFAST_INLINE void add(const T* row, int64_t stride, int last) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] += load_nth<T, N>(row + m * stride, n, last);
  }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
  // acc[m][n] += sum_k a[m * lda + k] * w[k][n], w a panel of K * N vectors. Long sums are cut into
  // chains that each start from zero, since every addition rounds at the size of the sum so far.
  RNNFAST_INLINE void product(const T* a, int64_t lda, const T* w, int64_t K) {
    constexpr int64_t kChain = 256;
    for (int64_t k = 0; k < K; k += kChain) {
      Block before;  // written and read where k > 0 alone
      if (k > 0) {
        before = *this;
        clear();
      }
      chain(a + k, lda, w + k * N * L<T>, K - k < kChain ? K - k : kChain);
      if (k > 0) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) acc[m][n] += before.acc[m][n];
      }
    }
  }

#pragma GCC diagnostic pop

  // The same in one chain, or a few where the block is too small to cover the latency of a
  // multiply-add otherwise.
  RNNFAST_INLINE void chain(const T* a, int64_t lda, const T* w, int64_t K) {
    constexpr int U = M * N >= 8 ? 1 : M * N >= 4 ? 2 : 4;
    constexpr int width = N * L<T>;
    V<T> part[U][M][N];
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) part[u][m][n] = u == 0 ? acc[m][n] : V<T>{};
    int64_t k = 0;
    for (; k + U <= K; k += U) {
#pragma GCC unroll 16
      for (int u = 0; u < U; ++u) {
        V<T> wk[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) wk[n] = load(w + (k + u) * width + n * L<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const T am = a[m * lda + k + u];
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) part[u][m][n] += am * wk[n];
        }
      }
    }
    if (U > 1) {
      for (; k < K; ++k)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) part[0][m][n] += a[m * lda + k] * load(w + k * width + n * L<T>);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        V<T> sum = part[0][m][n];
#pragma GCC unroll 16
        for (int u = 1; u < U; ++u) sum += part[u][m][n];
        acc[m][n] = sum;
      }
  }
};

// The weights of panel `p` of a packed [K, n] matrix.
template <class T>
RNNFAST_INLINE const T* panel_of(const T* packed, int64_t p, int64_t K) {
  return packed ? packed + p * kPanel * L<T> * K : nullptr;
}

// ------------------------------------------------------------------------------------- the cells
//
// A cell says what one block of one step computes. `carried` is the block's rows of the state that
// the walk carries (h[t-1] forward, z'[t+1] backward), nullptr for rows at their first visit.

template <class T>
struct ForwardCell {
  using Scalar = T;
  const Forward<T>& f;

  const Walk& walk() const { return f.walk; }
  int64_t hidden_size() const { return f.hidden_size; }
  bool backwards() const { return f.walk.reverse; }
  const T* state(int64_t t, int64_t b) const { return f.walk.row(f.out, t, b); }
  int64_t state_stride() const { return f.out.stride_b; }

  template <int M, int N>
  static void block(const ForwardCell& self, int64_t t, int64_t b, int64_t p, int last,
                    const T* carried) {
    const Forward<T>& f = self.f;
    const int64_t column = p * kPanel * L<T>;
    T* out = f.walk.row(f.out, t, b) + column;
    int64_t h_stride = f.out.stride_b;
    if (!carried && f.h0.data) {
      carried = f.h0.data + b * f.h0.stride_b;
      h_stride = f.h0.stride_b;
    }
    // Smallest terms first, the long sum over h from zero: each addition rounds at the size that
    // the sum has by then.
    Block<T, M, N> z;
    z.clear();
    if (carried) z.product(carried, h_stride, panel_of(f.w_hh, p, f.hidden_size), f.hidden_size);
    if (f.input_size > 0) {
      z.product(f.walk.row(f.x, t, b), f.x.stride_b, panel_of(f.w_ih, p, f.input_size),
                f.input_size);
      if (f.bias) {
        const T* bias = panel_of(f.bias, p, 1);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const V<T> bias_n = load(bias + n * L<T>);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) z.acc[m][n] += bias_n;
        }
      }
    } else {
      z.add(out, f.out.stride_b, last);
    }
    // Unrolled over the panel only: the rows' activations would overflow the registers.
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V<T> v = z.acc[m][n];
        store_nth<T, N>(out + m * f.out.stride_b, n, last,
                        f.relu ? (v < T(0) ? V<T>{} : v) : tanh<T>(v));
      }
  }
};

template <class T>
struct BackwardCell {
  using Scalar = T;
  const Backward<T>& f;

  const Walk& walk() const { return f.walk; }
  int64_t hidden_size() const { return f.hidden_size; }
  bool backwards() const { return !f.walk.reverse; }
  const T* state(int64_t t, int64_t b) const { return f.walk.row(f.dz, t, b); }
  int64_t state_stride() const { return f.dz.stride_b; }

  template <int M, int N>
  static void block(const BackwardCell& self, int64_t t, int64_t b, int64_t p, int last,
                    const T* carried) {
    const Backward<T>& f = self.f;
    const int64_t column = p * kPanel * L<T>;
    Block<T, M, N> dh;
    dh.clear();
    if (carried) {
      dh.product(carried, f.dz.stride_b, panel_of(f.w_hh, p, f.hidden_size), f.hidden_size);
    } else if (f.grad_h_n.data) {
      dh.add(f.grad_h_n.data + b * f.grad_h_n.stride_b + column, f.grad_h_n.stride_b, last);
    }
    if (f.grad_out.data) dh.add(f.walk.row(f.grad_out, t, b) + column, f.grad_out.stride_b, last);
    const T* out = f.walk.row(f.out, t, b) + column;
    T* dz = f.walk.row(f.dz, t, b) + column;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V<T> h = load_nth<T, N>(out + m * f.out.stride_b, n, last);
        const V<T> g = dh.acc[m][n];
        store_nth<T, N>(dz + m * f.dz.stride_b, n, last,
                        f.relu ? (h <= T(0) ? V<T>{} : g) : g * (T(1) - h * h));
      }
  }
};

// --------------------------------------------------------------------------------------- the walk

// Rows [b, end) of one panel of one step, in the largest blocks that fit.
template <class Cell, int N>
void rows(const Cell& cell, int64_t t, int64_t b, int64_t end, int64_t p, int last,
          const typename Cell::Scalar* carried) {
  constexpr int kMax = kMaxRows[N - 1];
  const int64_t stride = carried ? cell.state_stride() : 0;
#define RNNFAST_BLOCKS(M)                                                        \
  for (; end - b >= M; b += M, carried += M * stride)                            \
    Cell::template block<M, N>(cell, t, b, p, last, carried);
  RNNFAST_BLOCKS(kMax)
  RNNFAST_BLOCKS(4)
  RNNFAST_BLOCKS(2)
  RNNFAST_BLOCKS(1)
#undef RNNFAST_BLOCKS
}

template <class Cell>
void step(const Cell& cell, int64_t t, int64_t b, int64_t end,
          const typename Cell::Scalar* carried) {
  if (b >= end) return;
  constexpr int lanes = L<typename Cell::Scalar>;
  const int64_t H = cell.hidden_size();
  for (int64_t p = 0; p * kPanel * lanes < H; ++p) {
    const int64_t left = H - p * kPanel * lanes;
    const int width = left >= kPanel * lanes ? kPanel : int((left + lanes - 1) / lanes);
    const int last = left >= kPanel * lanes ? lanes : int(left - (width - 1) * lanes);
    switch (width) {
      case 1: rows<Cell, 1>(cell, t, b, end, p, last, carried); break;
      case 2: rows<Cell, 2>(cell, t, b, end, p, last, carried); break;
#if RNNFAST_VECTOR_REGISTERS == 32
      case 3: rows<Cell, 3>(cell, t, b, end, p, last, carried); break;
      case 4: rows<Cell, 4>(cell, t, b, end, p, last, carried); break;
#endif
    }
  }
}

// Every step of rows [b0, b1). Sequences are sorted by length, so the rows alive at a step are a
// prefix, and so are those of them that the step before also visited.
template <class Cell>
void walk_rows(const Cell& cell, int64_t b0, int64_t b1) {
  const Walk& walk = cell.walk();
  int64_t visited = b0;  // rows [b0, visited) were alive at the step visited last
  int64_t t_last = 0;
  for (int64_t s = 0; s < walk.seq_len; ++s) {
    const int64_t t = cell.backwards() ? walk.seq_len - 1 - s : s;
    const int64_t alive = walk.live(t) < b1 ? walk.live(t) : b1;
    if (alive <= b0) continue;
    const int64_t carried = visited < alive ? visited : alive;
    step(cell, t, b0, carried, carried > b0 ? cell.state(t_last, b0) : nullptr);
    step(cell, t, carried, alive, nullptr);
    visited = alive;
    t_last = t;
  }
}

// Rows are taken through time in groups: small enough that a group's state stays in the first-level
// cache while the weights, resident too, are reused; but where the weights exceed the second-level
// cache they are streamed once per group and step, so there the group is everything.
template <class Cell>
void run(const Cell& cell, int64_t b0, int64_t b1) {
  using T = typename Cell::Scalar;
  constexpr int64_t kStateBytes = 16 << 10, kWeightBytes = 512 << 10, kFewRows = 48;
  const int64_t row_bytes = cell.hidden_size() * int64_t(sizeof(T));
  int64_t group = b1 - b0;
  if (cell.hidden_size() * row_bytes <= kWeightBytes) {
    const int64_t fitting = kStateBytes / row_bytes / kFewRows * kFewRows;
    group = fitting > kFewRows ? fitting : kFewRows;
  }
  for (int64_t b = b0; b < b1; b += group) walk_rows(cell, b, b1 - b < group ? b1 : b + group);
}

// ----------------------------------------------------------------------------------- entry points

template <class T>
int64_t packed_size(int64_t K, int64_t N) {
  return K * ((N + L<T> - 1) / L<T>)*L<T>;
}

template <class T>
void pack(const T* w, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* packed) {
  for (int64_t n0 = 0; n0 < N; n0 += kPanel * L<T>) {
    const int64_t columns = N - n0 < kPanel * L<T> ? N - n0 : kPanel * L<T>;
    const int64_t width = (columns + L<T> - 1) / L<T> * L<T>;
    if (stride_n == 1) {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t n = 0; n < columns; ++n) packed[k * width + n] = w[k * stride_k + n0 + n];
        for (int64_t n = columns; n < width; ++n) packed[k * width + n] = T(0);
      }
    } else {
      // Transposed: in squares, so that a line of w fetched for one k serves the next ones.
      constexpr int64_t kSquare = 16;
      for (int64_t k0 = 0; k0 < K; k0 += kSquare) {
        const int64_t k1 = K - k0 < kSquare ? K : k0 + kSquare;
        for (int64_t n = 0; n < columns; ++n)
          for (int64_t k = k0; k < k1; ++k)
            packed[k * width + n] = w[k * stride_k + (n0 + n) * stride_n];
        for (int64_t n = columns; n < width; ++n)
          for (int64_t k = k0; k < k1; ++k) packed[k * width + n] = T(0);
      }
    }
    packed += K * width;
  }
}

template <class T>
void forward(const Forward<T>& f, int64_t b0, int64_t b1) {
  run(ForwardCell<T>{f}, b0, b1);
}

template <class T>
void backward(const Backward<T>& f, int64_t b0, int64_t b1) {
  run(BackwardCell<T>{f}, b0, b1);
}

template <class T>
void tanh_array(const T* x, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + L<T> <= n; i += L<T>) store(y + i, tanh<T>(load(x + i)));
  if (i < n) store_part(y + i, tanh<T>(load_part(x + i, int(n - i))), int(n - i));
}

#undef RNNFAST_INLINE

}  // namespace

const TimeLoop<float> f32 = {packed_size<float>, pack<float>, forward<float>, backward<float>,
                             tanh_array<float>};
const TimeLoop<double> f64 = {packed_size<double>, pack<double>, forward<double>, backward<double>,
                              tanh_array<double>};

}  // namespace rnnfast::cpu::RNNFAST_ISA
