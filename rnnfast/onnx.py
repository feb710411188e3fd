"""ONNX: an RNN is exported as the standard ``RNN`` operator, one node per layer.

``torch.onnx.export(model, ...)`` needs nothing of the user: while it runs, the functional layer
calls :func:`rnn` (for the older TorchScript exporter PyTorch's own RNN, which that one knows). A
program that ``torch.export`` has already captured holds ``torch.ops.rnnfast.rnn_layer`` (or
``rnn_bidirectional_layer``) instead; for such a one pass
``custom_translation_table=rnnfast.onnx.translation_table()``.

The operator: https://onnx.ai/onnx/operators/onnx__RNN.html
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state  # as nn.Module.__call__ does: the cheapest for every call
from torch.compiler import is_exporting

__all__ = ["exporter", "rnn", "translation_table"]

_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu"}
_NO_PACKED = (
    "rnnfast: a PackedSequence has no counterpart in ONNX, whose RNN operator takes padded "
    "batches; export the model on padded input"
)


def exporter() -> str | None:
    """``"export"`` or ``"torchscript"`` (``dynamo=False``) while ``torch.onnx.export`` runs."""
    tracing = _get_tracing_state() is not None
    if not (tracing or is_exporting()) or not torch.onnx.is_in_onnx_export():
        return None
    return "torchscript" if tracing else "export"


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """The call of :func:`rnnfast.functional.rnn` as symbolic ONNX ``RNN`` nodes.

    Raises:
        RuntimeError: packed input, which the operator does not take.
    """
    if batch_sizes is not None:
        warnings.warn(_NO_PACKED, stacklevel=3)  # the exporter swallows errors and tries other ways
        raise RuntimeError(_NO_PACKED)
    directions, hidden_size = 1 + bidirectional, weights[1].shape[0]
    per_layer = directions * (4 if bias else 2)
    x = input.transpose(0, 1) if batch_first else input
    steps, batch = x.shape[:2]
    attributes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "direction": "bidirectional" if bidirectional else "forward",
        "activations": [_ACTIVATIONS[nonlinearity]] * directions,
    }
    final = []
    for layer in range(num_layers):
        own = weights[layer * per_layer : (layer + 1) * per_layer]
        w_ih, w_hh, *biases = (
            torch.stack(list(own[i :: per_layer // directions]))
            for i in range(per_layer // directions)
        )
        b = torch.cat(biases, 1) if biases else None
        state = None if hx is None else hx[layer * directions : (layer + 1) * directions]
        y, y_h = torch.onnx.ops.symbolic_multi_out(
            "RNN",
            (x, w_ih, w_hh, b, None, state),
            attributes,
            dtypes=(x.dtype, x.dtype),
            shapes=((steps, directions, batch, hidden_size), (directions, batch, hidden_size)),
        )
        x = y.transpose(1, 2).flatten(2)
        final.append(y_h)
        if dropout and training and layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    return (x.transpose(0, 1) if batch_first else x), torch.cat(final)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` for ``torch.onnx.export`` of an exported program.

    Returns:
        The translations of ``torch.ops.rnnfast.rnn_layer`` and ``rnn_bidirectional_layer`` into the
        ONNX operator ``RNN``.

    Raises:
        ImportError: onnxscript is not installed; ``torch.onnx`` needs it as well.
    """
    op: Any = import_module("onnxscript").opset18

    def unsqueezed(x: Any) -> Any:
        return op.Unsqueeze(x, op.Constant(value_ints=[0]))

    def node(
        input: Any,
        hx: Any,
        directions: list[tuple[Any, ...]],
        batch_sizes: Any,
        nonlinearity: str,
        direction: str,
    ) -> Any:
        """``RNN`` with the weights of one direction or two: y [T, D, B, H] and y_h [D, B, H]."""
        if batch_sizes is not None:
            raise RuntimeError(_NO_PACKED)
        stacked = []
        for w_ih, w_hh, b_ih, b_hh in directions:
            b = None
            if b_ih is not None or b_hh is not None:
                zero = op.Mul(b_hh if b_ih is None else b_ih, op.CastLike(0.0, w_ih))
                b = op.Concat(
                    zero if b_ih is None else b_ih, zero if b_hh is None else b_hh, axis=0
                )
            stacked.append((w_ih, w_hh, b))
        w, r, b = (
            None if parts[0] is None else op.Concat(*map(unsqueezed, parts), axis=0)
            for parts in zip(*stacked, strict=True)
        )
        return op.RNN(
            input, w, r, b, None, hx,
            hidden_size=directions[0][1].shape[0],
            direction=direction,
            activations=[_ACTIVATIONS[nonlinearity]] * len(directions),
        )  # fmt: skip

    def rnn_layer(
        input: Any,
        hx: Any,
        w_ih: Any,
        w_hh: Any,
        b_ih: Any,
        b_hh: Any,
        batch_sizes: Any,
        nonlinearity: str,
        reverse: bool,
    ) -> Any:
        state = None if hx is None else unsqueezed(hx)
        weights = [(w_ih, w_hh, b_ih, b_hh)]
        direction = "reverse" if reverse else "forward"
        y, y_h = node(input, state, weights, batch_sizes, nonlinearity, direction)
        return (
            op.Squeeze(y, op.Constant(value_ints=[1])),
            op.Squeeze(y_h, op.Constant(value_ints=[0])),
        )

    def rnn_bidirectional_layer(
        input: Any, hx: Any, weights: Any, batch_sizes: Any, nonlinearity: str
    ) -> Any:
        half = len(weights) // 2
        biases = () if half == 4 else (None, None)
        directions = [(*weights[:half], *biases), (*weights[half:], *biases)]
        y, y_h = node(input, hx, directions, batch_sizes, nonlinearity, "bidirectional")
        together = op.Transpose(y, perm=[0, 2, 1, 3])  # [T, B, 2, H]
        return op.Reshape(together, op.Constant(value_ints=[0, 0, -1])), y_h

    return {
        torch.ops.rnnfast.rnn_layer.default: rnn_layer,
        torch.ops.rnnfast.rnn_bidirectional_layer.default: rnn_bidirectional_layer,
    }
