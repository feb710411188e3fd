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

  Steps(const Tensor& input, const OptionalTensor& sizes, bool reverse) {
    walk.reverse = reverse;
    if (!sizes) {
      walk.seq_len = walk.end = input.size(0);
      walk.batch = input.size(1);
      rows = walk.seq_len * walk.batch;
      return;
    }
    batch_sizes = sizes->contiguous();
    walk.seq_len = walk.end = batch_sizes.numel();
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

  // Rows that precede step t <= seq_len.
  int64_t row(int64_t t) const {
    return !packed() ? t * walk.batch : t < walk.seq_len ? first_row[t] : rows;
  }

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

  // Runs loop(share) over all rows and panels of a walk, divided so that every thread has as much to do: by
  // rows, which then never meet; where the rows are too few to fill a register block in every
  // thread, by panels of hidden units, the threads meeting after each step.
  template <class F>
  void parallel(const Walk& part, int64_t work_per_row, int64_t panels, const F& loop) const {
    const int64_t B = walk.live(part.begin), rows = row(part.end) - row(part.begin);
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

Tensor adjacent_features(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

template <class T>
int64_t panels_of(int64_t H) {
  const int64_t columns = time_loop<T>().panel_columns;
  return (H + columns - 1) / columns;
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

template <class Stored>
void widen(const Stored* from, int64_t stride, int64_t n, float* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * stride]);
  }
}

// Packs w^T (transposed) or w, of type Stored, into the time loop's panels, shared out where there
// are many.
template <class T, class Stored = T>
const T* pack_into(T*& space, const Tensor& w, bool transposed) {
  const TimeLoop<T>& loop = time_loop<T>();
  T* packed = space;
  const int64_t K = w.size(transposed ? 1 : 0), N = w.size(transposed ? 0 : 1);
  const int64_t stride_k = w.stride(transposed ? 1 : 0), stride_n = w.stride(transposed ? 0 : 1);
  const Stored* weights = w.const_data_ptr<Stored>();
  constexpr int64_t kWeightsPerThread = 16384;  // 10 us of packing
  at::parallel_for(
      0, panels_of<T>(N), kWeightsPerThread / (K * loop.panel_columns) + 1,
      [&](int64_t begin, int64_t end) {
        int64_t n0 = begin * loop.panel_columns;
        const int64_t n1 = std::min(end * loop.panel_columns, N);
        if constexpr (std::is_same_v<T, Stored>) {
          loop.pack(weights + n0 * stride_n, stride_k, stride_n, K, n1 - n0, packed + K * n0);
        } else {
          Space<T> wide(K * loop.panel_columns);  // a panel, in the order of the weights
          for (; n0 < n1; n0 += loop.panel_columns) {
            const int64_t columns = std::min(loop.panel_columns, n1 - n0);
            const Stored* from = weights + n0 * stride_n;
            const bool by_k = stride_k > stride_n;
            const int64_t outer = by_k ? K : columns, inner = by_k ? columns : K;
            const int64_t outer_stride = by_k ? stride_k : stride_n;
            const int64_t inner_stride = by_k ? stride_n : stride_k;
            for (int64_t i = 0; i < outer; ++i) {
              widen(from + i * outer_stride, inner_stride, inner, wide.data() + i * inner);
            }
            loop.pack(wide.data(), by_k ? columns : 1, by_k ? 1 : K, K, columns, packed + K * n0);
          }
        }
      });
  space += loop.packed_size(K, N);
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
void project(const Tensor& input, const Direction& layer, Tensor out) {
  const OptionalTensor &b_ih = layer.b_ih, &b_hh = layer.b_hh;
  if (b_ih || b_hh) {
    const Tensor bias = b_ih && b_hh ? at::add(*b_ih, *b_hh) : b_ih ? *b_ih : *b_hh;
    at::addmm_out(out, bias, flat(input), layer.w_ih.t());
  } else {
    at::mm_out(out, flat(input), layer.w_ih.t());
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
void forward_by_steps(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                      const Tensor& out) {
  const int64_t H = layer.w_hh.size(0);
  const Walk& walk = steps.walk;
  const Tensor x = adjacent_features(input);
  const Tensor w_ih = adjacent_features(layer.w_ih), w_hh = adjacent_features(layer.w_hh);
  const Tensor h0 = layer.hx ? adjacent_features(*layer.hx) : Tensor();
  const auto x_rows = steps.rows_of<const T>(x);
  const auto out_rows = steps.rows_of<T>(out);
  // One product over all steps, unless it would cost less than its call.
  const bool projected = walk.seq_len > 1 && !worth_fusing(steps, w_ih.size(1), H);
  if (projected) project(input, layer, flat(out));
  Space<T> bias(time_loop<T>().packed_size(1, H));
  T* end = bias.data();
  pack_bias_into(end, layer);

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
    if (carried < live && h0.defined()) {
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

Tensor backward_by_steps(const Steps& steps, const OptionalTensor& grad_out,
                         const OptionalTensor& grad_h_n, const Tensor& w_hh, const Tensor& out,
                         bool relu) {
  const int64_t T = steps.walk.seq_len;
  const auto slope = [&](Tensor to, const Tensor& dh, const Tensor& h) {
    relu ? at::threshold_backward_out(to, dh, h, 0) : at::tanh_backward_out(to, dh, h);
  };
  const auto last = [&](const Tensor& x, int64_t s) {
    return x.select(0, steps.walk.reverse ? s : T - 1 - s);
  };
  Tensor dz = at::empty(out.sizes(), out.options());
  OptionalTensor dh = grad_h_n;
  for (int64_t s = 0; s < T; ++s) {
    if (grad_out) dh = dh ? at::add(*dh, last(*grad_out, s)) : last(*grad_out, s);
    Tensor z = last(dz, s);
    slope(z, *dh, last(out, s));
    if (s + 1 < T) dh = at::mm(z, w_hh);
  }
  return dz;
}

template <class T>
void forward_loop(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                  const Tensor& out) {
  const int64_t I = layer.w_ih.size(1), H = layer.w_hh.size(0);
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
  f.w_hh = pack_into(space, layer.w_hh, true);
  if (fused) {
    x = adjacent_features(input);
    f.input_size = I;
    f.x = steps.rows_of<const T>(x);
    f.w_ih = pack_into(space, layer.w_ih, true);
    if (layer.b_ih || layer.b_hh) f.bias = pack_bias_into(space, layer);
  } else {
    project(input, layer, flat(out));
  }
  Tensor h0;
  if (layer.hx) {
    h0 = adjacent_features(*layer.hx);
    f.h0 = Rows<const T>{h0.const_data_ptr<T>(), 0, h0.stride(0)};
  }
  steps.parallel(f.walk, H * (H + f.input_size + 16), panels_of<T>(H),
                 [&](const Share& share) { loop.forward(f, share); });
}

template <class T>
Tensor backward_loop(const Steps& steps, const OptionalTensor& grad_out,
                     const OptionalTensor& grad_h_n, const Tensor& w_hh, const Tensor& out,
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
  steps.parallel(f.walk, H * (H + 16), panels_of<T>(H),
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
                            const OptionalTensor& hx, const Tensor& out, Tensor& d_w_ih,
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
Tensor large_w_hh_gradient(const Steps& steps, const Tensor& dz, const OptionalTensor& hx,
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

// ------------------------------------------------------------------------------- 16-bit storage
//
// bfloat16 and float16 are storage: the arithmetic, and the state from step to step, are float32.
// Nothing is widened whole, so that a step of training needs no more memory than nn.RNN's, which
// widens nothing: W_hh goes straight into the time loop's panels; steps are taken in stretches;
// products over all steps widen a block of a weight and some rows at a time. Between the recurrence
// of the backward and its products, dz is stored in 16 bits, like the outputs.

// Floats that temporaries may take. nn.RNN holds an output beside ours, or a weight's gradient; with
// a single step hardly anything, but smaller blocks would cost more calls.
int64_t spare_floats(const Steps& steps, int64_t I, int64_t H) {
  return std::max(H * (I + H), steps.rows * H) / 4;
}

// The size of equal parts of `all` rows, or columns, of `most` or 32.
int64_t part_of(int64_t all, int64_t most) {
  most = std::max<int64_t>(most, 32);
  const int64_t parts = std::max<int64_t>((all + most - 1) / most, 1);
  return std::max<int64_t>((all + parts - 1) / parts, 1);
}

// The steps in stretches, in the order of the walk, and their rows in float32. A buffer holds a
// stretch of rows and, next to them in their place, the rows of the step before.
class Stretches {
 public:
  Stretches(const Steps& steps, bool backwards, int64_t H, int64_t spare)
      : steps_(steps), backwards_(backwards) {
    const int64_t T = steps.walk.seq_len, B = steps.walk.batch;
    // Two buffers, and the step before.
    const int64_t most = std::clamp<int64_t>((spare / H - B) / 2, 32, 512);
    for (int64_t t = 0; t < T;) {
      const int64_t begin = t++;
      while (t < T && steps.row(t + 1) - steps.row(begin) <= most) ++t;
      ranges_.emplace_back(begin, t);
      rows_ = std::max(rows_, steps.row(t) - steps.row(begin));
    }
    if (backwards) std::reverse(ranges_.begin(), ranges_.end());
  }

  const std::vector<std::pair<int64_t, int64_t>>& ranges() const { return ranges_; }

  Tensor buffer(int64_t features, bool with_step_before) const {
    const int64_t rows = rows_ + (with_step_before && ranges_.size() > 1 ? steps_.walk.batch : 0);
    return at::empty({rows, features}, at::kFloat);
  }

  // The stretch's rows of a tensor [T, B, F] or packed [rows, F].
  Tensor part(const Tensor& x, std::pair<int64_t, int64_t> range) const {
    const auto [begin, end] = range;
    return steps_.packed() ? x.narrow(0, steps_.row(begin), steps_.row(end) - steps_.row(begin))
                           : x.narrow(0, begin, end - begin);
  }

  // The stretch's rows of a buffer; `before`: one with the rows of the step before.
  Tensor rows(const Tensor& buffer, std::pair<int64_t, int64_t> range, bool before) const {
    const auto [begin, end] = range;
    return buffer.narrow(0, steps_.row(begin) - first_row(range, before),
                         steps_.row(end) - steps_.row(begin));
  }

  // The buffer as the time loop addresses it, by step and row.
  Rows<float> addressed(const Tensor& buffer, std::pair<int64_t, int64_t> range, bool before) const {
    const int64_t F = buffer.size(1);
    return {buffer.mutable_data_ptr<float>() - first_row(range, before) * F, steps_.walk.batch * F,
            F};
  }

  // Moves the rows of the step before, which ended the stretch before, to their place in this one.
  void carry(const Tensor& buffer, size_t i) const {
    if (i == 0) return;
    const auto range = ranges_[i];
    const int64_t t = backwards_ ? range.second : range.first - 1, F = buffer.size(1);
    const int64_t row = steps_.row(t), bytes = steps_.walk.live(t) * F * int64_t(sizeof(float));
    float* data = buffer.mutable_data_ptr<float>();
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

const float* pack_widened(float*& space, const Tensor& w, bool transposed) {
  return AT_DISPATCH_REDUCED_FLOATING_TYPES(w.scalar_type(), "rnnfast::rnn_layer", [&] {
    return pack_into<float, scalar_t>(space, w, transposed);
  });
}

OptionalTensor widened(const OptionalTensor& x) {
  return x ? OptionalTensor(x->to(at::kFloat).contiguous()) : std::nullopt;
}

// to = x[r : r + n, c : c + m], of a 16-bit matrix x. A few numbers are done before a call of the
// library's begins.
void widen_block(float* to, int64_t ld, const Tensor& x, int64_t r, int64_t n, int64_t c, int64_t m) {
  if (n * m > 4096) {
    at::from_blob(to, {n, m}, {ld, 1}, at::kFloat).copy_(x.narrow(0, r, n).narrow(1, c, m));
    return;
  }
  AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "rnnfast::rnn_layer", [&] {
    const int64_t stride_r = x.stride(0), stride_c = x.stride(1);
    const scalar_t* from = x.const_data_ptr<scalar_t>() + r * stride_r + c * stride_c;
    for (int64_t i = 0; i < n; ++i) widen(from + i * stride_r, stride_c, m, to + i * ld);
  });
}

// z += x w^T in float32, of a 16-bit w, of which `most` numbers are widened at a time.
void add_widened_linear(const Tensor& z, const Tensor& x, const Tensor& w, int64_t most) {
  constexpr int64_t kFewRows = 56;  // as in worth_no_packing
  const int64_t rows = x.size(0), N = w.size(0), block = part_of(N, most / w.size(1));
  const Tensor wide = at::empty({block, w.size(1)}, x.options());
  for (int64_t n0 = 0; n0 < N; n0 += block) {
    const int64_t n = std::min(block, N - n0);
    const Tensor w_n = wide.narrow(0, 0, n);
    w_n.copy_(w.narrow(0, n0, n));
    Tensor z_n = z.narrow(1, n0, n);
    if (rows > kFewRows) {
      z_n.addmm_(x, w_n.t());
    } else {
      add_linear<float>({x.const_data_ptr<float>(), 0, x.stride(0)}, w_n, rows,
                        {z_n.mutable_data_ptr<float>(), 0, z_n.stride(0)});
    }
  }
}

// result = x w in float32, all three stored in 16 bits.
void widened_product(const Tensor& result, const Tensor& x, const Tensor& w, int64_t spare) {
  const int64_t rows = x.size(0), K = w.size(0), N = w.size(1);
  const int64_t chunk = part_of(rows, spare / (2 * K)), block = part_of(N, spare / (4 * K));
  const auto options = x.options().dtype(at::kFloat);
  const Tensor wide_x = at::empty({chunk, K}, options), wide_w = at::empty({K, block}, options);
  const Tensor y = at::empty({chunk, block}, options);
  for (int64_t r = 0; r < rows; r += chunk) {
    const int64_t m = std::min(chunk, rows - r);
    const Tensor x_r = wide_x.narrow(0, 0, m);
    widen_block(wide_x.mutable_data_ptr<float>(), K, x, r, m, 0, K);
    for (int64_t n0 = 0; n0 < N; n0 += block) {
      const int64_t n = std::min(block, N - n0);
      const Tensor w_n = wide_w.narrow(1, 0, n);
      widen_block(wide_w.mutable_data_ptr<float>(), block, w, 0, K, n0, n);
      Tensor y_n = y.narrow(0, 0, m).narrow(1, 0, n);
      at::mm_out(y_n, x_r, w_n);
      result.narrow(0, r, m).narrow(1, n0, n).copy_(y_n);
    }
  }
}

// result = the sum of a^T b over pairs of matrices of as many rows, in float32, all stored in 16
// bits: a block of the result at a time, over chunks of rows.
using Pairs = std::vector<std::pair<Tensor, Tensor>>;
void widened_outer_sum(const Tensor& result, const Pairs& pairs, int64_t spare) {
  const int64_t M = result.size(0), N = result.size(1);
  int64_t rows = 0;
  for (const auto& [a, b] : pairs) rows += a.size(0);
  const int64_t block = part_of(M, spare / (2 * N));
  const int64_t chunk = part_of(rows, spare / (2 * (block + N)));
  const bool own = M * N <= kOwnOuterSum;
  const auto options = result.options().dtype(at::kFloat);
  const Tensor sum = at::empty({block, N}, options);
  const Tensor wide_a = at::empty({chunk, block}, options), wide_b = at::empty({chunk, N}, options);
  float* a_data = wide_a.mutable_data_ptr<float>();
  float* b_data = wide_b.mutable_data_ptr<float>();
  for (int64_t m0 = 0; m0 < M; m0 += block) {
    const int64_t m = std::min(block, M - m0);
    Tensor sum_m = sum.narrow(0, 0, m);
    sum_m.zero_();
    int64_t filled = 0;
    const auto add = [&] {
      if (own) {
        OuterSum<float> f = {filled, N, a_data, block, b_data, N, sum_m.mutable_data_ptr<float>(), N};
        time_loop<float>().outer_sum(f, 0, m);
      } else {
        sum_m.addmm_(wide_a.narrow(0, 0, filled).narrow(1, 0, m).t(), wide_b.narrow(0, 0, filled));
      }
      filled = 0;
    };
    for (const auto& [a, b] : pairs) {
      for (int64_t r = 0; r < a.size(0);) {
        const int64_t n = std::min(chunk - filled, a.size(0) - r);
        widen_block(a_data + filled * block, block, a, r, n, m0, m);
        widen_block(b_data + filled * N, N, b, r, n, 0, N);
        filled += n;
        r += n;
        if (filled == chunk) add();
      }
    }
    if (filled > 0) add();
    result.narrow(0, m0, m).copy_(sum_m);
  }
}

void narrow_forward(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                    const Tensor& out) {
  const int64_t I = layer.w_ih.size(1), H = layer.w_hh.size(0), T = steps.walk.seq_len;
  const auto& loop = time_loop<float>();
  const int64_t spare = spare_floats(steps, I, H);
  const Stretches stretches(steps, steps.walk.reverse, H, spare);
  // A packed W_ih of many more weights than the output has numbers would be most of the memory.
  const bool fused = T > 1 && worth_fusing(steps, I, H) && (I <= 8 || steps.rows >= H);
  Space<float> packed((T > 1 ? loop.packed_size(H, H) : 0) +
                      (fused ? loop.packed_size(I, H) : 0) + loop.packed_size(1, H));
  float* space = packed.data();
  Forward<float> f;
  f.walk = steps.walk;
  f.hidden_size = H;
  f.relu = relu;
  const OptionalTensor h0 = widened(layer.hx);
  const float* bias = AT_DISPATCH_REDUCED_FLOATING_TYPES(
      input.scalar_type(), "rnnfast::rnn_layer",
      [&] { return pack_bias_into<float, scalar_t>(space, layer); });
  if (T > 1) f.w_hh = pack_widened(space, layer.w_hh, true);
  if (h0) f.h0 = Rows<const float>{h0->const_data_ptr<float>(), 0, H};
  if (fused) {
    f.input_size = I;
    f.w_ih = pack_widened(space, layer.w_ih, true);
    f.bias = bias;
  }
  const Tensor wide_x = stretches.buffer(I, false), wide_out = stretches.buffer(H, true);
  for (size_t i = 0; i < stretches.ranges().size(); ++i) {
    const auto range = stretches.ranges()[i];
    const Tensor x_s = stretches.part(input, range), out_s = stretches.part(out, range);
    const Tensor rows = stretches.rows(wide_x, range, false);
    const Tensor z = stretches.rows(wide_out, range, true);
    widen_block(wide_x.mutable_data_ptr<float>(), I, flat(x_s), 0, rows.size(0), 0, I);
    stretches.carry(wide_out, i);
    if (!fused) {
      float* to = z.mutable_data_ptr<float>();
      for (int64_t r = 0; r < z.size(0); ++r) std::memcpy(to + r * H, bias, H * sizeof(float));
      add_widened_linear(z, rows, layer.w_ih, T > 1 ? spare / 4 : spare / 2);
    }
    if (T > 1) {
      std::tie(f.walk.begin, f.walk.end) = range;
      const Rows<float> x_rows = stretches.addressed(wide_x, range, false);
      f.x = Rows<const float>{x_rows.data, x_rows.stride_t, x_rows.stride_b};
      f.out = stretches.addressed(wide_out, range, true);
      steps.parallel(f.walk, H * (H + f.input_size + 16), panels_of<float>(H),
                     [&](const Share& share) { loop.forward(f, share); });
    } else {
      if (h0) add_widened_linear(z, *h0, layer.w_hh, spare / 2);
      at::parallel_for(0, z.numel(), 16384, [&](int64_t begin, int64_t end) {
        loop.activate(z.mutable_data_ptr<float>() + begin, end - begin, relu);
      });
    }
    out_s.copy_(z.view(out_s.sizes()));
  }
}

Gradients narrow_backward(const Steps& steps, const OptionalTensor& grad_out,
                          const OptionalTensor& grad_h_n, const Tensor& input,
                          const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                          const Tensor& out, bool relu, std::array<bool, 5> output_mask) {
  const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
  const int64_t I = w_ih.size(1), H = w_hh.size(0), T = steps.walk.seq_len;
  const int64_t spare = spare_floats(steps, I, H);
  const auto& loop = time_loop<float>();
  const Tensor dz = at::empty(out.sizes(), out.options());
  Tensor d_b;
  {
    const Stretches stretches(steps, !steps.walk.reverse, H, spare);
    Space<float> packed(T > 1 ? loop.packed_size(H, H) : 0);
    float* space = packed.data();
    Backward<float> f;
    f.walk = steps.walk;
    f.hidden_size = H;
    f.relu = relu;
    if (T > 1) f.w_hh = pack_widened(space, w_hh, false);
    const OptionalTensor g_n = widened(grad_h_n);
    if (g_n) f.grad_h_n = Rows<const float>{g_n->const_data_ptr<float>(), 0, H};
    const Tensor wide_out = stretches.buffer(H, false), wide_dz = stretches.buffer(H, true);
    for (size_t i = 0; i < stretches.ranges().size(); ++i) {
      const auto range = stretches.ranges()[i];
      const Tensor out_s = stretches.part(out, range), dz_s = stretches.part(dz, range);
      const Tensor rows = stretches.rows(wide_dz, range, true);
      widen_block(wide_out.mutable_data_ptr<float>(), H, flat(out_s), 0, rows.size(0), 0, H);
      stretches.carry(wide_dz, i);
      std::tie(f.walk.begin, f.walk.end) = range;
      const Rows<float> h_rows = stretches.addressed(wide_out, range, false);
      f.out = Rows<const float>{h_rows.data, h_rows.stride_t, h_rows.stride_b};
      f.dz = stretches.addressed(wide_dz, range, true);
      if (grad_out) {  // each number is read where its dz is written
        const Tensor g_s = flat(stretches.part(*grad_out, range));
        widen_block(rows.mutable_data_ptr<float>(), H, g_s, 0, rows.size(0), 0, H);
        f.grad_out = Rows<const float>{f.dz.data, f.dz.stride_t, f.dz.stride_b};
      }
      steps.parallel(f.walk, H * (H + 16), panels_of<float>(H),
                     [&](const Share& share) { loop.backward(f, share); });
      dz_s.copy_(rows.view(dz_s.sizes()));
      if (need_b) d_b = d_b.defined() ? d_b.add_(rows.sum(0)) : rows.sum(0);
    }
  }

  const bool reverse = steps.walk.reverse;
  const Tensor z = flat(dz), h = flat(out);
  const Tensor z_first =
      hx && (need_h || need_w_hh) ? (reverse ? steps.last(dz) : steps.first(dz)) : Tensor();
  Tensor d_x, d_h, d_w_ih, d_w_hh;
  if (need_w_ih) {
    d_w_ih = at::empty({H, I}, dz.options());
    widened_outer_sum(d_w_ih, {{z, flat(input)}}, spare);
  }
  if (need_w_hh) {
    d_w_hh = at::empty({H, H}, dz.options());
    Pairs pairs;
    if (hx) pairs.emplace_back(z_first, *hx);
    steps.for_each_shift([&](int64_t at, int64_t before, int64_t n) {
      pairs.emplace_back(z.narrow(0, at, n), h.narrow(0, before, n));
    });
    widened_outer_sum(d_w_hh, pairs, spare);
  }
  if (need_x) {
    d_x = at::empty(input.sizes(), dz.options());
    widened_product(flat(d_x), z, w_ih, spare);
  }
  if (hx && need_h) {
    d_h = at::empty(hx->sizes(), dz.options());
    widened_product(d_h, z_first, w_hh, spare);
  }
  return {d_x, d_h, d_w_ih, d_w_hh, need_b ? d_b.to(dz.scalar_type()) : d_b};
}

// --------------------------------------------------------------------------------------- the ops

// One direction, into the rows of `out`, which may lie apart, and a contiguous h_n.
void forward_into(const Tensor& out, const Tensor& h_n, const Steps& steps, const Tensor& input,
                  const Direction& layer, c10::string_view nonlinearity) {
  if (steps.rows == 0) return;
  const bool relu = nonlinearity == "relu";
  if (is_reduced(input)) {
    narrow_forward(steps, input, layer, relu, out);
  } else {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer", [&] {
      const auto run = worth_no_packing(steps, layer.w_hh.size(0)) ? forward_by_steps<scalar_t>
                                                                   : forward_loop<scalar_t>;
      run(steps, input, layer, relu, out);
    });
  }
  layer.reverse ? steps.copy_first(out, h_n) : steps.copy_last(out, h_n);
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
  const std::array<Direction, 2> layers = {direction_of(0, hx, weights),
                                           direction_of(1, hx, weights)};
  for (const Direction& x : layers) {
    check_layer(input, x.hx, x.w_ih, x.w_hh, x.b_ih, x.b_hh, batch_sizes, nonlinearity);
  }
  check_dtype(input);
  Steps steps(input, batch_sizes, /*reverse=*/false);
  const int64_t H = layers[0].w_hh.size(0);
  Tensor out = empty_rows(input, 2 * H);
  Tensor h_n = at::empty({2, steps.walk.batch, H}, input.options());
  for (int64_t d = 0; d < 2; ++d) {
    steps.walk.reverse = layers[d].reverse;
    forward_into(out.narrow(-1, d * H, H), h_n.select(0, d), steps, input, layers[d],
                 nonlinearity);
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

  const bool relu = nonlinearity == "relu";
  if (is_reduced(input)) {
    return narrow_backward(steps, grad_out, grad_h_n, input, hx, w_ih, w_hh, out, relu,
                           output_mask);
  }
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

TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("_cpu_instruction_set() -> str", [] { return std::string(rnnfast::cpu::instruction_set()); });
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("rnn_layer", &rnnfast::cpu::rnn_layer);
  m.impl("rnn_bidirectional_layer", &rnnfast::cpu::rnn_bidirectional_layer);
  m.impl("rnn_layer_backward", &rnnfast::cpu::rnn_layer_backward);
  m.impl("_tanh", &rnnfast::cpu::tanh);
}
