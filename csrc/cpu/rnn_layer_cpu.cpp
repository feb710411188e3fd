// The CPU kernels of the ops in ../op.cpp. Time-parallel work (input projection, weight and input
// gradients) is one large product each and goes to the library, unless it is small; the recurrence
// goes to the time loop, shared out between ATen's threads, unless the rows are so few that the
// weights are not worth packing.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <vector>

#include "../op.h"
#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

using at::Tensor;

// A library call below must compute in the dtype of its operands, whatever autocast is on.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

// Multiply-adds. Below so many in all, a second thread costs more (about 4 us to wake) than it
// brings; below so many a step, meeting at its end (about 0.2 us) does.
constexpr int64_t kWorkPerThread = 200'000, kWorkPerMeeting = 16'000;
// Fewer rows than these reuse a loaded weight too little.
constexpr int64_t kRowsPerThread = 4;

// Where the steps lie, and the storage that a Walk points into.
struct Steps {
  Walk walk;
  int64_t rows = 0;  // over all steps
  std::vector<int64_t> first_row;
  Tensor batch_sizes;

  Steps(const Tensor& input, const std::optional<Tensor>& sizes, bool reverse) {
    walk.reverse = reverse;
    if (!sizes) {
      walk.seq_len = input.size(0);
      walk.batch = input.size(1);
      rows = walk.seq_len * walk.batch;
      return;
    }
    batch_sizes = sizes->contiguous();
    walk.seq_len = batch_sizes.numel();
    walk.batch_sizes = batch_sizes.const_data_ptr<int64_t>();
    walk.batch = walk.batch_sizes[0];
    first_row.reserve(walk.seq_len);
    for (int64_t t = 0; t < walk.seq_len; ++t) {
      first_row.push_back(rows);
      rows += walk.batch_sizes[t];
    }
    walk.first_row = first_row.data();
  }

  bool packed() const { return walk.first_row != nullptr; }

  // The rows of a [T, B, F] or packed [rows, F] tensor, whose features are adjacent.
  template <class T, class Scalar = std::remove_const_t<T>>
  Rows<T> rows_of(const Tensor& x) const {
    T* data;
    if constexpr (std::is_const_v<T>) {
      data = x.const_data_ptr<Scalar>();
    } else {
      data = x.mutable_data_ptr<Scalar>();
    }
    return packed() ? Rows<T>{data, 0, x.stride(0)} : Rows<T>{data, x.stride(0), x.stride(1)};
  }

  // x[len(b) - 1, b] for every b, and x[0, b]: the first and last valid step of each sequence.
  Tensor last(const Tensor& x) const {
    if (!packed()) return x.select(0, walk.seq_len - 1);
    const Tensor rows = x.contiguous();
    Tensor result = at::empty({walk.batch, rows.size(1)}, rows.options());
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

  // Calls f(at, before, n): the n rows from `at` on are those that the forward visits one step
  // after the n rows from `before` on. Runs of steps of equal size are one call.
  template <class F>
  void for_each_shift(const F& f) const {
    const int64_t T = walk.seq_len;
    for (int64_t t = 1; t < T;) {
      int64_t end = t + 1;
      while (end < T && walk.live(end) == walk.live(t)) ++end;
      const int64_t late = packed() ? first_row[t] : t * walk.batch;
      const int64_t early = packed() ? first_row[t - 1] : late - walk.batch;
      // Step t pairs with the first live(t) rows of step t - 1. The later steps of the run follow
      // on without a gap only where step t - 1 has the run's size as well.
      const int64_t n = walk.live(t);
      const int64_t steps = walk.live(t - 1) == n ? end - t : 1;
      walk.reverse ? f(early, late, n * steps) : f(late, early, n * steps);
      t += steps;
    }
  }

  // Runs loop(share) over all rows and panels, divided so that every thread has as much to do: by
  // rows, which then never meet; where the rows are too few to fill a register block in every
  // thread, by panels of hidden units, the threads meeting after each step.
  template <class F>
  void parallel(int64_t work_per_row, int64_t panels, const F& loop) const {
    const int64_t B = walk.batch;
    Share all{.b0 = 0, .b1 = B, .p0 = 0, .p1 = panels};
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t parts = std::min(threads, std::max<int64_t>(rows * work_per_row / kWorkPerThread, 1));
    const int64_t meeting = std::min({parts, panels, B * work_per_row / kWorkPerMeeting});
    if (parts > 1 && B < kRowsPerThread * parts && meeting > 1) {
      Barrier barrier(meeting);
      at::parallel_for(0, meeting, 1, [&](int64_t begin, int64_t end) {
        Share share = all;
        share.p0 = panels * begin / meeting;
        share.p1 = panels * end / meeting;
        share.barrier = &barrier;
        share.parties = end - begin;  // more than one where fewer threads came than were asked for
        loop(share);
      });
      return;
    }
    if (parts <= 1 || B <= 1) {
      loop(all);
      return;
    }
    const int64_t ranges = std::min(parts, B);
    std::vector<int64_t> bounds(ranges + 1, B);
    bounds[0] = 0;
    if (!packed()) {
      for (int64_t i = 1; i < ranges; ++i) bounds[i] = B * i / ranges;
    } else {
      int64_t length = walk.seq_len, before = 0, range = 1;
      for (int64_t b = 0; b < B && range < ranges; ++b) {
        while (walk.batch_sizes[length - 1] <= b) --length;
        before += length;
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

Tensor adjacent_features(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

template <class T>
int64_t panels_of(int64_t H) {
  const int64_t columns = time_loop<T>().panel_columns;
  return (H + columns - 1) / columns;
}

// Packs w^T (transposed) or w into the time loop's panels, shared out where there are many.
template <class T>
const T* pack_into(T*& space, const Tensor& w, bool transposed) {
  const TimeLoop<T>& loop = time_loop<T>();
  T* packed = space;
  const int64_t K = w.size(transposed ? 1 : 0), N = w.size(transposed ? 0 : 1);
  const int64_t stride_k = w.stride(transposed ? 1 : 0), stride_n = w.stride(transposed ? 0 : 1);
  const T* weights = w.const_data_ptr<T>();
  constexpr int64_t kWeightsPerThread = 16384;  // 10 us of packing
  at::parallel_for(
      0, panels_of<T>(N), kWeightsPerThread / (K * loop.panel_columns) + 1,
      [&](int64_t begin, int64_t end) {
        const int64_t n0 = begin * loop.panel_columns, n1 = std::min(end * loop.panel_columns, N);
        loop.pack(weights + n0 * stride_n, stride_k, stride_n, K, n1 - n0, packed + K * n0);
      });
  space += loop.packed_size(K, N);
  return packed;
}

// b_ih + b_hh, each optional, padded to whole vectors: a packed [1, H].
template <class T>
const T* pack_bias_into(T*& space, const std::optional<Tensor>& b_ih,
                        const std::optional<Tensor>& b_hh, int64_t H) {
  T* packed = space;
  space += time_loop<T>().packed_size(1, H);
  std::fill(packed, space, T(0));
  for (const auto& bias : {b_ih, b_hh}) {
    if (!bias) continue;
    const T* b = bias->template const_data_ptr<T>();
    for (int64_t n = 0; n < H; ++n) packed[n] += b[n * bias->stride(0)];
  }
  return packed;
}

// Uninitialised memory for packed weights: small ones stay on the stack.
template <class T>
class Space {
 public:
  explicit Space(int64_t size) {
    if (size <= kSmall) return;
    large_ = c10::GetCPUAllocator()->allocate(size * sizeof(T));
  }
  T* data() { return large_ ? static_cast<T*>(large_.get()) : small_; }

 private:
  static constexpr int64_t kSmall = (8 << 10) / sizeof(T);
  alignas(64) T small_[kSmall];
  c10::DataPtr large_;
};

// Whether the rows are too few for packing the weights to pay. Measured break-even (AVX2, I = H, B
// from 1 to 64): 12 rows at H = 16 to 64, 23 at 128, 42 at 256, 60 at 512, 55 at 1024; with a single
// step, as in a cell, which has less of a loop to gain: 16, 24, 50, 80, 110 at H = 16, 64, ..., 512.
bool worth_no_packing(const Steps& steps, int64_t H) {
  return steps.rows <= (steps.walk.seq_len == 1 ? std::min<int64_t>(10 + 5 * H / 16, 100)
                                                : std::min<int64_t>(10 + H / 8, 56));
}

// Whether the projection belongs into the walk over the steps: where a block's rows share each
// weight that is loaded, and where a call of the library (4 us) costs more than it saves. Else one
// product over all steps is the better use of the weights.
bool worth_fusing(const Steps& steps, int64_t I, int64_t H) {
  return I <= 8 || (I <= 256 && steps.walk.batch >= 8) || steps.rows * I * H < 250'000;
}

// out = x W_ih^T + bias, for all steps at once.
void project(const Tensor& input, const Tensor& w_ih, const std::optional<Tensor>& b_ih,
             const std::optional<Tensor>& b_hh, Tensor out) {
  if (b_ih || b_hh) {
    const Tensor bias = b_ih && b_hh ? at::add(*b_ih, *b_hh) : b_ih ? *b_ih : *b_hh;
    at::addmm_out(out, bias, flat(input), w_ih.t());
  } else {
    at::mm_out(out, flat(input), w_ih.t());
  }
}

// z += x w^T, for some rows. Strides of the features are 1.
template <class T>
void add_linear(Rows<const T> x, const Tensor& w, int64_t batch, Rows<T> z) {
  const Linear<T> f = {batch, w.size(1), x.data, x.stride_b, w.const_data_ptr<T>(), w.stride(0),
                       z.data, z.stride_b};
  const int64_t work = batch * f.K;
  at::parallel_for(0, w.size(0), std::max<int64_t>(kWorkPerThread / (work + 1), 1),
                   [&](int64_t n0, int64_t n1) { time_loop<T>().linear(f, n0, n1); });
}

// Step by step, the weights as they lie.
template <class T>
void forward_by_steps(const Steps& steps, const Tensor& input, const std::optional<Tensor>& hx,
                      const Tensor& w_ih_, const Tensor& w_hh_, const std::optional<Tensor>& b_ih,
                      const std::optional<Tensor>& b_hh, bool relu, const Tensor& out) {
  const int64_t H = w_hh_.size(0);
  const Walk& walk = steps.walk;
  const Tensor x = adjacent_features(input), w_ih = adjacent_features(w_ih_),
               w_hh = adjacent_features(w_hh_);
  const Tensor h0 = hx ? adjacent_features(*hx) : Tensor();
  const auto x_rows = steps.rows_of<const T>(x);
  const auto out_rows = steps.rows_of<T>(out);
  // One product over all steps, unless it would cost less than its call.
  const bool projected = walk.seq_len > 1 && !worth_fusing(steps, w_ih.size(1), H);
  if (projected) project(input, w_ih, b_ih, b_hh, flat(out));
  Space<T> bias(time_loop<T>().packed_size(1, H));
  T* end = bias.data();
  pack_bias_into(end, b_ih, b_hh, H);

  int64_t t_last = 0, visited = 0;
  for (int64_t s = 0; s < walk.seq_len; ++s) {
    const int64_t t = walk.reverse ? walk.seq_len - 1 - s : s, live = walk.live(t);
    const auto at = [&](const auto& rows, int64_t t, int64_t b) {
      auto from = rows;
      from.data = walk.row(rows, t, b);
      return from;
    };
    if (!projected) {
      for (int64_t b = 0; b < live; ++b) {
        std::memcpy(walk.row(out_rows, t, b), bias.data(), H * sizeof(T));
      }
      add_linear<T>(at(x_rows, t, 0), w_ih, live, at(out_rows, t, 0));
    }
    const int64_t carried = std::min(visited, live);
    if (carried > 0) {
      const auto h = at(out_rows, t_last, 0);
      add_linear<T>({h.data, 0, h.stride_b}, w_hh, carried, at(out_rows, t, 0));
    }
    if (carried < live && hx) {
      add_linear<T>({h0.const_data_ptr<T>() + carried * h0.stride(0), 0, h0.stride(0)}, w_hh,
                    live - carried, at(out_rows, t, carried));
    }
    const bool adjacent = out_rows.stride_b == H;
    for (int64_t b = 0; b < (adjacent ? 1 : live); ++b) {
      time_loop<T>().activate(walk.row(out_rows, t, b), adjacent ? live * H : H, relu);
    }
    visited = live;
    t_last = t;
  }
}

// The same question for the backward, whose few products go to the library: 4 us a call, and slower
// ones with so few rows. A single step has none.
bool worth_steps_of_library(const Steps& steps, int64_t H) {
  const int64_t T = steps.walk.seq_len;
  return !steps.packed() && (T == 1 || (steps.rows <= 24 && 0.65 * H * H > 4000.0 * (T - 1)));
}

Tensor backward_by_steps(const Steps& steps, const std::optional<Tensor>& grad_out,
                         const std::optional<Tensor>& grad_h_n, const Tensor& w_hh,
                         const Tensor& out, bool relu) {
  const int64_t T = steps.walk.seq_len;
  const auto slope = [&](Tensor to, const Tensor& dh, const Tensor& h) {
    relu ? at::threshold_backward_out(to, dh, h, 0) : at::tanh_backward_out(to, dh, h);
  };
  const auto last = [&](const Tensor& x, int64_t s) {
    return x.select(0, steps.walk.reverse ? s : T - 1 - s);
  };
  Tensor dz = at::empty(out.sizes(), out.options());
  std::optional<Tensor> dh = grad_h_n;
  for (int64_t s = 0; s < T; ++s) {
    if (grad_out) dh = dh ? at::add(*dh, last(*grad_out, s)) : last(*grad_out, s);
    Tensor z = last(dz, s);
    slope(z, *dh, last(out, s));
    if (s + 1 < T) dh = at::mm(z, w_hh);
  }
  return dz;
}

template <class T>
void forward_loop(const Steps& steps, const Tensor& input, const std::optional<Tensor>& hx,
                  const Tensor& w_ih, const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                  const std::optional<Tensor>& b_hh, bool relu, const Tensor& out) {
  const int64_t I = w_ih.size(1), H = w_hh.size(0);
  const auto& loop = time_loop<T>();
  Forward<T> f;
  f.walk = steps.walk;
  f.hidden_size = H;
  f.relu = relu;
  f.out = steps.rows_of<T>(out);

  const bool fused = worth_fusing(steps, I, H);
  Tensor x;
  const int64_t sizes = loop.packed_size(H, H) +
      (fused ? loop.packed_size(I, H) + loop.packed_size(1, H) : 0);
  Space<T> packed(sizes);
  T* space = packed.data();
  f.w_hh = pack_into(space, w_hh, true);
  if (fused) {
    x = adjacent_features(input);
    f.input_size = I;
    f.x = steps.rows_of<const T>(x);
    f.w_ih = pack_into(space, w_ih, true);
    if (b_ih || b_hh) f.bias = pack_bias_into(space, b_ih, b_hh, H);
  } else {
    project(input, w_ih, b_ih, b_hh, flat(out));
  }
  Tensor h0;
  if (hx) {
    h0 = adjacent_features(*hx);
    f.h0 = Rows<const T>{h0.const_data_ptr<T>(), 0, h0.stride(0)};
  }
  steps.parallel(H * (H + f.input_size + 16), panels_of<T>(H),
                 [&](const Share& share) { loop.forward(f, share); });
}

template <class T>
Tensor backward_loop(const Steps& steps, const std::optional<Tensor>& grad_out,
                     const std::optional<Tensor>& grad_h_n, const Tensor& w_hh, const Tensor& out,
                     bool relu) {
  const int64_t H = w_hh.size(0);
  const auto& loop = time_loop<T>();
  Tensor dz = at::empty(out.sizes(), out.options());
  Backward<T> f;
  f.walk = steps.walk;
  f.hidden_size = H;
  f.relu = relu;
  const Tensor h = adjacent_features(out);
  f.out = steps.rows_of<const T>(h);
  f.dz = steps.rows_of<T>(dz);
  Tensor g_out, g_h_n;
  if (grad_out) {
    g_out = adjacent_features(*grad_out);
    f.grad_out = steps.rows_of<const T>(g_out);
  }
  if (grad_h_n) {
    g_h_n = adjacent_features(*grad_h_n);
    f.grad_h_n = Rows<const T>{g_h_n.const_data_ptr<T>(), 0, g_h_n.stride(0)};
  }
  Space<T> packed(loop.packed_size(H, H));
  T* space = packed.data();
  f.w_hh = pack_into(space, w_hh, false);
  steps.parallel(H * (H + 16), panels_of<T>(H),
                 [&](const Share& share) { loop.backward(f, share); });
  return dz;
}

// ------------------------------------------------------------------------------ weight gradients

// Their sums over all rows. On Zen 3 (AVX2, one thread, GFLOP/s of [H, rows] x [rows, I]), our own
// blocks do 88 and the library 75 at H = I = 64, 78 and 79 at 100, 60 and 78 at 128; and below 32,
// where calls count, twice the library's.
constexpr int64_t kOwnOuterSum = 96 * 96;

// The wanted ones of d_w_ih = sum dz x^T, d_w_hh = sum dz h_before^T, d_b = sum dz.
template <class T>
void small_weight_gradients(const Steps& steps, const Tensor& dz, const Tensor& input,
                            const std::optional<Tensor>& hx, const Tensor& out, Tensor& d_w_ih,
                            Tensor& d_w_hh, Tensor& d_b, int64_t I, int64_t H) {
  const auto& loop = time_loop<T>();
  const T* z = dz.const_data_ptr<T>();
  const Tensor x = d_w_ih.defined() ? adjacent_features(flat(input)) : Tensor();
  const Tensor h = d_w_hh.defined() ? adjacent_features(flat(out)) : Tensor();
  Tensor z_first, h0;
  if (d_w_hh.defined() && hx) {
    z_first = steps.walk.reverse ? steps.last(dz) : steps.first(dz);
    h0 = adjacent_features(*hx);
  }
  // Threads take rows of the gradients, so that no sum depends on how many there are.
  constexpr int64_t kBlock = 24;
  const int64_t work = steps.rows * H * (I + H), blocks = (H + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(blocks * kWorkPerThread / (work + 1), 1);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t m0 = begin * kBlock, m1 = std::min(end * kBlock, H);
    OuterSum<T> f;
    f.lda = H;
    if (d_w_ih.defined()) {
      f.rows = steps.rows;
      f.N = f.ldc = I;
      f.a = z;
      f.b = x.const_data_ptr<T>();
      f.ldb = x.stride(0);
      f.c = d_w_ih.mutable_data_ptr<T>();
      f.column_sums = d_b.defined() ? d_b.mutable_data_ptr<T>() : nullptr;
      loop.outer_sum(f, m0, m1);
      f.column_sums = nullptr;
    }
    if (!d_w_hh.defined()) return;
    f.N = f.ldc = H;
    f.c = d_w_hh.mutable_data_ptr<T>();
    if (hx) {
      f.rows = steps.walk.batch;
      f.a = z_first.const_data_ptr<T>();
      f.lda = z_first.stride(0);
      f.b = h0.const_data_ptr<T>();
      f.ldb = h0.stride(0);
      loop.outer_sum(f, m0, m1);
      f.lda = H;
    }
    f.ldb = h.stride(0);
    steps.for_each_shift([&](int64_t at, int64_t before, int64_t n) {
      f.rows = n;
      f.a = z + at * H;
      f.b = h.const_data_ptr<T>() + before * f.ldb;
      loop.outer_sum(f, m0, m1);
    });
  });
}

// d_w_hh by the library.
Tensor large_w_hh_gradient(const Steps& steps, const Tensor& dz, const std::optional<Tensor>& hx,
                           const Tensor& out, const Tensor& w_hh) {
  Tensor sum;
  const auto add = [&](const Tensor& z, const Tensor& h) {
    sum.defined() ? (void)sum.addmm_(z.t(), h) : (void)(sum = at::mm(z.t(), h));
  };
  if (hx) add(steps.walk.reverse ? steps.last(dz) : steps.first(dz), *hx);
  const Tensor z = flat(dz), h = flat(out);
  if (!steps.packed()) {
    steps.for_each_shift([&](int64_t at, int64_t before, int64_t n) {
      add(z.narrow(0, at, n), h.narrow(0, before, n));
    });
  } else {
    // The runs are short, and each would read and write the whole sum: gathered, they are one. The
    // rows after the first step are all of them, in order; those before are each step's first.
    const Tensor& gathered = steps.walk.reverse ? z : h;
    std::vector<Tensor> before;
    for (int64_t t = 1; t < steps.walk.seq_len; ++t) {
      before.push_back(gathered.narrow(0, steps.first_row[t - 1], steps.walk.batch_sizes[t]));
    }
    if (!before.empty()) {
      const int64_t B = steps.walk.batch, rest = steps.rows - B;
      const Tensor prefixes = at::cat(before);
      steps.walk.reverse ? add(prefixes, h.narrow(0, B, rest)) : add(z.narrow(0, B, rest), prefixes);
    }
  }
  return sum.defined() ? sum : at::zeros_like(w_hh, at::MemoryFormat::Contiguous);
}

bool is_reduced(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

void check_dtype(const Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble || is_reduced(input),
      "rnnfast: the CPU kernel takes float32, float64, bfloat16 and float16, got ",
      input.scalar_type());
}

using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs rnn_layer(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                  const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                  c10::string_view, bool);
Gradients rnn_layer_backward(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                             const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                             const OptionalTensor&, c10::string_view, bool, std::array<bool, 5>);

// ------------------------------------------------------------------------------- 16-bit storage
//
// bfloat16 and float16 are storage: the arithmetic, and the state from step to step, are float32.
// The steps are taken in stretches, each widened when its turn comes, so that no tensor ever has a
// whole float32 copy. A stretch has rows enough for packing the weights again not to matter.

constexpr int64_t kStretchRows = 512;

struct Stretch {
  int64_t begin, end;      // steps
  int64_t row, rows;       // of a packed tensor
  int64_t live;            // rows of step `begin`
};

// In the order of the forward, or against it.
std::vector<Stretch> stretches_of(const Steps& steps, bool backward) {
  std::vector<Stretch> found;
  const int64_t T = steps.walk.seq_len;
  for (int64_t t = 0, row = 0; t < T;) {
    Stretch s{t, t, row, 0, steps.walk.live(t)};
    while (s.end < T && s.rows < kStretchRows) s.rows += steps.walk.live(s.end++);
    found.push_back(s);
    t = s.end;
    row += s.rows;
  }
  if (steps.walk.reverse != backward) std::reverse(found.begin(), found.end());
  return found;
}

OptionalTensor widened(const OptionalTensor& x) {
  return x ? OptionalTensor(x->to(at::kFloat)) : std::nullopt;
}

struct Narrowing {
  const Steps& steps;
  const OptionalTensor& batch_sizes;

  // The stretch's steps of a [T, B, F] or packed [rows, F] tensor.
  Tensor part(const Tensor& x, const Stretch& s) const {
    return steps.packed() ? x.narrow(0, s.row, s.rows) : x.narrow(0, s.begin, s.end - s.begin);
  }
  OptionalTensor part(const OptionalTensor& x, const Stretch& s) const {
    return x ? OptionalTensor(part(*x, s).to(at::kFloat)) : std::nullopt;
  }
  OptionalTensor sizes(const Stretch& s) const {
    return batch_sizes ? OptionalTensor(batch_sizes->narrow(0, s.begin, s.end - s.begin))
                       : std::nullopt;
  }

  // The state in which the forward came to the stretch.
  OptionalTensor state_before(const Stretch& s, const OptionalTensor& hx, const Tensor& out) const {
    const int64_t t = steps.walk.reverse ? s.end : s.begin - 1;
    if (t < 0 || t >= steps.walk.seq_len) return hx ? widened(hx->narrow(0, 0, s.live)) : hx;
    const int64_t carried = std::min(steps.walk.live(t), s.live);
    const Tensor h = steps.packed() ? out.narrow(0, steps.first_row[t], carried)
                                    : out.select(0, t).narrow(0, 0, carried);
    if (carried == s.live) return widened(h);
    Tensor state = at::zeros({s.live, out.size(-1)}, out.options().dtype(at::kFloat));
    if (hx) state.copy_(hx->narrow(0, 0, s.live));
    state.narrow(0, 0, carried).copy_(h);
    return state;
  }
};

void narrow_forward(const Tensor& out, const Tensor& last, const Steps& steps, const Tensor& input,
                    const Direction& x, c10::string_view nonlinearity) {
  const auto& [hx, w_ih, w_hh, b_ih, b_hh, reverse] = x;
  const OptionalTensor batch_sizes = steps.packed() ? OptionalTensor(steps.batch_sizes) : std::nullopt;
  const Narrowing narrow{steps, batch_sizes};
  const Tensor w_ih_ = w_ih.to(at::kFloat), w_hh_ = w_hh.to(at::kFloat);
  const OptionalTensor b_ih_ = widened(b_ih), b_hh_ = widened(b_hh);
  Tensor state = hx ? hx->to(at::kFloat)
                    : at::zeros({steps.walk.batch, w_hh.size(0)}, w_hh_.options());
  for (const Stretch& s : stretches_of(steps, /*backward=*/false)) {
    Tensor h = state.narrow(0, 0, s.live);
    const auto [o, h_n] = rnn_layer(narrow.part(input, s).to(at::kFloat), h, w_ih_, w_hh_, b_ih_,
                                    b_hh_, narrow.sizes(s), nonlinearity, reverse);
    narrow.part(out, s).copy_(o);
    h.copy_(h_n);
  }
  last.copy_(state);
}

Gradients narrow_rnn_layer_backward(const Steps& steps, const OptionalTensor& grad_out,
                                    const OptionalTensor& grad_h_n, const Tensor& input,
                                    const OptionalTensor& hx, const Tensor& w_ih,
                                    const Tensor& w_hh, const Tensor& out,
                                    const OptionalTensor& batch_sizes,
                                    c10::string_view nonlinearity, bool reverse,
                                    std::array<bool, 5> output_mask) {
  const Narrowing narrow{steps, batch_sizes};
  const Tensor w_ih_ = w_ih.to(at::kFloat), w_hh_ = w_hh.to(at::kFloat);
  Tensor d_x = output_mask[0] ? at::empty(input.sizes(), input.options()) : Tensor();
  // Of the state behind each sequence's last step so far, the gradient of h_n to begin with.
  Tensor d_h = at::zeros({steps.walk.batch, w_hh.size(0)}, w_hh_.options());
  if (grad_h_n) d_h.copy_(*grad_h_n);
  std::array<Tensor, 3> sums;  // d_w_ih, d_w_hh, d_b
  for (const Stretch& s : stretches_of(steps, /*backward=*/true)) {
    const OptionalTensor before = narrow.state_before(s, hx, out);
    Tensor d_state = d_h.narrow(0, 0, s.live);
    const auto [d_x_s, d_h_s, d_w_ih, d_w_hh, d_b] = rnn_layer_backward(
        narrow.part(grad_out, s), d_state, narrow.part(input, s).to(at::kFloat), before, w_ih_,
        w_hh_, narrow.part(out, s).to(at::kFloat), narrow.sizes(s), nonlinearity, reverse,
        {output_mask[0], true, output_mask[2], output_mask[3], output_mask[4]});
    if (d_x.defined()) narrow.part(d_x, s).copy_(d_x_s);
    if (before) d_state.copy_(d_h_s);
    const std::array<Tensor, 3> terms = {d_w_ih, d_w_hh, d_b};
    for (size_t i = 0; i < terms.size(); ++i) {
      if (!terms[i].defined()) continue;
      if (sums[i].defined()) {
        sums[i].add_(terms[i]);
      } else {
        sums[i] = terms[i];
      }
    }
  }
  const auto narrowed = [&](const Tensor& x) {
    return x.defined() ? x.to(input.scalar_type()) : x;
  };
  return {d_x, hx && output_mask[1] ? narrowed(d_h) : Tensor(), narrowed(sums[0]),
          narrowed(sums[1]), narrowed(sums[2])};
}

// --------------------------------------------------------------------------------------- the ops

// One direction, into the rows of `out`, which may lie apart, and a contiguous h_n.
void forward_into(const Tensor& out, const Tensor& h_n, const Steps& steps, const Tensor& input,
                  const Direction& x, c10::string_view nonlinearity) {
  if (steps.rows == 0) return;
  if (is_reduced(input)) return narrow_forward(out, h_n, steps, input, x, nonlinearity);
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer", [&] {
    const auto run = worth_no_packing(steps, x.w_hh.size(0)) ? forward_by_steps<scalar_t>
                                                             : forward_loop<scalar_t>;
    run(steps, input, x.hx, x.w_ih, x.w_hh, x.b_ih, x.b_hh, nonlinearity == "relu", out);
  });
  x.reverse ? steps.copy_first(out, h_n) : steps.copy_last(out, h_n);
}

// [T, B, features] or packed [rows, features].
Tensor empty_rows(const Tensor& input, int64_t features) {
  at::DimVector sizes(input.sizes());
  sizes.back() = features;
  return at::empty(sizes, input.options());
}

Outputs rnn_layer(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                  const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                  const OptionalTensor& batch_sizes, c10::string_view nonlinearity, bool reverse) {
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity);
  check_dtype(input);
  const Steps steps(input, batch_sizes, reverse);
  const int64_t H = w_hh.size(0);
  Tensor out = empty_rows(input, H);
  Tensor h_n = at::empty({steps.walk.batch, H}, input.options());
  forward_into(out, h_n, steps, input, {hx, w_ih, w_hh, b_ih, b_hh, reverse}, nonlinearity);
  return {out, h_n};
}

// Each direction writes its half of the rows of one tensor.
Outputs rnn_bidirectional_layer(const Tensor& input, const OptionalTensor& hx,
                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                c10::string_view nonlinearity) {
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  Tensor out, h_n;
  for (int64_t d = 0; d < 2; ++d) {
    const Direction x = direction_of(d, hx, weights);
    check_layer(input, x.hx, x.w_ih, x.w_hh, x.b_ih, x.b_hh, batch_sizes, nonlinearity);
    check_dtype(input);
    const Steps steps(input, batch_sizes, x.reverse);
    const int64_t H = x.w_hh.size(0);
    if (d == 0) {
      out = empty_rows(input, 2 * H);
      h_n = at::empty({2, steps.walk.batch, H}, input.options());
    }
    forward_into(out.narrow(-1, d * H, H), h_n.select(0, d), steps, input, x, nonlinearity);
  }
  return {out, h_n};
}

Gradients rnn_layer_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                             const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                             const Tensor& w_hh, const Tensor& out,
                             const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                             bool reverse, std::array<bool, 5> output_mask) {
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_layer(input, hx, w_ih, w_hh, {}, {}, batch_sizes, nonlinearity);
  check_layer_grads(grad_out, grad_h_n, input, w_hh, out, batch_sizes);
  check_dtype(input);
  const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
  const Steps steps(input, batch_sizes, reverse);
  const int64_t I = w_ih.size(1), H = w_hh.size(0);
  if (steps.rows == 0) {
    const auto zeros = [&](bool need, at::IntArrayRef size) {
      return need ? at::zeros(size, input.options()) : Tensor();
    };
    return {zeros(need_x, input.sizes()), zeros(need_h, {0, H}), zeros(need_w_ih, {H, I}),
            zeros(need_w_hh, {H, H}), zeros(need_b, {H})};
  }

  if (is_reduced(input)) {
    return narrow_rnn_layer_backward(steps, grad_out, grad_h_n, input, hx, w_ih, w_hh, out,
                                     batch_sizes, nonlinearity, reverse, output_mask);
  }
  const bool relu = nonlinearity == "relu";
  Tensor dz;
  if (worth_steps_of_library(steps, H) && (grad_out || grad_h_n)) {
    dz = backward_by_steps(steps, grad_out, grad_h_n, w_hh, out, relu);
  } else {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer_backward", [&] {
      dz = backward_loop<scalar_t>(steps, grad_out, grad_h_n, w_hh, out, relu);
    });
  }

  Tensor d_x, d_h, d_w_ih, d_w_hh, d_b;
  if (need_x) d_x = at::mm(flat(dz), w_ih).view(input.sizes());
  if (hx && need_h) d_h = at::mm(reverse ? steps.last(dz) : steps.first(dz), w_hh);
  if (H * std::max(I, H) <= kOwnOuterSum) {
    if (need_w_ih) d_w_ih = at::zeros({H, I}, dz.options());
    if (need_w_hh) d_w_hh = at::zeros({H, H}, dz.options());
    if (need_b) d_b = need_w_ih ? at::zeros({H}, dz.options()) : flat(dz).sum(0);
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer_backward", [&] {
      Tensor d_b_here = need_w_ih ? d_b : Tensor();
      small_weight_gradients<scalar_t>(steps, dz, input, hx, out, d_w_ih, d_w_hh, d_b_here, I, H);
    });
  } else {
    if (need_w_ih) d_w_ih = at::mm(flat(dz).t(), flat(input));
    if (need_b) d_b = flat(dz).sum(0);
    if (need_w_hh) d_w_hh = large_w_hh_gradient(steps, dz, hx, out, w_hh);
  }
  return {d_x, d_h, d_w_ih, d_w_hh, d_b};
}

// tanh as the time loop computes it, for its accuracy to be measured.
Tensor tanh(const Tensor& x) {
  Tensor y = x.clone(at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rnnfast::_tanh", [&] {
    time_loop<scalar_t>().activate(y.mutable_data_ptr<scalar_t>(), y.numel(), false);
  });
  return y;
}

}  // namespace
}  // namespace rnnfast::cpu

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("rnn_layer", &rnnfast::cpu::rnn_layer);
  m.impl("rnn_bidirectional_layer", &rnnfast::cpu::rnn_bidirectional_layer);
  m.impl("rnn_layer_backward", &rnnfast::cpu::rnn_layer_backward);
  m.impl("_tanh", &rnnfast::cpu::tanh);
}
