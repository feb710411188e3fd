// What the files of the ops share: the checks of their arguments, and the calls of the ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <initializer_list>
#include <optional>
#include <tuple>

namespace rnnfast {

using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor>;  // out, h_n
// Of input, hx, w_ih, w_hh and either bias; undefined where not wanted.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Raises RuntimeError unless the tensors form one layer: sizes, dtypes, devices, batch_sizes.
void check_layer(const at::Tensor& input, const OptionalTensor& hx, const at::Tensor& w_ih,
                 const at::Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                 const OptionalTensor& batch_sizes, c10::string_view nonlinearity);

// The same for what a backward takes besides.
void check_layer_grads(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                       const at::Tensor& input, const at::Tensor& w_hh, const at::Tensor& out,
                       const OptionalTensor& batch_sizes);

// What a backward may use up of its arguments, as nothing reads it afterwards: a gradient's memory may
// become dz's, and that of the outputs may be let go of. And sums, in float32 where the layer is in 16
// bits, that it adds the weights' gradients to, where they are defined, instead of returning them.
struct Given {
  bool grad_out = false, grad_h_n = false, out = false;
  at::Tensor d_w_ih, d_w_hh, d_b;

  bool something() const {
    return grad_out || grad_h_n || out || d_w_ih.defined() || d_w_hh.defined() || d_b.defined();
  }
};

// Whether a forward-mode derivative is asked for.
inline bool has_tangent(const at::Tensor& x) {
  return x.defined() && x._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const OptionalTensor& x) { return x && has_tangent(*x); }

// Whether a call with these tensors, where undefined ones do not count, has no derivative to record and
// comes to nothing but kernels of the CPU: to no transform, mode or subclass, nor to autocast, which keeps
// what it casts, with its history, for calls that do record. Autograd, whose dispatches are a tenth of a
// small call, may then be passed by.
bool only_cpu_follows(std::initializer_list<at::TensorList> operands);

// Calls torch.ops.rnnfast.rnn_layer through the dispatcher.
Outputs call_rnn_layer(const at::Tensor& input, const OptionalTensor& hx, const at::Tensor& w_ih,
                       const at::Tensor& w_hh, const OptionalTensor& b_ih,
                       const OptionalTensor& b_hh, const OptionalTensor& batch_sizes,
                       c10::string_view nonlinearity, bool reverse);

// Calls torch.ops.rnnfast.rnn_bidirectional_layer through the dispatcher.
Outputs call_rnn_bidirectional_layer(const at::Tensor& input, const OptionalTensor& hx,
                                     at::TensorList weights, const OptionalTensor& batch_sizes,
                                     c10::string_view nonlinearity);

// What rnn_layer takes of one direction: its state, its weights, its order.
struct Direction {
  OptionalTensor hx;
  at::Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh;
  bool reverse;
};

// Direction d, 0 or 1, of rnn_bidirectional_layer. Raises RuntimeError where hx or the number of
// weights is not that of two directions.
Direction direction_of(int64_t d, const OptionalTensor& hx, at::TensorList weights);

}  // namespace rnnfast
