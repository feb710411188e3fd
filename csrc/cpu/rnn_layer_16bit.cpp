// A layer stored in float16, or in bfloat16 where the processor has no products of it. The
// arithmetic, and the state from step to step, are float32. Nothing large is widened whole, as nn.RNN
// widens nothing: W_hh goes straight into the time loop's panels; steps are taken in stretches; products
// over all steps widen a block of a weight and some rows at a time. Between the recurrence of the
// backward and its products, dz is stored in 16 bits, like the outputs, unless the weights are few
// beside the rows: then each stretch is done with before the next, by each thread for a part of the
// batch.
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

// A few numbers are widened before a call of the library's begins.
constexpr int64_t kFewNumbers = 32768;

template <class Stored>
void widen_few(float* to, int64_t ld, const Stored* from, int64_t n, int64_t m, int64_t stride_r,
               int64_t stride_c) {
  if (stride_c == 1 && stride_r == m && ld == m) return widen(from, 1, n * m, to);
  for (int64_t i = 0; i < n; ++i) widen(from + i * stride_r, stride_c, m, to + i * ld);
}

// to = x[r : r + n, c : c + m], of a 16-bit matrix x.
void widen_block(float* to, int64_t ld, const Tensor& x, int64_t r, int64_t n, int64_t c,
                 int64_t m) {
  if (n * m > kFewNumbers) {
    at::from_blob(to, {n, m}, {ld, 1}, at::kFloat).copy_(x.narrow(0, r, n).narrow(1, c, m));
    return;
  }
  AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "rnnfast::rnn_layer", [&] {
    const int64_t stride_r = x.stride(0), stride_c = x.stride(1);
    widen_few(to, ld, x.const_data_ptr<scalar_t>() + r * stride_r + c * stride_c, n, m, stride_r,
              stride_c);
  });
}

// The rows of some steps, of a 16-bit tensor [T, B, F] or [rows, F].
void widen_rows(float* to, const Tensor& x) {
  if (x.dim() == 2) return widen_block(to, x.size(1), x, 0, x.size(0), 0, x.size(1));
  if (x.numel() > kFewNumbers) {
    at::from_blob(to, x.sizes(), at::kFloat).copy_(x);
    return;
  }
  AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "rnnfast::rnn_layer", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    const bool even = x.stride(0) == x.size(1) * x.stride(1);
    const int64_t runs = even ? 1 : x.size(0), rows = x.size(0) * x.size(1) / runs, F = x.size(2);
    for (int64_t t = 0; t < runs; ++t) {
      widen_few(to + t * rows * F, F, from + t * x.stride(0), rows, F, x.stride(1), x.stride(2));
    }
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

// The sum of a^T b over pairs of matrices of as many rows, stored in 16 bits, in float32: a block of
// `result` at a time, over chunks of rows; or added to it, if that is in float32.
using Pairs = std::vector<std::pair<Tensor, Tensor>>;
void widened_outer_sum(const Tensor& result, const Pairs& pairs, int64_t spare) {
  const int64_t M = result.size(0), N = result.size(1);
  int64_t rows = 0;
  for (const auto& [a, b] : pairs) rows += a.size(0);
  const int64_t block = part_of(M, spare / (2 * N));
  const int64_t chunk = part_of(rows, spare / (2 * (block + N)));
  const bool own = worth_own_sums<float>(M * N);
  const auto options = result.options().dtype(at::kFloat);
  const bool begun = result.scalar_type() == at::kFloat;
  const Tensor sum = begun ? result : at::empty({block, N}, options);
  const Tensor wide_a = at::empty({chunk, block}, options), wide_b = at::empty({chunk, N}, options);
  float* a_data = wide_a.mutable_data_ptr<float>();
  float* b_data = wide_b.mutable_data_ptr<float>();
  for (int64_t m0 = 0; m0 < M; m0 += block) {
    const int64_t m = std::min(block, M - m0);
    Tensor sum_m = sum.narrow(0, begun ? m0 : 0, m);
    if (!begun) sum_m.zero_();
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
    if (!begun) result.narrow(0, m0, m).copy_(sum_m);
  }
}

// -------------------------------------------------------------------------- parts of the batch
//
// Where the weights are few beside the rows, each thread has a part of the batch for the whole layer:
// it widens, walks and sums its own rows, and nothing but its sums of gradients goes to another core.

// Whether float32 copies of the weights and of their gradients, for each part, take no more memory than
// the outputs; and the buffers of a step little of it.
bool few_weights(const Steps& steps, int64_t I, int64_t H, int64_t parts = 1) {
  return 4 * parts * (I + H) <= steps.rows && steps.walk.seq_len >= 8;
}

int64_t parts_of_batch(const Steps& steps, int64_t I, int64_t H) {
  if (steps.packed() || !few_weights(steps, I, H, 2)) return 1;
  int64_t parts = steps.sharing<float>(steps.walk, I + H, H, /*each=*/true).rows;
  while (parts > 1 && !few_weights(steps, I, H, parts)) --parts;
  return parts;
}

// f(part, begin, n) for each part of [0, size): that of n from `begin` on.
template <class F>
void for_each_part(int64_t size, int64_t parts, const F& f) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // as in the thread that called
    for (int64_t part = begin; part < end; ++part) {
      const int64_t from = size * part / parts;
      f(part, from, size * (part + 1) / parts - from);
    }
  });
}

OptionalTensor narrowed(const OptionalTensor& x, int64_t dim, int64_t begin, int64_t n) {
  return x ? OptionalTensor(x->narrow(dim, begin, n)) : std::nullopt;
}

void forward_of_part(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
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
  if (h0) f.h0 = Rows<const float>{h0->const_data_ptr<float>(), 0, H};
  if (T > 1) {
    const Sharing sharing = shared(steps, f.walk, fused ? I + H : H, H);
    f.w_hh = pack_widened(space, layer.w_hh, true, sharing);
    if (fused) {
      f.input_size = I;
      f.w_ih = pack_widened(space, layer.w_ih, true, sharing);
      f.bias = bias;
    }
  }
  const Tensor wide_x = stretches.buffer(I, false), wide_out = stretches.buffer(H, true);
  for (size_t i = 0; i < stretches.ranges().size(); ++i) {
    const auto range = stretches.ranges()[i];
    const Tensor x_s = steps.part(input, range.first, range.second);
    const Tensor out_s = steps.part(out, range.first, range.second);
    const Tensor rows = stretches.rows(wide_x, range, false);
    const Tensor z = stretches.rows(wide_out, range, true);
    widen_rows(wide_x.mutable_data_ptr<float>(), x_s);
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

// Gradients that are asked for: of the weights in float32, to be added to, the others in 16 bits; and dz,
// in 16 bits, where it outlives the walk.
struct Wanted {
  Tensor d_x, d_h, d_w_ih, d_w_hh, d_b, dz;
};

// c += a^T b, and column_sums += the sum of a's rows.
void add_outer(const Tensor& c, const float* a, const float* b, int64_t rows, float* column_sums) {
  const int64_t M = c.size(0), N = c.size(1);
  const OuterSum<float> f = {.rows = rows, .N = N, .a = a, .lda = M, .b = b, .ldb = N,
                             .c = c.mutable_data_ptr<float>(), .ldc = N,
                             .column_sums = column_sums};
  by_gradient_rows<float>(M, rows * M * N, [&](int64_t m0, int64_t m1) {
    time_loop<float>().outer_sum(f, m0, m1);
  });
}

// A stretch of steps at a time: its rows are widened, walked, and multiplied while they are at hand.
void backward_of_part(const Steps& steps, const OptionalTensor& grad_out,
                      const OptionalTensor& grad_h_n, const Tensor& input, const OptionalTensor& hx,
                      const Tensor& w_ih, const Tensor& w_hh, const Tensor& out, bool relu,
                      const Wanted& wanted) {
  const int64_t I = w_ih.size(1), H = w_hh.size(0), T = steps.walk.seq_len;
  const bool reverse = steps.walk.reverse;
  const int64_t spare = spare_floats(steps, I, H);
  const auto& loop = time_loop<float>();
  // Buffers of dz and h, each with the step before, of x and of d_x.
  const int64_t most = (spare - 2 * steps.walk.batch * H) / (2 * (I + H));
  const Stretches<float> stretches(steps, !reverse, std::clamp<int64_t>(most, 32, 512));
  Space<float> packed(loop.packed_size(H, H));
  float* space = packed.data();
  Backward<float> f;
  f.walk = steps.walk;
  f.hidden_size = H;
  f.relu = relu;
  f.w_hh = pack_widened(space, w_hh, false, shared(steps, f.walk, H, H));
  const OptionalTensor g_n = widened(grad_h_n);
  if (g_n) f.grad_h_n = Rows<const float>{g_n->const_data_ptr<float>(), 0, H};

  const Tensor& d_w_ih = wanted.d_w_ih;
  const Tensor& d_w_hh = wanted.d_w_hh;
  float* d_b = wanted.d_b.defined() ? wanted.d_b.mutable_data_ptr<float>() : nullptr;
  const Tensor wide_w_ih = wanted.d_x.defined() ? *widened(w_ih) : Tensor();
  const Tensor d_x = wanted.d_x.defined() ? stretches.buffer(I, false) : Tensor();
  const Tensor wide_x = d_w_ih.defined() ? stretches.buffer(I, false) : Tensor();
  const Tensor wide_h = stretches.buffer(H, true), wide_dz = stretches.buffer(H, true);
  const bool entered = hx && (wanted.d_h.defined() || d_w_hh.defined());
  const Tensor dz_first = entered ? empty({steps.walk.batch, H}, at::kFloat) : Tensor();
  for (size_t i = 0; i < stretches.ranges().size(); ++i) {
    const auto range = stretches.ranges()[i];
    const auto [begin, end] = range;
    const Tensor dz = stretches.rows(wide_dz, range, true);
    const int64_t n_rows = dz.size(0);
    stretches.carry(wide_dz, i);
    // The outputs of the stretch, and of the step from which the forward entered it.
    const int64_t h_begin = begin - (!reverse && begin > 0), h_end = end + (reverse && end < T);
    widen_rows(wide_h.mutable_data_ptr<float>(), steps.part(out, h_begin, h_end));
    const auto h_row = [&](int64_t row) {
      return wide_h.const_data_ptr<float>() + (row - steps.row(h_begin)) * H;
    };
    f.walk.begin = begin;
    f.walk.end = end;
    f.out = {h_row(0), steps.walk.batch * H, H};
    f.dz = stretches.addressed(wide_dz, range, true);
    if (grad_out) {  // each number is read where its dz is written
      widen_rows(dz.mutable_data_ptr<float>(), steps.part(*grad_out, begin, end));
      f.grad_out = Rows<const float>{f.dz.data, f.dz.stride_t, f.dz.stride_b};
    }
    steps.parallel<float>(f.walk, shared(steps, f.walk, H, H), H,
                          [&](const Share& share) { loop.backward(f, share); });

    const float* dz_rows = dz.const_data_ptr<float>();
    const int64_t first = steps.row(begin);
    if (wanted.dz.defined()) {
      const Tensor to = steps.part(wanted.dz, begin, end);
      to.copy_(dz.view(to.sizes()));
    }
    if (d_w_ih.defined()) {
      float* x = wide_x.mutable_data_ptr<float>();
      widen_rows(x, steps.part(input, begin, end));
      add_outer(d_w_ih, dz_rows, x, n_rows, d_b);
    } else if (d_b) {
      wanted.d_b.add_(dz.sum(0));
    }
    if (d_w_hh.defined()) {
      steps.for_each_shift(begin, end, [&](int64_t at, int64_t before, int64_t n) {
        add_outer(d_w_hh, dz_rows + (at - first) * H, h_row(before), n, nullptr);
      });
    }
    if (entered) {
      steps.for_each_start(begin, end, [&](int64_t at, int64_t b, int64_t n) {
        Steps::copy_rows(dz, at - first, dz_first, b, n);
      });
    }
    if (wanted.d_x.defined()) {
      const Tensor rows = d_x.narrow(0, 0, n_rows);
      product_into<float>(rows, Tensor(), dz, wide_w_ih);
      const Tensor to = steps.part(wanted.d_x, begin, end);
      to.copy_(rows.view(to.sizes()));
    }
  }
  if (!entered) return;
  if (d_w_hh.defined()) {
    const Tensor h0 = *widened(hx);
    add_outer(d_w_hh, dz_first.const_data_ptr<float>(), h0.const_data_ptr<float>(), h0.size(0),
              nullptr);
  }
  if (wanted.d_h.defined()) wanted.d_h.copy_(at::mm(dz_first, *widened(w_hh)));
}

// The same for parts of the batch, whose sums are added up at the end.
Gradients backward_by_parts(int64_t parts, const Steps& steps, const OptionalTensor& grad_out,
                            const OptionalTensor& grad_h_n, const Tensor& input,
                            const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                            const Tensor& out, bool relu, std::array<bool, 5> output_mask,
                            const Tensor& kept, const Given& given) {
  const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
  const int64_t I = w_ih.size(1), H = w_hh.size(0);
  const Tensor dz = kept.defined() ? kept.view(out.sizes()) : Tensor();
  const auto stored = input.scalar_type();
  const auto sums = [&](bool need, at::IntArrayRef sizes) {
    return need ? zeros(sizes, at::kFloat) : Tensor();
  };
  std::vector<Wanted> wanted(parts);
  for (Wanted& part : wanted) {
    part.d_w_ih = sums(need_w_ih, {H, I});
    part.d_w_hh = sums(need_w_hh, {H, H});
    part.d_b = sums(need_b, {H});
  }
  Wanted& all = wanted[0];
  if (given.d_w_ih.defined()) all.d_w_ih = given.d_w_ih;
  if (given.d_w_hh.defined()) all.d_w_hh = given.d_w_hh;
  if (given.d_b.defined()) all.d_b = given.d_b;
  Tensor d_x = need_x && !kept.defined() ? empty(input.sizes(), stored) : Tensor();
  const Tensor d_h = need_h && hx ? empty(hx->sizes(), stored) : Tensor();
  if (parts == 1) {
    all.d_x = d_x;
    all.d_h = d_h;
    all.dz = dz;
    backward_of_part(steps, grad_out, grad_h_n, input, hx, w_ih, w_hh, out, relu, all);
  } else {
    for_each_part(steps.walk.batch, parts, [&](int64_t part, int64_t b0, int64_t n) {
      const Tensor x = input.narrow(1, b0, n);
      Wanted& own = wanted[part];
      if (d_x.defined()) own.d_x = d_x.narrow(1, b0, n);
      if (dz.defined()) own.dz = dz.narrow(1, b0, n);
      if (d_h.defined()) own.d_h = d_h.narrow(0, b0, n);
      backward_of_part(Steps(x, std::nullopt, steps.walk.reverse), narrowed(grad_out, 1, b0, n),
                       narrowed(grad_h_n, 0, b0, n), x, narrowed(hx, 0, b0, n), w_ih, w_hh,
                       out.narrow(1, b0, n), relu, own);
    });
  }
  if (need_x && kept.defined()) {
    release(out);
    d_x = empty(input.sizes(), stored);
    const Tensor d_rows = flat(d_x);
    const int64_t spare = spare_floats(steps, I, H) / parts;
    for_each_part(steps.rows, parts, [&](int64_t, int64_t r, int64_t n) {
      widened_product(d_rows.narrow(0, r, n), kept.narrow(0, r, n), w_ih, spare);
    });
  }
  const auto total = [&](Tensor Wanted::*sum, const Tensor& begun) {
    if (!(all.*sum).defined()) return Tensor();
    for (int64_t part = 1; part < parts; ++part) (all.*sum).add_(wanted[part].*sum);
    return begun.defined() ? Tensor() : (all.*sum).to(stored);
  };
  return {d_x, d_h, total(&Wanted::d_w_ih, given.d_w_ih), total(&Wanted::d_w_hh, given.d_w_hh),
          total(&Wanted::d_b, given.d_b)};
}
}  // namespace

void forward_16bit(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                   const Tensor& out) {
  const int64_t parts = parts_of_batch(steps, layer.w_ih.size(1), layer.w_hh.size(0));
  if (parts == 1) return forward_of_part(steps, input, layer, relu, out);
  for_each_part(steps.walk.batch, parts, [&](int64_t, int64_t b0, int64_t n) {
    const Tensor x = input.narrow(1, b0, n);
    Direction own = layer;
    own.hx = narrowed(layer.hx, 0, b0, n);
    forward_of_part(Steps(x, std::nullopt, steps.walk.reverse), x, own, relu, out.narrow(1, b0, n));
  });
}

Gradients backward_16bit(const Steps& steps, const OptionalTensor& grad_out,
                         const OptionalTensor& grad_h_n, const Tensor& input,
                         const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                         const Tensor& out, bool relu, std::array<bool, 5> output_mask,
                         const Tensor& place, const Given& given) {
  const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
  const int64_t I = w_ih.size(1), H = w_hh.size(0), T = steps.walk.seq_len;
  const bool own_sums = worth_own_sums<float>(H * std::max(I, H));
  if (own_sums && few_weights(steps, I, H)) {
    return backward_by_parts(parts_of_batch(steps, I, H), steps, grad_out, grad_h_n, input, hx, w_ih,
                             w_hh, out, relu, output_mask,
                             given.out && need_x ? place : Tensor(), given);
  }
  const int64_t spare = spare_floats(steps, I, H);
  const auto& loop = time_loop<float>();
  const Tensor z = place.defined() ? place : empty({steps.rows, H}, out.scalar_type());
  const Tensor dz = z.view(out.sizes());
  Tensor d_b = given.d_b;
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
      widen_rows(wide_out.mutable_data_ptr<float>(), out_s);
      stretches.carry(wide_dz, i);
      std::tie(f.walk.begin, f.walk.end) = range;
      const Rows<float> h_rows = stretches.addressed(wide_out, range, false);
      f.out = Rows<const float>{h_rows.data, h_rows.stride_t, h_rows.stride_b};
      f.dz = stretches.addressed(wide_dz, range, true);
      if (grad_out) {  // each number is read where its dz is written
        widen_rows(rows.mutable_data_ptr<float>(), steps.part(*grad_out, range.first, range.second));
        f.grad_out = Rows<const float>{f.dz.data, f.dz.stride_t, f.dz.stride_b};
      }
      steps.parallel<float>(f.walk, shared(steps, f.walk, H, H), H,
                            [&](const Share& share) { loop.backward(f, share); });
      dz_s.copy_(rows.view(dz_s.sizes()));
      if (need_b) d_b = d_b.defined() ? d_b.add_(rows.sum(0)) : rows.sum(0);
    }
  }

  const bool reverse = steps.walk.reverse;
  const Tensor z_first =
      hx && (need_h || need_w_hh) ? (reverse ? steps.last(dz) : steps.first(dz)) : Tensor();
  Tensor d_x, d_h, d_w_ih = given.d_w_ih, d_w_hh = given.d_w_hh;
  if (need_w_hh) {
    const Tensor h = flat(out);
    if (!d_w_hh.defined()) d_w_hh = at::empty({H, H}, dz.options());
    Pairs pairs;
    if (hx) pairs.emplace_back(z_first, *hx);
    steps.for_each_shift(0, T, [&](int64_t at, int64_t before, int64_t n) {
      pairs.emplace_back(z.narrow(0, at, n), h.narrow(0, before, n));
    });
    widened_outer_sum(d_w_hh, pairs, spare);
  }
  if (given.out) release(out);
  if (need_x) {
    d_x = empty(input.sizes(), dz.scalar_type());
    widened_product(flat(d_x), z, w_ih, spare);
  }
  if (hx && need_h) {
    d_h = at::empty(hx->sizes(), dz.options());
    widened_product(d_h, z_first, w_hh, spare);
  }
  if (need_w_ih) {
    if (!d_w_ih.defined()) d_w_ih = at::empty({H, I}, dz.options());
    widened_outer_sum(d_w_ih, {{z, flat(input)}}, spare);
  }
  const auto unless = [](const Tensor& begun, const Tensor& gradient) {
    return begun.defined() ? Tensor() : gradient;
  };
  if (need_b && !given.d_b.defined()) d_b = d_b.to(dz.scalar_type());
  return {d_x, d_h, unless(given.d_w_ih, d_w_ih), unless(given.d_w_hh, d_w_hh),
          unless(given.d_b, d_b)};
}

}  // namespace rnnfast::cpu
