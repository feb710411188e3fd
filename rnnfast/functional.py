"""RNNs on raw weights: layers, directions, dropout and layouts, as calls of one op per layer.
:mod:`rnnfast.modules` holds the parameters; :mod:`rnnfast.backends` picks the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import _VF, Tensor
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from . import backends, onnx, reference

__all__ = ["rnn", "rnn_cell"]


class Call(NamedTuple):
    """The arguments of :func:`rnn`, which says what they are."""

    input: Tensor
    hx: Tensor | None
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None
    nonlinearity: str
    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool


_Layer = Callable[..., tuple[Tensor, Tensor]]

# Looked up once, and called without OpOverload.__call__, a plain Python wrapper: each saves 3 % of
# a small call.
if backends.extension_error is None:
    rnn_op = torch.ops.rnnfast.rnn.default._op
    rnn_cell_op = torch.ops.rnnfast.rnn_cell.default._op


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a multi-layer Elman RNN; the arithmetic of ``torch.nn.RNN``.

    Args:
        input: ``[T, B, I]``; ``[B, T, I]`` if ``batch_first``; packed ``[rows, I]`` with
            ``batch_sizes`` (the ``data`` of a PackedSequence).
        hx: initial states ``[num_layers * D, B, H]``, ``D`` directions; None is zeros. For packed
            input, in the order of the packed batch.
        weights: for each layer and direction ``w_ih, w_hh`` and, if ``bias``, ``b_ih, b_hh``, in
            the order of ``nn.RNN.all_weights``, flattened.
        batch_sizes: int64 ``[T]`` on the CPU, or None.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether ``weights`` holds biases.
        num_layers: number of stacked layers.
        dropout: probability of zeroing each output of every layer but the last, when ``training``.
        training: whether dropout is applied.
        bidirectional: whether every layer has a second direction, from the last step to the first.
        batch_first: layout of ``input`` and of the output; ignored for packed input.

    Returns:
        The last layer's states, ``[T, B, D * H]`` (or batch-first, or packed), and ``h_n`` of
        ``[num_layers * D, B, H]``.

    Raises:
        RuntimeError: an unknown nonlinearity; tensors whose number, sizes, dtypes or devices do not
            fit, naming what was expected.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise reference.unknown_nonlinearity(nonlinearity)
    hidden_size = weights[1].size(-1) if len(weights) > 1 else None
    backend = backends.select(input, hidden_size, batch_sizes is not None)
    if takes_whole_calls(backend):  # the loop below, without its overhead
        drop = dropout if training else 0.0
        return rnn_op(  # type: ignore[no-any-return]
            input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, drop, bidirectional,
            batch_first,
        )  # fmt: skip
    rank = 3 if batch_sizes is None else 2
    if backend == "torch" and input.dim() != rank:  # it would take some, and compute otherwise
        raise RuntimeError(f"rnnfast: expected input of {rank} dimensions, got {list(input.shape)}")
    call = Call(
        input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, dropout, training,
        bidirectional, batch_first,
    )  # fmt: skip
    if backend != "torch" or is_compiling():
        return by_layers(backend, call)
    try:
        return by_layers(backend, call)
    except (RuntimeError, IndexError) as error:  # PyTorch's own words: ours, if they say more
        raise _refusal(error, lambda: _check(call)) from None


def _check_states(call: Call) -> None:
    _, hx, weights, _, _, bias, num_layers, _, _, bidirectional, _ = call
    if num_layers <= 0:
        raise RuntimeError(f"rnnfast: expected num_layers greater than zero, got {num_layers}")
    directions, per_layer = _counts(call)
    if len(weights) != per_layer * directions * num_layers:
        raise RuntimeError(
            f"rnnfast: expected {per_layer * directions * num_layers} weights for "
            f"num_layers={num_layers}, bidirectional={bidirectional}, bias={bias}, "
            f"got {len(weights)}"
        )
    if hx is not None and (hx.dim() != 3 or hx.size(0) != num_layers * directions):
        raise RuntimeError(
            f"rnnfast: expected hx of 3 dimensions, the first {num_layers * directions}, "
            f"got {list(hx.shape)}"
        )


def _counts(call: Call) -> tuple[int, int]:
    """Directions, and weights of each."""
    return (2 if call.bidirectional else 1), (4 if call.bias else 2)


def _refusal(error: Exception, check: Callable[[], None]) -> Exception:
    """What a check says of a call that failed with an error, or that error.

    Under autocast the tensors need not fit: they are cast first.
    """
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        try:
            check()
        except RuntimeError as refused:
            return refused
    return error


def _check(call: Call) -> None:
    """Raise what the op raises of the number, sizes, dtypes and devices of its tensors."""
    _check_states(call)
    input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, *_, batch_first = call
    directions, per_layer = _counts(call)
    x = input.transpose(0, 1) if batch_first and input.dim() == 3 else input
    for layer in range(num_layers):
        for state in range(layer * directions, (layer + 1) * directions):
            w_ih, w_hh, *biases = weights[state * per_layer : (state + 1) * per_layer]
            b_ih, b_hh = biases if bias else (None, None)
            h = None if hx is None else hx[state]
            reference.check_layer(x, h, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity)
        x = x.new_empty(()).expand(*x.shape[:-1], directions * w_hh.shape[0])


def by_layers(backend: str, call: Call) -> tuple[Tensor, Tensor]:
    """:func:`rnn` on a backend of :func:`backends.select`, where no op runs the whole call."""
    exporter = onnx.exporter()
    if exporter == "torchscript" or (backend == "torch" and exporter is None):
        return _torch_rnn(call)
    _check_states(call)
    (input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, dropout, training,
     bidirectional, batch_first) = call  # fmt: skip
    if exporter == "export":
        return onnx.rnn(
            input, hx, weights, batch_sizes=batch_sizes, nonlinearity=nonlinearity, bias=bias,
            num_layers=num_layers, dropout=dropout, training=training,
            bidirectional=bidirectional, batch_first=batch_first,
        )  # fmt: skip
    directions, per_layer = _counts(call)
    layer_of: _Layer = (
        reference.rnn_layer if backend == "reference" else torch.ops.rnnfast.rnn_layer.default
    )

    time_major = batch_sizes is not None or not batch_first
    x = input if time_major else input.transpose(0, 1)
    final = []
    for layer in range(num_layers):
        own = weights[layer * directions * per_layer : (layer + 1) * directions * per_layer]
        first = layer * directions
        if bidirectional and backend != "reference":
            state = hx if hx is None or num_layers == 1 else hx[first : first + 2]
            x, h_n = torch.ops.rnnfast.rnn_bidirectional_layer.default(
                x, state, own, batch_sizes, nonlinearity
            )
            final.append(h_n)
        else:
            outs = []
            for direction in range(directions):
                w_ih, w_hh, *biases = own[direction * per_layer : (direction + 1) * per_layer]
                b_ih, b_hh = biases if bias else (None, None)
                state = None if hx is None else hx[first + direction]
                out, h_n = layer_of(
                    x, state, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity, direction == 1
                )
                outs.append(out)
                final.append(h_n)
            x = outs[0] if directions == 1 else torch.cat(outs, -1)
        if dropout and training and layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    # A caller may change what is returned, but not what a backward keeps, the h_n of a single step
    # (and the sizes are no numbers in a trace by torch.jit).
    kept = _get_tracing_state() or (batch_sizes is None and x.size(0) == 1)
    if bidirectional and backend != "reference":
        h_n = final[0] if num_layers == 1 else torch.cat(final)
    elif len(final) > 1 or kept:
        h_n = torch.stack(final)
    else:  # no view, as nn.RNN's is none: a caller may detach_() it
        h_n = torch.ops.aten._unsafe_view.default(final[0], [1, *final[0].shape])
    return (x if time_major else x.transpose(0, 1)), h_n


def takes_whole_calls(backend: str) -> bool:
    """Whether one C++ op runs the whole call; a trace gets one op per layer."""
    has_op = backend not in ("torch", "reference")
    return has_op and not (is_compiling() or _get_tracing_state())


def _torch_rnn(call: Call) -> tuple[Tensor, Tensor]:
    """PyTorch's own implementation of the same call."""
    (input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, dropout, training,
     bidirectional, batch_first) = call  # fmt: skip
    run = _VF.rnn_tanh if nonlinearity == "tanh" else _VF.rnn_relu
    if hx is None:
        batch = (
            int(batch_sizes[0]) if batch_sizes is not None else input.size(0 if batch_first else 1)
        )
        hx = input.new_zeros((num_layers * (1 + bidirectional), batch, weights[1].size(1)))
    config = (list(weights), bias, num_layers, dropout, training, bidirectional)
    out, h_n = (
        run(input, hx, *config, batch_first)
        if batch_sizes is None
        else run(input, batch_sizes, hx, *config)
    )
    return out, h_n


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """Run one step, ``act(x W_ih^T + b_ih + h W_hh^T + b_hh)``; the arithmetic of ``nn.RNNCell``.

    Args:
        input: ``[B, I]``.
        hx: ``[B, H]``; None is zeros.
        w_ih: ``[H, I]``.
        w_hh: ``[H, H]``.
        b_ih: ``[H]`` or None.
        b_hh: ``[H]`` or None.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Returns:
        The new state, ``[B, H]``.

    Raises:
        RuntimeError: an unknown nonlinearity; tensors whose sizes, dtypes or devices do not fit,
            naming what was expected.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise reference.unknown_nonlinearity(nonlinearity)
    if input.dim() != 2:
        raise RuntimeError(f"rnnfast: expected input of 2 dimensions, got {list(input.shape)}")
    backend = backends.select(input, w_hh.size(-1))
    if takes_whole_calls(backend):
        return rnn_cell_op(  # type: ignore[no-any-return]
            input, hx, w_ih, w_hh, b_ih, b_hh, nonlinearity
        )
    if onnx.exporter():  # ONNX has no cell, and takes plain operators
        backend = "reference"
    if backend == "torch" or 0 in w_ih.shape:  # unlike a layer, a cell may have no inputs or units
        run = _VF.rnn_tanh_cell if nonlinearity == "tanh" else _VF.rnn_relu_cell
        try:
            h0 = input.new_zeros((input.size(0), w_hh.size(1))) if hx is None else hx
            result: Tensor = run(input, h0, w_ih, w_hh, b_ih, b_hh)
            return result
        except (RuntimeError, IndexError) as error:
            if is_compiling() or 0 in w_ih.shape:
                raise
            layer = input[None], hx, w_ih, w_hh, b_ih, b_hh, None, nonlinearity
            raise _refusal(error, lambda: reference.check_layer(*layer)) from None
    layer_of: _Layer = (
        reference.rnn_layer if backend == "reference" else torch.ops.rnnfast.rnn_layer.default
    )
    return layer_of(input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh, None, nonlinearity, False)[1]
