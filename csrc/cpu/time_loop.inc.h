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
//             copied: h[t-1] is read from where the output stores it, z'[t+1] from dz.
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

// Vectors are passed only between functions of this file.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rnnfast::cpu::RNNFAST_ISA {
namespace {

#define RNNFAST_INLINE inline __attribute__((always_inline))
#define RNNFAST_LAMBDA_INLINE __attribute__((always_inline))

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
// Of sums, and of as many lanes.
template <>
struct Vector<BFloat16> : Vector<float> {};
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

// Has v in a register, where the compiler would read it from memory for every use.
template <class V>
RNNFAST_INLINE void hold(V& v) {
#if RNNFAST_VECTOR_BYTES == 64 && !defined(RNNFAST_EMULATE_AVX512)
  asm("" : "+v"(v));
#elif RNNFAST_VECTOR_BYTES == 32
  asm("" : "+x"(v));
#endif
}

// The first n < L lanes; the others load as zero and are not stored.
#if RNNFAST_VECTOR_BYTES == 64 && !defined(RNNFAST_EMULATE_AVX512)
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

#if defined(RNNFAST_BFLOAT16)
// Rows of bfloat16, in registers as float; stored rounded to nearest, ties to even, a NaN kept.
// Products are of pairs (k, k + 1), which lie in one lane's bits.
#if defined(RNNFAST_EMULATE_AVX512)
RNNFAST_INLINE V<BFloat16> load_part(const BFloat16* p, int n) {
  Vector<float>::Bits v = {};
  for (int i = 0; i < n; ++i) v[i] = uint32_t(p[i].bits) << 16;
  return (V<float>)v;
}
RNNFAST_INLINE V<BFloat16> load(const BFloat16* p) { return load_part(p, L<float>); }
RNNFAST_INLINE void store_part(BFloat16* p, V<BFloat16> v, int n) {
  const auto bits = (Vector<float>::Bits)v;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  for (int i = 0; i < n; ++i) p[i].bits = v[i] == v[i] ? rounded[i] : 0x7fc0;
}
RNNFAST_INLINE void store(BFloat16* p, V<BFloat16> v) { store_part(p, v, L<float>); }
RNNFAST_INLINE V<float> add_pairs(V<float> sum, V<float> x, V<float> w) {
  const auto first = [](V<float> v) { return (V<float>)((Vector<float>::Bits)v << 16); };
  const auto second = [](V<float> v) { return (V<float>)((Vector<float>::Bits)v & 0xffff0000u); };
  return sum + first(x) * first(w) + second(x) * second(w);
}
#else
RNNFAST_INLINE V<BFloat16> widened(__m256i v) {
  typedef uint16_t Stored __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
  return (V<float>)(__builtin_convertvector((Stored)v, Vector<float>::Bits) << 16);
}
RNNFAST_INLINE V<BFloat16> load(const BFloat16* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RNNFAST_INLINE V<BFloat16> load_part(const BFloat16* p, int n) {
  return widened(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
RNNFAST_INLINE void store(BFloat16* p, V<BFloat16> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
RNNFAST_INLINE void store_part(BFloat16* p, V<BFloat16> v, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
RNNFAST_INLINE V<float> add_pairs(V<float> sum, V<float> x, V<float> w) {
  return (V<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
#endif
#endif

// sum_k x[k] w[k], whose lanes each take one k at a time, or a pair.
template <class T>
struct Product {
  // load: one k, or pair, per lane. broadcast: x[k] in all lanes (not `whole`: a row ends with half a
  // pair, whose rest is zero).
  static RNNFAST_INLINE V<T> load(const T* x) { return RNNFAST_ISA::load(x); }
  static RNNFAST_INLINE V<T> load_part(const T* x, int n) { return RNNFAST_ISA::load_part(x, n); }
  static RNNFAST_INLINE V<T> broadcast(const T* x, bool whole) { return *x - V<T>{}; }
  static RNNFAST_INLINE V<T> add(V<T> sum, V<T> x, V<T> w) { return sum + x * w; }
};
#if defined(RNNFAST_BFLOAT16)
template <>
struct Product<BFloat16> {
  static RNNFAST_INLINE V<float> load(const BFloat16* x) {
    V<float> v;
    __builtin_memcpy(&v, x, sizeof(v));
    return v;
  }
  static RNNFAST_INLINE V<float> load_part(const BFloat16* x, int n) {
#if defined(RNNFAST_EMULATE_AVX512)
    V<float> v = {};
    __builtin_memcpy(&v, x, n * sizeof(BFloat16));
    return v;
#else
    return (V<float>)_mm512_maskz_loadu_epi16((1u << n) - 1, x);
#endif
  }
  static RNNFAST_INLINE V<float> broadcast(const BFloat16* x, bool whole) {
    uint32_t pair = x->bits;
    if (whole) __builtin_memcpy(&pair, x, sizeof(pair));
    return (V<float>)(pair - Vector<float>::Bits{});
  }
  static RNNFAST_INLINE V<float> add(V<float> sum, V<float> x, V<float> w) {
    return add_pairs(sum, x, w);
  }
};
#endif

// n numbers of type S, and the vector of lanes i of a, or i - n of b, for each of some i.
template <class S, int n>
struct Lanes {
  typedef S V __attribute__((vector_size(n * sizeof(S))));
};
#if defined(__clang__)
#define RNNFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RNNFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
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
// |x| < 5/16: x + x z P(z), z = x^2;  beyond: sign(x) t / (t + 2), t = exp(2|x|) - 1, whose
// relative error counts 2 / (t + 2) times. NaN passes through both, infinities give +-1, -0 stays
// -0.
// exp(2|x|) - 1 = 2^n (exp(r) - 1) + (2^n - 1), 2|x| = n ln2 + r. Coefficients: minimax (Remez
// exchange); tests/test_op.py measures the result, at most 1.5 ulp in float.

template <class T>
struct TanhConstants;
template <>
struct TanhConstants<float> {
  // (tanh(s)/s - 1) / z on z = s^2 in [0, (5/16)^2]
  static constexpr float odd[] = {-0.333333282267f, 0.13332822834f, -0.0538088762221f,
                                  0.0198870003657f};
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2
  static constexpr float exp[] = {0.49999993413f, 0.166665201148f, 0.0416683943111f,
                                  0.00836877992563f, 0.00138144560449f};
  static constexpr float saturated = 10.0f;       // tanh is 1 to the last bit from 9.02 on
  static constexpr float rounder = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693145751953125f;  // 15 bits: n * ln2_high is exact
  static constexpr float ln2_low = 1.42860682030941723212e-6f;
  static constexpr int mantissa_bits = 23;
  static constexpr uint32_t one = 0x3f800000;  // the bits of 1
};
template <>
struct TanhConstants<double> {
  static constexpr double odd[] = {
      -0.3333333333333319391,  0.13333333333286980448,   -0.05396825391552656501,
      0.021869485631566987246, -0.0088631468278376143772, 0.0035905439237278157617,
      -0.0014393088661559392615, 0.00049572368970588958585};
  static constexpr double exp[] = {
      0.50000000000000008619,   0.16666666666666670974,    0.041666666666652289778,
      0.0083333333333261537606, 0.0013888888895597032298,  0.00019841269874764737283,
      0.0000248015745382309021, 2.7557255462276079494e-6,  2.7567927108842001271e-7,
      2.5105194030723185117e-8, 1.7687739162984292121e-9};
  static constexpr double saturated = 20.0;  // 1 to the last bit from 19.1 on
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01;  // 32 bits
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa_bits = 52;
  static constexpr uint64_t one = 0x3ff0000000000000;
};

// In place, and stage by stage over W vectors: one alone waits for its own latencies (20 cycles a
// vector on Zen 3, 13 in fours).
#define RNNFAST_EACH _Pragma("GCC unroll 8") for (int i = 0; i < W; ++i)
template <class T, int W>
RNNFAST_INLINE void tanh(V<T> (&x)[W]) {
  using C = TanhConstants<T>;
  using Bits = typename Vector<T>::Bits;
  constexpr T log2e = T(1.44269504088896340736);
  constexpr int odd = sizeof(C::odd) / sizeof(T), exp = sizeof(C::exp) / sizeof(T);
  const Bits sign_bit = (Bits)(-V<T>{});
  V<T> magnitude[W], y[W], shifted[W], n[W], r[W], p[W], e[W], t[W], z[W], small[W];
  RNNFAST_EACH magnitude[i] = (V<T>)((Bits)x[i] & ~sign_bit);
  // Ordered so that a NaN is kept.
  RNNFAST_EACH y[i] = magnitude[i] > C::saturated ? V<T>{} + C::saturated : magnitude[i];
  RNNFAST_EACH shifted[i] = y[i] * (2 * log2e) + C::rounder;
  RNNFAST_EACH n[i] = shifted[i] - C::rounder;
  RNNFAST_EACH y[i] = y[i] + y[i];
  RNNFAST_EACH r[i] = y[i] - n[i] * C::ln2_high;
  RNNFAST_EACH r[i] = r[i] - n[i] * C::ln2_low;
  RNNFAST_EACH p[i] = V<T>{} + C::exp[exp - 1];
#pragma GCC unroll 16
  for (int j = exp - 2; j >= 0; --j) RNNFAST_EACH p[i] = p[i] * r[i] + C::exp[j];
  RNNFAST_EACH t[i] = r[i] * r[i];
  RNNFAST_EACH p[i] = t[i] * p[i] + r[i];
  // The integer n sits in the low mantissa bits of `shifted`: moved to the exponent, it makes 2^n.
  RNNFAST_EACH e[i] = (V<T>)(((Bits)shifted[i] << C::mantissa_bits) + C::one);
  RNNFAST_EACH t[i] = e[i] - T(1);
  RNNFAST_EACH t[i] = p[i] * e[i] + t[i];
  RNNFAST_EACH p[i] = t[i] + T(2);
  RNNFAST_EACH y[i] = t[i] / p[i];

  RNNFAST_EACH z[i] = magnitude[i] * magnitude[i];
  RNNFAST_EACH small[i] = V<T>{} + C::odd[odd - 1];
#pragma GCC unroll 16
  for (int j = odd - 2; j >= 0; --j) RNNFAST_EACH small[i] = small[i] * z[i] + C::odd[j];
  RNNFAST_EACH z[i] = magnitude[i] * z[i];
  RNNFAST_EACH small[i] = z[i] * small[i] + magnitude[i];
  RNNFAST_EACH y[i] = magnitude[i] < T(0.3125) ? small[i] : y[i];
  RNNFAST_EACH x[i] = (V<T>)((Bits)y[i] | ((Bits)x[i] & sign_bit));
}

#if RNNFAST_VECTOR_BYTES == 64
// table[index % 32] in every lane.
RNNFAST_INLINE V<float> look_up(const float (&table)[32], Vector<float>::Bits index) {
#if defined(RNNFAST_EMULATE_AVX512)
  V<float> v;
  for (int i = 0; i < L<float>; ++i) v[i] = table[index[i] % 32];
  return v;
#else
  return (V<float>)_mm512_permutex2var_ps((__m512)load(table), (__m512i)index,
                                          (__m512)load(table + L<float>));
#endif
}

// Where one instruction looks up 32 floats: tanh_table.h instead of the above, at most 1 ulp.
template <int W>
RNNFAST_INLINE void tanh_by_table(V<float> (&x)[W]) {
  using Bits = Vector<float>::Bits;
  constexpr float saturated = TanhConstants<float>::saturated;
  constexpr uint32_t least = 0x3d800000;  // 1/16: the first interval is all below 5/64
  const Bits sign_bit = (Bits)(-V<float>{});
  V<float> d[W], p[W];
  Bits index[W];
  RNNFAST_EACH d[i] = (V<float>)((Bits)x[i] & ~sign_bit);
  // Ordered so that a NaN is kept; infinity's interval is that of 10.
  RNNFAST_EACH d[i] = saturated < d[i] ? V<float>{} + saturated : d[i];
  RNNFAST_EACH index[i] = (Bits)d[i] > least ? (Bits)d[i] : Bits{} + least;
  RNNFAST_EACH index[i] >>= 21;
  RNNFAST_EACH d[i] -= look_up(kTanhTable[0], index[i]);
  RNNFAST_EACH p[i] = look_up(kTanhTable[kTanhDegree + 1], index[i]);
#pragma GCC unroll 8
  for (int k = kTanhDegree; k >= 1; --k)
    RNNFAST_EACH p[i] = p[i] * d[i] + look_up(kTanhTable[k], index[i]);
  RNNFAST_EACH x[i] = (V<float>)((Bits)p[i] | ((Bits)x[i] & sign_bit));
}
template <>
RNNFAST_INLINE void tanh<float, 4>(V<float> (&x)[4]) {
  tanh_by_table(x);
}
#endif
#undef RNNFAST_EACH

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

  // acc[m] += rows of a tensor, `last` lanes of the last vector.
  RNNFAST_INLINE void add(const T* row, int64_t stride, int last) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n)
        acc[m][n] += load_nth<T, vectors>(row + m * stride, n, last);
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
// forward, z'[t+1] backward), nullptr for rows at their first visit.

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

// ------------------------------------------------------------------------- sums of outer products
//
// c[m,n] += sum_r a[r,m] b[r,n]: a weight gradient, of dz and what the weight multiplied. Rows are
// taken in chunks, of which what a panel of b and a few columns of a take stays in the first-level
// cache; a chunk's sums start from zero in registers, so that an addition rounds at the size of a
// chunk's sum; the column sums, which have no lanes to spread a bias over, fold every 16 rows.

// Measured against MKL (notes/cpu.md, "Weight gradients").
#if RNNFAST_VECTOR_BYTES == 64
constexpr int64_t kOuterSumNumbers = 700 * 700;
#elif RNNFAST_VECTOR_BYTES == 32
constexpr int64_t kOuterSumNumbers = 160 * 160;
#else
constexpr int64_t kOuterSumNumbers = 112 * 112;
#endif

template <class T>
struct OuterCell {
  template <int M, int N>
  static void block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t R, int last, T* c,
                    int64_t ldc) {
    Block<T, M, N> sum;
    sum.clear();
    if (last == L<T>) {
      sum.template chain<true>(a, 1, lda, {b, ldb, 0}, R, last);
    } else {
      sum.template chain<false>(a, 1, lda, {b, ldb, 0}, R, last);
    }
    sum.add(c, ldc, last);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store_nth<T, N>(c + m * ldc, n, last, sum.acc[m][n]);
  }

  template <int N>
  static void panel(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t R, int64_t m0,
                    int64_t m1, int last, T* c, int64_t ldc) {
    level_blocks<OuterCell, N>(m0, m1, [&](auto block, int64_t m, int64_t) RNNFAST_LAMBDA_INLINE {
      block(a + m, lda, b, ldb, R, last, c + m * ldc, ldc);
    });
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
    const T* a = f.a + r * f.lda;
    for (int64_t n = 0; n < f.N; n += kPanel * lanes) {
      const T* b = f.b + r * f.ldb + n;
      const int64_t left = f.N - n;
      const int width = left >= kPanel * lanes ? kPanel : int((left + lanes - 1) / lanes);
      const int last = left >= kPanel * lanes ? lanes : int(left - (width - 1) * lanes);
      switch (width) {
        case 1: Cell::template panel<1>(a, f.lda, b, f.ldb, R, m0, m1, last, f.c + n, f.ldc); break;
        case 2: Cell::template panel<2>(a, f.lda, b, f.ldb, R, m0, m1, last, f.c + n, f.ldc); break;
#if RNNFAST_VECTOR_REGISTERS == 32
        case 3: Cell::template panel<3>(a, f.lda, b, f.ldb, R, m0, m1, last, f.c + n, f.ldc); break;
        case 4: Cell::template panel<4>(a, f.lda, b, f.ldb, R, m0, m1, last, f.c + n, f.ldc); break;
#endif
      }
    }
    if (f.column_sums) add_column_sums(f, r, R, m0, m1);
  }
}

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

// ---------------------------------------------------------------------------------------- packing

// a0 b0 a1 b1 ... of the lower halves of a and b, or of the upper ones.
template <class T, int from, int... i>
RNNFAST_INLINE V<T> zip(V<T> a, V<T> b, std::integer_sequence<int, i...>) {
  return RNNFAST_SHUFFLE(a, b, (from + i / 2 + i % 2 * L<T>)...);
}

// A square of as many vectors as one has lanes.
template <class T>
RNNFAST_INLINE void transpose(V<T> (&square)[L<T>]) {
  constexpr std::make_integer_sequence<int, L<T>> lanes;
#pragma GCC unroll 4
  for (int round = 1; round < L<T>; round *= 2) {
    V<T> zipped[L<T>];
#pragma GCC unroll 8
    for (int i = 0; i < L<T> / 2; ++i) {
      zipped[2 * i] = zip<T, 0>(square[i], square[i + L<T> / 2], lanes);
      zipped[2 * i + 1] = zip<T, L<T> / 2>(square[i], square[i + L<T> / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L<T>; ++i) square[i] = zipped[i];
  }
}

// A panel of w^T, where w has the columns as rows of K adjacent numbers.
template <class T>
void pack_transposed(const T* w, int64_t stride, int64_t K, int64_t columns, int64_t width,
                     T* packed) {
  constexpr int64_t lanes = L<T>, taken = lanes * Sums<T>::pairing;
  for (int64_t k = 0; k < K; k += taken) {
    const int64_t left = K - k < taken ? K - k : taken;
    const int64_t vectors = padded<T>(left) / Sums<T>::pairing;
    for (int64_t n = 0; n < width; n += lanes) {
      V<T> square[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        const T* row = w + (n + i) * stride + k;
        square[i] = n + i >= columns ? V<T>{}
                    : left == taken  ? Product<T>::load(row)
                                     : Product<T>::load_part(row, int(left));
      }
      transpose<T>(square);
      T* to = packed + k * width + n * Sums<T>::pairing;
      for (int64_t i = 0; i < vectors; ++i)
        __builtin_memcpy(to + i * width * Sums<T>::pairing, &square[i], sizeof(V<T>));
    }
  }
}

#if defined(RNNFAST_BFLOAT16)
// Of n lanes, row[.] and row[. + stride] side by side; the second, or both, zeros where `rows` ends.
RNNFAST_INLINE V<float> pairs_of(const BFloat16* row, int64_t stride, int64_t rows, int n) {
  using Bits = Vector<float>::Bits;
  const auto bits = [&](const BFloat16* p) RNNFAST_LAMBDA_INLINE {
    return (Bits)(n == L<float> ? load(p) : load_part(p, n));
  };
  Bits pairs = {};
  if (rows > 0) pairs = bits(row) >> 16;
  if (rows > 1) pairs |= bits(row + stride);
  return (V<float>)pairs;
}

// A panel of w, whose rows have the columns as adjacent numbers.
void pack_pairs(const BFloat16* w, int64_t stride, int64_t K, int64_t columns, int64_t width,
                BFloat16* packed) {
  for (int64_t k = 0; k < padded<BFloat16>(K); k += 2) {
    for (int64_t n = 0; n < width; n += L<float>) {
      const int64_t lanes = columns - n < L<float> ? columns - n : L<float>;
      const V<float> pairs = pairs_of(w + k * stride + n, stride, K - k, int(lanes));
      __builtin_memcpy(packed + k * width + 2 * n, &pairs, sizeof(pairs));
    }
  }
}
#endif

// ----------------------------------------------------------------------------------- entry points

template <class T>
int64_t packed_size(int64_t K, int64_t N) {
  return padded<T>(K) * ((N + L<T> - 1) / L<T>)*L<T>;
}

template <class T>
void pack(const T* w, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* packed) {
  constexpr int64_t pairing = Sums<T>::pairing;
  for (int64_t n0 = 0; n0 < N; n0 += kPanel * L<T>) {
    const int64_t columns = N - n0 < kPanel * L<T> ? N - n0 : kPanel * L<T>;
    const int64_t width = (columns + L<T> - 1) / L<T> * L<T>;
    const auto at = [&](int64_t k, int64_t n) RNNFAST_LAMBDA_INLINE -> T& {
      return packed[(k / pairing * width + n) * pairing + k % pairing];
    };
    if (stride_k == 1) {
      pack_transposed(w + n0 * stride_n, stride_n, K, columns, width, packed);
#if defined(RNNFAST_BFLOAT16)
    } else if (stride_n == 1) {
      pack_pairs(w + n0, stride_k, K, columns, width, packed);
#endif
    } else {
      for (int64_t k = 0; k < padded<T>(K); ++k) {
        const T* row = w + k * stride_k + n0 * stride_n;
        const int64_t filled = k < K ? columns : 0;
        if (pairing == 1 && stride_n == 1) {
          for (int64_t n = 0; n < filled; ++n) at(k, n) = row[n];
        } else {
          for (int64_t n = 0; n < filled; ++n) at(k, n) = row[n * stride_n];
        }
        for (int64_t n = filled; n < width; ++n) at(k, n) = T{};
      }
    }
    packed += padded<T>(K) * width;
  }
}

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

}  // namespace

#if defined(RNNFAST_BFLOAT16)
const TimeLoop<BFloat16> bf16 = {
    kPanel * L<BFloat16>, packed_size<BFloat16>, pack<BFloat16>,           forward<BFloat16>,
    backward<BFloat16>,   linear<BFloat16>,      activate_array<BFloat16>,
#if defined(RNNFAST_TILES)
    tile_outer_sum,       tile_outer_sum_space,  tile_product,
#else
    nullptr,              nullptr,               nullptr,
#endif
    nullptr,              0};
#else
int64_t no_space(int64_t) { return 0; }

template <class T>
constexpr TimeLoop<T> table(void (*widen)(const Float16*, int64_t, float*)) {
  return {kPanel * L<T>, packed_size<T>,    pack<T>,      forward<T>,       backward<T>,
          linear<T>,     activate_array<T>, outer_sum<T>, no_space,         panel_product<T>,
          widen,         kOuterSumNumbers};
}
const TimeLoop<float> f32 = table<float>(widen);
const TimeLoop<double> f64 = table<double>(nullptr);
#endif

}  // namespace rnnfast::cpu::RNNFAST_ISA
