// The CPU kernels of the ops in ../op.cpp. Time-parallel work (input projection, weight and input
// gradients) is one large product each and goes to the library, unless it is small or our blocks
// are faster on this processor; the recurrence goes to the time loop, shared out between ATen's
// threads, unless the rows are so few that the weights are not worth packing.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../op.h"
#include "gradient_sums.h"
#include "packing.h"
#include "products.h"
#include "rnn_layer_16bit.h"
#include "steps.h"
#include "tensors.h"
#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

// A library call below must compute in the dtype of its operands, whatever autocast is on.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

// --------------------------------------------------------------------------------------- forward

// Whether the rows are too few for packing the weights to pay: measured break-evens, with I = H
// (notes/cpu.md, "Few rows", and "AMX"). A single step, as in a cell, has less of a loop to gain.
template <class T>
bool worth_no_packing(const Steps& steps, int64_t H) {
  if (in_tiles<T>()) return steps.rows <= 6;
  return steps.rows <= (steps.walk.seq_len == 1 ? 6 + H * H / 5000
                                                : std::min<int64_t>(2 + H / 10, 100));
}

// out = x W_ih^T + bias, for all steps at once.
template <class T>
void project(const Tensor& input, const Direction& layer, const Tensor& out) {
  const OptionalTensor &b_ih = layer.b_ih, &b_hh = layer.b_hh;
  const Tensor bias = b_ih && b_hh ? at::add(*b_ih, *b_hh) : b_ih ? *b_ih : b_hh.value_or(Tensor());
  const int64_t I = layer.w_ih.size(1), H = layer.w_ih.size(0);
  if constexpr (!kInPairs<T>) {
    if (few_columns<T>(I, H)) {
      bias.defined() ? out.copy_(bias.expand_as(out)) : out.zero_();
      const Tensor x = adjacent_features(input), w_ih = adjacent_features(layer.w_ih);
      // Batch-first, a sequence at a time: a copy would cost as much as the product.
      const bool by_sequence = !has_even_rows(x);
      const int64_t B = by_sequence ? x.size(1) : 1, rows = out.size(0) / B;
      const int64_t ldx = by_sequence ? x.stride(0) : row_stride(x), ldz = B * out.stride(0);
      at::parallel_for(0, B, kWorkPerThread / (rows * H * I) + 1, [&](int64_t b0, int64_t b1) {
        for (int64_t b = b0; b < b1; ++b) {
          const T* x_b = data_of<const T>(x) + (by_sequence ? b * x.stride(1) : 0);
          add_linear<T>({x_b, 0, ldx}, w_ih, rows, {data_of<T>(out) + b * out.stride(0), 0, ldz});
        }
      });
      return;
    }
  }
  product_into<T>(out, bias, flat(input), layer.w_ih.t());
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
  const bool projected =
      !kInPairs<T> && walk.seq_len > 1 && !worth_fusing<T>(steps, w_ih.size(1), H);
  if (projected) project<T>(input, layer, flat(out));
  Space<Sum<T>> bias(panels_of<T>(H) * time_loop<T>().panel_columns);
  Sum<T>* end = bias.data();
  pack_bias_into<Sum<T>, Element<T>>(end, layer);
  Space<Sum<T>> sums(kInPairs<T> ? walk.batch * H : 0);  // of a step

  int64_t t_last = 0, visited = 0;
  for (int64_t s = 0; s < walk.seq_len; ++s) {
    const int64_t t = walk.reverse ? walk.seq_len - 1 - s : s, live = walk.live(t);
    const auto at = [&](const auto& rows, int64_t t, int64_t b) {
      auto from = rows;
      from.data = walk.row(rows, t, b);
      return from;
    };
    const auto z = [&](int64_t b) -> Rows<Sum<T>> {
      if constexpr (kInPairs<T>) return {sums.data() + b * H, 0, H};
      if constexpr (!kInPairs<T>) return at(out_rows, t, b);
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
      add_linear<T>({h.data, 0, h.stride_b}, w_hh, carried, z_rows, /*backwards=*/s % 2);
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

// A single step: nothing but the next panel has to be packed at a time, by the thread that uses it,
// so that no weights travel from core to core.
template <class T>
void forward_step(const Steps& steps, const Direction& layer, const Forward<T>& f) {
  const Packing<T> w_hh(layer.w_hh, true), w_ih(layer.w_ih, true);
  const int64_t size = f.h0.data ? w_hh.size(1) : 0, size_ih = f.input_size > 0 ? w_ih.size(1) : 0;
  constexpr int64_t kActivation = 16;  // of a number, in multiply-adds
  const int64_t K = (f.h0.data ? f.hidden_size : 0) + f.input_size + kActivation;
  by_panels_or_rows<T>(
      steps.rows, K, f.hidden_size, [&](int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
        Space<T> packed(size + size_ih);
        Forward<T> panel = f;
        for (int64_t p = p0; p < p1; ++p) {
          if (size > 0) {
            w_hh.pack(p, p + 1, packed.data());
            panel.w_hh = packed.data() - p * size;  // where the loop looks for panel p
          }
          if (size_ih > 0) {
            w_ih.pack(p, p + 1, packed.data() + size);
            panel.w_ih = packed.data() + size - p * size_ih;
          }
          time_loop<T>().forward(panel, {.b0 = b0, .b1 = b1, .p0 = p, .p1 = p + 1});
        }
      });
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

  const bool fused = worth_fusing<T>(steps, I, H);
  Tensor x;
  Space<Sum<T>> bias(fused ? panels_of<T>(H) * loop.panel_columns : 0);
  if (fused) {
    x = adjacent_features(input);
    f.input_size = I;
    f.x = steps.rows_of<const T>(x);
    Sum<T>* end = bias.data();
    if (layer.b_ih || layer.b_hh) f.bias = pack_bias_into<Sum<T>, Element<T>>(end, layer);
  } else {
    project<T>(input, layer, flat(out));
  }
  Tensor h0;
  if (layer.hx) {
    h0 = adjacent_features(*layer.hx);
    f.h0 = Rows<const T>{data_of<const T>(h0), 0, h0.stride(0)};
  }
  if (steps.walk.seq_len == 1) return forward_step(steps, layer, f);
  const bool each = each_packs((H + f.input_size) * H);
  const Sharing sharing = steps.sharing<T>(f.walk, H + f.input_size, H, each);
  const int64_t size = loop.packed_size(H, H) + (fused ? loop.packed_size(I, H) : 0);
  const auto pack = [&](Forward<T>& f, T* space, const auto& share) {
    f.w_hh = pack_into(space, layer.w_hh, true, share);
    if (fused) f.w_ih = pack_into(space, layer.w_ih, true, share);
  };
  if (each) return pack_and_walk<T>(steps, f, sharing, size, pack, loop.forward);
  Space<T> packed(size);
  pack(f, packed.data(), sharing);
  steps.parallel<T>(f.walk, sharing, H, [&](const Share& share) { loop.forward(f, share); });
}

// -------------------------------------------------------------------------------------- backward

// Whether the rows are too few for packing W_hh to pay. The few products then go to the library:
// 4 us a call, and slower ones with so few rows. A single step has none.
template <class T>
bool worth_steps_of_library(const Steps& steps, int64_t H) {
  const int64_t seq_len = steps.walk.seq_len;
  if (seq_len == 1) return !steps.packed();
  return !steps.packed() && !in_tiles<T>() && steps.rows <= 24 &&
         0.65 * H * H > 4000.0 * (seq_len - 1);
}

// Returns dz, [rows, H]: in `place`, that of a gradient, where that is defined.
Tensor backward_by_steps(const Steps& steps, const OptionalTensor& grad_out,
                         const OptionalTensor& grad_h_n, const Tensor& w_hh, const Tensor& out,
                         bool relu, const Tensor& place) {
  const int64_t T = steps.walk.seq_len;
  const auto slope = [&](Tensor to, const Tensor& dh, const Tensor& h) {
    relu ? at::threshold_backward_out(to, dh, h, 0) : at::tanh_backward_out(to, dh, h);
  };
  const auto visited = [&](const Tensor& x, int64_t s) {  // the s-th, from the last step on
    return x.select(0, steps.walk.reverse ? s : T - 1 - s);
  };
  // Of the same strides as the gradient, since ATen calls what differs from it a partial overlap.
  const Tensor dz = !place.defined() ? empty(out.sizes(), out.scalar_type())
                    : grad_out       ? *grad_out
                                     : grad_h_n->unsqueeze(0);
  OptionalTensor dh = grad_h_n;
  for (int64_t s = 0; s < T; ++s) {
    if (grad_out) dh = dh ? at::add(*dh, visited(*grad_out, s)) : visited(*grad_out, s);
    Tensor z = visited(dz, s);
    slope(z, *dh, visited(out, s));
    if (s + 1 < T) dh = at::mm(z, w_hh);
  }
  return place.defined() ? place : flat(dz);
}

// dz of so many rows stays in the second-level caches of the threads that walk until its products are
// done, and takes no memory that would have to be fetched from the system in every call. In bfloat16 all
// of them, where a weight's gradient would be rounded after each stretch.
template <class T>
int64_t rows_of_a_stretch(const Steps& steps, int64_t I, int64_t H) {
  if (kInPairs<T> && !worth_wide_sums(steps, I, H)) return steps.rows;
  constexpr int64_t kBytes = 256 << 10, kLeast = 512;
  const int64_t row_bytes = H * int64_t(sizeof(T));
  if (steps.rows < 2 * std::max(kBytes / row_bytes, kLeast)) return steps.rows;  // however they are shared
  const Sharing sharing = steps.sharing<T>(steps.walk, H, H, /*each=*/false);
  const int64_t fitting = std::max(sharing.rows * sharing.panels * kBytes / row_bytes, kLeast);
  const int64_t parts = std::max<int64_t>(steps.rows / fitting, 1);
  return (steps.rows + parts - 1) / parts;
}

// Calls use(begin, end, dz) for stretches of steps, with their rows of dz, [rows, H], used for something
// else afterwards; or where there is a place for all of them, for all steps at once.
template <class T, class Use>
void backward_loop(const Steps& steps, const OptionalTensor& grad_out,
                   const OptionalTensor& grad_h_n, const Tensor& w_hh, const Tensor& out, bool relu,
                   int64_t I, const Tensor& place, const Use& use) {
  const int64_t H = w_hh.size(0);
  const auto& loop = time_loop<T>();
  Backward<T> f;
  f.walk = steps.walk;
  f.hidden_size = H;
  f.relu = relu;
  const Tensor h = adjacent_features(out);
  f.out = steps.rows_of<const T>(h);
  Tensor g_out, g_h_n;
  if (grad_out) {
    g_out = adjacent_features(*grad_out);
    f.grad_out = steps.rows_of<const T>(g_out);
  }
  if (grad_h_n) {
    g_h_n = adjacent_features(*grad_h_n);
    f.grad_h_n = Rows<const T>{data_of<const T>(g_h_n), 0, g_h_n.stride(0)};
  }
  const Stretches<T> stretches(steps, !steps.walk.reverse,
                               place.defined() ? steps.rows : rows_of_a_stretch<T>(steps, I, H));
  const bool each = each_packs(H * H, stretches.ranges().size());
  Sharing sharing = steps.sharing<T>(f.walk, H, H, each);
  const int64_t size = loop.packed_size(H, H);
  const auto pack = [&](Backward<T>& f, T* space, const auto& share) {
    f.w_hh = pack_into(space, w_hh, false, share);
  };
  Space<T> packed(each ? 0 : size);
  if (!each) pack(f, packed.data(), sharing);
  const Tensor dz = place.defined() ? place : stretches.buffer(H, true);
  for (size_t i = 0; i < stretches.ranges().size(); ++i) {
    const auto range = stretches.ranges()[i];
    stretches.carry(dz, i);
    std::tie(f.walk.begin, f.walk.end) = range;
    f.dz = stretches.addressed(dz, range, true);
    if (stretches.ranges().size() > 1) sharing = steps.sharing<T>(f.walk, H, H, each);
    if (each) {
      pack_and_walk<T>(steps, f, sharing, size, pack, loop.backward);
    } else {
      steps.parallel<T>(f.walk, sharing, H, [&](const Share& share) { loop.backward(f, share); });
    }
    if (i + 1 == stretches.ranges().size()) packed.free();
    use(range.first, range.second, stretches.rows(dz, range, true));
  }
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
  const auto run = [&](auto element) {
    using T = decltype(element);
    const auto run = worth_no_packing<T>(steps, H) ? forward_by_steps<T> : forward_loop<T>;
    run(steps, input, layer, relu, out);
  };
  if (bfloat16_products(input)) {
    run(BFloat16{});
  } else if (is_16bit(input)) {
    forward_16bit(steps, input, layer, relu, out);
  } else {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer", [&] { run(scalar_t{}); });
  }
  layer.reverse ? steps.copy_first(out, h_n) : steps.copy_last(out, h_n);
}

// [T, B, features] or packed [rows, features].
Tensor empty_rows(const Tensor& input, int64_t features) {
  at::DimVector sizes(input.sizes());
  sizes.back() = features;
  return empty(sizes, input.scalar_type());
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
  Tensor h_n = empty({steps.walk.batch, H}, input.scalar_type());
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
  Tensor h_n = empty({2, steps.walk.batch, H}, input.scalar_type());
  for (int64_t d = 0; d < 2; ++d) {
    steps.walk.reverse = layers[d].reverse;
    forward_into(out.narrow(-1, d * H, H), h_n.select(0, d), steps, input, layers[d],
                 nonlinearity);
  }
  return {out, h_n};
}

// All rows of dz, in the place of a gradient that is given for them, or nothing.
Tensor place_of_dz(const Steps& steps, const OptionalTensor& grad_out,
                   const OptionalTensor& grad_h_n, const Given& given) {
  if (grad_out) return given.grad_out ? writable_rows(*grad_out) : Tensor();
  const bool single = grad_h_n && steps.walk.seq_len == 1;
  return single && given.grad_h_n ? writable_rows(*grad_h_n) : Tensor();
}

Gradients backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                   const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                   const Tensor& w_hh, const Tensor& out, const OptionalTensor& batch_sizes,
                   c10::string_view nonlinearity, bool reverse, std::array<bool, 5> output_mask,
                   const Given& given) {
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_layer(input, hx, w_ih, w_hh, {}, {}, batch_sizes, nonlinearity);
  check_layer_grads(grad_out, grad_h_n, input, w_hh, out, batch_sizes);
  check_dtype(input);
  const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
  const Steps steps(input, batch_sizes, reverse);
  const int64_t I = w_ih.size(1), H = w_hh.size(0);
  if (steps.rows == 0) {
    const auto zeros_if = [&](bool need, at::IntArrayRef size, const Tensor& begun = Tensor()) {
      return need && !begun.defined() ? zeros(size, input.scalar_type()) : Tensor();
    };
    return {zeros_if(need_x, input.sizes()), zeros_if(need_h, {0, H}),
            zeros_if(need_w_ih, {H, I}, given.d_w_ih), zeros_if(need_w_hh, {H, H}, given.d_w_hh),
            zeros_if(need_b, {H}, given.d_b)};
  }

  const bool relu = nonlinearity == "relu";
  const bool in_bfloat16 = bfloat16_products(input);
  const Tensor place = place_of_dz(steps, grad_out, grad_h_n, given);
  if (is_16bit(input) && !in_bfloat16) {
    return backward_16bit(steps, grad_out, grad_h_n, input, hx, w_ih, w_hh, out, relu, output_mask,
                          place, given);
  }
  const auto run = [&](auto element) {
    using T = decltype(element);
    GradientSums<T> sums(steps, input, hx, w_ih, w_hh, out, given, output_mask);
    if (worth_steps_of_library<T>(steps, H) && (grad_out || grad_h_n)) {
      const Tensor dz = backward_by_steps(steps, grad_out, grad_h_n, w_hh, out, relu, place);
      if (given.out && steps.walk.seq_len == 1) release(out);
      sums.add(0, steps.walk.seq_len, dz);
    } else {
      backward_loop<T>(steps, grad_out, grad_h_n, w_hh, out, relu, I, place,
                       [&](int64_t begin, int64_t end, const Tensor& z) { sums.add(begin, end, z); });
    }
    return sums.take();
  };
  if (in_bfloat16) return run(BFloat16{});
  return AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnnfast::rnn_layer_backward",
                                    [&] { return run(scalar_t{}); });
}

Gradients rnn_layer_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                             const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                             const Tensor& w_hh, const Tensor& out,
                             const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                             bool reverse, std::array<bool, 5> output_mask) {
  return backward(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes, nonlinearity, reverse,
                  output_mask, Given());
}

Gradients rnn_layer_backward_(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                              const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                              const Tensor& w_hh, const Tensor& out,
                              const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                              bool reverse, std::array<bool, 5> output_mask,
                              std::array<bool, 3> given, const OptionalTensor& d_w_ih,
                              const OptionalTensor& d_w_hh, const OptionalTensor& d_b) {
  const auto checked = [&](const char* name, const OptionalTensor& sum, at::IntArrayRef sizes) {
    if (!sum) return Tensor();
    const auto dtype = is_16bit(input) ? at::kFloat : input.scalar_type();
    TORCH_CHECK(sum->sizes() == sizes && sum->scalar_type() == dtype && sum->is_contiguous(),
                "rnnfast: expected ", name, " to be contiguous, of size ", sizes, " and ", dtype,
                ", got ", sum->sizes(), " of ", sum->scalar_type());
    return *sum;
  };
  const Given used = {given[0], given[1], given[2], checked("d_w_ih", d_w_ih, w_ih.sizes()),
                      checked("d_w_hh", d_w_hh, w_hh.sizes()),
                      checked("d_b", d_b, w_hh.sizes().slice(0, 1))};
  return backward(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes, nonlinearity, reverse,
                  output_mask, used);
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
  m.def("_cpu_bfloat16_products() -> str", [] {
    using namespace rnnfast::cpu;
    return std::string(has_tiles() ? "amx" : has_bfloat16_products() ? "avx512_bf16" : "");
  });
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("rnn_layer", &rnnfast::cpu::rnn_layer);
  m.impl("rnn_bidirectional_layer", &rnnfast::cpu::rnn_bidirectional_layer);
  m.impl("rnn_layer_backward", &rnnfast::cpu::rnn_layer_backward);
  m.impl("_rnn_layer_backward_", &rnnfast::cpu::rnn_layer_backward_);
  m.impl("_tanh", &rnnfast::cpu::tanh);
}
