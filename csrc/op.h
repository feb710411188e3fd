// What the files of the ops share: the checks of their arguments, and the calls of the ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <tuple>

namespace rnnfast {

// Raises RuntimeError unless the tensors form one layer: sizes, dtypes, devices, batch_sizes.
void check_layer(const at::Tensor& input, const std::optional<at::Tensor>& hx,
                 const at::Tensor& w_ih, const at::Tensor& w_hh,
                 const std::optional<at::Tensor>& b_ih, const std::optional<at::Tensor>& b_hh,
                 const std::optional<at::Tensor>& batch_sizes, c10::string_view nonlinearity);

// The same for what a backward takes besides.
void check_layer_grads(const std::optional<at::Tensor>& grad_out,
                       const std::optional<at::Tensor>& grad_h_n, const at::Tensor& input,
                       const at::Tensor& w_hh, const at::Tensor& out,
                       const std::optional<at::Tensor>& batch_sizes);

// Calls torch.ops.rnnfast.rnn_layer through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_rnn_layer(
    const at::Tensor& input, const std::optional<at::Tensor>& hx, const at::Tensor& w_ih,
    const at::Tensor& w_hh, const std::optional<at::Tensor>& b_ih,
    const std::optional<at::Tensor>& b_hh, const std::optional<at::Tensor>& batch_sizes,
    c10::string_view nonlinearity, bool reverse);

// Calls torch.ops.rnnfast.rnn_bidirectional_layer through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_rnn_bidirectional_layer(
    const at::Tensor& input, const std::optional<at::Tensor>& hx, at::TensorList weights,
    const std::optional<at::Tensor>& batch_sizes, c10::string_view nonlinearity);

// The arguments of rnn_layer for direction d, 0 or 1, of rnn_bidirectional_layer. Raises
// RuntimeError where hx or the number of weights is not that of two directions.
struct Direction {
  std::optional<at::Tensor> hx;
  at::Tensor w_ih, w_hh;
  std::optional<at::Tensor> b_ih, b_hh;
  bool reverse;
};
Direction direction_of(int64_t d, const std::optional<at::Tensor>& hx, at::TensorList weights);

}  // namespace rnnfast
