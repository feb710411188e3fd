// Vectors of one instruction set, whole and in part, and the products of their lanes: part of
// time_loop.inc.h.

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
