"""The executable specification: one layer, one direction, forward and backward, in plain PyTorch.

    z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh,    h_t = act(z_t),    act = tanh or ReLU

with the shapes of `torch.nn.RNN <https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html>`_
for a single layer and direction: ``T`` steps, ``B`` sequences, ``I`` input and ``H`` hidden
features. Every kernel is tested against these functions in float64, and they run wherever no
kernel applies. They are differentiable any number of times, in reverse and in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["check_layer", "rnn_layer", "rnn_layer_backward"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
_REDUCED = (torch.bfloat16, torch.float16)


def check_layer(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
) -> None:
    """Raise RuntimeError unless the tensors form one layer, as the compiled op does."""
    if nonlinearity not in _ACTIVATIONS:
        raise RuntimeError(
            f"rnnfast: unknown nonlinearity '{nonlinearity}', expected 'tanh' or 'relu'"
        )
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(f"rnnfast: expected input of {rank} dimensions, got {list(input.shape)}")
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(
            "rnnfast: expected w_ih and w_hh of 2 dimensions, got "
            f"{list(w_ih.shape)} and {list(w_hh.shape)}"
        )
    input_size, hidden_size = input.shape[-1], w_hh.shape[0]
    if batch_sizes is None and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    expected: list[tuple[str, Tensor | None, list[int]]] = [
        ("w_ih", w_ih, [hidden_size, input_size]),
        ("w_hh", w_hh, [hidden_size, hidden_size]),
        ("b_ih", b_ih, [hidden_size]),
        ("b_hh", b_hh, [hidden_size]),
    ]
    if batch_sizes is None:
        expected.append(("hx", hx, [input.shape[1], hidden_size]))
    elif hx is not None:
        expected.append(("hx", hx, [hx.shape[0], hidden_size]))
    for name, x, shape in expected:
        if x is None:
            continue
        if list(x.shape) != shape:
            raise RuntimeError(f"rnnfast: expected {name} of size {shape}, got {list(x.shape)}")
        if x.dtype != input.dtype:
            raise RuntimeError(
                f"rnnfast: expected {name} of dtype {input.dtype} like the input, got {x.dtype}"
            )
        if x.device != input.device:
            raise RuntimeError(
                f"rnnfast: expected {name} on {input.device} like the input, got {x.device}"
            )


def _each(f: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> list[Any]:
    return [x if x is None else f(x) for x in tensors]


def _sizes_of(input: Tensor, hx: Tensor | None, batch_sizes: Tensor) -> list[int]:
    sizes: list[int] = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for t, n in enumerate(sizes):
        if n <= 0 or (t > 0 and n > sizes[t - 1]):
            raise RuntimeError(
                "rnnfast: expected batch_sizes to be positive and never increasing, "
                f"got {n} at step {t}"
            )
    if sum(sizes) != input.shape[0]:
        raise RuntimeError(
            f"rnnfast: expected packed input of {sum(sizes)} rows, the sum of batch_sizes, "
            f"got {input.shape[0]}"
        )
    if hx is not None and hx.shape[0] != sizes[0]:
        raise RuntimeError(
            f"rnnfast: expected hx of size {[sizes[0], hx.shape[1]]}, got {list(hx.shape)}"
        )
    return sizes


def _last(steps: Sequence[Tensor]) -> Tensor:
    """The last row of each sequence, from the steps of a batch sorted by decreasing length."""
    final = []
    live = 0
    for step in reversed(steps):
        final.append(step[live:])
        live = max(live, step.shape[0])
    return torch.cat(final) if len(final) > 1 else final[0]


def rnn_layer(
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
    """Run one layer in one direction over all steps.

    Args:
        input: ``[T, B, I]``, or packed ``[rows, I]`` with ``batch_sizes``.
        hx: initial state ``[B, H]``; None is zeros.
        w_ih: ``[H, I]``.
        w_hh: ``[H, H]``.
        b_ih: ``[H]`` or None.
        b_hh: ``[H]`` or None.
        batch_sizes: int64 ``[T]`` on the CPU, as in a PackedSequence, or None.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        reverse: walk from the last step to the first.

    Returns:
        ``out`` of ``[T, B, H]`` (packed: ``[rows, H]``) and ``h_n`` of ``[B, H]``, the state after
        each sequence's last visited step. bfloat16 and float16 are storage types: the arithmetic
        and the carried state are float32.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not form a layer.
    """
    device_type = input.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(x: Tensor) -> Tensor:
            return x if x.dtype == torch.float64 else x.to(dtype)

        narrow = _each(cast, input, hx, w_ih, w_hh, b_ih, b_hh)
        layer: Any = (*narrow, batch_sizes, nonlinearity, reverse)
        with torch.autocast(device_type, enabled=False):
            return rnn_layer(*layer)

    check_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity)
    if input.dtype in _REDUCED:
        wide: Any = (
            *_each(Tensor.float, input, hx, w_ih, w_hh, b_ih, b_hh),
            batch_sizes,
            nonlinearity,
            reverse,
        )
        out, h_n = rnn_layer(*wide)
        return out.to(input.dtype), h_n.to(input.dtype)

    act = _ACTIVATIONS[nonlinearity]
    bias = b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh
    projected = F.linear(input, w_ih, bias)
    if batch_sizes is None:
        steps = list(projected.unbind(0))
    else:
        steps = list(torch.split(projected, _sizes_of(input, hx, batch_sizes)))

    h = steps[0].new_empty((0, w_hh.shape[0])) if hx is None else hx[:0]
    order = range(len(steps) - 1, -1, -1) if reverse else range(len(steps))
    for t in order:
        live = steps[t].shape[0]
        carried = h[:live]
        if carried.shape[0] < live:  # sequences that start at this step
            begin = carried.shape[0]
            start = (
                steps[t].new_zeros((live - begin, w_hh.shape[0])) if hx is None else hx[begin:live]
            )
            carried = torch.cat([carried, start]) if begin else start
        h = act(steps[t] + F.linear(carried, w_hh))
        steps[t] = h
    h_n = steps[0].clone() if reverse else _last(steps).clone()
    return (torch.stack(steps) if batch_sizes is None else torch.cat(steps)), h_n


def rnn_layer_backward(
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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of ``input, hx, w_ih, w_hh`` and of either bias, from those of the outputs.

    With ``g_t`` the gradient of ``out_t`` (plus that of ``h_n`` at each sequence's last visited
    step), the recurrence runs against the forward's direction::

        dz_t = (g_t + W_hh^T dz_{t+1}) * act'(h_t)      tanh' = 1 - h^2,  ReLU' = [h > 0]

    and the rest is ``d_input_t = W_ih^T dz_t``, ``d_w_ih = sum dz_t x_t^T``,
    ``d_w_hh = sum dz_t h_{t-1}^T``, ``d_bias = sum dz_t``.
    """
    if input.dtype in _REDUCED:
        wide: Any = (
            *_each(Tensor.float, grad_out, grad_h_n, input, hx, w_ih, w_hh, out),
            batch_sizes,
            nonlinearity,
            reverse,
        )
        grads = rnn_layer_backward(*wide)
        return tuple(_each(lambda x: x.to(input.dtype), *grads))

    def split(x: Tensor) -> list[Tensor]:
        return list(x.unbind(0) if batch_sizes is None else torch.split(x, batch_sizes.tolist()))

    hs = split(out)
    gs = [torch.zeros_like(h) for h in hs] if grad_out is None else split(grad_out)
    dzs: list[Tensor] = [out] * len(hs)
    last_first = range(len(hs)) if reverse else range(len(hs) - 1, -1, -1)
    dz: Tensor | None = None
    for t in last_first:
        h, g = hs[t], gs[t]
        live, carried = h.shape[0], 0 if dz is None else min(dz.shape[0], h.shape[0])
        parts = []
        if carried and dz is not None:
            parts.append(g[:carried] + dz[:carried] @ w_hh)
        if carried < live:
            end = g[carried:]
            parts.append(end if grad_h_n is None else end + grad_h_n[carried:live])
        dh = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else g
        slope = 1 - h * h if nonlinearity == "tanh" else (h > 0).to(h.dtype)
        dz = dh * slope
        dzs[t] = dz

    # (t, before t) in the forward's order; sequences shorter than the later step have no pair.
    h_prev, dz_next = [], []
    for t in range(1, len(hs)):
        early, late = (t, t - 1) if reverse else (t - 1, t)
        n = min(hs[early].shape[0], hs[late].shape[0])
        h_prev.append(hs[early][:n])
        dz_next.append(dzs[late][:n])
    d_hx = None
    if hx is not None:
        dz_first = _last(dzs) if reverse else dzs[0]
        d_hx = dz_first @ w_hh
        h_prev.append(hx)
        dz_next.append(dz_first)
    dz_all = torch.stack(dzs) if batch_sizes is None else torch.cat(dzs)
    rows = dz_all.flatten(0, -2)
    d_w_hh = torch.cat(dz_next).t() @ torch.cat(h_prev) if h_prev else torch.zeros_like(w_hh)
    return dz_all @ w_ih, d_hx, rows.t() @ input.flatten(0, -2), d_w_hh, rows.sum(0)
