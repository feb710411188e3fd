// Weights into the panels that the time loop reads, by whichever threads will read them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "steps.h"
#include "tensors.h"
#include "time_loop.h"

namespace rnnfast::cpu {

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

// Runs loop(f, share) over all shares of a walk, of whose weights each packs what it reads:
// pack(f, space, share), into `size` numbers. Threads that meet have one space, taken before they start:
// if one of them failed to get its own, the others would wait for it for ever.
template <class T, class Pass, class Pack, class Loop>
void pack_and_walk(const Steps& steps, const Pass& f, Sharing sharing, int64_t size,
                   const Pack& pack, const Loop& loop) {
  const bool meeting = sharing.panels > 1;
  Space<T> common(meeting ? size : 0);
  steps.parallel<T>(f.walk, sharing, f.hidden_size, [&](const Share& share) {
    Space<T> own(meeting ? 0 : size);
    Pass with_weights = f;
    pack(with_weights, meeting ? common.data() : own.data(), share);
    loop(with_weights, share);
  });
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

}  // namespace rnnfast::cpu
