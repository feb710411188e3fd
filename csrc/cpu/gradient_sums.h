// The gradients of a layer from dz, which a backward walk leaves a stretch of steps at a time:
//
//   d_x = dz W_ih,  d_h = dz_first W_hh,  d_w_ih = sum dz x^T,  d_w_hh = sum dz h_before^T,  d_b = sum dz
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "../op.h"
#include "products.h"
#include "steps.h"
#include "tensors.h"
#include "time_loop.h"

namespace rnnfast::cpu {

// Whether gradients of bfloat16 are summed in float32 as a whole, which takes twice their memory, or a
// block of their rows at a time, of all steps, which takes that of dz: nn.RNN holds two outputs.
inline bool worth_wide_sums(const Steps& steps, int64_t I, int64_t H) {
  return steps.rows >= 2 * (I + H);
}

// Into how many parts the rows are divided, each summed by a thread of its own, and the sums added up
// at the end; or one, if it takes less that threads divide the rows of a gradient, where each fetches
// all of dz, x and h from where they were written. The sums are of half as many numbers as dz at most.
template <class T>
int64_t parts_of_rows(int64_t rows, int64_t I, int64_t H) {
  const int64_t work = as_work<T>(H * (I + H)), fetching = (2 * H + I) * sizeof(T) * kFetchedByte;
  const int64_t fitting = rows / (2 * (I + H));
  if (fitting <= 1) return 1;
  const int64_t most = threads_for(rows * work);
  const int64_t parts = std::min(most, fitting);
  return parts > 1 && (work + fetching) / parts < work / most + fetching ? parts : 1;
}

// Those that output_mask asks for, summed over stretches of dz: d_x = dz W_ih, d_h = dz_first W_hh,
// d_w_ih = sum dz x^T, d_w_hh = sum dz h_before^T and d_b = sum dz.
template <class T>
class GradientSums {
 public:
  GradientSums(const Steps& steps, const Tensor& input, const OptionalTensor& hx,
               const Tensor& w_ih, const Tensor& w_hh, const Tensor& out, const Given& given,
               std::array<bool, 5> output_mask)
      : steps_(steps), input_(input), hx_(hx), w_ih_(w_ih), w_hh_(w_hh), given_out_(out),
        given_(given), I_(w_ih.size(1)), H_(w_hh.size(0)), d_w_ih_(given.d_w_ih),
        d_w_hh_(given.d_w_hh), d_b_(given.d_b) {
    const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = output_mask;
    need_ = output_mask;
    const bool begun = d_w_ih_.defined() || d_w_hh_.defined() || d_b_.defined();
    by_blocks_ = kInPairs<T> && !begun && !worth_wide_sums(steps, I_, H_);
    own_w_ih_ = need_w_ih && worth_own_sums<T>(H_ * I_, !by_blocks_);
    own_w_hh_ = need_w_hh && worth_own_sums<T>(H_ * H_, !by_blocks_);
    if ((own_w_ih_ || own_w_hh_) && !by_blocks_) parts_ = parts_of_rows<T>(steps.rows, I_, H_);
    w_hh_at_ = own_w_ih_ ? H_ * I_ : 0;
    b_at_ = w_hh_at_ + (own_w_hh_ ? H_ * H_ : 0);
    out_ = own_w_hh_ ? evenly_spaced(adjacent_features(out)) : flat(out);
  }

  // Of steps [begin, end), whose rows of dz are z.
  void add(int64_t begin, int64_t end, const Tensor& z) {
    const auto [need_x, need_h, need_w_ih, need_w_hh, need_b] = need_;
    const int64_t row = steps_.row(begin);
    const bool whole = z.size(0) == steps_.rows;
    // Before there are sums, which the packed weights would add to.
    if (need_x && !whole) add_d_x(begin, end, z);
    if (hx_ && (need_h || need_w_hh)) {
      if (steps_.rows == steps_.walk.batch) {  // a single step
        z_first_ = z;
        add_d_h();
      } else {
        if (!z_first_.defined()) z_first_ = empty({steps_.walk.batch, H_}, z.scalar_type());
        steps_.for_each_start(begin, end, [&](int64_t at, int64_t b, int64_t n) {
          Steps::copy_rows(z, at - row, z_first_, b, n);
        });
      }
    }
    if (!need_x || !whole) return add_weights(begin, end, z, /*ih=*/true, /*hh=*/true);
    // In this order d_x takes the memory that the outputs leave, and the weights packed for it are gone
    // before the last sum.
    add_weights(begin, end, z, /*ih=*/false, /*hh=*/true);
    if (given_.out) release(given_out_);
    add_d_x(begin, end, z);
    add_weights(begin, end, z, /*ih=*/true, /*hh=*/false);
  }

  // When every step has been added.
  Gradients take() {
    const bool need_w_hh = need_[3];
    if (!d_h_.defined()) add_d_h();
    add_others();
    if (hx_ && own_w_hh_ && !by_blocks_) {
      const Tensor h0 = adjacent_features(*hx_);
      by_gradient_rows<T>(H_, steps_.walk.batch * H_ * H_, [&](int64_t m0, int64_t m1) {
        Space<T> space(time_loop<T>().outer_sum_space(steps_.walk.batch, H_));
        OuterSum<T> f = w_hh_sum(h0, data_of<Sum<T>>(d_w_hh_), space.data());
        f.rows = steps_.walk.batch;
        f.a = data_of<const T>(z_first_);
        f.lda = row_stride(z_first_);
        f.b = data_of<const T>(h0);
        time_loop<T>().outer_sum(f, m0, m1);
      });
    } else if (hx_ && need_w_hh && !own_w_hh_) {
      add_product(d_w_hh_, z_first_, *hx_);
    }
    if (need_w_hh && !d_w_hh_.defined()) d_w_hh_ = zeros({H_, H_}, out_.scalar_type());
    const auto stored = [&](const Tensor& sum, const Tensor& begun) {
      if (begun.defined()) return Tensor();
      // `to` would cost a small call a dispatch.
      const bool wide = sum.defined() && sum.scalar_type() != out_.scalar_type();
      return wide ? sum.to(out_.scalar_type()) : sum;
    };
    return {d_x_, d_h_, stored(d_w_ih_, given_.d_w_ih), stored(d_w_hh_, given_.d_w_hh),
            stored(d_b_, given_.d_b)};
  }

 private:
  static constexpr auto kSums = c10::CppTypeToScalarType<Element<Sum<T>>>::value;

  static void add_product(Tensor& sum, const Tensor& z, const Tensor& x) {
    sum.defined() ? (void)sum.addmm_(z.t(), x) : (void)(sum = at::mm(z.t(), x));
  }

  void add_d_x(int64_t begin, int64_t end, const Tensor& z) {
    if (!d_x_.defined()) d_x_ = empty(input_.sizes(), z.scalar_type());
    product_into<T>(flat(steps_.part(d_x_, begin, end)), Tensor(), z, w_ih_);
  }

  // To the gradients of W_ih and the bias, of W_hh, or all of them.
  void add_weights(int64_t begin, int64_t end, const Tensor& z, bool ih, bool hh) {
    const bool need_w_ih = ih && need_[2], need_w_hh = hh && need_[3], need_b = ih && need_[4];
    const bool own_ih = ih && own_w_ih_, own_hh = hh && own_w_hh_;
    const auto begin_sum = [](Tensor& sum, at::IntArrayRef sizes) {
      if (!sum.defined()) sum = zeros(sizes, kSums);
    };
    if (own_ih && !by_blocks_) begin_sum(d_w_ih_, {H_, I_});
    if (own_hh && !by_blocks_) begin_sum(d_w_hh_, {H_, H_});
    if (own_ih && need_b) begin_sum(d_b_, {H_});
    if (parts_ > 1) begin_sum(others_, {parts_ - 1, b_at_ + H_});
    if (own_ih || own_hh) {
      by_blocks_ ? sum_blocks(z, own_ih, own_hh) : add_own(begin, end, z, own_ih, own_hh);
    }
    if (need_w_ih && !own_ih) add_product(d_w_ih_, z, flat(steps_.part(input_, begin, end)));
    if (need_w_hh && !own_hh) add_w_hh_of_library(begin, end, z);
    if (need_b && !own_ih) {
      // Of another dtype than z's, the sum would be that of a copy.
      const Tensor sum = by_blocks_ ? z.sum(0) : z.sum(0, /*keepdim=*/false, kSums);
      d_b_ = d_b_.defined() ? d_b_.add_(sum) : sum;
    }
  }

  void add_d_h() {
    const bool need_h = need_[1];
    if (!hx_ || !need_h) return;
    d_h_ = empty({steps_.walk.batch, H_}, z_first_.scalar_type());
    product_into<T>(d_h_, Tensor(), z_first_, w_hh_);
  }

  OuterSum<T> w_hh_sum(const Tensor& h, Sum<T>* c, T* space) const {
    OuterSum<T> f;
    f.N = f.ldc = H_;
    f.ldb = row_stride(h);
    f.c = c;
    f.space = space;
    return f;
  }

  // Of a part of the rows: the first's is the gradient, the others' are `at` in a row of others_.
  Sum<T>* sum_of(int64_t part, const Tensor& gradient, int64_t at) const {
    if (!gradient.defined()) return nullptr;
    return part == 0 ? data_of<Sum<T>>(gradient)
                     : data_of<Sum<T>>(others_) + (part - 1) * others_.size(1) + at;
  }

  void add_own(int64_t begin, int64_t end, const Tensor& z, bool ih, bool hh) {
    const auto& loop = time_loop<T>();
    Tensor x;
    if (ih) x = evenly_spaced(adjacent_features(steps_.part(input_, begin, end)));
    const T* data = data_of<const T>(z);
    const int64_t rows = z.size(0), ldz = row_stride(z), row = steps_.row(begin);
    // Rows [m0, m1) of the gradients, of rows [r0, r1) of z.
    const auto sum = [&](int64_t part, int64_t m0, int64_t m1, int64_t r0, int64_t r1) {
      Space<T> space(std::max(ih ? loop.outer_sum_space(r1 - r0, I_) : 0,
                              hh ? loop.outer_sum_space(r1 - r0, H_) : 0));
      if (ih) {
        OuterSum<T> f;
        f.rows = r1 - r0;
        f.lda = ldz;
        f.N = f.ldc = I_;
        f.a = data + r0 * ldz;
        f.ldb = row_stride(x);
        f.b = data_of<const T>(x) + r0 * f.ldb;
        f.c = sum_of(part, d_w_ih_, 0);
        f.column_sums = sum_of(part, d_b_, b_at_);
        f.space = space.data();
        loop.outer_sum(f, m0, m1);
      }
      if (!hh) return;
      OuterSum<T> f = w_hh_sum(out_, sum_of(part, d_w_hh_, w_hh_at_), space.data());
      steps_.for_each_shift(begin, end, [&](int64_t at, int64_t before, int64_t n) {
        const int64_t first = std::max(at - row, r0), last = std::min(at - row + n, r1);
        if (first >= last) return;
        f.rows = last - first;
        f.a = data + first * ldz;
        f.lda = ldz;
        f.b = data_of<const T>(out_) + (before + first - (at - row)) * f.ldb;
        loop.outer_sum(f, m0, m1);
      });
    };
    if (parts_ == 1) {
      const int64_t terms = (ih ? I_ : 0) + (hh ? H_ : 0);
      return by_gradient_rows<T>(H_, rows * H_ * terms, [&](int64_t m0, int64_t m1) {
        sum(0, m0, m1, 0, rows);
      });
    }
    at::parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        sum(part, 0, H_, rows * part / parts_, rows * (part + 1) / parts_);
      }
    });
  }

  // The sums of the other parts to the first's.
  void add_others() {
    if (!others_.defined()) return;
    const auto add = [&](const Tensor& gradient, int64_t at) {
      if (!gradient.defined()) return;
      constexpr int64_t kGrain = 16384;
      at::parallel_for(0, gradient.numel(), kGrain, [&](int64_t begin, int64_t end) {
        Sum<T>* to = sum_of(0, gradient, at);
        for (int64_t part = 1; part < parts_; ++part) {
          const Sum<T>* from = sum_of(part, gradient, at);
          for (int64_t i = begin; i < end; ++i) to[i] += from[i];
        }
      });
    };
    if (own_w_ih_) add(d_w_ih_, 0);
    if (own_w_hh_) add(d_w_hh_, w_hh_at_);
    if (own_w_ih_) add(d_b_, b_at_);
    others_.reset();
  }

  // Of all steps, whose dz is z, a block of a gradient's rows at a time.
  void sum_blocks(const Tensor& z, bool ih, bool hh) {
    const T* data = data_of<const T>(z);
    const int64_t ldz = row_stride(z);
    if (ih) {
      const Tensor x = evenly_spaced(adjacent_features(input_));
      d_w_ih_ = summed_blocks(I_, d_b_, [&](const auto& add) {
        add(data, ldz, data_of<const T>(x), row_stride(x), z.size(0));
      });
    }
    if (!hh) return;
    const Tensor h0 = hx_ ? adjacent_features(*hx_) : Tensor();
    const int64_t ldb = row_stride(out_);
    d_w_hh_ = summed_blocks(H_, Tensor(), [&](const auto& add) {
      if (hx_) {
        add(data_of<const T>(z_first_), row_stride(z_first_), data_of<const T>(h0), row_stride(h0),
            h0.size(0));
      }
      steps_.for_each_shift(0, steps_.walk.seq_len, [&](int64_t at, int64_t before, int64_t n) {
        add(data + at * ldz, ldz, data_of<const T>(out_) + before * ldb, ldb, n);
      });
    });
  }

  // [H, N], of runs(add), which calls add(a, lda, b, ldb, n) for products of n rows of a and b.
  template <class Runs>
  Tensor summed_blocks(int64_t N, const Tensor& column_sums, const Runs& runs) const {
    const int64_t most = std::max<int64_t>(H_ * (I_ + H_) / (8 * N) / 32 * 32, 32);
    const Tensor result = empty({H_, N}, out_.scalar_type());
    const Tensor sums = zeros({std::min(most, H_), N}, kSums);
    // A view of all of it would cost a small call a dispatch.
    const auto rows_of = [](const Tensor& x, int64_t m, int64_t n) {
      return n == x.size(0) ? x : x.narrow(0, m, n);
    };
    for (int64_t m = 0; m < H_; m += most) {
      const int64_t rows = std::min(most, H_ - m);
      const Tensor block = rows_of(sums, 0, rows);
      if (m > 0) block.zero_();
      by_gradient_rows<T>(rows, steps_.rows * rows * N, [&](int64_t m0, int64_t m1) {
        Space<T> space(time_loop<T>().outer_sum_space(steps_.rows, N));
        OuterSum<T> f;
        f.N = f.ldc = N;
        f.c = data_of<Sum<T>>(block);
        f.column_sums = column_sums.defined() ? data_of<Sum<T>>(column_sums) + m : nullptr;
        f.space = space.data();
        runs([&](const T* a, int64_t lda, const T* b, int64_t ldb, int64_t n) {
          f.rows = n;
          f.a = a + m;
          f.lda = lda;
          f.b = b;
          f.ldb = ldb;
          time_loop<T>().outer_sum(f, m0, m1);
        });
      });
      rows_of(result, m, rows).copy_(block);
    }
    return result;
  }

  // The runs of a packed batch are short, and each would read and write the whole sum: gathered,
  // they are one.
  void add_w_hh_of_library(int64_t begin, int64_t end, const Tensor& z) {
    Gathered late(z), early(out_);  // dz, and the state before it
    const int64_t row = steps_.row(begin);
    steps_.for_each_shift(begin, end, [&](int64_t at, int64_t before, int64_t n) {
      late.add(at - row, n);
      early.add(before, n);
    });
    if (!late.parts.empty()) add_product(d_w_hh_, late.rows(), early.rows());
  }

  // Rows of x that follow each other are one part, and no copy.
  struct Gathered {
    explicit Gathered(const Tensor& x) : x(x) {}

    void add(int64_t at, int64_t n) {
      if (!parts.empty() && parts.back().first + parts.back().second == at) {
        parts.back().second += n;
      } else {
        parts.emplace_back(at, n);
      }
    }
    Tensor rows() const {
      std::vector<Tensor> narrowed;
      for (const auto& [at, n] : parts) narrowed.push_back(x.narrow(0, at, n));
      return narrowed.size() == 1 ? narrowed[0] : at::cat(narrowed);
    }

    const Tensor& x;
    std::vector<std::pair<int64_t, int64_t>> parts;
  };

  const Steps& steps_;
  const Tensor& input_;
  const OptionalTensor& hx_;
  const Tensor &w_ih_, &w_hh_, &given_out_;
  const Given& given_;
  Tensor out_;  // rows of H, evenly spaced
  const int64_t I_, H_;
  std::array<bool, 5> need_;
  bool own_w_ih_, own_w_hh_, by_blocks_;
  int64_t parts_ = 1;  // of the rows, each summed by a thread
  Tensor others_;      // [parts - 1, *]: in a row all sums of another part than the first
  int64_t w_hh_at_, b_at_;  // where in it those of W_hh and of the bias begin
  Tensor z_first_;          // [B, H], dz of each sequence's first step
  Tensor d_x_, d_h_, d_w_ih_, d_w_hh_, d_b_;
};

}  // namespace rnnfast::cpu
