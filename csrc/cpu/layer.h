// What rnn_layer_cpu.cpp and rnn_layer_16bit.cpp share: where the steps lie and how threads divide
// them, the packing of weights, and which products are the library's and which our own.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../op.h"
#include "time_loop.h"

namespace rnnfast::cpu {

using at::Tensor;

// The elements of a tensor as the time loop's type.
template <class T>
using Element = std::conditional_t<std::is_same_v<std::remove_const_t<T>, BFloat16>, at::BFloat16,
                                   std::remove_const_t<T>>;
template <class T>
T* data_of(const Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return reinterpret_cast<T*>(x.const_data_ptr<Element<T>>());
  } else {
    return reinterpret_cast<T*>(x.mutable_data_ptr<Element<T>>());
  }
}

// Large memory may be new in every call: glibc returns more than 32 MB to the system when they are
// freed, and less when they end the heap. Its pages are cleared when they are first touched, 1.3 us
// each, a third of a call; of 2 MB there are few.
inline void ask_for_huge_pages(const Tensor& x) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kBytes = 4 << 20, kPage = 2 << 20;
  if (x.nbytes() <= kBytes) return;
  const auto data = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + x.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused
#endif
}

// at::empty goes through the dispatcher twice, at::zeros five times, each time 1 % of a small
// call.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor x = at::detail::empty_cpu(sizes, dtype);
  ask_for_huge_pages(x);
  return x;
}
inline Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype) {
  constexpr size_t kBytes = 32 << 10;  // more are ATen's, whose threads share them
  Tensor x = empty(sizes, dtype);
  if (x.nbytes() > kBytes) return x.zero_();
  if (x.numel() > 0) std::memset(x.mutable_data_ptr(), 0, x.nbytes());
  return x;
}

// ----------------------------------------------------------------------------------------- steps

template <class T>
int64_t panels_of(int64_t H) {
  const int64_t columns = time_loop<T>().panel_columns;
  return (H + columns - 1) / columns;
}

// In multiply-adds that take as long: waking a thread, about 4 us, and so what each is given at least;
// a meeting of threads; a byte fetched from another core, 64 of them 12 ns; a number packed, 0.16 ns.
// For tiles, which load many lines at a time, measured apart.
inline constexpr int64_t kWorkPerThread = 200'000, kMeeting = 16'000;
inline constexpr int64_t kFetchedByte = 16, kPacking = 16;
inline constexpr int64_t kTileMeeting = 64'000, kTileFetchedByte = 4;

// Threads worth starting for so much work, whether or not they can all run at once.
inline int64_t threads_worth(int64_t work) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return std::max<int64_t>(std::min(threads, work / kWorkPerThread), 1);
}
// Of them those that can: the system is asked, which takes 0.2 us, 2 % of a small call.
inline int64_t threads_for(int64_t work) {
  const int64_t worth = threads_worth(work);
  return worth > 1 ? std::min<int64_t>(worth, omp_get_num_procs()) : 1;
}

// Whether products of T are AMX's.
template <class T>
bool in_tiles() {
  return !std::is_same_v<T, Sum<T>> && has_tiles();
}

// Multiply-adds of T in those of float32's blocks, which take as long.
template <class T>
int64_t as_work(int64_t multiply_adds) {
  return in_tiles<T>() ? multiply_adds / 8 : multiply_adds;
}
// A step of some rows: sums of K terms for H units, and their activation. One row uses a loaded weight
// too little, and takes as long as two; a tile has sixteen.
template <class T>
int64_t work_of_step(int64_t rows, int64_t K, int64_t H) {
  if (in_tiles<T>()) return as_work<T>((rows + 15) / 16 * 16 * H * K) + 32 * rows * H;
  return std::max<int64_t>(rows, 2) * H * K + 16 * rows * H;
}

// Among how many threads the rows of a walk are divided, or its panels.
struct Sharing {
  int64_t rows = 1, panels = 1;
};

// Whether so many weights are packed by each thread for itself, in each of so many walks: that takes
// less than to fetch what another has packed, and than to wake threads once more. 16-bit weights that
// have to be widened are packed once for all.
inline bool each_packs(int64_t weights, int64_t walks = 1) { return weights * walks <= 32768; }

// Where the steps lie, and the storage that a Walk points into.
struct Steps {
  Walk walk;
  int64_t rows = 0;  // over all steps
  std::vector<int64_t> first_row;

  Steps(const Tensor& input, const OptionalTensor& sizes, bool reverse) {
    walk.reverse = reverse;
    if (!sizes) {
      walk.seq_len = walk.end = input.size(0);
      walk.batch = input.size(1);
      rows = walk.seq_len * walk.batch;
      return;
    }
    walk.seq_len = walk.end = sizes->numel();
    walk.batch_sizes = sizes->const_data_ptr<int64_t>();
    walk.batch = walk.batch_sizes[0];
    first_row.reserve(walk.seq_len);
    for (int64_t t = 0; t < walk.seq_len; ++t) {
      first_row.push_back(rows);
      rows += walk.live(t);
    }
    walk.first_row = first_row.data();
  }

  bool packed() const { return walk.first_row != nullptr; }

  // Rows that precede step t <= seq_len.
  int64_t row(int64_t t) const {
    return !packed() ? t * walk.batch : t < walk.seq_len ? first_row[t] : rows;
  }

  // Steps [begin, end) of a tensor [T, B, F] or packed [rows, F].
  Tensor part(const Tensor& x, int64_t begin, int64_t end) const {
    if (begin == 0 && end == walk.seq_len) return x;
    return packed() ? x.narrow(0, row(begin), row(end) - row(begin))
                    : x.narrow(0, begin, end - begin);
  }

  // The rows of a [T, B, F] or packed [rows, F] tensor, whose features are adjacent.
  template <class T>
  Rows<T> rows_of(const Tensor& x) const {
    T* data = data_of<T>(x);
    return packed() ? Rows<T>{data, 0, x.stride(0)} : Rows<T>{data, x.stride(0), x.stride(1)};
  }

  // x[len(b) - 1, b] for every b, and x[0, b]: the first and last valid step of each sequence.
  Tensor last(const Tensor& x) const {
    if (!packed()) return x.select(0, walk.seq_len - 1);
    const Tensor rows = x.contiguous();
    Tensor result = empty({walk.batch, rows.size(1)}, rows.scalar_type());
    copy_last(rows, result);
    return result;
  }
  Tensor first(const Tensor& x) const {
    return packed() ? x.narrow(0, 0, walk.batch) : x.select(0, 0);
  }

  // The same into a contiguous tensor [B, F], from an x whose rows lie a stride apart.
  void copy_last(const Tensor& x, const Tensor& to) const {
    if (!packed()) return copy_rows(x, rows - walk.batch, to, 0, walk.batch);
    for (int64_t t = 0; t < walk.seq_len; ++t) {
      const int64_t begin = t + 1 < walk.seq_len ? walk.batch_sizes[t + 1] : 0;
      copy_rows(x, first_row[t] + begin, to, begin, walk.batch_sizes[t] - begin);
    }
  }
  void copy_first(const Tensor& x, const Tensor& to) const { copy_rows(x, 0, to, 0, walk.batch); }

  static void copy_rows(const Tensor& x, int64_t at, const Tensor& to, int64_t to_at, int64_t n) {
    const size_t bytes = x.size(-1) * x.element_size(), stride = x.stride(-2) * x.element_size();
    const char* from = static_cast<const char*>(x.const_data_ptr()) + at * stride;
    char* row = static_cast<char*>(to.mutable_data_ptr()) + to_at * bytes;
    if (stride == bytes) {
      std::memcpy(row, from, n * bytes);
    } else {
      for (int64_t i = 0; i < n; ++i) std::memcpy(row + i * bytes, from + i * stride, bytes);
    }
  }

  // Calls f(at, before, n): the n rows from `at` on, of steps [begin, end), are those that the
  // forward visits one step after the n rows from `before` on. Runs of steps of equal size are one
  // call.
  template <class F>
  void for_each_shift(int64_t begin, int64_t end, const F& f) const {
    // Step t pairs with step t - 1; which of the two is in the range depends on the direction.
    const int64_t last = walk.reverse ? std::min(end + 1, walk.seq_len) : end;
    for (int64_t t = walk.reverse ? begin + 1 : std::max<int64_t>(begin, 1); t < last;) {
      int64_t run = t + 1;
      while (run < last && walk.live(run) == walk.live(t)) ++run;
      const int64_t late = row(t), early = row(t - 1);
      // Step t pairs with the first live(t) rows of step t - 1. The later steps of the run follow
      // on without a gap only where step t - 1 has the run's size as well.
      const int64_t n = walk.live(t);
      const int64_t steps = walk.live(t - 1) == n ? run - t : 1;
      walk.reverse ? f(early, late, n * steps) : f(late, early, n * steps);
      t += steps;
    }
  }

  // Calls f(at, b, n): the n rows from `at` on, of steps [begin, end), are those that the forward
  // enters from the state of sequences [b, b + n).
  template <class F>
  void for_each_start(int64_t begin, int64_t end, const F& f) const {
    if (!walk.reverse) {
      if (begin == 0) f(0, 0, walk.live(0));
      return;
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t + 1 < walk.seq_len ? walk.live(t + 1) : 0;
      if (walk.live(t) > b) f(row(t) + b, b, walk.live(t) - b);
    }
  }

  // How threads divide a walk whose steps are sums of K terms, whichever is estimated to take least
  // (notes/cpu.md, "Threads"): by rows, which never meet, but if the weights are many read those that
  // another has packed; or by panels of the H hidden units, each packing its own, and meeting after each
  // step for the rest of the state; or not at all.
  template <class T>
  Sharing sharing(const Walk& part, int64_t K, int64_t H) const {
    const int64_t B = walk.live(part.begin), steps = part.end - part.begin;
    const int64_t live = (row(part.end) - row(part.begin) + steps - 1) / steps;  // on average
    const int64_t panels = panels_of<T>(H), bytes = sizeof(T);
    const int64_t meeting = in_tiles<T>() ? kTileMeeting : kMeeting;
    const int64_t fetched = in_tiles<T>() ? kTileFetchedByte : kFetchedByte;
    const auto step = [&](int64_t rows) { return work_of_step<T>(rows, K, H); };
    const int64_t alone = steps * step(live);
    const auto best = [&](int64_t parts) -> Sharing {
      if (parts == 1) return {};
      const int64_t by_rows = std::min(parts, B);
      // The weights, once a walk. If each thread packs them, as one alone would, it is a margin: calls
      // of 10 us lose more by threads that are far from each other than they gain by near ones.
      const int64_t weights = K * H * (each_packs(K * H) ? kPacking : bytes * fetched);
      const int64_t rows_time = kWorkPerThread + weights * steps / walk.seq_len +
                                steps * step((live + by_rows - 1) / by_rows);
      const int64_t by_panels = std::min(parts, panels);
      const int64_t most = (panels + by_panels - 1) / by_panels;
      const int64_t panels_time =
          kWorkPerThread +
          steps * (step(live) * most / panels + meeting + live * H * bytes * fetched);
      if (std::min(rows_time, panels_time) >= alone) return {};
      return rows_time <= panels_time ? Sharing{.rows = by_rows} : Sharing{.panels = by_panels};
    };
    // A small call is not worth sharing by any number of threads, and need not ask for it.
    const Sharing wished = best(threads_worth(alone));
    return wished.rows == 1 && wished.panels == 1 ? wished : best(threads_for(alone));
  }

  // Runs loop(share) over all rows and panels of a walk.
  template <class T, class F>
  void parallel(const Walk& part, Sharing sharing, int64_t H, const F& loop) const {
    const int64_t B = walk.live(part.begin), rows = row(part.end) - row(part.begin);
    const int64_t panels = panels_of<T>(H), meeting = sharing.panels, ranges = sharing.rows;
    const Share all{.b0 = 0, .b1 = B, .p0 = 0, .p1 = panels};
    if (meeting > 1) {
      std::vector<Barrier::Party> parties(meeting);
      Barrier barrier(parties.data(), meeting);
      at::parallel_for(0, meeting, 1, [&](int64_t begin, int64_t end) {
        Share share = all;
        share.p0 = panels * begin / meeting;
        share.p1 = panels * end / meeting;
        share.barrier = &barrier;
        share.party0 = begin;
        share.party1 = end;  // more than one where fewer threads came than were asked for
        loop(share);
      });
      return;
    }
    if (ranges <= 1) return loop(all);
    std::vector<int64_t> bounds(ranges + 1, B);
    bounds[0] = 0;
    if (!packed()) {
      for (int64_t i = 1; i < ranges; ++i) bounds[i] = B * i / ranges;
    } else {
      int64_t length = part.end, before = 0, range = 1;
      for (int64_t b = 0; b < B && range < ranges; ++b) {
        while (walk.batch_sizes[length - 1] <= b) --length;
        before += length - part.begin;
        if (before * ranges >= rows * range) bounds[range++] = b + 1;
      }
    }
    at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Share share = all;
        share.b0 = bounds[i];
        share.b1 = bounds[i + 1];
        loop(share);
      }
    });
  }
};

// The steps in stretches, in the order of a walk, so that what is needed of the rows for a while
// takes a buffer of T and not a tensor of all of them. A buffer holds a stretch of rows and, next to
// them in their place, the rows of the step before.
template <class T>
class Stretches {
 public:
  // Of `most` rows, or one step.
  Stretches(const Steps& steps, bool backwards, int64_t most)
      : steps_(steps), backwards_(backwards) {
    for (int64_t t = 0; t < steps.walk.seq_len;) {
      const int64_t begin = t++;
      while (t < steps.walk.seq_len && steps.row(t + 1) - steps.row(begin) <= most) ++t;
      ranges_.emplace_back(begin, t);
      rows_ = std::max(rows_, steps.row(t) - steps.row(begin));
    }
    if (backwards) std::reverse(ranges_.begin(), ranges_.end());
  }

  const std::vector<std::pair<int64_t, int64_t>>& ranges() const { return ranges_; }

  Tensor buffer(int64_t features, bool with_step_before) const {
    const int64_t rows = rows_ + (with_step_before && ranges_.size() > 1 ? steps_.walk.batch : 0);
    return empty({rows, features}, c10::CppTypeToScalarType<Element<T>>::value);
  }

  // The stretch's rows of a buffer; `before`: one with the rows of the step before.
  Tensor rows(const Tensor& buffer, std::pair<int64_t, int64_t> range, bool before) const {
    const auto [begin, end] = range;
    if (ranges_.size() == 1) return buffer;
    return buffer.narrow(0, steps_.row(begin) - first_row(range, before),
                         steps_.row(end) - steps_.row(begin));
  }

  // The buffer as the time loop addresses it, by step and row.
  Rows<T> addressed(const Tensor& buffer, std::pair<int64_t, int64_t> range, bool before) const {
    const int64_t F = buffer.size(1);
    return {data_of<T>(buffer) - first_row(range, before) * F, steps_.walk.batch * F, F};
  }

  // Moves the rows of the step before, which ended the stretch before, to their place in this one.
  void carry(const Tensor& buffer, size_t i) const {
    if (i == 0) return;
    const auto range = ranges_[i];
    const int64_t t = backwards_ ? range.second : range.first - 1, F = buffer.size(1);
    const int64_t row = steps_.row(t), bytes = steps_.walk.live(t) * F * int64_t(sizeof(T));
    T* data = data_of<T>(buffer);
    std::memmove(data + (row - first_row(range, true)) * F,
                 data + (row - first_row(ranges_[i - 1], true)) * F, bytes);
  }

 private:
  int64_t first_row(std::pair<int64_t, int64_t> range, bool before) const {
    return steps_.row(range.first - (before && !backwards_ && range.first > 0));
  }

  const Steps& steps_;
  const bool backwards_;  // from the last step to the first
  std::vector<std::pair<int64_t, int64_t>> ranges_;  // steps [begin, end)
  int64_t rows_ = 0;                                 // of the longest
};

inline Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

// Whether all rows of x [T, B, F] or [rows, F] lie row_stride(x) apart. evenly_spaced: x, or a copy,
// whose rows do; flat without its view, 2 % of a small call.
inline bool has_even_rows(const Tensor& x) {
  return x.dim() == 2 || x.size(0) == 1 || x.size(1) == 1 ||
         x.stride(0) == x.size(1) * x.stride(1);
}
inline Tensor evenly_spaced(const Tensor& x) { return has_even_rows(x) ? x : flat(x); }
inline int64_t row_stride(const Tensor& x) {
  return x.dim() == 3 && x.size(1) > 1 ? x.stride(1) : x.stride(0);
}

inline Tensor adjacent_features(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// --------------------------------------------------------------------------------------- packing

// Uninitialised memory for packed weights: small ones stay on the stack.
template <class T>
class Space {
 public:
  explicit Space(int64_t size) {
    if (size <= kSmall) return;
    large_ = c10::GetCPUAllocator()->allocate(size * sizeof(T));
  }
  T* data() { return large_ ? static_cast<T*>(large_.get()) : small_; }
  void free() { large_.clear(); }

 private:
  static constexpr int64_t kSmall = (8 << 10) / sizeof(T);
  alignas(64) T small_[kSmall];
  c10::DataPtr large_;
};

template <class Stored>
void widen(const Stored* from, int64_t stride, int64_t n, float* to) {
  if (std::is_same_v<Stored, c10::Half> && stride == 1 && n >= 8) {  // fewer are not worth a call
    time_loop<float>().widen(reinterpret_cast<const Float16*>(from), n, to);
  } else if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * stride]);
  }
}

// w^T (transposed) or w, of type Stored, to be packed into the time loop's panels.
template <class T, class Stored = T>
class Packing {
 public:
  Packing(const Tensor& w, bool transposed)
      : K(w.size(transposed ? 1 : 0)), N(w.size(transposed ? 0 : 1)),
        stride_k_(w.stride(transposed ? 1 : 0)), stride_n_(w.stride(transposed ? 0 : 1)),
        weights_(data_of<const Stored>(w)) {}

  // Elements of panels [0, p).
  int64_t size(int64_t p) const {
    return loop_.packed_size(K, std::min(p * loop_.panel_columns, N));
  }

  // Panels [begin, end), to where the first of them is to lie.
  void pack(int64_t begin, int64_t end, T* packed) const {
    const int64_t n0 = begin * loop_.panel_columns;
    const int64_t n1 = std::min(end * loop_.panel_columns, N);
    if constexpr (std::is_same_v<T, Stored>) {
      loop_.pack(weights_ + n0 * stride_n_, stride_k_, stride_n_, K, n1 - n0, packed);
    } else {
      Space<T> wide(K * loop_.panel_columns);  // a panel, in the order of the weights
      for (int64_t n = n0; n < n1; n += loop_.panel_columns) {
        const int64_t columns = std::min(loop_.panel_columns, n1 - n);
        const Stored* from = weights_ + n * stride_n_;
        const bool by_k = stride_k_ > stride_n_;
        const int64_t outer = by_k ? K : columns, inner = by_k ? columns : K;
        const int64_t outer_stride = by_k ? stride_k_ : stride_n_;
        const int64_t inner_stride = by_k ? stride_n_ : stride_k_;
        for (int64_t i = 0; i < outer; ++i) {
          widen(from + i * outer_stride, inner_stride, inner, wide.data() + i * inner);
        }
        loop_.pack(wide.data(), by_k ? columns : 1, by_k ? 1 : K, K, columns,
                   packed + loop_.packed_size(K, n - n0));
      }
    }
  }

  const int64_t K, N;

 private:
  const TimeLoop<T>& loop_ = time_loop<T>();
  const int64_t stride_k_, stride_n_;
  const Stored* weights_;
};

// All panels: where threads divide them, each packs those that it will read, else they are shared
// out where there are many. Returns where they begin, and moves `space` on.
template <class T, class Stored = T>
const T* pack_into(T*& space, const Tensor& w, bool transposed, Sharing sharing) {
  const Packing<T, Stored> packing(w, transposed);
  T* packed = space;
  constexpr int64_t kWeightsPerThread = 16384;  // 10 us of packing
  const int64_t panels = panels_of<T>(packing.N), parties = sharing.panels;
  const auto pack = [&](int64_t begin, int64_t end) {
    packing.pack(begin, end, packed + packing.size(begin));
  };
  if (parties > 1) {
    at::parallel_for(0, parties, 1, [&](int64_t begin, int64_t end) {
      pack(panels * begin / parties, panels * end / parties);
    });
  } else {
    at::parallel_for(0, panels, kWeightsPerThread / (packing.K * time_loop<T>().panel_columns) + 1,
                     pack);
  }
  space += packing.size(panels);
  return packed;
}

// The panels of a share, to where they lie among all.
template <class T, class Stored = T>
const T* pack_into(T*& space, const Tensor& w, bool transposed, const Share& share) {
  const Packing<T, Stored> packing(w, transposed);
  T* packed = space;
  packing.pack(share.p0, share.p1, packed + packing.size(share.p0));
  space += packing.size(panels_of<T>(packing.N));
  return packed;
}

// b_ih + b_hh, each optional and of type Stored, padded to whole vectors: a packed [1, H].
template <class T, class Stored = T>
const T* pack_bias_into(T*& space, const Direction& layer) {
  const int64_t H = layer.w_hh.size(0);
  T* packed = space;
  space += time_loop<T>().packed_size(1, H);
  std::fill(packed, space, T(0));
  for (const auto& bias : {layer.b_ih, layer.b_hh}) {
    if (!bias) continue;
    const Stored* b = bias->template const_data_ptr<Stored>();
    for (int64_t n = 0; n < H; ++n) packed[n] += static_cast<T>(b[n * bias->stride(0)]);
  }
  return packed;
}

// -------------------------------------------------------------------------------------- products

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
// product over all steps is the better use of the weights. In bfloat16 by vectors, whose products are
// twice as fast, a call costs more (20 us) and more rows have to share a weight. The bounds are
// measured (notes/cpu.md, "Projection").
template <class T>
bool worth_fusing(const Steps& steps, int64_t I, int64_t H) {
  const int64_t B = steps.walk.batch, weights = (I + H) * H, bytes = sizeof(T);
  const bool of_library = !std::is_same_v<T, Sum<T>> && !in_tiles<T>();  // in bfloat16
  if (std::is_same_v<T, Sum<T>> && few_columns<T>(I, H)) return false;
  return I <= 8 || steps.rows * I * H < (of_library ? 1'000'000 : 250'000) ||
         (B >= (of_library ? 1 : in_tiles<T>() ? 6 : 4) && weights <= 40'000) ||
         (B >= (of_library ? 16 : in_tiles<T>() ? 6 : 8) &&
          (I <= 128 || weights * bytes <= weights_in_reach()));
}

// z += x w^T, for some rows. Strides of the features are 1.
template <class T>
void add_linear(Rows<const T> x, const Tensor& w, int64_t batch, Rows<Sum<T>> z,
                bool backwards = false) {
  const Linear<T> f = {batch, w.size(1), x.data, x.stride_b, data_of<const T>(w), w.stride(0),
                       z.data, z.stride_b, backwards};
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
  constexpr bool pairs = !std::is_same_v<T, Sum<T>>;
  const auto& loop = time_loop<T>();
  const int64_t rows = a.size(0), K = w.size(0), N = w.size(1), width = loop.panel_columns;
  const int64_t most_terms = pairs ? K : 1024;
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
    const int64_t at_once = pairs ? p1 - p0 : 1;
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
  const bool own = std::is_same_v<T, Sum<T>> ? outruns_library() && a.size(0) > kFewRows
                                             : in_tiles<T>();
  if (own && c.stride(1) == 1) {
    return add_own_product<T>(adjacent_features(a), w,
                              start.defined() ? adjacent_features(start) : start, c);
  }
  start.defined() ? at::addmm_out(c, start, a, w) : at::mm_out(c, a, w);
}

// Whether a weight gradient of so many numbers is the time loop's outer_sum.
template <class T>
bool worth_own_sums(int64_t numbers) {
  if (!std::is_same_v<T, Sum<T>>) return in_tiles<T>();
  return outruns_library() || numbers <= time_loop<T>().outer_sum_numbers;
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

// ------------------------------------------------------------------------------- 16-bit storage

// In rnn_layer_16bit.cpp, called by rnn_layer_cpu.cpp: the output of a forward, and the gradients
// that output_mask asks for, of tensors stored in bfloat16 or float16, in float32 arithmetic. There
// is at least one row.
void forward_16bit(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                   const Tensor& out);
Gradients backward_16bit(const Steps& steps, const OptionalTensor& grad_out,
                         const OptionalTensor& grad_h_n, const Tensor& input,
                         const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                         const Tensor& out, bool relu, std::array<bool, 5> output_mask);

}  // namespace rnnfast::cpu
