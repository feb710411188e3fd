// What the fused time loop computes, as plain pointers and strides. The loop itself is in
// time_loop.inc.h, compiled once per instruction set by time_loop_*.cpp.
//
//   forward   h[t,b,:] = act( bias + x[t,b,:] W_ih^T + h[t-1,b,:] W_hh^T )
//   backward  dz[t,b,:] = (g[t,b,:] + dz[t+1,b,:] W_hh) * act'(h[t,b,:])
//
// with act' written in terms of the output, so that the output is all that a backward needs to
// keep: 1 - h^2 for tanh; for ReLU a choice, dz = 0 where h <= 0 and else the bracket, which so
// passes where h is NaN, as in PyTorch. dz is the gradient of the pre-activation.
#pragma once

#include <sched.h>

#include <cstdint>
#include <utility>  // this and the next for time_loop.inc.h, which may include nothing

#include "tanh_table.h"

// GCC 10 may come with an assembler that does not know AMX.
#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11
#define RNNFAST_AMX
#endif

namespace rnnfast::cpu {

// bfloat16 as it is stored. Its products are of pairs of neighbours, x[k] w[k] + x[k+1] w[k+1],
// added to a float32 sum, as AVX512-BF16 and AMX do them; what else a block computes is float32 too.
// A state is carried from step to step as it is stored.
struct BFloat16 {
  uint16_t bits;
};

// float16 as it is stored. Its arithmetic is float32.
struct Float16 {
  uint16_t bits;
};

// What sums of T are held in, and the k's that one product takes.
template <class T>
struct Sums {
  using type = T;
  static constexpr int64_t pairing = 1;
};
template <>
struct Sums<BFloat16> {
  using type = float;
  static constexpr int64_t pairing = 2;
};
template <class T>
using Sum = typename Sums<T>::type;
template <class T>
inline constexpr bool kInPairs = Sums<T>::pairing > 1;

// A family of rows: row (t, b) starts at data + offset(t) + b * stride_b, its features adjacent.
// Time-major, batch-first and packed layouts differ in these numbers alone.
template <class T>
struct Rows {
  T* data = nullptr;     // nullptr: every row is zero
  int64_t stride_t = 0;  // elements; unused where Walk::first_row says where a step starts
  int64_t stride_b = 0;  // elements
};

// Which steps there are and in which order the forward visits them.
struct Walk {
  int64_t seq_len = 0;
  int64_t batch = 0;                     // rows of the fullest step
  const int64_t* batch_sizes = nullptr;  // [seq_len], never increasing; nullptr: all rows live
  const int64_t* first_row = nullptr;    // [seq_len], packed only: rows that precede step t
  bool reverse = false;                  // the forward goes from the last step to the first
  // The steps [begin, end) are to be walked. The state of the step visited before them, if there is
  // one, lies in its place.
  int64_t begin = 0, end = 0;

  int64_t live(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }

  template <class T>
  T* row(const Rows<T>& rows, int64_t t, int64_t b) const {
    const int64_t offset = first_row ? first_row[t] * rows.stride_b : t * rows.stride_t;
    return rows.data + offset + b * rows.stride_b;
  }
};

template <class T>
struct Forward {
  Walk walk;
  int64_t input_size = 0;  // 0: `out` already holds bias + x W_ih^T
  int64_t hidden_size = 0;
  bool relu = false;
  Rows<const T> x;               // [T, B, I], read only where input_size > 0
  Rows<const T> h0;              // [B, H]
  const Sum<T>* bias = nullptr;  // [H], padded to whole vectors
  const T* w_ih = nullptr;       // packed W_ih^T, K = I
  const T* w_hh = nullptr;       // packed W_hh^T, K = H
  Rows<T> out;                   // [T, B, H]
};

template <class T>
struct Backward {
  Walk walk;
  int64_t hidden_size = 0;
  bool relu = false;
  Rows<const T> grad_out;   // [T, B, H]
  Rows<const T> grad_h_n;   // [B, H]
  Rows<const T> out;        // [T, B, H]
  const T* w_hh = nullptr;  // packed W_hh, K = H
  Rows<T> dz;               // [T, B, H], written
};

// c[m,n] += sum_r a[r,m] b[r,n], and column_sums[m] += sum_r a[r,m].
template <class T>
struct OuterSum {
  int64_t rows = 0, N = 0;
  const T* a = nullptr;           // [rows, M], row stride lda
  int64_t lda = 0;
  const T* b = nullptr;           // [rows, N], row stride ldb
  int64_t ldb = 0;
  Sum<T>* c = nullptr;            // [M, N], row stride ldc
  int64_t ldc = 0;
  Sum<T>* column_sums = nullptr;  // [M] or nullptr
  T* space = nullptr;             // of outer_sum_space(rows, N) numbers
};

// z[b,n] += sum_k x[b,k] w[n,k], with the weights as they lie; z in the type of sums.
template <class T>
struct Linear {
  int64_t batch = 0, K = 0;
  const T* x = nullptr;  // [batch, K], row stride ldx
  int64_t ldx = 0;
  const T* w = nullptr;  // [N, K], row stride ldw
  int64_t ldw = 0;
  Sum<T>* z = nullptr;   // [batch, N], row stride ldz
  int64_t ldz = 0;
  bool backwards = false;  // from the last column on, whose weights a cache may hold
};

// c[r,n] = start[r,n] + sum_k a[r,k] w[k,n], of the columns of one panel; in AMX's tiles, of any.
template <class T>
struct PanelProduct {
  int64_t rows = 0, K = 0;
  int64_t columns = 0;       // at most panel_columns, or any
  const T* a = nullptr;      // [rows, K], row stride lda
  int64_t lda = 0;
  const T* w = nullptr;      // packed [K, columns]
  const T* start = nullptr;  // [rows, columns], row stride ld_start; nullptr: zeros
  int64_t ld_start = 0;
  T* c = nullptr;            // [rows, columns], row stride ldc; may be `start`
  int64_t ldc = 0;
};

// Where the threads that share a step wait for each other: each says in a line of its own how often it
// has arrived, and reads the others', which takes a line from core to core once. They spin, since a
// step takes microseconds, and for long: whoever gives way to another program is gone for its turn,
// milliseconds in which all others wait for him. In the end they do give way, as a partner may need
// the processor.
class Barrier {
 public:
  struct alignas(128) Party {  // two lines: the next is fetched along
    int64_t arrivals = 0;
  };
  Barrier(Party* parties, int64_t count) : parties_(parties), count_(count) {}

  // Returns when all parties have arrived as often as the caller, which stands for [begin, end).
  void arrive_and_wait(int64_t begin, int64_t end) {
    const int64_t arrivals = parties_[begin].arrivals + 1;
    for (int64_t i = begin; i < end; ++i) {
      __atomic_store_n(&parties_[i].arrivals, arrivals, __ATOMIC_RELEASE);
    }
    int spins = 0;
    for (int64_t i = 0; i < count_; ++i) {
      while (__atomic_load_n(&parties_[i].arrivals, __ATOMIC_ACQUIRE) < arrivals) {
        if (++spins > kSpins) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  static constexpr int kSpins = 20000;  // half a millisecond, or one where x86's pause is long
  Party* parties_;
  int64_t count_;
};

// What one thread computes of every step: rows [b0, b1), of them the panels [p0, p1) of
// `panel_columns` hidden units. Shares of different rows are independent; shares of different
// panels of the same rows meet at the barrier, as parties [party0, party1) of it.
struct Share {
  int64_t b0 = 0, b1 = 0;
  int64_t p0 = 0, p1 = 0;
  Barrier* barrier = nullptr;
  int64_t party0 = 0, party1 = 1;
};

// The entry points of one instruction set.
template <class T>
struct TimeLoop {
  int64_t panel_columns = 0;
  int64_t (*packed_size)(int64_t k, int64_t n) = nullptr;  // elements
  // packed(k, n) = w[k * stride_k + n * stride_n], k < K, n < N
  void (*pack)(const T* w, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N,
               T* packed) = nullptr;
  void (*forward)(const Forward<T>&, const Share&) = nullptr;
  void (*backward)(const Backward<T>&, const Share&) = nullptr;
  // Columns [n0, n1) of z.
  void (*linear)(const Linear<T>&, int64_t n0, int64_t n1) = nullptr;
  // h = act(z), which h may be.
  void (*activate)(const Sum<T>* z, int64_t n, bool relu, T* h) = nullptr;
  // Rows [m0, m1) of c.
  void (*outer_sum)(const OuterSum<T>&, int64_t m0, int64_t m1) = nullptr;
  int64_t (*outer_sum_space)(int64_t rows, int64_t N) = nullptr;
  int64_t outer_sum_numbers = 0;  // the largest c for which the library is not faster, as measured
  void (*panel_product)(const PanelProduct<T>&) = nullptr;
  void (*widen)(const Float16* from, int64_t n, float* to) = nullptr;  // none if T is not float
};

// The set that runs here: PyTorch's own choice (torch.backends.cpu.get_cpu_capability(), which
// ATEN_CPU_CAPABILITY overrides), so one binary serves every machine of an architecture.
template <class T>
const TimeLoop<T>& time_loop();

// Whether that set has products of bfloat16. Without them there is no time_loop<BFloat16>().
bool has_bfloat16_products();
// Whether they are AMX's.
bool has_tiles();

// Whether our blocks outrun the library's products at every size.
bool outruns_library();

// Its name, as ATEN_CPU_CAPABILITY takes it.
const char* instruction_set();

#define RNNFAST_DECLARE_TIME_LOOP(isa)      \
  namespace isa {                           \
  extern const TimeLoop<float> f32;         \
  extern const TimeLoop<double> f64;        \
  }
RNNFAST_DECLARE_TIME_LOOP(fallback)
#if defined(__x86_64__)
RNNFAST_DECLARE_TIME_LOOP(avx2)
RNNFAST_DECLARE_TIME_LOOP(avx512)
namespace avx512_bf16 {
extern const TimeLoop<BFloat16> bf16;
}
#if defined(RNNFAST_AMX)
namespace amx {
extern const TimeLoop<BFloat16> bf16;
}
#endif
#endif

}  // namespace rnnfast::cpu
