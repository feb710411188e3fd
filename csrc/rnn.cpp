// torch.ops.rnnfast.rnn and rnn_cell: a whole RNN and a single step, as calls of the ops of one
// layer. The loop is that of rnnfast/functional.py, in C++ because at the smallest sizes its steps
// in Python cost more than the kernel does; being composite, it leaves autograd, autocast and vmap
// to those ops.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "op.h"

namespace rnnfast {
namespace {

using at::Tensor;

Outputs rnn(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
            const OptionalTensor& batch_sizes, c10::string_view nonlinearity, bool bias,
            int64_t num_layers, double dropout, bool bidirectional, bool batch_first) {
  const int64_t directions = bidirectional ? 2 : 1, per_layer = bias ? 4 : 2;
  const int64_t states = num_layers * directions;
  TORCH_CHECK(num_layers > 0, "rnnfast: expected num_layers greater than zero, got ", num_layers);
  TORCH_CHECK(int64_t(weights.size()) == per_layer * states, "rnnfast: expected ",
              per_layer * states, " weights for num_layers=", num_layers, ", bidirectional=",
              bidirectional ? "True" : "False", ", bias=", bias ? "True" : "False", ", got ",
              weights.size());
  TORCH_CHECK(!hx || (hx->dim() == 3 && hx->size(0) == states),
              "rnnfast: expected hx of 3 dimensions, the first ", states, ", got ", hx->sizes());
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
  const at::TensorList initial = hx ? at::TensorList(*hx) : at::TensorList();
  if (only_cpu_follows({input, initial, weights})) below_autograd.emplace();
  const bool turned = batch_first && !batch_sizes;
  Tensor x = turned ? input.transpose(0, 1) : input;
  // Copied once, as nn.RNN does: the kernels need adjacent features, forward and backward.
  if (x.is_cpu() && x.dim() > 0 && x.stride(-1) != 1 && x.size(-1) > 1 &&
      weights[0].requires_grad() && at::GradMode::is_enabled()) {
    x = x.contiguous();
  }
  // Of each layer: select() would give each a node of its own, whose gradients are as large as hx.
  std::vector<Tensor> initial_states;
  if (hx && !bidirectional) {
    initial_states = num_layers == 1 ? std::vector<Tensor>{hx->squeeze(0)} : hx->unbind(0);
  }
  std::vector<Tensor> final;  // states of each layer, [B, H] or [2, B, H]
  final.reserve(num_layers);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const at::TensorList w = weights.slice(layer * directions * per_layer, directions * per_layer);
    Tensor h_n;
    if (bidirectional) {
      auto state = hx;
      if (hx && num_layers > 1) state = hx->narrow(0, 2 * layer, 2);
      std::tie(x, h_n) = call_rnn_bidirectional_layer(x, state, w, batch_sizes, nonlinearity);
    } else {
      const auto state = hx ? OptionalTensor(initial_states[layer]) : std::nullopt;
      const auto b_ih = bias ? OptionalTensor(w[2]) : std::nullopt;
      const auto b_hh = bias ? OptionalTensor(w[3]) : std::nullopt;
      std::tie(x, h_n) = call_rnn_layer(x, state, w[0], w[1], b_ih, b_hh, batch_sizes,
                                        nonlinearity, /*reverse=*/false);
    }
    final.push_back(std::move(h_n));
    if (dropout != 0 && layer < num_layers - 1) x = at::dropout(x, dropout, /*train=*/true);
  }
  if (turned) {
    // No view, as nn.RNN's is none, where there is no gradient: a caller may change it in place.
    std::optional<at::AutoDispatchBelowADInplaceOrView> no_view;
    if (!x.requires_grad()) no_view.emplace();
    x = x.transpose(0, 1);
  }
  if (bidirectional) return {x, num_layers == 1 ? final[0] : at::cat(final)};
  // Of a single step the layer keeps h_n for its backward, and a caller may change what is returned.
  const bool kept = final[0].requires_grad() && !batch_sizes && input.sym_size(turned ? 1 : 0) == 1;
  if (num_layers > 1 || kept) return {x, at::stack(final)};
  // No view, as nn.RNN's is none: a caller may detach_() it.
  const Tensor& h_n = final[0];
  return {x, at::_unsafe_view_symint(h_n, {1, h_n.sym_size(0), h_n.sym_size(1)})};
}

Tensor rnn_cell(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                c10::string_view nonlinearity) {
  if (w_ih.sym_numel() == 0) {  // nn.RNNCell, unlike nn.RNN, may have no inputs or no units
    const c10::SymInt B = input.sym_size(0), H = w_hh.sym_size(1);
    const Tensor h = hx ? *hx : at::zeros_symint({B, H}, input.options());
    return nonlinearity == "relu" ? at::rnn_relu_cell(input, h, w_ih, w_hh, b_ih, b_hh)
                                  : at::rnn_tanh_cell(input, h, w_ih, w_hh, b_ih, b_hh);
  }
  // h_n: the same numbers as the output of [1, B, H], and no view.
  return std::get<1>(call_rnn_layer(input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh, std::nullopt,
                                    nonlinearity, /*reverse=*/false));
}

}  // namespace
}  // namespace rnnfast

TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  // input [T, B, I], [B, T, I] if batch_first, or packed [rows, I]; hx [states, B, H], a state for
  // each layer and direction; weights in the order of nn.RNN.all_weights, flattened; dropout as in
  // training. Returns out in the layout of the input, and h_n like hx.
  m.def(
      "rnn(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes=None, "
      "str nonlinearity='tanh', bool bias=True, int num_layers=1, float dropout=0.0, "
      "bool bidirectional=False, bool batch_first=False) -> (Tensor out, Tensor h_n)",
      {at::Tag::pt2_compliant_tag});
  // input [B, I], hx [B, H]; returns the new state [B, H].
  m.def(
      "rnn_cell(Tensor input, Tensor? hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, "
      "Tensor? b_hh=None, str nonlinearity='tanh') -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(rnnfast, CompositeImplicitAutograd, m) {
  m.impl("rnn", &rnnfast::rnn);
  m.impl("rnn_cell", &rnnfast::rnn_cell);
}

TORCH_LIBRARY_IMPL(rnnfast, FuncTorchBatchedDecomposition, m) {  // torch.vmap: as composite there
  m.impl("rnn", &rnnfast::rnn);
  m.impl("rnn_cell", &rnnfast::rnn_cell);
}
