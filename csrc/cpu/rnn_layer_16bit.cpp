// A layer stored in float16, or in bfloat16 where the processor has no products of it. The
// arithmetic, and the state from step to step, are float32. Nothing is widened whole, so that a step
// of training needs no more memory than nn.RNN's, which widens nothing: W_hh goes straight into the
// time loop's panels; steps are taken in stretches; products over all steps widen a block of a
// weight and some rows at a time. Between the recurrence of the backward and its products, dz is
// stored in 16 bits, like the outputs.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "../op.h"
#include "packing.h"
#include "products.h"
#include "rnn_layer_16bit.h"
#include "steps.h"
#include "tensors.h"
#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

// Floats that temporaries may take. nn.RNN holds an output beside ours, or a weight's gradient;
// with a single step hardly anything, but smaller blocks would cost more calls.
int64_t spare_floats(const Steps& steps, int64_t I, int64_t H) {
  return std::max(H * (I + H), steps.rows * H) / 4;
}

// Rows that a stretch widens: two buffers of them, and the step before.
int64_t rows_at_a_time(const Steps& steps, int64_t H, int64_t spare) {
  return std::clamp<int64_t>((spare / H - steps.walk.batch) / 2, 32, 512);
}

// The size of equal parts of `all` rows, or columns, of `most` or 32.
int64_t part_of(int64_t all, int64_t most) {
  most = std::max<int64_t>(most, 32);
  const int64_t parts = std::max<int64_t>((all + most - 1) / most, 1);
  return std::max<int64_t>((all + parts - 1) / parts, 1);
}

// Weights are widened and packed once for all threads.
Sharing shared(const Steps& steps, const Walk& walk, int64_t K, int64_t H) {
  return steps.sharing<float>(walk, K, H, /*each=*/false);
}

const float* pack_widened(float*& space, const Tensor& w, bool transposed, Sharing sharing) {
  return AT_DISPATCH_REDUCED_FLOATING_TYPES(w.scalar_type(), "rnnfast::rnn_layer", [&] {
    return pack_into<float, scalar_t>(space, w, transposed, sharing);
  });
}

OptionalTensor widened(const OptionalTensor& x) {
  return x ? OptionalTensor(x->to(at::kFloat).contiguous()) : std::nullopt;
}

// to = x[r : r + n, c : c + m], of a 16-bit matrix x. A few numbers are done before a call of the
// library's begins.
void widen_block(float* to, int64_t ld, const Tensor& x, int64_t r, int64_t n, int64_t c,
                 int64_t m) {
  if (n * m > 32768) {
    at::from_blob(to, {n, m}, {ld, 1}, at::kFloat).copy_(x.narrow(0, r, n).narrow(1, c, m));
    return;
  }
  AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "rnnfast::rnn_layer", [&] {
    const int64_t stride_r = x.stride(0), stride_c = x.stride(1);
    const scalar_t* from = x.const_data_ptr<scalar_t>() + r * stride_r + c * stride_c;
    if (stride_c == 1 && stride_r == m && ld == m) return widen(from, 1, n * m, to);
    for (int64_t i = 0; i < n; ++i) widen(from + i * stride_r, stride_c, m, to + i * ld);
  });
}

// z += x w^T in float32, of a 16-bit w, of which `most` numbers are widened at a time.
void add_widened_linear(const Tensor& z, const Tensor& x, const Tensor& w, int64_t most) {
  constexpr int64_t kFewRows = 56;  // beyond, the library's product is the faster
  const int64_t rows = x.size(0), N = w.size(0), block = part_of(N, most / w.size(1));
  const Tensor wide = at::empty({block, w.size(1)}, x.options());
  for (int64_t n0 = 0; n0 < N; n0 += block) {
    const int64_t n = std::min(block, N - n0);
    const Tensor w_n = wide.narrow(0, 0, n);
    w_n.copy_(w.narrow(0, n0, n));
    Tensor z_n = z.narrow(1, n0, n);
    if (rows > kFewRows && !few_columns<float>(w.size(1), N)) {
      product_into<float>(z_n, z_n, x, w_n.t());
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
      product_into<float>(y_n, Tensor(), x_r, w_n);
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
  const bool own = worth_own_sums<float>(M * N);
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
        const OuterSum<float> f = {.rows = filled, .N = N, .a = a_data, .lda = block, .b = b_data,
                                   .ldb = N, .c = sum_m.mutable_data_ptr<float>(), .ldc = N};
        by_gradient_rows<float>(m, filled * m * N, [&](int64_t begin, int64_t end) {
          time_loop<float>().outer_sum(f, begin, end);
        });
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

}  // namespace

void forward_16bit(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                   const Tensor& out) {
  const int64_t I = layer.w_ih.size(1), H = layer.w_hh.size(0), T = steps.walk.seq_len;
  const auto& loop = time_loop<float>();
  const int64_t spare = spare_floats(steps, I, H);
  const Stretches<float> stretches(steps, steps.walk.reverse, rows_at_a_time(steps, H, spare));
  // A packed W_ih of many more weights than the output has numbers would be most of the memory.
  const bool fused = T > 1 && worth_fusing<float>(steps, I, H) &&
                     (I <= 8 || (I <= 256 && steps.rows >= H));
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
  const Sharing sharing = shared(steps, f.walk, fused ? I + H : H, H);
  if (T > 1) f.w_hh = pack_widened(space, layer.w_hh, true, sharing);
  if (h0) f.h0 = Rows<const float>{h0->const_data_ptr<float>(), 0, H};
  if (fused) {
    f.input_size = I;
    f.w_ih = pack_widened(space, layer.w_ih, true, sharing);
    f.bias = bias;
  }
  const Tensor wide_x = stretches.buffer(I, false), wide_out = stretches.buffer(H, true);
  for (size_t i = 0; i < stretches.ranges().size(); ++i) {
    const auto range = stretches.ranges()[i];
    const Tensor x_s = steps.part(input, range.first, range.second);
    const Tensor out_s = steps.part(out, range.first, range.second);
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
      steps.parallel<float>(f.walk, shared(steps, f.walk, H + f.input_size, H), H,
                            [&](const Share& share) { loop.forward(f, share); });
    } else {
      if (h0) add_widened_linear(z, *h0, layer.w_hh, spare / 2);
      at::parallel_for(0, z.numel(), 16384, [&](int64_t begin, int64_t end) {
        float* some = z.mutable_data_ptr<float>() + begin;
        loop.activate(some, end - begin, relu, some);
      });
    }
    out_s.copy_(z.view(out_s.sizes()));
  }
}

Gradients backward_16bit(const Steps& steps, const OptionalTensor& grad_out,
                         const OptionalTensor& grad_h_n, const Tensor& input,
                         const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                         const Tensor& out, bool relu, std::array<bool, 5> output_mask) {
  const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
  const int64_t I = w_ih.size(1), H = w_hh.size(0), T = steps.walk.seq_len;
  const int64_t spare = spare_floats(steps, I, H);
  const auto& loop = time_loop<float>();
  const Tensor dz = empty(out.sizes(), out.scalar_type());
  Tensor d_b;
  {
    const Stretches<float> stretches(steps, !steps.walk.reverse, rows_at_a_time(steps, H, spare));
    Space<float> packed(T > 1 ? loop.packed_size(H, H) : 0);
    float* space = packed.data();
    Backward<float> f;
    f.walk = steps.walk;
    f.hidden_size = H;
    f.relu = relu;
    if (T > 1) f.w_hh = pack_widened(space, w_hh, false, shared(steps, f.walk, H, H));
    const OptionalTensor g_n = widened(grad_h_n);
    if (g_n) f.grad_h_n = Rows<const float>{g_n->const_data_ptr<float>(), 0, H};
    const Tensor wide_out = stretches.buffer(H, false), wide_dz = stretches.buffer(H, true);
    for (size_t i = 0; i < stretches.ranges().size(); ++i) {
      const auto range = stretches.ranges()[i];
      const Tensor out_s = steps.part(out, range.first, range.second);
      const Tensor dz_s = steps.part(dz, range.first, range.second);
      const Tensor rows = stretches.rows(wide_dz, range, true);
      widen_block(wide_out.mutable_data_ptr<float>(), H, flat(out_s), 0, rows.size(0), 0, H);
      stretches.carry(wide_dz, i);
      std::tie(f.walk.begin, f.walk.end) = range;
      const Rows<float> h_rows = stretches.addressed(wide_out, range, false);
      f.out = Rows<const float>{h_rows.data, h_rows.stride_t, h_rows.stride_b};
      f.dz = stretches.addressed(wide_dz, range, true);
      if (grad_out) {  // each number is read where its dz is written
        const Tensor g_s = flat(steps.part(*grad_out, range.first, range.second));
        widen_block(rows.mutable_data_ptr<float>(), H, g_s, 0, rows.size(0), 0, H);
        f.grad_out = Rows<const float>{f.dz.data, f.dz.stride_t, f.dz.stride_b};
      }
      steps.parallel<float>(f.walk, shared(steps, f.walk, H, H), H,
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
    steps.for_each_shift(0, T, [&](int64_t at, int64_t before, int64_t n) {
      pairs.emplace_back(z.narrow(0, at, n), h.narrow(0, before, n));
    });
    widened_outer_sum(d_w_hh, pairs, spare);
  }
  if (need_x) {
    d_x = empty(input.sizes(), dz.scalar_type());
    widened_product(flat(d_x), z, w_ih, spare);
  }
  if (hx && need_h) {
    d_h = at::empty(hx->sizes(), dz.options());
    widened_product(d_h, z_first, w_hh, spare);
  }
  return {d_x, d_h, d_w_ih, d_w_hh, need_b ? d_b.to(dz.scalar_type()) : d_b};
}

}  // namespace rnnfast::cpu
