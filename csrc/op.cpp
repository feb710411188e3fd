// torch.ops.rnnfast.*: schemas, argument checks, autograd and autocast of the ops. Kernels register
// themselves per device (cpu/rnn_layer_cpu.cpp, cuda/rnn_layer_cuda.cpp, rnnfast/triton_layer.py);
// rnnfast/ops.py adds the fake kernels and the double backward.
//
// The autograd nodes are written against torch::autograd::Node, not torch::autograd::Function:
// functorch refuses the latter, and these cost less per call.
#include "op.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace rnnfast {

using at::Tensor;

// ------------------------------------------------------------------------------------- checks

namespace {

void check_operand(const char* name, const Tensor& x, at::IntArrayRef expected,
                   const Tensor& input) {
  TORCH_CHECK(x.sizes() == expected, "rnnfast: expected ", name, " of size ", expected, ", got ",
              x.sizes());
  TORCH_CHECK(x.scalar_type() == input.scalar_type(), "rnnfast: expected ", name, " of dtype ",
              input.scalar_type(), " like the input, got ", x.scalar_type());
  TORCH_CHECK(x.device() == input.device(), "rnnfast: expected ", name, " on ", input.device(),
              " like the input, got ", x.device());
}

int64_t batch_of(const Tensor& input, const OptionalTensor& batch_sizes) {
  return batch_sizes ? batch_sizes->const_data_ptr<int64_t>()[0] : input.size(1);
}

}  // namespace

void check_layer(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                 const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                 const OptionalTensor& batch_sizes, c10::string_view nonlinearity) {
  TORCH_CHECK(nonlinearity == "tanh" || nonlinearity == "relu",
              "rnnfast: unknown nonlinearity '", nonlinearity, "', expected 'tanh' or 'relu'");
  const int64_t rank = batch_sizes ? 2 : 3;
  TORCH_CHECK(input.dim() == rank, "rnnfast: expected input of ", rank, " dimensions, got ",
              input.sizes());
  TORCH_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2,
              "rnnfast: expected w_ih and w_hh of 2 dimensions, got ", w_ih.sizes(), " and ",
              w_hh.sizes());
  const int64_t I = input.size(-1), H = w_hh.size(0);
  TORCH_CHECK(I > 0 && H > 0, "rnnfast: input_size and hidden_size must be greater than zero, got ",
              I, " and ", H);
  if (batch_sizes) {
    const Tensor& sizes = *batch_sizes;
    TORCH_CHECK(sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1 &&
                    sizes.is_contiguous(),
                "rnnfast: expected batch_sizes to be a contiguous 1-D int64 tensor on the CPU, ",
                "got ", sizes.sizes(), " of ", sizes.scalar_type(), " on ", sizes.device());
    TORCH_CHECK(sizes.numel() > 0, "Expected sequence length to be larger than 0 in RNN");
    const int64_t* n = sizes.const_data_ptr<int64_t>();
    int64_t rows = 0;
    for (int64_t t = 0; t < sizes.numel(); ++t) {
      TORCH_CHECK(n[t] > 0 && (t == 0 || n[t] <= n[t - 1]) &&
                      !__builtin_add_overflow(rows, n[t], &rows),
                  "rnnfast: expected batch_sizes to be positive and never increasing, got ", n[t],
                  " at step ", t);
    }
    TORCH_CHECK(rows == input.size(0), "rnnfast: expected packed input of ", rows,
                " rows, the sum of batch_sizes, got ", input.size(0));
  } else {
    TORCH_CHECK(input.size(0) > 0, "Expected sequence length to be larger than 0 in RNN");
  }
  check_operand("w_ih", w_ih, {H, I}, input);
  check_operand("w_hh", w_hh, {H, H}, input);
  if (b_ih) check_operand("b_ih", *b_ih, {H}, input);
  if (b_hh) check_operand("b_hh", *b_hh, {H}, input);
  if (hx) check_operand("hx", *hx, {batch_of(input, batch_sizes), H}, input);
}

void check_layer_grads(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                       const Tensor& input, const Tensor& w_hh, const Tensor& out,
                       const OptionalTensor& batch_sizes) {
  at::DimVector out_size(input.sizes());
  out_size.back() = w_hh.size(0);
  check_operand("out", out, out_size, input);
  if (grad_out) check_operand("grad_out", *grad_out, out_size, input);
  if (grad_h_n) {
    check_operand("grad_h_n", *grad_h_n, {batch_of(input, batch_sizes), w_hh.size(0)}, input);
  }
}

bool only_cpu_follows(std::initializer_list<at::TensorList> operands) {
  if (at::GradMode::is_enabled()) return false;
  c10::DispatchKeySet keys;
  for (const at::TensorList& tensors : operands) {
    for (const Tensor& x : tensors) {
      if (!x.defined()) continue;
      if (has_tangent(x)) return false;
      keys = keys | x.key_set();
    }
  }
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  keys = ((keys | tls.included_) - tls.excluded_) -
         c10::autograd_dispatch_keyset_with_ADInplaceOrView -
         c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  return keys.highestPriorityTypeId() == c10::DispatchKey::CPU;
}

// ----------------------------------------------------------------------------------- the ops

Outputs call_rnn_layer(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                       const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                       const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                       bool reverse) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::rnn_layer", "")
                       .typed<decltype(call_rnn_layer)>();
  return op.call(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity, reverse);
}

Outputs call_rnn_bidirectional_layer(const Tensor& input, const OptionalTensor& hx,
                                     at::TensorList weights, const OptionalTensor& batch_sizes,
                                     c10::string_view nonlinearity) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::rnn_bidirectional_layer", "")
                       .typed<decltype(call_rnn_bidirectional_layer)>();
  return op.call(input, hx, weights, batch_sizes, nonlinearity);
}

Direction direction_of(int64_t d, const OptionalTensor& hx, at::TensorList weights) {
  TORCH_CHECK(weights.size() == 4 || weights.size() == 8,
              "rnnfast: expected 4 weights, or 8 with biases, for two directions, got ",
              weights.size());
  TORCH_CHECK(!hx || (hx->dim() == 3 && hx->size(0) == 2),
              "rnnfast: expected hx of 3 dimensions, the first 2, got ", hx->sizes());
  const auto half = weights.size() / 2;
  TORCH_CHECK(weights[1].sizes() == weights[half + 1].sizes(),
              "rnnfast: expected w_hh of one size in both directions, got ", weights[1].sizes(),
              " and ", weights[half + 1].sizes());
  const auto w = weights.slice(d * half, half);
  const bool bias = w.size() == 4;
  return {hx ? OptionalTensor(hx->select(0, d)) : std::nullopt, w[0], w[1],
          bias ? OptionalTensor(w[2]) : std::nullopt, bias ? OptionalTensor(w[3]) : std::nullopt,
          /*reverse=*/d == 1};
}

namespace {

// For kernels of one direction.
Outputs one_direction_at_a_time(const Tensor& input, const OptionalTensor& hx,
                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                c10::string_view nonlinearity) {
  std::array<Tensor, 2> out, h_n;
  for (int64_t d = 0; d < 2; ++d) {
    const Direction x = direction_of(d, hx, weights);
    std::tie(out[d], h_n[d]) = call_rnn_layer(input, x.hx, x.w_ih, x.w_hh, x.b_ih, x.b_hh,
                                              batch_sizes, nonlinearity, x.reverse);
  }
  return {at::cat(out, -1), at::stack(h_n)};
}

Gradients call_rnn_layer_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                                  const Tensor& input, const OptionalTensor& hx,
                                  const Tensor& w_ih, const Tensor& w_hh, const Tensor& out,
                                  const OptionalTensor& batch_sizes,
                                  c10::string_view nonlinearity, bool reverse,
                                  std::array<bool, 5> output_mask) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::rnn_layer_backward", "")
                       .typed<decltype(call_rnn_layer_backward)>();
  return op.call(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes, nonlinearity,
                 reverse, output_mask);
}

Gradients call_rnn_layer_backward_(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                                   const Tensor& input, const OptionalTensor& hx,
                                   const Tensor& w_ih, const Tensor& w_hh, const Tensor& out,
                                   const OptionalTensor& batch_sizes,
                                   c10::string_view nonlinearity, bool reverse,
                                   std::array<bool, 5> output_mask, std::array<bool, 3> given,
                                   const OptionalTensor& d_w_ih, const OptionalTensor& d_w_hh,
                                   const OptionalTensor& d_b) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::_rnn_layer_backward_", "")
                       .typed<decltype(call_rnn_layer_backward_)>();
  return op.call(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes, nonlinearity,
                 reverse, output_mask, given, d_w_ih, d_w_hh, d_b);
}

// The same in differentiable operations, for forward mode (registered by rnnfast/ops.py).
Gradients call_rnn_layer_backward_reference(
    const OptionalTensor& grad_out, const OptionalTensor& grad_h_n, const Tensor& input,
    const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh, const Tensor& out,
    const OptionalTensor& batch_sizes, c10::string_view nonlinearity, bool reverse,
    std::array<bool, 5> output_mask) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::_rnn_layer_backward_reference", "")
                       .typed<decltype(call_rnn_layer_backward_reference)>();
  return op.call(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes, nonlinearity,
                 reverse, output_mask);
}

// The backward's own derivative, in differentiable operations (registered by rnnfast/ops.py).
using SecondGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SecondGradients call_rnn_layer_double_backward(
    const OptionalTensor& gg_input, const OptionalTensor& gg_hx, const OptionalTensor& gg_w_ih,
    const OptionalTensor& gg_w_hh, const OptionalTensor& gg_bias, const OptionalTensor& grad_out,
    const OptionalTensor& grad_h_n, const Tensor& input, const OptionalTensor& hx,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& out, const OptionalTensor& batch_sizes,
    c10::string_view nonlinearity, bool reverse) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("rnnfast::_rnn_layer_double_backward", "")
                       .typed<decltype(call_rnn_layer_double_backward)>();
  return op.call(gg_input, gg_hx, gg_w_ih, gg_w_hh, gg_bias, grad_out, grad_h_n, input, hx, w_ih,
                 w_hh, out, batch_sizes, nonlinearity, reverse);
}

// ---------------------------------------------------------------------------------- autograd

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

OptionalTensor if_defined(Tensor x) {
  return x.defined() ? OptionalTensor(std::move(x)) : std::nullopt;
}

// What the nodes have in common. `saved` is in the order of the derived class's enumeration;
// saved[output] is an output of the node's own function. A graph may be walked by
// several threads at once, so the derived class's `run` has the lock.
struct SavingNode : torch::autograd::Node {
  std::array<SavedVariable, 8> saved;
  int output = -1;
  std::string nonlinearity;
  bool reverse = false;

  // How the node is run: on the tensors of compiled autograd's trace, or on its own, which the engine
  // may release afterwards.
  enum class Run { kTraced, kKept, kLast };

  virtual variable_list run(variable_list grads, Run how) = 0;

  Tensor unpack(int i) { return saved[i].unpack(i == output ? getptr() : nullptr); }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return run(std::move(grads), std::exchange(next_, Run::kKept));
  }
  void will_release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    next_ = Run::kLast;
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  // Compiled autograd: what the node's work depends on, and the work on a trace's tensors.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (int i = 0; i < int(saved.size()); ++i) args.collect(saved[i], i == output);
    args.collect(nonlinearity);
    args.collect(reverse);
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& variable : saved) swap.before(variable);
    auto result = run(grads, Run::kTraced);
    for (auto& variable : saved) swap.after(variable);
    return result;
  }

 private:
  Run next_ = Run::kKept;
};

// What a node may give away: what is its own alone, where a backward comes to nothing but a kernel of the
// CPU, neither differentiated nor traced. Meanwhile autograd is passed by.
class GivingAway {
 public:
  // `operands`: what else the backward takes. Takes `out` from the node where the engine would next.
  GivingAway(SavingNode::Run how, const variable_list& grads, const Tensor& out,
             SavedVariable& saved_out, std::initializer_list<Tensor> operands) {
    if (how == SavingNode::Run::kTraced || !only_cpu_follows({grads, out, operands})) return;
    below_.emplace();
    if (how == SavingNode::Run::kLast) saved_out.reset_data();
    given.grad_out = is_own(grads[0]);
    given.grad_h_n = is_own(grads[1]);
    given.out = is_own(out);
  }

  bool only_cpu() const { return below_.has_value(); }

  Given given;

 private:
  // Whether each number is in a place of its own that nobody else can see, and that is the allocator's:
  // no other tensor, no array that it was made of.
  static bool is_own(const Tensor& x) {
    return x.defined() && x.use_count() == 1 && x.storage().use_count() == 1 &&
           x.storage().resizable() && x.is_non_overlapping_and_dense();
  }

  std::optional<at::AutoDispatchBelowADInplaceOrView> below_;
};

// The op that may use up what is given, if anything is.
Gradients backward_of_layer(const OptionalTensor& grad_out, const OptionalTensor& grad_h_n,
                            const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                            const Tensor& w_hh, const Tensor& out,
                            const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                            bool reverse, std::array<bool, 5> output_mask, const Given& given) {
  if (given.something()) {
    return call_rnn_layer_backward_(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes,
                                    nonlinearity, reverse, output_mask,
                                    {given.grad_out, given.grad_h_n, given.out},
                                    if_defined(given.d_w_ih), if_defined(given.d_w_hh),
                                    if_defined(given.d_b));
  }
  return call_rnn_layer_backward(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes,
                                 nonlinearity, reverse, output_mask);
}

// The gradients of the weights that calls of the same weights have in common, in float32 where those are in
// 16 bits.
struct WeightSums {
  int task = -1;  // the walk through the graph that they are of
  Tensor d_w_ih, d_w_hh, d_b;

  void begin_in_float32(const std::array<bool, 5>& mask, const Tensor& w_ih, const Tensor& w_hh) {
    const auto begin = [](bool need, Tensor& sum, at::IntArrayRef sizes) {
      if (need && !sum.defined()) sum = at::zeros(sizes, at::kFloat);
    };
    begin(mask[2], d_w_ih, w_ih.sizes());
    begin(mask[3], d_w_hh, w_hh.sizes());
    begin(mask[4], d_b, w_hh.sizes().slice(0, 1));
  }

  void add(WeightSums other) {
    const auto add_to = [](Tensor& sum, Tensor& x) {
      if (x.defined()) sum = sum.defined() ? sum + x : std::move(x);
    };
    add_to(d_w_ih, other.d_w_ih);
    add_to(d_w_hh, other.d_w_hh);
    add_to(d_b, other.d_b);
  }
};

// Calls that each begin with the state of the one before, as those of a cell in a loop do, are walked from
// the last one on, and leave their gradients of the weights to the one before them. By the edges of the
// first call goes their sum: the engine would make as many of each as there are calls, and add them up.
struct RnnLayerBackward : SavingNode {
  enum { kInput, kHx, kW_ih, kW_hh, kBatchSizes, kOut };

  std::string name() const override { return "RnnLayerBackward"; }

  variable_list run(variable_list grads, Run how) override {
    const bool need_b_ih = task_should_compute_output(4), need_b_hh = task_should_compute_output(5);
    const std::array<bool, 5> mask = {
        task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2),
        task_should_compute_output(3), need_b_ih || need_b_hh};
    const int task = torch::autograd::get_current_graph_task_id();
    variable_list d(6);
    WeightSums sums;  // of the calls after this one
    if (how == Run::kLast) sums = take_what_was_left(task);
    const bool weights = mask[2] || mask[3] || mask[4];
    RnnLayerBackward* before = nullptr;
    if (grads[0].defined() || grads[1].defined()) {
      const Tensor x = unpack(kInput), h0 = unpack(kHx), w_ih = unpack(kW_ih), w_hh = unpack(kW_hh);
      const auto sizes = if_defined(unpack(kBatchSizes));
      Tensor out = unpack(kOut);
      GivingAway own(how, grads, out, saved[kOut], {x, h0, w_ih, w_hh});
      if (weights && how == Run::kLast && own.only_cpu()) {
        before = call_before();
        if (before) sums.add(before->take_what_was_left(task));  // by another call that began there
        if (before && at::isReducedFloatingType(x.scalar_type())) {
          sums.begin_in_float32(mask, w_ih, w_hh);
        }
        own.given.d_w_ih = sums.d_w_ih;
        own.given.d_w_hh = sums.d_w_hh;
        own.given.d_b = sums.d_b;
      }
      if (out.dim() < x.dim()) out = out.unsqueeze(0);  // h_n, of a single step
      WeightSums rest;  // what was not added to sums that were given
      std::tie(d[0], d[1], rest.d_w_ih, rest.d_w_hh, rest.d_b) = backward_of_layer(
          if_defined(grads[0]), if_defined(grads[1]), x, if_defined(h0), w_ih, w_hh, out, sizes,
          nonlinearity, reverse, mask, own.given);
      sums.add(std::move(rest));
    }
    if (before) {
      sums.task = task;
      before->leave(std::move(sums));
      return d;
    }
    d[2] = std::move(sums.d_w_ih);  // the engine makes them of the weights' type
    d[3] = std::move(sums.d_w_hh);
    if (need_b_ih) d[4] = sums.d_b;
    if (need_b_hh && sums.d_b.defined()) d[5] = gradient_of_b_hh(sums.d_b, need_b_ih);
    return d;
  }

  // Of its own: what a hook or a clipping does to one must not reach the other.
  static Tensor gradient_of_b_hh(const Tensor& d_b, bool need_b_ih) {
    return need_b_ih ? d_b.clone() : d_b;
  }

 private:
  // A call that the state this one began with came from, by way of a few other nodes at most: views of it,
  // a stack of all layers' states, a mask. The engine, which comes to this one for the weights' gradients,
  // comes to that one too. Only if nobody looks at what either returns.
  RnnLayerBackward* call_before() const {
    if (!next_edge(1).is_valid() || !post_hooks().empty() ||
        torch::autograd::AnomalyMode::is_enabled()) {
      return nullptr;
    }
    std::array<Node*, 16> nodes = {next_edge(1).function.get()};
    size_t found = 1;
    for (size_t i = 0; i < found; ++i) {
      if (auto* call = dynamic_cast<RnnLayerBackward*>(nodes[i])) {
        if (!has_weights_of(*call)) continue;  // another layer
        return call->post_hooks().empty() ? call : nullptr;
      }
      for (const auto& edge : nodes[i]->next_edges()) {
        if (edge.is_valid() && found < nodes.size()) nodes[found++] = edge.function.get();
      }
    }
    return nullptr;
  }

  bool has_weights_of(const RnnLayerBackward& other) const {
    return std::equal(next_edges().begin() + 2, next_edges().end(), other.next_edges().begin() + 2);
  }

  void leave(WeightSums sums) {
    const std::lock_guard<std::mutex> lock(leaving_);
    const auto same = [&](const WeightSums& other) { return other.task == sums.task; };
    const auto place = std::find_if(left_here_.begin(), left_here_.end(), same);
    place == left_here_.end() ? left_here_.push_back(std::move(sums)) : place->add(std::move(sums));
  }

  WeightSums take_what_was_left(int task) {
    const std::lock_guard<std::mutex> lock(leaving_);
    for (auto place = left_here_.begin(); place != left_here_.end(); ++place) {
      if (place->task != task) continue;
      WeightSums sums = std::move(*place);
      left_here_.erase(place);
      return sums;
    }
    return {};
  }

  // One for each walk that is under way: a hook may begin another within one, which comes to this node
  // before or while it runs. Of a walk that failed they stay, unused.
  std::vector<WeightSums> left_here_;
  std::mutex leaving_;
};

// Both directions' outputs are kept as the one tensor that the layer returned. Each half goes
// through the same differentiable op as a direction of its own would.
struct RnnBidirectionalLayerBackward : SavingNode {
  enum { kInput, kHx, kBatchSizes, kOut, kWeights };  // the last: w_ih, w_hh of either direction

  int64_t per_direction = 0;  // weights that the op takes

  std::string name() const override { return "RnnBidirectionalLayerBackward"; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    SavingNode::compiled_args(args);
    args.collect(per_direction);
  }

  // Gradients of the input by either direction, which the engine adds, of hx, and of the weights.
  variable_list run(variable_list grads, Run how) override {
    variable_list d(3 + 2 * per_direction);
    if (!grads[0].defined() && !grads[1].defined()) return d;
    // Once each: activation checkpointing allows no second time.
    const Tensor x = unpack(kInput), h0 = unpack(kHx);
    const auto sizes = if_defined(unpack(kBatchSizes));
    const bool need_h = h0.defined() && task_should_compute_output(2), bias = per_direction == 4;
    const auto need = [&](int64_t direction, int64_t weight) {
      return task_should_compute_output(3 + direction * per_direction + weight);
    };
    std::array<std::array<bool, 5>, 2> masks;
    std::array<Tensor, 4> w;  // of a direction that is needed: those of another may have changed
    for (int64_t i = 0; i < 2; ++i) {
      masks[i] = {task_should_compute_output(i), need_h, need(i, 0), need(i, 1),
                  bias && (need(i, 2) || need(i, 3))};
      if (masks[i] == std::array<bool, 5>()) continue;
      for (int64_t j = 0; j < 2; ++j) w[2 * i + j] = unpack(kWeights + 2 * i + j);
    }
    const Tensor h = unpack(kOut);
    const GivingAway own(how, grads, h, saved[kOut], {x, h0, w[0], w[1], w[2], w[3]});
    Given given = own.given;
    const c10::SymInt H = h.sym_size(-1) / 2;  // size() would fix what a trace leaves open
    std::array<Tensor, 2> d_h;
    for (int64_t direction = 0; direction < 2; ++direction) {
      const std::array<bool, 5>& mask = masks[direction];
      if (mask == std::array<bool, 5>()) continue;
      const int64_t first = 3 + direction * per_direction;
      const bool need_b_ih = bias && need(direction, 2), need_b_hh = bias && need(direction, 3);
      const auto half = [&](const Tensor& y) {
        return y.defined() ? OptionalTensor(y.narrow_symint(-1, H * direction, H)) : std::nullopt;
      };
      const auto state = [&](const Tensor& y) {
        return y.defined() ? OptionalTensor(y.select(0, direction)) : std::nullopt;
      };
      given.out = own.given.out && direction == 1;  // the memory is that of both
      Tensor d_b;
      std::tie(d[direction], d_h[direction], d[first], d[first + 1], d_b) = backward_of_layer(
          half(grads[0]), state(grads[1]), x, state(h0), w[2 * direction], w[2 * direction + 1],
          *half(h), sizes, nonlinearity, /*reverse=*/direction == 1, mask, given);
      if (need_b_ih) d[first + 2] = d_b;
      if (need_b_hh) d[first + 3] = RnnLayerBackward::gradient_of_b_hh(d_b, need_b_ih);
    }
    if (need_h) d[2] = at::stack(d_h);
    return d;
  }
};

struct RnnLayerDoubleBackward : SavingNode {
  // The tensors that this node's function takes, in its order, and batch_sizes.
  enum { kGradOut, kGradH_n, kInput, kHx, kW_ih, kW_hh, kOut, kBatchSizes };

  std::string name() const override { return "RnnLayerDoubleBackward"; }

  variable_list run(variable_list gg, Run) override {
    if (std::none_of(gg.begin(), gg.end(), [](const Tensor& g) { return g.defined(); })) {
      return variable_list(7);
    }
    auto [d_grad_out, d_grad_h_n, d_input, d_hx, d_w_ih, d_w_hh, d_out] =
        call_rnn_layer_double_backward(
            if_defined(gg[0]), if_defined(gg[1]), if_defined(gg[2]), if_defined(gg[3]),
            if_defined(gg[4]), if_defined(unpack(kGradOut)), if_defined(unpack(kGradH_n)),
            unpack(kInput), if_defined(unpack(kHx)), unpack(kW_ih), unpack(kW_hh), unpack(kOut),
            if_defined(unpack(kBatchSizes)), nonlinearity, reverse);
    return {d_grad_out, d_grad_h_n, d_input, d_hx, d_w_ih, d_w_hh, d_out};
  }
};

// Nodes became intrusively counted after torch 2.11. deleteNode (which frees long graphs without
// recursion) is found by argument, as only the older versions declare it.
template <class N, class Base = torch::autograd::Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Base>) {
    return c10::make_intrusive<N>();
  } else {
    return std::shared_ptr<N>(new N(), [](Base* node) { deleteNode(node); });
  }
}

SavedVariable keep(const OptionalTensor& x) { return SavedVariable(x.value_or(Tensor()), false); }

// Of a tensor whose values no gradient will need: its sizes, so that it may change and be freed.
SavedVariable keep_sizes(const OptionalTensor& x) {
  if (!x) return keep(x);
  const at::NoGradGuard no_grad;
  return SavedVariable(at::zeros({}, x->options()).expand_symint(x->sym_sizes()), false);
}

// Of a weight whose values no gradient will need: it may change, and is alive anyway.
SavedVariable keep_apart(const Tensor& w) { return SavedVariable(w.variable_data(), false); }

constexpr char kNoForwardMode[] =
    " has no forward-mode derivative; rnnfast.functional and the modules take the reference "
    "backend in forward mode";

Outputs rnn_layer_autograd(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                           const Tensor& w_hh, const OptionalTensor& b_ih,
                           const OptionalTensor& b_hh, const OptionalTensor& batch_sizes,
                           c10::string_view nonlinearity, bool reverse) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(has_tangent(input) || has_tangent(hx) || has_tangent(w_ih) || has_tangent(w_hh) ||
        has_tangent(b_ih) || has_tangent(b_hh)),
      "rnnfast::rnn_layer", kNoForwardMode);
  const auto below = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_rnn_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity, reverse);
  };
  if (!torch::autograd::compute_requires_grad(input, hx, w_ih, w_hh, b_ih, b_hh)) return below();

  auto node = make_node<RnnLayerBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, hx, w_ih, w_hh, b_ih, b_hh));
  using Node = RnnLayerBackward;
  node->saved[Node::kInput] = w_ih.requires_grad() ? keep(input) : keep_sizes(input);
  node->saved[Node::kHx] = w_hh.requires_grad() ? keep(hx) : keep_sizes(hx);
  // Of a single step h_n is the same, and is what a cell returns: nothing is kept for it alone.
  const bool single = !batch_sizes && input.sym_size(0) == 1;
  const bool comes_back = !single || (hx && hx->requires_grad());  // a gradient, through W_hh
  node->saved[Node::kW_ih] = input.requires_grad() ? keep(w_ih) : keep_apart(w_ih);
  node->saved[Node::kW_hh] = comes_back ? keep(w_hh) : keep_apart(w_hh);
  node->saved[Node::kBatchSizes] = keep(batch_sizes);
  node->output = Node::kOut;
  node->nonlinearity = std::string(nonlinearity);
  node->reverse = reverse;
  auto [out, h_n] = below();
  torch::autograd::set_history({out, h_n}, node);
  node->saved[Node::kOut] = SavedVariable(single ? h_n : out, /*is_output=*/true);
  return {out, h_n};
}

Outputs rnn_bidirectional_layer_autograd(const Tensor& input, const OptionalTensor& hx,
                                         at::TensorList weights, const OptionalTensor& batch_sizes,
                                         c10::string_view nonlinearity) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(has_tangent(input) || has_tangent(hx) ||
        std::any_of(weights.begin(), weights.end(),
                    [](const Tensor& w) { return has_tangent(w); })),
      "rnnfast::rnn_bidirectional_layer", kNoForwardMode);
  const auto below = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_rnn_bidirectional_layer(input, hx, weights, batch_sizes, nonlinearity);
  };
  if (!torch::autograd::compute_requires_grad(input, hx, weights)) return below();

  auto [out, h_n] = below();
  auto node = make_node<RnnBidirectionalLayerBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, input, hx, weights));
  using Node = RnnBidirectionalLayerBackward;
  const int64_t n = int64_t(weights.size()) / 2;
  const bool w_ih = weights[0].requires_grad() || weights[n].requires_grad();
  const bool w_hh = weights[1].requires_grad() || weights[n + 1].requires_grad();
  node->saved[Node::kInput] = w_ih ? keep(input) : keep_sizes(input);
  node->saved[Node::kHx] = w_hh ? keep(hx) : keep_sizes(hx);
  node->saved[Node::kBatchSizes] = keep(batch_sizes);
  for (int64_t i = 0; i < 4; ++i) {
    const Tensor& w = weights[i / 2 * n + i % 2];
    const bool needed = i % 2 == 1 || input.requires_grad();
    node->saved[Node::kWeights + i] = needed ? keep(w) : keep_apart(w);
  }
  node->per_direction = n;
  node->output = Node::kOut;
  node->nonlinearity = std::string(nonlinearity);
  torch::autograd::set_history({out, h_n}, node);
  node->saved[Node::kOut] = SavedVariable(out, /*is_output=*/true);
  return {out, h_n};
}

Gradients rnn_layer_backward_autograd(const OptionalTensor& grad_out,
                                      const OptionalTensor& grad_h_n, const Tensor& input,
                                      const OptionalTensor& hx, const Tensor& w_ih,
                                      const Tensor& w_hh, const Tensor& out,
                                      const OptionalTensor& batch_sizes,
                                      c10::string_view nonlinearity, bool reverse,
                                      std::array<bool, 5> output_mask) {
  if (has_tangent(grad_out) || has_tangent(grad_h_n) || has_tangent(input) || has_tangent(hx) ||
      has_tangent(w_ih) || has_tangent(w_hh) || has_tangent(out)) {
    return call_rnn_layer_backward_reference(grad_out, grad_h_n, input, hx, w_ih, w_hh, out,
                                             batch_sizes, nonlinearity, reverse, output_mask);
  }
  Gradients d;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    d = call_rnn_layer_backward(grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes,
                                nonlinearity, reverse, output_mask);
  }
  if (!torch::autograd::compute_requires_grad(grad_out, grad_h_n, input, hx, w_ih, w_hh, out)) {
    return d;
  }
  auto node = make_node<RnnLayerDoubleBackward>();
  node->set_next_edges(
      torch::autograd::collect_next_edges(grad_out, grad_h_n, input, hx, w_ih, w_hh, out));
  const std::array<OptionalTensor, 8> kept = {grad_out, grad_h_n, input, hx,
                                              w_ih,     w_hh,     out,   batch_sizes};
  for (size_t i = 0; i < kept.size(); ++i) node->saved[i] = keep(kept[i]);
  node->nonlinearity = std::string(nonlinearity);
  node->reverse = reverse;
  auto& [d_x, d_h, d_w_ih, d_w_hh, d_b] = d;
  torch::autograd::set_history({d_x, d_h, d_w_ih, d_w_hh, d_b}, node);
  return d;
}

// ---------------------------------------------------------------------------------- autocast

// Like the products inside nn.RNN: everything in the autocast dtype (float64 stays as it is).
template <c10::DispatchKey key, c10::DeviceType device>
Outputs rnn_layer_autocast(const Tensor& input, const OptionalTensor& hx, const Tensor& w_ih,
                           const Tensor& w_hh, const OptionalTensor& b_ih,
                           const OptionalTensor& b_hh, const OptionalTensor& batch_sizes,
                           c10::string_view nonlinearity, bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(key)};
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& x) { return at::autocast::cached_cast(dtype, x, device); };
  return call_rnn_layer(cast(input), cast(hx), cast(w_ih), cast(w_hh), cast(b_ih), cast(b_hh),
                        batch_sizes, nonlinearity, reverse);
}

template <c10::DispatchKey key, c10::DeviceType device>
Outputs rnn_bidirectional_layer_autocast(const Tensor& input, const OptionalTensor& hx,
                                         at::TensorList weights, const OptionalTensor& batch_sizes,
                                         c10::string_view nonlinearity) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(key)};
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& x) { return at::autocast::cached_cast(dtype, x, device); };
  return call_rnn_bidirectional_layer(cast(input), cast(hx), cast(weights), batch_sizes,
                                      nonlinearity);
}

}  // namespace
}  // namespace rnnfast

TORCH_LIBRARY(rnnfast, m) {
  // One layer, one direction. input [T, B, I] with any strides, or packed [rows, I] with
  // batch_sizes int64 [T]; hx [B, H], absent: zeros; w_ih [H, I]; w_hh [H, H]; b_ih, b_hh [H].
  // Returns out [T, B, H] (packed: [rows, H]) and h_n [B, H], each sequence's last state.
  m.def(
      "rnn_layer(Tensor input, Tensor? hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, str nonlinearity, bool reverse) -> (Tensor out, Tensor h_n)",
      {at::Tag::pt2_compliant_tag});
  // One layer, both directions, in one tensor: hx [2, B, H]; weights those of either direction,
  // w_ih, w_hh and, with biases, b_ih, b_hh. Returns out [T, B, 2 H] (packed: [rows, 2 H]), the
  // reverse direction in the second half, and h_n [2, B, H].
  m.def(
      "rnn_bidirectional_layer(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, "
      "str nonlinearity) -> (Tensor out, Tensor h_n)",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (input, hx, w_ih, w_hh, bias); one whose output_mask is false is undefined.
  m.def(
      "rnn_layer_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor input, Tensor? hx, "
      "Tensor w_ih, Tensor w_hh, Tensor out, Tensor? batch_sizes, str nonlinearity, bool reverse, "
      "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  // The same, for one that is given (grad_out, grad_h_n, out) to use up: of what is, nothing but the
  // sizes may be read afterwards. Weights' gradients for which there is a sum are added to that, which is
  // in float32 where the layer is in 16 bits, and undefined.
  m.def(
      "_rnn_layer_backward_(Tensor(a!)? grad_out, Tensor(b!)? grad_h_n, Tensor input, Tensor? hx, "
      "Tensor w_ih, Tensor w_hh, Tensor(c!) out, Tensor? batch_sizes, str nonlinearity, "
      "bool reverse, bool[5] output_mask, bool[3] given, Tensor(d!)? d_w_ih, "
      "Tensor(e!)? d_w_hh, Tensor(f!)? d_b) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_rnn_layer_backward_reference(Tensor? grad_out, Tensor? grad_h_n, Tensor input, "
      "Tensor? hx, Tensor w_ih, Tensor w_hh, Tensor out, Tensor? batch_sizes, str nonlinearity, "
      "bool reverse, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Gradients of the backward's (grad_out, ..., out) from those, gg_*, of its results.
  m.def(
      "_rnn_layer_double_backward(Tensor? gg_input, Tensor? gg_hx, Tensor? gg_w_ih, "
      "Tensor? gg_w_hh, Tensor? gg_bias, Tensor? grad_out, Tensor? grad_h_n, Tensor input, "
      "Tensor? hx, Tensor w_ih, Tensor w_hh, Tensor out, Tensor? batch_sizes, str nonlinearity, "
      "bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_tanh(Tensor x) -> Tensor");
  // The checks that every kernel begins with, for kernels that are not C++.
  m.def(
      "_check_layer(Tensor input, Tensor? hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? batch_sizes, str nonlinearity) -> ()",
      &rnnfast::check_layer);
  m.def(
      "_check_layer_grads(Tensor? grad_out, Tensor? grad_h_n, Tensor input, Tensor w_hh, "
      "Tensor out, Tensor? batch_sizes) -> ()",
      &rnnfast::check_layer_grads);
}

TORCH_LIBRARY_IMPL(rnnfast, Autograd, m) {
  m.impl("rnn_layer", &rnnfast::rnn_layer_autograd);
  m.impl("rnn_layer_backward", &rnnfast::rnn_layer_backward_autograd);
  m.impl("rnn_bidirectional_layer", &rnnfast::rnn_bidirectional_layer_autograd);
}

TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("rnn_bidirectional_layer", &rnnfast::one_direction_at_a_time);
}

TORCH_LIBRARY_IMPL(rnnfast, FuncTorchBatchedDecomposition, m) {  // torch.vmap
  m.impl("rnn_bidirectional_layer", &rnnfast::one_direction_at_a_time);
}

TORCH_LIBRARY_IMPL(rnnfast, AutocastCPU, m) {
  m.impl("rnn_layer",
         &rnnfast::rnn_layer_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("rnn_bidirectional_layer",
         &rnnfast::rnn_bidirectional_layer_autocast<c10::DispatchKey::AutocastCPU,
                                                    c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(rnnfast, AutocastCUDA, m) {
  m.impl("rnn_layer",
         &rnnfast::rnn_layer_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
  m.impl("rnn_bidirectional_layer",
         &rnnfast::rnn_bidirectional_layer_autocast<c10::DispatchKey::AutocastCUDA,
                                                    c10::DeviceType::CUDA>);
}
