"""The Python half of ``torch.ops.rnnfast``: fake kernels and a differentiable backward.

Schemas, autograd nodes and kernels are C++ (``csrc/op.cpp``). Nothing here is on the path of a
forward or of an ordinary backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, triton_layer


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
        batch = torch.library.get_ctx().new_dynamic_size()
    return (
        input.new_empty((*input.shape[:-1], hidden_size)),
        input.new_empty((batch, hidden_size)),
    )


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


_library: torch.library.Library | None = None  # its registrations live as long as it does


def register() -> None:
    """Register with the ops that the extension has defined."""
    global _library
    torch.library.register_fake("rnnfast::rnn_layer", _fake_rnn_layer)
    torch.library.register_fake("rnnfast::rnn_layer_backward", _fake_rnn_layer_backward)
    torch.library.register_fake("rnnfast::_tanh", torch.empty_like)
    _library = torch.library.Library("rnnfast", "IMPL")  # type: ignore[no-untyped-call]
    _library.impl(  # type: ignore[no-untyped-call]
        "_rnn_layer_backward_reference",
        reference.rnn_layer_backward,
        "CompositeImplicitAutograd",
    )
    triton_layer.register(_library)
