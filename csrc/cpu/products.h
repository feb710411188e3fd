// Products over all steps: which are the library's, which our own, and our own ones.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "packing.h"
#include "steps.h"
#include "tensors.h"
#include "time_loop.h"

namespace rnnfast::cpu {

// Bytes of the second-level cache of a core: 512 KB where the system does not tell.
inline int64_t level2_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t bytes = 0;
#endif
  return bytes > 0 ? bytes : 512 << 10;
}

// Bytes of weights that a block of a few rows reads about as fast as it multiplies: those of the
// second-level cache, and where the third level is a core complex's own, as AMD's is, several times
// as many.
inline int64_t weights_in_reach() {
#if defined(__x86_64__)
  static const bool near_level3 = __builtin_cpu_is("amd");
#else
  constexpr bool near_level3 = false;
#endif
  return near_level3 ? 8 * level2_cache() : level2_cache() * 5 / 8;
}

// Whether a product of K terms and N columns is better made of dot products along the terms: the
// columns would leave half of a vector's lanes empty or more (notes/cpu.md, "Projection").
template <class T>
bool few_columns(int64_t K, int64_t N) {
  return N <= time_loop<T>().panel_columns / 8 && K >= 128 && K >= 32 * N;
}

// Whether the projection belongs into the walk over the steps: where a block's rows share each
// weight that is loaded and the weights of both stay in reach, which saves writing and reading
// every pre-activation; and where a call of the library (4 us) costs more than it saves. Else one
// product over all steps is the better use of the weights. In bfloat16 by vectors products are twice as
// fast, so that more rows have to share a weight. The bounds are measured (notes/cpu.md, "Projection" and
// "bfloat16 with AVX512-BF16").
struct FusingBounds {
  int64_t work;               // less than that, in multiply-adds, is not worth a call
  int64_t rows_of_few, rows;  // of the batch, that have to share few weights, or any
};
template <class T>
FusingBounds fusing_bounds() {
  if (in_tiles<T>()) return {.work = 250'000, .rows_of_few = 6, .rows = 6};
  if (kInPairs<T>) return {.work = 500'000, .rows_of_few = 3, .rows = 16};
  return {.work = 250'000, .rows_of_few = 4, .rows = 8};
}
template <class T>
bool worth_fusing(const Steps& steps, int64_t I, int64_t H) {
  const int64_t B = steps.walk.batch, weights = (I + H) * H;
  const FusingBounds least = fusing_bounds<T>();
  if (!kInPairs<T> && few_columns<T>(I, H)) return false;
  if (I <= 8 || steps.rows * I * H < least.work) return true;
  if (weights <= 40'000 && B >= least.rows_of_few) return true;
  return B >= least.rows && (I <= 128 || weights * int64_t(sizeof(T)) <= weights_in_reach());
}

// z += x w^T, for some rows. Strides of the features are 1.
template <class T>
void add_linear(Rows<const T> x, const Tensor& w, int64_t batch, Rows<Sum<T>> z,
                bool backwards = false) {
  const Linear<T> f = {.batch = batch, .K = w.size(1), .x = x.data, .ldx = x.stride_b,
                       .w = data_of<const T>(w), .ldw = w.stride(0), .z = z.data, .ldz = z.stride_b,
                       .backwards = backwards};
  const int64_t N = w.size(0);
  const auto shared_out = [&](int64_t size, const auto& run) {
    at::parallel_for(0, size, kWorkPerThread * size / (batch * N * f.K + 1) + 1, run);
  };
  if (few_columns<T>(f.K, N)) {  // too few to be shared out
    return shared_out(batch, [&](int64_t b0, int64_t b1) {
      Linear<T> rows = f;
      rows.batch = b1 - b0;
      rows.x += b0 * f.ldx;
      rows.z += b0 * f.ldz;
      time_loop<T>().linear(rows, 0, N);
    });
  }
  shared_out(N, [&](int64_t n0, int64_t n1) { time_loop<T>().linear(f, n0, n1); });
}

// Threads take panels of N columns, or rows, each packing all panels for its own: run(p0, p1, r0, r1),
// whichever leaves the busiest thread less. Of 200 columns, 4 panels, one of two threads would have
// 128. K are the terms of a sum.
template <class T, class F>
void by_panels_or_rows(int64_t rows, int64_t K, int64_t N, const F& run) {
  const int64_t panels = panels_of<T>(N), work = as_work<T>(rows * K * N);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t most =
      std::min((panels + threads - 1) / threads * time_loop<T>().panel_columns, N);
  if (most * (rows + kPacking) <= N * (rows / threads + kPacking)) {
    at::parallel_for(0, panels, kWorkPerThread * panels / (work + 1) + 1,
                     [&](int64_t p0, int64_t p1) { run(p0, p1, 0, rows); });
  } else {
    at::parallel_for(0, rows, kWorkPerThread * rows / (work + 1) + 1,
                     [&](int64_t r0, int64_t r1) { run(0, panels, r0, r1); });
  }
}

// c = start + a w by our own blocks. A panel of w is packed, as many of its rows at a time as stay
// in the second-level cache, by the thread that takes rows of `a` past it. In tiles, which are done
// with a row so fast that it should pass once, all panels of a thread are.
template <class T>
void add_own_product(const Tensor& a, const Tensor& w, const Tensor& start, const Tensor& c) {
  const auto& loop = time_loop<T>();
  const int64_t rows = a.size(0), K = w.size(0), N = w.size(1), width = loop.panel_columns;
  const int64_t most_terms = kInPairs<T> ? K : 1024;
  std::vector<Packing<T>> parts;
  for (int64_t k = 0; k < K; k += most_terms) {
    parts.emplace_back(w.narrow(0, k, std::min(most_terms, K - k)), /*transposed=*/false);
  }
  PanelProduct<T> whole;
  whole.lda = a.stride(0);
  whole.ldc = c.stride(0);
  const T* a_data = data_of<const T>(a);
  const T* from = start.defined() ? data_of<const T>(start) : nullptr;
  const int64_t ld_start = start.defined() && start.dim() == 2 ? start.stride(0) : 0;
  T* c_data = data_of<T>(c);
  const auto run = [&](int64_t p0, int64_t p1, int64_t r0, int64_t r1) {
    const int64_t at_once = in_tiles<T>() ? p1 - p0 : 1;
    Space<T> packed(loop.packed_size(std::min(K, most_terms), std::min(N, at_once * width)));
    PanelProduct<T> f = whole;
    f.rows = r1 - r0;
    f.w = packed.data();
    for (int64_t p = p0; p < p1; p += at_once) {
      const int64_t n = p * width;
      f.columns = std::min(at_once * width, N - n);
      f.a = a_data + r0 * f.lda;
      f.c = c_data + r0 * f.ldc + n;
      f.start = from ? from + r0 * ld_start + n : nullptr;
      f.ld_start = ld_start;
      for (const auto& part : parts) {
        part.pack(p, p + at_once, packed.data());
        f.K = part.K;
        loop.panel_product(f);
        f.a += f.K;
        f.start = f.c;
        f.ld_start = f.ldc;
      }
    }
  };
  by_panels_or_rows<T>(rows, K, N, run);
}

// c = start + a w, all [rows, *], with `start` undefined, a row of its own or c itself.
template <class T>
void product_into(Tensor c, const Tensor& start, const Tensor& a, const Tensor& w) {
  constexpr int64_t kFewRows = 4;
  const bool own = kInPairs<T> || (outruns_library() && a.size(0) > kFewRows);
  if (own && c.stride(1) == 1) {
    return add_own_product<T>(adjacent_features(a), w,
                              start.defined() ? adjacent_features(start) : start, c);
  }
  start.defined() ? at::addmm_out(c, start, a, w) : at::mm_out(c, a, w);
}

// Whether a weight gradient of so many numbers is the time loop's outer_sum. In bfloat16 by vectors one
// that is not summed `whole` has to be small, since each block of it packs all rows again.
template <class T>
bool worth_own_sums(int64_t numbers, bool whole = true) {
  if (kInPairs<T> ? in_tiles<T>() || whole : outruns_library()) return true;
  return numbers <= time_loop<T>().outer_sum_numbers;
}

// Threads take the M rows of a gradient, f(m0, m1), so that no sum depends on how many there are;
// few at a time, so that they have as much to do.
template <class T, class F>
void by_gradient_rows(int64_t M, int64_t multiply_adds, const F& f) {
  const int64_t block = in_tiles<T>() ? 16 : 8, work = as_work<T>(multiply_adds);
  const int64_t blocks = (M + block - 1) / block;
  const int64_t grain = std::max<int64_t>(blocks * kWorkPerThread / (work + 1), 1);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    f(begin * block, std::min(end * block, M));
  });
}

}  // namespace rnnfast::cpu
