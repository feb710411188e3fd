// What rnn_layer_cpu.cpp calls of rnn_layer_16bit.cpp.
#pragma once

#include <array>

#include "../op.h"
#include "steps.h"

namespace rnnfast::cpu {

// The output of a forward, and the gradients that output_mask asks for, of tensors stored in bfloat16
// or float16, in float32 arithmetic. There is at least one row. `place`: for all rows of dz, or undefined.
void forward_16bit(const Steps& steps, const Tensor& input, const Direction& layer, bool relu,
                   const Tensor& out);
Gradients backward_16bit(const Steps& steps, const OptionalTensor& grad_out,
                         const OptionalTensor& grad_h_n, const Tensor& input,
                         const OptionalTensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                         const Tensor& out, bool relu, std::array<bool, 5> output_mask,
                         const Tensor& place, const Given& given);

}  // namespace rnnfast::cpu
