// The CPU kernels of the ops in ../op.cpp. Time-parallel work (input projection, weight and input
// gradients) is one large product each and goes to the library; the recurrence goes to the time
// loop, its rows shared out between ATen's threads.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
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

// Below this many multiply-adds a second thread costs more (about 4 us to wake) than it brings.
constexpr int64_t kWorkPerThread = 200'000;

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

  // x[len(b) - 1, b] for every b: the last valid step of each sequence.
  Tensor last(const Tensor& x) const {
    if (!packed()) return x.select(0, walk.seq_len - 1);
    const Tensor rows = x.contiguous();
    Tensor result = at::empty({walk.batch, rows.size(1)}, rows.options());
    const size_t bytes = rows.size(1) * rows.element_size();
    const char* from = static_cast<const char*>(rows.const_data_ptr());
    char* to = static_cast<char*>(result.mutable_data_ptr());
    for (int64_t t = 0; t < walk.seq_len; ++t) {
      const int64_t begin = t + 1 < walk.seq_len ? walk.batch_sizes[t + 1] : 0;
      const int64_t end = walk.batch_sizes[t];
      if (end > begin) {
        std::memcpy(to + begin * bytes, from + (first_row[t] + begin) * bytes,
                    (end - begin) * bytes);
      }
    }
    return result;
  }
  Tensor first(const Tensor& x) const {
    return packed() ? x.narrow(0, 0, walk.batch) : x.select(0, 0);
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

  // Runs loop(b0, b1) over all rows of the batch, divided so that every thread has as many steps.
  template <class F>
  void parallel(int64_t work_per_row, const F& loop) const {
    const int64_t B = walk.batch;
    const int64_t worth = std::max<int64_t>(rows * work_per_row / kWorkPerThread, 1);
    const int64_t parts = std::min({worth, int64_t(at::get_num_threads()), B});
    if (parts <= 1 || at::in_parallel_region()) {
      loop(0, B);
      return;
    }
    std::vector<int64_t> bounds(parts + 1, B);
    bounds[0] = 0;
    if (!packed()) {
      for (int64_t i = 1; i < parts; ++i) bounds[i] = B * i / parts;
    } else {
      int64_t length = walk.seq_len, before = 0, part = 1;
      for (int64_t b = 0; b < B && part < parts; ++b) {
        while (walk.batch_sizes[length - 1] <= b) --length;
        before += length;
        if (before * parts >= rows * part) bounds[part++] = b + 1;
      }
    }
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) loop(bounds[i], bounds[i + 1]);
    });
  }
};

Tensor adjacent_features(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

Tensor flat(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// Packs w^T (transposed) or w into the time loop's panels.
template <class T>
const T* pack_into(T*& space, const Tensor& w, bool transposed) {
  T* packed = space;
  const int64_t K = w.size(transposed ? 1 : 0), N = w.size(transposed ? 0 : 1);
  time_loop<T>().pack(w.const_data_ptr<T>(), w.stride(transposed ? 1 : 0),
                      w.stride(transposed ? 0 : 1), K, N, packed);
  space += time_loop<T>().packed_size(K, N);
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

  // The projection is fused where a block's rows share each weight that is loaded; with few rows a
  // product over all steps at once is the better use of the weights.
  const bool fused = I <= 8 || (I <= 256 && steps.walk.batch >= 8);
  Tensor x;
  const int64_t sizes = loop.packed_size(H, H) +
      (fused ? loop.packed_size(I, H) + loop.packed_size(1, H) : 0);
  Tensor buffer = at::empty({sizes}, w_hh.options());
  T* space = buffer.mutable_data_ptr<T>();
  f.w_hh = pack_into(space, w_hh, true);
  if (fused) {
    x = adjacent_features(input);
    f.input_size = I;
    f.x = steps.rows_of<const T>(x);
    f.w_ih = pack_into(space, w_ih, true);
    if (b_ih || b_hh) f.bias = pack_bias_into(space, b_ih, b_hh, H);
  } else {
    Tensor z = out.view({steps.rows, H});
    if (b_ih || b_hh) {
      const Tensor bias = b_ih && b_hh ? at::add(*b_ih, *b_hh) : b_ih ? *b_ih : *b_hh;
      at::addmm_out(z, bias, flat(input), w_ih.t());
    } else {
      at::mm_out(z, flat(input), w_ih.t());
    }
  }
  Tensor h0;
  if (hx) {
    h0 = adjacent_features(*hx);
    f.h0 = Rows<const T>{h0.const_data_ptr<T>(), 0, h0.stride(0)};
  }
  steps.parallel(H * (H + f.input_size + 16),
                 [&](int64_t b0, int64_t b1) { loop.forward(f, b0, b1); });
}

template <class T>
void backward_loop(const Steps& steps, const std::optional<Tensor>& grad_out,
                   const std::optional<Tensor>& grad_h_n, const Tensor& w_hh, const Tensor& out,
                   bool relu, const Tensor& dz) {
  const int64_t H = w_hh.size(0);
  const auto& loop = time_loop<T>();
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
  Tensor buffer = at::empty({loop.packed_size(H, H)}, w_hh.options());
  T* space = buffer.mutable_data_ptr<T>();
  f.w_hh = pack_into(space, w_hh, false);
  steps.parallel(H * (H + 16), [&](int64_t b0, int64_t b1) { loop.backward(f, b0, b1); });
}

bool is_reduced(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

// 16-bit types are storage: the arithmetic, and the state from step to step, are float32.
std::optional<Tensor> widened(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(x->to(at::kFloat)) : x;
}

void check_dtype(const Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble || is_reduced(input),
      "rnnfast: the CPU kernel takes float32, float64, bfloat16 and float16, got ",
      input.scalar_type());
}

std::tuple<Tensor, Tensor> rnn_layer(const Tensor& input, const std::optional<Tensor>& hx,
                                     const Tensor& w_ih, const Tensor& w_hh,
                                     const std::optional<Tensor>& b_ih,
                                     const std::optional<Tensor>& b_hh,
                                     const std::optional<Tensor>& batch_sizes,
                                     c10::string_view nonlinearity, bool reverse) {
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity);
  check_dtype(input);
  if (is_reduced(input)) {
    auto [out, h_n] =
        rnn_layer(input.to(at::kFloat), widened(hx), w_ih.to(at::kFloat), w_hh.to(at::kFloat),
                  widened(b_ih), widened(b_hh), batch_sizes, nonlinearity, reverse);
    return {out.to(input.scalar_type()), h_n.to(input.scalar_type())};
  }

  const Steps steps(input, batch_sizes, reverse);
  const int64_t H = w_hh.size(0);
  Tensor out = steps.packed() ? at::empty({steps.rows, H}, input.options())
                              : at::empty({steps.walk.seq_len, steps.walk.batch, H}, input.options());
  if (steps.rows == 0) return {out, at::empty({0, H}, input.options())};
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer", [&] {
    forward_loop<scalar_t>(steps, input, hx, w_ih, w_hh, b_ih, b_hh, nonlinearity == "relu", out);
  });
  return {out, (reverse ? steps.first(out) : steps.last(out)).clone()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_layer_backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_h_n,
    const Tensor& input, const std::optional<Tensor>& hx, const Tensor& w_ih, const Tensor& w_hh,
    const Tensor& out, const std::optional<Tensor>& batch_sizes, c10::string_view nonlinearity,
    bool reverse, std::array<bool, 5> output_mask) {
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_layer(input, hx, w_ih, w_hh, {}, {}, batch_sizes, nonlinearity);
  check_layer_grads(grad_out, grad_h_n, input, w_hh, out, batch_sizes);
  check_dtype(input);
  if (is_reduced(input)) {
    auto [d_x, d_h, d_w_ih, d_w_hh, d_b] = rnn_layer_backward(
        widened(grad_out), widened(grad_h_n), input.to(at::kFloat), widened(hx),
        w_ih.to(at::kFloat), w_hh.to(at::kFloat), out.to(at::kFloat), batch_sizes, nonlinearity,
        reverse, output_mask);
    const auto narrowed = [&](const Tensor& x) {
      return x.defined() ? x.to(input.scalar_type()) : x;
    };
    return {narrowed(d_x), narrowed(d_h), narrowed(d_w_ih), narrowed(d_w_hh), narrowed(d_b)};
  }

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

  Tensor dz = at::empty(out.sizes(), out.options());
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer_backward", [&] {
    backward_loop<scalar_t>(steps, grad_out, grad_h_n, w_hh, out, nonlinearity == "relu", dz);
  });

  const Tensor dz_flat = dz.view({steps.rows, H});
  Tensor d_x, d_h, d_w_ih, d_w_hh, d_b;
  if (need_x) d_x = at::mm(dz_flat, w_ih).view(input.sizes());
  if (need_w_ih) d_w_ih = at::mm(dz_flat.t(), flat(input));
  if (need_b) d_b = dz_flat.sum(0);
  Tensor dz_first;  // of the step that read h0
  if (hx && (need_h || need_w_hh)) dz_first = reverse ? steps.last(dz) : steps.first(dz);
  if (hx && need_h) d_h = at::mm(dz_first, w_hh);
  if (need_w_hh) {
    if (hx) d_w_hh = at::mm(dz_first.t(), *hx);
    const Tensor out_flat = flat(out);
    steps.for_each_shift([&](int64_t at, int64_t before, int64_t n) {
      const Tensor z = dz_flat.narrow(0, at, n).t(), h = out_flat.narrow(0, before, n);
      if (d_w_hh.defined()) {
        d_w_hh.addmm_(z, h);
      } else {
        d_w_hh = at::mm(z, h);
      }
    });
    if (!d_w_hh.defined()) d_w_hh = at::zeros_like(w_hh);
  }
  return {d_x, d_h, d_w_ih, d_w_hh, d_b};
}

// tanh as the time loop computes it, for its accuracy to be measured.
Tensor tanh(const Tensor& x) {
  const Tensor from = x.contiguous();
  Tensor to = at::empty_like(from);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rnnfast::_tanh", [&] {
    time_loop<scalar_t>().tanh(from.const_data_ptr<scalar_t>(), to.mutable_data_ptr<scalar_t>(),
                               from.numel());
  });
  return to;
}

}  // namespace
}  // namespace rnnfast::cpu

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("rnn_layer", &rnnfast::cpu::rnn_layer);
  m.impl("rnn_layer_backward", &rnnfast::cpu::rnn_layer_backward);
  m.impl("_tanh", &rnnfast::cpu::tanh);
}
