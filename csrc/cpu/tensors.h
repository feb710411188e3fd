// Tensors as the kernels take them: elements, rows that lie evenly, new and scratch memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <type_traits>

#include "../op.h"
#include "time_loop.h"

namespace rnnfast::cpu {

using at::Tensor;

// The elements of a tensor as the time loop's type.
template <class T>
using Element = std::conditional_t<std::is_same_v<std::remove_const_t<T>, BFloat16>, at::BFloat16,
                                   std::remove_const_t<T>>;
template <class T>
T* data_of(const Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return reinterpret_cast<T*>(x.const_data_ptr<Element<T>>());
  } else {
    return reinterpret_cast<T*>(x.mutable_data_ptr<Element<T>>());
  }
}

// Large memory may be new in every call: glibc returns more than 32 MB to the system when they are
// freed, and less when they end the heap. Its pages are cleared when they are first touched, 1.3 us
// each, a third of a call; of 2 MB there are few.
inline void ask_for_huge_pages(const Tensor& x) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kBytes = 4 << 20, kPage = 2 << 20;
  if (x.nbytes() <= kBytes) return;
  const auto data = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + x.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused
#endif
}

// at::empty goes through the dispatcher twice, at::zeros five times, each time 1 % of a small
// call.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor x = at::detail::empty_cpu(sizes, dtype);
  ask_for_huge_pages(x);
  return x;
}
inline Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype) {
  constexpr size_t kBytes = 32 << 10;  // more are ATen's, whose threads share them
  Tensor x = empty(sizes, dtype);
  if (x.nbytes() > kBytes) return x.zero_();
  if (x.numel() > 0) std::memset(x.mutable_data_ptr(), 0, x.nbytes());
  return x;
}

inline Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

// Whether all rows of x [T, B, F] or [rows, F] lie row_stride(x) apart. evenly_spaced: x, or a copy,
// whose rows do; flat without its view, 2 % of a small call.
inline bool has_even_rows(const Tensor& x) {
  return x.dim() == 2 || x.size(0) == 1 || x.size(1) == 1 ||
         x.stride(0) == x.size(1) * x.stride(1);
}
inline Tensor evenly_spaced(const Tensor& x) { return has_even_rows(x) ? x : flat(x); }
inline int64_t row_stride(const Tensor& x) {
  return x.dim() == 3 && x.size(1) > 1 ? x.stride(1) : x.stride(0);
}

// The rows of x as a matrix that may be written, or nothing where they do not lie evenly, or on
// each other as in an expanded tensor.
inline Tensor writable_rows(const Tensor& x) {
  const int64_t F = x.size(-1), rows = x.numel() / F;
  const bool apart = x.stride(-1) == 1 && has_even_rows(x) && (rows == 1 || row_stride(x) >= F);
  return apart ? x.as_strided({rows, F}, {rows == 1 ? F : row_stride(x), 1}) : Tensor();
}

// Lets go of the memory of x, of which nothing but the sizes may be read after that.
inline void release(const Tensor& x) { x.storage().unsafeGetStorageImpl()->reset(); }

inline Tensor adjacent_features(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
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
  void free() { large_.clear(); }

 private:
  static constexpr int64_t kSmall = (8 << 10) / sizeof(T);
  alignas(64) T small_[kSmall];
  c10::DataPtr large_;
};

}  // namespace rnnfast::cpu
