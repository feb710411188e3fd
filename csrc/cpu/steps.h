// Where the steps of a layer lie, how threads divide a walk over them, and the stretches of steps
// whose rows fit a buffer.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "tensors.h"
#include "time_loop.h"

namespace rnnfast::cpu {

template <class T>
int64_t panels_of(int64_t H) {
  const int64_t columns = time_loop<T>().panel_columns;
  return (H + columns - 1) / columns;
}

// In multiply-adds, 50 to 100 a nanosecond, that take as long: waking a thread, and so what each is given
// at least; a meeting of two; a byte fetched from another core; a number packed (notes/cpu.md, "Threads").
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
  return kInPairs<T> && has_tiles();
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
// less than to fetch what another has packed, and than to wake threads once more.
inline bool each_packs(int64_t weights, int64_t walks = 1) { return weights * walks <= 32768; }

// Where the steps lie, and the storage that a Walk points into.
struct Steps {
  Walk walk;
  int64_t rows = 0;  // over all steps
  std::vector<int64_t> first_row;

  Steps(const Steps&) = delete;
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

  // x[len(b) - 1, b] for every b, and x[0, b]: the first and last valid step of each sequence. The
  // features are adjacent.
  Tensor last(const Tensor& x) const {
    if (!packed()) return x.select(0, walk.seq_len - 1);
    const Tensor result = empty({walk.batch, x.size(1)}, x.scalar_type());
    copy_last(x, result);
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
  // step for the rest of the state; or not at all. `each` of them packs all that it reads, or not.
  template <class T>
  Sharing sharing(const Walk& part, int64_t K, int64_t H, bool each) const {
    const int64_t B = walk.live(part.begin), steps = part.end - part.begin;
    const int64_t live = (row(part.end) - row(part.begin) + steps - 1) / steps;  // on average
    const int64_t panels = panels_of<T>(H);
    const int64_t meeting = in_tiles<T>() ? kTileMeeting : kMeeting;
    const int64_t fetched = (in_tiles<T>() ? kTileFetchedByte : kFetchedByte) * int64_t(sizeof(T));
    const auto step = [&](int64_t rows) { return work_of_step<T>(rows, K, H); };
    const int64_t alone = steps * step(live);
    // The weights: packed in each walk, or fetched once for all. A thread alone would pack them too, which
    // leaves a margin: calls of 10 us lose more by threads that are far from each other than they gain by
    // near ones.
    const int64_t weights = each ? K * H * kPacking : K * H * fetched * steps / walk.seq_len;
    const auto best = [&](int64_t threads) {
      Sharing best;
      int64_t least = alone, rounds = 0;
      for (int64_t n = 2; n <= threads; ++n) {  // no more than it takes for the least time
        while (int64_t(1) << rounds < n) ++rounds;  // a meeting's, as if two of them met in each
        const int64_t by_rows = weights + steps * step((live + n - 1) / n);
        if (n <= B && kWorkPerThread + by_rows < least) {
          least = kWorkPerThread + by_rows;
          best = {.rows = n};
        }
        const int64_t most = (panels + n - 1) / n, of_others = live * H * fetched;
        const int64_t by_panels = steps * (step(live) * most / panels + meeting * rounds + of_others);
        if (n <= panels && kWorkPerThread + by_panels < least) {
          least = kWorkPerThread + by_panels;
          best = {.panels = n};
        }
      }
      return best;
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
    const int64_t stride = buffer.stride(0);
    return {data_of<T>(buffer) - first_row(range, before) * stride, steps_.walk.batch * stride,
            stride};
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

}  // namespace rnnfast::cpu
