// torch.ops.rnnfast.rnn_layer on CUDA by the kernels of this folder: the large products around the
// time loop, which are cuBLAS's, and its launches.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "../op.h"
#include "time_loop.h"

namespace rnnfast::cuda {
namespace {

using at::Tensor;

bool is_16bit(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// TF32 where both cuBLAS and cuDNN's RNN may use it: cuDNN's flag alone is on by default, and a
// user who has not asked for TF32 in matrix products gets float32 here.
std::optional<Numbers> numbers_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: {
      const auto allows = [](at::Float32Op op) {
        return at::globalContext().float32Precision(at::Float32Backend::CUDA, op) ==
               at::Float32Precision::TF32;
      };
      return allows(at::Float32Op::MATMUL) && allows(at::Float32Op::RNN) ? Numbers::tf32
                                                                         : Numbers::f32;
    }
    case at::kDouble: return Numbers::f64;
    case at::kBFloat16: return Numbers::bf16;
    case at::kHalf: return Numbers::f16;
    default: return std::nullopt;
  }
}

// The variant that every layer takes, for tests and measurements; empty: the table's choice.
std::string forced_variant;
std::mutex forced_variant_mutex;

void use_variant(c10::string_view name) {
  const std::lock_guard<std::mutex> lock(forced_variant_mutex);
  forced_variant = std::string(name);
}

Refusal plan_for(at::ScalarType dtype, int64_t B, int64_t H, bool backward, Plan* plan) {
  const auto numbers = numbers_of(dtype);
  if (!numbers) return Refusal::dtype;
  if (H > 1 << 20) return Refusal::hidden_size;
  const std::lock_guard<std::mutex> lock(forced_variant_mutex);
  return make_plan(*numbers, B, int(H), backward, plan,
                   forced_variant.empty() ? nullptr : forced_variant.c_str());
}

void check_planned(Refusal refusal, at::ScalarType dtype, int64_t hidden_size) {
  TORCH_CHECK(refusal == Refusal::none, "rnnfast: no CUDA kernel runs a hidden_size of ",
              hidden_size, " in ", dtype, " on this device");
}

// A Refusal: whether the kernels can run such a layer.
int64_t why_not(int64_t device, at::ScalarType dtype, int64_t hidden_size) {
  const c10::cuda::CUDAGuard guard(at::Device(at::kCUDA, at::DeviceIndex(device)));
  Plan plan;
  for (const bool backward : {false, true}) {
    const Refusal why = plan_for(dtype, 1, hidden_size, backward, &plan);
    if (why != Refusal::none) return int64_t(why);
  }
  return 0;
}

// The variant that such a layer takes, how many blocks share a group of rows, the tiles of rows of
// a group, and the groups.
std::tuple<std::string, int64_t, int64_t, int64_t> plan_of(int64_t device, at::ScalarType dtype,
                                                           int64_t batch, int64_t hidden_size,
                                                           bool backward) {
  const c10::cuda::CUDAGuard guard(at::Device(at::kCUDA, at::DeviceIndex(device)));
  Plan plan;
  check_planned(plan_for(dtype, batch, hidden_size, backward, &plan), dtype, hidden_size);
  return {name_of(*plan.variant), plan.blocks, plan.tiles, plan.groups};
}

// Where the steps lie; `table` is on the device, int64 [2, T]: each step's first row and size.
struct Steps {
  int64_t T, B;
  bool reverse;
  Tensor table;

  Steps(const Tensor& input, const OptionalTensor& batch_sizes, bool reverse) : reverse(reverse) {
    if (!batch_sizes) {
      T = input.size(0);
      B = input.size(1);
      return;
    }
    T = batch_sizes->size(0);
    B = batch_sizes->const_data_ptr<int64_t>()[0];
    table = at::stack({batch_sizes->cumsum(0) - *batch_sizes, *batch_sizes});
    if (input.is_cuda()) {
      TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() ==
                      c10::cuda::CaptureStatus::None,
                  "rnnfast: packed sequences cannot be captured in a CUDA graph: their batch_sizes "
                  "are on the CPU");
      // From pinned memory the copy is queued and nobody waits for it; the allocator keeps the
      // memory until it is done.
      table = table.pin_memory().to(input.device(), /*non_blocking=*/true);
    }
  }

  bool packed() const { return table.defined(); }

  Tensor first(const Tensor& x) const { return packed() ? x.narrow(0, 0, B) : x.select(0, 0); }

  // The last row of each sequence, [B, F].
  Tensor last(const Tensor& x) const {
    if (!packed()) return x.select(0, T - 1);
    const Tensor row = at::arange(B, table.options());
    const Tensor length = at::searchsorted(-table.select(0, 1), -row);  // steps with more rows
    return x.index_select(0, table.select(0, 0).index_select(0, length - 1) + row);
  }

  // Rows of `at`, and the rows of `before` that the forward visits one step earlier; both flat,
  // without those whose predecessor is the initial state.
  std::pair<Tensor, Tensor> pairs(const Tensor& at_, const Tensor& before) const {
    Tensor early = reverse ? at_ : before, late = reverse ? before : at_;
    if (!packed()) {
      early = early.narrow(0, 0, T - 1).flatten(0, 1);
      late = late.narrow(0, 1, T - 1).flatten(0, 1);
    } else {
      // A row b of step t > 0 has its partner in step t - 1, batch_sizes[t - 1] rows above.
      const int64_t rest = late.size(0) - B;
      const Tensor sizes = table.select(0, 1);
      const Tensor above = at::repeat_interleave(sizes.narrow(0, 0, T - 1),
                                                 sizes.narrow(0, 1, T - 1), std::nullopt, rest);
      early = early.index_select(0, at::arange(B, B + rest, table.options()) - above);
      late = late.narrow(0, B, rest);
    }
    return reverse ? std::pair(early, late) : std::pair(late, early);
  }
};

Tensor flat(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// x W_ih^T, in float32 for 16-bit types: z is not rounded to storage before it is used.
Tensor project(const Tensor& input, const Tensor& w_ih) {
  const Tensor x = flat(input), w = w_ih.t();
  if (!is_16bit(input.scalar_type())) return at::mm(x, w);
  return input.is_cuda() ? at::mm(x, w, at::kFloat) : at::mm(x.to(at::kFloat), w.to(at::kFloat));
}

// A tensor's memory as the kernels take it; kept alive by `held`.
class Operands {
 public:
  const void* contiguous(const OptionalTensor& x) {
    if (!x || !x->defined()) return nullptr;
    held_[used_] = x->contiguous();
    return held_[used_++].const_data_ptr();
  }

 private:
  std::array<Tensor, 8> held_;
  size_t used_ = 0;
};

Layer layer_of(const Steps& steps, const Tensor& w_hh, c10::string_view nonlinearity,
               bool descending) {
  Layer p;
  p.T = steps.T;
  p.B = steps.B;
  p.H = int(w_hh.size(0));
  p.relu = nonlinearity == "relu";
  p.descending = descending;
  if (steps.packed()) p.steps = steps.table.const_data_ptr<int64_t>();
  return p;
}

void run(const Layer& layer, const Tensor& like, bool backward) {
  Layer p = layer;
  Plan plan;
  check_planned(plan_for(like.scalar_type(), p.B, p.H, backward, &plan), like.scalar_type(), p.H);
  Tensor workspace;
  if (plan.workspace > 0) {
    workspace = at::empty({int64_t(plan.workspace)}, like.options().dtype(at::kByte));
    p.workspace = workspace.mutable_data_ptr();
  }
  const cudaError_t error =
      launch(plan, p, backward, c10::cuda::getCurrentCUDAStream().stream());
  if (error != cudaSuccess) cudaGetLastError();  // it is told here, not by the next launch
  TORCH_CHECK(error == cudaSuccess, "rnnfast: the CUDA kernel could not be launched: ",
              cudaGetErrorString(error));
}

Outputs rnn_layer(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                  const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                  const OptionalTensor& batch_sizes, c10::string_view nonlinearity, bool reverse) {
  check_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity);
  const c10::cuda::CUDAGuard guard(input.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t I = w_ih.size(1), H = w_ih.size(0);
  const Steps steps(input, batch_sizes, reverse);
  at::DimVector size(input.sizes());
  size.back() = H;
  Tensor out = at::empty(size, input.options()), h_n = at::empty({steps.B, H}, input.options());
  if (h_n.numel() == 0) return {out, h_n};

  Layer p = layer_of(steps, w_hh, nonlinearity, reverse);
  Operands operands;
  Tensor projected;
  if (I <= kFusedInput) {
    p.I = int(I);
    p.x = input.const_data_ptr();
    p.x_stride_t = steps.packed() ? 0 : input.stride(0);
    p.x_stride_b = input.stride(-2);
    p.x_stride_i = input.stride(-1);
    p.w_ih = operands.contiguous(w_ih);
  } else {
    projected = project(input, w_ih);
    p.x = projected.const_data_ptr();
  }
  p.w_hh = operands.contiguous(w_hh);
  p.b_ih = operands.contiguous(b_ih);
  p.b_hh = operands.contiguous(b_hh);
  p.hx = operands.contiguous(hx);
  p.out = out.mutable_data_ptr();
  p.h_n = h_n.mutable_data_ptr();
  run(p, input, /*backward=*/false);
  return {out, h_n};
}

Gradients rnn_layer_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                             const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                             const Tensor& w_hh, const Tensor& out,
                             const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                             bool reverse, std::array<bool, 5> output_mask) {
  check_layer(input, hx, w_ih, w_hh, std::nullopt, std::nullopt, batch_sizes, nonlinearity);
  check_layer_grads(grad_out, grad_h_n, input, w_hh, out, batch_sizes);
  const c10::cuda::CUDAGuard guard(input.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [need_x, need_hx, need_w_ih, need_w_hh, need_b] = output_mask;
  const Steps steps(input, batch_sizes, reverse);
  Tensor d_x, d_hx, d_w_ih, d_w_hh, d_b;
  if (need_hx && hx) d_hx = at::empty(hx->sizes(), input.options());
  Tensor dz = at::empty(out.sizes(), out.options());
  if (dz.numel() == 0) {
    if (need_x) d_x = at::zeros(input.sizes(), input.options());
    if (need_w_ih) d_w_ih = at::zeros(w_ih.sizes(), input.options());
    if (need_w_hh) d_w_hh = at::zeros(w_hh.sizes(), input.options());
    if (need_b) d_b = at::zeros({w_hh.size(0)}, input.options());
    return {d_x, d_hx, d_w_ih, d_w_hh, d_b};
  }

  Layer p = layer_of(steps, w_hh, nonlinearity, !reverse);
  Operands operands;
  if (grad_out) {
    p.grad_out = grad_out->const_data_ptr();
    p.g_stride_t = steps.packed() ? 0 : grad_out->stride(0);
    p.g_stride_b = grad_out->stride(-2);
    p.g_stride_h = grad_out->stride(-1);
  }
  p.w_hh = operands.contiguous(w_hh);
  p.grad_h_n = operands.contiguous(grad_h_n);
  p.out = const_cast<void*>(operands.contiguous(out));  // which a backward reads
  p.dz = dz.mutable_data_ptr();
  if (d_hx.defined()) p.grad_hx = d_hx.mutable_data_ptr();
  run(p, input, /*backward=*/true);

  const Tensor rows = flat(dz);
  if (need_x) d_x = at::mm(rows, w_ih).view(input.sizes());
  if (need_w_ih) d_w_ih = at::mm(rows.t(), flat(input));
  if (need_b) d_b = rows.sum(0);
  if (need_w_hh) {
    const auto [late, early] = steps.pairs(dz, out);
    d_w_hh = at::mm(late.t(), early);
    if (hx) d_w_hh.addmm_((reverse ? steps.last(dz) : steps.first(dz)).t(), *hx);
  }
  return {d_x, d_hx, d_w_ih, d_w_hh, d_b};
}

}  // namespace
}  // namespace rnnfast::cuda

#ifdef RNNFAST_EMULATED  // beside the ops, whose names are taken on the CPU
TORCH_LIBRARY(rnnfast_emulated, m) {
  m.def("rnn_layer", &rnnfast::cuda::rnn_layer);
  m.def("rnn_layer_backward", &rnnfast::cuda::rnn_layer_backward);
  m.def("_cuda_why_not", &rnnfast::cuda::why_not);
  m.def("_cuda_plan", &rnnfast::cuda::plan_of);
  m.def("_cuda_use_variant", &rnnfast::cuda::use_variant);
}
#else
TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  // Why the CUDA kernels cannot run a layer of this dtype and hidden_size: a Refusal; 0: they can.
  m.def("_cuda_why_not(int device, ScalarType dtype, int hidden_size) -> int",
        &rnnfast::cuda::why_not);
  // The plan of a layer: its variant, blocks, tiles and groups, as in time_loop.h.
  m.def(
      "_cuda_plan(int device, ScalarType dtype, int batch, int hidden_size, bool backward) -> "
      "(str, int, int, int)",
      &rnnfast::cuda::plan_of);
  // Makes every layer take one variant of the kernels; an empty name: the table's choice again.
  m.def("_cuda_use_variant(str name) -> ()", &rnnfast::cuda::use_variant);
}

TORCH_LIBRARY_IMPL(rnnfast, CUDA, m) {
  m.impl("rnn_layer", &rnnfast::cuda::rnn_layer);
  m.impl("rnn_layer_backward", &rnnfast::cuda::rnn_layer_backward);
}
#endif
