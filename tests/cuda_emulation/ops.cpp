// The checks of csrc/op.h, which the emulated ops share with the extension through its ops.
#include "../../csrc/op.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace rnnfast {

void check_layer(const at::Tensor& input, const std::optional<at::Tensor>& hx,
                 const at::Tensor& w_ih, const at::Tensor& w_hh,
                 const std::optional<at::Tensor>& b_ih, const std::optional<at::Tensor>& b_hh,
                 const std::optional<at::Tensor>& batch_sizes, c10::string_view nonlinearity) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::_check_layer", "")
                       .typed<decltype(check_layer)>();
  op.call(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity);
}

void check_layer_grads(const std::optional<at::Tensor>& grad_out,
                       const std::optional<at::Tensor>& grad_h_n, const at::Tensor& input,
                       const at::Tensor& w_hh, const at::Tensor& out,
                       const std::optional<at::Tensor>& batch_sizes) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::_check_layer_grads", "")
                       .typed<decltype(check_layer_grads)>();
  op.call(grad_out, grad_h_n, input, w_hh, out, batch_sizes);
}

}  // namespace rnnfast
