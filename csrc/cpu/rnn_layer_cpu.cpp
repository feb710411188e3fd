// The CPU kernels of the ops in ../op.cpp. Time-parallel work (input projection, weight and input
// gradients) is one large product each and goes to the library, unless it is small; the recurrence
// goes to the time loop, shared out between ATen's threads, unless the rows are so few that the
// weights are not worth packing.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "../op.h"
#include "layer.h"
#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

// A library call below must compute in the dtype of its operands, whatever autocast is on.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

Tensor adjacent_features(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// --------------------------------------------------------------------------------------- forward

// Whether the rows are too few for packing the weights to pay: measured break-evens, with I = H
// (notes/cpu.md, "Few rows"). A single step, as in a cell, has less of a loop to gain.
bool worth_no_packing(const Steps& steps, int64_t H) {
  return steps.rows <= (steps.walk.seq_len == 1 ? 6 + H * H / 5000
                                                : std::min<int64_t>(2 + H / 10, 100));
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

// Step by step, the weights as they lie.
template <class T>
void forward_by_steps(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                      const Tensor& out) {
  constexpr bool sums_apart = !std::is_same_v<T, Sum<T>>;
  const int64_t H = layer.w_hh.size(0);
  const Walk& walk = steps.walk;
  const Tensor x = adjacent_features(input);
  const Tensor w_ih = adjacent_features(layer.w_ih), w_hh = adjacent_features(layer.w_hh);
  const Tensor h0 = layer.hx ? adjacent_features(*layer.hx) : Tensor();
  const auto x_rows = steps.rows_of<const T>(x);
  const auto out_rows = steps.rows_of<T>(out);
  // One product over all steps, unless it would cost less than its call.
  const bool projected =
      !sums_apart && walk.seq_len > 1 && !worth_fusing(steps, w_ih.size(1), H, sizeof(T));
  if (projected) project(input, layer, flat(out));
  Space<Sum<T>> bias(panels_of<T>(H) * time_loop<T>().panel_columns);
  Sum<T>* end = bias.data();
  pack_bias_into<Sum<T>, Element<T>>(end, layer);
  Space<Sum<T>> sums(sums_apart ? walk.batch * H : 0);  // of a step

  int64_t t_last = 0, visited = 0;
  for (int64_t s = 0; s < walk.seq_len; ++s) {
    const int64_t t = walk.reverse ? walk.seq_len - 1 - s : s, live = walk.live(t);
    const auto at = [&](const auto& rows, int64_t t, int64_t b) {
      auto from = rows;
      from.data = walk.row(rows, t, b);
      return from;
    };
    const auto z = [&](int64_t b) -> Rows<Sum<T>> {
      if constexpr (sums_apart) return {sums.data() + b * H, 0, H};
      if constexpr (!sums_apart) return at(out_rows, t, b);
    };
    const Rows<Sum<T>> z_rows = z(0);
    if (!projected) {
      for (int64_t b = 0; b < live; ++b) {
        std::memcpy(z_rows.data + b * z_rows.stride_b, bias.data(), H * sizeof(Sum<T>));
      }
      add_linear<T>(at(x_rows, t, 0), w_ih, live, z_rows);
    }
    const int64_t carried = std::min(visited, live);
    if (carried > 0) {
      const auto h = at(out_rows, t_last, 0);
      add_linear<T>({h.data, 0, h.stride_b}, w_hh, carried, z_rows);
    }
    if (carried < live && h0.defined()) {
      add_linear<T>({data_of<const T>(h0) + carried * h0.stride(0), 0, h0.stride(0)}, w_hh,
                    live - carried, z(carried));
    }
    const bool adjacent = out_rows.stride_b == H;
    for (int64_t b = 0; b < (adjacent ? 1 : live); ++b) {
      time_loop<T>().activate(z(b).data, adjacent ? live * H : H, relu, walk.row(out_rows, t, b));
    }
    visited = live;
    t_last = t;
  }
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

  const bool fused = worth_fusing(steps, I, H, sizeof(T));
  Tensor x;
  Space<T> packed(loop.packed_size(H, H) + (fused ? loop.packed_size(I, H) : 0));
  T* space = packed.data();
  f.w_hh = pack_into(space, layer.w_hh, true);
  Space<Sum<T>> bias(fused ? panels_of<T>(H) * loop.panel_columns : 0);
  if (fused) {
    x = adjacent_features(input);
    f.input_size = I;
    f.x = steps.rows_of<const T>(x);
    f.w_ih = pack_into(space, layer.w_ih, true);
    Sum<T>* end = bias.data();
    if (layer.b_ih || layer.b_hh) f.bias = pack_bias_into<Sum<T>, Element<T>>(end, layer);
  } else {
    project(input, layer, flat(out));
  }
  Tensor h0;
  if (layer.hx) {
    h0 = adjacent_features(*layer.hx);
    f.h0 = Rows<const T>{data_of<const T>(h0), 0, h0.stride(0)};
  }
  steps.parallel(f.walk, H * (H + f.input_size + 16), panels_of<T>(H),
                 [&](const Share& share) { loop.forward(f, share); });
}

// -------------------------------------------------------------------------------------- backward

// Whether the rows are too few for packing W_hh to pay. The few products then go to the library:
// 4 us a call, and slower ones with so few rows. A single step has none.
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
    f.grad_h_n = Rows<const T>{data_of<const T>(g_h_n), 0, g_h_n.stride(0)};
  }
  Space<T> packed(loop.packed_size(H, H));
  T* space = packed.data();
  f.w_hh = pack_into(space, w_hh, false);
  steps.parallel(f.walk, H * (H + 16), panels_of<T>(H),
                 [&](const Share& share) { loop.backward(f, share); });
  return dz;
}

// ------------------------------------------------------------------------------ weight gradients

// The defined ones of d_w_ih = sum dz x^T, d_w_hh = sum dz h_before^T and, beside d_w_ih,
// d_b = sum dz, onto zeros.
template <class T>
void small_weight_gradients(const Steps& steps, const Tensor& dz, const Tensor& input,
                            const OptionalTensor& hx, const Tensor& out, const Tensor& d_w_ih,
                            const Tensor& d_w_hh, const Tensor& d_b, int64_t I, int64_t H) {
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
      steps.walk.reverse ? add(prefixes, h.narrow(0, B, rest))
                         : add(z.narrow(0, B, rest), prefixes);
    }
  }
  return sum.defined() ? sum : at::zeros_like(w_hh, at::MemoryFormat::Contiguous);
}

bool is_16bit(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

// Whether products, and with them the state from step to step, are in bfloat16 (see time_loop.h),
// rather than in float32 with bfloat16 as storage alone.
bool bfloat16_products(const Tensor& input) {
  return input.scalar_type() == at::kBFloat16 && has_bfloat16_products();
}

void check_dtype(const Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble || is_16bit(input),
      "rnnfast: the CPU kernel takes float32, float64, bfloat16 and float16, got ",
      input.scalar_type());
}

// --------------------------------------------------------------------------------------- the ops

// One direction, into the rows of `out`, which may lie apart, and a contiguous h_n.
void forward_into(const Tensor& out, const Tensor& h_n, const Steps& steps, const Tensor& input,
                  const Direction& layer, c10::string_view nonlinearity) {
  if (steps.rows == 0) return;
  const bool relu = nonlinearity == "relu";
  const int64_t H = layer.w_hh.size(0);
  const bool no_packing = worth_no_packing(steps, H);
  if (bfloat16_products(input)) {
    const auto run = no_packing ? forward_by_steps<BFloat16> : forward_loop<BFloat16>;
    run(steps, input, layer, relu, out);
  } else if (is_16bit(input)) {
    forward_16bit(steps, input, layer, relu, out);
  } else {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer", [&] {
      const auto run = no_packing ? forward_by_steps<scalar_t> : forward_loop<scalar_t>;
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
  const bool in_bfloat16 = bfloat16_products(input);
  if (is_16bit(input) && !in_bfloat16) {
    return backward_16bit(steps, grad_out, grad_h_n, input, hx, w_ih, w_hh, out, relu,
                          output_mask);
  }
  Tensor dz;
  if (worth_steps_of_library(steps, H) && (grad_out || grad_h_n)) {
    dz = backward_by_steps(steps, grad_out, grad_h_n, w_hh, out, relu);
  } else if (in_bfloat16) {
    dz = backward_loop<BFloat16>(steps, grad_out, grad_h_n, w_hh, out, relu);
  } else {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer_backward", [&] {
      dz = backward_loop<scalar_t>(steps, grad_out, grad_h_n, w_hh, out, relu);
    });
  }

  Tensor d_x, d_h, d_w_ih, d_w_hh, d_b;
  if (need_x) d_x = at::mm(flat(dz), w_ih).view(input.sizes());
  if (hx && need_h) d_h = at::mm(reverse ? steps.last(dz) : steps.first(dz), w_hh);
  const bool own_w_ih = need_w_ih && !in_bfloat16 && H * I <= kOwnOuterSum;
  const bool own_w_hh = need_w_hh && !in_bfloat16 && H * H <= kOwnOuterSum;
  if (own_w_ih) d_w_ih = at::zeros({H, I}, dz.options());
  if (own_w_hh) d_w_hh = at::zeros({H, H}, dz.options());
  if (need_b) d_b = own_w_ih ? at::zeros({H}, dz.options()) : flat(dz).sum(0);
  if (own_w_ih || own_w_hh) {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer_backward", [&] {
      small_weight_gradients<scalar_t>(steps, dz, input, hx, out, d_w_ih, d_w_hh,
                                       own_w_ih ? d_b : Tensor(), I, H);
    });
  }
  if (need_w_ih && !own_w_ih) d_w_ih = at::mm(flat(dz).t(), flat(input));
  if (need_w_hh && !own_w_hh) d_w_hh = large_w_hh_gradient(steps, dz, hx, out, w_hh);
  return {d_x, d_h, d_w_ih, d_w_hh, d_b};
}

// tanh as the time loop computes it, for its accuracy to be measured.
Tensor tanh(const Tensor& x) {
  Tensor y = x.clone(at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rnnfast::_tanh", [&] {
    scalar_t* data = y.mutable_data_ptr<scalar_t>();
    time_loop<scalar_t>().activate(data, y.numel(), false, data);
  });
  return y;
}

}  // namespace
}  // namespace rnnfast::cpu

TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("_cpu_instruction_set() -> str",
        [] { return std::string(rnnfast::cpu::instruction_set()); });
  m.def("_cpu_bfloat16_products() -> bool", &rnnfast::cpu::has_bfloat16_products);
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("rnn_layer", &rnnfast::cpu::rnn_layer);
  m.impl("rnn_bidirectional_layer", &rnnfast::cpu::rnn_bidirectional_layer);
  m.impl("rnn_layer_backward", &rnnfast::cpu::rnn_layer_backward);
  m.impl("_tanh", &rnnfast::cpu::tanh);
}
