// tanh and ReLU of vectors: part of time_loop.inc.h.
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
