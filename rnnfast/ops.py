"""The Python half of ``torch.ops.rnnfast``: fake kernels, FLOPs and the double backward.

Schemas, autograd nodes and kernels are C++ (``csrc/op.cpp``). Nothing here is on the path of a
forward or of an ordinary backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from . import backends, reference, triton_layer


def _fake_rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    reference.check_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity)
    hidden_size = w_hh.shape[0]
    batch: int | torch.SymInt
    if batch_sizes is None:
        batch = input.shape[1]
    elif hx is not None:
        batch = hx.shape[0]
    elif type(batch_sizes) is Tensor:  # meta tensors with real batch_sizes
        batch = int(batch_sizes[0])
    else:
        batch = library.get_ctx().new_dynamic_size()
    return (
        input.new_empty((*input.shape[:-1], hidden_size)),
        input.new_empty((batch, hidden_size)),
    )


def _fake_rnn_bidirectional_layer(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    reference.check_directions(hx, weights)
    half = len(weights) // 2
    biases = (None, None) if half == 2 else ()
    forth, back = (
        (None if hx is None else hx[d], *weights[d * half : (d + 1) * half], *biases)
        for d in (0, 1)
    )
    reference.check_layer(input, *back, batch_sizes, nonlinearity)  # type: ignore
    out, h_n = _fake_rnn_layer(input, *forth, batch_sizes, nonlinearity, False)  # type: ignore
    *rows, hidden_size = out.shape
    return out.new_empty((*rows, 2 * hidden_size)), h_n.new_empty((2, *h_n.shape))


def _fake_rnn_layer_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    out: Tensor,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    shapes = (
        input.shape,
        None if hx is None else hx.shape,
        w_ih.shape,
        w_hh.shape,
        w_hh.shape[:1],
    )
    return tuple(
        input.new_empty(shape) if needed and shape is not None else None
        for needed, shape in zip(output_mask, shapes, strict=True)
    )


def _flops(input: Any, hx: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    """Of the products alone, two per multiply-add, as torch.utils.flop_counter counts others."""
    flops: int = 2 * math.prod(input[:-1]) * w_hh[0] * (w_ih[1] + w_hh[0])
    return flops


def _bidirectional_flops(input: Any, hx: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(input, None, *weights[:2])


def _backward_flops(
    grad_out: Any, grad_h_n: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, *rest: Any, **__: Any
) -> int:
    needs_input, needs_hx, needs_w_ih, needs_w_hh, _ = rest[-1]
    input_size, hidden_size, rows = w_ih[1], w_hh[0], math.prod(input[:-1])
    # Only the initial state's gradient is optional; the others are the recurrence.
    batch = input[1] if len(input) == 3 else (grad_h_n or hx or [0])[0]
    recurrence = hidden_size * (rows if needs_hx else rows - batch)
    asked_for = rows * (input_size * (needs_input + needs_w_ih) + hidden_size * needs_w_hh)
    flops: int = 2 * hidden_size * (recurrence + asked_for)
    return flops


def _backward_by_reference(*args: Any) -> tuple[Tensor | None, ...]:
    *operands, output_mask = args
    gradients = reference.rnn_layer_backward(*operands)
    return tuple(g if needed else None for g, needed in zip(gradients, output_mask, strict=True))


_library: library.Library | None = None  # its registrations live as long as it does


def register() -> None:
    """Register with the ops that the extension has defined."""
    global _library
    library.register_fake("rnnfast::rnn_layer", _fake_rnn_layer)
    library.register_fake("rnnfast::rnn_bidirectional_layer", _fake_rnn_bidirectional_layer)
    library.register_fake("rnnfast::rnn_layer_backward", _fake_rnn_layer_backward)
    library.register_fake("rnnfast::_tanh", torch.empty_like)
    register_flop_formula(torch.ops.rnnfast.rnn_layer)(_flops)
    register_flop_formula(torch.ops.rnnfast.rnn_bidirectional_layer)(_bidirectional_flops)
    register_flop_formula(torch.ops.rnnfast.rnn_layer_backward)(_backward_flops)
    _library = library.Library("rnnfast", "IMPL")  # type: ignore[no-untyped-call]
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        for name, composite in (
            ("_rnn_layer_backward_reference", _backward_by_reference),
            ("_rnn_layer_double_backward", reference.rnn_layer_double_backward),
        ):
            _library.impl(name, composite, key)  # type: ignore[no-untyped-call]
    triton_layer.register(_library, backends.runs("triton"))
