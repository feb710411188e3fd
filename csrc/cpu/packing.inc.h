// Weights into panels: part of time_loop.inc.h.

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
